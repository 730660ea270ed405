"""`timeout` and `max_wait` as a whole: token endpoints that answer slowly, wrongly or without end."""

from __future__ import annotations

import contextlib
import gc
import gzip
import socket
import ssl
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import anyio
import pytest
import trustme
import urllib3
from conftest import INSTALLED, Driver, outcome

from nexus_auth import Environment, TokenRequestError, _httpx_flow, grant
from nexus_auth.testing import NexusSandbox
from nexus_auth.threads import cut_off_at

TIMEOUT = 0.6
SOON, TOO_LATE = 0.4, 0.5  # seconds, both of which are less than TIMEOUT, and together more: a token comes after these
TOKEN = b'{"access_token": "t", "token_type": "Bearer"}'
Answer = list[bytes | float]  # what is sent, and for how many seconds nothing is
Serve = Callable[..., Environment]
Call = Callable[[Driver], str]

pytestmark = pytest.mark.usefixtures("one_try")


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grant, "TRIES", 1)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a server with one answer to all requests, and returns the environment that asks it."""
    is_over = threading.Event()
    listeners: list[socket.socket] = []
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def in_thread(function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments)
        threads.append(thread)
        thread.start()

    def converse(connection: socket.socket, answer: Answer, context: ssl.SSLContext | None, pause: float) -> None:
        connection.settimeout(10)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            is_over.wait(pause)
            if context is not None:
                connection = stack.enter_context(context.wrap_socket(connection, server_side=True))
            connections.append(connection)
            request = b""
            while not request.endswith(b"client_secret=s3cret"):  # else what is left would reset the connection
                request += connection.recv(65536) or b"client_secret=s3cret"
            for piece in answer:
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                elif is_over.wait(piece):
                    break

    def accept(listener: socket.socket, *how: Any) -> None:
        while True:
            connection = listener.accept()[0]
            if is_over.is_set():
                return connection.close()
            in_thread(converse, connection, *how)

    def start(answer: Answer, *, context: ssl.SSLContext | None = None, before_tls: float = 0.0) -> Environment:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        in_thread(accept, listener, answer, context, before_tls)
        base_url = f"{'https' if context else 'http'}://localhost:{listener.getsockname()[1]}"
        return Environment("raw", token_endpoint=f"{base_url}/connect/token", base_url=base_url)

    yield start
    is_over.set()
    for listener in listeners:
        socket.create_connection(listener.getsockname()).close()
    for connection in connections:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()
    with warnings.catch_warnings():  # httpx leaves a connection open that is given up while TLS begins
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def of_all(doors: list[Driver], calls: Mapping[str, Call]) -> dict[str, Any]:
    """Return what comes of calls that are made at all doors at once, since they take their time."""
    futures: dict[str, Future[Any]] = {}
    for driver in doors:
        for name, call in calls.items():
            futures[f"{name}, {type(driver).__name__} {driver.library.__name__}"] = driver.in_background(call, driver)
    return {name: outcome(future.result) for name, future in futures.items()}


def called(driver: Driver, environment: Environment, **options: Any) -> str:
    """Return the token, or what is wrong: none in time, a fault of the library, or of the answer."""
    auth = driver.door.NexusAuth("id", "s3cret", environment, **{"timeout": TIMEOUT, **options})
    result = outcome(driver.access_token, auth)
    if isinstance(result, driver.timeout_error):
        return "too late"
    if isinstance(result, TokenRequestError):
        return str(result).split(" (raw) ")[1].split(" (HTTP")[0]
    if isinstance(result, driver.library_error):
        return "wrong"
    assert isinstance(result, str), result
    return result


def asking(serve: Serve, answer: Answer, timeout: float = TIMEOUT, **how: Any) -> Call:
    """Return a call whose token request is answered so, by a server of its own."""
    return lambda driver: called(driver, serve(answer, **how), timeout=timeout)


def within(seconds: float, call: Call) -> Call:
    """Return a call that says so if it takes longer than some seconds."""

    def timed(driver: Driver) -> str:
        started = time.monotonic()
        result = call(driver)
        took = time.monotonic() - started
        return result if took < seconds else f"{result}, after {took} s"

    return timed


def head(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def slowly(piece: bytes) -> Answer:
    """Return a piece 200 times in ten seconds, so that no read times out, until it is much too late."""
    return [piece, 0.05] * 200


CHUNKED, CLOSE = "Transfer-Encoding: chunked", "Connection: close"
WHOLE = f"Content-Length: {len(TOKEN)}"
GOOD: Answer = [head(WHOLE) + TOKEN]
STOPPED: Answer = [head(WHOLE), SOON, TOKEN[:9], TOO_LATE, TOKEN[9:]]
TRAILERS: Answer = [head(CHUNKED) + chunk(TOKEN) + b"0\r\n", *slowly(b"X: x\r\n"), b"\r\n"]
LATE: dict[str, Answer] = {
    "nothing": [TIMEOUT + TOO_LATE, *GOOD],
    "body long after the head": [SOON, head(WHOLE), TOO_LATE, TOKEN],
    "body in pieces": [head("Content-Length: 1000"), *slowly(b" "), TOKEN.rjust(800)],
    "body that stops in the middle": STOPPED,
    "body until the connection is closed": [head(CLOSE) + TOKEN, *slowly(b" ")],
    "body that stops before the connection is closed": [head(CLOSE) + TOKEN, SOON, b" ", TOO_LATE],
    "chunks in pieces": [head(CHUNKED), *slowly(chunk(b" ")), chunk(TOKEN) + chunk(b"")],
    "size of a chunk in pieces":
        [head(CHUNKED) + b"%x;" % len(TOKEN), *slowly(b"x"), b"\r\n" + TOKEN + b"\r\n" + chunk(b"")],
    "trailers in pieces": TRAILERS,
}  # fmt: skip


@pytest.fixture
def full() -> Iterator[Environment]:
    """An environment whose token endpoint accepts no more connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(4):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Environment("raw", token_endpoint=base_url, base_url=base_url)


