"""The auth flows that httpx and httpx2 share, one blocking and one for event loops, and how both send token requests.

Token requests do not go through httpx's own auth flow: there they would have no timeout as a whole, follow redirects
with the secret in their body, show in `response.history` and event hooks, and their errors would not reach the flow.
"""

import contextlib
import functools
import ssl
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypedDict, TypeVar

from .auth import REPEATABLE, BaseAuth, credentials_or_env, merged_cookies, own_send, store_from_env
from .environment import Environment
from .event_loop import anyio, here, in_own_thread
from .grant import HEADERS, authlib_client, form, logger, unpacked, user_agent
from .known import Call, Decision
from .secret import hidden, hidden_secret, leaving_no_locals
from .steps import MAX_BODY, CallStore, Failed, Response, SendTokenRequest, Sleep, Steps
from .threads import cut_off_at, result_of, start_thread
from .token import Token
from .value import Value, replace

LEAST_LIMIT = 1.0  # seconds that a token request is given in any case
AT_ONCE = 0.001  # seconds: a timeout of 0 would be none
GRACE = 0.05  # seconds after a deadline, for the timeouts of the library to come first

if TYPE_CHECKING:
    from .auth import StoreArgument

C = TypeVar("C")
T = TypeVar("T")
Headers = Mapping[str, str] | Sequence[tuple[str, str]]
Positions = tuple[tuple[Any, int], ...]  # files, and where each stood before it was sent
ClientOptions = TypedDict("ClientOptions", {  # what both libraries take; Any is a type of theirs
    "params": Any, "headers": Headers, "cookies": Any, "verify": ssl.SSLContext | str | bool, "cert": Any,
    "trust_env": bool, "http1": bool, "http2": bool, "proxy": Any, "mounts": Mapping[str, Any], "timeout": Any,
    "follow_redirects": bool, "limits": Any, "max_redirects": int, "transport": Any,
    "event_hooks": Mapping[str, list[Callable[..., Any]]], "default_encoding": str | Callable[[bytes], str],
}, total=False)  # fmt: skip


class FactoryOptions(ClientOptions, total=False):
    """The options of `nexus_client` and `nexus_async_client`, for type checkers."""

    scope: str
    leeway: float
    max_wait: float
    store: "StoreArgument | None"
    iso8601: bool


