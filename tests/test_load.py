"""Load and faults: many callers at once, event loops, renewals ahead of time, the quota, retries, failure memory."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from conftest import DRIVERS, AsyncHTTPX, Driver, Reply, Requests, nowhere, outcome

from nexus_auth import Environment, TokenRequestError, TokenWaitError, forget_tokens, grant
from nexus_auth.quota import LIMIT, MARGIN, PERIOD, Quota, Slot
from nexus_auth.testing import Answer, Arrival, NexusSandbox

LOOPS = [driver for driver in DRIVERS if isinstance(driver, AsyncHTTPX)]
ON_ASYNCIO = [driver for driver in LOOPS if driver.backend == "asyncio"]
HANGS = 60  # seconds, more than any test waits for


class GatedSandbox(NexusSandbox):
    """Answers token requests only while its gate is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()

    def _reply(self, arrival: Arrival) -> Answer:
        answer = super()._reply(arrival)
        if arrival.path == "/connect/token":
            self.gate.wait(HANGS)
        return answer

    def arrived(self, token_requests: int = 1, requests: int = 0) -> bool:
        """Wait until so many are here; return False if they are not within ten seconds."""
        until = time.monotonic() + 10
        while len(self.token_requests) < token_requests or len(self.requests) < requests:
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    @contextlib.contextmanager
    def closed_until(
        self, token_requests: int = 1, requests: int = 0, and_then: float = 0.0
    ) -> Generator[list[bool], None, None]:
        """Keep the gate closed until so many are here and some seconds more; yields a list: whether they came."""
        were_here: list[bool] = []

        def open_in_time() -> None:
            were_here.append(self.arrived(token_requests, requests))
            time.sleep(and_then)
            self.gate.set()

        self.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(open_in_time)
            yield were_here


@pytest.fixture
def gated() -> Iterator[GatedSandbox]:
    gated = GatedSandbox()
    with gated:
        yield gated
        gated.gate.set()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long they are is proved where the grant is driven by hand."""
    monkeypatch.setattr(grant, "BACKOFF", 0.002)


@pytest.fixture
def doors() -> Iterator[list[Driver]]:
    """All drivers, ready to be used side by side."""
    with contextlib.ExitStack() as stack:
        for driver in LOOPS:
            driver.portal = stack.enter_context(start_blocking_portal(driver.backend))
        yield DRIVERS


@pytest.fixture(params=LOOPS, ids=repr)
def loops(request: pytest.FixtureRequest) -> AsyncHTTPX:
    """An asynchronous driver that comes without an event loop."""
    driver: AsyncHTTPX = request.param
    return driver


def url(sandbox: NexusSandbox, path: str = "/customer") -> str:
    return sandbox.environment.base_url + path


def statuses(outcomes: list[Any]) -> set[Any]:
    """Return the statuses of replies, and whatever is no reply as it is."""
    return {outcome.status if isinstance(outcome, Reply) else outcome for outcome in outcomes}


def set_life(auth: Any, seconds: float) -> None:
    """Leave the token `seconds` to live, and no more than half of its life."""
    token = auth._credentials.token
    token.expires_at, token.half_life = time.monotonic() + seconds, time.monotonic() - 1


def use_up(quota: Quota, ago: float = 0.0) -> None:
    """Count a whole quota of requests that were made and answered `ago` seconds before now."""
    now = time.monotonic() - ago
    for slot in [Slot() for _ in range(LIMIT)]:
        assert quota.wait(slot, now) == 0
        quota.release(slot, now)


# Single flight


def test_a_hundred_callers_at_once_cost_one_token_request(driver: Driver, gated: GatedSandbox) -> None:
    client = driver.client(driver.auth(gated))
    with gated.closed_until(and_then=0.1):
        assert statuses(driver.at_once([client] * 100, url(gated))) == {200}
    assert len(gated.token_requests) == 1
    assert len(gated.requests) == 100
    assert len({arrival.headers["Authorization"] for arrival in gated.requests}) == 1
    driver.close(client)


def test_a_hundred_callers_share_a_refusal(driver: Driver, gated: GatedSandbox) -> None:
    client = driver.client(driver.auth(gated, client_secret="wrong"))
    with gated.closed_until(and_then=0.1):
        errors = driver.at_once([client] * 100, url(gated))
    assert {type(error) for error in errors} == {driver.door.TokenRequestError}
    assert {error.error for error in errors} == {"invalid_client"}
    assert len({id(error) for error in errors}) == 100  # for each its own, with its own traceback
    assert len(gated.token_requests) <= 3
    driver.close(client)


@pytest.mark.usefixtures("short_pauses")
def test_a_hundred_callers_of_an_endpoint_that_never_answers_are_all_told(
    driver: Driver, sandbox: NexusSandbox
) -> None:
    sandbox.fail_token_requests(100, delay=HANGS)
    client = driver.client(driver.auth(sandbox, timeout=0.05))
    kind = driver.library.exceptions.Timeout if isinstance(driver, Requests) else driver.library.TimeoutException
    started = time.monotonic()
    errors = driver.at_once([client] * 100, url(sandbox))
    assert time.monotonic() - started < 10  # one after another they would take twenty seconds
    assert [error for error in errors if not isinstance(error, kind)] == []
    assert len(sandbox.token_requests) <= 5
    driver.close(client)


def test_a_hundred_callers_with_little_patience_do_not_all_try(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the next try was due sooner than their patience ends."""
    monkeypatch.setattr(grant, "BACKOFF", 0.05)
    sandbox.fail_token_requests(100, delay=HANGS)
    client = driver.client(driver.auth(sandbox, timeout=0.05, max_wait=0.2))
    errors = driver.at_once([client] * 100, url(sandbox))
    assert [error for error in errors if not isinstance(error, TokenWaitError)] == []
    assert len(sandbox.token_requests) <= 5
    driver.close(client)


