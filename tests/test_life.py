"""Life of a token and around it: its age, what is remembered of failures, pickle, copy, other processes, and bounds."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, cast

import anyio
import pytest
from conftest import DRIVERS, AsyncHTTPX, Clock, Driver, Requests, nowhere, outcome
from test_grant import (
    GOOD,
    ConnectError,
    LibraryError,
    LibraryTokenRequestError,
    LibraryTokenWaitError,
    fault,
    response,
    terms,
)
from test_load import GatedSandbox, url, use_up

from nexus_auth import Environment, NexusAuthError, TokenRequestError, TokenWaitError, credentials
from nexus_auth.credentials import KNOWN, Credentials, credentials_of
from nexus_auth.grant import IMPORTING, Sleep, Terms, Token, TokenRequest
from nexus_auth.quota import LOCK, Quota
from nexus_auth.testing import NexusSandbox

SYNC = [driver for driver in DRIVERS if not isinstance(driver, AsyncHTTPX)]


@pytest.fixture
def gated() -> Iterator[GatedSandbox]:
    gated = GatedSandbox()
    with gated:
        yield gated
        gated.gate.set()


# By hand


class Client(Credentials):
    """Credentials on a clock that is set, whose steps are performed by hand."""

    def __init__(self) -> None:
        super().__init__(Quota())
        self.time = Clock()
        self.clock = self.time
        self.terms = terms()
        self.steps: list[Any] = []

    def perform(self, steps: Any, *answers: Any, takes: float = 0.0) -> Any:
        """Return what `steps` come to, given `answers` in order, each after some seconds."""
        waiting = list(answers)
        self.steps = []
        answer: Any = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as done:
                assert not waiting
                return done.value
            self.steps.append(step)
            if isinstance(step, TokenRequest):
                self.time.now += takes
                answer = waiting.pop(0)
            else:
                self.time.now += step

    def obtained(self, *answers: Any, terms: Terms | None = None, takes: float = 0.0) -> Any:
        return self.perform(self.obtain(terms or self.terms, self.lock), *answers, takes=takes)

    def renewed(self, refused: Any, *answers: Any) -> Any:
        return self.perform(self.renew(refused, self.terms, self.lock), *answers)


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def stale(client: Client) -> Client:
    """A client whose token has 30 seconds left to live, of an hour."""
    client.obtained(GOOD)
    client.time.now += 3570
    return client


NEXT = response({"access_token": "another", "token_type": "Bearer", "expires_in": 3600})
FAULTS: dict[str, list[Any]] = {
    "refused": [fault(400)],
    "invalid_client": [response({"error": "invalid_client"}, 400)],
    "down": [fault(503)] * 4,
    "unreachable": [ConnectError("no route")] * 4,
    "later": [fault(429, Retry_After="1000")],
}


def test_the_first_token_is_fetched_under_the_lock(client: Client) -> None:
    steps = client.obtain(client.terms, client.lock)
    assert next(steps) == TokenRequest(10)
    assert client.lock.locked()
    with pytest.raises(StopIteration) as done:
        steps.send(GOOD)
    assert done.value.value.authorization == "Bearer t0ken"
    assert not client.lock.locked()


def test_a_fresh_token_takes_no_step(client: Client) -> None:
    token = client.obtained(GOOD)
    client.time.now += 3539
    assert client.obtained() is token
    assert client.steps == []


def test_who_waits_takes_what_another_fetches(client: Client) -> None:
    fetching, waiting = (client.obtain(client.terms, client.lock) for _ in range(2))
    assert isinstance(next(fetching), TokenRequest)
    assert isinstance(next(waiting), Sleep)
    with pytest.raises(StopIteration) as fetched:
        fetching.send(GOOD)
    with pytest.raises(StopIteration) as done:
        next(waiting)
    assert done.value.value is fetched.value.value


def test_who_waits_shares_the_failure_of_another(client: Client) -> None:
    fetching, waiting = (client.obtain(client.terms, client.lock) for _ in range(2))
    next(fetching)
    assert isinstance(next(waiting), Sleep)
    with pytest.raises(LibraryTokenRequestError):
        fetching.send(*FAULTS["invalid_client"])
    with pytest.raises(LibraryTokenRequestError) as raised:
        next(waiting)
    assert raised.value.error == "invalid_client"


def test_who_waits_takes_over_when_the_other_breaks_off(client: Client) -> None:
    fetching, waiting = (client.obtain(client.terms, client.lock) for _ in range(2))
    next(fetching)
    assert isinstance(next(waiting), Sleep)
    fetching.close()
    assert isinstance(next(waiting), TokenRequest)


def test_who_waited_too_long_is_told(client: Client) -> None:
    start = client.time.now
    with client.lock, pytest.raises(LibraryTokenWaitError, match="another caller"):
        client.obtained()
    assert client.time.now == start + 75
    assert all(isinstance(step, Sleep) for step in client.steps)


def test_who_waits_looks_ever_more_rarely_but_never_much_too_late(client: Client) -> None:
    with client.lock, pytest.raises(LibraryTokenWaitError):
        client.obtained()
    waited, looks = 0.0, client.steps
    for pause in looks:
        assert 0 < pause <= 0.011 + waited / 4
        waited += pause
    assert len(looks) < 50


def test_the_wait_for_others_counts_as_a_wait(client: Client) -> None:
    fetching, waiting = (client.obtain(client.terms, client.lock) for _ in range(2))
    next(fetching)
    next(waiting)
    client.time.now += 70
    fetching.close()
    assert next(waiting) == TokenRequest(5)
    with pytest.raises(LibraryTokenWaitError):
        waiting.send(fault(503, Retry_After="6"))


def test_what_changed_on_the_way_to_the_lock_is_looked_at_again(client: Client) -> None:
    """Between a look at the token and the lock, another thread may have fetched one, or failed to."""

    class LateLock:
        def __init__(self, *answers: Any) -> None:
            self.answers = answers

        def acquire(self, blocking: bool) -> Any:
            client.lock = lock
            with contextlib.suppress(LibraryError):
                client.obtained(*self.answers)
            return lock.acquire(blocking)

        def release(self) -> None:
            lock.release()

    lock: Any = client.lock
    client.lock = cast(Any, LateLock(GOOD))
    assert client.obtained() is client.token
    client.time.now += 3600
    client.lock = cast(Any, LateLock(*FAULTS["invalid_client"]))
    with pytest.raises(LibraryTokenRequestError):
        client.obtained()
    assert not lock.locked()


def test_a_stale_token_is_renewed_by_one_and_used_by_the_others(stale: Client) -> None:
    old = stale.token
    with stale.lock:
        assert stale.obtained() is old
        assert stale.steps == []
    new = stale.obtained(NEXT)
    assert new is stale.token is not old


CLOSED = RuntimeError("the client is closed")  # which is the fault of what was lent, and of no token endpoint


@pytest.mark.parametrize("fault", [*(answers[0] for answers in FAULTS.values()), CLOSED], ids=str)
def test_a_renewal_that_fails_is_tried_once_and_again_after_a_pause(stale: Client, fault: Any) -> None:
    old = stale.token
    assert stale.obtained(fault) is old
    assert not any(isinstance(step, Sleep) for step in stale.steps)
    stale.time.now += 4.9
    assert stale.obtained() is old
    assert stale.steps == []
    stale.time.now += 0.2
    assert stale.obtained(NEXT) is not old


def test_a_token_that_expires_while_its_renewal_fails_is_not_used(stale: Client) -> None:
    """What comes of it is another token or an error, but no 401 of the API to an expired token."""
    old = stale.token
    steps = stale.obtain(stale.terms, stale.lock)
    assert isinstance(next(steps), TokenRequest)
    stale.time.now += 31
    assert isinstance(steps.send(ConnectError("timed out")), TokenRequest)
    with pytest.raises(StopIteration) as done:
        steps.send(NEXT)
    assert done.value.value is stale.token is not old


def test_an_expired_token_is_replaced_at_once_although_its_renewal_failed(stale: Client) -> None:
    old = stale.token
    stale.time.now += 29
    assert stale.obtained(fault(503)) is old
    stale.time.now += 1
    assert stale.obtained(NEXT) is not old


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_is_remembered_for_a_moment(client: Client, name: str) -> None:
    with pytest.raises(Exception) as first:  # noqa: PT011
        client.obtained(*FAULTS[name], takes=1)
    for seconds in (0, 9.9 if name == "invalid_client" else 1.9):
        client.time.now += seconds
        with pytest.raises(LibraryError) as again:
            client.obtained()
        assert client.steps == []
        assert again.value is not first.value
        assert again.value.args == first.value.args
        assert (type(again.value), vars(again.value)) == (type(first.value), vars(first.value))
    client.time.now += 0.2
    assert client.obtained(GOOD).authorization == "Bearer t0ken"


def test_what_one_lent_fails_no_other(client: Client) -> None:
    with pytest.raises(RuntimeError) as raised:
        client.obtained(CLOSED)
    assert raised.value is CLOSED
    assert client.obtained(GOOD).authorization == "Bearer t0ken"


@pytest.mark.parametrize("driver", SYNC, ids=repr, indirect=True)
def test_an_interrupt_leaves_nothing_locked(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while somebody looks at its traceback, and so at the frames that were fetching."""
    auth = driver.auth(sandbox)
    client = driver.client(auth)
    monkeypatch.setattr(auth, "_send", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) as raised:
        driver.get(client, url(sandbox))
    monkeypatch.undo()
    assert driver.get(client, url(sandbox)).status == 200
    assert raised.tb
    driver.close(client)


