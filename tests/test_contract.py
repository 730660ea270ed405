"""The contract: one list of behaviours, run against every driver over real sockets."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import AsyncHTTPX, Driver, Requests, nowhere

from nexus_auth import NexusAuthError, TokenRequestError, TokenWaitError, forget_tokens, grant
from nexus_auth.testing import NexusSandbox


def url(sandbox: NexusSandbox, path: str = "/customer") -> str:
    return sandbox.environment.base_url + path


def sent_tokens(sandbox: NexusSandbox) -> list[str | None]:
    return [arrival.headers["Authorization"] for arrival in sandbox.requests]


# The token request (RFC 6749 section 4.4.2)


def test_token_request_has_the_four_fields_and_nothing_of_the_client(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox, iso8601=True)
    client.headers["X-Mine"] = "mine"
    client.cookies.set("mine", "mine")
    client.params = {"mine": "mine"}
    assert driver.get(client, "/customer").status == 200
    (arrival,) = sandbox.token_requests
    assert sorted(arrival.form) == [
        ("client_id", sandbox.client_id),
        ("client_secret", sandbox.client_secret),
        ("grant_type", "client_credentials"),
        ("scope", "api1"),
    ]
    assert arrival.headers.get_content_type() == "application/x-www-form-urlencoded"
    assert "mine" not in f"{arrival.path}{arrival.headers}".lower()
    assert not {"authorization", "cookie", "request_iso8601"} & {name.lower() for name in arrival.headers}
    (arrival,) = sandbox.requests
    assert arrival.path == "/customer?mine=mine"
    assert arrival.headers["request_iso8601"] == "true"
    driver.close(client)


def test_scope_is_sent_as_given(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, scope="api1 sanctionlist"))
    assert driver.get(client, url(sandbox)).status == 200
    assert dict(sandbox.token_requests[0].form)["scope"] == "api1 sanctionlist"
    driver.close(client)


# Sharing


def test_a_hundred_calls_cost_one_token_request(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    for _ in range(100):
        assert driver.get(signed, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1
    assert len(set(sent_tokens(sandbox))) == 1


def test_a_new_auth_for_every_call_costs_one_token_request(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client()
    for _ in range(100):
        assert driver.get(client, url(sandbox), auth=driver.auth(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1
    driver.close(client)


def test_different_credentials_never_share(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.clients["other"] = sandbox.client_secret
    auths = [
        driver.auth(sandbox),
        driver.door.NexusAuth("other", sandbox.client_secret, sandbox.environment),
        driver.auth(sandbox, scope="sanctionlist"),
    ]
    client = driver.client()
    for auth in auths * 2:
        assert driver.get(client, url(sandbox), auth=auth).status == 200
    tokens = sent_tokens(sandbox)
    assert len(sandbox.token_requests) == len(set(tokens)) == 3
    assert tokens[:3] == tokens[3:]
    with pytest.raises(TokenRequestError):
        driver.get(client, url(sandbox), auth=driver.auth(sandbox, client_secret="wrong"))
    driver.close(client)


def test_forget_tokens(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    driver.get(signed, url(sandbox))
    forget_tokens()
    driver.get(signed, url(sandbox))
    assert len(sandbox.token_requests) == 2


# Life of a token


def test_a_short_token_is_not_fetched_for_every_call(driver: Driver) -> None:
    with NexusSandbox(expires_in=20) as sandbox:
        client = driver.client(driver.auth(sandbox))
        assert {driver.get(client, url(sandbox)).status for _ in range(20)} == {200}
        assert len(sandbox.token_requests) == 1
        driver.close(client)


ODD: list[Any] = [None, 0, -5, "soon", True, 1e400, [], {}, 0.001, "3600", 10**400]


@pytest.mark.parametrize("expires_in", ODD, ids=lambda value: repr(value)[:9])
def test_an_odd_lifetime_is_no_reason_to_ask_for_every_call(driver: Driver, expires_in: Any) -> None:
    with NexusSandbox(expires_in=expires_in) as sandbox:
        client = driver.client(driver.auth(sandbox))
        assert {driver.get(client, url(sandbox)).status for _ in range(3)} == {200}
        assert len(sandbox.token_requests) == 1
        sandbox.revoke_tokens()
        assert driver.get(client, url(sandbox)).status == 200
        driver.close(client)


def test_a_stale_token_is_renewed_ahead_and_an_expired_one_replaced(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox, leeway=60)
    client = driver.client(auth)
    for age, count in ((0, 1), (3530, 1), (20, 2), (3601, 3)):
        if token := auth._credentials.token:
            token.expires_at -= age
            token.half_life -= age
        assert driver.get(client, url(sandbox)).status == 200
        assert len(sandbox.token_requests) == count
    driver.close(client)


# 401


def test_a_revoked_token_costs_one_renewal(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    driver.get(signed, url(sandbox))
    sandbox.revoke_tokens()
    reply = driver.get(signed, url(sandbox))
    assert (reply.status, reply.history) == (200, [401])
    assert len(sandbox.token_requests) == 2
    assert driver.get(signed, url(sandbox)) == (200, reply.body, [])


CONTENT = b"0123456789" * 20_000
BODIES = ["bytes", "json", "form", "file", "file from the middle", "multipart", "spooled"]


@pytest.fixture
def spooled() -> Iterator[Any]:
    with tempfile.SpooledTemporaryFile(max_size=10) as file:
        file.write(CONTENT)
        file.seek(0)
        yield file


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_is_replayed_whole(
    driver: Driver, sandbox: NexusSandbox, signed: Any, spooled: Any, kind: str
) -> None:
    content = CONTENT
    every: dict[str, dict[str, Any]] = {
        "bytes": {"body": content},
        "json": {"json": {"amount": "12.50", "text": "é"}},
        "form": {"data": {"a": "1", "b": "ü"}},
        "file": {"body": io.BytesIO(content)},
        "file from the middle": {"body": io.BytesIO(b"not this" + content)},
        "multipart": {"files": {"file": ("name", io.BytesIO(content))}, "data": {"a": "1"}},
        "spooled": {"body": spooled},
    }
    options = every[kind]
    if kind == "file from the middle":
        options["body"].seek(len(b"not this"))
        options["headers"] = {"Content-Length": str(len(content))}  # httpx counts from the start
    if isinstance(driver, AsyncHTTPX) and kind in ("file", "file from the middle", "spooled"):
        options["body"] = content  # an AsyncClient takes no file as its content
    if isinstance(driver, Requests) and "data" in options:
        options["body"] = options.pop("data")
    driver.get(signed, url(sandbox))
    sandbox.revoke_tokens()
    reply = driver.send(signed, "POST", url(sandbox), **options)
    assert (reply.status, reply.history) == (200, [401])
    refused, accepted = sandbox.requests[-2:]
    assert accepted.body == refused.body
    assert kind in ("json", "form") or content in accepted.body
    assert len(accepted.body) >= 10


class Pipe(io.RawIOBase):
    """A file that cannot seek."""

    def __init__(self, content: bytes) -> None:
        self.source = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.source.readinto(buffer)


@pytest.mark.parametrize("kind", ["generator", "pipe", "multipart pipe", "closed meanwhile"])
def test_what_cannot_be_sent_again_gives_the_401(driver: Driver, sandbox: NexusSandbox, signed: Any, kind: str) -> None:
    if isinstance(driver, AsyncHTTPX) and kind in ("pipe", "closed meanwhile"):
        kind = "generator"
    options: dict[str, Any] = {"body": driver.generator([b"all ", b"of it"])}
    if kind == "pipe":
        options = {"body": Pipe(b"all of it")}
    elif kind == "multipart pipe" and not isinstance(driver, Requests):
        options = {"files": {"file": Pipe(b"all of it")}}
    elif kind == "closed meanwhile":

        class Once(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                content = super().read(size)
                if not content:
                    self.close()
                return content

        options = {"body": Once(b"all of it")}
    driver.get(signed, url(sandbox))
    sandbox.revoke_tokens()
    reply = driver.send(signed, "POST", url(sandbox), **options)
    assert (reply.status, reply.history) == (401, [])
    assert b"all of it" in sandbox.requests[-1].body
    assert len(sandbox.requests) == 2
    assert len(sandbox.token_requests) == 2  # renewed all the same
    assert driver.get(signed, url(sandbox)) == (200, sandbox_body(driver, sandbox), [])
    sandbox.revoke_tokens()
    assert driver.get(signed, url(sandbox)).status == 200


def sandbox_body(driver: Driver, sandbox: NexusSandbox) -> bytes:
    values = {"method": "GET", "path": "/customer", "body": ""}
    document = {"message": "Successfully processed your request", "errors": None, "values": values}
    return json.dumps(document).encode()


def test_an_api_that_always_says_401(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    sandbox.answer("/forbidden", status=401, times=10_000)
    for _ in range(200):
        assert driver.get(signed, url(sandbox, "/forbidden")).status == 401
        assert driver.get(signed, url(sandbox)).status == 200
    assert len(sandbox.token_requests) <= 10


def test_an_api_that_always_says_401_to_generators(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    sandbox.answer("/forbidden", status=401, times=10_000)
    for _ in range(100):
        assert driver.send(signed, "POST", url(sandbox, "/forbidden"), driver.generator([b"x"])).status == 401
    assert len(sandbox.token_requests) <= 6


def test_renewals_that_help_are_never_put_off(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    for _ in range(10):
        sandbox.revoke_tokens()
        assert driver.get(signed, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 10


# Where the token goes


@pytest.fixture
def stranger() -> Iterator[NexusSandbox]:
    with NexusSandbox() as stranger:
        yield stranger


def test_another_host_gets_no_token(driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, signed: Any) -> None:
    assert driver.get(signed, url(stranger)).status == 401
    assert driver.get(signed, url(sandbox)).status == 200
    assert driver.get(signed, url(stranger)).status == 401
    assert sent_tokens(stranger) == [None, None]
    assert len(sandbox.token_requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirected_elsewhere_no_token_follows(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, signed: Any, status: int
) -> None:
    sandbox.answer("/away", status=status, headers={"Location": url(stranger)})
    assert driver.send(signed, "POST", url(sandbox, "/away"), b"body").status == 401
    assert sent_tokens(stranger) == [None]
    assert len(sandbox.token_requests) == 1


def test_what_a_redirect_made_of_it_can_be_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    """A POST that was answered 303 is a GET without a body, whatever body it had."""
    sandbox.answer("/payment", status=303, headers={"Location": "/payment/1"})
    sandbox.answer("/payment/1", status=401)
    assert driver.send(signed, "POST", url(sandbox, "/payment"), driver.generator([b"once"])).status == 200
    assert [(a.method, a.path) for a in sandbox.requests] == [("POST", "/payment"), *[("GET", "/payment/1")] * 2]


def test_redirected_elsewhere_and_back(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, signed: Any
) -> None:
    sandbox.answer("/away", status=307, headers={"Location": url(stranger, "/back")})
    stranger.answer("/back", status=307, headers={"Location": url(sandbox)})
    assert driver.get(signed, url(sandbox, "/away")).status == 401
    assert sent_tokens(stranger) == [None]
    assert sent_tokens(sandbox)[1] is None
    assert len(sandbox.token_requests) == 1


def test_redirected_within_the_api_and_refused_there(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    sandbox.answer("/payment", status=303, headers={"Location": "/payment/1"})
    sandbox.answer("/payment/1", status=401)
    assert driver.send(signed, "POST", url(sandbox, "/payment"), b"12.50").status == 200
    # What was refused is sent again, not what was already accepted.
    assert [(a.method, a.path) for a in sandbox.requests] == [
        ("POST", "/payment"), ("GET", "/payment/1"), ("GET", "/payment/1"),
    ]  # fmt: skip


# Errors


def test_a_refusal_says_who_refused_what(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, client_secret="wr0ng!"))
    with pytest.raises(driver.library_error) as raised:
        driver.get(client, url(sandbox))
    error: Any = raised.value
    assert {TokenRequestError, NexusAuthError} <= set(type(error).__mro__)
    assert (error.error, error.error_description, error.status_code) == ("invalid_client", None, 400)
    assert error.environment is sandbox.environment
    assert error.request.url == url(sandbox)
    assert str(error).startswith(
        f"token endpoint {sandbox.environment.token_endpoint} (sandbox) refused client 'sandbox-client': "
        "invalid_client (HTTP 400). Check "
    )
    assert "wr0ng" not in f"{error!r}{vars(error)}"
    driver.close(client)


NO_TOKENS = {
    "html": (200, b"<html>"),
    "nothing": (200, b""),
    "bad utf-8": (200, b'{"access_token": "\xff"}'),
    "list": (200, b"[]"),
    "null": (200, b"null"),
    "deep": (200, b"[" * 100_000),
    "no access_token": (200, b'{"token_type": "Bearer"}'),
    "number": (200, b'{"access_token": 1, "token_type": "Bearer"}'),
    "empty": (200, b'{"access_token": "", "token_type": "Bearer"}'),
    "newline": (200, b'{"access_token": "a\\r\\nX: y", "token_type": "Bearer"}'),
    "umlaut": (200, '{"access_token": "ä", "token_type": "Bearer"}'.encode()),
    "mac": (200, b'{"access_token": "a", "token_type": "mac"}'),
    "null type": (200, b'{"access_token": "a", "token_type": null}'),
    "redirect": (302, b'{"access_token": "a", "token_type": "Bearer"}'),
    "bad request": (400, b'{"access_token": "a", "token_type": "Bearer"}'),
    "odd error": (400, b'{"error": 7, "error_description": []}'),
    "error and token": (200, b'{"error": "invalid_scope", "access_token": "a"}'),
}


@pytest.mark.parametrize("name", NO_TOKENS)
def test_an_answer_that_is_no_token(driver: Driver, sandbox: NexusSandbox, signed: Any, name: str) -> None:
    status, body = NO_TOKENS[name]
    sandbox.fail_token_requests(status=status, body=body, headers={"Location": "http://127.0.0.1:9/else"})
    with pytest.raises(driver.library_error) as raised:
        driver.get(signed, url(sandbox))
    assert isinstance(raised.value, TokenRequestError)
    assert raised.value.status_code == status
    assert status != 302 or "http://127.0.0.1:9/else" in str(raised.value)
    assert len(sandbox.token_requests) == 1
    assert sandbox.requests == []


def test_a_refused_connection_is_the_librarys_own_error(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grant, "BACKOFF", 0.01)
    environment = nowhere()
    client = driver.client(driver.door.NexusAuth("id", "s3cret", environment, max_wait=10))
    kind = driver.library.ConnectionError if isinstance(driver, Requests) else driver.library.ConnectError
    for _ in range(2):
        with pytest.raises(kind) as raised:
            driver.get(client, f"{environment.base_url}/customer")
        assert type(raised.value) is kind
        assert environment.token_endpoint in str(raised.value)
        error: Any = raised.value
        assert error.request.url == f"{environment.base_url}/customer"
    driver.close(client)


def test_what_would_take_too_long_is_said_at_once(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, max_wait=5))
    sandbox.fail_token_requests(status=429, retry_after=30)
    with pytest.raises(driver.library_error) as raised:
        driver.get(client, url(sandbox))
    assert isinstance(raised.value, TokenWaitError)
    assert raised.value.retry_after == 30
    assert raised.value.request.url == url(sandbox)  # type: ignore[attr-defined]
    driver.close(client)


# The door


@pytest.mark.parametrize("path", ["/customer", "customer", "/customer?page=2", "//customer"])
def test_relative_urls(driver: Driver, sandbox: NexusSandbox, path: str) -> None:
    client = driver.ready_made(sandbox)
    assert driver.get(client, path).status == 200
    assert driver.get(client, url(sandbox, "/absolute")).status == 200
    assert [arrival.path for arrival in sandbox.requests][1] == "/absolute"
    assert "request_iso8601" not in sandbox.requests[0].headers
    driver.close(client)


def test_the_repr_shows_no_secret(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    assert repr(auth) == "<NexusAuth client_id='sandbox-client' environment='sandbox'>"
    assert (auth.client_id, auth.environment) == (sandbox.client_id, sandbox.environment)


def test_a_lent_client_carries_the_token_requests(driver: Driver, sandbox: NexusSandbox) -> None:
    # A client whose settings lead nowhere is lent, so that only what goes through it can fail.
    environment = nowhere()
    dead = environment.base_url
    options = {"proxies": {"http": dead}} if isinstance(driver, Requests) else {"proxy": dead}
    lent = driver.client(**options)
    name = "session" if isinstance(driver, Requests) else "client"
    client = driver.client(driver.auth(sandbox, max_wait=0.1, **{name: lent}))
    with pytest.raises(NexusAuthError):
        driver.get(client, url(sandbox))
    assert sandbox.token_requests == []
    driver.close(lent)
    driver.close(client)
