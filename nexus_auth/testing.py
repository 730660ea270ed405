"""A Nexus on loopback, to test against without an account: identity server and API in one real HTTP server."""

from __future__ import annotations

import inspect
import os
import re
import secrets
import socket
import ssl
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, InitVar, dataclass, field
from email.message import Message
from email.utils import formatdate
from http.client import responses
from json import dumps
from math import inf
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from .environment import Environment

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Answer", "Arrival", "NexusSandbox"]

TOKEN_PATH = "/connect/token"  # noqa: S105  # where tokens are asked for, none itself
REVOKE_PATH = "/sandbox/revoke"
PERIOD = 60.0  # seconds in which `limit` token requests are taken
PATIENCE = 5.0  # seconds for which the end of a sandbox waits for an `api` function that is at work
LONGEST_LINE = 65536

# RFC 9110 sections 5.6.2 and 5.5, RFC 9112 sections 3, 5 and 7.1
NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HEADER_VALUE = re.compile(r"[^\r\n\0\u0100-\U0010ffff]*")
REQUEST_LINE = re.compile(rf"({NAME}) (\S+) (HTTP/1\.[01])\r?\n".encode())
HEADER_LINE = re.compile(rf"({NAME}):([^\r\n\0]*)\r?\n".encode())
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;.*)?\r?\n")
SCOPE = re.compile(r"[!#-\[\]-~]+")  # RFC 6749 section 3.3
METHOD_OR_HOST = re.compile(r"(?:GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS)\b|[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Arrival:
    """A request as it arrived.

    time     seconds on the monotonic clock (`time.monotonic()`), when its headers were there
    method   as sent: "GET"
    path     as sent, with its query: "/customer?page=2"
    headers  an `email.message.Message`: `headers["Authorization"]`, whatever the case; None for one that is not there
    body     all of it, as bytes, however it was transferred
    form     the fields of a form, in order, as pairs of name and value
    """

    time: float
    method: str
    path: str
    headers: Message
    body: bytes

    @property
    def form(self) -> list[tuple[str, str]]:
        """The fields of a form, in order, those without a value too."""
        return parse_qsl(self.body.decode(errors="replace"), keep_blank_values=True)


@dataclass(frozen=True)
class Answer:
    """An answer of the sandbox, as an `api` function returns it: `Answer(404, json={"message": "Not found"})`.

    status   200 to 999
    json     a document that becomes the body, as it is when the answer is made; None for none
    body     in its place bytes, or text that is sent as UTF-8
    headers  besides `Content-Type: application/json`, `Content-Length` and `Date`, or in their place
    delay    seconds before it is sent
    drop     whether the connection is closed instead

    Raises `TypeError` or `ValueError`, naming the argument, for what cannot be sent.
    """

    status: int = 200
    _: KW_ONLY
    json: InitVar[Any] = None
    body: bytes | str = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    delay: float = 0.0
    drop: bool = False

    def __post_init__(self, json: Any) -> None:
        _integer("status", self.status, 200, 999)
        _check_kind("body", self.body, bytes, str)
        _sendable(self.headers)
        _check_kind("delay", self.delay, int, float)
        if not 0 <= self.delay <= threading.TIMEOUT_MAX:
            raise ValueError(f"delay must be a number of seconds, not {self.delay}")
        _check_kind("drop", self.drop, bool)
        if json is not None:
            if self.body:
                raise TypeError("json and body exclude one another: each is the whole body")
            object.__setattr__(self, "body", _document("json", json))  # frozen it is from here on
        if self.body and self.status in (204, 304):
            raise ValueError(f"body must be empty with status {self.status} (RFC 9110 section 6.4.1)")


class NexusSandbox:
    """A Nexus on a free port of 127.0.0.1, for as long as its `with` block lasts.

        with NexusSandbox() as nexus, nexus_session(nexus.client_id, nexus.client_secret, nexus.environment) as session:
            session.get("/customer")

    Its token endpoint gives out tokens that live `expires_in` seconds (any JSON value, or None for no such member), to
    `client_id` with `client_secret` and whomever else the dict `clients` names, for `scopes`. It takes `limit` token
    requests in any 60 s, refusals included, and answers further ones with 429. Refusals are those of RFC 6749 section
    5.2. Every instance has a secret of its own, so that no two share a token.

    Its API answers a request as `answer` has scripted; if nothing fits, with 401 where there is no valid token, else as
    the function `api` says, else with an echo in Nexus's envelope. `api` is given the `Arrival` and returns an
    `Answer`, or None for the echo. It is called in the thread of the connection, so at times by several threads at
    once. An exception that it raises, a failed `assert` for instance, is answered with 500, and raised again where the
    `with` block ends.

        def customers(arrival):
            return None if arrival.path.startswith("/customer") else Answer(404, json={"message": "Not found"})

    `token_requests` and `requests` are lists of what arrived, an `Arrival` each, in order. `expires_in`, `scopes`,
    `limit` and `api` can be set while it runs. While the `threading.Event` `gate` is cleared, the answers to token
    requests are held back: `threading.Timer(3, nexus.gate.set).start()` lets them go 3 seconds later.
    `POST /sandbox/revoke` does as `revoke_tokens` does, for other processes.

    With an `ssl_context` it is https://localhost. `port` is for who needs a known one; 0 takes a free one. The end of
    the block closes all connections, those of answers that are delayed or held back too. Raises `TypeError` and
    `ValueError` for arguments that make no sense, `RuntimeError` if it is entered while it runs, and `OSError` if the
    port is taken.
    """

    def __init__(self, *, client_id: str = "sandbox-client", client_secret: str | None = None, expires_in: Any = 3600,
                 scopes: tuple[str, ...] = ("api1", "sanctionlist"), limit: int = 60,
                 ssl_context: ssl.SSLContext | None = None, api: Callable[[Arrival], Answer | None] | None = None,
                 port: int = 0) -> None:  # fmt: skip
        if client_secret is None:
            client_secret = secrets.token_urlsafe(24)
        self.client_id: str = _text("client_id", client_id)
        self.client_secret: str = _text("client_secret", client_secret)
        self.clients: dict[str, str] = {client_id: client_secret}
        self.expires_in = expires_in
        self.scopes: tuple[str, ...] = scopes
        self.limit: int = limit
        self.api = api
        self.gate: threading.Event = threading.Event()
        self.gate.set()
        self.token_requests: list[Arrival] = []
        self.requests: list[Arrival] = []
        self._ssl_context = _server_context(ssl_context)
        self._port = _integer("port", port, most=65535)
        self._environment: Environment | None = None
        self._server: _Server | None = None
        self._granted: deque[float] = deque()  # when token requests were taken
        self._tokens: dict[str, float] = {}  # and until when they live
        self._faults = _Script()
        self._scripts: dict[tuple[str | None, str], _Script] = {}
        self._arrived = threading.Condition()  # also the lock of all of the above

    if not TYPE_CHECKING:  # type checkers would take any name for one that can be set

        def __setattr__(self, name: str, value: object) -> None:
            """Raise the errors of the constructor for what makes no sense; `AttributeError` for a name that is new."""
            if check := _CHECKS.get(name):
                check(name, value)
            if name in ("client_id", "client_secret") and name in self.__dict__:
                raise AttributeError(f"{name} of a NexusSandbox stays as it is; an entry of its `clients` is another")
            is_new = not (name.startswith("_") or name in {*_CHECKS, *_ATTRIBUTES} or hasattr(self, name))
            if is_new and type(self) is NexusSandbox:
                raise AttributeError(f"a NexusSandbox has no attribute {name!r}")
            super().__setattr__(name, value)

    @property
    def environment(self) -> Environment:
        """The environment to give to a `NexusAuth`. Raises `RuntimeError` before the `with` block."""
        if self._environment is None:
            raise RuntimeError("this NexusSandbox is not running: use it as `with NexusSandbox() as nexus:`")
        return self._environment

    def __enter__(self) -> Self:
        if self._server:
            raise RuntimeError("this NexusSandbox is running already: make another one for a block within its block")
        self._server = _Server(self._reply, self._port, self._ssl_context)
        host = f"localhost:{self._server.port}" if self._ssl_context else f"127.0.0.1:{self._server.port}"
        base_url = f"https://{host}" if self._ssl_context else f"http://{host}"
        self._environment = Environment("sandbox", token_endpoint=base_url + TOKEN_PATH, base_url=base_url)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:  # fmt: skip
        server, self._server = self._server, None
        if server is None or server.process != os.getpid():
            return  # what a forked child has of a sandbox is its parent's
        server.stopped.set()
        self.gate.set()
        server.stop()
        if server.errors and (error is None or isinstance(error, Exception)):
            raise server.errors[0]

    def revoke_tokens(self) -> None:
        """Take no token any more that has been given out so far."""
        with self._arrived:
            self._tokens.clear()

    def wait_for(self, *, token_requests: int = 0, requests: int = 0, timeout: float = 10.0) -> None:
        """Wait until so many are in the lists of these names. Raises `TimeoutError` after `timeout` seconds.

        It blocks: in a coroutine, `await asyncio.to_thread(nexus.wait_for, token_requests=1)`.
        """

        _integer("token_requests", token_requests)
        _integer("requests", requests)

        def are_here() -> bool:
            return len(self.token_requests) >= token_requests and len(self.requests) >= requests

        with self._arrived:
            if not self._arrived.wait_for(are_here, timeout):
                here = f"{len(self.token_requests)} token requests and {len(self.requests)} requests"
                raise TimeoutError(f"only {here} arrived within {timeout} s, not {token_requests} and {requests}")

    def fail_token_requests(self, times: int | None = 1, *, status: int = 503, json: Any = None,
                            body: bytes | str = b"", headers: Mapping[str, str] | None = None,
                            retry_after: int | str | None = None, delay: float = 0.0,
                            drop: bool = False) -> None:  # fmt: skip
        """Answer the next `times` token requests so, whatever they ask for; None is for ever, or until the next call.

        Of connection errors, 429 and 5xx a caller makes 4 tries, so that fewer `times` are not noticed.
        `retry_after` is in seconds, or an HTTP date; the other arguments are those of `Answer`.
        """
        headers = _sendable(headers)
        if retry_after is not None:
            seconds_or_date = retry_after if isinstance(retry_after, str) else _integer("retry_after", retry_after)
            headers = {**headers, "Retry-After": str(seconds_or_date)}
        answer = Answer(status, json=json, body=body, headers=headers, delay=delay, drop=drop)
        with self._arrived:
            self._faults.add(answer, times)

    def answer(self, path: str, method: str | None = None, *, status: int = 200, json: Any = None,
               body: bytes | str = b"", headers: Mapping[str, str] | None = None, delay: float = 0.0,
               drop: bool = False, times: int | None = 1) -> None:  # fmt: skip
        """Answer the next `times` API requests to `path` so, valid token or not; see `Answer` for the arguments.

        `path` is from the base URL on, with a query or for any query. Answers to the same path follow one another in
        the order of the calls; `times=None` is for ever, or until the next call. If several fit, one for the `method`
        comes before one for any method, and one for the query before one for any.
        """
        key = _scripted_method(method), _scripted_path(path)
        answer = Answer(status, json=json, body=body, headers=_sendable(headers), delay=delay, drop=drop)
        with self._arrived:
            self._scripts.setdefault(key, _Script()).add(answer, times)

    def _reply(self, arrival: Arrival) -> Answer:
        target = re.sub(r"\A(?i:https?)://[^/?#]*", "", arrival.path)  # as a proxy is asked (RFC 9112 section 3.2.2)
        target = _in_upper_case(target)
        path = target.partition("?")[0]
        if path == TOKEN_PATH:
            return self._reply_of_token_endpoint(arrival)
        if path == REVOKE_PATH and arrival.method == "POST":
            self.revoke_tokens()
            return Answer(204)
        return self._reply_of_api(arrival, target, path)

    def _reply_of_token_endpoint(self, arrival: Arrival) -> Answer:
        with self._arrived:
            self.token_requests.append(arrival)
            self._arrived.notify_all()
            answer = self._faults.next() or self._too_many(arrival) or self._refusal(arrival) or self._token(arrival)
        self.gate.wait()
        return answer

    def _reply_of_api(self, arrival: Arrival, target: str, path: str) -> Answer:
        with self._arrived:
            self.requests.append(arrival)
            self._arrived.notify_all()
            for key in (arrival.method, target), (arrival.method, path), (None, target), (None, path):
                if key in self._scripts and (scripted := self._scripts[key].next()):
                    return scripted
            scheme, _, token = (arrival.headers["Authorization"] or "").partition(" ")
            if scheme.lower() != "bearer" or self._tokens.get(token, 0) < arrival.time:
                return _unauthorized()
        answer = self.api(arrival) if self.api else None
        if not isinstance(answer, (Answer, type(None))):
            raise TypeError(f"api must return an Answer or None, not {type(answer).__name__}")
        return answer or _echo(arrival)

    def _too_many(self, arrival: Arrival) -> Answer | None:
        """Return a 429 if `limit` token requests were taken within the last minute, else take this one."""
        while self._granted and self._granted[0] <= arrival.time - PERIOD:
            self._granted.popleft()
        if len(self._granted) < self.limit:
            self._granted.append(arrival.time)
            return None
        wait = self._granted[0] + PERIOD - arrival.time if self._granted else PERIOD
        return Answer(429, headers={"Retry-After": str(int(wait) + 1)})

    def _refusal(self, arrival: Arrival) -> Answer | None:
        """Return the error response of RFC 6749 section 5.2 that `arrival` deserves."""
        if error := _malformed(arrival):
            return _error("invalid_request", error)
        form = {name: value for name, value in arrival.form if value}
        if form["grant_type"] != "client_credentials":
            return _error("unsupported_grant_type", "grant_type must be client_credentials")
        if self.clients.get(form["client_id"]) != form["client_secret"]:
            return _error("invalid_client", "no such client_id, or another client_secret")
        if unknown := set(form["scope"].split(" ")) - set(self.scopes):
            return _error("invalid_scope", f"unknown: {' '.join(sorted(unknown))}")
        return None

    def _token(self, arrival: Arrival) -> Answer:
        token = secrets.token_urlsafe(24)
        is_sensible = isinstance(self.expires_in, (int, float)) and 1 <= self.expires_in <= 1e9
        self._tokens[token] = arrival.time + (self.expires_in if is_sensible else inf)
        document = {"access_token": token, "token_type": "Bearer", "expires_in": self.expires_in}
        if self.expires_in is None:
            del document["expires_in"]
        return Answer(200, json=document, headers={"Cache-Control": "no-store"})  # RFC 6749 section 5.1


class _Script:
    """What is to be answered to the next requests, each answer so many times."""

    def __init__(self) -> None:
        self._turns: deque[tuple[Answer, float]] = deque()

    def add(self, answer: Answer, times: int | None) -> None:
        """Put an answer at the end, in place of one that is there for ever."""
        if times is not None:
            _integer("times", times)
        if self._turns and self._turns[-1][1] == inf:
            self._turns.pop()
        if times != 0:
            self._turns.append((answer, inf if times is None else times))

    def next(self) -> Answer | None:
        """Take the next answer, if there is one."""
        if not self._turns:
            return None
        answer, times = self._turns.popleft()
        if times > 1:
            self._turns.appendleft((answer, times - 1))
        return answer


def _malformed(arrival: Arrival) -> str | None:
    """Return what is wrong with the form of a token request; fields that are unknown are not (RFC 6749 section 3.2)."""
    if arrival.method != "POST":
        return f"the method must be POST, not {arrival.method}"
    if "Authorization" in arrival.headers:
        return "client_id and client_secret go into the form, not into a header"
    if arrival.headers.get_content_type() != "application/x-www-form-urlencoded":
        return "the Content-Type must be application/x-www-form-urlencoded"
    names = [name for name, value in arrival.form if value]  # one without a value is as good as none, as it says there
    for name in ("grant_type", "client_id", "client_secret", "scope"):
        if names.count(name) != 1:
            return f"{name} is {'repeated' if name in names else 'missing'}"
    return None


def _error(error: str, description: str) -> Answer:
    # Of ASCII, only these may be in a description (RFC 6749 section 5.2).
    description = re.sub(r"[^ !#-\[\]-~]", "?", description)
    return Answer(400, json={"error": error, "error_description": description}, headers={"Cache-Control": "no-store"})


def _unauthorized() -> Answer:
    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # RFC 6750 section 3
    document = _envelope("Unauthorized", ["The access token is missing, expired or revoked"], None)
    return Answer(401, json=document, headers=headers)


def _echo(arrival: Arrival) -> Answer:
    echo = {"method": arrival.method, "path": arrival.path, "body": arrival.body.decode(errors="replace")}
    return Answer(200, json=_envelope("Successfully processed your request", None, echo))


def _envelope(message: str, errors: list[str] | None, values: Any) -> dict[str, Any]:
    return {"message": message, "errors": errors, "values": values}


def _check_kind(name: str, value: object, *kinds: type) -> None:
    """Raise a `TypeError` that names the argument, as all that follow do."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")


def _text(name: str, value: str) -> str:
    _check_kind(name, value, str)
    if not value:
        raise ValueError(f"{name} is empty")
    return value


def _integer(name: str, value: int, least: int = 0, most: float = inf) -> int:
    _check_kind(name, value, int)
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} {'or more' if most == inf else f'to {most}'}, not {value}")
    return value


def _document(name: str, value: Any) -> bytes:
    try:
        return dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name} cannot be written as JSON: {error}") from error


def _single_scopes(name: str, scopes: Any) -> None:
    _check_kind(name, scopes, tuple, list, set, frozenset)
    for scope in scopes:
        _check_kind(name, scope, str)
        if not SCOPE.fullmatch(scope):
            raise ValueError(f"{name} has what is no single scope: {scope!r}")


def _server_context(ssl_context: ssl.SSLContext | None) -> ssl.SSLContext | None:
    if ssl_context is not None:
        _check_kind("ssl_context", ssl_context, ssl.SSLContext)
        if ssl_context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ValueError("ssl_context is a client's: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) makes one of a server")
    return ssl_context


def _function(name: str, api: object) -> None:
    if api is not None and (not callable(api) or inspect.iscoroutinefunction(api)):
        raise TypeError(f"{name} must be a function, and not async: {api!r}")


def _dictionary(name: str, clients: object) -> None:
    _check_kind(name, clients, dict)


def _event(name: str, gate: object) -> None:
    _check_kind(name, gate, threading.Event)


# Of a sandbox: what can be set while it runs, and how that is checked; and its other public attributes.
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "expires_in": _document, "scopes": _single_scopes, "limit": _integer, "api": _function, "gate": _event,
    "clients": _dictionary,
}  # fmt: skip
_ATTRIBUTES = frozenset(("client_id", "client_secret", "token_requests", "requests"))


def _sendable(headers: Mapping[str, str] | None) -> Mapping[str, str]:
    if headers is None:
        return {}
    _check_kind("headers", headers, Mapping)
    for name, value in headers.items():
        _check_kind("headers", name, str)
        _check_kind(f"headers[{name!r}]", value, str)
        if not re.fullmatch(NAME, name) or not HEADER_VALUE.fullmatch(value):
            raise ValueError(f"headers has what no header can have: {name!r}: {value!r}")
    return headers


def _scripted_method(method: str | None) -> str | None:
    if method is None:
        return None
    _check_kind("method", method, str)
    if not re.fullmatch(NAME, method):
        raise ValueError(f"method must be a name such as 'GET', not {method!r}")
    return method.upper()


def _in_upper_case(path: str) -> str:
    """Return `path` with the digits of percent-encodings in upper case: they are equal (RFC 3986 section 2.1)."""
    return re.sub("%[0-9A-Fa-f]{2}", lambda encoded: encoded[0].upper(), path)


def _scripted_path(path: str) -> str:
    _check_kind("path", path, str)
    if METHOD_OR_HOST.match(path):
        raise ValueError(f"path must be from the base URL on, as '/customer', without method and host, not {path!r}")
    # Requests and httpx encode the rest; in a query httpx leaves more as it is.
    if not re.fullmatch(r"[!$-;=@-_a-z|~]*(\?[!$-;=?-~]*)?", path):
        raise ValueError(f"path must be as it is sent, percent-encoded and without a fragment, not {path!r}")
    path = _in_upper_case(path if path.startswith("/") else f"/{path}")
    if re.search(r"/\.{1,2}(/|\Z)", path.partition("?")[0]):
        raise ValueError(f"path must be as it is sent, without '.' and '..', not {path!r}")
    if path.partition("?")[0] == TOKEN_PATH:
        raise ValueError(f"path {path!r} is the token endpoint, for which there is fail_token_requests()")
    if path.partition("?")[0] == REVOKE_PATH:
        raise ValueError(f"path {path!r} is where tokens are revoked: the sandbox answers there itself")
    return path


class _Server(ThreadingTCPServer):
    """A listening socket, and a thread for each connection; none outlives `stop`."""

    allow_reuse_address = os.name == "posix"  # elsewhere it means that two may listen on one port
    request_queue_size = 512
    timeout = 0.5  # seconds after which the thread that accepts looks whether it is to stop, should nothing wake it

    def __init__(self, reply: Callable[[Arrival], Answer], port: int, ssl_context: ssl.SSLContext | None) -> None:
        self.reply = reply
        self.process = os.getpid()
        self.stopped = threading.Event()
        self.errors: list[BaseException] = []
        self._connections: dict[Any, threading.Thread] = {}
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)
        self.port: int = self.server_address[1]
        if ssl_context:
            # The handshake is for the connection's own thread: here it would hold up all others.
            self.socket = ssl_context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._accepting = threading.Thread(target=self._accept, name="NexusSandbox", daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while not self.stopped.is_set():
            self.handle_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, which no interpreter waits for if a block is never left."""
        serve = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="NexusSandbox", daemon=True
        )
        with self._lock:
            self._connections[request] = serve
        serve.start()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has ended."""
        with self._lock:  # so that `stop` never meets one that is closed
            self._connections.pop(request, None)
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that a client breaks off, which tests do on purpose; keep any other error."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            self.errors.append(error)

    def stop(self) -> None:
        """End all connections and threads, once `stopped` is set."""
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()  # wakes the thread that accepts
        self._accepting.join()
        self.server_close()
        with self._lock:
            threads = list(self._connections.values())
            for connection in self._connections:
                with suppress(OSError):  # the client was first
                    # Wakes a thread that reads or writes. That of an SSLSocket would take the TLS state away from it.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
        until = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            message = f"an api function has not returned {PATIENCE:.0f} s after the end of its NexusSandbox"
            warnings.warn(message, RuntimeWarning, stacklevel=3)


class _UnreadableError(Exception):
    """A request that is not written as RFC 9112 says; the message tells what is wrong."""


class _Handler(StreamRequestHandler):
    """A connection: one request after the other, until either side has enough."""

    disable_nagle_algorithm = True
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle(self) -> None:
        """Answer all requests of the connection."""
        try:
            while self._answer_one():
                pass
        except _UnreadableError as error:  # where the next one would start is anybody's guess
            self._write(Answer(400, json=_envelope("Bad request", [str(error)], None)), has_body=True, is_last=True)

    def _answer_one(self) -> bool:
        """Answer a request, and tell whether another one may follow."""
        line = self.rfile.readline(LONGEST_LINE)
        if not line:
            return False
        parts = REQUEST_LINE.fullmatch(line)
        if not parts:
            raise _UnreadableError("the first line is not that of an HTTP/1.1 request")
        method, path, version = (part.decode("iso-8859-1") for part in parts.groups())
        headers = self._headers()
        arrived = time.monotonic()
        is_last = version == "HTTP/1.0" or "close" in headers.get("Connection", "").lower()
        if "Expect" in headers and version == "HTTP/1.1":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        answer = self._reply(Arrival(arrived, method, path, headers, self._body(headers)))
        if answer.delay:
            self.server.stopped.wait(answer.delay)
        if answer.drop or self.server.stopped.is_set():
            return False
        self._write(answer, has_body=method != "HEAD", is_last=is_last)
        return not is_last

    def _reply(self, arrival: Arrival) -> Answer:
        try:
            return self.server.reply(arrival)
        except BaseException as error:  # what pytest.fail() raises is no Exception
            self.server.errors.append(error)
            return Answer(500, json=_envelope("The sandbox failed", [f"{type(error).__name__}: {error}"], None))

    def _headers(self) -> Message:
        # The parser of http.client takes twice as long, and takes lines that are no headers.
        headers = Message()
        while (line := self.rfile.readline(LONGEST_LINE)) not in (b"\r\n", b"\n"):
            parts = HEADER_LINE.fullmatch(line)
            if not parts:
                raise _UnreadableError("a line is no header")
            name, value = (part.decode("iso-8859-1") for part in parts.groups())
            headers[name] = value.strip(" \t")
        return headers

    def _body(self, headers: Message) -> bytes:
        """Return the whole body, whose length is told as in RFC 9112 section 6.3."""
        if "Transfer-Encoding" in headers:
            if headers["Transfer-Encoding"].lower() != "chunked":
                raise _UnreadableError("Transfer-Encoding must be chunked")
            return b"".join(self._chunks())
        lengths = set(headers.get_all("Content-Length", ["0"]))
        if len(lengths) > 1:
            raise _UnreadableError("there are two values of Content-Length")
        (length,) = lengths
        if not re.fullmatch("[0-9]{1,15}", length):
            raise _UnreadableError("Content-Length is no number")
        return self._read(int(length))

    def _chunks(self) -> Iterator[bytes]:
        """Yield the chunks of RFC 9112 section 7.1."""
        while True:
            parts = CHUNK_LINE.fullmatch(self.rfile.readline(LONGEST_LINE))
            if not parts:
                raise _UnreadableError("the size of a chunk is no number")
            size = int(parts[1], 16)
            if size == 0:
                self._headers()  # the trailer section
                return
            yield self._read(size)
            if self.rfile.readline(2) not in (b"\r\n", b"\n"):
                raise _UnreadableError("a chunk is longer than its size")

    def _read(self, size: int) -> bytes:
        """Return `size` bytes, read piece by piece, since a size is easily claimed."""
        body = bytearray()
        while len(body) < size:
            piece = self.rfile.read(min(size - len(body), 1 << 20))
            if not piece:
                raise _UnreadableError("the body is cut")
            body += piece
        return bytes(body)

    def _write(self, answer: Answer, *, has_body: bool, is_last: bool) -> None:
        body = answer.body.encode() if isinstance(answer.body, str) else answer.body
        headers = {"Content-Type": "application/json", "Date": formatdate(usegmt=True)}
        if answer.status not in (204, 304):
            headers["Content-Length"] = str(len(body))
        if is_last:
            headers["Connection"] = "close"
        if answer.headers:
            given = {name.lower() for name in answer.headers}
            headers = {name: value for name, value in headers.items() if name.lower() not in given}
            headers.update(answer.headers)
        lines = [f"HTTP/1.1 {answer.status} {responses.get(answer.status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("iso-8859-1")
        self.wfile.write(head + body if has_body else head)
