"""The stores: one table of behaviour that holds for all of them, then what each of them has to withstand."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
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
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server import Server, closed_port, running_server

import nexus_auth.store
from nexus_auth.secret import HiddenText
from nexus_auth.steps import Client
from nexus_auth.store import RedisStore, SQLiteStore, Store, StoreError, _redis, _sqlite, open_store
from nexus_auth.store._seal import Seal
from nexus_auth.store._sqlite import Moment, permit_left, value_left

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


class MemoryStore:
    """A store for the threads of one process: all that the protocol asks for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._permits: dict[str, dict[str, float]] = {}
        self._values: dict[str, tuple[bytes, float]] = {}

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        with self._lock:
            now = time.monotonic()
            held = self._permits[name] = {who: end for who, end in self._permits.get(name, {}).items() if end > now}
            if owner not in held and len(held) >= limit:
                return sorted(held.values())[len(held) - limit] - now
            held[owner] = now + hold
            return 0.0

    def release(self, name: str, owner: str, keep: float) -> None:
        with self._lock:
            self._permits.setdefault(name, {})[owner] = time.monotonic() + keep

    def get(self, name: str) -> tuple[bytes, float] | None:
        value, end = self._values.get(name, (b"", 0.0))
        left = end - time.monotonic()
        return (value, left) if left > 0 else None

    def put(self, name: str, value: bytes, ttl: float) -> None:
        self._values[name] = value, time.monotonic() + ttl


@contextlib.contextmanager
def client_of(server: Server, library: str = "redis", **options: Any) -> Generator[Any]:
    client = {"redis": "Redis", "valkey": "Valkey"}[library]
    with getattr(pytest.importorskip(library), client)(port=server.port, **options) as lent:
        yield lent


LENT: dict[str, tuple[str, dict[str, Any]]] = {
    "redis-py that decodes": ("redis", {"decode_responses": True}),
    "redis-py with RESP3": ("redis", {"protocol": 3}),
    "valkey-py": ("valkey", {}),
}


@pytest.fixture(params=["memory", "sqlite", "redis", *LENT])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    if request.param == "sqlite":
        yield SQLiteStore(tmp_path / "store")
        return
    server, prefix = request.getfixturevalue("shared_server"), uuid.uuid4().hex
    if request.param == "redis":
        yield RedisStore(server.url, prefix)
        return
    library, options = LENT[request.param]
    with client_of(server, library, **options) as client:
        yield RedisStore(client, prefix)


