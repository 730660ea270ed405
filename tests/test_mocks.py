"""Mocks that users have: token requests are seen by them as calls are, and none reaches the network beside them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import threading
import unittest.mock
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from conftest import INSTALLED, Driver, url

from nexus_auth import TEST, forget_tokens
from nexus_auth.testing import NexusSandbox

CUSTOMER = f"{TEST.base_url}/customer"
LOOPBACK = ("127.0.0.1", "localhost", "::1", None)
FORM = {"grant_type": "client_credentials", "scope": "api1", "client_id": "id", "client_secret": "s3cret"}


@pytest.fixture(autouse=True)
def looked_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Let no host be looked up or connected to but this one, and fail a test in which another was."""
    names: list[object] = []
    getaddrinfo, connect = socket.getaddrinfo, socket.socket.connect

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in LOOPBACK:
            names.append(host)
            raise socket.gaierror(f"{host} is out of reach")
        return getaddrinfo(host, *arguments, **options)

    def connect_here(self: socket.socket, address: Any) -> None:
        assert address[0] in LOOPBACK
        connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    yield names
    assert names == []


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

    def revoke(self) -> None:
        self.revoked = self.tokens


Mock = Callable[[Nexus, pytest.FixtureRequest], AbstractContextManager[None]]


@contextlib.contextmanager
def mocker(nexus: Nexus, request: pytest.FixtureRequest) -> Generator[None, None, None]:
    with pytest.importorskip("requests_mock").Mocker() as mock:
        register(mock, nexus)
        yield


@contextlib.contextmanager
def fixture_of_requests_mock(nexus: Nexus, request: pytest.FixtureRequest) -> Generator[None, None, None]:
    pytest.importorskip("requests_mock")
    register(request.getfixturevalue("requests_mock"), nexus)
    yield


def register(mock: Any, nexus: Nexus) -> None:
    """Have something of requests-mock (a Mocker, its fixture, an Adapter) answer."""

    def answer(request: Any, context: Any) -> dict[str, Any]:
        authorization = request.headers.get("Authorization")
        context.status_code, document = nexus.answer(request.method, request.url, authorization)
        return document

    for method, address in (("POST", TEST.token_endpoint), ("GET", CUSTOMER)):
        mock.register_uri(method, address, json=answer)


@contextlib.contextmanager
def responses(nexus: Nexus, request: pytest.FixtureRequest) -> Generator[None, None, None]:
    library = pytest.importorskip("responses")

    def answer(request: Any) -> tuple[int, dict[str, str], str]:
        status, document = nexus.answer(request.method, request.url, request.headers.get("Authorization"))
        return status, {}, json.dumps(document)

    with library.RequestsMock() as mock:
        match = [library.matchers.urlencoded_params_matcher(FORM)]
        mock.add_callback("POST", TEST.token_endpoint, callback=answer, match=match)
        mock.add_callback("GET", CUSTOMER, callback=answer)
        yield


@contextlib.contextmanager
def patched_adapter(nexus: Nexus, request: pytest.FixtureRequest) -> Generator[None, None, None]:
    requests = pytest.importorskip("requests")

    def send(adapter: Any, prepared: Any, **_: Any) -> Any:
        response = requests.Response()
        authorization = prepared.headers.get("Authorization")
        response.status_code, document = nexus.answer(prepared.method, prepared.url, authorization)
        response._content = json.dumps(document).encode()
        response.request, response.connection = prepared, adapter
        return response

    with unittest.mock.patch.object(requests.adapters.HTTPAdapter, "send", autospec=True, side_effect=send):
        yield


