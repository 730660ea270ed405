"""The stores: one table of behaviour that holds for all of them, then what each of them has to withstand."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import os
import pickle
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Clock
from herd import CLIENT, MemoryStore
from server import Server, closed_port, running_server

import nexus_auth.store
from nexus_auth.secret import HiddenText
from nexus_auth.store import RedisStore, SQLiteStore, Store, StoreError, _redis, _seal, _sqlite, open_store
from nexus_auth.store._seal import Seal
from nexus_auth.store._sqlite import Moment, permit_left, value_left
from nexus_auth.value import replace

FILE = "store-1.sqlite3"
posix = pytest.mark.skipif(sys.platform == "win32", reason="owners, modes and forks are those of POSIX")
Operation = Callable[[Store], object]
CHANGES: dict[str, Operation] = {
    "acquire": lambda store: store.acquire("name", "owner", 2, 10),
    "keep": lambda store: store.release("name", "owner", 10),
    "give back": lambda store: store.release("name", "owner", 0),
    "put": lambda store: store.put("name", b"value", 10),
}
OPERATIONS: dict[str, Operation] = {**CHANGES, "get": lambda store: store.get("name")}
LENT: dict[str, tuple[str, dict[str, Any]]] = {
    "redis-py that decodes": ("redis", {"decode_responses": True}),
    "redis-py with RESP3": ("redis", {"protocol": 3}),
    "valkey-py": ("valkey", {}),
}


@contextlib.contextmanager
def client_of(server: Server, library: str = "redis", **options: Any) -> Generator[Any]:
    with getattr(pytest.importorskip(library), library.capitalize())(port=server.port, **options) as client:
        yield client


@pytest.fixture
def folder_store(tmp_path: Path) -> SQLiteStore:
    """A store in a folder, with a value in it."""
    store = SQLiteStore(tmp_path / "store")
    store.put("name", b"value", 100)
    return store


@pytest.fixture
def redis_store(server: Server) -> RedisStore:
    """A store in a server of its own, with a value in it."""
    store = RedisStore(server.url)
    store.put("name", b"value", 100)
    return store


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with client_of(server, decode_responses=True) as client:
        yield client


def value_in(store: Store) -> bytes | None:
    found = store.get("name")
    return found[0] if found else None


def raises_a_store_error(store: Store, operations: dict[str, Operation] = OPERATIONS, words: str | None = None) -> None:
    for operation in operations.values():
        with pytest.raises(StoreError, match=words):
            operation(store)


# Every store


@pytest.fixture(params=["memory", "sqlite", "redis", *LENT])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    name, prefix = request.param, uuid.uuid4().hex
    if name == "memory":
        yield MemoryStore()
    elif name == "sqlite":
        yield SQLiteStore(tmp_path)
    elif name == "redis":
        yield RedisStore(request.getfixturevalue("shared_server").url, prefix)
    else:
        library, options = LENT[name]
        with client_of(request.getfixturevalue("shared_server"), library, **options) as client:
            yield RedisStore(client, prefix)


def test_as_many_permits_as_the_limit_are_held_and_one_more_is_told_how_long(store: Store) -> None:
    assert [store.acquire("name", owner, 3, hold) for owner, hold in (("a", 30), ("b", 10), ("c", 20))] == [0] * 3
    assert 9 < store.acquire("name", "d", 3, 5) <= 10
    assert 19 < store.acquire("name", "d", 2, 5) <= 20
    assert store.acquire("other name", "d", 3, 5) == 0


def test_who_holds_a_permit_renews_it(store: Store) -> None:
    store.acquire("name", "a", 2, 10)
    store.acquire("name", "b", 2, 40)
    assert store.acquire("name", "a", 2, 30) == 0
    assert 29 < store.acquire("name", "c", 2, 5) <= 30


def test_a_permit_is_kept_from_its_release_on_or_given_back(store: Store) -> None:
    store.acquire("name", "a", 1, 100)
    store.release("name", "a", 10)
    assert 9 < store.acquire("name", "b", 1, 5) <= 10
    store.release("name", "a", 0)
    store.release("name", "a", 0)
    assert store.acquire("name", "b", 1, 5) == 0


def test_a_permit_runs_out_and_is_still_kept_on_release(store: Store) -> None:
    store.acquire("name", "long", 2, 100)
    store.acquire("name", "a", 2, 0.05)
    while wait := store.acquire("name", "b", 2, 10):
        assert wait < 0.1
        time.sleep(wait)
    store.release("name", "a", 20)
    assert 19 < store.acquire("name", "c", 2, 5) <= 20  # two have to run out
    store.release("name", "a", 0)
    assert 9 < store.acquire("name", "c", 2, 5) <= 10


def test_a_value_lives_for_its_time(store: Store) -> None:
    assert store.get("name") is None
    for value, ttl in ((bytes(range(256)), 10), (b"", 20), (b"x" * 20_000, 30)):
        store.put("name", value, ttl)
        found = store.get("name")
        assert found
        assert found[0] == value
        assert ttl - 1 < found[1] <= ttl
    assert store.get("other name") is None
    store.put("name", b"shortly", 0.05)
    while found := store.get("name"):
        assert found[1] < 0.1
        time.sleep(found[1])
    store.put("name", b"value", 10)
    store.put("name", b"dead at once", 0)
    assert store.get("name") is None


def test_threads_never_hold_more_than_the_limit(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        waits = list(pool.map(lambda owner: store.acquire("name", str(owner), 6, 10), range(40)))
    assert waits.count(0) == 6


# Opening


def as_a_tracker_sees_it(error: BaseException) -> str:
    """Return an error with its causes and the local variables of all frames but that of the test."""
    frames = error.__traceback__ and error.__traceback__.tb_next
    finished = sys.version_info >= (3, 11)  # before, it fails at the repr of an object whose __init__ has raised
    return "".join(traceback.TracebackException(type(error), error, frames, capture_locals=finished).format())


class NamedStore(MemoryStore, Store):
    """A store that says in its bases what it is."""


@pytest.mark.parametrize(
    ("where", "store"),
    [
        ("~/a/../b", "SQLiteStore('/home/someone/b')"),
        (Path("~/b"), "SQLiteStore('/home/someone/b')"),
        ("/b c/ü#?.d", "SQLiteStore('/b c/ü#?.d')"),
        ("/a/redis://b", "SQLiteStore('/a/redis:/b')"),
        ("redis://cache", "RedisStore('redis://cache', prefix='nexus_auth:')"),
        (" valkey://:s3cret@cache:6380/1\n", "RedisStore('redis://cache:6380/1', prefix='nexus_auth:')"),
        ("VALKEYS://me:s3cret@[::1]:6380", "RedisStore('rediss://[::1]:6380', prefix='nexus_auth:')"),
        ("redis://me:s3@cret@cache", "RedisStore('redis://cache', prefix='nexus_auth:')"),
        ("unix:///run/x?password=s3cret&db=2", "RedisStore('unix:///run/x', prefix='nexus_auth:')"),
    ],
)
def test_what_a_user_names(where: str | Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert repr(open_store(where)) == str(open_store(where)) == store
    assert len({open_store(where), open_store(where)}) == 1
    assert open_store(where) != open_store(f"{str(where).rstrip()}2")
    assert open_store(where) != object()


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("", ValueError, "folder or a URL"),
        ("a\0b", ValueError, "NUL"),
        ("~nobody_of_that_name/x", ValueError, "home"),
        ("http://:s3cret@cache", ValueError, "redis://, rediss://, unix://, valkey://, valkeys://"),
        ("redis:/:s3cret@cache", ValueError, "redis://"),
        ("redis://:s3cret/1@cache", ValueError, "percent-encode"),
        ("redis://:12#s3cret@cache", ValueError, "percent-encode"),
        ("redis://:12?s3cret@cache", ValueError, "percent-encode"),
        ("redis://:s3cret@cache:port", ValueError, "port"),
        ("redis://:s3cret@cache?no_such_option=1", ValueError, "options"),
        ("redis://:s3cret@cache?socket_timeout=soon", ValueError, "options"),
        ("redis://:s3cret@[cache", ValueError, "host"),
        (b"folder", TypeError, "bytes is none: it lacks acquire, release, get, put"),
        ({}, TypeError, "dict is none: it lacks acquire, release, put"),
        (MemoryStore, TypeError, "MemoryStore is a class"),
        (type("Half", (MemoryStore,), {"release": None})(), TypeError, "store .* Half is none: it lacks release$"),
        (type("Loose", (MemoryStore,), {"__hash__": None})(), TypeError, "store .* Loose is not: .* __hash__"),
    ],
)
def test_what_is_no_store(where: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        open_store(HiddenText(where) if isinstance(where, str) else where)
    assert "store" in str(caught.value)
    assert "s3cret" not in as_a_tracker_sees_it(caught.value)


@pytest.mark.parametrize("kind", [MemoryStore, NamedStore])
def test_an_object_with_the_methods_is_a_store(kind: type[Store]) -> None:
    store = kind()
    assert open_store(store) is store
    assert store in {store}
    assert kind() not in {store}


@pytest.mark.parametrize(
    ("url_or_client", "error", "words"),
    [
        (object(), TypeError, "a blocking client of redis-py or valkey-py, not object"),
        (type("Later", (), {"eval": print, "__aenter__": print})(), TypeError, "a blocking client .* not Later"),
        ("cache:6379", ValueError, "a URL, which begins with redis://"),
        ("", ValueError, "a URL, which begins with redis://"),
    ],
)
def test_what_is_neither_a_url_nor_a_client(url_or_client: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RedisStore(url_or_client)


def test_help_knows_of_what_is_loaded_late() -> None:
    assert {"RedisStore", "SQLiteStore", "Store"} <= set(dir(nexus_auth.store))


def test_without_redis_py_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match="pip install redis"):
        open_store("redis://cache")


def test_to_import_loads_no_backend() -> None:
    script = """
        import sys, nexus_auth.store
        from nexus_auth.store import Store, open_store
        backends = {"sqlite3", "redis", "cryptography"}
        assert not backends & set(sys.modules)
        open_store("/tmp")
        assert backends & set(sys.modules) == {"sqlite3"}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert not hasattr(nexus_auth.store, "Other")