@pytest.mark.parametrize("name", FAULTS)
def test_another_door_remembers_it_as_its_own(client: Client, name: str) -> None:
    class Error(Exception):
        pass

    class RequestError(TokenRequestError, Error):
        pass

    class WaitError(TokenWaitError, Error):
        pass

    with pytest.raises(Exception) as first:  # noqa: PT011
        client.obtained(*FAULTS[name])
    other = client.terms._replace(library_error=Error, token_request_error=RequestError, token_wait_error=WaitError)
    with pytest.raises(Error) as again:
        client.obtained(terms=other)
    assert type(again.value) is (WaitError if name == "later" else RequestError)
    assert str(again.value) == str(first.value)
    assert name != "later" or vars(again.value)["retry_after"] == 1000
    assert name != "invalid_client" or vars(again.value)["error"] == "invalid_client"


def test_what_took_one_too_long_is_tried_for_one_with_more_patience(client: Client) -> None:
    with pytest.raises(LibraryTokenWaitError):
        client.obtained(fault(429, Retry_After="80"))
    assert client.obtained(GOOD, terms=client.terms._replace(max_wait=100)).authorization == "Bearer t0ken"


def test_with_little_patience_a_failure_is_remembered_as_well(client: Client) -> None:
    """Although the next try was due sooner than that."""
    client.terms = terms(max_wait=2.5)
    with pytest.raises(LibraryTokenWaitError) as raised:
        client.obtained(ConnectError("timed out"), ConnectError("timed out"), takes=1)
    assert raised.value.retry_after < 2.5
    client.time.now += 1.9
    with pytest.raises(LibraryTokenWaitError):
        client.obtained()
    assert client.steps == []


