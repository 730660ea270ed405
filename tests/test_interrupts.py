"""What comes from outside: exceptions at any moment, cancellation, full thread pools, event loops that come and go."""

from __future__ import annotations

import asyncio
import importlib
import linecache
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import pytest
from conftest import (
    BLOCKING,
    DRIVERS,
    INSTALLED,
    Answered,
    Driver,
    GatedSandbox,
    Sent,
    grow_old,
    grow_old_in,
    nowhere,
    outcome,
    url,
)
from herd import MemoryStore

import nexus_auth
from nexus_auth import Environment, _httpx_flow, forget_tokens, grant
from nexus_auth.late_import import LateImport
from nexus_auth.testing import NexusSandbox
from nexus_auth.threads import result_of, start_thread
from nexus_auth.value import replace

LOOPS = [name for name in INSTALLED if "-" in name]
on_one_library = pytest.mark.parametrize("loops", LOOPS[:1], indirect=True)  # they share all that knows of event loops
FAR = Environment("far", token_endpoint="https://identity.example/token", base_url="https://api.example")
CUSTOMER = f"{FAR.base_url}/customer"


class SoftLimit(Exception):
    """As Celery raises it into a task: an `Exception`, which a library may take for a fault of the network."""


class HardLimit(BaseException):
    """As gevent's Timeout, `KeyboardInterrupt` and cancellation: none that `except Exception` takes."""


@pytest.fixture(params=LOOPS)
def loops(request: pytest.FixtureRequest) -> Any:
    """An asynchronous driver without an event loop of its own."""
    return DRIVERS[request.param]()


# Exceptions that are raised into a call that waits


class SlowStore(MemoryStore):
    """A store that takes some seconds to give the turn."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        if limit == 1:  # the turn
            time.sleep(self.seconds)
        return super().acquire(name, owner, limit, hold)


def waiting_for_the_answer(driver: Driver, gated: GatedSandbox) -> Any:
    return driver.auth(gated)


def renewing_ahead_of_expiry(driver: Driver, gated: GatedSandbox) -> Any:
    gated.gate.set()
    auth = driver.auth(gated)
    driver.access_token(auth)
    grow_old_in(gated, left=30)
    gated.gate.clear()
    return auth


def waiting_for_retry_after(driver: Driver, gated: GatedSandbox) -> Any:
    gated.gate.set()
    gated.fail_token_requests(status=429, retry_after=30)
    return driver.auth(gated)


def waiting_for_the_store(driver: Driver, gated: GatedSandbox) -> Any:
    gated.gate.set()
    return driver.auth(gated, store=SlowStore(1.0))


@contextmanager
def raised_after(seconds: float, error: type[BaseException]) -> Generator[None, None, None]:
    """Raise `error` from the handler of a timer's signal; a little later, where Python would ignore it."""

    def handle(_: int, frame: FrameType | None) -> None:
        assert frame is not None
        if "weakref" not in frame.f_code.co_filename and frame.f_code.co_name != "__del__":
            raise error
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer here")
@pytest.mark.parametrize(
    ("driver", "begin", "error"),
    [
        *((name, waiting_for_the_answer, SoftLimit) for name in BLOCKING),
        *((name, renewing_ahead_of_expiry, HardLimit) for name in BLOCKING),
        (BLOCKING[0], waiting_for_retry_after, SoftLimit),
        (BLOCKING[0], waiting_for_the_store, SoftLimit),
    ],
    indirect=["driver"],
)
def test_a_signal_handler_that_raises(
    driver: Driver,
    sandbox: NexusSandbox,
    gated: GatedSandbox,
    begin: Callable[[Driver, GatedSandbox], Any],
    error: type[BaseException],
) -> None:
    """As Celery's soft time limit does, whatever the call waits for."""
    driver.access_token(driver.auth(sandbox, store=MemoryStore()))  # imports what may take longer than the timer
    client = driver.client(begin(driver, gated))
    with pytest.raises(error), raised_after(0.1, error):
        driver.get(client, url(gated))
    gated.gate.set()
    forget_tokens()  # Retry-After
    assert driver.get(client, url(gated), auth=driver.auth(gated)).status == 200


