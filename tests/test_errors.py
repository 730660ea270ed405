"""Errors: their classes, what they carry, and what a person reads in the likeliest mishaps."""

from __future__ import annotations

import logging
import pickle
import re
import socket
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from conftest import Driver, Sent, known_credentials, nowhere, outcome, url
from server import closed_port

import nexus_auth
from nexus_auth import TEST, Environment, NexusAuthError, TokenRequestError, TokenWaitError, forget_tokens, known
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def long_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember failures for as long as a test takes."""
    for name in ("FAULT_MEMORY", "MAX_FAULT_MEMORY", "REFUSAL_MEMORY"):
        monkeypatch.setattr(known, name, 60.0)


def called(driver: Driver, sandbox: NexusSandbox, environment: Environment | None = None, **options: Any) -> Any:
    """Return the error of a call to `environment`, by default that of `sandbox`; a client is lent to its auth."""
    environment = environment or sandbox.environment
    auth = driver.auth(sandbox, environment=environment, **{**driver.lend(driver.client()), **options})
    error = outcome(driver.get, driver.client(auth), f"{environment.base_url}/customer")
    assert isinstance(error, Exception)
    return error


# Their classes


@pytest.mark.parametrize("name", ["TokenRequestError", "TokenWaitError"])
def test_classes(driver: Driver, name: str) -> None:
    own, general = getattr(driver.door, name), getattr(nexus_auth, name)
    assert issubclass(own, general)
    assert issubclass(own, driver.library_error)
    assert own.__doc__
    assert general.__base__ is NexusAuthError


@pytest.mark.parametrize("kind", [TokenRequestError, TokenWaitError])
def test_they_can_be_made_by_hand(kind: Callable[..., NexusAuthError]) -> None:
    """For the tests of users: with a message alone."""
    assert str(kind("message")) == "message"


SCRIPTS: dict[str, dict[str, Any]] = {
    "token_request_error": {"status": 503},
    "token_wait_error": {"status": 429, "retry_after": 1000},
    "library_error": {"drop": True},
}


@pytest.mark.usefixtures("long_memory")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_each_library_is_told_in_its_own_errors(doors: list[Driver], sandbox: NexusSandbox, kind: str) -> None:
    """One library meets the failure, and all are told of it as long as it is remembered."""
    sandbox.fail_token_requests(None, **SCRIPTS[kind])
    for count, first in enumerate(doors, 1):
        forget_tokens()
        those = [first, *doors]
        errors = [called(driver, sandbox) for driver in those]
        assert len(sandbox.token_requests) == count * (1 if kind == "token_wait_error" else 4)
        assert len({id(error) for error in errors}) == len(errors)
        for error, driver in zip(errors, those, strict=True):
            assert isinstance(error, getattr(driver.door.NexusAuth, f"_{kind}"))
            assert isinstance(error, NexusAuthError) == (kind != "library_error")
            assert sandbox.environment.token_endpoint in str(error)
            # The caller's request: that of the token has the secret in it.
            assert (error.request.method, error.request.url) == ("GET", url(sandbox))
            assert getattr(error, "response", None) is None


@pytest.mark.usefixtures("long_memory")
@pytest.mark.parametrize("is_late", [False, True], ids=["another error", "timeout"])
def test_an_error_that_another_library_has_not(doors: list[Driver], sandbox: NexusSandbox, is_late: bool) -> None:
    """It is told as the nearest one there: a timeout as a timeout, all else as that of a connection."""
    for first in doors:
        kind = first.timeout_error if is_late else first.library_error

        def fail(_: Sent, kind: type[Exception] = kind) -> NoReturn:
            raise kind("odd")

        forget_tokens()
        assert type(called(first, sandbox, **first.lend(first.client_without_network(fail)))) is kind
        for driver in doors:
            near = [driver.timeout_error] if is_late else [driver.library_error, driver.connection_error]
            assert type(called(driver, sandbox)) in near
    assert sandbox.token_requests == []


def test_errors_can_be_pickled(driver: Driver, sandbox: NexusSandbox) -> None:
    """As `multiprocessing` and Celery do with them."""
    refusal = called(driver, sandbox, client_secret="wr0ng")
    sandbox.fail_token_requests(status=429, retry_after=1000)
    wait = called(driver, sandbox)
    for error in (refusal, wait):
        pickled = pickle.dumps(error)
        again = pickle.loads(pickled)
        assert b"wr0ng" not in pickled
        for name in ("__class__", "args", "error", "status_code", "environment", "retry_after"):
            assert getattr(again, name, None) == getattr(error, name, None)


# What they carry


def test_a_refusal_carries_the_fields_of_its_answer(doors: list[Driver], sandbox: NexusSandbox) -> None:
    """Those of RFC 6749 section 5.2, and what comes with it; nothing where the answer says nothing."""
    says_all: dict[str, Any] = {"status": 401, "retry_after": 7, "json": {"error": "odd", "error_description": "why"}}
    says_nothing: dict[str, Any] = {"status": 404}
    for answer, fields in ((says_all, ("odd", "why", 401, 7)), (says_nothing, (None, None, 404, None))):
        forget_tokens()
        sandbox.fail_token_requests(**answer)
        error = called(doors[0], sandbox)
        assert (error.error, error.error_description, error.status_code, error.retry_after) == fields
        assert error.environment is sandbox.environment


# What a person reads


LATER = " s, later than max_wait allows. Try again then."
CHECK_NETWORK = "). Check network, proxy and TLS settings; those of a session= or client= that you lend apply."


def test_message_of_a_refusal(doors: list[Driver], sandbox: NexusSandbox) -> None:
    sandbox.fail_token_requests(status=400, json={"error": "invalid_client"})
    assert str(called(doors[0], sandbox, replace(sandbox.environment, name="test"), client_id="of-production")) == (
        f"token endpoint {sandbox.environment.token_endpoint} (test) refused client 'of-production': invalid_client "
        "(HTTP 400). Check client_id, client_secret and scope: are they of this environment?"
    )


def test_messages_of_a_wait(doors: list[Driver], sandbox: NexusSandbox) -> None:
    def message(environment: Environment, **options: Any) -> str:
        error = called(doors[0], sandbox, environment, **options)
        assert isinstance(error, TokenWaitError)
        assert str(error).endswith(LATER)
        return str(error).removesuffix(LATER)

    endpoint = f"token endpoint {sandbox.environment.token_endpoint} (sandbox)"
    sandbox.fail_token_requests(status=429, retry_after=1000)
    busy = "is busy: it takes 60 token requests per minute for this IP address; other processes count too (HTTP 429)"
    assert message(sandbox.environment) == f"{endpoint} {busy}: the next token request may go in 1000.0"
    others = "it takes 60 token requests per minute for this IP address; other processes count too"
    closed = f"wants no token request for now (Retry-After); {others}"
    assert message(sandbox.environment).startswith(f"{endpoint} {closed}: the next token request may go in ")
    away = nowhere()  # where the first try is the last that max_wait has time for
    error = called(doors[0], sandbox, away, max_wait=0)
    assert isinstance(error, TokenWaitError)
    assert str(error).startswith(f"token endpoint {away.token_endpoint} (nowhere) could not be reached (")
    assert str(error).endswith(f" s, later than max_wait allows{CHECK_NETWORK[1:]}")


def test_messages_of_an_endpoint_that_cannot_be_reached(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the library's own, with a text that says whose it is."""

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("localhost", "127.0.0.1"):
            return look_up(host, *arguments, **options)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    behind_a_dead_proxy = driver.lend(driver.client_through_proxy(f"http://127.0.0.1:{closed_port()}"))
    mishaps: list[tuple[Environment, dict[str, Any], str]] = [
        (nowhere(), {}, f"{driver.connection_error.__name__}: "),
        (TEST, {}, "Temporary failure in name resolution"),
        (sandbox.environment, behind_a_dead_proxy, "Error: "),
    ]
    for environment, options, text in mishaps:
        error = called(driver, sandbox, environment, **options)
        assert isinstance(error, driver.connection_error)
        start = f"token endpoint {environment.token_endpoint} ({environment.name}) could not be reached ("
        assert str(error).startswith(start)
        assert text in str(error)
        assert str(error).endswith(CHECK_NETWORK)
        assert len(str(error)) < 600
    assert sandbox.token_requests == []