def test_who_waits_for_another_waits_no_longer_than_max_wait(driver: Driver, gated: GatedSandbox) -> None:
    patient, impatient = (driver.client(driver.auth(gated, max_wait=max_wait)) for max_wait in (75, 0.1))
    gated.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        fetches = pool.submit(driver.get, patient, url(gated))
        gated.arrived()
        waits = outcome(lambda: driver.get(impatient, url(gated)))
        assert not fetches.done()
        gated.gate.set()
        assert fetches.result().status == 200
    assert isinstance(waits, driver.door.TokenWaitError)
    assert len(gated.token_requests) == 1
    driver.close(patient)
    driver.close(impatient)


def test_a_hundred_callers_with_a_revoked_token_cost_one_renewal(driver: Driver, gated: GatedSandbox) -> None:
    client = driver.client(driver.auth(gated))
    driver.get(client, url(gated))
    gated.revoke_tokens()
    with gated.closed_until(2, requests=101) as all_were_refused:
        assert statuses(driver.at_once([client] * 100, url(gated))) == {200}
    assert all_were_refused == [True]
    assert len(gated.token_requests) == 2
    assert len(gated.requests) == 201
    driver.close(client)


def test_who_comes_with_an_older_token_takes_the_newer(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    client = driver.client(auth)
    driver.get(client, url(sandbox))
    older = auth._credentials.token
    sandbox.revoke_tokens()
    driver.get(client, url(sandbox))
    for _ in range(3):
        renewal = auth._credentials.renew(older, auth._terms, auth._credentials.lock)
        with pytest.raises(StopIteration) as done:
            next(renewal)
        assert done.value.value is auth._credentials.token
    driver.close(client)


def test_a_hundred_auth_objects_are_one_caller(doors: list[Driver], gated: GatedSandbox) -> None:
    """In the threads of all libraries there is one flight, and in each event loop another at most."""
    clients = [(driver, driver.client(driver.auth(gated))) for driver in doors for _ in range(10)]
    with gated.closed_until(and_then=0.3), ThreadPoolExecutor(100) as pool:
        outcomes = list(pool.map(lambda pair: outcome(lambda: pair[0].get(pair[1], url(gated))), clients))
    assert statuses(outcomes) == {200}
    assert len(gated.token_requests) <= 1 + len(LOOPS)
    for driver, client in clients:
        driver.close(client)


# Event loops


async def calls(driver: AsyncHTTPX, auth: Any, sandbox: NexusSandbox, times: int = 10) -> list[Any]:
    """Make calls at once, in the running event loop."""
    outcomes: list[Any] = []

    async def call() -> None:
        try:
            outcomes.append((await client.get(url(sandbox))).status_code)
        except Exception as error:
            outcomes.append(error)

    async with driver.client(auth) as client, anyio.create_task_group() as group:
        for _ in range(times):
            group.start_soon(call)
    return outcomes


def test_one_auth_serves_one_event_loop_after_another(loops: AsyncHTTPX, gated: GatedSandbox) -> None:
    auth = loops.auth(gated)
    for turn, backend in enumerate(["asyncio", "trio", "trio", "asyncio", "asyncio"], 1):
        with gated.closed_until(turn, and_then=0.03):
            assert anyio.run(calls, loops, auth, gated, backend=backend) == [200] * 10
        assert len(gated.token_requests) == turn
        set_life(auth, -1)


@pytest.mark.parametrize("loops", ON_ASYNCIO, ids=repr, indirect=True)
def test_asyncio_run_again_and_again(loops: AsyncHTTPX, gated: GatedSandbox) -> None:
    auth = loops.auth(gated)
    for turn in (1, 2, 3):
        with gated.closed_until(turn, and_then=0.03):
            assert asyncio.run(calls(loops, auth, gated)) == [200] * 10
        assert len(gated.token_requests) == turn
        set_life(auth, -1)


def test_a_loop_that_ends_in_the_middle_leaves_nothing_locked(loops: AsyncHTTPX, gated: GatedSandbox) -> None:
    auth = loops.auth(gated)

    async def broken_off() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(calls, loops, auth, gated)
            await anyio.to_thread.run_sync(gated.arrived)
            group.cancel_scope.cancel()

    gated.gate.clear()
    anyio.run(broken_off, backend=loops.backend)
    gated.gate.set()
    assert auth._credentials.token is None
    assert anyio.run(calls, loops, auth, gated, backend=loops.backend) == [200] * 10
    assert len(gated.token_requests) == 2


def test_several_loops_in_several_threads(loops: AsyncHTTPX, gated: GatedSandbox) -> None:
    auth = loops.auth(gated)
    backends = ["asyncio", "trio", "asyncio", loops.backend]

    def run(backend: str) -> list[Any]:
        return anyio.run(calls, loops, auth, gated, backend=backend)

    for turn in (1, 2):
        asked = len(gated.token_requests)
        with gated.closed_until(asked + 1, and_then=0.1), ThreadPoolExecutor(len(backends)) as pool:
            assert list(pool.map(run, backends)) == [[200] * 10] * len(backends)
        assert len(gated.token_requests) <= turn * len(backends)
        set_life(auth, -1)


async def longest_gap(call: Callable[[], Awaitable[Any]]) -> float:
    """Return the longest time, in seconds, for which the event loop does nothing else while it makes `call`."""
    gaps: list[float] = []

    async def beat() -> None:
        last = time.monotonic()
        while True:
            await anyio.sleep(0.005)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        await anyio.sleep(0.02)
        await call()
        group.cancel_scope.cancel()
    return max(gaps)


def test_the_event_loop_is_never_blocked(
    loops: AsyncHTTPX, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a slow answer, nor by the quota, nor by building a client with its trust store."""
    wait = 0.7
    answer = '{"access_token": "late", "token_type": "Bearer"}'
    sandbox.fail_token_requests(status=200, body=answer, delay=wait)
    sandbox.answer("/late", times=5)
    with NexusSandbox() as busy:
        waiting = loops.auth(busy)
        use_up(waiting._credentials.quota, PERIOD + MARGIN - wait)
        address = nowhere().base_url.replace("http:", "https:")
        closed = Environment("closed", token_endpoint=f"{address}/token", base_url=sandbox.environment.base_url)
        building = loops.auth(sandbox, environment=closed, max_wait=wait)

        async def main() -> float:
            async with loops.client() as client:
                initialize = loops.library.AsyncClient.__init__

                def slow_initialize(*arguments: Any, **options: Any) -> None:
                    if options.get("verify", True) is True:
                        time.sleep(wait)
                    initialize(*arguments, **options)

                async def build() -> None:
                    with pytest.raises(loops.library_error):
                        await client.get(url(sandbox), auth=building)

                async def call() -> None:
                    async with anyio.create_task_group() as group:
                        for _ in range(5):
                            group.start_soon(partial(client.get, url(sandbox, "/late"), auth=loops.auth(sandbox)))
                        group.start_soon(partial(client.get, url(busy), auth=waiting))
                        group.start_soon(build)

                monkeypatch.setattr(loops.library.AsyncClient, "__init__", slow_initialize)
                return await longest_gap(call)

        started = time.monotonic()
        gap = anyio.run(main, backend=loops.backend)
        assert time.monotonic() - started > wait
        assert gap < wait / 2
        assert (len(sandbox.token_requests), len(busy.token_requests)) == (1, 1)


@pytest.mark.parametrize("who", ["fetches", "waits"])
def test_to_cancel_a_task_harms_nobody_else(loops: AsyncHTTPX, gated: GatedSandbox, who: str) -> None:
    auth = loops.auth(gated)
    outcomes: list[Any] = []

    async def call(client: Any, scope: anyio.CancelScope) -> None:
        with scope:
            outcomes.append((await client.get(url(gated))).status_code)

    async def main() -> None:
        async with loops.client(auth) as client:
            scopes = [anyio.CancelScope() for _ in range(10)]
            async with anyio.create_task_group() as group:
                group.start_soon(call, client, scopes[0])
                await anyio.to_thread.run_sync(gated.arrived)
                for scope in scopes[1:]:
                    group.start_soon(call, client, scope)
                await anyio.sleep(0.05)
                scopes[who == "waits"].cancel()
                if who == "fetches":
                    await anyio.to_thread.run_sync(gated.arrived, 2)  # by another
                gated.gate.set()
            assert [scope.cancelled_caught for scope in scopes].count(True) == 1
            set_life(auth, -1)
            await call(client, anyio.CancelScope())  # no lock is left behind

    gated.gate.clear()
    anyio.run(main, backend=loops.backend)
    assert outcomes == [200] * 10
    assert len(gated.token_requests) == (3 if who == "fetches" else 2)
    assert all(slot.sent for slot in auth._credentials.quota.slots)


@pytest.mark.parametrize("loops", ON_ASYNCIO, ids=repr, indirect=True)
def test_to_cancel_an_asyncio_task_harms_nobody_else(loops: AsyncHTTPX, gated: GatedSandbox) -> None:
    auth = loops.auth(gated)

    async def main() -> None:
        async with loops.client(auth) as client:
            tasks = [asyncio.ensure_future(client.get(url(gated))) for _ in range(10)]
            await asyncio.to_thread(gated.arrived)
            tasks[0].cancel()  # which was the first to ask, so that it fetches
            with pytest.raises(asyncio.CancelledError) as cancelled:
                await tasks[0]
            assert await asyncio.to_thread(gated.arrived, 2)  # another does now
            gated.gate.set()
            del cancelled  # only here: with its traceback the frames that fetched have lived until now
            assert {response.status_code for response in await asyncio.gather(*tasks[1:])} == {200}

    gated.gate.clear()
    asyncio.run(main())
    assert len(gated.token_requests) == 2


@pytest.mark.parametrize("blocking", [driver for driver in DRIVERS if not isinstance(driver, AsyncHTTPX)], ids=repr)
def test_who_blocks_an_event_loop_does_not_wait_for_it(
    loops: AsyncHTTPX, blocking: Driver, gated: GatedSandbox
) -> None:
    """A blocking call in a coroutine, while a task of the same loop fetches, would wait for ever."""
    auth, other = loops.auth(gated), blocking.client(blocking.auth(gated, max_wait=20))

    async def main() -> None:
        async with loops.client(auth) as client, anyio.create_task_group() as group:
            group.start_soon(client.get, url(gated))
            await anyio.to_thread.run_sync(gated.arrived)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: gated.arrived(2)).add_done_callback(lambda _: gated.gate.set())
                assert blocking.get(other, url(gated)).status == 200

    gated.gate.clear()
    anyio.run(main, backend=loops.backend)
    assert len(gated.token_requests) == 2
    blocking.close(other)


def test_a_cancelled_task_leaves_the_line_of_the_quota(loops: AsyncHTTPX, sandbox: NexusSandbox) -> None:
    auth = loops.auth(sandbox)
    use_up(auth._credentials.quota, 10)

    async def main() -> None:
        async with loops.client(auth) as client:
            with anyio.move_on_after(0.1) as scope:
                await client.get(url(sandbox))
            assert scope.cancelled_caught

    anyio.run(main, backend=loops.backend)
    assert len(auth._credentials.quota.slots) == LIMIT
    assert sandbox.token_requests == []


@pytest.mark.parametrize("driver", [driver for driver in DRIVERS if driver not in LOOPS], ids=repr)
def test_an_interrupted_thread_harms_nobody_else(driver: Driver, sandbox: NexusSandbox) -> None:
    if isinstance(driver, Requests):
        options, lent, method = {"session": driver.client()}, driver.library.adapters.HTTPAdapter(), "send"
        options["session"].mount("http://", lent)
    else:
        lent, method = driver.library.HTTPTransport(), "handle_request"
        options = {"client": driver.library.Client(transport=lent)}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    client = driver.client(driver.auth(sandbox, **options))
    setattr(lent, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        driver.get(client, url(sandbox))
    delattr(lent, method)
    assert driver.get(client, url(sandbox)).status == 200
    driver.close(client)
    for lent in options.values():
        driver.close(lent)


# Stale is not expired


def test_while_one_renews_the_others_go_on(driver: Driver, gated: GatedSandbox) -> None:
    auth = driver.auth(gated)
    client = driver.client(auth)
    driver.get(client, url(gated))
    set_life(auth, 30)
    with gated.closed_until(2, requests=10) as others_went_on:
        assert statuses(driver.at_once([client] * 10, url(gated))) == {200}
    assert others_went_on == [True]
    tokens = [arrival.headers["Authorization"] for arrival in gated.requests]
    assert [token == tokens[0] for token in tokens] == [True] * 10 + [False]
    assert len(gated.token_requests) == 2
    driver.close(client)


@pytest.mark.parametrize("fault", ["503", "400", "drop", "timeout", "refused"])
def test_a_renewal_that_fails_is_not_felt(driver: Driver, sandbox: NexusSandbox, fault: str) -> None:
    auth = known = driver.auth(sandbox, timeout=0.1 if fault == "timeout" else 10)
    client = driver.client(auth)
    driver.get(client, url(sandbox))
    if fault == "refused":
        endpoint = nowhere().token_endpoint
        environment = Environment("half", token_endpoint=endpoint, base_url=sandbox.environment.base_url)
        auth = driver.auth(sandbox, environment=environment)
        auth._credentials.token = known._credentials.token
        client.auth = auth
    elif fault in ("drop", "timeout"):
        sandbox.fail_token_requests(100, drop=fault == "drop", delay=HANGS if fault == "timeout" else 0)
    else:
        sandbox.fail_token_requests(
            100, status=int(fault), body='{"error": "invalid_client"}' if fault == "400" else ""
        )
    set_life(auth, 30)
    stopped = time.monotonic()
    auth._credentials.clock = lambda: stopped
    tried = len(auth._credentials.quota.slots)
    for turn in (1, 2):
        assert {driver.get(client, url(sandbox)).status for _ in range(5)} == {200}
        assert statuses(driver.at_once([client] * 5, url(sandbox))) == {200}
        assert len(auth._credentials.quota.slots) == tried + turn  # one try, whoever calls
        stopped += 6  # then a pause is over
    assert len({arrival.headers["Authorization"] for arrival in sandbox.requests}) == 1
    driver.close(client)


def test_after_a_renewal_that_failed_the_next_may_work(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    client = driver.client(auth)
    driver.get(client, url(sandbox))
    old = auth._credentials.token
    sandbox.fail_token_requests()
    set_life(auth, 30)
    driver.get(client, url(sandbox))
    assert auth._credentials.token is old
    auth._credentials.clock = lambda: time.monotonic() + 6
    driver.get(client, url(sandbox))
    assert auth._credentials.token is not old
    assert len(sandbox.token_requests) == 3
    driver.close(client)


# The quota


def test_over_the_quota_a_call_waits(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    client = driver.client(auth)
    use_up(auth._credentials.quota, PERIOD + MARGIN - 0.2)
    opening = auth._credentials.quota.slots[0].time + PERIOD
    assert driver.get(client, url(sandbox)).status == 200
    assert sandbox.token_requests[0].time >= opening
    driver.close(client)


def test_over_the_quota_and_max_wait_a_call_fails_at_once(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox, max_wait=20)
    client = driver.client(auth)
    use_up(auth._credentials.quota, 10)
    started = time.monotonic()
    for _ in range(5):
        with pytest.raises(driver.library_error) as raised:
            driver.get(client, url(sandbox))
        error: Any = raised.value
        assert isinstance(error, driver.door.TokenWaitError)
        assert 35 < error.retry_after <= 50.1
    assert time.monotonic() - started < 10
    assert sandbox.token_requests == []
    assert len(auth._credentials.quota.slots) == LIMIT
    driver.close(client)


@pytest.mark.usefixtures("short_pauses")
def test_every_try_counts(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox, max_wait=5)
    client = driver.client(auth)
    sandbox.fail_token_requests(2)
    use_up(auth._credentials.quota)
    del auth._credentials.quota.slots[:2]
    with pytest.raises(TokenWaitError):
        driver.get(client, url(sandbox))
    assert len(sandbox.token_requests) == 2
    driver.close(client)


def test_the_quota_is_one_for_all_credentials_and_doors(doors: list[Driver], sandbox: NexusSandbox) -> None:
    clients = {driver: driver.client() for driver in doors}
    for number, driver in zip(range(LIMIT), itertools.cycle(doors), strict=False):
        sandbox.clients[f"client-{number}"] = f"secret-{number}"
        auth = driver.door.NexusAuth(f"client-{number}", f"secret-{number}", sandbox.environment)
        assert driver.get(clients[driver], url(sandbox), auth=auth).status == 200
    assert len(sandbox.token_requests) == LIMIT
    auth = None
    for driver in doors:
        auth = driver.door.NexusAuth(f"late-{driver}", "secret", sandbox.environment, max_wait=5)
        with pytest.raises(driver.library_error) as raised:
            driver.get(clients[driver], url(sandbox), auth=auth)
        assert isinstance(raised.value, TokenWaitError)
        assert 5 < raised.value.retry_after <= 60.1
        driver.close(clients[driver])
    assert len(sandbox.token_requests) == LIMIT
    assert auth
    assert len(auth._credentials.quota.slots) == LIMIT


def test_each_token_endpoint_has_a_quota_of_its_own(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    use_up(auth._credentials.quota)
    with NexusSandbox() as other:
        client = driver.client(driver.auth(other, max_wait=1))
        assert driver.get(client, url(other)).status == 200
        driver.close(client)


@pytest.mark.slow
def test_no_minute_holds_more_than_sixty_token_requests(doors: list[Driver]) -> None:
    """What the server sees of many API clients that want a token through all doors, for more than a minute."""
    with NexusSandbox(limit=10_000) as sandbox:
        clients = {driver: driver.client() for driver in doors}
        starts = [0.0] * 30 + [6.0] * 35 + [8.0] * 20 + [9.0] * 10 + [50.0] * 5

        def call(number: int, driver: Driver) -> Any:
            client_id, secret = f"{starts[number]} {number}", f"secret-{number}"
            sandbox.clients[client_id] = secret
            auth = driver.door.NexusAuth(client_id, secret, sandbox.environment)
            time.sleep(starts[number])
            return outcome(lambda: driver.get(clients[driver], url(sandbox), auth=auth))

        with ThreadPoolExecutor(len(starts)) as pool:
            outcomes = list(pool.map(call, range(len(starts)), itertools.cycle(doors)))
        for driver, client in clients.items():
            driver.close(client)
    assert statuses(outcomes) == {200}
    times = [arrival.time for arrival in sandbox.token_requests]
    assert len(times) == len(starts)
    assert min(late - early for early, late in zip(times, times[LIMIT:], strict=False)) > 60
    # None waits needlessly: the first thirty make room after a minute, and the next thirty six seconds later.
    assert times[LIMIT + 30 - 1] - times[0] < 60 + 5
    assert times[-1] - times[0] < 66 + 5
    # They go in order, but for those whose turn comes at the same moment.
    order = [float(dict(arrival.form)["client_id"].split()[0]) for arrival in sandbox.token_requests]
    assert [*order[:60], *sorted(order[60:90]), *sorted(order[90:])] == starts


# Retries


@pytest.mark.usefixtures("short_pauses")
def test_faults_are_tried_again(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.fail_token_requests(drop=True)
    sandbox.fail_token_requests(status=503)
    sandbox.fail_token_requests(status=429)
    client = driver.client(driver.auth(sandbox))
    assert driver.get(client, url(sandbox)).status == 200
    assert (len(sandbox.token_requests), len(sandbox.requests)) == (4, 1)
    driver.close(client)


@pytest.mark.usefixtures("short_pauses")
def test_retry_after_is_obeyed(doors: list[Driver]) -> None:
    """In seconds and as a date, at all doors at once, since it takes its time."""
    date = int(time.time()) + 2

    def call(driver: Driver, as_date: bool) -> None:
        retry_after = email.utils.formatdate(date, usegmt=True) if as_date else 1
        with NexusSandbox() as sandbox:
            sandbox.fail_token_requests(status=503 if as_date else 429, retry_after=retry_after)
            client = driver.client(driver.auth(sandbox))
            assert driver.get(client, url(sandbox)).status == 200
            first, second = [arrival.time for arrival in sandbox.token_requests]
            assert as_date or second - first >= 1
            assert not as_date or time.time() - time.monotonic() + second > date - 0.05
            driver.close(client)

    with ThreadPoolExecutor(2 * len(doors)) as pool:
        list(pool.map(call, doors * 2, [True] * len(doors) + [False] * len(doors)))


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("status", [429, 503])
def test_after_four_error_responses_a_call_fails(driver: Driver, sandbox: NexusSandbox, status: int) -> None:
    sandbox.fail_token_requests(10, status=status)
    client = driver.client(driver.auth(sandbox))
    with pytest.raises(driver.library_error) as raised:
        driver.get(client, url(sandbox))
    assert isinstance(raised.value, TokenRequestError)
    assert (raised.value.status_code, len(sandbox.token_requests)) == (status, 4)
    driver.close(client)


@pytest.mark.usefixtures("short_pauses")
def test_after_four_dropped_connections_a_call_fails_with_the_librarys_own_error(
    driver: Driver, sandbox: NexusSandbox
) -> None:
    sandbox.fail_token_requests(10, drop=True)
    client = driver.client(driver.auth(sandbox))
    kind = driver.library.ConnectionError if isinstance(driver, Requests) else driver.library.RemoteProtocolError
    with pytest.raises(kind) as raised:
        driver.get(client, url(sandbox))
    assert type(raised.value) is kind
    assert sandbox.environment.token_endpoint in str(raised.value)
    assert len(sandbox.token_requests) == 4
    driver.close(client)


# Failures are remembered


def test_a_loop_with_a_wrong_secret_fails_fast(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, client_secret="wrong"))
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(driver.library_error) as raised:
            driver.get(client, url(sandbox))
        assert isinstance(raised.value, TokenRequestError)
        assert raised.value.error == "invalid_client"
        assert raised.value.request.url == url(sandbox)  # type: ignore[attr-defined]
    assert time.monotonic() - started < 10
    assert len(sandbox.token_requests) <= 3
    driver.close(client)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("fault", ["400", "503", "429", "drop"])
def test_a_failure_is_remembered_at_every_door(doors: list[Driver], sandbox: NexusSandbox, fault: str) -> None:
    for first in doors:
        forget_tokens()
        sandbox.token_requests.clear()
        asked = 0
        for driver in [first, *doors]:
            auth = driver.auth(sandbox, client_secret="wrong", max_wait=20)
            auth._credentials.clock = lambda: 1000.0  # the memory does not fade
            if not asked and fault != "400":
                options: dict[str, Any] = {"drop": True} if fault == "drop" else {"status": int(fault)}
                sandbox.fail_token_requests(4, retry_after=30 if fault == "429" else None, **options)
            client = driver.client(auth)
            with pytest.raises(driver.library_error) as raised:
                driver.get(client, url(sandbox))
            asked = asked or len(sandbox.token_requests)
            assert len(sandbox.token_requests) == asked
            error: Any = raised.value
            assert sandbox.environment.token_endpoint in str(error)
            assert error.request.url == url(sandbox)
            if fault == "400":
                assert type(error) is driver.door.TokenRequestError
                assert (error.error, error.status_code) == ("invalid_client", 400)
            elif fault == "503":
                assert type(error) is driver.door.TokenRequestError
                assert (error.error, error.status_code) == (None, 503)
            elif fault == "429":
                assert type(error) is driver.door.TokenWaitError
                assert error.retry_after == 30
            driver.close(client)
        sandbox._faults.clear()


def test_threads_that_never_end_are_none_of_ours(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    """To make calls starts no thread that would outlive them."""
    driver.get(signed, url(sandbox))
    before = {thread for thread in threading.enumerate() if not thread.daemon}
    for _ in range(3):
        forget_tokens()
        driver.get(signed, url(sandbox))
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= before