def test_stores_of_one_client_and_prefix_are_equal() -> None:
    one: Any = SimpleNamespace(eval=print)
    other: Any = SimpleNamespace(eval=print)
    assert RedisStore(one) == RedisStore(one)
    assert hash(RedisStore(one)) == hash(RedisStore(one))
    assert RedisStore(one) not in (RedisStore(other), RedisStore(one, "mine:"))


def test_copies(tmp_path: Path) -> None:
    for store in (SQLiteStore(tmp_path), RedisStore("redis://cache?db=2", "mine:")):
        assert pickle.loads(pickle.dumps(store)) == copy.deepcopy(store) == copy.copy(store) == store


@pytest.mark.parametrize(
    "url", ["redis://:s3cret@cache", "unix:///x?password=s3cret", "rediss://cache?ssl_password=s3cret"]
)
def test_a_password_is_in_no_pickle(url: str) -> None:
    store = open_store(url)
    with pytest.raises(TypeError, match="make the store in the process that uses it") as caught:
        pickle.dumps(store)
    assert "s3cret" not in str(caught.value)
    assert copy.deepcopy(store) == copy.copy(store) == store


# SQLite: the two clocks


SINCE = Moment(1e9, 5000)


def after(wall: float, monotonic: float) -> Moment:
    """Return the moment at which so much has passed since `SINCE` by each clock."""
    return Moment(SINCE.wall + wall, SINCE.monotonic + monotonic)