# Whatever happens at any moment


class Nexus:
    """Answers without a network: a new token to each token request, and 401 to any that was revoked."""

    def __init__(self) -> None:
        self.tokens = 0
        self.revoked = 0

    def answer(self, request: Sent) -> Answered:
        if request.url == FAR.token_endpoint:
            self.tokens += 1
            return Answered(body=b'{"access_token": "%d", "expires_in": 3600}' % self.tokens)
        number = int((request.authorization or "Bearer 0").split()[1])
        return Answered(200 if number > self.revoked else 401)

    def revoke(self) -> None:
        self.revoked = self.tokens


@contextmanager
def called_at(moment: int, function: Callable[[], object]) -> Generator[list[int], None, None]:
    """Call a function at the n-th line of nexus_auth that this thread comes to; yields a list of lines until then."""
    home = str(Path(nexus_auth.__file__).parent)
    lines: list[int] = []

    def trace_lines(frame: FrameType, event: str, _: Any) -> Any:
        # No signal is handled at the start of these, nor between the end of a block and what `with` does then.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith(("try:", "while True:", "with ")):
            lines.append(frame.f_lineno)
            if len(lines) == moment:
                sys.settrace(None)
                function()
        return trace_lines if len(lines) < moment else None

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return trace_lines if frame.f_code.co_filename.startswith(home) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


STEP = 11  # one of so many moments is tried


def raise_soft_limit(_: Driver) -> NoReturn:
    raise SoftLimit


def make_another_auth(driver: Driver) -> None:
    driver.door.NexusAuth(f"another since {time.monotonic()}", "s3cret", FAR)


@pytest.mark.parametrize(
    ("driver", "happens"),
    [*((name, raise_soft_limit) for name in BLOCKING[:2]), (BLOCKING[-1], make_another_auth)],
    indirect=["driver"],
)
def test_whatever_happens_at_any_moment_leaves_nothing_locked(
    driver: Driver, happens: Callable[[Driver], object]
) -> None:
    """By a signal handler or a `__del__`, in a call that fetches, renews ahead of expiry or after a 401."""
    nexus = Nexus()
    client = driver.client_without_network(nexus.answer)
    client.auth = driver.door.NexusAuth("id", "s3cret", FAR, max_wait=0.5, **driver.lend(client))
    get = partial(driver.get, client, CUSTOMER)

    def start_anew() -> None:
        forget_tokens()
        get()

    def survives(begin: Callable[[], None], moment: int) -> bool:
        """Check one moment of a call, and tell whether it has come."""
        start_anew()
        begin()
        with suppress(SoftLimit), called_at(moment, partial(happens, driver)) as lines:
            assert get().status == 200
        driver.in_background(start_anew).result(timeout=5)  # this thread may not notice a lock that is left behind
        return len(lines) == moment

    for begin in (forget_tokens, nexus.revoke, partial(grow_old, FAR, "id", "s3cret", left=30)):
        moments = list(takewhile(partial(survives, begin), count(1, STEP)))
        assert len(moments) * STEP > 100


