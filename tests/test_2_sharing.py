"""2. A token belongs to its credentials, not to the object: who shares one, and who never does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from conftest import INSTALLED, Driver, GatedSandbox, Reply, outcome, statuses, url

from nexus_auth import TokenRequestError, TokenWaitError, forget_tokens
from nexus_auth.credentials import KEPT, credentials_of
from nexus_auth.quota import LIMIT, LOCK
from nexus_auth.secret import HiddenText
from nexus_auth.steps import Client
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

CLIENT = Client("https://identity.example/token", "id", HiddenText("secret"), "api1")


def crowd_out() -> None:
    """Name more API clients than are kept while no auth object holds them."""
    for number in range(KEPT):
        credentials_of(replace(CLIENT, client_id=f"one of many {number}"))
    gc.collect()


@pytest.mark.parametrize(
    "another",
    [
        {"token_endpoint": "https://identity.example/another"},
        {"client_id": "another"},
        {"client_secret": HiddenText("another")},
        {"client_id": "ids", "client_secret": HiddenText("ecret")},  # the same text, run together
        {"scope": "api1 sanctionlist"},
    ],
)
def test_credentials_are_one_if_all_that_is_sent_is_equal(another: dict[str, Any]) -> None:
    credentials = credentials_of(CLIENT)
    assert credentials_of(replace(CLIENT, client_secret=HiddenText("secret"))) is credentials
    assert credentials_of(replace(CLIENT, **another)) is not credentials


def test_all_auth_objects_share_one_token(driver: Driver, sandbox: NexusSandbox) -> None:
    auth, another = driver.auth(sandbox), driver.auth(sandbox)
    clients = [driver.client(auth), driver.client(auth), driver.client(another), driver.ready_made(sandbox)]
    for _ in range(3):
        assert statuses(driver.at_once(clients, url(sandbox))) == {200}
    assert driver.get(driver.client(), url(sandbox), auth=driver.auth(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1
    assert len({arrival.headers["Authorization"] for arrival in sandbox.requests}) == 1


def test_all_libraries_share_the_token_of_equal_credentials_alone(doors: list[Driver], sandbox: NexusSandbox) -> None:
    sandbox.clients["another"] = sandbox.client_secret
    options: list[dict[str, Any]] = [{}, {"client_id": "another"}, {"scope": "sanctionlist"}]
    tokens = [driver.access_token(driver.auth(sandbox, **option)) for driver in doors for option in options]
    assert tokens == tokens[:3] * len(doors)
    assert len(sandbox.token_requests) == len(set(tokens)) == 3
    for driver in doors:
        with pytest.raises(TokenRequestError):
            driver.access_token(driver.auth(sandbox, client_secret="wrong"))


def test_only_the_token_endpoint_of_an_environment_counts(
    doors: list[Driver], sandbox: NexusSandbox, stranger: NexusSandbox
) -> None:
    another = replace(sandbox.environment, name="another name", base_url=stranger.environment.base_url)
    auth = doors[0].auth(sandbox, environment=another)
    assert doors[0].access_token(auth) == doors[0].access_token(doors[0].auth(sandbox))


def test_threads_of_all_libraries_wait_for_one_token_request(doors: list[Driver], gated: GatedSandbox) -> None:
    """And each event loop for another at most."""
    clients = [(driver, driver.client(driver.auth(gated))) for driver in doors for _ in range(8)]
    calls = [driver.in_background(driver.get, client, url(gated)) for driver, client in clients]
    gated.arrived(1)
    gated.gate.set()
    assert {call.result().status for call in calls} == {200}
    assert len(gated.token_requests) <= 1 + sum("-" in name for name in INSTALLED)


def test_a_token_is_kept_by_who_holds_it(doors: list[Driver], sandbox: NexusSandbox) -> None:
    held = doors[0].auth(sandbox)
    token = doors[0].access_token(held)
    crowd_out()
    assert doors[0].access_token(held) == doors[0].access_token(doors[0].auth(sandbox)) == token


def test_who_is_not_held_is_forgotten_in_time() -> None:
    forgotten = weakref.ref(credentials_of(CLIENT))
    assert forgotten() is not None
    crowd_out()
    assert forgotten() is None


def test_forget_tokens(doors: list[Driver], sandbox: NexusSandbox) -> None:
    """Every token, failure, count of the quota and Retry-After."""
    driver, client = doors[0], doors[0].client()
    sandbox.limit = 2 * LIMIT

    def call(**options: Any) -> Reply | Exception:
        return outcome(driver.get, client, url(sandbox), auth=driver.auth(sandbox, max_wait=1, **options))

    for number in range(LIMIT):
        assert isinstance(call(client_secret=f"wrong {number}"), TokenRequestError)
    assert isinstance(call(), TokenWaitError)
    forget_tokens()
    for status, error in ((429, TokenWaitError), (400, TokenRequestError)):
        sandbox.fail_token_requests(status=status, retry_after=60, json={"error": "invalid_client"})
        assert [isinstance(call(), error) for _ in range(2)] == [True, True]
        forget_tokens()
    for _ in range(2):
        assert isinstance(call(), Reply)
        forget_tokens()
    assert len(sandbox.token_requests) == LIMIT + 4


@pytest.mark.parametrize("change", [forget_tokens, lambda: credentials_of(replace(CLIENT, client_id="new"))])
def test_what_is_known_of_all_credentials_is_changed_by_one_thread_at_a_time(change: Callable[[], object]) -> None:
    """A weak dictionary raises if another thread adds to it while it is iterated over."""
    with ThreadPoolExecutor(1) as pool:
        with LOCK:
            changes = pool.submit(change)
            assert wait([changes], 0.05).not_done
        changes.result()
