"""A Nexus on loopback, to test against without an account: identity server and API in one real HTTP server."""

from __future__ import annotations

import json
import secrets
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from .environment import Environment

__all__ = ["Arrival", "NexusSandbox"]


class Arrival(NamedTuple):
    """A request as it arrived: `time` on the monotonic clock, `path` with its query, `headers` whatever their case."""

    time: float
    method: str
    path: str
    headers: Message
    body: bytes

    @property
    def form(self) -> list[tuple[str, str]]:
        """The fields of a form, in order."""
        return parse_qsl(self.body.decode(), keep_blank_values=True)


class Answer(NamedTuple):
    """A scripted answer; see `NexusSandbox.fail_token_requests` and `NexusSandbox.answer`."""

    status: int
    body: bytes
    headers: dict[str, str]
    delay: float = 0.0
    drop: bool = False


class NexusSandbox:
    """Plays Nexus on a free port of 127.0.0.1 for as long as its `with` block lasts.

        with NexusSandbox() as nexus, nexus_session(nexus.client_id, nexus.client_secret, nexus.environment) as session:
            session.get("/customer")

    It gives out tokens that live `expires_in` seconds (any JSON value, or None for no such member), to `client_id` with
    `client_secret` and whomever else `clients` names, for `scopes`, and at most `limit` in any 60 s; everything else
    it answers as RFC 6749 section 5.2 says. Its API echoes any request with a valid token in Nexus's envelope, and
    says 401 to others. With an `ssl_context` it is https://localhost. Every instance has a secret of its own, so that
    no two share a token. What arrived is in `token_requests` and `requests`, in order.
    """

    environment: Environment

    def __init__(self, *, client_id: str = "sandbox-client", client_secret: str | None = None, expires_in: Any = 3600,
                 scopes: tuple[str, ...] = ("api1", "sanctionlist"), limit: int = 60,
                 ssl_context: ssl.SSLContext | None = None) -> None:  # fmt: skip
        self.client_id = client_id
        self.client_secret: str = client_secret or secrets.token_urlsafe(24)
        self.clients: dict[str, str] = {client_id: self.client_secret}
        self.expires_in = expires_in
        self.scopes = scopes
        self.limit = limit
        self.token_requests: list[Arrival] = []
        self.requests: list[Arrival] = []
        self._ssl_context = ssl_context
        self._granted: deque[float] = deque()
        self._tokens: dict[str, float] = {}
        self._faults: deque[Answer] = deque()
        self._answers: dict[str, deque[Answer]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> NexusSandbox:
        self._server = _Server(self._reply)
        host, scheme = f"127.0.0.1:{self._server.server_port}", "http"
        if self._ssl_context:
            host, scheme = f"localhost:{self._server.server_port}", "https"
            # The handshake is for the connection's own thread: here it would hold up all others.
            self._server.socket = self._ssl_context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        base_url = f"{scheme}://{host}"
        self.environment = Environment("sandbox", token_endpoint=f"{base_url}/connect/token", base_url=base_url)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def revoke_tokens(self) -> None:
        """Take no token any more that has been given out so far."""
        with self._lock:
            self._tokens.clear()

    def fail_token_requests(self, times: int = 1, *, status: int = 503, body: bytes | str = b"",
                            headers: dict[str, str] | None = None, retry_after: int | str | None = None,
                            delay: float = 0.0, drop: bool = False) -> None:  # fmt: skip
        """Answer the next `times` token requests so, after `delay` seconds; `drop` closes the connection instead.

        Of connection errors, 429 and 5xx a caller makes 4 tries, so that fewer `times` are not noticed.
        `retry_after` is in seconds, or an HTTP date.
        """
        wait = {} if retry_after is None else {"Retry-After": str(retry_after)}
        headers = {**(headers or {}), **wait}
        answer = Answer(status, body.encode() if isinstance(body, str) else body, headers, delay, drop)
        with self._lock:
            self._faults.extend([answer] * times)

    def answer(self, path: str, *, status: int = 200, json: Any = None, headers: dict[str, str] | None = None,
               delay: float = 0.0, drop: bool = False, times: int = 1) -> None:  # fmt: skip
        """Answer the next `times` API requests to `path` so, valid token or not; `json` is the whole document."""
        body = b"" if json is None else _dumps(json)
        with self._lock:
            answers = self._answers.setdefault("/" + path.lstrip("/"), deque())
            answers.extend([Answer(status, body, headers or {}, delay, drop)] * times)

    def _reply(self, arrival: Arrival) -> Answer:
        path = urlsplit(arrival.path).path
        with self._lock:
            if path == "/connect/token":
                self.token_requests.append(arrival)
                return self._faults.popleft() if self._faults else self._token(arrival)
            self.requests.append(arrival)
            for scripted in (arrival.path, path):
                if self._answers.get(scripted):
                    return self._answers[scripted].popleft()
            scheme, _, token = (arrival.headers["Authorization"] or "").partition(" ")
            if scheme != "Bearer" or self._tokens.get(token, 0) < arrival.time:
                return _envelope(401, "Unauthorized", ["The access token is missing, expired or revoked"])
        echo = {"method": arrival.method, "path": arrival.path, "body": arrival.body.decode(errors="replace")}
        return _envelope(200, "Successfully processed your request", None, echo)

    def _token(self, arrival: Arrival) -> Answer:
        while self._granted and self._granted[0] <= arrival.time - 60:
            self._granted.popleft()
        if len(self._granted) >= self.limit:
            wait = self._granted[0] + 60 - arrival.time
            return Answer(429, b"", {"Retry-After": str(int(wait) + 1)})
        self._granted.append(arrival.time)
        if error := self._refusal(arrival):
            return Answer(400, _dumps({"error": error}), {})
        token = secrets.token_urlsafe(24)
        sensible = isinstance(self.expires_in, (int, float)) and 1 <= self.expires_in <= 1e9
        lives = self.expires_in if sensible else float("inf")
        self._tokens[token] = arrival.time + lives
        members = {} if self.expires_in is None else {"expires_in": self.expires_in}
        return Answer(200, _dumps({"access_token": token, "token_type": "Bearer", **members}), {})

    def _refusal(self, arrival: Arrival) -> str | None:
        """Return the error code of RFC 6749 section 5.2 that `arrival` deserves."""
        form = dict(arrival.form)
        fields = {"client_id", "client_secret", "grant_type", "scope"}
        is_form = arrival.headers.get_content_type() == "application/x-www-form-urlencoded"
        is_whole = set(form) == fields and len(arrival.form) == len(fields)
        if arrival.method != "POST" or not is_form or not is_whole or "Authorization" in arrival.headers:
            return "invalid_request"
        if form["grant_type"] != "client_credentials":
            return "unsupported_grant_type"
        if self.clients.get(form["client_id"]) != form["client_secret"]:
            return "invalid_client"
        return None if set(form["scope"].split(" ")) <= set(self.scopes) else "invalid_scope"


def _dumps(document: Any) -> bytes:
    return json.dumps(document).encode()


def _envelope(status: int, message: str, errors: list[str] | None, values: Any = None) -> Answer:
    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'} if status == 401 else {}  # RFC 6750 section 3
    return Answer(status, _dumps({"message": message, "errors": errors, "values": values}), headers)


class _Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True
    block_on_close = False

    def __init__(self, reply: Callable[[Arrival], Answer]) -> None:
        self.reply = reply
        self.stopped = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a client breaks off: tests do that on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        headers: Any = self.headers
        arrival = Arrival(time.monotonic(), self.command, self.path, headers, self._body())
        answer = self.server.reply(arrival)
        if self.server.stopped.wait(answer.delay) or answer.drop:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self.wfile.flush()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""
