"""The auth flows that httpx and httpx2 share, one blocking and one not, and the clients that are made with them.

Token requests do not go through httpx's own auth flow: there they would have no timeout, follow redirects with the
secret in their body, show in `response.history` and event hooks, and their errors would never reach the flow.
"""

import contextlib
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

from .auth import BaseAuth
from .environment import Environment
from .grant import HEADERS, IMPORTING, Sleep, Steps, form

if TYPE_CHECKING:
    from typing_extensions import Unpack

# One for the tasks of each event loop, for each set of credentials: who waited for another loop might wait for one that
# has ended, or that it holds up itself.
_locks: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, threading.Lock]] = weakref.WeakKeyDictionary()
C = TypeVar("C")
Headers = Mapping[str, str] | Sequence[tuple[str, str]]
ClientOptions = TypedDict("ClientOptions", {  # what both libraries take; Any is a type of theirs
    "params": Any, "headers": Headers, "cookies": Any, "verify": ssl.SSLContext | str | bool, "cert": Any,
    "trust_env": bool, "http1": bool, "http2": bool, "proxy": Any, "mounts": Mapping[str, Any], "timeout": Any,
    "follow_redirects": bool, "limits": Any, "max_redirects": int, "transport": Any,
    "event_hooks": Mapping[str, list[Callable[..., Any]]], "default_encoding": str | Callable[[bytes], str],
}, total=False)  # fmt: skip


class HTTPXAuth(BaseAuth, Generic[C]):
    """The `NexusAuth` of both libraries; `_library` is the one that it signs for."""

    _library: Any

    def __init__(self, client_id: str, client_secret: str, environment: Environment | str, *, scope: str = "api1",
                 leeway: float = 60, timeout: float = 10, max_wait: float = 75, client: C | None = None,
                 ) -> None:  # fmt: skip
        if not isinstance(client, (self._library.Client, self._library.AsyncClient, type(None))):
            raise TypeError(f"client must be a client of {self._library.__name__}, not {type(client).__name__}")
        super().__init__(client_id, client_secret, environment, scope, leeway, timeout, max_wait, client)
        try:
            self._library.URL(self.environment.token_endpoint)
            url = self._library.URL(self.environment.base_url)
        except self._library.InvalidURL as error:
            raise ValueError(f"environment {self.environment}: {error}") from error
        self._origin = _origin(url)

    def sync_auth_flow(self, request: Any) -> Generator[Any, Any, None]:
        """Sign `request`, blocking while a token is waited for (httpx calls this)."""
        if not self._has(request.url):
            yield request
            return
        marks = _bookmarks(request.stream, self._library)
        token = self._fresh_token() or self._perform(self._token, request)
        request.headers["Authorization"] = token.authorization
        response = yield request
        if response.status_code == 401:
            response.read()  # its connection is free for what follows
            if renewed := self._perform(self._renewed, token, response, marks):
                response.request.headers["Authorization"] = renewed.authorization
                self._credentials.judge((yield response.request).status_code, self._terms)

    async def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        """Sign `request`, never blocking the event loop (httpx calls this)."""
        if not self._has(request.url):
            yield request
            return
        marks = _bookmarks(request.stream, self._library)
        token = self._fresh_token() or await self._perform_async(self._token, request)
        request.headers["Authorization"] = token.authorization
        response = yield request
        if response.status_code == 401:
            await response.aread()
            if renewed := await self._perform_async(self._renewed, token, response, marks):
                response.request.headers["Authorization"] = renewed.authorization
                self._credentials.judge((yield response.request).status_code, self._terms)

    async def _perform_async(self, steps_of: Callable[..., Steps[Any]], *arguments: Any) -> Any:
        """Do what `_perform` does, without blocking the event loop."""
        with IMPORTING:
            from anyio import lowlevel, sleep, to_thread  # loaded late: it takes long, and blocking callers need none

        loop, answer = lowlevel.current_token(), None
        locks = _locks.setdefault(getattr(loop, "native_token", loop), weakref.WeakKeyDictionary())
        lock = locks.setdefault(self._credentials, threading.Lock())
        with contextlib.closing(steps_of(*arguments, lock)) as steps:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as done:
                    return done.value
                if isinstance(step, Sleep):
                    await sleep(step)
                    continue
                try:
                    # Prepared in a thread: the first time it takes Authlib, and a new client a whole trust store.
                    opened, request = await to_thread.run_sync(self._prepare, self._library.AsyncClient, step)
                    async with opened as client:
                        answer = await client.send(request, auth=None, follow_redirects=False)
                except Exception as failure:
                    answer = failure

    def _send(self, timeout: float) -> Any:
        opened, request = self._prepare(self._library.Client, timeout)
        with opened as client:
            return client.send(request, auth=None, follow_redirects=False)

    def _rewound(self, request: Any, marks: Any) -> bool:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            for file, position in marks or ():
                file.seek(position)
            return marks is not None or isinstance(request.stream, self._library.ByteStream)
        return False

    def _prepare(self, kind: Any, timeout: float) -> tuple[Any, Any]:
        """Return a context with a client for token requests, and the token request for it."""
        extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout)}
        url, body = self.environment.token_endpoint, form(self._terms)
        request = self._library.Request("POST", url, headers=HEADERS, content=body, extensions=extensions)
        if self._lent is None:
            # An empty trust store is made at once, and plain http (loopback) needs no other.
            return kind(verify=request.url.scheme == "https" or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)), request
        if not isinstance(self._lent, kind):
            raise TypeError(f"this call takes a {kind.__name__}, and the client lent to its auth is another")
        # All is as lent but cookies and hooks. A copy would read its __dict__, which slows CPython for its whole life.
        view: Any = type("View", (self._lent.__class__,), {"__getattr__": self._lent.__getattribute__})
        client = view.__new__(view)
        client.event_hooks = client.cookies = {}
        return contextlib.nullcontext(client), request

    def _has(self, url: Any) -> bool:
        return _origin(url) == self._origin


