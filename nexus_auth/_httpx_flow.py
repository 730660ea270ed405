"""The flow that httpx and httpx2 share: one generator of requests and steps, and the two drivers of it.

Token requests do not go through httpx's own auth flow: there they would have no timeout, follow redirects with the
secret in their body, show in `response.history` and event hooks, and their errors would never reach the flow.
"""

import contextlib
import copy
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import Any, Generic, TypedDict, TypeVar

from .auth import BaseAuth
from .environment import Environment
from .grant import HEADERS, IMPORTING, TokenRequest

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
            url, _ = (self._library.URL(url) for url in (self.environment.base_url, self.environment.token_endpoint))
        except self._library.InvalidURL as error:
            raise ValueError(f"environment {self.environment}: {error}") from error
        self._origin = _origin(url)

    def __call__(self, request: object) -> Any:
        """Raise `TypeError`: only another library calls an auth of this one."""
        raise self._wrong_door(request)

    def sync_auth_flow(self, request: Any) -> Generator[Any, Any, None]:
        """Sign `request`, blocking while a token is waited for (httpx calls this)."""
        flow = self._flow(request)
        answer: Any = None
        refused = False
        while True:
            try:
                step = flow.send(answer)
            except StopIteration:
                return
            if isinstance(step, self._library.Request):
                answer = yield step
                if answer.status_code == 401:
                    answer.read()  # its connection is free for what follows
                    refused = True
                elif not refused:
                    return  # which the flow would say as well, but later
            else:
                answer = self._perform(step, request)

    async def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        """Sign `request`, never blocking the event loop (httpx calls this)."""
        flow = self._flow(request)
        answer: Any = None
        refused = False
        while True:
            try:
                step = flow.send(answer)
            except StopIteration:
                return
            if isinstance(step, self._library.Request):
                answer = yield step
                if answer.status_code == 401:
                    await answer.aread()
                    refused = True
                elif not refused:
                    return  # which the flow would say as well, but later
            else:
                with IMPORTING:
                    from .event_loop import perform  # and with it anyio, which is slow to load

                answer = await perform(self._credentials, step, self._send_async, self._errors[0], request)

    def _flow(self, request: Any) -> Generator[Any, Any, None]:
        """Yield requests to be sent and steps to be performed; be sent what comes of each."""
        url = request.url
        if (url.host, url.scheme, url.port) != self._origin and not self._has(url):
            yield request
            return
        marks = _bookmarks(request.stream, self._library)
        token = self._credentials.token
        if token is None or not token.is_fresh(time.monotonic(), self._terms.leeway):
            token = yield self._credentials.obtain(self._terms)
        request.headers["Authorization"] = token.authorization
        response = yield request
        if self._is_refusal(response, token):
            refused = response.request  # after redirects within the API, the last one
            token = yield self._credentials.renew(token, self._terms)
            if token and (isinstance(refused.stream, self._library.ByteStream) or _rewound(marks)):
                refused.headers["Authorization"] = token.authorization
                response = yield refused
                self._credentials.judge(response.status_code != 401, self._terms)

    def _has(self, url: Any) -> bool:
        return _origin(url) == self._origin

    def _prepare(self, kind: Any, request: TokenRequest) -> tuple[Any, Any]:
        """Return a client for token requests, and the token request for it."""
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), request.timeout)
        prepared = self._library.Request(
            "POST", request.url, headers=HEADERS, content=request.form(), extensions={"timeout": timeout}
        )
        if self._lent is None:
            # An empty trust store is made at once, and plain http (loopback) needs no other.
            verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if prepared.url.scheme == "http" else True
            return kind(verify=verify), prepared
        if not isinstance(self._lent, kind):
            raise TypeError(f"this call takes a {kind.__name__}, and the client lent to its auth is another")
        client = copy.copy(self._lent)  # so that neither cookies nor hooks are shared
        client.event_hooks = client.cookies = {}
        return client, prepared

    def _send(self, request: TokenRequest) -> Any:
        client, prepared = self._prepare(self._library.Client, request)
        with contextlib.nullcontext() if self._lent else client:
            return client.send(prepared, auth=None, follow_redirects=False)

    async def _send_async(self, request: TokenRequest) -> Any:
        import anyio.to_thread

        # Prepared in a thread: the first time it takes Authlib, and a new client a whole trust store.
        client, prepared = await anyio.to_thread.run_sync(self._prepare, self._library.AsyncClient, request)
        async with contextlib.nullcontext() if self._lent else client:
            return await client.send(prepared, auth=None, follow_redirects=False)


def open_client(kind: Callable[..., C], auth: Callable[..., Any], client_id: str, client_secret: str,
                environment: Environment | str, iso8601: bool, options: Any, **terms: Any) -> C:  # fmt: skip
    """Return a client of `kind` for the Nexus API, made with `options` and lent to its own `auth`."""
    client: Any = kind(auth=None, base_url=Environment.of(environment).base_url, **options)
    if iso8601:
        client.headers["request_iso8601"] = "true"
    if "timeout" in options and client.timeout.read:
        terms["timeout"] = client.timeout.read
    client.auth = auth(client_id, client_secret, environment, client=client, **terms)
    return client  # type: ignore[no-any-return]


def _origin(url: Any) -> tuple[str, str, int | None]:
    default = {"https": 443, "http": 80}.get(url.scheme)
    return url.host.lower(), url.scheme, None if url.port == default else url.port


def _bookmarks(stream: Any, library: Any) -> list[tuple[Any, int]] | None:
    """Return the files that `stream` reads and where they stand, None if it could not be sent again whole."""
    kind = stream.__class__
    if kind is library.ByteStream:
        return []
    if not hasattr(kind, "__iter__") or not kind.__module__.startswith(f"{library.__name__}."):
        return None
    # Neither library has a public way to the file of a stream: that of multipart has `fields`, some with a `file`,
    # that of `content=file` holds it as an attribute of some private name.
    attributes: dict[str, Any] = stream.__dict__
    sources = [getattr(field, "file", b"") for field in attributes.get("fields", ())] or attributes.values()
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return [(source, source.tell()) for source in sources if not isinstance(source, (bytes, str, bool))]
    return None


def _rewound(marks: list[tuple[Any, int]] | None) -> bool:
    """Set the files back to their marks, and tell whether all the body can be sent again."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        for file, position in marks or []:
            file.seek(position)
        return marks is not None
    return False