@pytest.mark.parametrize(
    ("wall", "monotonic", "permit", "value"),
    [
        (0, 0, 60, 60),
        (20, 20, 40, 40),
        (60, 60, 0, 0),
        (20, -5000, 40, 40),  # after a reboot
        (20, 5, 55, 40),  # after a sleep, or a reboot
        (5000, 20, 40, 0),  # the wall clock was set forward
        (-3600, 20, 40, 40),  # or back
        (-20, 70, 0, 0),
        (5, 20, 55, 40),  # a little
        (5000, 5000, 0, 0),
        (-3600, -5000, 0, 0),  # neither can tell
    ],
)
def test_what_is_left_of_60_seconds(wall: float, monotonic: float, permit: float, value: float) -> None:
    assert permit_left(SINCE, 60, after(wall, monotonic)) == permit
    assert value_left(SINCE, 60, after(wall, monotonic)) == value


def test_one_clock_that_is_right_is_enough() -> None:
    """Whatever the other says, after steps, sleeps and reboots; left alone, a permit runs out within two holds."""
    for right, wrong in itertools.product(range(0, 130, 5), range(-130, 130, 5)):
        for wall, monotonic in ((right, wrong), (wrong, right)):
            left = permit_left(SINCE, 60, after(wall, monotonic))
            assert max(0, 60 - right) <= left <= 60
            left += permit_left(SINCE, 60, after(wall + left, monotonic + left))
            assert left <= 120
            assert permit_left(SINCE, 60, after(wall + left, monotonic + left)) == 0
            assert value_left(SINCE, 60, after(wall, monotonic)) <= max(0, 60 - right)


