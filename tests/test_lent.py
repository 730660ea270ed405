"""Sessions and clients that are lent: of whatever class, with their settings, and theirs alone afterwards as before."""

from __future__ import annotations

import copy
import gc
import http
import importlib
import logging
import pickle
import ssl
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trustme
from conftest import INSTALLED, Driver, Log, outcome, url
from server import closed_port

from nexus_auth import Environment, NexusAuthError, TokenRequestError, forget_tokens, grant
from nexus_auth.quota import LIMIT
from nexus_auth.testing import NexusSandbox

ON_REQUESTS = pytest.mark.parametrize("driver", [name for name in INSTALLED if name == "requests"], indirect=True)
ON_HTTPX = pytest.mark.parametrize("driver", [name for name in INSTALLED if name != "requests"], indirect=True)
Carried = list[str]  # the URLs of the requests that a lent session or client has carried


# Of whatever class


def closes_itself(base: Any) -> Any:
    class Lent(base):  # type: ignore[misc]
        endings: ClassVar[list[str]] = []

        def __del__(self) -> None:
            self.endings.append("deleted")

        def close(self) -> None:
            self.endings.append("closed")
            super().close()

        async def aclose(self) -> None:
            self.endings.append("closed")
            await super().aclose()

    return Lent


def has_class_attributes(base: Any) -> Any:
    class Lent(base):  # type: ignore[misc]
        tenant = None
        lock = threading.Lock()

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.tenant = "mine"
            self.again = self  # a cycle
            assert self.lock.acquire(blocking=False)

    return Lent


def has_slots(base: Any) -> Any:
    class Lent(base):  # type: ignore[misc]
        __slots__ = ("tenant",)

    return Lent


def wants_arguments_of_subclasses(base: Any) -> Any:
    class Parent(base):  # type: ignore[misc]
        def __init_subclass__(cls, *, tenant: str) -> None:
            cls.tenant = tenant

    class Lent(Parent, tenant="mine"):
        pass

    return Lent


def wants_arguments(base: Any) -> Any:
    class Lent(base):  # type: ignore[misc]
        def __new__(cls, *, tenant: str, **_: Any) -> Any:
            return super().__new__(cls)

        def __init__(self, *, tenant: str, **options: Any) -> None:
            super().__init__(**options)

    return lambda **options: Lent(tenant="mine", **options)


def sends_itself(base: Any) -> Any:
    class Lent(base):  # type: ignore[misc]
        def send(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("its own send was called")

    return Lent


def is_empty(base: Any) -> Any:
    class Lent(base):  # type: ignore[misc]
        def __len__(self) -> int:
            return 0

    return Lent


KINDS = [closes_itself, has_class_attributes, has_slots, wants_arguments_of_subclasses, wants_arguments, sends_itself,
         is_empty]  # fmt: skip


def carrying_session(kind: Any, base: Any, carried: Carried) -> Any:
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
            carried.append(request.url)
            return super().send(request, *arguments, **options)

    session = kind()
    session.mount("http://", Adapter())
    return session


def carrying_client(kind: Any, base: Any, carried: Carried) -> Any:
    """Return a client with a transport of its library that keeps in mind what it has carried."""
    transport = base(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))._transport
    for name in ("handle_request", "handle_async_request"):
        if handle := getattr(transport, name, None):

            def carry(request: Any, handle: Any = handle) -> Any:
                carried.append(str(request.url))
                return handle(request)

            setattr(transport, name, carry)
    return kind(transport=transport)


CARRYING: dict[str, Callable[[Any, Any, Carried], Any]] = {"session": carrying_session, "client": carrying_client}