class HTTPXAuth(BaseAuth, Generic[C]):
    """The `NexusAuth` of both libraries; `_library` is the one that it signs for."""

    _library: ClassVar[Any]

    def __init__(
        self,
        client_id: str,
        client_secret: str,
        environment: Environment | str,
        *,
        scope: str = "api1",
        leeway: float = 60,
        timeout: float = 10,
        max_wait: float = 75,
        store: "StoreArgument | None" = None,
        client: C | None = None,
    ) -> None:
        client_secret, store = hidden_secret(client_secret), hidden(store)
        if not isinstance(client, (self._library.Client, self._library.AsyncClient, type(None))):
            raise TypeError(f"client must be a client of {self._library.__name__}, not {type(client).__name__}")
        super().__init__(
            client_id, client_secret, environment,
            scope=scope, leeway=leeway, timeout=timeout, max_wait=max_wait, store=store, lent=client,
        )  # fmt: skip
        try:
            self._library.URL(self.environment.token_endpoint)
            url = self._library.URL(self.environment.base_url)
        except self._library.InvalidURL as error:
            raise ValueError(f"environment {self.environment.name!r}: {error}") from error
        self._origin = _origin(url)

    def __call__(self, request: Any) -> Any:
        """Raise `TypeError`: an auth of this library was given to another."""
        raise self._reject(request)

    async def async_access_token(self, *, refused: str | None = None) -> str:
        """Return what `access_token` returns, without blocking the event loop."""
        decision = await self._obtain_async(self._insistent_call(refused), refused)
        return self._token_of(decision).access_token

    def sync_auth_flow(self, request: Any) -> Generator[Any, Any, None]:
        """Sign `request`, blocking while a token is waited for (httpx calls this)."""
        if not self._has(request.url):
            self._say_no_token_sent(request.url)
            yield request
            return
        call, files = None, _positions(request.stream, self._library)
        token = self._credentials.fresh_token(self._limits.leeway)
        if token is None:
            call = Call(self._limits)
            token = self._token(self._obtain(call), request)
        request.headers["Authorization"] = token.authorization
        response = yield request
        if not self._is_refused(token, response):
            return
        response.read()  # its connection is free for what follows
        call = call or Call(self._limits)
        call.repeatable = _rewound(files, response.request.stream, self._library)
        decision = self._obtain(call, token.access_token)
        if renewed := self._replay_token(decision, call, response.request):
            with self._replay(call) as status_codes:
                replay = yield self._replay_of(response, renewed)
                status_codes.append(replay.status_code)

    async def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        """Sign `request`, never blocking the event loop (httpx calls this)."""
        if not self._has(request.url):
            self._say_no_token_sent(request.url)
            yield request
            return
        call, files = None, _positions(request.stream, self._library)
        token = self._credentials.fresh_token(self._limits.leeway)
        if token is None:
            call = Call(self._limits)
            token = self._token(await self._obtain_async(call), request)
        request.headers["Authorization"] = token.authorization
        response = yield request
        if not self._is_refused(token, response):
            return
        await response.aread()
        call = call or Call(self._limits)
        call.repeatable = _rewound(files, response.request.stream, self._library)
        decision = await self._obtain_async(call, token.access_token)
        if renewed := self._replay_token(decision, call, response.request):
            with self._replay(call) as status_codes:
                replay = yield self._replay_of(response, renewed)
                status_codes.append(replay.status_code)

    def _has(self, url: Any) -> bool:
        """Tell whether `url` is within the environment's own origin."""
        return _origin(url) == self._origin

    def _is_refused(self, token: Token, response: Any) -> bool:
        """Tell whether the API refused `token`; learn what it answered, if that is wanted."""
        if response.status_code != 401 and self._credentials.known.renewals.on_trial is None:
            return False
        request = response.request  # after redirects within the API, the last one
        if request.headers.get("Authorization") != token.authorization or not self._has(request.url):
            return False  # of a stranger to whom the API redirected
        self._credentials.answered(token.access_token, response.status_code)
        return bool(response.status_code == 401)

    def _replay_of(self, refused: Any, token: Token) -> Any:
        """Return the request of the response `refused` with another `token`, and the cookies that came with the 401."""
        replay = refused.request
        replay.headers["Authorization"] = token.authorization
        sent = replay.headers.pop("Cookie", "")  # the libraries add none where there is one
        self._library.Cookies(refused.cookies).set_cookie_header(replay)
        if cookies := merged_cookies(sent, replay.headers.get("Cookie", "")):
            replay.headers["Cookie"] = cookies
        return replay

    def _travelling(self) -> None:
        if self._borrowed is not None:
            logger.debug("the client that is lent stays behind when its auth is pickled")

    def _obtain(self, call: Call, refused: str | None = None) -> Decision:
        self._check_kind(self._library.Client)
        return super()._obtain(call, refused)

    async def _obtain_async(self, call: Call, refused: str | None = None) -> Decision:
        """Return what came of the way to a token, without blocking the event loop."""
        self._check_kind(self._library.AsyncClient)
        return await self._perform_async(self._credentials.obtain(call, here(), refused))

    async def _perform_async(self, steps: Steps[T]) -> T:
        """Do what `_perform` does, without blocking the event loop."""
        answer: Any = None
        with contextlib.closing(steps):
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                answer = None
                match step:
                    case Sleep(seconds):
                        await anyio().sleep(seconds)
                    case SendTokenRequest():
                        answer = await self._send_async(step)
                    case CallStore(function, limit):  # pragma: no branch  # there is no other
                        with anyio().move_on_after(limit):
                            answer = await in_own_thread(function)

    def _send(self, step: SendTokenRequest) -> Response | Failed:
        sender = self._sender(self._library.Client)
        limit = sender.limit(step)
        deadline = time.monotonic() + limit
        if not sender.may_repeat:
            return self._exchange(step, sender, deadline)
        answer = result_of(start_thread(lambda: self._exchange(step, sender, deadline)), limit)
        return answer or _timed_out(limit)

    def _exchange(self, step: SendTokenRequest, sender: "Sender", deadline: float) -> Response | Failed:
        """Return the answer to a token request, blocking."""
        with leaving_no_locals(), contextlib.ExitStack() as stack:
            try:
                send = sender.send or stack.enter_context(self._own_client(self._library.Client)).send
                request = self._token_request(step, deadline)
                # Each part of a request has a timeout of its own. Of the start of each httpcore tells this function.
                request.extensions["trace"] = functools.partial(_shorten, request.extensions["timeout"], deadline)
                response = send(request, auth=None, follow_redirects=False, stream=True)
                stack.callback(response.close)
                return Response(response.status_code, response.headers, self._body(response, deadline))
            except self._library_error as error:
                return self._failed(error)

    async def _send_async(self, step: SendTokenRequest) -> Response | Failed:
        sender = self._sender(self._library.AsyncClient)
        limit = sender.limit(step)
        deadline = time.monotonic() + limit
        # The library's own timeouts close what it has opened, and say what was too slow.
        with leaving_no_locals(), anyio().move_on_after(limit + GRACE):
            return await self._exchange_async(step, sender, deadline)
        return _timed_out(limit)

    async def _exchange_async(self, step: SendTokenRequest, sender: "Sender", deadline: float) -> Response | Failed:
        """Return the answer to a token request, without blocking the event loop."""
        if not authlib_client.is_loaded:  # pragma: no cover  # once in a process
            await in_own_thread(authlib_client)
        async with contextlib.AsyncExitStack() as stack:
            try:
                send = sender.send
                if send is None:
                    # Made in a thread: its trust store takes long to read.
                    client = await in_own_thread(lambda: self._own_client(self._library.AsyncClient))
                    send = (await stack.enter_async_context(client)).send
                request = self._token_request(step, deadline)
                response = await send(request, auth=None, follow_redirects=False, stream=True)
                stack.push_async_callback(response.aclose)
                return Response(response.status_code, response.headers, await self._async_body(response))
            except self._library_error as error:
                return self._failed(error)

    def _token_request(self, step: SendTokenRequest, deadline: float) -> Any:
        headers = {**HEADERS, "User-Agent": user_agent(f"python-{self._library.__name__}/{self._library.__version__}")}
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), _left_until(deadline))
        url, content = step.client.token_endpoint, form(step.client)
        return self._library.Request("POST", url, headers=headers, content=content, extensions={"timeout": timeouts})

    def _own_client(self, kind: Any) -> Any:
        """Return a client for one token request. Plain http is loopback: no proxy leads there, and it needs no TLS."""
        is_plain = self.environment.token_endpoint.lower().startswith("http:")
        options = {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "trust_env": False} if is_plain else {}
        return _preparing_no_redirect(kind(**options))

    def _failed(self, error: Exception) -> Failed:
        failed = super()._failed(error)
        if failed.timed_out and error.__cause__ is not None:
            return replace(failed, text="timed out")  # what the libraries have from anyio tells of its insides
        return failed

    def _check_kind(self, kind: Any) -> None:
        """Raise an error if a client is lent that is closed, or not of the `kind` that a call takes."""
        lent = self._borrowed
        if lent is None:
            return
        if not isinstance(lent, kind):
            own, other = kind.__name__, type(lent).__name__
            raise TypeError(f"this call takes a client of kind {own}; its auth was lent one of kind {other}")
        if lent.is_closed is True:  # a mock may say anything
            raise RuntimeError("the client that is lent for token requests has been closed")

    def _sender(self, kind: Any) -> "Sender":
        """Return what sends a request through the transport of the client that is lent, if one is, of that `kind`.

        Neither its cookies nor its hooks have a part in it.
        """
        lent = self._borrowed
        if lent is None:
            return Sender(None)
        if send := own_send(lent):
            return Sender(send)
        # There is no public way to the transport that a client takes for a URL: its mounts and proxies choose it.
        transport = lent._transport_for_url(self._library.URL(self.environment.token_endpoint))
        is_the_librarys = type(transport).__module__.partition(".")[0] == self._library.__name__
        client = _preparing_no_redirect(kind(transport=transport, trust_env=False))
        return Sender(client.send, may_repeat=not is_the_librarys)

    def _body(self, response: Any, deadline: float) -> bytes | None:
        """Return the body of `response`, None if it is longer than `MAX_BODY`; raise a timeout error at `deadline`."""
        if response.is_stream_consumed:
            return response.content if len(response.content) <= MAX_BODY else None  # by a mock
        body = bytearray()
        try:
            with cut_off_at(deadline, _connection_of(response)):
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > MAX_BODY:
                        return None
                    if time.monotonic() > deadline:
                        break
        except self._library_error:
            if time.monotonic() <= deadline:
                raise
        if time.monotonic() > deadline:
            raise self._library.ReadTimeout("the answer has not come to its end in time")
        return unpacked(bytes(body), response.headers.get("Content-Encoding", ""))

    async def _async_body(self, response: Any) -> bytes | None:
        """Return what `_body` returns; the deadline is that of the whole request."""
        if response.is_stream_consumed:
            return response.content if len(response.content) <= MAX_BODY else None
        body = bytearray()
        async with contextlib.aclosing(response.aiter_raw()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > MAX_BODY:
                    return None
        return unpacked(bytes(body), response.headers.get("Content-Encoding", ""))


def _preparing_no_redirect(client: Any) -> Any:
    """Return `client`, changed: both libraries prepare even redirects that are not followed, and odd ones raise."""
    client._build_redirect_request = _same_request
    return client


def _same_request(request: Any, _response: Any) -> Any:
    return request


class Sender(Value):
    """The function that sends a token request, None for that of a client of its own.

    One that `may_repeat` it goes through a transport of others, which may retry and wait by itself.
    """

    send: Callable[..., Any] | None
    may_repeat: bool = False

    def limit(self, step: SendTokenRequest) -> float:
        """Return the seconds after which the request is given up."""
        return min(step.timeout, max(step.left, LEAST_LIMIT)) if self.may_repeat else step.timeout


def _shorten(timeouts: dict[str, float], deadline: float, *_: object) -> None:
    """Have no part of a request that starts now end after `deadline`."""
    timeouts.update(dict.fromkeys(timeouts, _left_until(deadline)))


def _left_until(deadline: float) -> float:
    return max(deadline - time.monotonic(), AT_ONCE)


def _connection_of(response: Any) -> Any:
    """Return the socket on which the body of `response` comes; None where there is none, or others share it."""
    stream = response.extensions.get("network_stream")
    return stream.get_extra_info("socket") if stream is not None and response.http_version != "HTTP/2" else None


def _timed_out(seconds: float) -> Failed:
    return Failed("ReadTimeout", f"there was no whole answer in {seconds:.1f} s", timed_out=True)


def _positions(stream: Any, library: Any) -> Positions | None:
    """Return the files that `stream` reads and where they stand, None if it could not be sent again whole."""
    kind = stream.__class__
    if kind is library.ByteStream:
        return ()
    if not hasattr(kind, "__iter__") or not kind.__module__.startswith(f"{library.__name__}."):
        return None
    # Neither library has a public way to the file of a stream: that of multipart has `fields`, some with a `file`, that
    # of `content=file` holds it as an attribute of some private name.
    attributes: dict[str, Any] = stream.__dict__
    sources = [getattr(field, "file", b"") for field in attributes.get("fields", ())] or attributes.values()
    try:
        return tuple((source, source.tell()) for source in sources if not isinstance(source, (bool, *REPEATABLE)))
    except (AttributeError, OSError, ValueError):
        return None


def _rewound(files: Positions | None, stream: Any, library: Any) -> bool:
    """Set `files` back, and tell whether `stream` can be sent whole: a redirect may have made it another."""
    if isinstance(stream, library.ByteStream):
        return True
    if files is None:
        return False
    try:
        for file, position in files:
            file.seek(position)
    except (AttributeError, OSError, ValueError):  # ValueError: closed meanwhile
        return False
    return True


def make_client(
    kind: Callable[..., C],
    auth_class: Any,
    credentials: tuple[str | None, str | None, Environment | str | None],
    auth_options: dict[str, Any],
    iso8601: bool,
    client_options: Mapping[str, Any],
) -> C:
    """Return a client of `kind` for the Nexus API, signed by an auth of its own to which it is lent.

    It is lent weakly, since it owns the auth: neither would be freed at once.
    """
    for option, source in (("auth", "credentials"), ("base_url", "environment")):
        if option in client_options:
            raise TypeError(f"{option} cannot be given: it is made of the {source}")
    if credentials == (None, None, None):
        auth_options["store"] = auth_options["store"] or store_from_env()
    client_id, client_secret, name = credentials_or_env(*credentials)
    environment = Environment.of(name)
    if "timeout" in client_options and (read := auth_class._library.Timeout(client_options["timeout"]).read):
        auth_options["timeout"] = read
    auth = auth_class(client_id, client_secret, environment, **auth_options)
    client: Any = kind(auth=None, base_url=environment.base_url, **client_options)
    client.auth = auth.lent(weakref.ref(client))
    if iso8601:
        client.headers["request_iso8601"] = "true"
    return client  # type: ignore[no-any-return]


def _origin(url: Any) -> tuple[str, str, int]:
    return url.scheme, url.host.lower(), url.port or (443 if url.scheme == "https" else 80)
