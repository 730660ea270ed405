"""The drivers: one for each way to make a call, all with the same methods, so that one test serves them all."""

from __future__ import annotations

import contextlib
import json as json_module
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from nexus_auth import Environment, forget_tokens
from nexus_auth.testing import NexusSandbox

# They override what a session says of TLS and proxies.
for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
    os.environ.pop(name, None)


class Reply(NamedTuple):
    """What came of a call, whichever library made it."""

    status: int
    body: bytes
    history: list[int]

    @property
    def json(self) -> Any:
        return json_module.loads(self.body)


class Driver:
    """One HTTP library used in one way."""

    errors: Any  # the door's module
    library: Any

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def auth(self, sandbox: NexusSandbox, **options: Any) -> Any:
        options = {"client_secret": sandbox.client_secret, "environment": sandbox.environment, **options}
        return self.door.NexusAuth(sandbox.client_id, **options)

    @property
    def door(self) -> Any:
        return __import__(f"nexus_auth.{self.library.__name__}", fromlist=["NexusAuth"])

    @property
    def library_error(self) -> type[Exception]:
        raise NotImplementedError

    def client(self, auth: Any = None, **options: Any) -> Any:
        """Return a plain client of the library, signed by `auth`."""
        raise NotImplementedError

    def ready_made(self, sandbox: NexusSandbox, **options: Any) -> Any:
        """Return a client from the door's factory."""
        raise NotImplementedError

    def send(self, client: Any, method: str, url: str, body: Any = None, **options: Any) -> Reply:
        """Make one call; `body` is whatever the library streams."""
        raise NotImplementedError

    def get(self, client: Any, url: str, **options: Any) -> Reply:
        return self.send(client, "GET", url, **options)

    def at_once(self, clients: list[Any], url: str) -> list[Any]:
        """Make one call with each of `clients`, all at the same moment; return replies and exceptions."""
        with ThreadPoolExecutor(len(clients)) as pool:
            return list(pool.map(lambda client: outcome(lambda: self.get(client, url)), clients))

    def generator(self, chunks: list[bytes]) -> Any:
        """Return a body that can be sent only once."""
        return (chunk for chunk in chunks)

    def close(self, client: Any) -> None:
        client.close()


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


class Requests(Driver):
    def __init__(self) -> None:
        import requests

        self.library = requests
        super().__init__("requests")

    @property
    def library_error(self) -> type[Exception]:
        return self.library.RequestException  # type: ignore[no-any-return]

    def client(self, auth: Any = None, **options: Any) -> Any:
        session = self.library.Session()
        session.auth = auth
        for name, value in options.items():
            setattr(session, name, value)
        return session

    def ready_made(self, sandbox: NexusSandbox, **options: Any) -> Any:
        return self.door.nexus_session(sandbox.client_id, sandbox.client_secret, sandbox.environment, **options)

    def send(self, client: Any, method: str, url: str, body: Any = None, **options: Any) -> Reply:
        response = client.request(method, url, data=body, **options)
        return Reply(response.status_code, response.content, [r.status_code for r in response.history])


class HTTPX(Driver):
    # To read a trust store takes longer than most tests, and most tests need none.
    defaults: ClassVar = {"follow_redirects": True, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}

    def __init__(self, library: Any) -> None:
        self.library = library
        super().__init__(library.__name__)

    @property
    def library_error(self) -> type[Exception]:
        return self.library.RequestError  # type: ignore[no-any-return]

    def client(self, auth: Any = None, **options: Any) -> Any:
        return self.library.Client(auth=auth, **{**self.defaults, **options})

    def ready_made(self, sandbox: NexusSandbox, **options: Any) -> Any:
        secret = sandbox.client_id, sandbox.client_secret
        return self.door.nexus_client(*secret, sandbox.environment, **{**self.defaults, **options})

    def send(self, client: Any, method: str, url: str, body: Any = None, **options: Any) -> Reply:
        response = client.request(method, url, content=body, **options)
        return Reply(response.status_code, response.content, [r.status_code for r in response.history])


class AsyncHTTPX(HTTPX):
    """The asynchronous client, in an event loop that lasts as long as the test."""

    def __init__(self, library: Any, backend: str) -> None:
        super().__init__(library)
        self.name = f"{library.__name__}-{backend}"
        self.backend = backend
        self.portal: BlockingPortal

    def client(self, auth: Any = None, **options: Any) -> Any:
        return self.library.AsyncClient(auth=auth, **{**self.defaults, **options})

    def ready_made(self, sandbox: NexusSandbox, **options: Any) -> Any:
        secret = sandbox.client_id, sandbox.client_secret
        return self.door.nexus_async_client(*secret, sandbox.environment, **{**self.defaults, **options})

    def send(self, client: Any, method: str, url: str, body: Any = None, **options: Any) -> Reply:
        async def call() -> Reply:
            response = await client.request(method, url, content=body, **options)
            return Reply(response.status_code, response.content, [r.status_code for r in response.history])

        return self.portal.call(call)

    def at_once(self, clients: list[Any], url: str) -> list[Any]:
        results: list[Any] = []

        async def one(client: Any) -> None:
            try:
                response = await client.get(url)
                results.append(Reply(response.status_code, response.content, []))
            except Exception as error:
                results.append(error)

        async def all_of_them() -> None:
            async with anyio.create_task_group() as group:
                for client in clients:
                    group.start_soon(one, client)

        self.portal.call(all_of_them)
        return results

    def generator(self, chunks: list[bytes]) -> Any:
        async def generate() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return generate()

    def close(self, client: Any) -> None:
        self.portal.call(client.aclose)


def drivers() -> Iterator[Driver]:
    """Yield a driver for each library that is installed."""
    with contextlib.suppress(ImportError):
        yield Requests()
    for name in ("httpx", "httpx2"):
        try:
            library = __import__(name)
        except ImportError:
            continue
        yield HTTPX(library)
        yield AsyncHTTPX(library, "asyncio")
        if name == "httpx":
            yield AsyncHTTPX(library, "trio")  # the doors share all that knows of event loops


DRIVERS = list(drivers())


@pytest.fixture(params=DRIVERS, ids=repr)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver: Driver = request.param
    if not isinstance(driver, AsyncHTTPX):
        yield driver
        return
    with start_blocking_portal(driver.backend) as driver.portal:
        yield driver


@pytest.fixture
def sandbox() -> Iterator[NexusSandbox]:
    with NexusSandbox() as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    yield
    forget_tokens()


@pytest.fixture
def signed(driver: Driver, sandbox: NexusSandbox) -> Iterator[Any]:
    """A plain client that is signed for the sandbox, and closed in the end."""
    client = driver.client(driver.auth(sandbox))
    yield client
    driver.close(client)


def closed_port() -> int:
    """Return a port of loopback on which nobody listens."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def nowhere() -> Environment:
    """Return an environment whose token endpoint refuses connections."""
    url = f"http://127.0.0.1:{closed_port()}"
    return Environment("nowhere", token_endpoint=f"{url}/connect/token", base_url=url)


class Clock:
    """A monotonic clock that is set by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