def test_a_folder_asks_both_and_keeps_nothing_that_has_run_out(tmp_path: Path) -> None:
    now = SINCE
    store = SQLiteStore(tmp_path, _now=lambda: now)
    store.acquire("gone", "a", 1, 60)
    store.put("gone", b"value", 60)
    now = after(60, 60)
    store.acquire("name", "a", 1, 60)
    store.put("name", b"value", 60)
    now = after(80, 70)
    assert store.acquire("name", "b", 1, 60) == 50
    assert store.get("name") == (b"value", 40)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        for table in ("permits", "items"):
            assert connection.execute(f"SELECT name FROM {table}").fetchall() == [("name",)]


# SQLite: who may reach the file


@posix
def test_only_its_owner_may_reach_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        SQLiteStore(tmp_path / "a" / "b").put("name", b"value", 10)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o700, "b": 0o700, FILE: 0o600}


@posix
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("ln -s ../elsewhere/$F store/$F", "must be a file, and no link"),
        ("ln -s ../nowhere store/$F", "must be a file, and no link"),
        ("mkdir store/$F", "must be a file"),
        ("mkfifo -m 600 store/$F", "must be a file"),
        ("rmdir store; ln -s elsewhere store", "must be a folder, and no link"),
        ("rmdir store; ln -s nowhere store", "must be a folder, and no link"),
        ("rmdir store; touch store", "must be a folder"),
        ("install -m 640 /dev/null store/$F", "open to other users"),
        ("install -m 604 /dev/null store/$F", "open to other users"),
        ("chmod 750 store", "open to other users"),
        ("chmod 701 store", "open to other users"),
        ("chown 65534 store", "another user"),
        ("install -m 600 -o 65534 /dev/null store/$F", "another user"),
    ],
)
def test_what_others_may_reach_is_not_used(tmp_path: Path, spoil: str, words: str) -> None:
    if "65534" in spoil and os.geteuid():
        pytest.skip("only root gives files away")
    elsewhere = SQLiteStore(tmp_path / "elsewhere")
    elsewhere.acquire("name", "other", 1, 100)
    (tmp_path / "store").mkdir(0o700)
    subprocess.run(["sh", "-ec", spoil], cwd=tmp_path, env={**os.environ, "F": FILE}, check=True)
    raises_a_store_error(SQLiteStore(tmp_path / "store"), words=words)
    assert elsewhere.acquire("name", "me", 1, 100) > 99
    assert not (tmp_path / "nowhere").exists()


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    raises_a_store_error(SQLiteStore(tmp_path / "file" / "store"))


# SQLite: when the file cannot be used


@contextlib.contextmanager
def as_another_user(*paths: Path) -> Generator[None]:
    """Become somebody to whom `paths` belong, if this is root, who may write everywhere."""
    user = os.geteuid()
    try:
        for path in paths if user == 0 else ():
            os.chown(path, 65534, 65534)
        os.seteuid(user or 65534)
    except OSError as error:
        pytest.skip(f"this root cannot become somebody else: {error}")
    try:
        yield
    finally:
        os.seteuid(user)


@posix
def test_what_can_only_be_read_is_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # that of pytest is closed to the other user
        folder, file = Path(name), Path(name) / FILE
        SQLiteStore(folder).put("name", b"value", 10)
        file.chmod(0o400)
        folder.chmod(0o500)
        with as_another_user(folder, file):
            assert value_in(SQLiteStore(folder)) == b"value"
            raises_a_store_error(SQLiteStore(folder), CHANGES)
        folder.chmod(0o700)


