"""Errors: their classes, what they carry, and what a person reads in the likeliest mishaps."""

from __future__ import annotations

import logging
import pickle
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import trustme
from conftest import Driver, Log, Sent, nowhere, outcome, url
from server import closed_port

from nexus_auth import (
    PRODUCTION,
    TEST,
    Environment,
    NexusAuthError,
    TokenRequestError,
    TokenWaitError,
    forget_tokens,
    known,
)
from nexus_auth.quota import LIMIT
from nexus_auth.testing import NexusSandbox

pytestmark = pytest.mark.usefixtures("quick_retries")


def called(driver: Driver, sandbox: NexusSandbox, environment: Environment | None = None, **options: Any) -> Any:
    """Return the error of a call to `environment`, by default that of `sandbox`; a client is lent to its auth."""
    environment = environment or sandbox.environment
    auth = driver.auth(sandbox, environment=environment, **{**driver.lend(driver.client()), **options})
    error = outcome(driver.get, driver.client(auth), f"{environment.base_url}/customer")
    assert isinstance(error, Exception)
    return error


def test_classes(driver: Driver) -> None:
    for own, general in (
        (driver.door.TokenRequestError, TokenRequestError),
        (driver.door.TokenWaitError, TokenWaitError),
    ):
        assert issubclass(own, general)
        assert issubclass(own, driver.library_error)
        assert issubclass(general, NexusAuthError)
        assert own.__doc__
    assert not issubclass(TokenWaitError, TokenRequestError)


def test_a_refusal(driver: Driver, sandbox: NexusSandbox) -> None:
    """Its fields are those of RFC 6749 section 5.2."""
    document = {"error": "invalid_client", "error_description": "unknown"}
    sandbox.fail_token_requests(status=401, json=document, headers={"Retry-After": "7"})
    error = called(driver, sandbox)
    assert type(error) is driver.door.TokenRequestError
    assert (error.error, error.error_description, error.status_code) == ("invalid_client", "unknown", 401)
    assert (error.environment, error.retry_after) == (sandbox.environment, 7)


