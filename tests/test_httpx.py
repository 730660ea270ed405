"""What is peculiar to httpx and httpx2: clients that are lent, their event hooks, streams, proxies and TLS contexts."""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trustme
from conftest import DRIVERS, HTTPX, AsyncHTTPX, closed_port

from nexus_auth import Environment, NexusAuthError, TokenRequestError, forget_tokens, grant
from nexus_auth.testing import NexusSandbox

pytestmark = pytest.mark.parametrize(
    "driver", [driver for driver in DRIVERS if isinstance(driver, HTTPX)], ids=repr, indirect=True
)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grant, "BACKOFF", 0.0)


def url(sandbox: NexusSandbox, path: str = "/customer") -> str:
    return sandbox.environment.base_url + path


def hook(driver: HTTPX, call: Any) -> Any:
    """Return an event hook of the driver's kind."""
    if not isinstance(driver, AsyncHTTPX):
        return call

    async def asynchronous(event: Any) -> None:
        call(event)

    return asynchronous


# The client stays its owner's


def state(client: Any) -> dict[str, Any]:
    """Return all that there is of `client`, to compare it with what becomes of it."""
    own = {
        "headers": client.headers.raw,
        "cookies": dict(client.cookies),
        "hooks": {name: list(hooks) for name, hooks in client.event_hooks.items()},
        "timeout": repr(client.timeout),
        "closed": client.is_closed,
    }
    return {**vars(client), **own, "_headers": None, "_cookies": None, "_event_hooks": None, "_state": None}


def must_not_be_called(_: Any) -> None:
    raise AssertionError


def test_a_lent_client_is_not_changed(driver: HTTPX, sandbox: NexusSandbox) -> None:
    lent = driver.client(
        auth=("mine", "mine"),
        headers={"X-Mine": "mine", "Authorization": "mine"},
        cookies={"mine": "mine"},
        params={"mine": "mine"},
        timeout=0.001,
        event_hooks={"request": [hook(driver, must_not_be_called)], "response": [hook(driver, must_not_be_called)]},
    )
    before = state(lent)
    client = driver.client(driver.auth(sandbox, client=lent))
    cookies = {"Set-Cookie": "theirs=1; Path=/"}
    sandbox.fail_token_requests(status=503, headers=cookies, delay=0.02)  # longer than the timeout of the client
    sandbox.fail_token_requests(body='{"access_token": "t", "token_type": "Bearer"}', status=200, headers=cookies)
    assert driver.get(client, url(sandbox)).status == 200  # renewed: the sandbox does not know that token
    assert len(sandbox.token_requests) == 3
    for arrival in sandbox.token_requests:
        assert "mine" not in f"{arrival.path} {arrival.headers} {arrival.body!r}".lower()
        assert not {"authorization", "cookie"} & {name.lower() for name in arrival.headers}
    assert state(lent) == before
    lent.event_hooks = {}
    lent.timeout = 5
    assert driver.get(lent, url(sandbox)).status == 401  # it works, by an auth of its own
    assert dict(lent.cookies) == {"mine": "mine"}
    driver.close(lent)
    driver.close(client)


def test_a_client_that_is_lent_to_its_own_auth_is_not_changed(driver: HTTPX, sandbox: NexusSandbox) -> None:
    seen: list[str] = []
    hooks = {name: [hook(driver, lambda event: seen.append(str(event.url)))] for name in ("request", "response")}
    client = driver.ready_made(sandbox, event_hooks=hooks)
    before = state(client)
    sandbox.fail_token_requests(status=302, headers={"Location": "/else", "Set-Cookie": "theirs=1; Path=/"})
    with pytest.raises(TokenRequestError):
        driver.get(client, "/customer")
    forget_tokens()
    assert driver.get(client, "/customer").status == 200
    assert state(client) == before
    assert seen == [url(sandbox)] * 2
    assert [arrival.path for arrival in sandbox.requests] == ["/customer"]
    assert "Cookie" not in sandbox.requests[0].headers
    driver.close(client)
    assert client.is_closed


def test_a_lent_client_that_is_closed_is_not_opened_again(driver: HTTPX, sandbox: NexusSandbox) -> None:
    lent = driver.client()
    driver.close(lent)
    client = driver.client(driver.auth(sandbox, client=lent))
    with pytest.raises(RuntimeError, match="closed"):
        driver.get(client, url(sandbox))
    assert lent.is_closed
    driver.close(client)


def test_an_auth_of_its_own_is_left_alone(driver: HTTPX, sandbox: NexusSandbox) -> None:
    # The client is asked with another auth than that it is lent to.
    client = driver.client(("user", "password"))
    assert driver.get(client, url(sandbox), auth=driver.auth(sandbox, client=client)).status == 200
    assert driver.get(client, url(sandbox)).status == 401
    assert sandbox.requests[1].headers["Authorization"].startswith("Basic ")
    driver.close(client)