def test_broken_off_nothing_is_remembered(client: Client) -> None:
    steps = client.obtain(client.terms, client.lock)
    assert isinstance(next(steps), TokenRequest)
    steps.close()
    assert client.obtained(GOOD).authorization == "Bearer t0ken"


def test_after_a_401_the_newer_token_is_taken(client: Client) -> None:
    old = client.obtained(GOOD)
    new = client.renewed(old, NEXT)
    assert new is client.token is not old
    assert client.renewed(old) is new
    assert client.steps == []


@pytest.mark.parametrize("name", FAULTS)
def test_after_a_401_a_failure_is_remembered_too(client: Client, name: str) -> None:
    old = client.obtained(GOOD)
    with pytest.raises(Exception):  # noqa: B017, PT011
        client.renewed(old, *FAULTS[name])
    with pytest.raises(LibraryError):
        client.renewed(old)
    assert client.steps == []
    client.time.now += 10.1
    assert client.renewed(old, NEXT) is not old


def test_after_a_401_a_token_is_renewed_although_that_failed_ahead_of_time(stale: Client) -> None:
    old = stale.token
    assert stale.obtained(fault(503)) is old
    assert old
    new = stale.renewed(old, NEXT)
    assert new is not None
    assert new is not old


def test_renewals_that_do_not_help_are_ever_rarer(client: Client) -> None:
    token = client.obtained(GOOD)
    start, renewals = client.time.now, []
    while client.time.now < start + 600:
        answers = [NEXT] if client.token is token and client.time.now >= client._next_try else []
        renewed = client.renewed(token, *answers)
        if answers:
            renewals.append(client.time.now)
        if renewed:
            token = renewed
            client.judge(401, client.terms)
        client.time.now += 0.5
    pauses = [after - before for before, after in itertools.pairwise(renewals)]
    assert len(renewals) < 20
    assert pauses == sorted(pauses)
    assert pauses[0] <= 1.5
    assert 60 <= pauses[-1] <= 61
    client.time.now += 60
    assert client.renewed(token, NEXT)
    client.judge(200, client.terms)
    assert client.renewed(client.token, NEXT)