def test_an_answer_that_says_nothing(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.fail_token_requests(4, status=503)
    error = called(driver, sandbox)
    assert type(error) is driver.door.TokenRequestError
    assert (error.error, error.error_description, error.status_code) == (None, None, 503)
    assert (error.environment, error.retry_after) == (sandbox.environment, None)


def test_what_would_take_too_long(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.fail_token_requests(status=429, retry_after=30)
    error = called(driver, sandbox, max_wait=5)
    assert type(error) is driver.door.TokenWaitError
    assert 29 < error.retry_after <= 30
    assert len(sandbox.token_requests) == 1


def test_errors_of_the_library_are_its_own(driver: Driver, sandbox: NexusSandbox) -> None:
    """Those of a connection and timeouts: unwrapped, but with a text that says whose they are."""
    environment = nowhere()
    refused = called(driver, sandbox, environment)
    assert type(refused) is driver.connection_error
    assert f"token endpoint {environment.token_endpoint} (nowhere) could not be reached" in str(refused)
    sandbox.fail_token_requests(None, delay=5)  # until the next call: not all may arrive
    late = called(driver, sandbox, timeout=0.02)
    assert isinstance(late, driver.timeout_error)
    assert not isinstance(late, NexusAuthError)
    forget_tokens()
    sandbox.fail_token_requests(4, drop=True)
    dropped = called(driver, sandbox)
    assert isinstance(dropped, driver.library_error)
    assert type(dropped).__module__.partition(".")[0] == driver.library.__name__


SCRIPTS: dict[str, dict[str, Any]] = {
    "refused": {"status": 400, "json": {"error": "invalid_client"}},
    "unavailable": {"status": 503},
    "busy": {"status": 429, "retry_after": 1000},
    "dropped": {"drop": True},
    "late": {"delay": 5},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_library_is_told_in_its_own_errors(
    doors: list[Driver], sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One library meets the failure, and all are told of it as long as it is remembered."""
    monkeypatch.setattr(known, "FAULT_MEMORY", 60.0)
    monkeypatch.setattr(known, "MAX_FAULT_MEMORY", 60.0)
    monkeypatch.setattr(known, "REFUSAL_MEMORY", 60.0)
    for first in doors:
        forget_tokens()
        sandbox.token_requests.clear()
        sandbox.fail_token_requests(None, **SCRIPTS[name])
        timeout = 0.02 if name == "late" else 10
        errors = [called(driver, sandbox, timeout=timeout) for driver in (first, *doors)]
        tries = {"refused": {1}, "busy": {1}, "late": {1, 2, 3, 4}}  # what is late may not even have arrived
        assert len(sandbox.token_requests) in tries.get(name, {4})
        assert len({id(error) for error in errors}) == len(errors)
        for error, driver in zip(errors, (first, *doors), strict=True):
            own = {"busy": driver.door.TokenWaitError, "late": driver.timeout_error, "dropped": driver.library_error}
            assert isinstance(error, own.get(name, driver.door.TokenRequestError))
            assert sandbox.environment.token_endpoint in str(error)
            assert error.request.url == url(sandbox)
            assert (name in ("dropped", "late")) != isinstance(error, NexusAuthError)


@pytest.mark.parametrize("is_late", [False, True], ids=["another error", "timeout"])
def test_an_error_that_another_library_has_not(
    doors: list[Driver], sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """It is told as the nearest one there: a timeout as a timeout, all else as that of a connection."""
    monkeypatch.setattr(known, "FAULT_MEMORY", 60.0)
    monkeypatch.setattr(known, "MAX_FAULT_MEMORY", 60.0)
    for first in doors:

        def fail(_: Sent, first: Driver = first) -> NoReturn:
            raise (first.timeout_error if is_late else first.library_error)("odd")

        forget_tokens()
        called(first, sandbox, **first.lend(first.client_without_network(fail)))
        for driver in doors:
            error = called(driver, sandbox)
            near = [driver.timeout_error] if is_late else [driver.library_error, driver.connection_error]
            assert type(error) in near
    assert sandbox.token_requests == []


def test_the_request_of_an_error_is_the_callers(driver: Driver, sandbox: NexusSandbox) -> None:
    """That of the token has the secret in it."""
    client = driver.client(driver.auth(sandbox))
    for name in ("refused", "unavailable", "busy", "dropped"):
        forget_tokens()
        sandbox.fail_token_requests(None, **SCRIPTS[name])
        for _ in range(2):
            error: Any = outcome(driver.send, client, "POST", url(sandbox), b"mine")
            assert (error.request.method, error.request.url) == ("POST", url(sandbox))
            assert "client_secret" not in f"{vars(error.request)}"
            assert getattr(error, "response", None) is None


def test_errors_can_be_pickled(driver: Driver, sandbox: NexusSandbox) -> None:
    """As `multiprocessing` and Celery do with them."""
    refusal = called(driver, sandbox, client_secret="wr0ng")
    sandbox.fail_token_requests(status=429, retry_after=1000)
    wait = called(driver, sandbox)
    for error in (refusal, wait):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert "wr0ng" not in pickle.dumps(error).decode("latin-1")
    again = pickle.loads(pickle.dumps(refusal))
    assert (again.error, again.status_code, again.environment) == ("invalid_client", 400, sandbox.environment)
    assert pickle.loads(pickle.dumps(wait)).retry_after == wait.retry_after


def assert_reads(text: object, *fragments: str) -> None:
    """Check that `fragments` stand in a message in this order, and that it is short enough to be read."""
    assert re.search(".*".join(map(re.escape, fragments)), str(text)), f"{fragments} not in {text}"
    assert len(str(text)) < 600
    assert str(text).isprintable()


UNREACHABLE = "could not be reached ("
CHECK_NETWORK = "). Check network, proxy and TLS settings; those of a session= or client= that you lend apply."


def test_message_of_a_wrong_secret(driver: Driver, sandbox: NexusSandbox) -> None:
    error = called(driver, sandbox, client_secret="wr0ng")
    assert str(error).startswith(
        f"token endpoint {sandbox.environment.token_endpoint} (sandbox) refused client 'sandbox-client': invalid_client"
    )
    assert_reads(error, "(HTTP 400). Check client_id, client_secret and scope: are they of this environment?")
    assert "wr0ng" not in f"{error!r}{vars(error)}"


def test_message_of_credentials_of_another_environment(driver: Driver, sandbox: NexusSandbox) -> None:
    urls = {"token_endpoint": sandbox.environment.token_endpoint, "base_url": sandbox.environment.base_url}
    error = called(driver, sandbox, Environment("test", **urls), client_id="of-production", client_secret="s")
    assert_reads(error, f"{urls['token_endpoint']} (test) refused client 'of-production': invalid_client")
    assert_reads(error, "are they of this environment?")


@pytest.mark.parametrize(
    ("environment", "code", "text"),
    [
        (TEST, socket.EAI_AGAIN, "Temporary failure in name resolution"),
        (PRODUCTION, socket.EAI_NONAME, "Name or service not known"),
    ],
    ids=["no network", "no such host"],
)
def test_message_without_a_network(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch,
    environment: Environment, code: int, text: str,
) -> None:  # fmt: skip
    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("localhost", "127.0.0.1"):
            return look_up(host, *arguments, **options)
        raise socket.gaierror(code, text)

    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    error = called(driver, sandbox, environment)
    assert isinstance(error, driver.connection_error)
    assert_reads(error, f"token endpoint {environment.token_endpoint} ({environment.name}) {UNREACHABLE}", text)
    assert_reads(error, CHECK_NETWORK)


def test_message_of_an_identity_server_that_is_down(driver: Driver, sandbox: NexusSandbox) -> None:
    environment = nowhere()
    error = called(driver, sandbox, environment)
    name = driver.connection_error.__name__
    assert_reads(error, f"token endpoint {environment.token_endpoint} (nowhere) {UNREACHABLE}{name}: ", CHECK_NETWORK)


def test_message_of_a_dead_proxy(driver: Driver, sandbox: NexusSandbox) -> None:
    lent = driver.client_through_proxy(f"http://127.0.0.1:{closed_port()}")
    error = called(driver, sandbox, **driver.lend(lent))
    assert isinstance(error, driver.connection_error)
    endpoint = sandbox.environment.token_endpoint
    assert_reads(error, f"token endpoint {endpoint} (sandbox) {UNREACHABLE}", "Error: ", CHECK_NETWORK)
    assert sandbox.token_requests == []


@pytest.fixture(scope="module")
def certified() -> ssl.SSLContext:
    """The TLS context of a server whose authority nobody trusts."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    return context


def test_message_of_a_certificate_that_is_not_trusted(driver: Driver, certified: ssl.SSLContext) -> None:
    with NexusSandbox(ssl_context=certified) as secured:
        error = called(driver, secured)
        endpoint = secured.environment.token_endpoint
        assert_reads(error, f"{endpoint} (sandbox) {UNREACHABLE}", "CERTIFICATE_VERIFY_FAILED", CHECK_NETWORK)


LATER = " s, later than max_wait allows. Try again then."


def test_message_of_a_server_that_is_busy(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.fail_token_requests(status=429, retry_after=1000)
    endpoint = f"token endpoint {sandbox.environment.token_endpoint} (sandbox) "
    busy = "is busy: it takes 60 token requests per minute for this IP address; other processes count too (HTTP 429)"
    assert_reads(called(driver, sandbox), f"{endpoint}{busy}: the next token request may go in 1000.0{LATER}")
    closed = "wants no token request for now (Retry-After): the next token request may go in "
    assert_reads(called(driver, sandbox), f"{endpoint}{closed}", LATER)


def test_message_over_the_quota(doors: list[Driver], sandbox: NexusSandbox) -> None:
    driver = doors[0]
    for number in range(LIMIT):
        called(driver, sandbox, client_id=f"unknown {number}")
    taken = "takes 60 token requests a minute, and they have been made: the next token request may go in "
    error = called(driver, sandbox, max_wait=1)
    assert_reads(error, f"{sandbox.environment.token_endpoint} (sandbox) {taken}", LATER)
    assert len(sandbox.token_requests) == LIMIT


def test_messages_of_odd_answers(driver: Driver, sandbox: NexusSandbox) -> None:
    check = "Check token_endpoint; if it is right, try again later."
    scripts: dict[str, dict[str, Any]] = {
        f"is down (HTTP 503). {check}": {"status": 503, "body": "<html>"},
        f"is down: out_of_order, see you (HTTP 500). {check}":
            {"status": 500, "json": {"error": "out_of_order", "error_description": "see you"}},
        f"redirected to https://else.example/login, which is not followed (HTTP 302). {check}":
            {"status": 302, "headers": {"Location": "https://else.example/login?back=1"}},
        f"gave neither a token nor an OAuth error (HTTP 404). {check}": {"status": 404, "body": "<html>"},
        f"gave no usable access_token (HTTP 200). {check}": {"status": 200, "body": "<html>"},
    }  # fmt: skip
    for message, script in scripts.items():
        forget_tokens()
        sandbox.fail_token_requests(None, **script)
        expected = f"token endpoint {sandbox.environment.token_endpoint} (sandbox) {message}"
        assert str(called(driver, sandbox)) == expected


@pytest.mark.usefixtures("quick_retries")
def test_records_have_fields_for_structured_logs(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "nexus_auth")
    sandbox.fail_token_requests(status=503)
    client = driver.client(driver.auth(sandbox))
    driver.get(client, url(sandbox))
    sandbox.revoke_tokens()
    driver.get(client, url(sandbox))
    driver.get(client, url(stranger))
    records = [vars(record) for record in caplog.records if record.name == "nexus_auth"]
    assert {record["client_id"] for record in records} == {sandbox.client_id}
    endpoint = sandbox.environment.token_endpoint
    assert [record.get("token_endpoint") for record in records] == [endpoint, endpoint, endpoint, endpoint, None]
    assert [record.get("seconds", 0) > 0 for record in records] == [True, True, True, False, False]
    assert (records[-1]["url"], records[-1]["environment"]) == (url(stranger), sandbox.environment.name)


def test_what_the_log_says_of_an_api_that_refuses_the_new_token_too(
    driver: Driver, sandbox: NexusSandbox, log: Log
) -> None:
    """The caller gets an answer and no error, so the log has to tell."""
    sandbox.answer("/customer", status=401, times=2)
    assert driver.get(driver.client(driver.auth(sandbox)), url(sandbox)).status == 401
    (warning,) = (message for level, message in log() if level == "WARNING")
    refused = "the API refuses the new token of client 'sandbox-client' too (401). Check base_url and what it may do."
    assert_reads(warning, sandbox.environment.token_endpoint, refused)


@pytest.mark.parametrize("kind", [TokenRequestError, TokenWaitError])
def test_they_can_be_made_by_hand(kind: Callable[..., NexusAuthError]) -> None:
    """For the tests of users: with a message alone."""
    assert str(kind("message")) == "message"
