"""What comes from outside: exceptions at any moment, cancellation, full thread pools, event loops that come and go."""

from __future__ import annotations

import asyncio
import itertools
import linecache
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from conftest import (
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

import nexus_auth
from nexus_auth import Environment, forget_tokens, grant, value
from nexus_auth.testing import NexusSandbox
from nexus_auth.threads import result_of, start_thread

BLOCKING = [name for name in INSTALLED if "-" not in name]
LOOPS = [name for name in INSTALLED if "-" in name]
on_blocking = pytest.mark.parametrize("driver", BLOCKING, indirect=True)
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


# Exceptions that are raised into a call


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
    """Call a function at the n-th line of nexus_auth that this thread comes to; yields their count, in a list."""
    home = str(Path(nexus_auth.__file__).parent)
    count = [0]

    def trace_lines(frame: FrameType, event: str, _: Any) -> Any:
        # No signal is handled at the start of these, nor between the end of a block and what `with` does then.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith(("try:", "while True:", "with ")):
            count[0] += 1
            if count[0] == moment:
                function()
        return trace_lines

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return trace_lines if frame.f_code.co_filename.startswith(home) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


class SlowStore:
    """A store that keeps nothing, and takes some seconds over it."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds

    def get(self, name: str) -> tuple[bytes, float] | None:
        return None

    def put(self, name: str, value: bytes, ttl: float) -> None:
        pass

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        if limit == 1:  # the turn
            time.sleep(self.seconds)
        return 0.0

    def release(self, name: str, owner: str, keep: float) -> None:
        pass


def waiting_for_the_answer(driver: Driver, gated: GatedSandbox) -> Any:
    return driver.auth(gated)


def renewing_ahead_of_expiry(driver: Driver, gated: GatedSandbox) -> Any:
    gated.gate.set()
    auth = driver.auth(gated)
    assert driver.get(driver.client(auth), url(gated)).status == 200
    grow_old_in(gated, left=30)
    gated.gate.clear()
    return auth


def waiting_for_retry_after(driver: Driver, gated: GatedSandbox) -> Any:
    gated.gate.set()
    gated.fail_token_requests(status=429, retry_after=30)
    return driver.auth(gated)


def waiting_for_another_caller(driver: Driver, gated: GatedSandbox) -> Any:
    driver.in_background(outcome, driver.get, driver.client(driver.auth(gated)), url(gated))
    gated.arrived(1)
    return driver.auth(gated)


def waiting_for_the_store(driver: Driver, gated: GatedSandbox) -> Any:
    gated.gate.set()
    return driver.auth(gated, store=SlowStore())


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there are no such signals here")
@on_blocking
@pytest.mark.parametrize(
    ("begin", "error"),
    [
        (waiting_for_the_answer, SoftLimit),
        (waiting_for_the_answer, KeyboardInterrupt),
        (renewing_ahead_of_expiry, SoftLimit),
        (waiting_for_retry_after, SoftLimit),
        (waiting_for_another_caller, SoftLimit),
        (waiting_for_the_store, SoftLimit),
    ],
)
def test_a_signal_handler_that_raises(
    driver: Driver, gated: GatedSandbox, begin: Callable[[Driver, GatedSandbox], Any], error: type[BaseException]
) -> None:
    """As Celery's soft time limit does, whatever the call waits for."""
    client = driver.client(begin(driver, gated))
    with raised_by_signals(error), pytest.raises(error):
        driver.get(client, url(gated))
    gated.gate.set()
    forget_tokens()  # Retry-After
    assert driver.get(driver.client(driver.auth(gated)), url(gated)).status == 200


@contextmanager
def raised_by_signals(error: type[BaseException]) -> Generator[None, None, None]:
    """Raise `error` once, a moment after the block has begun, from the handler of a signal."""
    is_over, moments = threading.Event(), [0.0]

    def handle(*_: object) -> None:
        if moments and time.monotonic() > moments[0]:
            moments.clear()
            raise error

    def send() -> None:
        while not is_over.wait(0.02):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send)
    moments[0] = time.monotonic() + 0.05
    sender.start()
    try:
        yield
    finally:
        moments.clear()
        is_over.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer here")
