"""2. A token belongs to its credentials, not to the object: who shares one, and who never does."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Driver, GatedSandbox, Reply, outcome, url

from nexus_auth import Environment, TokenRequestError, TokenWaitError, forget_tokens
from nexus_auth.credentials import KEPT, credentials_of
from nexus_auth.quota import LIMIT, LOCK
from nexus_auth.secret import HiddenText
from nexus_auth.steps import Client
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

CLIENT = Client("https://identity.example/token", "id", HiddenText("secret"), "api1")
OTHERS: dict[str, Any] = {
    "token_endpoint": "https://identity.example/another",
    "client_id": "another",
    "client_secret": HiddenText("another"),
    "scope": "api1 sanctionlist",
}


def test_equal_credentials_are_one() -> None:
    assert credentials_of(CLIENT) is credentials_of(replace(CLIENT, client_secret=HiddenText("secret")))


@pytest.mark.parametrize("field", OTHERS)
def test_other_credentials_are_others(field: str) -> None:
    assert credentials_of(CLIENT) is not credentials_of(replace(CLIENT, **{field: OTHERS[field]}))


def test_texts_run_into_one_another_are_not_equal() -> None:
    one = replace(CLIENT, client_id="ab", client_secret=HiddenText("c"))
    other = replace(CLIENT, client_id="a", client_secret=HiddenText("bc"))
    assert credentials_of(one) is not credentials_of(other)


def test_many_calls_cost_one_token_request(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    for _ in range(40):
        assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1
    assert len({arrival.headers["Authorization"] for arrival in sandbox.requests}) == 1


def test_a_new_auth_for_every_call_costs_one_token_request(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client()
    for _ in range(20):
        assert driver.get(client, url(sandbox), auth=driver.auth(sandbox)).status == 200
    assert driver.get(driver.ready_made(sandbox), "/customer").status == 200
    assert len(sandbox.token_requests) == 1


def test_one_auth_in_many_clients_at_once(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    clients = [driver.client(auth) for _ in range(8)]
    for _ in range(3):
        replies = driver.at_once(clients, url(sandbox))
        assert [reply.status for reply in replies if isinstance(reply, Reply)] == [200] * 8
    assert len(sandbox.token_requests) == 1


def test_different_credentials_never_share(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.clients["another"] = sandbox.client_secret
    options: list[dict[str, Any]] = [{}, {"client_id": "another"}, {"scope": "sanctionlist"}]
    client = driver.client()
    for option in options * 2:
        assert driver.get(client, url(sandbox), auth=driver.auth(sandbox, **option)).status == 200
    tokens = [arrival.headers["Authorization"] for arrival in sandbox.requests]
    assert len(sandbox.token_requests) == len(set(tokens)) == 3
    assert tokens[:3] == tokens[3:]
    with pytest.raises(TokenRequestError):
        driver.get(client, url(sandbox), auth=driver.auth(sandbox, client_secret="wrong"))


def test_only_the_token_endpoint_of_an_environment_counts(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox
) -> None:
    endpoint = sandbox.environment.token_endpoint
    client = driver.client()
    stranger.answer("/customer", json={})
    for environment in (
        sandbox.environment,
        Environment("another name", token_endpoint=endpoint, base_url=sandbox.environment.base_url),
        Environment("another API", token_endpoint=endpoint, base_url=stranger.environment.base_url),
    ):
        driver.get(client, f"{environment.base_url}/customer", auth=driver.auth(sandbox, environment=environment))
    (token,) = {arrival.headers["Authorization"] for arrival in sandbox.requests + stranger.requests}
    assert token
    assert len(sandbox.token_requests) == 1


def test_a_call_with_its_token_waits_for_nobody(driver: Driver, sandbox: NexusSandbox) -> None:
    """The one lock that there is, for short changes, is held by another here."""
    client = driver.client(driver.auth(sandbox))
    driver.get(client, url(sandbox))
    with LOCK:
        assert driver.in_background(driver.get, client, url(sandbox)).result(timeout=10).status == 200


def test_all_libraries_share_one_token(doors: list[Driver], sandbox: NexusSandbox) -> None:
    for driver in doors * 2:
        assert driver.get(driver.client(driver.auth(sandbox)), url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1


def test_auth_objects_of_all_libraries_are_one_caller(doors: list[Driver], gated: GatedSandbox) -> None:
    """In the threads of all libraries there is one flight, and in each event loop another at most."""
    calls = [
        driver.in_background(driver.get, driver.client(driver.auth(gated)), url(gated))
        for driver in doors
        for _ in range(8)
    ]
    gated.arrived(1)
    gated.gate.set()
    assert {call.result().status for call in calls} == {200}
    assert len(gated.token_requests) <= len(doors)


def test_a_token_is_kept_by_who_holds_it(driver: Driver, sandbox: NexusSandbox) -> None:
    held = driver.auth(sandbox)
    client = driver.client(held)
    driver.get(client, url(sandbox))
    for number in range(KEPT + 1):
        credentials_of(replace(CLIENT, client_id=f"one of many {number}"))
    assert driver.get(client, url(sandbox)).status == 200
    assert driver.get(client, url(sandbox), auth=driver.auth(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1


def test_who_is_not_held_is_forgotten_in_time() -> None:
    forgotten = weakref.ref(credentials_of(replace(CLIENT, client_id="once")))
    assert forgotten() is not None
    for number in range(KEPT):
        credentials_of(replace(CLIENT, client_id=f"one of many {number}"))
    gc.collect()
    assert forgotten() is None


def test_a_quota_outlives_the_credentials_that_have_used_it(doors: list[Driver], sandbox: NexusSandbox) -> None:
    """For whom token requests were made may be forgotten, how many were made may not."""
    driver = doors[0]
    client = driver.client()
    sandbox.limit = 2 * LIMIT
    for number in range(LIMIT):
        outcome(driver.get, client, url(sandbox), auth=driver.auth(sandbox, client_secret=f"wrong {number}"))
    for number in range(KEPT):
        credentials_of(replace(CLIENT, client_id=f"one of many {number}"))
    gc.collect()
    with pytest.raises(TokenWaitError):
        driver.get(client, url(sandbox), auth=driver.auth(sandbox, max_wait=1))
    assert len(sandbox.token_requests) == LIMIT


def test_forget_tokens(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    driver.get(client, url(sandbox))
    forget_tokens()
    assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 2


def test_forget_tokens_forgets_failures(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    sandbox.fail_token_requests(status=400, json={"error": "invalid_client"})
    for _ in range(2):
        assert isinstance(outcome(driver.get, client, url(sandbox)), TokenRequestError)
    forget_tokens()
    assert driver.get(client, url(sandbox)).status == 200


def test_forget_tokens_forgets_the_quota_and_retry_after(doors: list[Driver], sandbox: NexusSandbox) -> None:
    driver = doors[0]
    client = driver.client()
    sandbox.limit = 2 * LIMIT

    def call(**options: Any) -> Reply | Exception:
        return outcome(driver.get, client, url(sandbox), auth=driver.auth(sandbox, max_wait=1, **options))

    for number in range(LIMIT):
        assert isinstance(call(client_secret=f"wrong {number}"), TokenRequestError)
    assert isinstance(call(), TokenWaitError)
    forget_tokens()
    sandbox.fail_token_requests(status=429, retry_after=60)
    assert [type(call()) for _ in range(2)] == [driver.door.TokenWaitError] * 2
    forget_tokens()
    assert isinstance(call(), Reply)
    assert len(sandbox.token_requests) == LIMIT + 2


def test_forget_tokens_beside_other_threads() -> None:
    """A weak dictionary raises if another thread adds to it while it is iterated over."""
    is_over = threading.Event()

    made: list[int] = []

    def make() -> None:
        while not is_over.is_set():
            credentials_of(replace(CLIENT, client_id=f"made by {threading.get_ident()}: {len(made)}"))
            made.append(1)

    with ThreadPoolExecutor(2) as pool:
        makers = [pool.submit(make) for _ in range(2)]
        try:
            while len(made) < 3000:
                for _ in range(20):
                    forget_tokens()
                time.sleep(0.001)  # who makes one waits for the lock, and this loop would have it again at once
        finally:
            is_over.set()
    assert [maker.result() for maker in makers] == [None, None]
