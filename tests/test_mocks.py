"""Mocks that users have: token requests are seen by them as calls are, and none reaches the network beside them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import socket
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BLOCKING, INSTALLED, ON_HTTPX, ON_REQUESTS, Driver, url

from nexus_auth import TEST, forget_tokens
from nexus_auth.testing import NexusSandbox

CUSTOMER = f"{TEST.base_url}/customer"
LOOPBACK = ("127.0.0.1", "localhost", "::1", None)
FORM = {"grant_type": "client_credentials", "scope": "api1", "client_id": "id", "client_secret": "s3cret"}
CREDENTIALS = (FORM["client_id"], FORM["client_secret"], TEST.name)


@pytest.fixture(autouse=True)
def no_other_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no host be looked up but this one, and fail a test in which another was."""
    others: list[object] = []
    getaddrinfo = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in LOOPBACK:
            others.append(host)
            raise socket.gaierror(f"{host} is out of reach")
        return getaddrinfo(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield
    assert others == []


class Nexus:
    """What a mock answers in these tests: a new token to each token request, and 401 to any token but the newest."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.tokens = 0
        self.revoked = 0

    def answer(self, method: str, address: str, authorization: str | None) -> tuple[int, dict[str, Any]]:
        self.calls.append(f"{method} {address}")
        self.threads.add(threading.get_ident())
        if address == TEST.token_endpoint:
            self.tokens += 1
            return 200, {"access_token": f"t{self.tokens}", "token_type": "Bearer", "expires_in": 3600}
        is_good = authorization == f"Bearer t{self.tokens}" and self.tokens > self.revoked
        return 200 if is_good else 401, {"authorization": authorization}

    def answer_to(self, request: Any) -> tuple[int, dict[str, Any]]:
        return self.answer(request.method, str(request.url), request.headers.get("Authorization"))

    def revoke(self) -> None:
        self.revoked = self.tokens


# Mocks for all sessions or clients. Each begins to answer as a `Nexus`; a stack ends it.


def register(mock: Any, nexus: Nexus) -> None:
    """Have something of requests-mock (a Mocker, its fixture, an Adapter) answer."""

    def answer(request: Any, context: Any) -> dict[str, Any]:
        context.status_code, document = nexus.answer_to(request)
        return document

    mock.register_uri("POST", TEST.token_endpoint, json=answer)
    mock.register_uri("GET", CUSTOMER, json=answer)


def mocker(nexus: Nexus, stack: contextlib.ExitStack, request: pytest.FixtureRequest) -> None:
    register(stack.enter_context(pytest.importorskip("requests_mock").Mocker()), nexus)


def fixture_of_requests_mock(nexus: Nexus, stack: contextlib.ExitStack, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("requests_mock")
    register(request.getfixturevalue("requests_mock"), nexus)


def responses(nexus: Nexus, stack: contextlib.ExitStack, request: pytest.FixtureRequest) -> None:
    library = pytest.importorskip("responses")

    def answer(request: Any) -> tuple[int, dict[str, str], str]:
        status, document = nexus.answer_to(request)
        return status, {}, json.dumps(document)

    mock = stack.enter_context(library.RequestsMock())
    match = [library.matchers.urlencoded_params_matcher(FORM)]
    mock.add_callback("POST", TEST.token_endpoint, callback=answer, match=match)
    mock.add_callback("GET", CUSTOMER, callback=answer)


def bare_response(status: int = 200, document: Any = None) -> Any:
    """Return a response as tests make them of nothing, by default with a token."""
    response = pytest.importorskip("requests").Response()
    response.status_code, response._content = status, json.dumps(document or TOKEN).encode()
    return response


def patched_adapter(nexus: Nexus, stack: contextlib.ExitStack, request: pytest.FixtureRequest) -> None:
    def send(adapter: Any, prepared: Any, **_: Any) -> Any:
        response = bare_response(*nexus.answer_to(prepared))
        response.request, response.connection = prepared, adapter
        return response

    adapter = pytest.importorskip("requests").adapters.HTTPAdapter
    stack.enter_context(unittest.mock.patch.object(adapter, "send", autospec=True, side_effect=send))


def answer_of_httpx(nexus: Nexus, response: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function from a request to a `response` of httpx or httpx2."""

    def answer(request: Any, **_: Any) -> Any:
        status, document = nexus.answer_to(request)
        return response(status, json=document)

    return answer


def route(router: Any, nexus: Nexus) -> None:
    """Have a router of respx answer."""
    answer = answer_of_httpx(nexus, pytest.importorskip("respx").MockResponse)
    router.post(TEST.token_endpoint, data=FORM).mock(side_effect=answer)
    router.get(CUSTOMER).mock(side_effect=answer)


def respx(nexus: Nexus, stack: contextlib.ExitStack, request: pytest.FixtureRequest) -> None:
    route(stack.enter_context(pytest.importorskip("respx").mock), nexus)


def pytest_httpx(nexus: Nexus, stack: contextlib.ExitStack, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("pytest_httpx")
    answer = answer_of_httpx(nexus, pytest.importorskip("httpx").Response)
    request.getfixturevalue("httpx_mock").add_callback(answer, is_reusable=True)


def pytest_httpx2(nexus: Nexus, stack: contextlib.ExitStack, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("pytest_httpx2")
    route(request.getfixturevalue("httpx2_mock"), nexus)


MOCKS = {
    "requests": [mocker, fixture_of_requests_mock, responses, patched_adapter],
    "httpx": [respx, pytest_httpx],
    "httpx2": [pytest_httpx2],
}
MOCKED = [
    pytest.param(name, mock, id=f"{name}-{mock.__name__}")
    for name in INSTALLED if name != "httpx-trio" for mock in MOCKS[name.partition("-")[0]]
]  # fmt: skip


def clients(driver: Driver) -> Iterator[Any]:
    """Yield a client whose auth was lent nothing, one whose auth was lent another client, and one that lends itself."""
    yield driver.client(driver.door.NexusAuth(*CREDENTIALS))
    forget_tokens()
    yield driver.client(driver.door.NexusAuth(*CREDENTIALS, **driver.lend(driver.client())))
    forget_tokens()
    yield driver.keep(driver.from_factory(*CREDENTIALS))
    forget_tokens()


def assert_mended(driver: Driver, client: Any, nexus: Nexus) -> None:
    """Make a call with a token, and one with another after a 401."""
    nexus.calls.clear()
    assert driver.get(client, CUSTOMER).json == {"authorization": f"Bearer t{nexus.tokens}"}
    nexus.revoke()
    assert driver.get(client, CUSTOMER).json == {"authorization": f"Bearer t{nexus.tokens}"}
    post, get = f"POST {TEST.token_endpoint}", f"GET {CUSTOMER}"
    assert nexus.calls == [post, get, get, post, get]


@pytest.mark.parametrize(("driver", "mock"), MOCKED, indirect=["driver"])
def test_nothing_goes_beside_a_mock(driver: Driver, mock: Callable[..., None], request: pytest.FixtureRequest) -> None:
    nexus = Nexus()
    with contextlib.ExitStack() as stack:
        mock(nexus, stack, request)
        for client in clients(driver):
            assert_mended(driver, client, nexus)
    assert len(nexus.threads) == 1  # a mock may hold a lock while it answers


# What is mocked on one session or client has to be lent


@ON_REQUESTS
def test_mocker_of_one_session(driver: Driver) -> None:
    library, lent = pytest.importorskip("requests_mock"), driver.client()
    ready_made = driver.keep(driver.from_factory(*CREDENTIALS))
    for client in (ready_made, driver.client(driver.door.NexusAuth(*CREDENTIALS, session=lent))):
        nexus = Nexus()
        with contextlib.ExitStack() as stack:
            for session in {client, lent}:
                register(stack.enter_context(library.Mocker(session=session)), nexus)
            assert_mended(driver, client, nexus)
        forget_tokens()


@ON_REQUESTS
def test_mounted_adapter_of_requests_mock(driver: Driver) -> None:
    adapter, nexus = pytest.importorskip("requests_mock").Adapter(), Nexus()
    register(adapter, nexus)
    client = driver.keep(driver.from_factory(*CREDENTIALS))
    client.mount("https://", adapter)
    assert_mended(driver, client, nexus)


@ON_HTTPX
def test_mock_transport(driver: Driver) -> None:
    nexus = Nexus()
    transport = driver.library.MockTransport(answer_of_httpx(nexus, driver.library.Response))
    options: list[dict[str, Any]] = [{"transport": transport}, {"mounts": {"https://": transport}}]
    for option in options:
        assert_mended(driver, driver.keep(driver.from_factory(*CREDENTIALS, **option)), nexus)
        forget_tokens()


def test_a_send_of_the_lent_object_itself(driver: Driver, sandbox: NexusSandbox) -> None:
    lent = driver.client()
    lent.send = send = unittest.mock.Mock(side_effect=lent.send)
    assert driver.access_token(driver.auth(sandbox, **driver.lend(lent)))
    assert send.call_count == len(sandbox.token_requests) == 1


# Mocks that call no hooks, or answer with next to nothing


@ON_REQUESTS
def test_httmock(driver: Driver) -> None:
    """It calls no hooks of a response, so that a 401 is the caller's."""
    httmock, nexus = pytest.importorskip("httmock"), Nexus()

    @httmock.all_requests  # type: ignore[untyped-decorator]
    def answer(_: Any, request: Any) -> Any:
        return httmock.response(*nexus.answer_to(request))

    with httmock.HTTMock(answer):
        for client in clients(driver):
            assert driver.get(client, CUSTOMER).json == {"authorization": f"Bearer t{nexus.tokens}"}
            nexus.revoke()
            assert driver.get(client, CUSTOMER).status == 401


TOKEN = {"access_token": "t", "token_type": "Bearer", "expires_in": 3600}


def mock_with_content() -> Any:
    return unittest.mock.Mock(status_code=200, content=json.dumps(TOKEN).encode(), history=[], json=lambda: TOKEN)


def mock_with_json() -> Any:
    return unittest.mock.MagicMock(status_code=200, history=[], json=lambda: TOKEN)


@ON_REQUESTS
@pytest.mark.parametrize("answer", [bare_response, mock_with_content, mock_with_json])
def test_patched_session(driver: Driver, answer: Callable[[], Any]) -> None:
    for client in clients(driver):
        with unittest.mock.patch("requests.Session.send", side_effect=lambda *_, **__: answer()) as send:
            assert client.get(CUSTOMER).json() == TOKEN
        assert [call.args[-1].url for call in send.call_args_list] == [TEST.token_endpoint, CUSTOMER]


@ON_REQUESTS
def test_patched_adapter_with_a_bare_response(driver: Driver) -> None:
    for client in clients(driver):
        answers = [bare_response(), bare_response(), bare_response(401)]
        with unittest.mock.patch("requests.adapters.HTTPAdapter.send", side_effect=answers) as send:
            assert client.get(CUSTOMER).json() == TOKEN
            assert client.get(CUSTOMER).status_code == 401
        assert [call.args[0].url for call in send.call_args_list] == [TEST.token_endpoint, CUSTOMER, CUSTOMER]


@pytest.mark.parametrize("driver", BLOCKING, indirect=True)
@pytest.mark.parametrize("kind", [unittest.mock.Mock, unittest.mock.MagicMock])
@pytest.mark.parametrize("wraps", [False, True])
def test_what_is_lent_is_a_mock(driver: Driver, kind: Any, wraps: bool) -> None:
    """Nothing goes to the network beside it."""
    real = driver.client()
    lent = kind(spec=type(real), wraps=real if wraps else None)
    lent.send.side_effect = lambda *_, **__: token_of(driver)
    assert driver.access_token(driver.door.NexusAuth(*CREDENTIALS, **driver.lend(lent))) == "t"
    assert lent.send.call_count == 1


@pytest.mark.parametrize("driver", BLOCKING, indirect=True)
@pytest.mark.parametrize("autospec", [None, True])
def test_a_patched_subclass_is_lent(driver: Driver, autospec: Any) -> None:
    kind = type("Mine", (type(driver.client()),), {})
    answer: dict[str, Any] = {"side_effect": lambda *_, **__: token_of(driver), "autospec": autospec}
    with unittest.mock.patch.object(kind, "send", **answer) as send:
        with kind() as lent:
            assert driver.access_token(driver.door.NexusAuth(*CREDENTIALS, **driver.lend(lent))) == "t"
        assert send.call_count == 1


def token_of(driver: Driver) -> Any:
    """Return a response of the library, with a token in it."""
    return driver.library.Response(200, json=TOKEN) if driver.lent_as == "client" else bare_response()


@ON_HTTPX
def test_a_client_that_makes_clients_is_replaced(driver: Driver, sandbox: NexusSandbox) -> None:
    """As tests do to give each client another option."""
    client = driver.client(driver.auth(sandbox))
    name = type(client).__name__
    kind = getattr(driver.library, name)
    for other in (functools.partial(kind, timeout=5), unittest.mock.Mock(wraps=kind)):
        forget_tokens()
        with unittest.mock.patch.object(driver.library, name, other):
            assert driver.get(client, url(sandbox)).status == 200


@ON_REQUESTS
def test_an_adapter_that_is_a_mock(driver: Driver) -> None:
    adapter = unittest.mock.create_autospec(driver.library.adapters.HTTPAdapter, instance=True)
    adapter.send.side_effect = lambda *_, **__: bare_response()
    client = driver.keep(driver.from_factory(*CREDENTIALS))
    client.mount("https://", adapter)
    assert client.get(CUSTOMER).json() == TOKEN
    assert adapter.send.call_count == 2


# Recorded, watched and cached


def test_vcrpy(driver: Driver, sandbox: NexusSandbox, tmp_path: Path) -> None:
    cassette, vcr = tmp_path / "cassette.yaml", pytest.importorskip("vcr")
    client = driver.client(driver.auth(sandbox))
    for record_mode in ("once", "none"):
        forget_tokens()
        options = {"filter_post_data_parameters": ["client_secret"], "match_on": ("method", "uri")}
        with vcr.use_cassette(str(cassette), record_mode=record_mode, **options):
            assert driver.get(client, url(sandbox)).status == 200
            sandbox.revoke_tokens()
            assert driver.get(client, url(sandbox)).status == 200
        assert (len(sandbox.token_requests), len(sandbox.requests)) == (2, 3)
    assert sandbox.client_secret not in cassette.read_text()


INSTRUMENTORS = {
    "requests": "requests.RequestsInstrumentor",
    "httpx": "httpx.HTTPXClientInstrumentor",
    "httpx-asyncio": "httpx.HTTPXClientInstrumentor",
}


@pytest.mark.parametrize(
    ("driver", "instrumentor"),
    [(name, INSTRUMENTORS[name]) for name in INSTALLED if name in INSTRUMENTORS],
    indirect=["driver"],
)
def test_opentelemetry(driver: Driver, sandbox: NexusSandbox, instrumentor: str) -> None:
    """A token request has a span of its own, without the secret."""
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    module, _, name = instrumentor.partition(".")
    watch = getattr(pytest.importorskip(f"opentelemetry.instrumentation.{module}"), name)()
    provider = trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    watch.instrument(tracer_provider=provider)
    try:
        assert driver.get(driver.ready_made(sandbox), "/customer").status == 200
    finally:
        watch.uninstrument()
    spans = memory.get_finished_spans()
    urls = [span.attributes.get("http.url", span.attributes.get("url.full")) for span in spans]
    assert urls == [sandbox.environment.token_endpoint, url(sandbox)]
    assert sandbox.client_secret not in "".join(span.to_json() for span in spans)


@ON_REQUESTS
@pytest.mark.skipif(not importlib.util.find_spec("requests_cache"), reason="requests-cache is not installed")
def test_requests_cache_installed_after_the_import(driver: Driver, sandbox: NexusSandbox) -> None:
    """It replaces `requests.Session`: sessions may then be of either class."""
    cache = importlib.import_module("requests_cache")
    older, auth = driver.client(), driver.auth(sandbox)
    cache.install_cache(backend="memory", allowable_methods=("GET", "POST"))
    try:
        driver.kind = driver.library.Session
        newer = driver.client()
        assert type(newer) is not type(older)
        made = [driver.ready_made(sandbox), driver.client(auth)]
        made += [driver.client(driver.auth(sandbox, session=lent)) for lent in (older, newer)]
        for number, client in enumerate(made, 1):
            forget_tokens()
            sandbox.revoke_tokens()
            assert driver.get(client, url(sandbox, f"/{number}")).status == 200
            assert len(sandbox.token_requests) == number  # none of them from the cache
    finally:
        cache.uninstall_cache()