def test_a_failure_that_is_remembered_says_how_old_it_is(driver: Driver, sandbox: NexusSandbox) -> None:
    """It may have been met by another client, with other proxies."""
    sandbox.clients.clear()
    assert " ago" not in str(called(driver, sandbox))
    credentials = known_credentials(sandbox.environment, sandbox.client_id, sandbox.client_secret)
    assert credentials.known.failure
    older = replace(credentials.known.failure, met_at=credentials.clock() - 3, memory=100.0)
    credentials.known = replace(credentials.known, failure=older)
    assert re.search(r"\(HTTP 400\), [3-9] s ago. Check client_id", str(called(driver, sandbox)))


def test_a_timeout_says_nothing_of_the_insides_of_others(driver: Driver, sandbox: NexusSandbox) -> None:
    """Such as an address in memory, by which error trackers could not group it."""
    sandbox.fail_token_requests(delay=5)
    message = str(called(driver, sandbox, timeout=0.2, max_wait=0))
    assert "imeout" in message
    assert "scope" not in message


# What the log tells


def test_the_record_of_a_call_to_another_host_has_fields(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """For structured logs; those of the way to a token are proved where that is."""
    caplog.set_level(logging.DEBUG, "nexus_auth")
    driver.get(driver.client(driver.auth(sandbox)), url(stranger))
    (record,) = [vars(record) for record in caplog.records if record.name == "nexus_auth"]
    fields = {"client_id": sandbox.client_id, "environment": sandbox.environment.name, "url": url(stranger)}
    assert fields.items() <= record.items()