class ClientFactory(Generic[C]):
    """Makes clients for the Nexus API: `client.get("/customer")`. Their settings hold for token requests too.

    `iso8601` asks the API for dates as `yyyy-MM-ddTHH:mm:ssZ`; `client_options` are those of the HTTP library's client.
    The other arguments and the errors are those of `NexusAuth`.
    """

    def __init__(self, kind: Callable[..., C], auth: Callable[..., Any]) -> None:
        self._kind, self._auth = kind, auth

    def __call__(self, client_id: str, client_secret: str, environment: Environment | str, *, scope: str = "api1",
                 leeway: float = 60, max_wait: float = 75, iso8601: bool = False,
                 **client_options: "Unpack[ClientOptions]") -> C:  # fmt: skip
        """Return a client, signed by an auth of its own to which it is lent."""
        client: Any = self._kind(auth=None, base_url=Environment.of(environment).base_url, **client_options)
        if iso8601:
            client.headers["request_iso8601"] = "true"
        timeout = {"timeout": client.timeout.read} if "timeout" in client_options and client.timeout.read else {}
        client.auth = self._auth(client_id, client_secret, environment, scope=scope, leeway=leeway, max_wait=max_wait,
                                 client=client, **timeout)  # fmt: skip
        return client  # type: ignore[no-any-return]


def _origin(url: Any) -> tuple[str, str, int]:
    return url.scheme, url.host.lower(), url.port or (443 if url.scheme == "https" else 80)


def _bookmarks(stream: Any, library: Any) -> list[tuple[Any, int]] | None:
    """Return the files that `stream` reads and where they stand, None if it could not be sent again whole."""
    kind = stream.__class__
    if kind is library.ByteStream:
        return []
    if hasattr(kind, "__iter__") and kind.__module__.startswith(f"{library.__name__}."):
        # Neither library has a public way to the file of a stream: that of multipart has `fields`, some with a `file`,
        # that of `content=file` holds it as an attribute of some private name.
        attributes: dict[str, Any] = stream.__dict__
        sources = [getattr(field, "file", b"") for field in attributes.get("fields", ())] or attributes.values()
        with contextlib.suppress(AttributeError, OSError, ValueError):
            return [(source, source.tell()) for source in sources if not isinstance(source, (bytes, str, bool))]
    return None
