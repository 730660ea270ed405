"""SQLite: a store in a folder, for the processes of one user on one machine."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from ..value import Value
from ._error import StoreError
from ._fork import using_sqlite

T = TypeVar("T")

logger: logging.Logger = logging.getLogger(__package__)

_FILE = "store-1.sqlite3"  # another layout of the tables takes another number, and leaves this file alone
_TABLES = [
    "CREATE TABLE permits (name TEXT, owner TEXT, hold REAL, wall REAL, monotonic REAL, UNIQUE (name, owner))",
    "CREATE TABLE items (name TEXT UNIQUE, value BLOB, ttl REAL, wall REAL, monotonic REAL)",
]
_PATIENCE = 1.0  # seconds for which one operation waits for others


class Moment(Value):
    """A moment on two clocks, in seconds.

    Neither can be relied on alone. The wall clock is set, forward and back. The monotonic clock starts again with the
    machine, stops while it sleeps, and is another one in a time namespace. It is rare that both go wrong within the
    life of one permit.
    """

    wall: float
    monotonic: float

    def ages(self, now: Moment) -> list[float]:
        """Return how long ago this was, by each clock that can tell; a clock by which it is yet to come cannot."""
        return [age for age in (now.wall - self.wall, now.monotonic - self.monotonic) if age >= 0]


def this_moment() -> Moment:
    """Return what the two clocks of this machine say."""
    return Moment(time.time(), time.monotonic())


def permit_left(since: Moment, hold: float, now: Moment) -> float:
    """Return for how many more seconds a permit is held: it is as long as either clock says so."""
    return max((hold - age for age in since.ages(now) if age < hold), default=0.0)


def value_left(since: Moment, ttl: float, now: Moment) -> float:
    """Return for how many more seconds a value lives: the clock by which more of its life is gone is believed."""
    return max(0.0, ttl - max(since.ages(now), default=ttl))


class SQLiteStore:
    """A store for the processes of one user on one machine: a database in `folder`, made where it is missing.

    Folder and file are for their owner alone. Where they are open to others or belong to another user, or are links,
    every operation raises `StoreError`; so it does when the database stays locked for a second. A folder on a network
    drive is not supported. A leading `~` in `folder` is the user's home. Two stores of one folder are equal.
    """

    def __init__(self, folder: str | os.PathLike[str], *, _now: Callable[[], Moment] = this_moment) -> None:
        if not os.fspath(folder) or "\0" in os.fspath(folder):
            raise ValueError("store must be a folder or a URL; it is empty, or has a NUL in it")
        try:
            path = Path(folder).expanduser()
        except RuntimeError as error:
            raise ValueError(f"store must be a folder that can be found: {error}") from None
        # Absolute, since the working directory may change.
        self.folder: Path = Path(os.path.abspath(path))
        self._file = self.folder / _FILE
        self._now = _now

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SQLiteStore) and self.folder == other.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def __repr__(self) -> str:
        return f"SQLiteStore({str(getattr(self, 'folder', ''))!r})"  # error trackers show what could not be made, too

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        """Hold a permit of `name` for `hold` seconds from now, and return 0; or return how long to wait for one."""

        def change(connection: sqlite3.Connection, now: Moment) -> float:
            held: list[float] = []
            renewed = False
            permits = "SELECT rowid, name = ?, owner = ?, hold, wall, monotonic FROM permits"
            for row, same_name, same_owner, *numbers in connection.execute(permits, (name, owner)).fetchall():
                left = permit_left(*_since(numbers), now)
                if not left:
                    connection.execute("DELETE FROM permits WHERE rowid = ?", (row,))
                elif same_name:
                    held.append(left)
                    renewed = renewed or bool(same_owner)
            if len(held) >= limit and not renewed:
                return sorted(held)[len(held) - limit]
            _hold(connection, name, owner, hold, now)
            return 0.0

        return self._change(change)

    def release(self, name: str, owner: str, keep: float) -> None:
        """Hold the permit for `keep` seconds from now, even if it has run out meanwhile; 0 gives it back at once."""

        def change(connection: sqlite3.Connection, now: Moment) -> None:
            _hold(connection, name, owner, keep, now)

        self._change(change)

    def get(self, name: str) -> tuple[bytes, float] | None:
        """Return the value that was put under `name`, and for how many seconds it still lives; None without one."""

        def look(connection: sqlite3.Connection) -> tuple[bytes, float] | None:
            if not _has_tables(connection):
                return None
            items = "SELECT value, ttl, wall, monotonic FROM items WHERE name = ?"
            for value, *numbers in connection.execute(items, (name,)).fetchall():
                left = value_left(*_since(numbers), self._now())
                if not isinstance(value, bytes):
                    raise sqlite3.DatabaseError("a value is not made of bytes")
                return (value, left) if left else None
            return None

        return self._run(look)

    def put(self, name: str, value: bytes, ttl: float) -> None:
        """Keep `value` under `name` for `ttl` seconds, in place of what is there."""

        def change(connection: sqlite3.Connection, now: Moment) -> None:
            for row, *numbers in connection.execute("SELECT rowid, ttl, wall, monotonic FROM items").fetchall():
                if not value_left(*_since(numbers), now):
                    connection.execute("DELETE FROM items WHERE rowid = ?", (row,))
            values = (name, value, ttl, now.wall, now.monotonic)
            connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)", values)

        self._change(change)

    def _change(self, change: Callable[[sqlite3.Connection, Moment], T]) -> T:
        """Return what `change` does in one transaction, given the time at which it has the database for itself."""

        def attempt(connection: sqlite3.Connection) -> T:
            # One that began by reading would be refused when it comes to write beside another.
            connection.execute("BEGIN IMMEDIATE")
            if not _has_tables(connection):
                for table in _TABLES:
                    connection.execute(table)
            result = change(connection, self._now())
            connection.execute("COMMIT")
            return result

        return self._run(attempt)

    def _run(self, attempt: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `attempt` does with a connection; if the file is damaged, what it does with a new file."""
        until = time.monotonic() + _PATIENCE  # to wait for other threads takes from it, too
        try:
            with using_sqlite:  # one operation of the process at a time
                status = self._prepare()
                try:
                    return self._connected(attempt, until)
                except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                    if not _is_damage(error):
                        raise
                    logger.warning("the store in %s is damaged, and made anew: %s", self.folder, error)
                self._remove(status)
                self._prepare()
                return self._connected(attempt, until)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the store in {self.folder} cannot be used: {error}") from error

    def _connected(self, attempt: Callable[[sqlite3.Connection], T], until: float) -> T:
        """Return what `attempt` does with a connection of its own: none is kept, for a thread or a fork to meet."""
        patience = max(0.0, until - time.monotonic())
        uri = f"{self._file.as_uri()}?mode=rw"  # else a file that vanishes would be made anew, for all to read
        with closing(sqlite3.connect(uri, timeout=patience, isolation_level=None, uri=True)) as connection:
            connection.text_factory = bytes  # what stands in a damaged file need not be text
            # What a process that is killed has written is safe without. A power cut may cost the file.
            connection.execute("PRAGMA synchronous = OFF")
            return attempt(connection)

    def _prepare(self) -> os.stat_result:
        """Make what is missing of folder and file, and return the file's status; nobody else may reach it."""
        _make_folder(self.folder)
        _require_private(self.folder, stat.S_ISDIR, "folder")
        if not self._file.exists():
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)  # Windows has not this one
            with suppress(FileExistsError):
                os.close(os.open(self._file, flags, 0o600))
        return _require_private(self._file, stat.S_ISREG, "file")

    def _remove(self, damaged: os.stat_result) -> None:
        """Remove the damaged file, unless another process has put a new one in its place."""
        with suppress(FileNotFoundError):
            status = self._file.lstat()
            if (status.st_ino, status.st_mtime_ns) == (damaged.st_ino, damaged.st_mtime_ns):
                self._file.unlink()  # its journal does no harm: SQLite removes one that belongs to an empty file