@pytest.mark.parametrize("driver", BLOCKING[:1], indirect=True)
@pytest.mark.usefixtures("quick_retries")
def test_a_call_within_the_flight_is_told_at_once(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a logging handler, a hook or a signal handler that calls the API with the token that is being fetched."""
    client = driver.client(driver.auth(sandbox))
    errors: list[Any] = []

    def call_the_api(_: logging.LogRecord) -> bool:
        if not errors:
            errors.append(None)
            errors[0] = outcome(driver.get, client, url(sandbox))
        return True

    monkeypatch.setattr(logging.getLogger("nexus_auth"), "filters", [call_the_api])
    sandbox.fail_token_requests(status=503)  # which is logged while the token is being fetched
    assert driver.get(client, url(sandbox)).status == 200
    assert isinstance(errors[0], driver.door.TokenWaitError)
    assert "in this very call: does a logging handler or a hook call the API?" in str(errors[0])


# Cancellation


def test_to_cancel_a_task_harms_nobody_else(loops: Any, gated: GatedSandbox) -> None:
    async def main() -> None:
        async with loops.from_factory(gated.client_id, gated.client_secret, gated.environment) as client:
            statuses: list[int] = []

            async def call(scope: anyio.CancelScope) -> None:
                with scope:
                    statuses.append((await client.get("/customer")).status_code)

            fetches, *others = [anyio.CancelScope() for _ in range(10)]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call, fetches)
                await anyio.to_thread.run_sync(gated.arrived, 1)
                for scope in others:
                    tasks.start_soon(call, scope)
                await anyio.wait_all_tasks_blocked()
                fetches.cancel()
                await anyio.to_thread.run_sync(gated.arrived, 2)
                gated.gate.set()
            assert fetches.cancelled_caught
            assert statuses == [200] * 9
            grow_old_in(gated, left=30)
            gated.gate.clear()
            with anyio.move_on_after(0.1) as renews:
                await call(anyio.CancelScope())
            assert renews.cancelled_caught
            gated.gate.set()
            await call(anyio.CancelScope())
            assert statuses == [200] * 10

    anyio.run(main, backend=loops.backend)


@pytest.mark.parametrize("loops", [name for name in LOOPS if name.endswith("asyncio")], indirect=True)
def test_to_cancel_a_task_of_asyncio_harms_nobody_else(loops: Any, gated: GatedSandbox) -> None:
    async def main() -> None:
        async with loops.from_factory(gated.client_id, gated.client_secret, gated.environment) as client:
            fetches, waits = [asyncio.ensure_future(client.get("/customer")) for _ in range(2)]
            await asyncio.to_thread(gated.arrived, 1)
            fetches.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetches
            await asyncio.to_thread(gated.arrived, 2)
            gated.gate.set()
            assert (await waits).status_code == 200

    asyncio.run(main())


# Event loops


async def ten_calls(loops: Any, auth: Any) -> list[int]:
    """Make calls at once, in the running event loop, and return their statuses."""
    statuses: list[int] = []

    async def call() -> None:
        statuses.append((await client.get("/customer")).status_code)

    options = {"base_url": auth.environment.base_url}
    async with loops.new_client(auth, options) as client, anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(call)
    return statuses


@on_one_library
def test_one_event_loop_after_another(loops: Any, gated: GatedSandbox) -> None:
    """With one auth object for all, although whoever fetched in a loop may have gone with it."""
    auth = loops.auth(gated)

    async def broken_off() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ten_calls, loops, auth)
            await anyio.to_thread.run_sync(gated.arrived, 1)
            tasks.cancel_scope.cancel()

    def in_asyncio() -> list[int]:
        return asyncio.run(ten_calls(loops, auth))

    def in_trio() -> list[int]:
        return anyio.run(ten_calls, loops, auth, backend="trio")

    anyio.run(broken_off, backend=loops.backend)
    gated.gate.set()
    for asked, run in enumerate([in_asyncio, in_trio, in_trio, in_asyncio, in_asyncio], 2):
        assert run() == [200] * 10
        assert len(gated.token_requests) == asked
        grow_old_in(gated, left=0)


@on_one_library
def test_several_loops_in_several_threads(loops: Any, gated: GatedSandbox) -> None:
    auth, backends = loops.auth(gated), ["asyncio", "trio", "asyncio", "trio"]
    with ThreadPoolExecutor(len(backends)) as pool:
        runs = [pool.submit(partial(anyio.run, backend=backend), ten_calls, loops, auth) for backend in backends]
        gated.arrived(len(backends))
        gated.gate.set()
        assert [run.result() for run in runs] == [[200] * 10] * len(backends)
    assert len(gated.token_requests) == len(backends)


# Threads


def test_all_worker_threads_are_busy(loops: Any, sandbox: NexusSandbox, tmp_path: Path) -> None:
    """As with `def` views of FastAPI, which may wait for the very call: it must not need a thread of that pool."""
    is_over = threading.Event()
    auth = loops.auth(sandbox, store=tmp_path)

    async def main() -> None:
        limiter = anyio.to_thread.current_default_thread_limiter()
        async with anyio.create_task_group() as tasks:
            for _ in range(int(limiter.total_tokens)):
                tasks.start_soon(anyio.to_thread.run_sync, is_over.wait, 30)
            await anyio.wait_all_tasks_blocked()
            assert limiter.available_tokens == 0
            try:
                with anyio.fail_after(10):
                    assert await auth.async_access_token()
            finally:
                is_over.set()

    anyio.run(main, backend=loops.backend)


def test_threads_of_ours_end(doors: list[Driver], sandbox: NexusSandbox, tmp_path: Path) -> None:
    """Those that are none of the library's end with what they were started for."""
    auths = [(driver, driver.auth(sandbox, store=tmp_path)) for driver in doors]
    before = threading.active_count()
    for driver, auth in auths:
        forget_tokens()
        driver.access_token(auth, refused=driver.access_token(auth))
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_thread_hands_on_what_its_function_raises() -> None:
    def fail() -> NoReturn:
        raise HardLimit

    with pytest.raises(HardLimit):
        result_of(start_thread(fail), 5)


def test_a_thread_that_takes_longer_is_not_waited_for() -> None:
    is_over = threading.Event()
    assert result_of(start_thread(is_over.wait), 0.01) is None
    is_over.set()


def test_where_no_thread_can_be_started_the_function_is_called_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter."""

    def fail(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert result_of(start_thread(threading.get_ident), 5) == threading.get_ident()


# An event loop is never blocked


async def longest_gap(calls: list[Callable[[], Any]]) -> float:
    """Return the longest time, in seconds, for which the event loop does nothing else while calls are made at once."""
    gaps: list[float] = []

    async def beat() -> None:
        last = time.monotonic()
        while True:
            await anyio.sleep(0.005)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    async with anyio.create_task_group() as beating:
        beating.start_soon(beat)
        async with anyio.create_task_group() as tasks:
            for call in calls:
                tasks.start_soon(call)
        beating.cancel_scope.cancel()
    return max(gaps)


LONG = 0.8  # seconds; half of it passes for a slow machine


def slowly(function: Callable[..., Any], is_meant: Callable[..., bool]) -> Callable[..., Any]:
    """Return a function that takes long where its arguments are those that are meant."""

    def call(*arguments: Any, **options: Any) -> Any:
        if is_meant(*arguments, **options):
            time.sleep(LONG)
        return function(*arguments, **options)

    return call


@pytest.fixture
def slow_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import Authlib anew, which takes long."""
    late = LateImport("authlib.oauth2.client")
    monkeypatch.setattr(grant, "authlib_client", late)
    monkeypatch.setattr(_httpx_flow, "authlib_client", late)
    slow_import = slowly(importlib.import_module, lambda name: name.startswith("authlib") and not late.is_loaded)
    monkeypatch.setattr(importlib, "import_module", slow_import)


@on_one_library
@pytest.mark.usefixtures("slow_imports")
def test_the_event_loop_is_never_blocked(
    loops: Any, sandbox: NexusSandbox, stranger: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a slow answer, a pause or a store, nor by an import, nor by the trust store of a client for TLS."""
    sandbox.fail_token_requests(status=200, delay=LONG, json={"access_token": "late"})
    stranger.fail_token_requests(status=429)
    monkeypatch.setattr(grant, "BUSY_PAUSE", LONG)
    kind = loops.library.AsyncClient
    monkeypatch.setattr(kind, "__init__", slowly(kind.__init__, lambda _, **options: not options))
    closed = nowhere().token_endpoint.replace("http:", "https:")
    building = loops.auth(sandbox, environment=replace(sandbox.environment, token_endpoint=closed), max_wait=0)

    async def fail() -> None:
        with pytest.raises(loops.library_error):
            await building.async_access_token()

    async def main() -> float:
        auths = [loops.auth(sandbox), loops.auth(stranger), loops.auth(stranger, store=SlowStore(LONG))]
        return await longest_gap([*(auth.async_access_token for auth in auths), fail])

    started = time.monotonic()
    assert anyio.run(main, backend=loops.backend) < LONG / 2
    assert time.monotonic() - started > LONG