# Pickle and copy


CLONES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "old pickle": lambda value: pickle.loads(pickle.dumps(value, 0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def lend(driver: Driver, client: Any) -> dict[str, Any]:
    return {"session" if isinstance(driver, Requests) else "client": client}


@pytest.mark.parametrize("way", CLONES)
def test_an_auth_survives(driver: Driver, sandbox: NexusSandbox, way: str) -> None:
    auth = driver.auth(sandbox, leeway=1, timeout=2, max_wait=3, scope="sanctionlist")
    clone = CLONES[way](auth)  # before anything was fetched
    client = driver.client(clone)
    assert driver.get(client, url(sandbox)).status == 200
    another = CLONES[way](clone)
    assert driver.get(client, url(sandbox), auth=another).status == 200
    assert driver.get(client, url(sandbox), auth=auth).status == 200
    assert (repr(clone), clone.environment, clone._terms) == (repr(auth), auth.environment, auth._terms)
    assert len(sandbox.token_requests) == 1  # they have the same credentials
    driver.close(client)


def test_neither_locks_nor_tokens_travel(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    driver.get(signed, url(sandbox))
    auth = driver.auth(sandbox)
    token = auth._credentials.token.authorization.split()[1]
    for clone in (pickle.dumps(auth), repr(vars(copy.deepcopy(auth))).encode()):
        assert token.encode() not in clone


@pytest.mark.parametrize("way", CLONES)
def test_a_session_survives(sandbox: NexusSandbox, way: str) -> None:
    import requests

    session = DRIVERS[0].ready_made(sandbox, iso8601=True)
    session.headers["X-Mine"] = "mine"
    with session, CLONES[way](session) as clone:
        assert isinstance(clone, requests.Session)
        assert clone.get("/customer").status_code == 200
        assert session.get("customer").status_code == 200
        auth: Any = clone.auth
        assert auth._lent is (clone if way != "copy" else session)
    assert [arrival.path for arrival in sandbox.requests] == ["/customer", "/customer"]
    assert {arrival.headers["request_iso8601"] for arrival in sandbox.requests} == {"true"}
    assert {arrival.headers["X-Mine"] for arrival in sandbox.requests} == {"mine"}


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("driver", SYNC, ids=repr, indirect=True)
def test_what_is_lent_goes_along_if_it_can_be_pickled(driver: Driver, sandbox: NexusSandbox, way: str) -> None:
    lent = driver.client()
    if isinstance(driver, Requests):
        lent.proxies = {"http": nowhere().base_url}
        can = True
    else:
        can = isinstance(outcome(lambda: pickle.dumps(lent)), bytes)
    auth = driver.auth(sandbox, max_wait=0.1, **lend(driver, lent))
    lent.auth = auth  # it may be the very one the auth is set on
    clone = CLONES[way](auth)
    client = driver.client(clone)
    result = outcome(lambda: driver.get(client, url(sandbox)))
    if can:
        assert isinstance(result, NexusAuthError)  # by way of the proxy that is not there
        assert sandbox.token_requests == []
    else:
        assert result.status == 200
    assert lent.auth is auth
    driver.close(client)
    driver.close(lent)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_what_is_lent_and_cannot_be_pickled_is_left_behind(driver: Driver, sandbox: NexusSandbox, way: str) -> None:
    lent = driver.client()
    lent.unpicklable = threading.Lock()
    if isinstance(driver, Requests):
        lent.hooks["response"].append(lambda response, **_: response)
    clone = CLONES[way](driver.auth(sandbox, **lend(driver, lent)))
    assert clone._lent is None
    client = driver.client(clone)
    assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1
    driver.close(client)
    driver.close(lent)


# Processes


def test_a_spawned_process_has_the_same_credentials(sandbox: NexusSandbox) -> None:
    """With objects of all doors in one process, since it takes long to start."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool, DRIVERS[0].ready_made(sandbox) as session:
        session.get("/before")
        futures = [pool.submit(session.get, "/customer")]
        futures += [pool.submit(door.library.get, url(sandbox), auth=door.auth(sandbox)) for door in SYNC]
        assert [future.result(60).status_code for future in futures] == [200] * len(futures)
    assert len(sandbox.token_requests) == 2  # one for each process
    assert len({arrival.headers["Authorization"] for arrival in sandbox.requests}) == 2


def in_child(work: Callable[[], Any]) -> bool:
    """Return whether `work` is done without an exception in a forked child, which is ended if it is stuck."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    until = time.monotonic() + 15
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
threads_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@forks
@threads_fork
def test_a_forked_child_is_never_stuck(driver: Driver, gated: GatedSandbox) -> None:
    """Not even when a token request is under way, in a thread that it does not have."""
    auth = driver.auth(gated)
    client = driver.client(auth)
    child_client = driver.client(driver.auth(gated))

    def child() -> None:
        gated_url = url(gated, "/child")
        if isinstance(driver, AsyncHTTPX):

            async def call() -> int:
                async with driver.client(driver.auth(gated)) as client:
                    return int((await client.get(gated_url)).status_code)

            assert anyio.run(call, backend=driver.backend) == 200
        else:
            assert driver.get(child_client, gated_url).status == 200
        assert driver.auth(gated)._credentials is auth._credentials
        assert not any(lock.locked() for lock in (auth._credentials.lock, LOCK, IMPORTING))
        assert driver.door.NexusAuth("another", "secret", gated.environment)._credentials is not auth._credentials

    with ThreadPoolExecutor(1) as pool:
        gated.gate.clear()
        call = pool.submit(driver.get, client, url(gated))
        gated.arrived()
        threading.Timer(0.1, gated.gate.set).start()
        done = in_child(child)
        assert call.result(30).status == 200
    assert done
    assert len(gated.token_requests) == 2
    driver.close(client)
    driver.close(child_client)


FORK_WHILE_IMPORTING = """
import asyncio, importlib.abc, os, sys, threading, time, warnings
from importlib import import_module
from nexus_auth import Environment

warnings.simplefilter("ignore")
door, module, endpoint, base_url, client_id, secret = sys.argv[1:]
library, importing = import_module(door), threading.Event()
environment = Environment("here", token_endpoint=endpoint, base_url=base_url)
auth = import_module(f"nexus_auth.{door}").NexusAuth(client_id, secret, environment)


class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            importing.set()
            time.sleep(0.3)


async def async_get(auth):
    async with library.AsyncClient(auth=auth) as client:
        return await client.get(base_url)


def get(auth=auth):
    return library.get(base_url, auth=auth) if door == "requests" else asyncio.run(async_get(auth))


get(None)  # what the library itself imports late is here
sys.meta_path.insert(0, Slow())
thread = threading.Thread(target=get)
thread.start()
importing.wait(10)
child = os.fork()
if not child:
    os._exit(0 if get().status_code == 200 else 1)
thread.join()
for _ in range(100):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        sys.exit(status != 0)
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("stuck")
"""


@forks
@pytest.mark.parametrize(
    ("door", "module"),
    [("requests", "authlib"), ("requests", "authlib.oauth2.client"), ("httpx", "authlib")],
)
def test_a_child_forked_in_the_middle_of_an_import_is_not_stuck(sandbox: NexusSandbox, door: str, module: str) -> None:
    """For a module that another thread was importing at the time of the fork, a child would wait for ever."""
    urls = sandbox.environment.token_endpoint, sandbox.environment.base_url
    secret = sandbox.client_id, sandbox.client_secret
    command = [sys.executable, "-c", FORK_WHILE_IMPORTING, door, module, *urls, *secret]
    script = subprocess.run(command, timeout=60, capture_output=True, check=False)
    assert (script.returncode, script.stderr) == (0, b"")
    assert len(sandbox.token_requests) == 2


# Bounds


def a_crowd(times: int, driver: Driver, environment: Environment) -> None:
    """Make auth objects of so many API clients, and keep none."""
    for number in range(times):
        driver.door.NexusAuth(f"client-{number}", "secret", environment)
    gc.collect()


@pytest.mark.parametrize("driver", SYNC[:1], ids=repr, indirect=True)
def test_ten_thousand_credentials_are_not_kept(driver: Driver, sandbox: NexusSandbox) -> None:
    held = driver.auth(sandbox)
    client = driver.client(held)
    driver.get(client, url(sandbox))
    a_crowd(10_000, driver, sandbox.environment)
    assert len(credentials._live) <= KNOWN + 10
    # Whoever is still there has kept its token.
    assert driver.get(client, url(sandbox)).status == 200
    assert driver.get(client, url(sandbox), auth=driver.auth(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1
    driver.close(client)


@pytest.mark.parametrize("driver", SYNC[:1], ids=repr, indirect=True)
def test_the_quota_outlives_the_credentials(driver: Driver, sandbox: NexusSandbox) -> None:
    """For whom requests were made may be forgotten, how many were made may not."""
    client = driver.client()
    use_up(driver.auth(sandbox)._credentials.quota)
    a_crowd(
        2 * KNOWN,
        driver,
        Environment("other", token_endpoint="https://id.example/token", base_url="https://api.example"),
    )
    with pytest.raises(TokenWaitError):
        driver.get(client, url(sandbox), auth=driver.auth(sandbox, max_wait=1))
    assert sandbox.token_requests == []
    driver.close(client)


def test_a_call_with_its_token_waits_for_nobody(driver: Driver, sandbox: NexusSandbox) -> None:
    """Neither for one that fetches, nor for one that is in line, nor for one that is new."""
    auth = driver.auth(sandbox)
    client = driver.client(auth)
    driver.get(client, url(sandbox))
    with auth._credentials.lock, LOCK, IMPORTING, ThreadPoolExecutor(1) as pool:
        assert pool.submit(driver.get, client, url(sandbox)).result(10).status == 200
    driver.close(client)


def test_a_token_is_small(client: Client) -> None:
    token: Token = client.obtained(GOOD)
    assert sum(map(sys.getsizeof, vars(token).values())) < 1000


@forks
@threads_fork
def test_a_fork_waits_for_short_changes_to_be_done(sandbox: NexusSandbox) -> None:
    """A lock that another thread holds for a moment would never be released in the child; nor would half a change."""
    for lock in (LOCK, IMPORTING):
        lock.acquire()
        threading.Timer(0.1, lock.release).start()
    DRIVERS[0].auth(sandbox)
    assert in_child(lambda: os._exit(bool(LOCK.locked() or IMPORTING.locked())))
    assert not LOCK.locked()
    assert not IMPORTING.locked()


def test_a_child_has_locks_of_its_own(sandbox: NexusSandbox) -> None:
    """What other threads of its parent held at the time of the fork nobody in the child would release."""
    held = credentials_of(sandbox.environment.token_endpoint, sandbox.client_id, sandbox.client_secret, "api1")
    assert held.lock.acquire(blocking=False)
    credentials._unlock()
    assert not held.lock.locked()
