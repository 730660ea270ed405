"""Drivers, sandboxes and small helpers that the tests share.

A test that takes the fixture `driver` runs once for each HTTP library that is installed, and each way to use it. All
drivers have the same methods, so that no test asks which one it has.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import anyio
import pytest
import trustme
from anyio.from_thread import start_blocking_portal
from server import Server, closed_port, running_server

from nexus_auth import Environment, forget_tokens, grant
from nexus_auth.credentials import Credentials, credentials_of
from nexus_auth.secret import HiddenText
from nexus_auth.steps import Client
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

D = TypeVar("D", bound="Driver")
S = TypeVar("S", bound=NexusSandbox)
T = TypeVar("T")
P = ParamSpec("P")


class Reply(NamedTuple):
    """What came of a call: status and body of the answer, and the status of each answer that it took the place of."""

    status: int
    body: bytes
    history: list[int]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @classmethod
    def of(cls, response: Any) -> Reply:
        return cls(response.status_code, response.content, [earlier.status_code for earlier in response.history])


@dataclass(frozen=True)
class Sent:
    """A request that a client sends, and the origin to which its library would connect for that URL."""

    origin: tuple[str, str, int]  # scheme, host and port
    url: str
    authorization: str | None


@dataclass(frozen=True)
class Answered:
    """What a function of a test answers to a request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


Answer = Callable[[Sent], Answered]
DEFAULT_PORTS = {"http": 80, "https": 443}