@pytest.mark.parametrize("name", BLOCKING)
def test_a_signal_at_any_moment_leaves_nothing_locked(name: str) -> None:
    """In a process of its own: what measures coverage here has locks, and signals can hit those."""
    process = get_context("spawn").Process(target=call_under_signals, args=(name,))
    process.start()
    try:
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def call_under_signals(name: str) -> None:
    """Whatever a call is about: it may fetch, renew ahead of expiry or after a 401, or judge an answer."""
    nexus, undisturbed = Nexus(), 0
    with DRIVERS[name]() as driver:
        client = driver.client_without_network(nexus.answer)
        client.auth = driver.door.NexusAuth("id", "s3cret", FAR, max_wait=0.5, **driver.lend(client))
        get = partial(driver.get, client, CUSTOMER)
        get()

        def fetch() -> None:  # with another cookie jar, since that of a client may well stay locked
            forget_tokens()
            client.auth.access_token()

        expire_soon = partial(grow_old, FAR, "id", "s3cret", left=30)
        beginnings: list[Callable[[], None]] = [forget_tokens, nexus.revoke, expire_soon]
        for begin in beginnings * 80:
            begin()
            with suppress(SoftLimit), raised_after(random.uniform(1e-5, 1.5e-3)):
                get()
                undisturbed += 1
            driver.in_background(fetch).result(timeout=5)  # a lock that is left behind would not hold up this thread
    assert undisturbed < 230


@contextmanager
def raised_after(seconds: float) -> Generator[None, None, None]:
    """Raise `SoftLimit` from the handler of a timer's signal, unless the block has ended by then."""
    is_over = False

    def handle(*_: object) -> None:
        if not is_over:
            raise SoftLimit

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@on_blocking
@pytest.mark.usefixtures("quick_retries")
def test_a_call_within_the_flight_is_told_at_once(driver: Driver, sandbox: NexusSandbox) -> None:
    """Of a logging handler, a hook or a signal handler that calls the API with the token that is being fetched."""
    client = driver.client(driver.auth(sandbox))
    errors: list[Any] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not errors:
                errors.append(None)
                errors[0] = outcome(driver.get, client, url(sandbox))

    handler, logger = Handler(), logging.getLogger("nexus_auth")
    logger.addHandler(handler)
    sandbox.fail_token_requests(status=503)  # which is logged while the token is being fetched
    started = time.monotonic()
    try:
        assert driver.get(client, url(sandbox)).status == 200
    finally:
        logger.removeHandler(handler)
    assert isinstance(errors[0], driver.door.TokenWaitError)
    assert "in this very call: does a logging handler or a hook call the API?" in str(errors[0])
    assert time.monotonic() - started < 10


@on_blocking
def test_an_auth_that_is_made_at_any_moment(driver: Driver) -> None:
    """By a signal handler or a `__del__`, in the middle of what another auth object is about."""
    nexus = Nexus()
    client = driver.client_without_network(nexus.answer)
    made: list[Any] = []

    class Dropped:
        def __del__(self) -> None:
            made.append(driver.door.NexusAuth(f"another {len(made)}", "s3cret", FAR))

    for moment in itertools.count(1, 12):
        forget_tokens()
        client.auth = driver.door.NexusAuth("id", "s3cret", FAR, max_wait=0.5, **driver.lend(client))
        with called_at(moment, Dropped) as count:
            assert driver.get(client, CUSTOMER).status == 200
        if count[0] < moment:
            break
    assert len(made) > 15


# Cancellation


@pytest.mark.parametrize("who", [0, 1], ids=["who fetches", "who waits"])
def test_to_cancel_a_task_harms_nobody_else(loops: Any, gated: GatedSandbox, who: int) -> None:
    statuses: list[int] = []
    cancelled: list[bool] = []

    async def call(client: Any, scope: anyio.CancelScope) -> None:
        with scope:
            statuses.append((await client.get("/customer")).status_code)

    async def main() -> None:
        scopes = [anyio.CancelScope() for _ in range(10)]
        async with loops.from_factory(gated.client_id, gated.client_secret, gated.environment) as client:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call, client, scopes[0])
                await anyio.to_thread.run_sync(gated.arrived, 1)
                for scope in scopes[1:]:
                    tasks.start_soon(call, client, scope)
                await anyio.sleep(0.02)
                scopes[who].cancel()
                await anyio.to_thread.run_sync(gated.arrived, 2 - who)  # who fetches is followed by another
                gated.gate.set()
            grow_old_in(gated, left=0)
            await call(client, anyio.CancelScope())  # no turn is left behind
        cancelled.extend(scope.cancelled_caught for scope in scopes)

    anyio.run(main, backend=loops.backend)
    assert cancelled == [number == who for number in range(10)]
    assert statuses == [200] * 10
    assert len(gated.token_requests) == 3 - who