class TestEveryStore:
    def test_as_many_permits_as_the_limit_are_held_and_one_more_is_told_how_long(self, store: Store) -> None:
        assert [store.acquire("name", owner, 3, hold) for owner, hold in (("a", 30), ("b", 10), ("c", 20))] == [0] * 3
        assert 9 < store.acquire("name", "d", 3, 5) <= 10
        assert 19 < store.acquire("name", "d", 2, 5) <= 20
        assert store.acquire("other name", "d", 3, 5) == 0

    def test_who_holds_a_permit_renews_it(self, store: Store) -> None:
        store.acquire("name", "a", 2, 10)
        store.acquire("name", "b", 2, 40)
        assert store.acquire("name", "a", 2, 30) == 0
        assert 29 < store.acquire("name", "c", 2, 5) <= 30

    def test_a_permit_is_given_back(self, store: Store) -> None:
        store.acquire("name", "a", 1, 10)
        store.release("name", "a", 0)
        store.release("name", "a", 0)
        assert store.acquire("name", "b", 1, 5) == 0

    def test_a_permit_is_kept_from_its_release_on(self, store: Store) -> None:
        store.acquire("name", "a", 1, 100)
        store.release("name", "a", 10)
        assert 9 < store.acquire("name", "b", 1, 5) <= 10

    def test_a_permit_runs_out_and_is_still_kept_on_release(self, store: Store) -> None:
        store.acquire("name", "long", 2, 100)
        store.acquire("name", "a", 2, 0.02)
        assert 0 < store.acquire("name", "b", 2, 10) <= 0.02
        time.sleep(0.03)
        assert store.acquire("name", "b", 2, 10) == 0
        store.release("name", "a", 20)
        assert 19 < store.acquire("name", "c", 2, 5) <= 20  # two have to run out
        store.release("name", "a", 0)
        assert 9 < store.acquire("name", "c", 2, 5) <= 10

    def test_a_value_lives_for_its_time(self, store: Store) -> None:
        assert store.get("name") is None
        for value, ttl in ((bytes(range(256)), 10), (b"", 20), (b"x" * 20_000, 0.02)):
            store.put("name", value, ttl)
            found = store.get("name")
            assert found
            assert found[0] == value
            assert ttl / 2 < found[1] <= ttl or ttl < 1
        assert store.get("other name") is None
        time.sleep(0.03)
        assert store.get("name") is None
        store.put("name", b"dead at once", 0)
        assert store.get("name") is None

    def test_threads_never_hold_more_than_the_limit(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            waits = list(pool.map(lambda owner: store.acquire("name", str(owner), 6, 10), range(40)))
        assert waits.count(0) == 6

    def test_it_is_taken_as_a_store(self, store: Store) -> None:
        assert open_store(store) is store
        assert {store: 1}[store] == 1


def as_a_tracker_sees_it(error: BaseException) -> str:
    """Return an error with its causes and the local variables of all frames but that of the test."""
    frames = error.__traceback__ and error.__traceback__.tb_next
    finished = sys.version_info >= (3, 11)  # before, it fails at the repr of an object whose __init__ has raised
    return "".join(traceback.TracebackException(type(error), error, frames, capture_locals=finished).format())


class NamedStore(MemoryStore, Store):
    """A store that says in its bases what it is."""


class TestOpening:
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
            ("unix:///run/x?password=s3cret&db=2", "RedisStore('unix:///run/x', prefix='nexus_auth:')"),
        ],
    )
    def test_what_a_user_names(self, where: str | Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        assert repr(open_store(where)) == str(open_store(where)) == store
        assert open_store(where) == open_store(where)
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
            ("memcached://:s3cret@cache", ValueError, "redis://"),
            ("redis:/:s3cret@cache", ValueError, "redis://"),
            ("redis://:s3cret/1@cache", ValueError, "percent-encode"),
            ("redis://:12/s3cret@cache", ValueError, "percent-encode"),
            ("redis://:12#s3cret@cache", ValueError, "percent-encode"),
            ("redis://:12?s3cret@cache", ValueError, "percent-encode"),
            ("redis://:s3cret@cache:port", ValueError, "port"),
            ("redis://:s3cret@cache?no_such_option=1", ValueError, "options"),
            ("redis://:s3cret@cache?socket_timeout=soon", ValueError, "options"),
            ("redis://:s3cret@[cache", ValueError, "host"),
            (b"folder", TypeError, "bytes is none: it lacks acquire, release, get, put"),
            (7, TypeError, "int is none: it lacks acquire"),
            ({}, TypeError, "dict is none: it lacks acquire, release, put"),
            (MemoryStore, TypeError, "MemoryStore is a class"),
            (type("Half", (MemoryStore,), {"release": None})(), TypeError, "store .* Half is none: it lacks release$"),
            (type("Loose", (MemoryStore,), {"__hash__": None})(), TypeError, "store .* Loose is not: .* __hash__"),
        ],
    )
    def test_what_is_no_store(self, where: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words) as caught:
            open_store(HiddenText(where) if isinstance(where, str) else where)
        assert "store" in str(caught.value)
        assert "s3cret" not in as_a_tracker_sees_it(caught.value)

    def test_a_class_may_say_that_it_is_a_store(self) -> None:
        store = NamedStore()
        assert open_store(store) is store
        assert store in {store}
        assert NamedStore() not in {store}

    @pytest.mark.parametrize("client", [object(), type("Later", (), {"eval": print, "__aenter__": print})()])
    def test_what_is_no_client(self, client: Any) -> None:
        with pytest.raises(TypeError, match=f"blocking client of redis-py or valkey-py, not {type(client).__name__}"):
            RedisStore(client)

    def test_what_is_no_url(self) -> None:
        for url in ("redis", "cache:6379", ""):
            with pytest.raises(ValueError, match="a URL, which begins with redis://"):
                RedisStore(url)

    def test_without_redis_py_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "redis", None)
        with pytest.raises(ImportError, match=r"pip install 'nexus-auth\[redis\]'"):
            open_store("redis://cache")

    def test_to_import_loads_no_backend(self) -> None:
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

    def test_equal_stores_of_a_lent_client(self, shared_server: Server) -> None:
        with client_of(shared_server) as one, client_of(shared_server) as other:
            assert RedisStore(one) == RedisStore(one)
            assert hash(RedisStore(one)) == hash(RedisStore(one))
            assert RedisStore(one) != RedisStore(other)
            assert RedisStore(one) != RedisStore(one, "mine:")

    def test_copies(self, tmp_path: Path) -> None:
        for store in (SQLiteStore(tmp_path), RedisStore("redis://cache?db=2", "mine:")):
            assert pickle.loads(pickle.dumps(store)) == store
            assert copy.deepcopy(store) == copy.copy(store) == store

    @pytest.mark.parametrize("url", ["redis://:s3cret@cache", "unix:///x?password=s3cret"])
    def test_a_password_is_in_no_pickle(self, url: str) -> None:
        store = open_store(url)
        with pytest.raises(TypeError, match="make the store in the process that uses it") as caught:
            pickle.dumps(store)
        assert "s3cret" not in str(caught.value)
        assert copy.deepcopy(store) == copy.copy(store) == store


