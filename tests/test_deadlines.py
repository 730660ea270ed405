"""`timeout` and `max_wait` as a whole: token endpoints that answer slowly, wrongly or without end."""

from __future__ import annotations

import contextlib
import gc
import gzip
import itertools
import socket
import ssl
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
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

NO_READ1 = not hasattr(urllib3.HTTPResponse, "read1")
TIMEOUT = 0.6
SOON, TOO_LATE = 0.4, 0.5  # seconds, both of which are less than TIMEOUT, and together more: a token comes after these
TOKEN = b'{"access_token": "t", "token_type": "Bearer"}'
Answer = Callable[[], Iterator[bytes | float]]  # what is sent, and for how many seconds nothing is
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
            for piece in answer():
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                elif is_over.wait(piece):
                    break

    def accept(listener: socket.socket, *how: Any) -> None:
        while True:
            connection = listener.accept()[0]
            if is_over.is_set():
                return connection.close()
            threads.append(threading.Thread(target=converse, args=(connection, *how)))
            threads[-1].start()

    def start(answer: Answer, *, context: ssl.SSLContext | None = None, before_tls: float = 0.0) -> Environment:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threads.append(threading.Thread(target=accept, args=(listener, answer, context, before_tls)))
        threads[-1].start()
        base_url = f"{'https' if context else 'http'}://localhost:{listener.getsockname()[1]}"
        return Environment("raw", token_endpoint=f"{base_url}/connect/token", base_url=base_url)

    listeners: list[socket.socket] = []
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []
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


def head(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED, CLOSE = "Transfer-Encoding: chunked", "Connection: close"
WHOLE = f"Content-Length: {len(TOKEN)}"


def slowly(piece: bytes) -> Iterator[bytes | float]:
    """Yield a piece again and again, so that no read times out, until it is too late."""
    pause = 0.05
    for _ in range(int((SOON + TOO_LATE) / pause) + 1):
        yield piece
        yield pause


def body_in_pieces() -> Iterator[bytes | float]:
    yield head("Content-Length: 1000")
    yield from slowly(b" ")
    yield TOKEN.rjust(1000)


def chunks_in_pieces() -> Iterator[bytes | float]:
    yield head(CHUNKED)
    yield from slowly(chunk(b" "))
    yield chunk(TOKEN) + chunk(b"")


def size_of_a_chunk_in_pieces() -> Iterator[bytes | float]:
    yield head(CHUNKED) + b"%x;" % len(TOKEN)
    yield from slowly(b"x")
    yield b"\r\n" + TOKEN + b"\r\n" + chunk(b"")


def trailers_in_pieces() -> Iterator[bytes | float]:
    yield head(CHUNKED) + chunk(TOKEN) + b"0\r\n"
    yield from slowly(b"X: x\r\n")
    yield b"\r\n"


def body_until_the_connection_is_closed() -> Iterator[bytes | float]:
    yield head(CLOSE) + TOKEN
    yield from slowly(b" ")


def body_that_stops_in_the_middle() -> Iterator[bytes | float]:
    yield head(WHOLE)
    yield SOON
    yield TOKEN[:9]
    yield TOO_LATE
    yield TOKEN[9:]


def body_that_stops_before_the_connection_is_closed() -> Iterator[bytes | float]:
    yield head(CLOSE) + TOKEN
    yield SOON
    yield b" "
    yield TOO_LATE


def body_long_after_the_head() -> Iterator[bytes | float]:
    yield SOON
    yield head(WHOLE)
    yield TOO_LATE
    yield TOKEN


def endless_trailers() -> Iterator[bytes | float]:
    yield head(CHUNKED) + chunk(TOKEN) + b"0\r\n"
    yield from itertools.repeat(b"X: x\r\n" * 100)


def pieces_without_end() -> Iterator[bytes | float]:
    yield head(CHUNKED)
    for _ in range(300):
        yield chunk(b" ")
        yield 0.05


def silence() -> Iterator[bytes | float]:
    yield TIMEOUT + TOO_LATE
    yield head(WHOLE) + TOKEN


LATE = [body_in_pieces, chunks_in_pieces, size_of_a_chunk_in_pieces, trailers_in_pieces,
        body_until_the_connection_is_closed, body_that_stops_in_the_middle,
        body_that_stops_before_the_connection_is_closed, body_long_after_the_head, silence]  # fmt: skip


def of_all(doors: list[Driver], calls: Mapping[str, Call]) -> dict[str, Any]:
    """Return what comes of calls that are made at all doors at once, since they take their time."""
    futures: dict[str, Future[Any]] = {}
    for driver in doors:
        for name, call in calls.items():
            futures[f"{name}, {type(driver).__name__} {driver.library.__name__}"] = driver.in_background(call, driver)
    return {name: outcome(future.result) for name, future in futures.items()}


def token_of(driver: Driver, environment: Environment, **options: Any) -> str:
    auth = driver.door.NexusAuth("id", "s3cret", environment, **{"timeout": TIMEOUT, **options})
    return driver.access_token(auth)


def error_of(driver: Driver, environment: Environment, **options: Any) -> str:
    """Return what is wrong: no token in time, a fault of the library, or of the answer."""
    error = outcome(token_of, driver, environment, **options)
    if isinstance(error, driver.timeout_error):
        return "too late"
    if isinstance(error, TokenRequestError):
        return str(error).split(" (raw) ")[1].split(" (HTTP")[0]
    assert isinstance(error, driver.library_error), error
    return "wrong"


def asking(serve: Serve, answer: Answer, timeout: float = TIMEOUT, **how: Any) -> Call:
    """Return a call whose token request is answered so, by a server of its own."""
    return lambda driver: error_of(driver, serve(answer, **how), timeout=timeout)


def within(seconds: float, call: Call) -> Call:
    """Return a call that says so if it takes longer than some seconds."""

    def timed(driver: Driver) -> str:
        started = time.monotonic()
        outcome = call(driver)
        took = time.monotonic() - started
        return outcome if took < seconds else f"{outcome}, after {took} s"

    return timed


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
    calls = {case.__name__: asking(serve, case) for case in LATE}
    if sys.platform == "linux":  # elsewhere the kernel has a longer line
        calls["not accepted"] = lambda driver: error_of(driver, full, scope=type(driver).__name__)
    calls["endless trailers"] = asking(serve, endless_trailers)
    outcomes = of_all(doors, calls)
    # Some libraries take only so many trailers, which is an error of theirs; others read on.
    taken = {name: outcomes.pop(name) for name in list(outcomes) if name.startswith("endless")}
    assert set(taken.values()) <= {"too late", "wrong"}
    assert outcomes == dict.fromkeys(outcomes, "too late")


def good() -> Iterator[bytes | float]:
    yield head(WHOLE) + TOKEN


def silence_after_tls() -> Iterator[bytes | float]:
    yield 10.0


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
        "in the middle": asking(serve, body_that_stops_in_the_middle, context=context),
        "in pieces": asking(serve, trailers_in_pieces, context=context),
        "each in time": within(1.6, asking(serve, silence_after_tls, 1, context=context, before_tls=0.9)),
        "no handshake": asking(serve, good, context=context, before_tls=3),
    }
    outcomes = of_all(doors, late)
    assert outcomes == dict.fromkeys(outcomes, "too late")
    outcomes = of_all(doors, {"good": lambda driver: token_of(driver, serve(good, context=context), timeout=10)})
    assert set(outcomes.values()) == {"t"}
    gc.collect()