@pytest.mark.parametrize("loops", [name for name in LOOPS if name.endswith("asyncio")], indirect=True)
def test_to_cancel_a_task_of_asyncio_harms_nobody_else(loops: Any, gated: GatedSandbox) -> None:
    async def main() -> None:
        async with loops.from_factory(gated.client_id, gated.client_secret, gated.environment) as client:
            tasks = [asyncio.ensure_future(client.get("/customer")) for _ in range(10)]
            await asyncio.to_thread(gated.arrived, 1)
            tasks[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            await asyncio.to_thread(gated.arrived, 2)
            gated.gate.set()
            assert {response.status_code for response in await asyncio.gather(*tasks[1:])} == {200}

    asyncio.run(main())
    assert len(gated.token_requests) == 2


def test_a_renewal_ahead_of_expiry_can_be_cancelled(loops: Any, gated: GatedSandbox) -> None:
    async def main() -> None:
        async with loops.from_factory(gated.client_id, gated.client_secret, gated.environment) as client:
            gated.gate.set()
            assert (await client.get("/customer")).status_code == 200
            grow_old_in(gated, left=30)
            gated.gate.clear()
            with anyio.move_on_after(0.05) as scope:
                await client.get("/customer")
            assert scope.cancelled_caught
            gated.gate.set()
            assert (await client.get("/customer")).status_code == 200

    anyio.run(main, backend=loops.backend)


# Event loops


async def ten_calls(client: Any) -> list[Any]:
    """Make calls at once, in the running event loop, and close the client."""
    results: list[Any] = []

    async def call() -> None:
        try:
            results.append((await client.get("/customer")).status_code)
        except Exception as error:
            results.append(error)

    async with client, anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(call)
    return results


@contextmanager
def answers_held_back(sandbox: NexusSandbox, token_requests: int) -> Generator[None, None, None]:
    """Hold back the answers until so many token requests have arrived, and a moment longer."""

    def let_go() -> None:
        try:
            sandbox.wait_for(token_requests=token_requests)
            time.sleep(0.02)
        finally:
            sandbox.gate.set()

    sandbox.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(let_go)
        yield
        waits.result()


def test_one_event_loop_after_another(loops: Any, sandbox: NexusSandbox) -> None:
    """With one auth object for all, although whoever fetched in a loop may have gone with it."""
    auth = loops.auth(sandbox)
    for count, backend in enumerate(["asyncio", "trio", "trio", "asyncio", "asyncio"], 1):
        client = loops.new_client(auth, {"base_url": sandbox.environment.base_url})
        with answers_held_back(sandbox, token_requests=count):
            assert anyio.run(ten_calls, client, backend=backend) == [200] * 10
        assert len(sandbox.token_requests) == count
        grow_old_in(sandbox, left=0)


@pytest.mark.parametrize("loops", [name for name in LOOPS if name.endswith("asyncio")], indirect=True)
def test_asyncio_run_again_and_again(loops: Any, sandbox: NexusSandbox) -> None:
    auth = loops.auth(sandbox)
    for count in (1, 2, 3):
        client = loops.new_client(auth, {"base_url": sandbox.environment.base_url})
        with answers_held_back(sandbox, token_requests=count):
            assert asyncio.run(ten_calls(client)) == [200] * 10
        assert len(sandbox.token_requests) == count
        grow_old_in(sandbox, left=0)


def test_a_loop_that_ends_in_the_middle_leaves_nothing_behind(loops: Any, gated: GatedSandbox) -> None:
    auth = loops.auth(gated)

    def client() -> Any:
        return loops.new_client(auth, {"base_url": gated.environment.base_url})

    async def broken_off() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ten_calls, client())
            await anyio.to_thread.run_sync(gated.arrived, 1)
            tasks.cancel_scope.cancel()

    anyio.run(broken_off, backend=loops.backend)
    gated.gate.set()
    assert anyio.run(ten_calls, client(), backend=loops.backend) == [200] * 10
    assert len(gated.token_requests) == 2