def test_mounts_and_transports_of_a_lent_client(driver: HTTPX, sandbox: NexusSandbox) -> None:
    library = driver.library
    carried: list[Any] = []

    def carry(request: Any) -> Any:
        carried.append((str(request.url), request.extensions["timeout"]))
        return library.Response(200, json={"access_token": "t", "token_type": "Bearer"})

    for options in (
        {"mounts": {"https://": library.MockTransport(carry)}},
        {"transport": library.MockTransport(carry)},
    ):
        environment = Environment("far", token_endpoint="https://identity.invalid/token", base_url=url(sandbox, ""))
        lent = driver.client(**options)
        client = driver.client(driver.auth(sandbox, environment=environment, client=lent, timeout=7, max_wait=5))
        assert driver.get(client, url(sandbox)).status == 401
        address, timeout = carried[0]
        assert address == environment.token_endpoint
        assert timeout.keys() == {"connect", "read", "write", "pool"}
        assert all(4 < seconds <= 5 for seconds in timeout.values())
        carried.clear()
        forget_tokens()
        driver.close(lent)
        driver.close(client)


@pytest.mark.parametrize("lent", [False, True])
def test_proxies(driver: HTTPX, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, lent: bool) -> None:
    # The sandbox plays the proxy: what reaches it names a host that does not exist.
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    environment = Environment("far", token_endpoint="https://identity.invalid/token", base_url=url(sandbox, ""))
    carrier = None
    if lent:
        carrier = driver.client(proxy=url(sandbox, ""))
        auth = driver.auth(sandbox, environment=environment, client=carrier)
    else:
        monkeypatch.setenv("https_proxy", url(sandbox, ""))
        auth = driver.auth(sandbox, environment=environment)
    client = driver.client(auth, trust_env=False)
    monkeypatch.setattr(grant, "TRIES", 1)  # each of which reads the trust store anew, if nothing is lent
    with pytest.raises(driver.library.ProxyError) as raised:
        driver.get(client, url(sandbox))
    assert {(arrival.method, arrival.path) for arrival in sandbox.requests} == {("CONNECT", "identity.invalid:443")}
    assert "proxy" in str(raised.value)
    if carrier:
        driver.close(carrier)
    driver.close(client)