class Driver(ABC):
    """One HTTP library, used in one way. Entered, it closes in the end what it has made."""

    library: Any
    kind: Any  # of session or client; a test may set a subclass
    library_error: type[Exception]
    connection_error: type[Exception]
    timeout_error: type[Exception]
    lent_as: ClassVar[str]  # the argument of NexusAuth that lends a client
    body_option: ClassVar[str]  # the option of a call for a raw body

    def __init__(self, library_name: str) -> None:
        self.library = importlib.import_module(library_name)
        self.door = importlib.import_module(f"nexus_auth.{library_name}")

    def __enter__(self: D) -> D:
        with contextlib.ExitStack() as stack:
            self.open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, stack: contextlib.ExitStack) -> None:
        """Open what is needed; `stack` closes it in the end, the last first."""
        self._threads = stack.enter_context(ThreadPoolExecutor(64))

    def auth(self, sandbox: NexusSandbox, **options: Any) -> Any:
        """Return a `NexusAuth` for `sandbox`; `options` may be any of its arguments, the first three too."""
        arguments = {
            "client_id": sandbox.client_id, "client_secret": sandbox.client_secret, "environment": sandbox.environment,
        }  # fmt: skip
        return self.door.NexusAuth(**{**arguments, **options})

    def client(self, auth: Any = None, **options: Any) -> Any:
        """Return a plain session or client of the library, signed by `auth`."""
        return self.keep(self.new_client(auth, options))

    def ready_made(self, sandbox: NexusSandbox, **options: Any) -> Any:
        """Return a session or client from the door's factory."""
        return self.keep(self.from_factory(sandbox.client_id, sandbox.client_secret, sandbox.environment, **options))

    def keep(self, client: Any) -> Any:
        """Return `client`, and close it in the end."""
        self._stack.callback(self.close, client)
        return client

    @abstractmethod
    def client_without_network(self, answer: Answer) -> Any:
        """Return a client whose every request, wherever it goes, is answered by a function."""

    @abstractmethod
    def client_through_proxy(self, proxy_url: str) -> Any:
        """Return a client all of whose requests go through a proxy."""

    @abstractmethod
    def new_client(self, auth: Any, options: dict[str, Any]) -> Any: ...

    @abstractmethod
    def from_factory(self, *credentials: Any, **options: Any) -> Any:
        """Return what the door's factory returns; `keep` closes it."""

    def send(self, client: Any, method: str, url: str, body: Any = None, **options: Any) -> Reply:
        """Make one call; `body` is bytes, or whatever the library streams, and `options` are those of a request."""
        if body is not None:
            options[self.body_option] = body
        return self.request(client, method, url, options)

    @abstractmethod
    def request(self, client: Any, method: str, url: str, options: dict[str, Any]) -> Reply: ...

    def get(self, client: Any, url: str, **options: Any) -> Reply:
        return self.send(client, "GET", url, **options)

    @abstractmethod
    def on_response(self, client: Any, call: Callable[[Any], object]) -> None:
        """Have the library call a hook of `client` with each response, before its body is read."""

    @abstractmethod
    def status_of(self, client: Any, url: str) -> int:
        """Return the status of an answer whose body is left where it is, for `stream`."""

    @abstractmethod
    def at_once(self, clients: Iterable[Any], url: str) -> list[Reply | Exception]:
        """Make one call with each of `clients`, all at the same time; return what came of each, in their order."""

    def in_background(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """Make a call in a thread. Take the fixture `driver` before a sandbox that holds its answers back."""
        return self._threads.submit(call, *arguments, **options)

    @abstractmethod
    def access_token(self, auth: Any, refused: str | None = None) -> str:
        """Return the token for what is no HTTP call."""

    def lend(self, client: Any) -> dict[str, Any]:
        """Return the argument of `NexusAuth` that lends `client`."""
        return {self.lent_as: client}

    @abstractmethod
    def generator(self, chunks: Iterable[bytes]) -> Any:
        """Return a body that can be sent only once."""

    @abstractmethod
    def close(self, client: Any) -> None: ...


class BlockingDriver(Driver):
    """The calls of a library that block, each in the thread that makes it."""

    def request(self, client: Any, method: str, url: str, options: dict[str, Any]) -> Reply:
        return Reply.of(client.request(method, url, **options))

    def at_once(self, clients: Iterable[Any], url: str) -> list[Reply | Exception]:
        calls = [self.in_background(self.get, client, url) for client in clients]
        return [outcome(call.result) for call in calls]

    def access_token(self, auth: Any, refused: str | None = None) -> str:
        token: str = auth.access_token(refused=refused)
        return token

    def generator(self, chunks: Iterable[bytes]) -> Any:
        return (chunk for chunk in chunks)

    def close(self, client: Any) -> None:
        client.close()


class RequestsDriver(BlockingDriver):
    """A session of requests."""

    lent_as = "session"
    body_option = "data"

    def __init__(self, library_name: str) -> None:
        super().__init__(library_name)
        self.kind = self.library.Session
        self.library_error = self.library.RequestException
        self.connection_error = self.library.ConnectionError
        self.timeout_error = self.library.Timeout

    def new_client(self, auth: Any, options: dict[str, Any]) -> Any:
        session = self.kind()
        for name, value in {"auth": auth, **options}.items():
            setattr(session, name, value)
        return session

    def from_factory(self, *credentials: Any, **options: Any) -> Any:
        return self.door.nexus_session(*credentials, **options)

    def client_through_proxy(self, proxy_url: str) -> Any:
        return self.client(proxies={"http": proxy_url, "https": proxy_url})

    def client_without_network(self, answer: Answer) -> Any:
        import urllib3

        class Adapter(self.library.adapters.HTTPAdapter):  # type: ignore[misc,name-defined]
            def send(self, request: Any, **_: Any) -> Any:
                connect = getattr(self, "get_connection_with_tls_context", None)  # since requests 2.32
                pool = connect(request, True) if connect else self.get_connection(request.url)
                origin = pool.scheme, pool.host.strip("[]"), pool.port or DEFAULT_PORTS[pool.scheme]
                answered = answer(Sent(origin, request.url, request.headers.get("Authorization")))
                raw = urllib3.HTTPResponse(
                    io.BytesIO(answered.body), answered.headers, answered.status, preload_content=False
                )
                return self.build_response(request, raw)

        client = self.client(trust_env=False)
        client.mount("http://", Adapter())
        client.mount("https://", Adapter())
        return client

    def on_response(self, client: Any, call: Callable[[Any], object]) -> None:
        def hook(response: Any, **_: Any) -> None:
            call(response)

        client.hooks["response"].append(hook)

    def status_of(self, client: Any, url: str) -> int:
        with client.get(url, stream=True) as response:
            status: int = response.status_code
            return status


class HTTPXDriver(BlockingDriver):
    """A client of httpx or httpx2."""

    lent_as = "client"
    body_option = "content"
    # To read a trust store takes longer than most tests, and most tests need none.
    defaults: ClassVar = {"follow_redirects": True, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}

    def __init__(self, library_name: str) -> None:
        super().__init__(library_name)
        self.kind = self.library.Client
        self.library_error = self.library.RequestError
        self.connection_error = self.library.ConnectError
        self.timeout_error = self.library.TimeoutException

    def new_client(self, auth: Any, options: dict[str, Any]) -> Any:
        return self.kind(auth=auth, **{**self.defaults, **options})

    def from_factory(self, *credentials: Any, **options: Any) -> Any:
        return self.door.nexus_client(*credentials, **{**self.defaults, **options})

    def client_through_proxy(self, proxy_url: str) -> Any:
        return self.client(proxy=proxy_url)

    def client_without_network(self, answer: Answer) -> Any:
        def handle(request: Any) -> Any:
            host = request.url.raw_host.decode().strip("[]")
            origin = request.url.scheme, host, request.url.port or DEFAULT_PORTS[request.url.scheme]
            answered = answer(Sent(origin, str(request.url), request.headers.get("Authorization")))
            headers = [(name.encode(), value.encode()) for name, value in answered.headers.items()]
            return self.library.Response(answered.status, headers=headers, content=answered.body)

        return self.client(transport=self.library.MockTransport(handle), trust_env=False)

    def on_response(self, client: Any, call: Callable[[Any], object]) -> None:
        client.event_hooks = {"response": [call]}

    def status_of(self, client: Any, url: str) -> int:
        with client.stream("GET", url) as response:
            status: int = response.status_code
            return status


class AsyncHTTPXDriver(HTTPXDriver):
    """An asynchronous client of httpx or httpx2, in one event loop that lasts as long as the driver is open."""

    def __init__(self, library_name: str, backend: str) -> None:
        super().__init__(library_name)
        self.kind = self.library.AsyncClient
        self.backend = backend

    def open(self, stack: contextlib.ExitStack) -> None:
        self.portal = stack.enter_context(start_blocking_portal(self.backend))
        super().open(stack)

    def from_factory(self, *credentials: Any, **options: Any) -> Any:
        return self.door.nexus_async_client(*credentials, **{**self.defaults, **options})

    def request(self, client: Any, method: str, url: str, options: dict[str, Any]) -> Reply:
        async def call() -> Reply:
            return Reply.of(await client.request(method, url, **options))

        return self.portal.call(call)

    def on_response(self, client: Any, call: Callable[[Any], object]) -> None:
        async def hook(response: Any) -> None:
            call(response)

        client.event_hooks = {"response": [hook]}

    def status_of(self, client: Any, url: str) -> int:
        async def call() -> int:
            async with client.stream("GET", url) as response:
                status: int = response.status_code
                return status

        return self.portal.call(call)

    def at_once(self, clients: Iterable[Any], url: str) -> list[Reply | Exception]:
        replies: dict[int, Reply | Exception] = {}

        async def call(number: int, client: Any) -> None:
            try:
                replies[number] = Reply.of(await client.get(url))
            except Exception as error:
                replies[number] = error

        async def call_all() -> None:
            async with anyio.create_task_group() as tasks:
                for number, client in enumerate(clients):
                    tasks.start_soon(call, number, client)

        self.portal.call(call_all)
        return [replies[number] for number in sorted(replies)]

    def access_token(self, auth: Any, refused: str | None = None) -> str:
        async def call() -> str:
            token: str = await auth.async_access_token(refused=refused)
            return token

        return self.portal.call(call)

    def generator(self, chunks: Iterable[bytes]) -> Any:
        async def generate() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return generate()

    def close(self, client: Any) -> None:
        self.portal.call(client.aclose)


# One backend is enough for httpx2: the doors share all that knows of event loops.
DRIVERS: dict[str, Callable[[], Driver]] = {
    "requests": lambda: RequestsDriver("requests"),
    "httpx": lambda: HTTPXDriver("httpx"),
    "httpx-asyncio": lambda: AsyncHTTPXDriver("httpx", "asyncio"),
    "httpx-trio": lambda: AsyncHTTPXDriver("httpx", "trio"),
    "httpx2": lambda: HTTPXDriver("httpx2"),
    "httpx2-asyncio": lambda: AsyncHTTPXDriver("httpx2", "asyncio"),
}
INSTALLED = [name for name in DRIVERS if importlib.util.find_spec(name.partition("-")[0])]
BLOCKING = [name for name in INSTALLED if "-" not in name]  # one for each library
ON_REQUESTS = pytest.mark.parametrize("driver", [name for name in INSTALLED if name == "requests"], indirect=True)
ON_HTTPX = pytest.mark.parametrize("driver", [name for name in INSTALLED if name != "requests"], indirect=True)


@pytest.fixture(params=INSTALLED)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with DRIVERS[request.param]() as driver:
        yield driver


@pytest.fixture
def doors() -> Iterator[list[Driver]]:
    """All drivers, to be used side by side."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(DRIVERS[name]()) for name in INSTALLED]


@pytest.fixture(params=BLOCKING)
def door(request: pytest.FixtureRequest) -> ModuleType:
    """The module of each library."""
    return DRIVERS[request.param]().door


def makers(door: Any) -> list[Callable[..., Any]]:
    """Return all that takes the arguments of a `NexusAuth`."""
    names = ("NexusAuth", "nexus_session", "nexus_client", "nexus_async_client")
    return [getattr(door, name) for name in names if hasattr(door, name)]


class GatedSandbox(NexusSandbox):
    """A sandbox that holds back its answers to token requests until `gate` is set."""

    def __enter__(self: S) -> S:
        self.gate.clear()
        return super().__enter__()

    def arrived(self, token_requests: int) -> None:
        """Wait until so many token requests have arrived."""
        self.wait_for(token_requests=token_requests)


@pytest.fixture
def sandbox() -> Iterator[NexusSandbox]:
    with NexusSandbox() as sandbox:
        yield sandbox


@pytest.fixture
def stranger() -> Iterator[NexusSandbox]:
    """Another host, which takes part in nothing."""
    with NexusSandbox() as stranger:
        yield stranger


@pytest.fixture
def gated() -> Iterator[GatedSandbox]:
    gated = GatedSandbox()
    with gated:
        yield gated


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def context(authority: trustme.CA) -> ssl.SSLContext:
    """The TLS context of a server that `authority` vouches for."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def secured(context: ssl.SSLContext) -> Iterator[NexusSandbox]:
    with NexusSandbox(ssl_context=context) as secured:
        yield secured


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    yield
    forget_tokens()


@pytest.fixture(autouse=True, scope="session")
def environment_variables() -> Iterator[None]:
    """Keep out what the libraries and nexus_auth would read from the environment of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.upper().endswith(("_PROXY", "_CA_BUNDLE")) or name.startswith(("SSL_CERT_", "NEXUS_")):
                patch.delenv(name)
        patch.setenv("NETRC", os.devnull)
        yield


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again after a few milliseconds, where no Retry-After says otherwise."""
    monkeypatch.setattr(grant, "BACKOFF", 0.001)
    monkeypatch.setattr(grant, "BUSY_PAUSE", 0.001)


def url(sandbox: NexusSandbox, path: str = "/customer") -> str:
    return sandbox.environment.base_url + path


def outcome(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | Exception:
    """Return what `call` returns or raises."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return error


def nowhere() -> Environment:
    """Return an environment whose hosts refuse connections."""
    base_url = f"http://127.0.0.1:{closed_port()}"
    return Environment("nowhere", token_endpoint=f"{base_url}/connect/token", base_url=base_url)


@dataclass
class Clock:
    """A clock that is set by hand, in seconds."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def statuses(replies: Iterable[Reply | Exception]) -> set[object]:
    """Return the statuses of replies, and what is no reply as it is."""
    return {reply.status if isinstance(reply, Reply) else reply for reply in replies}


Log = Callable[[], list[tuple[str, str]]]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """A function that returns the levels and messages that nexus_auth has logged since the last look."""
    caplog.set_level(logging.DEBUG, "nexus_auth")

    def look() -> list[tuple[str, str]]:
        records = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "nexus_auth"]
        caplog.clear()
        return records

    return look


@pytest.fixture
def in_variables(sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> NexusSandbox:
    """A sandbox that the environment variables lead to."""
    monkeypatch.setenv("NEXUS_CLIENT_ID", sandbox.client_id)
    monkeypatch.setenv("NEXUS_CLIENT_SECRET", sandbox.client_secret)
    monkeypatch.setenv("NEXUS_TOKEN_ENDPOINT", sandbox.environment.token_endpoint)
    monkeypatch.setenv("NEXUS_BASE_URL", sandbox.environment.base_url)
    return sandbox


def known_credentials(environment: Environment, client_id: str, client_secret: str) -> Credentials:
    """Return what is known of an API client."""
    return credentials_of(Client(environment.token_endpoint, client_id, HiddenText(client_secret), "api1"))


def grow_old(environment: Environment, client_id: str, client_secret: str, left: float) -> None:
    """Leave the token so many seconds to live, and no more than half of its life."""
    credentials = known_credentials(environment, client_id, client_secret)
    now, token = time.monotonic(), credentials.known.token
    assert token is not None
    old = replace(token, expires_at=now + left, half_life=now - 1)
    credentials.known = replace(credentials.known, token=old)


def grow_old_in(sandbox: NexusSandbox, left: float) -> None:
    grow_old(sandbox.environment, sandbox.client_id, sandbox.client_secret, left)


# Servers for stores


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Run a server that a test may spoil."""
    with running_server(tmp_path) as server:
        yield server


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the number of simulated worlds be chosen: `pytest tests/test_simulation.py --worlds 5000`."""
    parser.addoption("--worlds", type=int, default=40, help="how many random worlds are simulated")
    parser.addoption("--first-world", type=int, default=0, help="the seed of the first of them")