def test_several_loops_in_several_threads(loops: Any, sandbox: NexusSandbox) -> None:
    auth, backends = loops.auth(sandbox), ["asyncio", "trio", "asyncio", loops.backend]
    for _ in range(2):
        asked = len(sandbox.token_requests)
        clients = [loops.new_client(auth, {"base_url": sandbox.environment.base_url}) for _ in backends]
        with answers_held_back(sandbox, asked + 1), ThreadPoolExecutor(len(backends)) as pool:
            runs = [pool.submit(partial(anyio.run, backend=backend), ten_calls, client)
                    for backend, client in zip(backends, clients, strict=True)]  # fmt: skip
            assert [run.result() for run in runs] == [[200] * 10] * len(backends)
        assert len(sandbox.token_requests) <= asked + len(backends)
        grow_old_in(sandbox, left=0)


@pytest.mark.parametrize("driver", BLOCKING[:1], indirect=True)
def test_who_blocks_an_event_loop_does_not_wait_for_it(driver: Driver, loops: Any, gated: GatedSandbox) -> None:
    """A blocking call in a coroutine, while a task of the same loop fetches, would wait for ever."""
    blocking = driver.client(driver.auth(gated, max_wait=20))

    def let_go() -> None:
        gated.arrived(2)
        gated.gate.set()

    async def main() -> None:
        async with loops.new_client(loops.auth(gated), {}) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, url(gated))
            await anyio.to_thread.run_sync(gated.arrived, 1)
            driver.in_background(let_go)
            assert driver.get(blocking, url(gated)).status == 200

    anyio.run(main, backend=loops.backend)
    assert len(gated.token_requests) == 2


# Threads


async def get_in_time(client: Any) -> int:
    with anyio.fail_after(5):
        status: int = (await client.get("/customer")).status_code
        return status


def test_views_in_all_worker_threads_call_the_loop(loops: Any, sandbox: NexusSandbox) -> None:
    """As `def` views of FastAPI do: what a full pool waits for must not need a thread of it."""
    results: list[int] = []

    def view(client: Any) -> None:
        results.append(anyio.from_thread.run(get_in_time, client))

    async def main() -> None:
        workers = int(anyio.to_thread.current_default_thread_limiter().total_tokens)
        client = loops.from_factory(sandbox.client_id, sandbox.client_secret, sandbox.environment)
        async with client, anyio.create_task_group() as tasks:
            for _ in range(workers):
                tasks.start_soon(anyio.to_thread.run_sync, view, client)
        assert results == [200] * workers

    anyio.run(main, backend=loops.backend)
    assert len(sandbox.token_requests) == 1


@pytest.mark.parametrize("store", [False, True])
def test_all_worker_threads_are_busy(loops: Any, sandbox: NexusSandbox, tmp_path: Path, store: bool) -> None:
    is_over = threading.Event()

    async def main() -> None:
        limiter = anyio.to_thread.current_default_thread_limiter()
        credentials = sandbox.client_id, sandbox.client_secret, sandbox.environment
        options = {"store": tmp_path} if store else {}
        async with loops.from_factory(*credentials, **options) as client, anyio.create_task_group() as tasks:
            for _ in range(int(limiter.total_tokens)):
                tasks.start_soon(anyio.to_thread.run_sync, is_over.wait, 30)
            await anyio.wait_all_tasks_blocked()
            assert limiter.available_tokens == 0
            try:
                assert await get_in_time(client) == 200
            finally:
                is_over.set()

    anyio.run(main, backend=loops.backend)


