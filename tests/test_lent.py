"""Sessions and clients that are lent: of whatever class, with their settings, and theirs alone afterwards as before."""

from __future__ import annotations

import copy
import functools
import gc
import gzip
import http
import pickle
import ssl
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trustme
from conftest import INSTALLED, ON_HTTPX, ON_REQUESTS, Answered, Driver, Log, Sent, outcome, url
from server import closed_port

from nexus_auth import TEST, Environment, NexusAuthError, TokenRequestError, forget_tokens, grant
from nexus_auth.quota import LIMIT
from nexus_auth.testing import NexusSandbox


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grant, "TRIES", 1)


def state(lent: Any) -> dict[str, Any]:
    """Return all that there is of a session or client, to compare it with what becomes of it."""
    settings = {name: dict(getattr(lent, name)) for name in ("headers", "cookies", "params")}
    hooks = repr(getattr(lent, "hooks", None) or lent.event_hooks)
    return {**vars(lent), **settings, "hooks": hooks, "closed": getattr(lent, "is_closed", False)}


def difficult(base: Any) -> Any:
    """Return a class whose objects can be used as they are, but not copied, closed, subclassed or made once more."""

    class Parent(base):  # type: ignore[misc]
        def __init_subclass__(cls, *, owner: str) -> None:
            cls.owner = owner

    class Lent(Parent, owner="somebody"):
        __slots__ = ("tenant",)
        endings: ClassVar[list[str]] = []
        only_one = threading.Lock()

        def __new__(cls, *, tenant: str, **_: Any) -> Any:
            return super().__new__(cls)

        def __init__(self, *, tenant: str, **options: Any) -> None:
            super().__init__(**options)
            self.tenant = tenant
            self.again = self
            assert self.only_one.acquire(blocking=False)

        def __len__(self) -> int:
            return 0

        def send(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("its own send was called")

        def close(self) -> None:
            self.endings.append("closed")
            super().close()

        async def aclose(self) -> None:
            self.endings.append("closed")
            await super().aclose()

        def __del__(self) -> None:
            self.endings.append("deleted")

    return functools.partial(Lent, tenant="mine")


def test_a_lent_object_may_be_of_any_class(driver: Driver) -> None:
    """It is not closed, and copies of the auth keep it."""
    carried: list[str] = []

    def answer(request: Sent) -> Answered:
        carried.append(request.url)
        return Answered(body=b'{"access_token": "t%d"}' % len(carried))

    driver.kind = difficult(driver.kind)
    lent = driver.client_without_network(answer)
    before = state(lent)
    auth = driver.door.NexusAuth("id", "s3cret", TEST, **driver.lend(lent))
    for token, one in (("t1", auth), ("t2", copy.copy(auth)), ("t3", copy.deepcopy(auth))):
        forget_tokens()
        assert driver.access_token(one) == token
    assert carried == [TEST.token_endpoint] * 3
    assert state(lent) == before
    assert lent.endings == []


class Instrumented:
    """A method as tools that observe an application wrap it: a descriptor, and no function."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __get__(self, instance: Any, kind: Any) -> Any:
        return functools.partial(self.method, instance) if instance is not None else self


def test_a_method_that_is_wrapped_is_its_class_s_all_the_same(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    lent = driver.client()
    driver.on_response(lent, lambda response: seen.append(response.status_code))
    kind = type(lent)
    monkeypatch.setattr(kind, "send", Instrumented(kind.send))
    assert driver.access_token(driver.auth(sandbox, **driver.lend(lent)))
    assert seen == []  # its hooks have no part in a token request


def with_settings(driver: Driver) -> Any:
    """Return a client with settings, none of which is for token requests."""
    lent = driver.client(("mine", "mine"))
    lent.headers.update({"X-Mine": "mine", "Authorization": "mine"})
    lent.cookies.set("mine", "mine")
    lent.params = {"mine": "mine"}
    return lent


@pytest.mark.usefixtures("quick_retries")
def test_a_lent_object_stays_its_owners(driver: Driver, sandbox: NexusSandbox) -> None:
    """Nothing of it goes into a token request but its transport, and it goes on when others end."""
    lent, seen = with_settings(driver), list[int]()
    driver.on_response(lent, lambda response: seen.append(response.status_code))
    before = state(lent)
    client = driver.client(driver.auth(sandbox, **driver.lend(lent)))
    cookies = {"Set-Cookie": "theirs=1; Path=/"}
    sandbox.fail_token_requests(status=503, headers=cookies)
    sandbox.fail_token_requests(status=200, json={"access_token": "unknown"}, headers=cookies)
    assert driver.get(client, url(sandbox)).history == [401]
    forget_tokens()
    sandbox.fail_token_requests(status=302, headers={"Location": "/else", **cookies})
    with pytest.raises(TokenRequestError):
        driver.get(client, url(sandbox))
    assert len(sandbox.token_requests) == 4
    for arrival in sandbox.token_requests:
        assert "mine" not in f"{arrival.path} {arrival.headers} {arrival.body!r}".lower()
        assert not {"authorization", "cookie"} & {name.lower() for name in arrival.headers}
    driver.close(client)
    assert state(lent) == before
    assert driver.get(lent, url(sandbox)).status == 401
    assert seen == [401]


@ON_HTTPX
def test_a_lent_client_that_is_closed_is_not_opened_again(driver: Driver, sandbox: NexusSandbox) -> None:
    """Nor does it use up the quota."""
    lent = driver.client()
    auth = driver.auth(sandbox, **driver.lend(lent))
    driver.close(lent)
    for _ in range(LIMIT):
        with pytest.raises(RuntimeError, match="the client that is lent for token requests has been closed"):
            driver.access_token(auth)
    assert lent.is_closed
    assert sandbox.token_requests == []
    assert driver.access_token(driver.auth(sandbox, max_wait=0))


@pytest.mark.parametrize("driver", [name for name in INSTALLED if name == "httpx"], indirect=True)
def test_a_client_of_the_other_kind_is_refused_though_the_token_is_there(driver: Driver, sandbox: NexusSandbox) -> None:
    assert driver.access_token(driver.auth(sandbox))
    lent = driver.library.AsyncClient(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    with pytest.raises(TypeError, match="takes a client of kind Client; its auth was lent one of kind AsyncClient"):
        driver.access_token(driver.auth(sandbox, client=lent))


@ON_HTTPX
def test_the_test_client_of_starlette(driver: Driver) -> None:
    """It is a client of httpx2 where that is installed, else of httpx, with a transport of its own."""
    applications, responses, routing, testclient = (
        pytest.importorskip(f"starlette.{name}") for name in ("applications", "responses", "routing", "testclient")
    )
    if not issubclass(testclient.TestClient, driver.kind):
        pytest.skip("it is a client of another kind")

    def answer(request: Any) -> Any:
        return responses.JSONResponse({"access_token": "t", **request.headers})

    application = applications.Starlette(routes=[routing.Route("/{path:path}", answer, methods=["GET", "POST"])])
    environment = Environment("app", token_endpoint="http://localhost/token", base_url="http://localhost")
    client = testclient.TestClient(application, base_url=environment.base_url)
    client.auth = driver.door.NexusAuth("id", "secret", environment, client=client)
    assert driver.get(client, "/customer").json["authorization"] == "Bearer t"
    forget_tokens()
    with client:  # its application runs on between the requests
        assert driver.get(client, "/customer").status == 200


# Adapters of requests


def difficult_adapter(base: Any, **options: Any) -> Any:
    """Return an adapter of which a copy has to take everything along; it is not to be changed or closed."""

    class Adapter(base):  # type: ignore[misc]
        __slots__ = ("__tenant",)
        may_close = False

        def __new__(cls, tenant: str, **_: Any) -> Any:
            return super().__new__(cls)

        def __init__(self, tenant: str, **options: Any) -> None:
            self.__tenant = self.tenant = tenant
            super().__init__(**options)
            self.is_frozen = True

        def __setattr__(self, name: str, value: object) -> None:
            assert not hasattr(self, "is_frozen")
            super().__setattr__(name, value)

        def send(self, *arguments: Any, **options: Any) -> Any:
            assert self.__tenant == self.tenant == "mine"
            return super().send(*arguments, **options)

        def close(self) -> None:
            assert self.may_close
            super().close()

    return Adapter("mine", **options)


def adapter_that_closes_itself(base: Any, **options: Any) -> Any:
    class Adapter(base):  # type: ignore[misc]
        may_close = False

        def __del__(self) -> None:
            self.close()

        def close(self) -> None:
            assert self.may_close
            super().close()

    return Adapter(**options)


@ON_REQUESTS
@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("make", [difficult_adapter, adapter_that_closes_itself])
def test_an_adapter_may_be_of_any_class(driver: Driver, sandbox: NexusSandbox, make: Callable[..., Any]) -> None:
    """It sends each token request once, through one pool that has one connection, and is as it was afterwards."""
    from urllib3 import Retry

    retry = Retry(9, status_forcelist=[503], allowed_methods=None, backoff_factor=0)
    pool = {"pool_connections": 1, "pool_maxsize": 1, "pool_block": True}
    adapter = make(driver.library.adapters.HTTPAdapter, max_retries=retry, **pool)
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
    with pytest.raises(driver.door.TokenWaitError) as raised:
        driver.get(client, "/customer")
    assert 29 < raised.value.retry_after <= 30
    assert len(sandbox.token_requests) == 1


@ON_REQUESTS
def test_an_adapter_that_is_none_of_requests(driver: Driver, sandbox: NexusSandbox) -> None:
    """It is given a timeout that is a number. Where a response has no connection, a 401 is the caller's."""
    carrier, timeouts = driver.library.adapters.HTTPAdapter(), list[object]()

    def send(request: Any, timeout: Any = None, **options: Any) -> Any:
        timeouts.append(timeout)
        answer, response = carrier.send(request, timeout=timeout, **options), driver.library.Response()
        response.status_code, response._content, response.request = answer.status_code, answer.content, request
        return response

    adapter = driver.library.adapters.BaseAdapter()
    adapter.send, adapter.close = send, carrier.close
    client = driver.ready_made(sandbox, timeout=7)
    client.mount("http://", adapter)
    assert driver.get(client, "/customer", timeout=3).status == 200
    assert timeouts == [7, 3]
    sandbox.revoke_tokens()
    assert [driver.get(client, "/customer").status for _ in range(2)] == [401, 200]  # the second with another token


@ON_REQUESTS
def test_an_adapter_that_has_read_its_response(driver: Driver, sandbox: NexusSandbox) -> None:
    class Adapter(driver.library.adapters.HTTPAdapter):  # type: ignore[misc,name-defined]
        def build_response(self, *arguments: Any) -> Any:
            response = super().build_response(*arguments)
            assert response.content
            return response

    body = gzip.compress(b'{"access_token": "unknown"}')
    sandbox.fail_token_requests(status=200, body=body, headers={"Content-Encoding": "gzip"})
    client = driver.ready_made(sandbox)
    client.mount("http://", Adapter())
    assert driver.get(client, "/customer").history == [401]
    assert len(sandbox.token_requests) == 2


# Proxies and TLS


@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("is_lent", [False, True])
def test_proxies(driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, is_lent: bool) -> None:
    """Those of what is lent, else those of the environment; the sandbox plays one for a host that does not exist."""
    environment = Environment("far", token_endpoint="https://identity.invalid/token", base_url=url(sandbox, ""))
    lent = driver.lend(driver.client_through_proxy(url(sandbox, ""))) if is_lent else {}
    if not is_lent:
        monkeypatch.setenv("https_proxy", url(sandbox, ""))
    with pytest.raises(driver.library_error, match=r"(?i)could not be reached .*proxy"):
        driver.access_token(driver.auth(sandbox, environment=environment, **lent))
    assert [(arrival.method, arrival.path) for arrival in sandbox.requests] == [("CONNECT", "identity.invalid:443")]


def test_no_proxy_of_the_environment_leads_to_loopback(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is lent; what is lent decides itself."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, url(stranger, ""))
    assert driver.access_token(driver.auth(sandbox))
    forget_tokens()
    outcome(driver.access_token, driver.auth(sandbox, **driver.lend(driver.client())))
    assert (len(sandbox.token_requests), len(stranger.token_requests)) == (1, 1)


@pytest.fixture
def certificate(authority: trustme.CA, context: ssl.SSLContext, tmp_path: Path) -> str:
    """The path of a client certificate, without which the secured sandbox talks to nobody."""
    path = str(tmp_path / "client.pem")
    authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(path)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return path


def trusting_session(bundle: str, certificate: str) -> dict[str, Any]:
    return {"verify": bundle, "cert": certificate}


def trusting_client(bundle: str, certificate: str) -> dict[str, Any]:
    context = ssl.create_default_context(cafile=bundle)
    context.load_cert_chain(certificate)
    return {"verify": context}


TRUSTING = {"session": trusting_session, "client": trusting_client}


@pytest.mark.usefixtures("one_try")
def test_the_authority_that_a_lent_object_trusts_and_the_certificate_that_it_shows(
    driver: Driver, certificate: str, secured: NexusSandbox, bundle: str
) -> None:
    lent = driver.client(**TRUSTING[driver.lent_as](bundle, certificate))
    assert driver.access_token(driver.auth(secured, **driver.lend(lent)))
    forget_tokens()
    with pytest.raises(driver.library_error, match="CERTIFICATE_VERIFY_FAILED") as raised:
        driver.access_token(driver.auth(secured))  # nothing is lent
    assert not isinstance(raised.value, NexusAuthError)
    assert len(secured.token_requests) == 1


@ON_REQUESTS
@pytest.mark.usefixtures("one_try")
def test_the_tls_settings_of_a_lent_session_go_into_a_pickle(
    driver: Driver, certificate: str, secured: NexusSandbox, bundle: str
) -> None:
    auth = driver.auth(secured, session=driver.client(**TRUSTING[driver.lent_as](bundle, certificate)))
    assert driver.access_token(pickle.loads(pickle.dumps(auth)))


def test_the_trust_store_that_the_environment_names(
    driver: Driver, secured: NexusSandbox, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is lent, a token request trusts whom the library would trust."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle)
    monkeypatch.setenv("SSL_CERT_FILE", bundle)
    assert driver.access_token(driver.auth(secured))


def test_verify_false_is_its_owners_choice(driver: Driver, secured: NexusSandbox) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have something to say of it, rightly
        assert driver.access_token(driver.auth(secured, **driver.lend(driver.client(verify=False))))


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
    gc.disable()
    try:
        client = driver.from_factory(sandbox.client_id, sandbox.client_secret, sandbox.environment)
        for _ in range(2):
            assert driver.get(client, "/customer").status == 200
            sandbox.revoke_tokens()
        for _ in range(2):
            assert driver.get(client, "/customer").status == 200
        reference, auth = weakref.ref(client), client.auth
        driver.close(client)
        del client
        assert reference() is None
        assert driver.access_token(auth)  # without what was lent, as where nothing is
        reference = weakref.ref(auth)
        del auth
        assert reference() is None
    finally:
        gc.enable()


# Copies and pickles


CLONES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "old pickle": lambda value: pickle.loads(pickle.dumps(value, 0)),
}


def test_an_auth_survives(driver: Driver, sandbox: NexusSandbox) -> None:
    """With its arguments; no token travels."""
    auth, client = driver.auth(sandbox, scope="sanctionlist", max_wait=0), driver.client()
    for _ in range(2):
        driver.get(client, url(sandbox), auth=auth)
    assert driver.access_token(auth).encode() not in pickle.dumps(auth)
    clones = [clone(clone(auth)) for clone in CLONES.values()]
    for clone in clones:
        assert driver.get(client, url(sandbox), auth=clone).status == 200
        assert (repr(clone), clone.environment) == (repr(auth), auth.environment)
    (token_request,) = sandbox.token_requests  # they have the same credentials
    assert dict(token_request.form)["scope"] == "sanctionlist"
    forget_tokens()
    sandbox.fail_token_requests(status=429, retry_after=5)
    for clone in clones:
        assert isinstance(outcome(driver.get, client, url(sandbox), auth=clone), driver.door.TokenWaitError)


@ON_REQUESTS
@pytest.mark.usefixtures("one_try")
@pytest.mark.parametrize("way", CLONES)
def test_a_session_survives_and_lends_itself(driver: Driver, sandbox: NexusSandbox, way: str) -> None:
    session = driver.ready_made(sandbox, iso8601=True)
    for _ in range(2):
        driver.get(session, "/customer")
    sandbox.revoke_tokens()
    session.headers["X-Mine"] = "mine"
    clone = driver.keep(CLONES[way](session))
    clone.proxies = {"http": f"http://127.0.0.1:{closed_port()}"}
    for _ in range(2):  # after a 401, and without a token
        assert "connect to proxy" in str(outcome(driver.get, clone, "/customer", proxies={"http": ""}))
        assert len(sandbox.token_requests) == 1  # its token request took the way through the proxy
        forget_tokens()
    clone.proxies = {}
    assert driver.get(clone, "/customer").status == 200
    headers = sandbox.requests[-1].headers
    assert (headers["X-Mine"], headers["request_iso8601"]) == ("mine", "true")


@ON_REQUESTS
def test_what_is_lent_goes_into_a_pickle_without_the_callers(driver: Driver, sandbox: NexusSandbox) -> None:
    """Its proxies, TLS settings and adapters go along, for token requests use no others."""
    lent = with_settings(driver)
    driver.on_response(lent, lambda _: None)  # cannot be pickled
    lent.proxies = {"http": f"http://127.0.0.1:{closed_port()}"}
    pickled = pickle.dumps(driver.auth(sandbox, max_wait=0, session=lent))
    assert b"mine" not in pickled
    with pytest.raises(NexusAuthError):  # no proxy is there
        driver.access_token(pickle.loads(pickled))
    assert sandbox.token_requests == []


def test_what_cannot_be_pickled_stays_behind_with_a_word(driver: Driver, sandbox: NexusSandbox, log: Log) -> None:
    lent = driver.client()
    lent.adapters = {"http://": threading.Lock()}
    auth = pickle.loads(pickle.dumps(driver.auth(sandbox, **driver.lend(lent))))
    lent.adapters = {}
    ((level, message),) = log()
    assert (level, message.partition(":")[0]) == (
        "DEBUG", f"the {driver.lent_as} that is lent stays behind when its auth is pickled"
    )  # fmt: skip
    assert driver.access_token(auth)


@ON_REQUESTS
def test_a_session_with_another_auth_lends_itself_to_none(driver: Driver, sandbox: NexusSandbox) -> None:
    session = driver.ready_made(sandbox)
    session.auth = ("user", "password")
    assert driver.keep(copy.deepcopy(session)).auth == ("user", "password")


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
