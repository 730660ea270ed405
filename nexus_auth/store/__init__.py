"""Stores: where processes and machines behind one address share tokens, the turn to fetch one, and the quota.

    session.auth = NexusAuth(client_id, client_secret, "test", store="~/.cache/nexus_auth")

A folder makes a `SQLiteStore`, for the processes of one user on one machine; a URL makes a `RedisStore`, for several
machines. Any object with the methods of `Store` will do in their place.
"""

import os
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ..secret import HiddenText
from ._error import StoreError
from ._fork import importing

if TYPE_CHECKING:
    from ._redis import RedisStore
    from ._sqlite import SQLiteStore

__all__ = ["RedisStore", "SQLiteStore", "Store", "StoreError", "open_store"]


def __getattr__(name: str) -> Any:
    # PEP 562: sqlite3 and redis take a while to import, and a process needs one of them at most.
    homes = {"RedisStore": "._redis", "SQLiteStore": "._sqlite"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing:
        return getattr(import_module(homes[name], __name__), name)


def __dir__() -> list[str]:
    return __all__  # help() and completion know of what is loaded late, too


class Store(Protocol):
    """What processes share: permits that run out by themselves, and values that do.

    Write these four methods for another backend, and give an object of that class as `store`. All of them block, for
    a second or two at most, and are called from several threads at once. Each is one atomic step for all who share
    the store: between what it reads and what it writes, nobody else changes anything. Names and owners are short
    ASCII strings, values some kilobytes of sealed bytes, times finite seconds. A store that is out of order raises any
    exception: it is logged, and the process goes on for a while as if it had no store.

    Two equal stores are taken for one, so a store is hashable; an object of a plain class equals itself alone.
    """

    def __hash__(self) -> int:
        """Return a number that is the same for equal stores."""
        return object.__hash__(self)

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        """Hold a permit of `name` for `hold` seconds from now, and return 0; or return how long to wait for one.

        Those that have run out no longer count. If `limit` others are held and `owner` has none, nothing is taken:
        the seconds returned are those until one runs out, if none is given back before. An `owner` that has one
        already gets 0, and its permit is held for `hold` seconds from now.
        """
        raise NotImplementedError

    def release(self, name: str, owner: str, keep: float) -> None:
        """Hold the permit for `keep` seconds from now, even if it has run out meanwhile; 0 gives it back at once."""
        raise NotImplementedError

    def get(self, name: str) -> tuple[bytes, float] | None:
        """Return the value that was put under `name`, and for how many seconds it still lives; None without one."""
        raise NotImplementedError

    def put(self, name: str, value: bytes, ttl: float) -> None:
        """Keep `value` under `name` for `ttl` seconds, in place of what is there."""
        raise NotImplementedError


def open_store(where: str | os.PathLike[str] | Store) -> Store:
    """Return the store that a user's argument `store` stands for: a folder, a URL, or an object with the methods.

    Raises `ValueError` for a string that is neither a folder nor a URL of a kind that is known, `TypeError` for an
    object that is no store, and `ImportError` for a URL where redis-py is not installed.
    """
    if isinstance(where, str) and re.match(r"\s*([a-z][a-z0-9+.-]+://|(redis|valkey)s?:|unix:)", where, re.IGNORECASE):
        with importing:
            from ._redis import RedisStore

        return RedisStore(HiddenText(where.strip()))
    if isinstance(where, (str, os.PathLike)):
        with importing:
            from ._sqlite import SQLiteStore

        return SQLiteStore(str(os.fspath(where)))  # a HiddenText is no path
    methods = ("acquire", "release", "get", "put")
    missing = [method for method in methods if not callable(getattr(where, method, None))]
    if missing or isinstance(where, type):
        what = f"{where.__name__} is a class" if isinstance(where, type) else f"{type(where).__name__} is none"
        lacks = f": it lacks {', '.join(missing)}" if missing else ""
        raise TypeError(f"store must be a folder, a URL, or an object with the methods of a Store; {what}{lacks}")
    try:
        hash(where)
    except TypeError:
        raise TypeError(f"store must be hashable, and {type(where).__name__} is not: it lacks __hash__") from None
    return where