def test_threads_of_ours_end(driver: Driver, sandbox: NexusSandbox, tmp_path: Path) -> None:
    """Those that are none of the library's end with what they were started for."""
    client = driver.client(driver.auth(sandbox, store=tmp_path))
    driver.get(client, url(sandbox))
    before = threading.active_count()
    for _ in range(3):
        forget_tokens()
        sandbox.revoke_tokens()
        assert driver.get(client, url(sandbox)).status == 200
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


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


def test_a_thread_hands_on_what_its_function_raises() -> None:
    def fail() -> None:
        raise HardLimit

    with pytest.raises(HardLimit):
        result_of(start_thread(fail), 5)
    is_over = threading.Event()
    assert result_of(start_thread(is_over.wait), 0.01) is None  # it takes longer
    is_over.set()


def test_where_no_thread_can_be_started_the_function_is_called_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert result_of(start_thread(threading.get_ident), 5) == threading.get_ident()


LONG = 0.8  # seconds; half of it passes for a slow machine


def test_the_event_loop_is_never_blocked(
    loops: Any, sandbox: NexusSandbox, stranger: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a slow answer, nor by a pause, nor by a store, nor by the trust store of a client for TLS."""
    slow = loops.auth(sandbox)
    sandbox.fail_token_requests(status=200, delay=LONG, json={"access_token": "late"})
    sandbox.answer("/customer", times=None)
    monkeypatch.setattr(grant, "BUSY_PAUSE", LONG)
    stranger.fail_token_requests(status=429)
    later, stored = loops.auth(stranger), loops.auth(stranger, store=SlowStore(LONG))
    closed = nowhere().token_endpoint.replace("http:", "https:")
    environment = value.replace(sandbox.environment, token_endpoint=closed)
    building = loops.auth(sandbox, environment=environment, max_wait=0)
    make = loops.library.AsyncClient.__init__

    def make_slowly(*arguments: Any, **options: Any) -> None:
        if not options:
            time.sleep(LONG)
        make(*arguments, **options)

    async def main() -> float:
        async with loops.new_client(None, {}) as client:

            async def get(sandbox: NexusSandbox, auth: Any) -> None:
                await client.get(url(sandbox), auth=auth)

            async def fail() -> None:
                with pytest.raises(loops.library_error):
                    await get(sandbox, building)

            monkeypatch.setattr(loops.library.AsyncClient, "__init__", make_slowly)
            calls = [partial(get, sandbox, slow), partial(get, stranger, later), partial(get, stranger, stored)]
            return await longest_gap([*calls, fail])

    started = time.monotonic()
    assert anyio.run(main, backend=loops.backend) < LONG / 2
    assert time.monotonic() - started > LONG


WHILE_IMPORTING = """
import importlib, sys, threading, time
import anyio
import nexus_auth.{library} as door
from nexus_auth import Environment

endpoint, base_url, client_id, client_secret = sys.argv[1:]
environment = Environment("here", token_endpoint=endpoint, base_url=base_url)
is_importing = threading.Event()


def slow_import(name):
    if name.startswith("authlib"):
        is_importing.set()
        time.sleep(1.2)
    return import_module(name)


async def main():
    last = time.monotonic()

    async def call():
        other = door.NexusAuth(client_id, client_secret, environment, scope="sanctionlist")
        threading.Thread(target=other.access_token).start()
        while not is_importing.is_set():
            await anyio.sleep(0.01)
        assert (await client.get("/customer")).status_code == 200
        tasks.cancel_scope.cancel()

    client = door.nexus_async_client(client_id, client_secret, environment)
    async with client, anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        while True:
            await anyio.sleep(0.005)
            gap, last = time.monotonic() - last, time.monotonic()
            if gap > 0.7:
                sys.exit(f"blocked for {{gap}} s")


import_module, importlib.import_module = importlib.import_module, slow_import
anyio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("library", [name for name in ("httpx", "httpx2") if name in INSTALLED][:1])
def test_the_event_loop_is_not_blocked_while_another_thread_imports(library: str, sandbox: NexusSandbox) -> None:
    arguments = [sandbox.environment.token_endpoint, sandbox.environment.base_url, sandbox.client_id]
    code = WHILE_IMPORTING.format(library=library)
    command = [sys.executable, "-c", code, *arguments, sandbox.client_secret]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(sandbox.token_requests) == 2