def test_a_dead_proxy_is_an_error_of_the_library(driver: HTTPX, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox, proxy=f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(driver.library.ConnectError) as raised:
        driver.get(client, "/customer")
    assert "Check network, proxy and TLS settings" in str(raised.value)
    assert sandbox.token_requests == []
    driver.close(client)


def test_the_timeout_of_a_ready_made_client_holds_for_token_requests(driver: HTTPX, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox, timeout=0.02)
    sandbox.fail_token_requests(4, delay=1)
    with pytest.raises(driver.library.ReadTimeout):
        driver.get(client, "/customer")
    driver.close(client)


# Event hooks, streams and history


def test_event_hooks_see_the_api_alone(driver: HTTPX, sandbox: NexusSandbox) -> None:
    seen: list[Any] = []
    hooks = {
        "request": [hook(driver, lambda request: seen.append(str(request.url)))],
        "response": [hook(driver, lambda response: seen.append(response.status_code))],
    }
    client = driver.ready_made(sandbox, event_hooks=hooks)
    driver.get(client, "/customer")
    sandbox.revoke_tokens()
    assert driver.get(client, "/customer").history == [401]
    assert seen == [url(sandbox), 200, url(sandbox), 401, url(sandbox), 200]
    driver.close(client)


def test_raise_for_status_hooks(driver: HTTPX, sandbox: NexusSandbox) -> None:
    raising = hook(driver, lambda response: response.raise_for_status())
    client = driver.ready_made(sandbox, event_hooks={"response": [raising]})
    assert driver.get(client, "/customer").status == 200
    for status in (400, 401, 404, 503):
        sandbox.answer("/odd", status=status)
        with pytest.raises(driver.library.HTTPStatusError) as raised:
            driver.get(client, "/odd")
        assert raised.value.response.status_code == status
    assert driver.get(client, "/customer").status == 200
    driver.close(client)


@pytest.mark.parametrize("revoked", [False, True])
def test_streams(driver: HTTPX, sandbox: NexusSandbox, revoked: bool) -> None:
    client = driver.ready_made(sandbox)
    whole = driver.get(client, "/customer").body
    if revoked:
        sandbox.revoke_tokens()

    def blocking() -> tuple[bool, bytes]:
        with client.stream("GET", "/customer") as response:
            assert response.status_code == 200
            return response.is_stream_consumed, b"".join(response.iter_bytes(7))

    async def asynchronous() -> tuple[bool, bytes]:
        async with client.stream("GET", "/customer") as response:
            assert response.status_code == 200
            return response.is_stream_consumed, b"".join([chunk async for chunk in response.aiter_bytes(7)])

    answer = driver.portal.call(asynchronous) if isinstance(driver, AsyncHTTPX) else blocking()
    assert answer == (False, whole)
    driver.close(client)


def test_one_connection_is_enough(driver: HTTPX, sandbox: NexusSandbox) -> None:
    """That of a 401 is free before a token is asked for through the same client."""
    client = driver.ready_made(sandbox, limits=driver.library.Limits(max_connections=1), timeout=2)
    driver.get(client, "/customer")
    sandbox.revoke_tokens()
    assert driver.get(client, "/customer").status == 200
    driver.close(client)


def test_cookies_of_a_mended_call_are_kept(driver: HTTPX, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    sandbox.answer("/customer", status=401, headers={"Set-Cookie": "refused=1; Path=/"})
    sandbox.answer("/customer", headers={"Set-Cookie": "accepted=1; Path=/"})
    assert driver.get(client, "/customer").status == 200
    assert dict(client.cookies) == {"refused": "1", "accepted": "1"}
    assert "Cookie" not in sandbox.token_requests[1].headers
    driver.close(client)


def test_the_callers_request_and_response(driver: HTTPX, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox, headers={"X-Mine": "mine"})
    sandbox.answer("/customer", status=401)
    reply = driver.send(client, "POST", "/customer", b"mine")
    assert (reply.status, reply.history) == (200, [401])
    assert [(arrival.method, arrival.body, arrival.headers["X-Mine"]) for arrival in sandbox.requests] == [
        ("POST", b"mine", "mine"), ("POST", b"mine", "mine"),
    ]  # fmt: skip
    driver.close(client)


def test_one_auth_in_many_clients_of_many_threads(driver: HTTPX, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)

    def calls(_: int) -> list[int]:
        client = driver.client(auth)
        try:
            return [driver.get(client, url(sandbox)).status for _ in range(5)]
        finally:
            driver.close(client)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(calls, range(8))) == [[200] * 5] * 8
    assert len(sandbox.token_requests) == 1


def test_addresses_that_only_look_absolute(driver: HTTPX, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    for address in ("//evil.example/x", "@evil.example/x", "/https://evil.example", "\\\\evil.example",
                    ".evil.example/x", "?https://evil.example"):  # fmt: skip
        assert driver.get(client, address).status == 200, address
    assert all(str(arrival.headers["Authorization"]).startswith("Bearer ") for arrival in sandbox.requests)
    driver.close(client)


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture
def secured(authority: trustme.CA) -> Iterator[NexusSandbox]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with NexusSandbox(ssl_context=context) as secured:
        yield secured


def test_a_private_authority_is_enough_for_both_hosts(
    driver: HTTPX, secured: NexusSandbox, trusting: ssl.SSLContext
) -> None:
    assert secured.environment.token_endpoint.startswith("https://")
    client = driver.ready_made(secured, verify=trusting)
    assert driver.get(client, "/customer").status == 200
    driver.close(client)
    forget_tokens()
    lent, client = driver.client(verify=trusting), driver.client(verify=trusting)
    client.auth = driver.auth(secured, client=lent)
    assert driver.get(client, url(secured)).status == 200
    driver.close(lent)
    driver.close(client)
    assert len(secured.token_requests) == 2


def test_without_it_the_certificate_is_refused(driver: HTTPX, secured: NexusSandbox, trusting: ssl.SSLContext) -> None:
    lent = driver.client()  # trusts nobody
    client = driver.client(driver.auth(secured, client=lent), verify=trusting)
    with pytest.raises(driver.library.ConnectError, match="CERTIFICATE_VERIFY_FAILED") as raised:
        driver.get(client, url(secured))
    assert not isinstance(raised.value, NexusAuthError)
    assert f"{secured.environment.token_endpoint} (sandbox)" in str(raised.value)
    assert secured.token_requests == secured.requests == []
    driver.close(lent)
    driver.close(client)


def test_by_default_the_certificate_is_refused(
    driver: HTTPX, secured: NexusSandbox, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grant, "TRIES", 1)
    client = driver.client(driver.auth(secured, max_wait=5), verify=trusting)
    with pytest.raises(driver.library.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        driver.get(client, url(secured))
    assert secured.token_requests == secured.requests == []
    driver.close(client)


def test_a_client_certificate_is_shown_to_both_hosts(driver: HTTPX, authority: trustme.CA) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(shown)
    authority.issue_cert("client@example.org").configure_cert(shown)
    with NexusSandbox(ssl_context=context) as secured:
        client = driver.ready_made(secured, verify=shown)
        assert driver.get(client, "/customer").status == 200
        driver.close(client)


def test_verify_false_is_its_owners_choice(driver: HTTPX, secured: NexusSandbox) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = driver.ready_made(secured, verify=False)
    assert driver.get(client, "/customer").status == 200
    driver.close(client)
