"""What is peculiar to requests: sessions, their hooks and adapters, netrc, and TLS settings that are attributes."""

from __future__ import annotations

import pickle
import ssl
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from conftest import closed_port
from requests.adapters import HTTPAdapter

from nexus_auth import Environment, NexusAuthError, TokenRequestError, forget_tokens, grant
from nexus_auth.requests import NexusAuth, nexus_session
from nexus_auth.testing import NexusSandbox


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grant, "BACKOFF", 0.0)


@pytest.fixture
def session(sandbox: NexusSandbox) -> Iterator[requests.Session]:
    with ready_made(sandbox) as session:
        yield session


def ready_made(sandbox: NexusSandbox, **options: Any) -> requests.Session:
    return nexus_session(sandbox.client_id, sandbox.client_secret, sandbox.environment, **options)


def auth_of(sandbox: NexusSandbox, **options: Any) -> NexusAuth:
    return NexusAuth(sandbox.client_id, sandbox.client_secret, sandbox.environment, **options)


def url(sandbox: NexusSandbox, path: str = "/customer") -> str:
    return sandbox.environment.base_url + path


def authorizations(sandbox: NexusSandbox) -> list[str]:
    return [str(arrival.headers["Authorization"]).partition(" ")[0] for arrival in sandbox.requests]


# netrc