def test_a_timeout_is_for_a_token_request_as_a_whole(doors: list[Driver], serve: Serve, full: Environment) -> None:
    calls = {name: within(5, asking(serve, answer)) for name, answer in LATE.items()}
    if sys.platform == "linux":  # elsewhere the kernel has a longer line
        calls["not accepted"] = lambda driver: called(driver, full, scope=type(driver).__name__)
    outcomes = of_all(doors, calls)
    assert outcomes == dict.fromkeys(outcomes, "too late")


# On a busy machine our deadline may come before that of httpcore, which then leaves its socket to be collected.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_tls(doors: list[Driver], serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No part of a request takes longer than its timeout, and yet all of it may; a stopped body is cut off here too."""
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "ca.pem"))

    late = {
        "in the middle": asking(serve, STOPPED, context=context),
        "in pieces": asking(serve, TRAILERS, context=context),
        "each in time": within(3.5, asking(serve, [10.0], 2, context=context, before_tls=1.9)),
        "no handshake": asking(serve, GOOD, context=context, before_tls=3),
    }
    outcomes = of_all(doors, late)
    assert outcomes == dict.fromkeys(outcomes, "too late")
    assert set(of_all(doors, {"good": asking(serve, GOOD, 10, context=context)}).values()) == {"t"}
    gc.collect()


WRONG: dict[str, Answer] = {
    "a negative size of a chunk": [head(CHUNKED), b"-1\r\n" + b" " * 100_000],
    "a negative size of a later chunk": [head(CHUNKED), chunk(b" "), b"-5\r\nabcde\r\n", chunk(b"")],
    "a size that is no number": [head(CHUNKED), b"zz\r\nab\r\n", chunk(b"")],
    "a size of a chunk without end": [head(CHUNKED), b"5;" + b"x" * 10**6],
    "a chunk that is cut": [head(CHUNKED), b"5\r\nab"],
    "a body that is cut": [head("Content-Length: 500"), TOKEN],
    "a negative length": [head("Content-Length: -5"), TOKEN[:-1]],
    "two lengths": [head("Content-Length: 5", "Content-Length: 7"), TOKEN],
    "a head without end": [b"HTTP/1.1 200 OK\r\nX: ", b"x" * 10**6],
    "no HTTP": [b"\x16\x03\x01 \r\n\r\n"],
    "nothing": [],
}


def test_answers_that_are_no_http(doors: list[Driver], serve: Serve) -> None:
    outcomes = of_all(doors, {name: asking(serve, answer, 10) for name, answer in WRONG.items()})
    assert set(outcomes.values()) <= {"wrong", "gave an answer that is no JSON object"}
    assert "wrong" in outcomes.values()


def endless(*headers: str, status: str = "200 OK", piece: bytes = b" " * 65536) -> Answer:
    return [head(*headers, status=status), *[piece] * 100_000]


def packed(coding: str, body: bytes) -> Answer:
    return [head(f"Content-Encoding: {coding}", f"Content-Length: {len(body)}"), body]