def _since(numbers: Sequence[object]) -> tuple[Moment, float]:
    """Return since when a row counts, and for how many seconds."""
    seconds, wall, monotonic = numbers
    if not (isinstance(seconds, float) and isinstance(wall, float) and isinstance(monotonic, float)):
        raise sqlite3.DatabaseError("a time is not a number")
    return Moment(wall, monotonic), seconds


def _hold(connection: sqlite3.Connection, name: str, owner: str, seconds: float, now: Moment) -> None:
    values = (name, owner, seconds, now.wall, now.monotonic)
    connection.execute("INSERT OR REPLACE INTO permits VALUES (?, ?, ?, ?, ?)", values)


def _has_tables(connection: sqlite3.Connection) -> bool:
    """Return whether the tables are there; other ones are damage."""
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL ORDER BY rowid").fetchall()
    tables = [sql for (sql,) in found]
    if tables and tables != [table.encode() for table in _TABLES]:
        raise sqlite3.DatabaseError("it has other tables")
    return bool(tables)


def _is_damage(error: sqlite3.DatabaseError | UnicodeDecodeError) -> bool:
    """Return whether the file is broken, or no database at all, rather than locked, full or read-only.

    Python 3.10 tells no code, but for SQLITE_CORRUPT and SQLITE_NOTADB it raises the class itself, for the others a
    subclass; or it cannot decode a message that quotes what is broken.
    """
    return type(error) in (sqlite3.DatabaseError, UnicodeDecodeError)


def _make_folder(folder: Path) -> None:
    """Make a folder where there is nothing, and those above it, for their owner alone."""
    if folder.exists():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(0o700)


def _require_private(path: Path, is_kind: Callable[[int], bool], kind: str) -> os.stat_result:
    """Return the status of `path`; raise `StoreError` unless it is a file or folder of ours alone."""
    status = path.lstat()
    if not is_kind(status.st_mode):
        raise StoreError(f"{path} must be a {kind}, and no link to one")
    if sys.platform != "win32":  # pragma: no branch  # there a user's folders are private, and modes say nothing
        if status.st_uid != os.geteuid():
            raise StoreError(f"{path} belongs to another user: name a folder of your own as the store")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise StoreError(f"{path} is open to other users: take their rights away with chmod go-rwx")
    return status