@pytest.fixture(params=["NETRC", "HOME"])
def netrc(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an entry for every host in ~/.netrc, or in the file that NETRC names."""
    path = tmp_path / ".netrc"
    path.write_text("machine 127.0.0.1 login user password from-netrc\ndefault login user password from-netrc\n")
    path.chmod(0o600)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv(request.param, str(path if request.param == "NETRC" else tmp_path))
    assert requests.utils.get_netrc_auth("http://127.0.0.1:1/") == ("user", "from-netrc")


@pytest.mark.usefixtures("netrc")
def test_netrc_never_replaces_the_token(sandbox: NexusSandbox, session: requests.Session) -> None:
    for status in (301, 302, 303, 307, 308):
        sandbox.answer("/old", status=status, headers={"Location": "/older"})
        sandbox.answer("/older", status=status, headers={"Location": url(sandbox)})
        assert session.get("/old").status_code == 200
    assert set(authorizations(sandbox)) == {"Bearer"}
    assert "Authorization" not in sandbox.token_requests[0].headers
    assert len(sandbox.token_requests) == 1


@pytest.mark.usefixtures("netrc")
def test_netrc_and_a_401_after_a_redirect(sandbox: NexusSandbox, session: requests.Session) -> None:
    session.get("/customer")
    sandbox.revoke_tokens()
    sandbox.answer("/old", status=307, headers={"Location": url(sandbox)})
    assert session.get("/old").status_code == 200
    assert set(authorizations(sandbox)) == {"Bearer"}
    assert len(sandbox.token_requests) == 2


@pytest.mark.usefixtures("netrc")
def test_netrc_serves_other_hosts_as_it_always_does(sandbox: NexusSandbox, session: requests.Session) -> None:
    with NexusSandbox() as stranger:
        sandbox.answer("/away", status=302, headers={"Location": url(stranger)})
        assert session.get("/away").status_code == 401
        assert authorizations(stranger) == ["Basic"]


def test_no_header_of_a_strangers_goes_to_the_api(sandbox: NexusSandbox, session: requests.Session) -> None:
    with NexusSandbox() as stranger:
        mine: list[dict[str, Any]] = [
            {"headers": {"Authorization": "Custom for-the-stranger"}}, {"auth": ("for-the", "stranger")},
        ]  # fmt: skip
        for options in mine:
            stranger.answer("/away", status=302, headers={"Location": url(sandbox)})
            session.get(url(stranger, "/away"), **options)
        assert authorizations(stranger) == ["Custom", "Basic"]
        assert [arrival.headers["Authorization"] for arrival in sandbox.requests] == [None, None]


# The session stays its owner's


def hook_that_must_not_be_called(*_: Any, **__: Any) -> None:
    raise AssertionError


def state(session: requests.Session) -> dict[str, Any]:
    """Return all that there is of `session`, to compare it with what becomes of it."""
    own = {"headers": dict(session.headers), "cookies": session.cookies.get_dict(), "hooks": repr(session.hooks)}
    return {**vars(session), **own}


def test_a_lent_session_is_not_changed(sandbox: NexusSandbox) -> None:
    class Lent(requests.Session):
        closed = False

        def close(self) -> None:
            self.closed = True
            super().close()

    with Lent() as lent, requests.Session() as session:
        lent.auth = ("mine", "mine")
        lent.headers.update({"X-Mine": "mine", "Authorization": "mine"})
        lent.cookies.set("mine", "mine")
        lent.params = {"mine": "mine"}
        lent.hooks["response"].append(hook_that_must_not_be_called)
        before = state(lent)
        session.auth = auth_of(sandbox, session=lent)
        cookies = {"Set-Cookie": "theirs=1; Path=/"}
        sandbox.fail_token_requests(status=503, headers=cookies)
        sandbox.fail_token_requests(body='{"access_token": "t", "token_type": "Bearer"}', status=200, headers=cookies)
        assert session.get(url(sandbox)).status_code == 200  # renewed: the sandbox does not know that token
        assert len(sandbox.token_requests) == 3
        for arrival in sandbox.token_requests:
            assert "mine" not in f"{arrival.path} {arrival.headers} {arrival.body!r}".lower()
            assert not {"authorization", "cookie"} & {name.lower() for name in arrival.headers}
        assert state(lent) == before
        assert not lent.closed
        lent.hooks["response"].clear()
        assert lent.get(url(sandbox)).status_code == 401  # it works, by an auth of its own
        assert lent.cookies.get_dict() == {"mine": "mine"}


def test_a_session_that_is_lent_to_its_own_auth_is_not_changed(sandbox: NexusSandbox) -> None:
    seen = []
    with requests.Session() as session:
        session.auth = auth_of(sandbox, session=session)
        session.hooks["response"].append(lambda response, **_: seen.append(response.url))
        before = state(session)
        sandbox.fail_token_requests(status=302, headers={"Location": "/else", "Set-Cookie": "theirs=1; Path=/"})
        with pytest.raises(TokenRequestError):
            session.get(url(sandbox))
        forget_tokens()
        assert session.get(url(sandbox)).status_code == 200
        assert state(session) == before
    assert seen == [url(sandbox)]
    assert [arrival.path for arrival in sandbox.requests] == ["/customer"]
    assert "Cookie" not in sandbox.requests[0].headers


def test_a_mounted_adapter_carries_the_token_requests(sandbox: NexusSandbox) -> None:
    class Adapter(HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
            carried.append((str(request.url), options["timeout"]))
            return super().send(request, *arguments, **options)

    carried: list[tuple[str, Any]] = []
    with requests.Session() as lent, requests.Session() as session:
        lent.mount(sandbox.environment.token_endpoint, Adapter())
        session.auth = auth_of(sandbox, session=lent, timeout=7)
        assert session.get(url(sandbox)).status_code == 200
    assert carried == [(sandbox.environment.token_endpoint, 7)]


@pytest.mark.parametrize("lent", [False, True])
def test_proxies(sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, lent: bool) -> None:
    # The sandbox plays the proxy: what reaches it names a host that does not exist.
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    environment = Environment("far", token_endpoint="https://identity.invalid/connect/token", base_url=url(sandbox, ""))
    with requests.Session() as session:
        session.auth = NexusAuth("id", "secret", environment, session=session if lent else None)
        if lent:
            session.proxies = {"https": url(sandbox, ""), "http": ""}
        else:
            monkeypatch.setenv("https_proxy", url(sandbox, ""))
        with pytest.raises(requests.exceptions.ProxyError) as raised:
            session.get(url(sandbox))
    assert [(arrival.method, arrival.path) for arrival in sandbox.requests] == [("CONNECT", "identity.invalid:443")] * 4
    assert "proxy" in str(raised.value)


def test_a_dead_proxy_is_named(sandbox: NexusSandbox) -> None:
    with requests.Session() as lent, requests.Session() as session:
        lent.proxies = {"http": f"http://127.0.0.1:{closed_port()}"}
        session.auth = auth_of(sandbox, session=lent)
        with pytest.raises(requests.exceptions.ProxyError) as raised:
            session.get(url(sandbox))
    assert "Check network, proxy and TLS settings" in str(raised.value)
    assert sandbox.token_requests == []


# Hooks, streams and history


def test_hooks_see_the_answer_that_the_caller_gets(sandbox: NexusSandbox, session: requests.Session) -> None:
    seen: list[Any] = []
    session.hooks["response"].append(lambda response, **_: seen.append((response.status_code, len(response.history))))
    session.get("/customer")
    sandbox.revoke_tokens()
    response = session.get("/customer", hooks={"response": lambda response, **_: seen.append("its own")})
    assert seen == [(200, 0), "its own"]  # a call's own hook takes the place of the session's, as it always does
    assert [refused.status_code for refused in response.history] == [401]
    assert [refused.url for refused in response.history] == [url(sandbox)]


def answer_of(error: requests.HTTPError) -> requests.Response:
    assert error.response is not None
    return error.response


def test_raise_for_status_hooks(sandbox: NexusSandbox, session: requests.Session) -> None:
    session.hooks["response"] = [lambda response, **_: response.raise_for_status()]
    session.get("/customer")
    sandbox.revoke_tokens()
    assert session.get("/customer").status_code == 200
    for status in (400, 404, 503):
        sandbox.answer("/odd", status=status)
        with pytest.raises(requests.HTTPError) as raised:
            session.get("/odd")
        with answer_of(raised.value) as response:
            assert response.status_code == status
    sandbox.answer("/odd", status=401, times=2)
    with pytest.raises(requests.HTTPError, match="401") as raised:
        session.get("/odd")
    answer_of(raised.value).close()


@pytest.mark.parametrize("revoked", [False, True])
def test_streams(sandbox: NexusSandbox, session: requests.Session, revoked: bool) -> None:
    session.get("/customer")
    if revoked:
        sandbox.revoke_tokens()
    with session.get("/customer", stream=True) as response:
        assert response.status_code == 200
        assert response._content_consumed is False
        assert b"".join(response.iter_content(7)) == session.get("/customer").content
    with session.get("/customer", stream=True) as response:
        assert response.raw.read(2) == b'{"'


def test_timeouts_and_verify_hold_for_what_is_sent_again(sandbox: NexusSandbox, session: requests.Session) -> None:
    session.get("/customer")
    sandbox.revoke_tokens()
    sandbox.answer("/slow", status=401)
    sandbox.answer("/slow", delay=1)
    with pytest.raises(requests.ReadTimeout):
        session.get("/slow", timeout=0.05)


def test_a_prepared_request_can_be_sent_again_and_again(sandbox: NexusSandbox, session: requests.Session) -> None:
    prepared = session.prepare_request(requests.Request("POST", "/payment", json={"amount": 1}))
    for _ in range(3):
        sandbox.revoke_tokens()
        assert session.get("/customer").status_code == 200
        assert session.send(prepared).status_code == 200
    assert {arrival.body for arrival in sandbox.requests if arrival.method == "POST"} == {prepared.body}


def test_one_connection_is_enough(sandbox: NexusSandbox, session: requests.Session) -> None:
    """That of a 401 is free before a token is asked for through the same session, and before the call is sent again."""
    session.mount("http://", HTTPAdapter(pool_maxsize=1, pool_block=True))
    session.get("/customer")
    sandbox.revoke_tokens()
    assert session.get("/customer", stream=True).status_code == 200


def test_cookies_of_a_mended_call_are_kept(sandbox: NexusSandbox, session: requests.Session) -> None:
    sandbox.answer("/customer", status=401, headers={"Set-Cookie": "refused=1; Path=/"})
    sandbox.answer("/customer", headers={"Set-Cookie": "accepted=1; Path=/"})
    assert session.get("/customer").status_code == 200
    assert session.cookies.get_dict() == {"refused": "1", "accepted": "1"}
    assert "Cookie" not in sandbox.token_requests[1].headers


def test_one_auth_in_many_sessions_of_many_threads(sandbox: NexusSandbox) -> None:
    auth = auth_of(sandbox)
    together = threading.Barrier(8)

    def calls(_: int) -> list[int]:
        with requests.Session() as session:
            session.auth = auth
            together.wait()
            return [session.get(url(sandbox)).status_code for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(calls, range(8))) == [[200] * 5] * 8
    assert len(sandbox.token_requests) == 1


def test_addresses_that_only_look_absolute(sandbox: NexusSandbox, session: requests.Session) -> None:
    for address in ("//evil.example/x", "@evil.example/x", "/https://evil.example", ":443@evil.example",
                    "\\\\evil.example", ".evil.example/x", "https:evil.example", "https:/evil.example",
                    "?https://evil.example"):  # fmt: skip
        assert session.get(address).status_code == 200
    assert session.get(b"/customer").status_code == 200
    assert set(authorizations(sandbox)) == {"Bearer"}


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secured(authority: trustme.CA) -> Iterator[NexusSandbox]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with NexusSandbox(ssl_context=context) as secured:
        yield secured


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def test_a_private_authority_is_enough_for_both_hosts(secured: NexusSandbox, bundle: str) -> None:
    assert secured.environment.token_endpoint.startswith("https://")
    with ready_made(secured) as session:
        session.verify = bundle
        assert session.get("/customer").status_code == 200
    forget_tokens()
    with requests.Session() as lent, requests.Session() as session:
        lent.verify = session.verify = bundle
        session.auth = auth_of(secured, session=lent)
        assert session.get(url(secured)).status_code == 200
    assert len(secured.token_requests) == 2


def test_without_it_the_certificate_is_refused(secured: NexusSandbox, bundle: str) -> None:
    with ready_made(secured) as session:
        with pytest.raises(requests.exceptions.SSLError) as raised:
            session.get("/customer")
        assert not isinstance(raised.value, NexusAuthError)
        assert f"{secured.environment.token_endpoint} (sandbox)" in str(raised.value)
    assert secured.token_requests == secured.requests == []


def test_a_client_certificate_is_shown_to_both_hosts(authority: trustme.CA, bundle: str, tmp_path: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    path = str(tmp_path / "client.pem")
    authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(path)
    with NexusSandbox(ssl_context=context) as secured, ready_made(secured) as session:
        session.verify = bundle
        with pytest.raises(requests.ConnectionError):
            session.get("/customer")
        forget_tokens()
        session.cert = path
        assert session.get("/customer").status_code == 200


def test_verify_false_is_its_owners_choice(secured: NexusSandbox) -> None:
    with ready_made(secured) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # urllib3 has something to say of it, rightly
        session.verify = False
        assert session.get("/customer").status_code == 200


def test_a_pickled_response_takes_no_secret_along(sandbox: NexusSandbox) -> None:
    session = nexus_session(sandbox.client_id, sandbox.client_secret, sandbox.environment)
    response = session.get("/customer")
    pickled = pickle.dumps(response)
    assert sandbox.client_secret.encode() not in pickled
    again = pickle.loads(pickled)
    assert again.json() == response.json()
    assert requests.Session().send(again.request).status_code == 200  # its hook passes on what comes