@dataclass
class Machine:
    """True time, and the two clocks of a machine that go wrong."""

    time: float = 0.0
    wall: float = 1e9
    monotonic: float = 50.0
    times_set: int = 0
    boots: int = 0
    suspended: bool = False

    def now(self) -> Moment:
        return Moment(self.wall, self.monotonic)

    def run(self, seconds: float) -> None:
        self.time, self.wall, self.monotonic = self.time + seconds, self.wall + seconds, self.monotonic + seconds

    def suspend(self, seconds: float) -> None:
        self.time, self.wall, self.suspended = self.time + seconds, self.wall + seconds, True

    def reboot(self, seconds: float) -> None:
        self.time, self.wall, self.monotonic, self.boots = self.time + seconds, self.wall + seconds, 1, self.boots + 1

    def set_clock(self, seconds: float) -> None:
        self.wall, self.times_set = self.wall + seconds, self.times_set + 1


@dataclass(frozen=True)
class Permit:
    """A permit that was acquired, and what the machine had been through by then."""

    time: float
    times_set: int
    boots: int

    def counts(self, machine: Machine) -> bool:
        """Return whether it is held, in truth, and there is a clock that has not been moved since."""
        told = self.times_set == machine.times_set or self.boots == machine.boots
        return told and machine.time < self.time + HOLD


HOLD, LIMIT = 60.0, 2
some_time = st.floats(0, 2 * HOLD)
events = st.one_of(
    st.tuples(st.sampled_from(["run", "suspend", "reboot"]), some_time),
    st.tuples(st.just("set_clock"), st.one_of(st.floats(-2 * HOLD, 2 * HOLD), st.sampled_from([-1e6, 1e6]))),
    st.tuples(st.just("acquire"), st.floats(0, 3)),
)


class TestTheTwoClocks:
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
    def test_what_is_left_of_60_seconds(self, wall: float, monotonic: float, permit: float, value: float) -> None:
        since, now = Moment(1e9, 5000), Moment(1e9 + wall, 5000 + monotonic)
        assert permit_left(since, 60, now) == permit
        assert value_left(since, 60, now) == value

    def test_the_store_asks_them(self, tmp_path: Path) -> None:
        machine = Machine()
        store = SQLiteStore(tmp_path / "store", _now=machine.now)
        store.acquire("name", "a", 1, 60)
        store.put("name", b"value", 60)
        machine.suspend(10)
        machine.run(10)
        assert store.acquire("name", "b", 1, 60) == pytest.approx(50)
        found = store.get("name")
        assert found
        assert found[1] == pytest.approx(40)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(events, max_size=25))
    def test_whatever_happens_to_one_of_them(self, history: list[tuple[str, float]]) -> None:
        machine, permits = Machine(), list[Permit]()

        def acquire(store: SQLiteStore) -> float:
            wait = store.acquire("name", str(len(permits)), LIMIT, HOLD)
            assert wait <= HOLD
            if not wait:
                permits.append(Permit(machine.time, machine.times_set, machine.boots))
                assert sum(permit.counts(machine) for permit in permits) <= LIMIT
            return wait

        with tempfile.TemporaryDirectory() as folder:
            store = SQLiteStore(folder, _now=machine.now)
            store.put("value", b"", HOLD)
            for event, amount in history:
                if event == "acquire":
                    acquire(store)
                getattr(machine, "run" if event == "acquire" else event)(amount)
                found = store.get("value")
                if found and not (machine.times_set and (machine.boots or machine.suspended)):
                    assert found[1] <= HOLD - machine.time + 1e-6
            # Left alone from here on, one permit runs out within a hold, or two if a clock fell back into the hold.
            begun = machine.time
            while acquire(store):
                machine.run(1)
            fell_back = machine.boots or any(event == "set_clock" and amount < 0 for event, amount in history)
            assert machine.time - begun <= HOLD * (2 if fell_back else 1) + 1