def state(lent: Any) -> dict[str, Any]:
    """Return all that there is of a session or client, to compare it with what becomes of it."""
    settings = {name: dict(getattr(lent, name)) for name in ("headers", "cookies", "params")}
    hooks = repr(getattr(lent, "hooks", None) or lent.event_hooks)
    return {**vars(lent), **settings, "hooks": hooks, "closed": getattr(lent, "is_closed", False)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lent_object_may_be_of_any_class(driver: Driver, sandbox: NexusSandbox, kind: Callable[[Any], Any]) -> None:
    base, carried = type(driver.client()), Carried()
    lent = driver.keep(CARRYING[driver.lent_as](kind(base), base, carried))
    before, classes = state(lent), type(lent).__subclasses__()
    auth = driver.auth(sandbox, **driver.lend(lent))
    client = driver.client(auth)
    assert driver.get(client, url(sandbox)).status == 200
    sandbox.revoke_tokens()
    assert driver.get(client, url(sandbox)).status == 200
    for clone in (copy.copy(auth), copy.deepcopy(auth)):
        forget_tokens()
        assert driver.get(client, url(sandbox), auth=clone).status == 200
    assert carried == [sandbox.environment.token_endpoint] * 4
    assert state(lent) == before
    assert type(lent).__subclasses__() == classes
    assert not getattr(lent, "endings", [])


def must_not_be_called(_: Any) -> None:
    raise AssertionError("a hook was called for a token request")


def with_settings(driver: Driver, auth: Any = None) -> Any:
    """Return a client with settings, none of which is for token requests."""
    lent = driver.client(auth or ("mine", "mine"))
    lent.headers.update({"X-Mine": "mine", "Authorization": "mine"})
    lent.cookies.set("mine", "mine")
    lent.params = {"mine": "mine"}
    return lent


@pytest.mark.usefixtures("quick_retries")
def test_a_lent_object_stays_its_owners(driver: Driver, sandbox: NexusSandbox) -> None:
    lent = with_settings(driver)
    driver.on_response(lent, must_not_be_called)
    before = state(lent)
    client = driver.client(driver.auth(sandbox, **driver.lend(lent)))
    cookies = {"Set-Cookie": "theirs=1; Path=/"}
    sandbox.fail_token_requests(status=503, headers=cookies)
    sandbox.fail_token_requests(status=200, json={"access_token": "unknown"}, headers=cookies)
    assert driver.get(client, url(sandbox)).status == 200  # renewed after a 401
    assert len(sandbox.token_requests) == 3
    for arrival in sandbox.token_requests:
        assert "mine" not in f"{arrival.path} {arrival.headers} {arrival.body!r}".lower()
        assert not {"authorization", "cookie"} & {name.lower() for name in arrival.headers}
    assert state(lent) == before


def test_a_client_that_is_lent_to_its_own_auth_stays_as_it_is(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client()
    client.auth = driver.auth(sandbox, **driver.lend(client))
    seen: list[str] = []
    driver.on_response(client, lambda response: seen.append(str(response.url)))
    before = dict(client.headers), dict(client.cookies)
    sandbox.fail_token_requests(status=302, headers={"Location": "/else", "Set-Cookie": "theirs=1; Path=/"})
    with pytest.raises(TokenRequestError):
        driver.get(client, url(sandbox))
    forget_tokens()
    assert driver.get(client, url(sandbox)).status == 200
    assert (dict(client.headers), dict(client.cookies)) == before
    assert seen == [url(sandbox)]
    assert "Cookie" not in sandbox.requests[0].headers


def test_what_is_lent_is_not_closed(driver: Driver, sandbox: NexusSandbox) -> None:
    lent = driver.client()
    client = driver.client(driver.auth(sandbox, **driver.lend(lent)))
    assert driver.get(client, url(sandbox)).status == 200
    driver.close(client)
    del client
    assert driver.get(lent, url(sandbox)).status == 401


@ON_HTTPX
def test_a_lent_client_that_is_closed_uses_up_no_quota(driver: Driver, sandbox: NexusSandbox) -> None:
    lent = driver.client()
    auth = driver.auth(sandbox, **driver.lend(lent))
    driver.close(lent)
    for _ in range(LIMIT):
        assert isinstance(outcome(driver.access_token, auth), RuntimeError)
    assert driver.access_token(driver.auth(sandbox, max_wait=0))


@ON_HTTPX
def test_a_lent_client_that_is_closed_is_not_opened_again(driver: Driver, sandbox: NexusSandbox) -> None:
    lent = driver.client()
    client = driver.client(driver.auth(sandbox, **driver.lend(lent)))
    driver.close(lent)
    with pytest.raises(RuntimeError, match="the client that is lent for token requests has been closed"):
        driver.get(client, url(sandbox))
    assert lent.is_closed
    assert sandbox.token_requests == []


@pytest.mark.parametrize("library", [name for name in ("httpx", "httpx2") if name in INSTALLED])
def test_a_client_of_the_other_kind_is_refused_though_the_token_is_there(library: str, sandbox: NexusSandbox) -> None:
    door, kinds = __import__(f"nexus_auth.{library}", fromlist=["NexusAuth"]), __import__(library)
    lent = kinds.AsyncClient(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    arguments = sandbox.client_id, sandbox.client_secret, sandbox.environment
    assert door.NexusAuth(*arguments).access_token()
    with pytest.raises(TypeError, match="this call takes a client of kind Client; its auth was lent another"):
        door.NexusAuth(*arguments, client=lent).access_token()


@ON_HTTPX
def test_the_test_client_of_starlette(driver: Driver) -> None:
    """It is a client of httpx2 where that is installed, else of httpx, with a transport of its own."""
    test_client = pytest.importorskip("starlette.testclient").TestClient
    applications, routing, responses = (
        importlib.import_module(f"starlette.{name}") for name in ("applications", "routing", "responses")
    )
    token = responses.JSONResponse({"access_token": "t", "expires_in": 60})
    routes = [
        routing.Route("/connect/token", lambda _: token, methods=["POST"]),
        routing.Route("/customer", lambda request: responses.JSONResponse(dict(request.headers))),
    ]
    client = test_client(applications.Starlette(routes=routes), base_url="http://localhost")
    if not isinstance(client, type(driver.client())):
        pytest.skip("it is a client of another kind")
    environment = Environment("app", token_endpoint="http://localhost/connect/token", base_url="http://localhost")
    client.auth = driver.door.NexusAuth("id", "secret", environment, client=client)
    assert driver.get(client, "/customer").json["authorization"] == "Bearer t"
    forget_tokens()
    with client:  # its application runs on between the requests
        assert driver.get(client, "/customer").status == 200


# Adapters of requests


class Stateful:
    """Adds to an adapter, so that what a copy has to take along is missed where it is used."""

    def __init__(self, **options: Any) -> None:
        self.tenant = ["mine"]
        super().__init__(**options)

    def send(self, *arguments: Any, **options: Any) -> Any:
        assert self.tenant == ["mine"]
        return super().send(*arguments, **options)  # type: ignore[misc]


def adapter_with_state(base: Any) -> Any:
    return type("Adapter", (Stateful, base), {})


def adapter_with_slots(base: Any) -> Any:
    return type("Adapter", (Stateful, base), {"__slots__": "tenant"})


def adapter_with_private_slots(base: Any) -> Any:
    class Adapter(base):  # type: ignore[misc]
        __slots__ = ("__tenant",)

        def __init__(self, **options: Any) -> None:
            self.__tenant = "mine"
            super().__init__(**options)

        def send(self, *arguments: Any, **options: Any) -> Any:
            assert self.__tenant == "mine"
            return super().send(*arguments, **options)

    return Adapter


def adapter_that_is_frozen(base: Any) -> Any:
    class Adapter(base):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.is_frozen = True

        def __setattr__(self, name: str, value: object) -> None:
            assert not hasattr(self, "is_frozen")
            super().__setattr__(name, value)

    return Adapter


def adapter_that_wants_arguments(base: Any) -> Any:
    class Adapter(base):  # type: ignore[misc]
        def __new__(cls, tenant: str, **_: Any) -> Any:
            return super().__new__(cls)

        def __init__(self, tenant: str, **options: Any) -> None:
            super().__init__(**options)

    return lambda **options: Adapter("mine", **options)


def adapter_that_closes_itself(base: Any) -> Any:
    class Adapter(base):  # type: ignore[misc]
        may_close = False

        def __del__(self) -> None:
            self.close()

        def close(self) -> None:
            assert self.may_close
            super().close()

    return Adapter


ADAPTERS = [adapter_with_state, adapter_with_slots, adapter_with_private_slots, adapter_that_is_frozen,
            adapter_that_wants_arguments, adapter_that_closes_itself]  # fmt: skip


@ON_REQUESTS
@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_may_be_of_any_class(driver: Driver, sandbox: NexusSandbox, kind: Callable[[Any], Any]) -> None:
    """It sends each token request once, through one pool that has one connection, and is as it was afterwards."""
    from urllib3 import Retry

    retry = Retry(9, status_forcelist=[503], allowed_methods=None, backoff_factor=0)
    pool = {"pool_connections": 1, "pool_maxsize": 1, "pool_block": True}
    adapter = kind(driver.library.adapters.HTTPAdapter)(max_retries=retry, **pool)
    client = driver.ready_made(sandbox, timeout=5)
    client.mount("http://", adapter)
    before = dict(vars(adapter))
    sandbox.fail_token_requests(3, status=503, body="x" * 2**21)  # longer than is read
    assert driver.get(client, "/customer").status == 200
    assert len(sandbox.token_requests) == 4
    sandbox.revoke_tokens()
    assert driver.get(client, "/customer").status == 200
    assert vars(adapter) == before
    type(adapter).may_close = True


@ON_REQUESTS
@pytest.mark.parametrize("options", [{"total": 0, "status_forcelist": [503]}, {"total": 5, "raise_on_status": True}])
def test_an_answer_is_not_taken_for_an_error_by_retries(
    driver: Driver, sandbox: NexusSandbox, options: dict[str, Any]
) -> None:
    """With the status that it came with, what to do is told, and Retry-After is obeyed."""
    from urllib3 import Retry

    client = driver.ready_made(sandbox, max_wait=1)
    retry = Retry(allowed_methods=None, **options)
    client.mount("http://", driver.library.adapters.HTTPAdapter(max_retries=retry))
    sandbox.fail_token_requests(status=503, retry_after=30)
    error: Any = outcome(lambda: driver.get(client, "/customer"))
    assert isinstance(error, driver.door.TokenWaitError)
    assert 29 < error.retry_after <= 30
    assert len(sandbox.token_requests) == 1


@ON_REQUESTS
def test_an_adapter_that_is_none_of_requests(driver: Driver, sandbox: NexusSandbox) -> None:
    """It is given a timeout as its base class has it: a number, or a pair of them."""
    timeouts: list[Any] = []

    class Adapter(driver.library.adapters.BaseAdapter):  # type: ignore[misc,name-defined]
        def send(self, request: Any, stream: Any = False, timeout: Any = None, **options: Any) -> Any:
            timeouts.append(timeout)
            return other.send(request, stream=stream, timeout=timeout, **options)

        def close(self) -> None:
            other.close()

    other = driver.library.adapters.HTTPAdapter()
    client = driver.ready_made(sandbox, timeout=7)
    client.mount("http://", Adapter())
    assert driver.get(client, "/customer", timeout=3).status == 200
    assert timeouts == [7, 3]


@ON_REQUESTS
def test_an_adapter_whose_responses_have_no_connection(driver: Driver, sandbox: NexusSandbox) -> None:
    """Its 401 is the caller's, and the next call has another token."""

    class Adapter(driver.library.adapters.BaseAdapter):  # type: ignore[misc,name-defined]
        def send(self, request: Any, **_: Any) -> Any:
            response = driver.library.Response()
            answer = other.send(request, timeout=5)
            response.status_code, response._content, response.request = answer.status_code, answer.content, request
            return response

        def close(self) -> None:
            other.close()

    other = driver.library.adapters.HTTPAdapter()
    client = driver.ready_made(sandbox)
    client.mount("http://", Adapter())
    assert driver.get(client, "/customer").status == 200
    sandbox.revoke_tokens()
    assert [driver.get(client, "/customer").status for _ in range(2)] == [401, 200]


@ON_REQUESTS
def test_an_adapter_that_has_read_its_response(driver: Driver, sandbox: NexusSandbox) -> None:
    import gzip

    class Adapter(driver.library.adapters.HTTPAdapter):  # type: ignore[misc,name-defined]
        def build_response(self, *arguments: Any) -> Any:
            response = super().build_response(*arguments)
            assert response.content
            return response

    body = gzip.compress(b'{"access_token": "unknown"}')
    sandbox.fail_token_requests(status=200, body=body, headers={"Content-Encoding": "gzip"})
    client = driver.ready_made(sandbox)
    client.mount("http://", Adapter())
    assert driver.get(client, "/customer").status == 200
    assert len(sandbox.token_requests) == 2


# Proxies


FAR = "https://identity.invalid/connect/token"


@pytest.mark.parametrize("lent", [False, True])
def test_proxies(driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, lent: bool) -> None:
    """The sandbox plays the proxy: what reaches it names a host that does not exist."""
    monkeypatch.setattr(grant, "TRIES", 1)  # each of which reads the trust store anew, where nothing is lent
    environment = Environment("far", token_endpoint=FAR, base_url=url(sandbox, ""))
    options = driver.lend(driver.client_through_proxy(url(sandbox, ""))) if lent else {}
    if not lent:
        monkeypatch.setenv("https_proxy", url(sandbox, ""))
    client = driver.client(driver.auth(sandbox, environment=environment, **options))
    with pytest.raises(driver.library_error, match=r"(?i)could not be reached .*proxy"):
        driver.get(client, url(sandbox))
    assert [(arrival.method, arrival.path) for arrival in sandbox.requests] == [("CONNECT", "identity.invalid:443")]


def test_no_proxy_of_the_environment_leads_to_loopback(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is lent; what is lent decides itself."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, url(stranger, ""))
    assert driver.access_token(driver.auth(sandbox))
    assert len(sandbox.token_requests) == 1
    forget_tokens()
    outcome(lambda: driver.access_token(driver.auth(sandbox, **driver.lend(driver.client()))))
    assert (len(sandbox.token_requests), len(stranger.token_requests)) == (1, 1)


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def secured(authority: trustme.CA) -> Iterator[NexusSandbox]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with NexusSandbox(ssl_context=context) as secured:
        yield secured


def trusting_session(bundle: str, certificate: str | None) -> dict[str, Any]:
    return {"verify": bundle, "cert": certificate}


def trusting_client(bundle: str, certificate: str | None) -> dict[str, Any]:
    context = ssl.create_default_context(cafile=bundle)
    if certificate is not None:
        context.load_cert_chain(certificate)
    return {"verify": context}


TRUSTING = {"session": trusting_session, "client": trusting_client}


def trusting(driver: Driver, bundle: str, certificate: str | None = None) -> dict[str, Any]:
    """Return the options of a session or client that trusts an authority, and shows a certificate of its own."""
    return TRUSTING[driver.lent_as](bundle, certificate)


def test_a_private_authority_that_the_lent_object_trusts(
    driver: Driver, secured: NexusSandbox, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grant, "TRIES", 1)
    lent, client = driver.client(**trusting(driver, bundle)), driver.client(**trusting(driver, bundle))
    assert driver.get(client, url(secured), auth=driver.auth(secured, **driver.lend(lent))).status == 200
    forget_tokens()
    for options in ({}, driver.lend(driver.client())):  # neither trusts it
        with pytest.raises(driver.library_error, match="CERTIFICATE_VERIFY_FAILED") as raised:
            driver.get(client, url(secured), auth=driver.auth(secured, **options))
        assert not isinstance(raised.value, NexusAuthError)
        forget_tokens()
    assert len(secured.token_requests) == 1


def test_the_trust_store_that_the_environment_names(
    driver: Driver, secured: NexusSandbox, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is lent, a token request trusts whom the library would trust."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle)
    monkeypatch.setenv("SSL_CERT_FILE", bundle)
    assert driver.access_token(driver.auth(secured))


def test_a_client_certificate_is_shown(driver: Driver, authority: trustme.CA, bundle: str, tmp_path: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    path = str(tmp_path / "client.pem")
    authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(path)
    with NexusSandbox(ssl_context=context) as secured:
        lent = driver.client(**trusting(driver, bundle, path))
        assert driver.access_token(driver.auth(secured, **driver.lend(lent)))


def test_verify_false_is_its_owners_choice(driver: Driver, secured: NexusSandbox) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have something to say of it, rightly
        lent = driver.client(verify=False)
        assert driver.access_token(driver.auth(secured, **driver.lend(lent)))


# Pools


@ON_HTTPX
@pytest.mark.usefixtures("quick_retries")
@pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning")  # httpx leaves those of its own to trio
def test_one_connection_is_enough(driver: Driver, sandbox: NexusSandbox) -> None:
    """That of a 401, and that of an answer which is not read to its end, are free before anything else is sent."""
    client = driver.ready_made(sandbox, limits=driver.library.Limits(max_connections=1), timeout=5)
    sandbox.fail_token_requests(status=503, body="x" * 2**21)
    driver.get(client, "/customer")
    sandbox.revoke_tokens()
    assert driver.get(client, "/customer").status == 200
    assert len(sandbox.token_requests) == 3


def test_a_dropped_client_is_freed_at_once(driver: Driver, sandbox: NexusSandbox) -> None:
    """Neither it nor its sockets wait for the garbage collector: it and its auth do not hold one another."""
    arguments = sandbox.client_id, sandbox.client_secret, sandbox.environment
    gc.disable()
    try:
        client = driver.from_factory(*arguments)
        assert driver.get(client, "/customer").status == 200
        sandbox.revoke_tokens()
        assert driver.get(client, "/customer").status == 200
        reference = weakref.ref(client)
        auth = client.auth
        driver.close(client)
        del client
        assert reference() is None
        assert driver.access_token(auth)  # without what was lent, as where nothing is
    finally:
        gc.enable()


# Copies and pickles


CLONES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "old pickle": lambda value: pickle.loads(pickle.dumps(value, 0)),
}


@pytest.mark.parametrize("way", CLONES)
def test_an_auth_survives(driver: Driver, sandbox: NexusSandbox, way: str) -> None:
    auth = driver.auth(sandbox, scope="sanctionlist", max_wait=0)
    clone = CLONES[way](CLONES[way](auth))
    client = driver.client(clone)
    assert driver.get(client, url(sandbox)).status == 200
    assert driver.get(client, url(sandbox), auth=auth).status == 200
    assert (repr(clone), clone.environment) == (repr(auth), auth.environment)
    (token_request,) = sandbox.token_requests  # they have the same credentials
    assert dict(token_request.form)["scope"] == "sanctionlist"
    forget_tokens()
    sandbox.fail_token_requests(status=429, retry_after=5)
    assert isinstance(outcome(lambda: driver.get(client, url(sandbox))), driver.door.TokenWaitError)


def test_no_token_travels(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    token = driver.access_token(auth)
    assert token.encode() not in pickle.dumps(auth)


@ON_REQUESTS
@pytest.mark.parametrize("way", CLONES)
def test_a_session_survives_and_lends_itself(
    driver: Driver, sandbox: NexusSandbox, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grant, "TRIES", 1)
    session = driver.ready_made(sandbox, iso8601=True)
    session.headers["X-Mine"] = "mine"
    clone = driver.keep(CLONES[way](session))
    clone.proxies = {"http": f"http://127.0.0.1:{closed_port()}"}
    assert "connect to proxy" in str(outcome(lambda: driver.get(clone, "/customer", proxies={"http": ""})))
    assert sandbox.token_requests == []  # its token request took the way through the proxy
    clone.proxies = {}
    forget_tokens()
    assert driver.get(clone, "/customer").status == 200
    headers = sandbox.requests[0].headers
    assert (headers["X-Mine"], headers["request_iso8601"]) == ("mine", "true")


@ON_REQUESTS
def test_what_is_lent_goes_into_a_pickle_without_the_callers(driver: Driver, sandbox: NexusSandbox) -> None:
    """Its proxies, TLS settings and adapters go along, for token requests use no others."""
    lent = with_settings(driver)
    driver.on_response(lent, lambda _: None)  # cannot be pickled
    lent.proxies = {"http": f"http://127.0.0.1:{closed_port()}"}
    pickled = pickle.dumps(driver.auth(sandbox, max_wait=0, session=lent))
    assert b"mine" not in pickled
    clone = pickle.loads(pickled)
    assert isinstance(outcome(lambda: driver.access_token(clone)), NexusAuthError)  # no proxy is there
    assert sandbox.token_requests == []


def test_what_cannot_be_pickled_stays_behind_with_a_word(driver: Driver, sandbox: NexusSandbox, log: Log) -> None:
    lent = driver.client()
    lent.adapters = {"http://": threading.Lock()}
    auth = pickle.loads(pickle.dumps(driver.auth(sandbox, **driver.lend(lent))))
    lent.adapters = {}
    ((level, message),) = [line for line in log() if "stays behind" in line[1]]
    assert level == logging.getLevelName(logging.DEBUG)
    assert f"the {driver.lent_as} that is lent stays behind when its auth is pickled" in message
    assert driver.get(driver.client(auth), url(sandbox)).status == 200


@ON_REQUESTS
def test_a_session_with_another_auth_lends_itself_to_none(driver: Driver, sandbox: NexusSandbox) -> None:
    session = driver.ready_made(sandbox)
    session.auth = ("user", "password")
    clone = driver.keep(pickle.loads(pickle.dumps(session)))
    assert clone.auth == ("user", "password")


@ON_REQUESTS
def test_a_copied_request_is_mended_too(driver: Driver, sandbox: NexusSandbox) -> None:
    session = driver.ready_made(sandbox)
    request = session.prepare_request(driver.library.Request("GET", "/customer"))
    sandbox.revoke_tokens()
    assert session.send(copy.deepcopy(request)).status_code == http.HTTPStatus.OK
    assert len(sandbox.token_requests) == 2


@ON_REQUESTS
def test_a_pickled_response_takes_no_secret_along(driver: Driver, sandbox: NexusSandbox) -> None:
    response = driver.ready_made(sandbox).get("/customer")
    pickled = pickle.dumps(response)
    assert sandbox.client_secret.encode() not in pickled
    again = pickle.loads(pickled)
    assert again.json() == response.json()
    assert driver.client().send(again.request).status_code == http.HTTPStatus.OK  # its hook passes on what comes