BOMB = gzip.compress(bytes(2**26), 1)
TOO_LONG = "gave an answer longer than 1048576 bytes"
LONG: dict[str, tuple[Answer, str]] = {
    "a body": (endless(CLOSE), TOO_LONG),
    "chunks": (endless(CHUNKED, piece=chunk(b" " * 65536)), TOO_LONG),
    "one chunk": (endless(CHUNKED, piece=b"fffffffffff\r\n" + b" " * 65536), TOO_LONG),
    "an error": (endless(CLOSE, status="503 Down"), "is down"),
    "a redirect": (endless(CLOSE, "Location: /x", status="307 No"), "redirected to /x, which is not followed"),
    "gzip": (packed("gzip", BOMB), TOO_LONG),
    "gzip twice": (packed("gzip, gzip", gzip.compress(BOMB)), "gave an answer that is no JSON object"),
}


def test_no_more_is_read_or_unpacked_than_is_taken(doors: list[Driver], serve: Serve) -> None:
    # When a body is not read to its end, httpx leaves generators behind, of which trio warns.
    those = [driver for name, driver in zip(INSTALLED, doors, strict=True) if name != "httpx-trio"]
    calls = {name: asking(serve, answer, 30) for name, (answer, _) in LONG.items()}
    tracemalloc.start()
    try:
        for driver in those:
            assert list(of_all([driver], calls).values()) == [complaint for _, complaint in LONG.values()]
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_trailers_without_end(doors: list[Driver], serve: Serve) -> None:
    """Some libraries take only so many, which is an error of theirs; others read on."""
    answer: Answer = [head(CHUNKED) + chunk(TOKEN) + b"0\r\n", *[b"X: x\r\n" * 10_000] * 100_000]
    assert set(of_all(doors, {"trailers": asking(serve, answer)}).values()) <= {"too late", "wrong"}


# Transports that send a request again by themselves


def transport_that_waits(library: Any) -> Any:
    """Return what waits by itself when the server is busy, whatever the timeout, like transports that people write."""

    class Transport(library.BaseTransport, library.AsyncBaseTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            time.sleep(8)

        async def handle_async_request(self, request: Any) -> Any:
            await anyio.sleep(8)

    return Transport()


def transport_of_httpx_retries(library: Any) -> Any:
    retries = pytest.importorskip("httpx_retries")
    retry = retries.Retry(total=20, status_forcelist=[429], allowed_methods=["GET", "POST"], backoff_factor=0)
    return retries.RetryTransport(retry=retry)


@pytest.mark.parametrize(
    ("transport", "names"),
    [
        (transport_that_waits, {name for name in INSTALLED if name != "requests"}),
        (transport_of_httpx_retries, {"httpx", "httpx-asyncio"}),  # it is for these
    ],
)
def test_max_wait_holds_with_a_transport_that_retries(
    doors: list[Driver], sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, transport: Any, names: set[str]
) -> None:
    """Although the timeout of a token request would be longer."""

    def call(driver: Driver) -> str:
        client = driver.ready_made(sandbox, transport=transport(driver.library), timeout=30, max_wait=0.5)
        error = outcome(driver.get, client, "/customer")
        assert isinstance(error, (driver.timeout_error, driver.door.TokenWaitError)), error
        return "held to it"

    monkeypatch.setattr(_httpx_flow, "LEAST_LIMIT", 0.3)
    sandbox.fail_token_requests(None, status=429, retry_after=8)
    those = [driver for name, driver in zip(INSTALLED, doors, strict=True) if name in names]
    assert set(of_all(those, {"retrying": within(6, call)}).values()) == {"held to it"}


# The cut itself


def test_a_connection_is_cut_off_at_its_deadline() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(10)
        with cut_off_at(time.monotonic() + 0.01, here):
            assert here.recv(1) == b""  # it comes to its end
        assert there.recv(1) == b""


def test_a_connection_is_left_alone_once_all_is_read() -> None:
    here, there = socket.socketpair()
    with here, there:
        others = set(threading.enumerate())
        with cut_off_at(time.monotonic() + 60, here):
            (timer,) = set(threading.enumerate()) - others
        timer.join(10)
        assert not timer.is_alive()
        there.sendall(b"x")
        assert here.recv(1) == b"x"


@pytest.mark.parametrize("connection", [None, urllib3.HTTPResponse(), socket.socket()])
def test_what_has_no_socket_is_not_cut_off(connection: Any) -> None:
    with cut_off_at(time.monotonic(), connection):
        pass


@pytest.mark.skipif(
    not hasattr(urllib3.HTTPResponse, "read1"),
    reason="urllib3 1.26 cannot return what has come so far: there the cut alone helps",
)
def test_without_a_thread_the_deadline_is_looked_at_all_the_same(
    doors: list[Driver], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the interpreter none can be started."""

    def fail(_: threading.Timer) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Timer, "start", fail)
    assert set(of_all(doors, {"late": within(5, asking(serve, LATE["chunks in pieces"]))}).values()) == {"too late"}
    assert set(of_all(doors, {"good": asking(serve, GOOD, 10)}).values()) == {"t"}