def raises_a_store_error(store: Store, operations: dict[str, Operation] = OPERATIONS) -> None:
    for operation in operations.values():
        with pytest.raises(StoreError):
            operation(store)


class TestWhoMayReachTheFile:
    @posix
    @pytest.mark.parametrize("umask", [0, 0o022, 0o077])
    def test_only_its_owner(self, tmp_path: Path, umask: int) -> None:
        store = SQLiteStore(tmp_path / "a" / "b")
        before = os.umask(umask)
        try:
            store.put("name", b"value", 10)
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
    def test_else_it_is_not_used(self, tmp_path: Path, spoil: str, words: str) -> None:
        if "65534" in spoil and os.geteuid():
            pytest.skip("only root gives files away")
        elsewhere = SQLiteStore(tmp_path / "elsewhere")
        elsewhere.acquire("name", "other", 1, 100)
        (tmp_path / "store").mkdir(0o700)
        subprocess.run(["sh", "-ec", spoil], cwd=tmp_path, env={**os.environ, "F": FILE}, check=True)
        store = SQLiteStore(tmp_path / "store")
        raises_a_store_error(store)
        with pytest.raises(StoreError, match=words):
            store.get("name")
        assert elsewhere.acquire("name", "me", 1, 100) > 99
        assert not (tmp_path / "nowhere").exists()

    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        raises_a_store_error(SQLiteStore(tmp_path / "file" / "store"))


@contextlib.contextmanager
def as_another_user(*paths: Path) -> Generator[None]:
    """Root may write everywhere, so it becomes somebody to whom `paths` belong."""
    if os.geteuid():
        yield
        return
    try:
        for path in paths:
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"this root cannot become somebody else: {error}")
    try:
        yield
    finally:
        os.seteuid(0)