@posix
def test_a_full_disk(folder_store: SQLiteStore) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        raises_a_store_error(folder_store, {"put": lambda store: store.put("other", b"x" * 50_000, 10)})
        found = value_in(folder_store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == b"value"
    folder_store.put("other", b"x", 10)


def test_a_lock_that_is_never_released_holds_everybody_up_for_a_second(folder_store: SQLiteStore) -> None:
    with contextlib.closing(sqlite3.connect(folder_store.folder / FILE, isolation_level=None)) as hung:
        hung.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        with ThreadPoolExecutor(len(OPERATIONS)) as pool:
            list(pool.map(lambda item: raises_a_store_error(folder_store, dict([item])), OPERATIONS.items()))
        assert time.monotonic() - begun < 3  # one after the other would take five
    assert value_in(folder_store) == b"value"


def spoil(file: Path, damage: str | bytes | int) -> None:
    """Cut off a file after so many bytes, or write something else, or change it by SQL."""
    if isinstance(damage, str):
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.executescript(damage)
    else:
        file.write_bytes(damage * 100 if isinstance(damage, bytes) else file.read_bytes()[:damage])


@pytest.mark.parametrize(
    "damage",
    [
        b"garbage",
        b"SQLite format 3",
        100,
        4096,
        5000,
        "DROP TABLE items",
        "ALTER TABLE permits ADD COLUMN more",
        "UPDATE permits SET hold = 'long'",
        "UPDATE permits SET wall = NULL",
        "UPDATE items SET monotonic = x'00'",
        "UPDATE items SET value = 7",
        "PRAGMA writable_schema = ON; UPDATE sqlite_master SET name = CAST(x'ff' AS TEXT), tbl_name = x'fe'",
    ],
    ids=str,
)
def test_a_damaged_file_is_made_anew(
    folder_store: SQLiteStore, damage: str | bytes | int, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(6):
        folder_store.acquire("name", str(number), 6, 10)
        folder_store.put(str(number), b"x" * 3000, 10)
    spoil(folder_store.folder / FILE, damage)
    assert value_in(folder_store) in (None, b"value")  # the damage may lie elsewhere
    assert not folder_store.acquire("name", "me", 1, 10)
    folder_store.put("name", b"new", 10)
    assert value_in(folder_store) == b"new"
    assert folder_store.acquire("name", "other", 1, 10) > 9
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(folder_store.folder) in caplog.text


@pytest.mark.parametrize("what", ["file", "folder", "content"])
def test_what_is_gone_is_made_anew(folder_store: SQLiteStore, what: str, caplog: pytest.LogCaptureFixture) -> None:
    file = folder_store.folder / FILE
    file.unlink()
    if what == "folder":
        folder_store.folder.rmdir()
    if what == "content":
        file.touch(0o600)
    assert folder_store.get("name") is None
    assert not folder_store.acquire("name", "me", 1, 10)
    assert not caplog.records


def test_a_new_file_of_another_process_is_not_taken_for_the_damaged_one(
    folder_store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the damage and its removal, which the log tells, the other one has been faster."""

    def faster(*_: object) -> None:
        file.unlink()
        SQLiteStore(folder_store.folder).acquire("name", "other", 1, 10)

    file = folder_store.folder / FILE
    file.write_bytes(b"garbage" * 100)
    monkeypatch.setattr(_sqlite.logger, "warning", faster)
    assert folder_store.acquire("name", "me", 1, 10) > 9


def test_a_file_that_vanishes_is_not_made_by_sqlite(folder_store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be readable by all."""
    file, connect = folder_store.folder / FILE, sqlite3.connect

    def too_late(*args: Any, **options: Any) -> Any:
        file.unlink()
        return connect(*args, **options)

    monkeypatch.setattr(sqlite3, "connect", too_late)
    raises_a_store_error(folder_store)
    assert not file.exists()


# Processes


SCRIPT = """
import faulthandler, itertools, json, os, signal, sys, threading, time
from nexus_auth.store import open_store
faulthandler.dump_traceback_later(60, exit=True)

def status_of_child(work, *arguments):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.alarm(10)
    work(*arguments)
    os._exit(0)
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that goes on with `script`."""
    command = [sys.executable, "-c", SCRIPT + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_at_once_never_hold_more_than_the_limit(tmp_path: Path) -> None:
    script = """
        store, owner = open_store(sys.argv[1]), sys.argv[2]
        store.put(owner, b"is here", 100)
        while not all(store.get(other) for other in "abcde"):
            time.sleep(0.01)
        print(json.dumps([store.acquire(str(number), owner, 2, 100) for number in range(50)]))
    """
    processes = [python(script, tmp_path / "store", owner) for owner in "abcde"]
    waits = [json.loads(process.communicate()[0]) for process in processes]
    assert [permit.count(0) for permit in zip(*waits, strict=True)] == [2] * 50


@posix
@pytest.mark.slow
def test_what_is_killed_leaves_no_damage(folder_store: SQLiteStore) -> None:
    script = """
        store = open_store(sys.argv[1])
        print("ready", flush=True)
        for number in itertools.count():
            store.put("name", b"%d " % number * 2000, 100)
            store.acquire("name", str(number % 50), 1000, 100)
            store.release("name", str(number % 50), number % 2)
    """
    file = folder_store.folder / FILE
    first = file.stat().st_ino
    for number in range(150):
        writers = [python(script, folder_store.folder) for _ in range(2)]
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline()
        time.sleep(0.001 * (number % 10))
        for writer in writers:
            writer.kill()
            writer.communicate()
        assert len(set((value_in(folder_store) or b"").split())) == 1  # of one writer, whole
        with contextlib.closing(sqlite3.connect(file)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert file.stat().st_ino == first


@posix
def test_a_child_forked_beside_busy_threads_works(tmp_path: Path) -> None:
    script = """
        store = open_store(sys.argv[1])

        def work(owner, times):
            for _ in times:
                store.put("name", owner.encode() * 500, 10)
                assert store.get("name") and not store.acquire(owner, owner, 1, 10)

        for number in range(4):
            threading.Thread(target=work, args=(f"thread {number}", itertools.count()), daemon=True).start()
        print([status_of_child(work, f"child {number}", range(3)) for number in range(10)], flush=True)
        os._exit(0)
    """
    assert python(script, tmp_path / "store").communicate()[0] == f"{[0] * 10}\n"


@posix
def test_a_child_does_not_wait_for_a_lock_of_redis_py(shared_server: Server) -> None:
    """That of the connections was held by a thread of the parent, in redis-py 8.1 for good."""
    script = """
        import gc, redis
        store = open_store(sys.argv[1])
        store.get("name")
        pools = [item for item in gc.get_objects() if isinstance(item, redis.ConnectionPool)]
        locks = [value for pool in pools for value in vars(pool).values() if hasattr(value, "acquire")]
        thread = threading.Thread(target=lambda: [lock.acquire() for lock in locks])
        thread.start()
        thread.join()
        print(len(locks) > 0, status_of_child(store.get, "name"), flush=True)
        os._exit(0)
    """
    assert python(script, shared_server.url).communicate()[0] == "True 0\n"


@posix
def test_a_child_forked_in_the_middle_of_an_import_works(tmp_path: Path) -> None:
    script = """
        from importlib.abc import MetaPathFinder
        from nexus_auth.secret import HiddenText
        from nexus_auth.steps import Client
        from nexus_auth.store._seal import Seal

        class Slow(MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == module:
                    importing.set()
                    time.sleep(0.1)

        sys.meta_path.insert(0, Slow())
        for module, use in (
            ("sqlite3", lambda: open_store(sys.argv[1]).get("name")),
            ("redis", lambda: open_store("redis://127.0.0.1:1")),
            ("encodings.idna", lambda: open_store("redis://127.0.0.1:1")),
            ("cryptography", lambda: Seal(Client("endpoint", "id", HiddenText("secret"), "scope")).name("token")),
        ):
            sys.modules.pop(module, None)
            importing = threading.Event()
            thread = threading.Thread(target=use)
            thread.start()
            assert importing.wait(10), module
            print(module, status_of_child(use), flush=True)
            thread.join()
    """
    said = python(script, tmp_path / "store").communicate()[0]
    assert said.splitlines() == ["sqlite3 0", "redis 0", "encodings.idna 0", "cryptography 0"]


# Redis


def test_a_server_that_is_down_costs_no_time_and_one_that_is_back_serves(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        store = RedisStore(server.url)
        store.put("name", b"value", 100)
    begun = time.monotonic()
    raises_a_store_error(store)
    assert time.monotonic() - begun < 1
    with running_server(tmp_path, port=server.port):
        assert store.get("name") is None
        assert not store.acquire("name", "owner", 1, 10)


def test_a_socket_of_the_file_system(tmp_path: Path) -> None:
    with running_server(tmp_path, "--unixsocket", str(tmp_path / "s")):
        store = open_store(f"unix://{tmp_path}/s?db=2")
        store.put("name", b"value", 100)
        assert value_in(store) == b"value"


def test_a_connection_that_the_server_has_closed_is_noticed(redis_store: RedisStore, client: Any) -> None:
    client.client_kill_filter(_type="normal", skipme=True)
    assert value_in(redis_store) == b"value"


def test_a_connection_that_was_idle_or_is_the_parents_is_not_used_again(
    server: Server, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall may have forgotten the one, and then nobody answers; the other is in use."""
    clock, store, opened, own = Clock(), RedisStore(server.url), list[int](), os.getpid()
    monkeypatch.setattr(_redis, "time", SimpleNamespace(monotonic=clock))
    store.get("name")
    for idle, process in ((0, own), (59, own), (59, own), (61, own), (1, 1), (1, 1)):
        before = client.info("stats")["total_connections_received"]
        monkeypatch.setattr(_redis, "os", SimpleNamespace(getpid=lambda process=process: process))
        clock.now += idle
        store.get("name")
        opened.append(client.info("stats")["total_connections_received"] - before)
    assert opened == [0, 0, 0, 1, 1, 0]


def test_a_hung_server_costs_a_second(redis_store: RedisStore, server: Server) -> None:
    with socket.socket() as full, socket.socket() as client:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        client.connect(full.getsockname())  # the next one is not let in
        urls = server.url, f"redis://127.0.0.1:{full.getsockname()[1]}"
        stores = [redis_store, *map(RedisStore, urls)]
        os.kill(server.pid, signal.SIGSTOP)
        begun = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda store: raises_a_store_error(store, {"get": OPERATIONS["get"]}), stores))
        assert 0.5 < time.monotonic() - begun < 3
    os.kill(server.pid, signal.SIGCONT)
    assert value_in(redis_store) == b"value"


def test_passwords(server: Server, client: Any) -> None:
    client.config_set("requirepass", "pä#ss/w@rd")
    place = f"127.0.0.1:{server.port}"
    for url in (f"redis://{place}", f"redis://:wr0ng@{place}", f"redis://someone:wr0ng@{place}"):
        with pytest.raises(StoreError, match=place) as caught:
            RedisStore(url).get("name")
        assert "wr0ng" not in as_a_tracker_sees_it(caught.value)
    right = RedisStore(f"valkey://:p%C3%A4%23ss%2Fw%40rd@{place}")
    assert right.get("name") is None
    assert "ss/w" not in f"{right} {vars(right)}"


def test_an_error_that_quotes_the_password() -> None:
    """None is known to, but who knows the next version."""
    store = RedisStore("redis://:127.0.0.1@127.0.0.1:1")
    with pytest.raises(StoreError, match=r"\*\*\*:1\. Connection refused"):
        store.get("name")


@pytest.mark.parametrize(
    ("command", "refused"),
    [("REPLICAOF 127.0.0.1 1", CHANGES.keys()), ("CONFIG SET maxmemory 1", {"put", "keep", "give back"})],
    ids=["a replica", "a server without memory"],
)
def test_what_can_only_be_read_of_a_server_is_read(
    redis_store: RedisStore, client: Any, command: str, refused: set[str]
) -> None:
    client.execute_command(*command.split())
    assert value_in(redis_store) == b"value"
    raises_a_store_error(redis_store, {name: CHANGES[name] for name in refused})


def test_a_lent_client_keeps_its_own_errors(client: Any) -> None:
    client.replicaof("127.0.0.1", 1)
    with pytest.raises(pytest.importorskip("redis").ReadOnlyError):
        RedisStore(client).put("name", b"value", 10)


def test_a_server_that_has_forgotten_the_scripts(redis_store: RedisStore, client: Any) -> None:
    for operation in OPERATIONS.values():
        client.script_flush()
        operation(redis_store)


def test_every_key_runs_out(server: Server, client: Any) -> None:
    store = RedisStore(server.url, "")
    table: list[tuple[Callable[[], object], dict[str, int]]] = [
        (lambda: store.put("name", b"value", 100), {"item:name": 100}),
        (lambda: store.put("name", b"value", 0), {}),
        (lambda: store.acquire("name", "a", 2, 50), {"permits:name": 50}),
        (lambda: store.acquire("name", "b", 2, 20), {"permits:name": 50}),
        (lambda: store.release("name", "a", 0), {"permits:name": 20}),
        (lambda: store.release("name", "b", 70), {"permits:name": 70}),
        (lambda: store.release("name", "b", 0), {}),
    ]
    for operation, lives in table:
        operation()
        assert {key: client.ttl(key) for key in client.keys("*")} == pytest.approx(lives, abs=2)


@pytest.mark.parametrize(("value", "ttl"), [(b"no base64!", 10), ("ü", 10), (b"\xff", 10), ("aGk=", None)])
def test_what_somebody_else_wrote_is_no_value(server: Server, client: Any, value: str | bytes, ttl: int | None) -> None:
    """One that is there for ever is none of ours."""
    client.set("item:name", value, ex=ttl)
    assert RedisStore(server.url, "").get("name") is None


@pytest.mark.slow
def test_a_cluster(tmp_path: Path) -> None:
    with running_server(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(closed_port())) as server:
        with client_of(server) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                time.sleep(0.02)
        with pytest.importorskip("redis").RedisCluster(host="127.0.0.1", port=server.port) as lent:
            store = RedisStore(lent)
            for operation in (*OPERATIONS.values(), OPERATIONS["acquire"]):
                operation(store)
            assert store.acquire("name", "other", 1, 10) > 9


# Seals


@pytest.fixture
def seal(monkeypatch: pytest.MonkeyPatch) -> Seal:
    """A seal whose keys are made quickly."""
    monkeypatch.setattr(_seal, "_N", 2)
    return Seal(CLIENT)


def test_what_is_sealed_is_found_and_opened_by_the_same_client(seal: Seal) -> None:
    again = Seal(CLIENT)
    for plaintext in (b"", b"token", b"x" * 20_000):
        sealed = seal.seal("token", plaintext)
        assert again.open("token", sealed) == plaintext
        assert sealed != seal.seal("token", plaintext)
    assert seal.name("token") == again.name("token")
    assert len({seal.name("token"), seal.name("failure"), seal.name("turn")}) == 3
    assert seal.open("failure", seal.seal("token", b"token")) is None


@pytest.mark.parametrize(
    "changes",
    [
        *({name: str(value) + " "} for name, value in vars(CLIENT).items()),
        {"client_secret": "\udcff"},
        {"token_endpoint": CLIENT.token_endpoint[:-1], "client_id": CLIENT.token_endpoint[-1] + CLIENT.client_id},
        {"client_id": CLIENT.client_id + CLIENT.scope[0], "scope": CLIENT.scope[1:]},
    ],
    ids=str,
)
def test_clients_that_differ_in_anything_have_no_row_in_common(seal: Seal, changes: dict[str, str]) -> None:
    """A field of the token request that were not in the name of the row would hand one client the other's token."""
    other = Seal(replace(CLIENT, **{name: HiddenText(value) for name, value in changes.items()}))
    assert other.name("token") != seal.name("token")
    assert other.open("token", seal.seal("token", b"token")) is None


def test_any_bit_that_is_flipped_or_cut_off_leaves_nothing(seal: Seal) -> None:
    sealed = seal.seal("token", b"token")
    for index in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[index] ^= 1 << bit
            assert seal.open("token", bytes(changed)) is None
        assert seal.open("token", sealed[:index]) is None
        assert seal.open("token", sealed[index + 1 :]) is None


def test_a_seal_shows_nothing_and_does_not_travel(seal: Seal) -> None:
    for _ in range(2):
        for value in filter(None, map(str, vars(CLIENT).values())):
            assert value not in f"{seal!r} {vars(seal)}"
        seal.name("token")  # makes the keys
    for call in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            call(seal)


def test_the_keys_are_derived_once_and_the_secret_is_forgotten(seal: Seal, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    scrypt = hashlib.scrypt

    def counted(password: bytes, **options: Any) -> bytes:
        calls.append(password)
        return scrypt(password, **options)

    monkeypatch.setattr(hashlib, "scrypt", counted)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(seal.name, ["token"] * 8))) == 1
    assert calls == [CLIENT.client_secret.encode()]
    assert CLIENT.client_secret not in vars(seal).values()


def test_rows_of_this_version_are_found_by_the_next() -> None:
    """Whatever changes the name has to change the version, and so does what changes the key."""
    seal = Seal(replace(CLIENT, token_endpoint="https://identity.example/token", client_id="client", scope="api1 api2"))
    sealed = bytes.fromhex("092b8fe4c89e97d1d181d60e1bcb703f27baff93edbd283ef049927ad67c00a4f7")
    assert seal.name("token") == "token:b7836f9822842dc30c4a66263523b3c2e98dead08946924e4ebe56659de4318e"
    assert seal.open("token", sealed) == b"value"