# Answers that are wrong


WRONG: dict[str, list[bytes | float]] = {
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
    outcomes = of_all(doors, {name: asking(serve, pieces.__iter__, 10) for name, pieces in WRONG.items()})
    assert set(outcomes.values()) <= {"wrong", "gave no usable access_token"}
    assert "wrong" in outcomes.values()


# Answers that are too long


def endless(*headers: str, status: str = "200 OK", piece: bytes = b" " * 65536) -> Answer:
    return lambda: itertools.chain([head(*headers, status=status)], itertools.repeat(piece))


def packed(coding: str, body: bytes) -> Answer:
    return lambda: iter([head(f"Content-Encoding: {coding}", f"Content-Length: {len(body)}"), body])


BOMB = b" " * 2**26
TOO_LONG = "gave an answer longer than 1048576 bytes"
LONG: dict[str, tuple[Answer, str]] = {
    "a body without end": (endless(CLOSE), TOO_LONG),
    "chunks without end": (endless(CHUNKED, piece=chunk(b" " * 65536)), TOO_LONG),
    "one chunk": (endless(CHUNKED, piece=b"fffffffffff\r\n" + b" " * 65536), TOO_LONG),
    "an error without end": (endless(CLOSE, status="503 Down"), "is down"),
    "a redirect": (endless(CLOSE, "Location: /x", status="307 No"), "redirected to /x, which is not followed"),
    "gzip": (packed("gzip", gzip.compress(BOMB, 1)), TOO_LONG),
    "deflate": (packed("deflate", zlib.compress(BOMB, 1)), TOO_LONG),
    "gzip twice": (packed("gzip, gzip", gzip.compress(gzip.compress(BOMB, 1))), "gave no usable access_token"),
    "called br": (packed("br", gzip.compress(BOMB, 1)), "gave no usable access_token"),
    "called zstd": (packed("zstd", gzip.compress(BOMB, 1)), "gave no usable access_token"),
}


def test_no_more_is_read_or_unpacked_than_is_taken(doors: list[Driver], serve: Serve) -> None:
    # When a body is not read to its end, httpx leaves generators behind, of which trio warns.
    those = [driver for name, driver in zip(INSTALLED, doors, strict=True) if name != "httpx-trio"]
    calls = {name: asking(serve, answer, 30) for name, (answer, _) in LONG.items()}
    tracemalloc.start()
    try:
        for driver in those:
            assert list(of_all([driver], calls).values()) == [complaint for _, complaint in LONG.values()]
        assert tracemalloc.get_traced_memory()[1] < len(BOMB) / 2
    finally:
        tracemalloc.stop()


# Transports that send a request again by themselves


class Patient:
    """What waits by itself when the server is busy, and asks again and again, like transports that people write."""

    def __init__(self, library: Any) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.blocking, self.asynchronous = library.HTTPTransport(context), library.AsyncHTTPTransport(context)

    def handle_request(self, request: Any) -> Any:
        while (response := self.blocking.handle_request(request)).status_code == 429:
            response.close()
            time.sleep(8)
        return response

    async def handle_async_request(self, request: Any) -> Any:
        while (response := await self.asynchronous.handle_async_request(request)).status_code == 429:
            await response.aclose()
            await anyio.sleep(8)
        return response

    def close(self) -> None:
        self.blocking.close()

    async def aclose(self) -> None:
        await self.asynchronous.aclose()


def patient_transport(library: Any) -> Any:
    return type("Transport", (Patient, library.BaseTransport, library.AsyncBaseTransport), {})(library)


def transport_of_httpx_retries(library: Any) -> Any:
    retries = pytest.importorskip("httpx_retries")
    retry = retries.Retry(total=20, status_forcelist=[429], allowed_methods=["GET", "POST"], backoff_factor=0)
    return retries.RetryTransport(retry=retry)


RETRYING: dict[Callable[[Any], Any], tuple[str, ...]] = {
    patient_transport: ("httpx", "httpx-asyncio", "httpx-trio", "httpx2", "httpx2-asyncio"),
    transport_of_httpx_retries: ("httpx", "httpx-asyncio"),  # it is for these
}


@pytest.mark.parametrize("transport", RETRYING)
def test_max_wait_holds_with_a_transport_that_retries(
    doors: list[Driver],
    sandbox: NexusSandbox,
    transport: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although the timeout of a token request would be longer."""

    def call(driver: Driver) -> str:
        client = driver.ready_made(sandbox, transport=transport(driver.library), timeout=30, max_wait=0.5)
        error = outcome(driver.get, client, "/customer")
        assert isinstance(error, (driver.timeout_error, driver.door.TokenWaitError))
        return "held to it"

    monkeypatch.setattr(_httpx_flow, "LEAST_LIMIT", 0.3)
    sandbox.fail_token_requests(None, status=429, retry_after=8)
    those = [driver for name, driver in zip(INSTALLED, doors, strict=True) if name in RETRYING[transport]]
    started = time.monotonic()
    outcomes = of_all(those, {"retrying": call})
    assert set(outcomes.values()) <= {"held to it"}
    assert time.monotonic() - started < 6


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
        with cut_off_at(time.monotonic() + 0.05, here):
            pass
        time.sleep(0.1)
        there.sendall(b"x")
        assert here.recv(1) == b"x"


class NoDescriptor:
    def fileno(self) -> int:
        raise OSError("a mock")


@pytest.mark.parametrize("connection", [None, NoDescriptor(), socket.socket()])
def test_what_has_no_socket_is_not_cut_off(connection: Any) -> None:
    with cut_off_at(time.monotonic(), connection):
        pass


@pytest.mark.skipif(NO_READ1, reason="urllib3 1.26 cannot return what has come so far: there the cut alone helps")
def test_without_a_thread_the_deadline_is_looked_at_all_the_same(
    doors: list[Driver], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the interpreter none can be started."""

    def fail(_: threading.Timer) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Timer, "start", fail)
    outcomes = of_all(doors, {"late": within(8, asking(serve, pieces_without_end))})
    assert set(outcomes.values()) == {"too late"}
    outcomes = of_all(doors, {"good": lambda driver: token_of(driver, serve(good), timeout=10)})
    assert set(outcomes.values()) == {"t"}