def answer_of_httpx(nexus: Nexus, response: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function from a request to a `response` of httpx or httpx2."""

    def answer(request: Any, **_: Any) -> Any:
        status, document = nexus.answer(request.method, str(request.url), request.headers.get("Authorization"))
        return response(status, json=document)

    return answer


@contextlib.contextmanager
def respx(nexus: Nexus, request: pytest.FixtureRequest) -> Generator[None, None, None]:
    library = pytest.importorskip("respx")
    with library.mock as mock:
        answer = answer_of_httpx(nexus, library.MockResponse)
        mock.post(TEST.token_endpoint, data=FORM).mock(side_effect=answer)
        mock.get(CUSTOMER).mock(side_effect=answer)
        yield


@contextlib.contextmanager
def pytest_httpx(nexus: Nexus, request: pytest.FixtureRequest) -> Generator[None, None, None]:
    pytest.importorskip("pytest_httpx")
    answer = answer_of_httpx(nexus, pytest.importorskip("httpx").Response)
    request.getfixturevalue("httpx_mock").add_callback(answer, is_reusable=True)
    yield


@contextlib.contextmanager
def pytest_httpx2(nexus: Nexus, request: pytest.FixtureRequest) -> Generator[None, None, None]:
    pytest.importorskip("pytest_httpx2")
    router = request.getfixturevalue("httpx2_mock")
    answer = answer_of_httpx(nexus, pytest.importorskip("respx").MockResponse)
    router.post(TEST.token_endpoint, data=FORM).mock(side_effect=answer)
    router.get(CUSTOMER).mock(side_effect=answer)
    yield


MOCKS: dict[str, list[Mock]] = {
    "requests": [mocker, fixture_of_requests_mock, responses, patched_adapter],
    "httpx": [respx, pytest_httpx],
    "httpx2": [pytest_httpx2],
}
MOCKED = [(name, mock) for name in INSTALLED if name != "httpx-trio" for mock in MOCKS[name.partition("-")[0]]]


def credentials() -> tuple[str, str, str]:
    return FORM["client_id"], FORM["client_secret"], TEST.name


def plain(driver: Driver) -> Any:
    return driver.client(driver.door.NexusAuth(*credentials()))


def lent_another(driver: Driver) -> Any:
    return driver.client(driver.door.NexusAuth(*credentials(), **driver.lend(driver.client())))


def ready_made(driver: Driver) -> Any:
    return driver.keep(driver.from_factory(*credentials()))


@pytest.mark.parametrize("make", [plain, lent_another, ready_made])
@pytest.mark.parametrize(
    ("driver", "mock"), MOCKED, indirect=["driver"], ids=[f"{name}-{mock.__name__}" for name, mock in MOCKED]
)
def test_nothing_goes_beside_a_mock(
    driver: Driver, mock: Mock, make: Callable[[Driver], Any], request: pytest.FixtureRequest
) -> None:
    nexus = Nexus()
    with mock(nexus, request):
        client = make(driver)
        assert driver.get(client, CUSTOMER).json == {"authorization": "Bearer t1"}
        nexus.revoke()
        assert driver.get(client, CUSTOMER).json == {"authorization": "Bearer t2"}
    post, get = f"POST {TEST.token_endpoint}", f"GET {CUSTOMER}"
    assert nexus.calls == [post, get, get, post, get]
    assert len(nexus.threads) == 1  # a mock may hold a lock while it answers


# What is mocked on one session or client has to be lent


ON_REQUESTS = pytest.mark.parametrize("driver", [name for name in INSTALLED if name == "requests"], indirect=True)
ON_HTTPX = pytest.mark.parametrize("driver", [name for name in INSTALLED if name != "requests"], indirect=True)


def assert_mended(driver: Driver, client: Any, nexus: Nexus) -> None:
    """Make a call with a token, and one with another after a 401."""
    assert driver.get(client, CUSTOMER).status == 200
    nexus.revoke()
    assert driver.get(client, CUSTOMER).status == 200
    assert nexus.tokens == 2


@ON_REQUESTS
def test_mocker_of_one_session(driver: Driver) -> None:
    requests_mock = pytest.importorskip("requests_mock")
    lent = driver.client()
    for client in (ready_made(driver), driver.client(driver.door.NexusAuth(*credentials(), session=lent))):
        nexus = Nexus()
        with contextlib.ExitStack() as stack:
            for session in {client, lent}:
                register(stack.enter_context(requests_mock.Mocker(session=session)), nexus)
            assert_mended(driver, client, nexus)
        forget_tokens()


@ON_REQUESTS
def test_mounted_adapter_of_requests_mock(driver: Driver) -> None:
    adapter, nexus = pytest.importorskip("requests_mock").Adapter(), Nexus()
    register(adapter, nexus)
    client = ready_made(driver)
    client.mount("https://", adapter)
    assert_mended(driver, client, nexus)


@ON_HTTPX
def test_mock_transport(driver: Driver) -> None:
    library = driver.library
    for argument in ("transport", "mounts"):
        nexus = Nexus()
        transport = library.MockTransport(answer_of_httpx(nexus, library.Response))
        option = {"transport": transport, "mounts": {"https://": transport}}[argument]
        assert_mended(driver, driver.keep(driver.from_factory(*credentials(), **{argument: option})), nexus)
        forget_tokens()


# Mocks that call no hooks, or answer with next to nothing


@ON_REQUESTS
@pytest.mark.parametrize("make", [plain, lent_another, ready_made])
def test_httmock(driver: Driver, make: Callable[[Driver], Any]) -> None:
    """It calls no hooks of a response, so that a 401 is the caller's."""
    httmock, nexus = pytest.importorskip("httmock"), Nexus()

    @httmock.all_requests  # type: ignore[untyped-decorator]
    def answer(url: Any, request: Any) -> Any:
        return httmock.response(*nexus.answer(request.method, request.url, request.headers.get("Authorization")))

    with httmock.HTTMock(answer):
        client = make(driver)
        assert driver.get(client, CUSTOMER).json == {"authorization": "Bearer t1"}
        nexus.revoke()
        assert driver.get(client, CUSTOMER).status == 401


TOKEN = {"access_token": "t", "token_type": "Bearer", "expires_in": 3600}


def bare_response() -> Any:
    response = pytest.importorskip("requests").Response()
    response.status_code, response._content = 200, json.dumps(TOKEN).encode()
    return response


def mock_with_content() -> Any:
    response = unittest.mock.Mock(status_code=200, content=json.dumps(TOKEN).encode(), history=[])
    response.json.return_value = TOKEN
    return response


def mock_with_json() -> Any:
    response = unittest.mock.MagicMock(status_code=200, history=[])
    response.json.return_value = TOKEN
    return response


@ON_REQUESTS
@pytest.mark.parametrize("make", [plain, lent_another, ready_made])
@pytest.mark.parametrize("answer", [bare_response, mock_with_content, mock_with_json])
def test_patched_session(driver: Driver, make: Callable[[Driver], Any], answer: Callable[[], Any]) -> None:
    with unittest.mock.patch("requests.Session.send", side_effect=lambda *_, **__: answer()) as send:
        assert make(driver).get(CUSTOMER).json() == TOKEN
    assert [call.args[-1].url for call in send.call_args_list] == [TEST.token_endpoint, CUSTOMER]


@ON_REQUESTS
@pytest.mark.parametrize("make", [plain, lent_another, ready_made])
def test_patched_adapter_with_a_bare_response(driver: Driver, make: Callable[[Driver], Any]) -> None:
    answers = [bare_response(), bare_response(), bare_response()]
    answers[2].status_code = 401
    with unittest.mock.patch("requests.adapters.HTTPAdapter.send", side_effect=answers) as send:
        client = make(driver)
        assert client.get(CUSTOMER).json() == TOKEN
        assert client.get(CUSTOMER).status_code == 401
    assert [call.args[0].url for call in send.call_args_list] == [TEST.token_endpoint, CUSTOMER, CUSTOMER]


@ON_REQUESTS
def test_an_adapter_that_is_a_mock(driver: Driver) -> None:
    adapter = unittest.mock.create_autospec(driver.library.adapters.HTTPAdapter, instance=True)
    adapter.send.side_effect = lambda *_, **__: bare_response()
    client = ready_made(driver)
    client.mount("https://", adapter)
    assert client.get(CUSTOMER).json() == TOKEN
    assert adapter.send.call_count == 2


def test_a_send_of_the_lent_object_itself(driver: Driver, sandbox: NexusSandbox) -> None:
    lent = driver.client()
    send = unittest.mock.Mock(side_effect=lent.send)
    lent.send = send
    client = driver.client(driver.auth(sandbox, **driver.lend(lent)))
    assert driver.get(client, url(sandbox)).status == 200
    assert send.call_count == len(sandbox.token_requests) == 1


# Recorded, watched and cached


def test_vcrpy(driver: Driver, sandbox: NexusSandbox, tmp_path: Path) -> None:
    cassette, vcr = tmp_path / "cassette.yaml", pytest.importorskip("vcr")
    client = driver.client(driver.auth(sandbox))

    def replies() -> list[int]:
        first = driver.get(client, url(sandbox)).status
        sandbox.revoke_tokens()
        return [first, driver.get(client, url(sandbox)).status]

    options = {"filter_post_data_parameters": ["client_secret"], "match_on": ("method", "uri")}
    with vcr.use_cassette(str(cassette), **options):
        assert replies() == [200, 200]
    assert (len(sandbox.token_requests), len(sandbox.requests)) == (2, 3)
    assert sandbox.client_secret not in cassette.read_text()
    forget_tokens()
    with vcr.use_cassette(str(cassette), record_mode="none", **options):
        assert replies() == [200, 200]
    assert (len(sandbox.token_requests), len(sandbox.requests)) == (2, 3)


INSTRUMENTORS = {
    "requests": "requests.RequestsInstrumentor",
    "httpx": "httpx.HTTPXClientInstrumentor",
    "httpx-asyncio": "httpx.HTTPXClientInstrumentor",
}
INSTRUMENTED = [(name, INSTRUMENTORS[name]) for name in INSTALLED if name in INSTRUMENTORS]


@pytest.mark.parametrize(("driver", "instrumentor"), INSTRUMENTED, indirect=["driver"])
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
        newer = driver.client()
        assert type(newer) is not type(older)
        clients = [driver.ready_made(sandbox), driver.client(auth)]
        clients += [driver.client(driver.auth(sandbox, session=lent)) for lent in (older, newer)]
        for number, client in enumerate(clients, 1):
            forget_tokens()
            sandbox.revoke_tokens()
            assert driver.get(client, url(sandbox, f"/{number}")).status == 200
            assert len(sandbox.token_requests) == number  # none of them from the cache
    finally:
        cache.uninstall_cache()