class TestWhenTheFileCannotBeUsed:
    @posix
    def test_what_can_only_be_read_is_read(self) -> None:
        with tempfile.TemporaryDirectory() as name:  # that of pytest is closed to the other user
            folder, file = Path(name), Path(name) / FILE
            SQLiteStore(folder).put("name", b"value", 10)
            file.chmod(0o400)
            folder.chmod(0o500)
            with as_another_user(folder, file):
                store = SQLiteStore(folder)
                found = store.get("name")
                raises_a_store_error(store, CHANGES)
            folder.chmod(0o700)
        assert found
        assert found[0] == b"value"

    @posix
    def test_a_full_disk(self, tmp_path: Path) -> None:
        import resource

        store = SQLiteStore(tmp_path / "store")
        store.put("name", b"value", 10)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            raises_a_store_error(store, {"put": lambda store: store.put("other", b"x" * 50_000, 10)})
            found = store.get("name")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert found
        assert found[0] == b"value"
        store.put("other", b"x", 10)

    def test_a_lock_that_is_never_released_holds_everybody_up_for_a_second(self, tmp_path: Path) -> None:
        store = SQLiteStore(tmp_path / "store")
        store.put("name", b"value", 10)
        with contextlib.closing(sqlite3.connect(tmp_path / "store" / FILE, isolation_level=None)) as hung:
            hung.execute("BEGIN EXCLUSIVE")
            begun = time.monotonic()
            with ThreadPoolExecutor(len(OPERATIONS)) as pool:
                list(pool.map(lambda name: raises_a_store_error(store, {name: OPERATIONS[name]}), OPERATIONS))
            assert time.monotonic() - begun < 3  # one after the other would take five
        assert store.get("name")

    @pytest.mark.parametrize(
        "damage",
        [
            "garbage",
            "SQLite format 3",
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
    )
    def test_a_damaged_file_is_made_anew(
        self, tmp_path: Path, damage: str | int, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, file = SQLiteStore(tmp_path / "store"), tmp_path / "store" / FILE
        store.put("name", b"value", 10)
        for number in range(6):
            store.acquire("name", str(number), 6, 10)
            store.put(str(number), b"x" * 3000, 10)
        if isinstance(damage, int):
            file.write_bytes(file.read_bytes()[:damage])
        elif damage.split()[0].isupper():
            with contextlib.closing(sqlite3.connect(file)) as connection:
                connection.executescript(damage)
        else:
            file.write_bytes(damage.encode() * 100)
        found = store.get("name")
        assert not found or found[0] == b"value"  # the damage may lie elsewhere
        assert not store.acquire("name", "me", 1, 10)
        store.put("name", b"new", 10)
        found = store.get("name")
        assert found
        assert found[0] == b"new"
        assert store.acquire("name", "other", 1, 10) > 9
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert str(store.folder) in caplog.text

    @pytest.mark.parametrize("what", ["file", "folder", "content"])
    def test_what_is_gone_is_made_anew(self, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
        store, file = SQLiteStore(tmp_path / "store"), tmp_path / "store" / FILE
        store.put("name", b"value", 10)
        if what == "content":
            file.write_bytes(b"")
        else:
            file.unlink()
        if what == "folder":
            file.parent.rmdir()
        assert store.get("name") is None
        assert not store.acquire("name", "me", 1, 10)
        assert not caplog.records

    def test_a_new_file_of_another_process_is_not_taken_for_the_damaged_one(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Between the damage and its removal, which the log tells, the other one has been faster."""
        store, file = SQLiteStore(tmp_path / "store"), tmp_path / "store" / FILE
        store.get("name")
        file.write_bytes(b"garbage" * 100)

        class Faster(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                file.unlink()
                SQLiteStore(tmp_path / "store").acquire("name", "other", 1, 10)

        handler = Faster()
        _sqlite.logger.addHandler(handler)
        try:
            assert store.acquire("name", "me", 1, 10) > 9
        finally:
            _sqlite.logger.removeHandler(handler)

    def test_a_file_that_vanishes_is_not_made_by_sqlite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It would be readable by all."""
        store, file, connect = SQLiteStore(tmp_path / "store"), tmp_path / "store" / FILE, sqlite3.connect

        def too_late(*args: Any, **options: Any) -> Any:
            file.unlink()
            return connect(*args, **options)

        monkeypatch.setattr(sqlite3, "connect", too_late)
        raises_a_store_error(store)
        assert not file.exists()

    def test_what_has_run_out_takes_no_room(self, tmp_path: Path) -> None:
        machine = Machine()
        store = SQLiteStore(tmp_path / "store", _now=machine.now)
        for number in range(3):
            machine.run(11)
            store.acquire(f"name {number}", "owner", 1, 10)
            store.put(f"name {number}", b"value", 10)
        with contextlib.closing(sqlite3.connect(tmp_path / "store" / FILE)) as connection:
            for table in ("permits", "items"):
                assert connection.execute(f"SELECT name FROM {table}").fetchall() == [("name 2",)]


def python(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a process that runs `script`."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


class TestProcesses:
    def test_20_at_once_never_hold_more_than_the_limit(self, tmp_path: Path) -> None:
        script = """
            import sys, time
            from nexus_auth.store import open_store
            store, owner = open_store(sys.argv[1]), sys.argv[2]
            spans, until = [], time.monotonic() + 0.5
            while time.monotonic() < until:
                wait = store.acquire("name", owner, 6, 30)
                if wait:
                    time.sleep(0.005)
                    continue
                begun = time.monotonic()
                time.sleep(0.02)
                spans.append((begun, time.monotonic()))
                store.release("name", owner, 0)
            print(spans)
        """
        processes = [python(script, tmp_path / "store", owner) for owner in range(20)]
        spans = [span for process in processes for span in eval(process.communicate()[0])]
        assert not any(process.returncode for process in processes)
        edges = sorted([(begun, 1) for begun, _ in spans] + [(ended, -1) for _, ended in spans])
        held = [sum(change for _, change in edges[: index + 1]) for index in range(len(edges))]
        assert 1 < max(held) <= 6

    @posix
    @pytest.mark.parametrize("rounds", [5, pytest.param(150, marks=pytest.mark.slow)])
    def test_what_is_killed_leaves_no_damage(self, tmp_path: Path, rounds: int) -> None:
        script = """
            import itertools, sys
            from nexus_auth.store import open_store
            store = open_store(sys.argv[1])
            print("ready", flush=True)
            for number in itertools.count():
                store.put("name", b"%d " % number * 2000, 100)
                store.acquire("name", str(number % 50), 1000, 100)
                store.release("name", str(number % 50), number % 2)
        """
        store, file = SQLiteStore(tmp_path / "store"), tmp_path / "store" / FILE
        store.put("name", b"0 ", 100)
        first = file.stat().st_ino
        for number in range(rounds):
            writers = [python(script, tmp_path / "store") for _ in range(2)]
            for writer in writers:
                assert writer.stdout
                writer.stdout.readline()
            time.sleep(0.001 * (number % 10))
            for writer in writers:
                writer.kill()
                writer.communicate()
            found = store.get("name")
            assert found
            assert len(set(found[0].split())) == 1  # of one writer, whole
            with contextlib.closing(sqlite3.connect(file)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert file.stat().st_ino == first

    @posix
    @pytest.mark.parametrize("kind", ["sqlite", "redis"])
    def test_a_child_forked_beside_busy_threads_works(self, kind: str, tmp_path: Path, shared_server: Server) -> None:
        script = """
            import os, signal, sys, threading
            from nexus_auth.store import open_store
            store = open_store(sys.argv[1])

            def work(owner):
                store.put("name", owner.encode() * 500, 10)
                assert store.get("name") and not store.acquire(owner, owner, 1, 10)

            def work_on(owner):
                while True:
                    work(owner)

            for number in range(4):
                threading.Thread(target=work_on, args=(f"thread {number}",), daemon=True).start()
            children = []
            for number in range(20):
                child = os.fork()
                if not child:
                    signal.alarm(10)
                    try:
                        for _ in range(5):
                            work(f"child {number}")
                        os._exit(0)
                    finally:
                        os._exit(1)
                children.append(child)
                work("parent")
            print([os.waitpid(child, 0)[1] for child in children], flush=True)
            os._exit(0)
        """
        where = tmp_path / "store" if kind == "sqlite" else shared_server.url
        process = python(script, where)
        assert process.communicate()[0].strip() == str([0] * 20)

    @posix
    def test_a_child_does_not_wait_for_a_lock_of_redis_py(self, shared_server: Server) -> None:
        """That of the connections was held by a thread of the parent, in redis-py 8.1 for good."""
        script = """
            import gc, os, redis, signal, sys, threading
            from nexus_auth.store import open_store
            store = open_store(sys.argv[1])
            store.get("name")
            pools = [item for item in gc.get_objects() if isinstance(item, redis.ConnectionPool)]
            locks = [value for pool in pools for value in vars(pool).values() if hasattr(value, "acquire")]
            thread = threading.Thread(target=lambda: [lock.acquire() for lock in locks])
            thread.start()
            thread.join()
            child = os.fork()
            if child:
                print(len(locks) > 0, os.waitpid(child, 0)[1], flush=True)
                os._exit(0)
            signal.alarm(5)
            store.get("name")
        """
        assert python(script, shared_server.url).communicate()[0] == "True 0\n"

    @posix
    @pytest.mark.parametrize(
        ("module", "use"),
        [
            ("sqlite3", "open_store(where).get('name')"),
            ("redis", "open_store('redis://127.0.0.1:1')"),
            ("encodings.idna", "open_store('redis://127.0.0.1:1')"),
            ("cryptography", "Seal(Client('endpoint', 'id', HiddenText('secret'), 'scope')).name('token')"),
        ],
    )
    def test_a_child_forked_in_the_middle_of_an_import_works(self, module: str, use: str, tmp_path: Path) -> None:
        script = """
            import os, signal, sys, threading, time
            from importlib.abc import MetaPathFinder
            from nexus_auth.secret import HiddenText
            from nexus_auth.steps import Client
            from nexus_auth.store import open_store
            from nexus_auth.store._seal import Seal
            where, module, use = sys.argv[1:]
            importing = threading.Event()

            class Slow(MetaPathFinder):
                def find_spec(self, name, path, target=None):
                    if name == module:
                        importing.set()
                        time.sleep(0.1)

            sys.meta_path.insert(0, Slow())
            threading.Thread(target=eval, args=(use, globals())).start()
            assert importing.wait(10)
            child = os.fork()
            if child:
                print(os.waitpid(child, 0)[1])
            else:
                signal.alarm(5)
                eval(use)
        """
        process = python(script, tmp_path / "store", module, use)
        assert process.communicate()[0] == "0\n"


class TestRedis:
    def test_a_server_that_is_down_costs_no_time_and_one_that_is_back_serves(self, tmp_path: Path) -> None:
        with running_server(tmp_path) as server:
            store = RedisStore(server.url)
            store.put("name", b"value", 100)
        begun = time.monotonic()
        raises_a_store_error(store)
        assert time.monotonic() - begun < 1
        with running_server(tmp_path, port=server.port):
            assert store.get("name") is None
            assert not store.acquire("name", "owner", 1, 10)

    def test_a_socket_of_the_file_system(self, tmp_path: Path) -> None:
        with running_server(tmp_path, "--unixsocket", str(tmp_path / "s")):
            store = open_store(f"unix://{tmp_path}/s?db=2")
            store.put("name", b"value", 100)
            assert store.get("name")

    def test_a_connection_that_the_server_has_closed_is_noticed(self, server: Server) -> None:
        store = RedisStore(server.url)
        store.put("name", b"value", 100)
        with client_of(server) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert store.get("name")

    def test_a_connection_that_was_idle_or_is_the_parents_is_not_used_again(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A firewall may have forgotten the one, and then nobody answers; the other is in use."""
        machine = Machine()
        monkeypatch.setattr(_redis, "time", SimpleNamespace(monotonic=lambda: machine.monotonic))
        store, opened = RedisStore(server.url), list[int]()
        with client_of(server) as client:
            for idle in (0, 59, 59, 61, 1):
                machine.run(idle)
                store.get("name")
                opened.append(client.info("stats")["total_connections_received"])
            monkeypatch.setattr(_redis, "os", SimpleNamespace(getpid=lambda: 1))
            store.get("name")
            opened.append(client.info("stats")["total_connections_received"])
        assert [connections - opened[0] for connections in opened] == [0, 0, 0, 1, 1, 2]

    def test_a_hung_server_costs_a_second(self, server: Server) -> None:
        with socket.socket() as full, socket.socket() as client:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            client.connect(full.getsockname())  # the next one is not let in
            urls = server.url, server.url, f"redis://127.0.0.1:{full.getsockname()[1]}"
            stores = [RedisStore(url) for url in urls]
            stores[0].get("name")
            os.kill(server.pid, signal.SIGSTOP)
            begun = time.monotonic()
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda store: raises_a_store_error(store, {"get": OPERATIONS["get"]}), stores))
            assert 0.5 < time.monotonic() - begun < 3
        os.kill(server.pid, signal.SIGCONT)
        assert stores[0].get("name") is None

    def test_passwords(self, server: Server) -> None:
        with client_of(server) as client:
            client.config_set("requirepass", "pä#ss/w@rd")
        place = f"127.0.0.1:{server.port}"
        for url in (f"redis://{place}", f"redis://:wr0ng@{place}", f"redis://someone:wr0ng@{place}"):
            store = RedisStore(url)
            with pytest.raises(StoreError, match=place) as caught:
                store.get("name")
            assert "wr0ng" not in as_a_tracker_sees_it(caught.value)
        right = RedisStore(f"valkey://:p%C3%A4%23ss%2Fw%40rd@{place}")
        assert right.get("name") is None
        assert "ss/w" not in f"{right} {vars(right)}"

    def test_an_error_that_quotes_the_password(self) -> None:
        """None is known to, but who knows the next version."""
        store = RedisStore("redis://:127.0.0.1@127.0.0.1:1")
        with pytest.raises(StoreError, match=r"\*\*\*:1\. Connection refused"):
            store.get("name")

    def test_a_replica_is_read(self, server: Server) -> None:
        store = RedisStore(server.url)
        store.put("name", b"value", 100)
        with client_of(server) as client:
            client.replicaof("127.0.0.1", 1)
            found = store.get("name")
            raises_a_store_error(store, CHANGES)
        assert found
        assert found[0] == b"value"

    def test_a_server_without_memory_is_read(self, server: Server) -> None:
        store = RedisStore(server.url)
        store.put("name", b"value", 100)
        with client_of(server) as client:
            client.config_set("maxmemory", 1)
            found = store.get("name")
            raises_a_store_error(store, {name: CHANGES[name] for name in ("put", "keep", "give back")})
        assert found
        assert found[0] == b"value"

    def test_a_server_that_has_forgotten_the_scripts(self, shared_server: Server) -> None:
        store = RedisStore(shared_server.url, uuid.uuid4().hex)
        with client_of(shared_server) as client:
            for operation in OPERATIONS.values():
                client.script_flush()
                operation(store)

    def test_every_key_runs_out(self, shared_server: Server) -> None:
        prefix = uuid.uuid4().hex
        store = RedisStore(shared_server.url, prefix)
        with client_of(shared_server) as client:

            def lives() -> dict[str, int]:
                keys = [key.decode() for key in client.keys("*")]
                return {key.removeprefix(prefix): client.ttl(key) for key in keys if key.startswith(prefix)}

            store.put("name", b"value", 100)
            assert lives() == {"item:name": pytest.approx(100, abs=2)}
            store.put("name", b"value", 0)
            store.acquire("name", "a", 2, 50)
            store.acquire("name", "b", 2, 20)
            assert lives() == {"permits:name": pytest.approx(50, abs=2)}
            store.release("name", "a", 0)
            assert lives() == {"permits:name": pytest.approx(20, abs=2)}
            store.release("name", "b", 70)
            assert lives() == {"permits:name": pytest.approx(70, abs=2)}
            store.release("name", "b", 0)
            assert lives() == {}

    @pytest.mark.parametrize("value", [b"no base64!", "ü", b"\xff"])
    def test_what_somebody_else_wrote_is_no_value(self, shared_server: Server, value: str | bytes) -> None:
        prefix = uuid.uuid4().hex
        with client_of(shared_server) as client:
            client.set(f"{prefix}item:name", value, ex=10)
            assert RedisStore(client, prefix).get("name") is None
            client.set(f"{prefix}item:name", "aGk=")
            assert RedisStore(client, prefix).get("name") is None  # for ever is none of ours

    def test_a_lent_client_keeps_its_own_errors(self, server: Server) -> None:
        redis = pytest.importorskip("redis")
        with client_of(server, decode_responses=True) as client:
            store = RedisStore(client)
            client.replicaof("127.0.0.1", 1)
            with pytest.raises(redis.ReadOnlyError):
                store.put("name", b"value", 10)

    @pytest.mark.slow
    def test_a_cluster(self, tmp_path: Path) -> None:
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


CLIENT = ("s3cret", "https://identity.example/token", "client", "api1 api2")


def seal_of(client_secret: str, token_endpoint: str, client_id: str, scope: str) -> Seal:
    return Seal(Client(token_endpoint, client_id, HiddenText(client_secret), scope))


class TestSeals:
    def test_what_is_sealed_is_found_and_opened_by_the_same_client(self) -> None:
        mine, again = seal_of(*CLIENT), seal_of(*CLIENT)
        for plaintext in (b"", b"token", b"x" * 20_000):
            sealed = mine.seal("token", plaintext)
            assert again.open("token", sealed) == plaintext
            assert sealed != mine.seal("token", plaintext)
        assert mine.name("token") == again.name("token")
        assert len({mine.name("token"), mine.name("failure"), mine.name("turn")}) == 3
        assert mine.open("failure", mine.seal("token", b"token")) is None

    @pytest.mark.parametrize(
        "client",
        [
            ("s3cret ", *CLIENT[1:]),
            ("\udcff", *CLIENT[1:]),
            (CLIENT[0], "https://identity.example/toke", "nclient", "api1 api2"),
            (CLIENT[0], CLIENT[1], "client2", CLIENT[3]),
            (CLIENT[0], CLIENT[1], "clientapi1", " api2"),
            (CLIENT[0], CLIENT[1], CLIENT[2], "api1"),
        ],
    )
    def test_another_secret_endpoint_id_or_scope_has_nothing_in_common(self, client: tuple[str, str, str, str]) -> None:
        mine, other = seal_of(*CLIENT), seal_of(*client)
        assert mine.name("token") != other.name("token")
        assert other.open("token", mine.seal("token", b"token")) is None

    def test_any_bit_that_is_flipped_or_cut_off_leaves_nothing(self) -> None:
        seal = seal_of(*CLIENT)
        sealed = seal.seal("token", b"token")
        for index in range(len(sealed)):
            for bit in range(8):
                changed = bytearray(sealed)
                changed[index] ^= 1 << bit
                assert seal.open("token", bytes(changed)) is None
            assert seal.open("token", sealed[:index]) is None
            assert seal.open("token", sealed[index + 1 :]) is None

    def test_nothing_of_the_client_can_be_read(self) -> None:
        seal = seal_of(*CLIENT)
        before = f"{seal!r} {vars(seal)}"
        row = seal.name("token") + repr(seal.seal("token", b"readable"))
        for part in (*CLIENT, "readable"):
            assert part not in f"{before} {row} {seal!r} {vars(seal)}"
        for call in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="not pickled"):
                call(seal)

    def test_the_keys_are_derived_once_and_the_secret_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[bytes] = []
        scrypt = hashlib.scrypt

        def counted(password: bytes, **options: Any) -> bytes:
            calls.append(password)
            return scrypt(password, **options)

        monkeypatch.setattr(hashlib, "scrypt", counted)
        seal = seal_of(*CLIENT)
        assert not calls
        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(seal.name, ["token"] * 8))) == 1
        assert len(calls) == 1
        assert not any(value == "s3cret" for value in vars(seal).values())

    def test_rows_of_this_version_are_found_by_the_next(self) -> None:
        """Whatever changes the name has to change the version, and so does what changes the key."""
        seal = seal_of(*CLIENT)
        sealed = bytes.fromhex("092b8fe4c89e97d1d181d60e1bcb703f27baff93edbd283ef049927ad67c00a4f7")
        assert seal.name("token") == "token:b7836f9822842dc30c4a66263523b3c2e98dead08946924e4ebe56659de4318e"
        assert seal.open("token", sealed) == b"value"
