"""The door for requests: `NexusAuth` signs a session, `nexus_session` makes one for Nexus."""

import contextlib
import copy
import inspect
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, overload

try:
    import requests
    from requests.adapters import BaseAdapter, HTTPAdapter
    from requests.auth import AuthBase
    from requests.cookies import get_cookie_header
    from requests.sessions import Session, SessionRedirectMixin
    from requests.utils import default_user_agent, rewind_body
    from urllib3 import HTTPResponse, Retry, Timeout
    from urllib3.exceptions import HTTPError, ReadTimeoutError
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(f"{__name__} needs requests: pip install requests") from _missing

from . import errors
from .auth import REPEATABLE, BaseAuth, credentials_or_env, merged_cookies, own_send, store_from_env, travelling
from .credentials import Credentials
from .environment import Environment
from .grant import HEADERS, form, unpacked, user_agent
from .known import Call, Limits
from .secret import hidden, hidden_secret, leaving_no_locals
from .steps import MAX_BODY, Failed, Response, SendTokenRequest
from .threads import cut_off_at
from .token import Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .auth import StoreArgument

CHUNK = 2**16  # bytes that are read at once, at most


class TokenRequestError(errors.TokenRequestError, requests.RequestException):
    """`nexus_auth.TokenRequestError` as requests knows it."""


class TokenWaitError(errors.TokenWaitError, requests.RequestException):
    """`nexus_auth.TokenWaitError` as requests knows it."""


class NexusAuth(BaseAuth, AuthBase):
    """Signs the requests of a session to the Nexus API: `session.auth = NexusAuth(client_id, client_secret, "test")`.

    The token is fetched when first needed, shared by all auth objects with the same credentials, renewed before it
    expires and when the API refuses it (401), and sent to the environment's own origin only.

    `environment` is "test", "production" or an `Environment`; `scope` one string, scopes separated by spaces (RFC 6749
    section 3.3). In seconds: from `leeway` before expiry the token is renewed, never before half of its life is over;
    `timeout` is for one token request as a whole; `max_wait` is the longest that one call is held up for want of a
    token. `store` is where processes and machines share the token and the quota: a folder, a URL of Redis, or a
    `nexus_auth.store.Store`. `session` is lent for token requests: its proxies, TLS settings and mounts apply, nothing
    else.

    `environment`, `client_id`, `scope` and `expires_in` of an auth can be read.

    Raises `TypeError` or `ValueError` for a wrong argument. Calls raise `TokenRequestError` or `TokenWaitError`, both
    `requests.RequestException` as well, or the connection error that requests raised for the token request.
    """

    _library_errors: ClassVar[ModuleType] = requests.exceptions
    _library_error: ClassVar[type[Exception]] = requests.RequestException
    _connection_error: ClassVar[type[Exception]] = requests.ConnectionError
    _timeout_error: ClassVar[type[Exception]] = requests.Timeout
    _token_request_error: ClassVar[type[errors.TokenRequestError]] = TokenRequestError
    _token_wait_error: ClassVar[type[errors.TokenWaitError]] = TokenWaitError

    _signature: "_Signature | None" = None  # the last one that was made for a fresh token

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
        session: requests.Session | None = None,
    ) -> None:
        client_secret, store = hidden_secret(client_secret), hidden(store)
        # Not `Session`, which caching libraries replace: a session may be made of either class.
        if not isinstance(session, (SessionRedirectMixin, type(None))):
            raise TypeError(f"session must be a requests.Session, not {type(session).__name__}")
        super().__init__(
            client_id, client_secret, environment,
            scope=scope, leeway=leeway, timeout=timeout, max_wait=max_wait, store=store, lent=session,
        )  # fmt: skip
        base_url = str(requests.Request("GET", self.environment.base_url).prepare().url)
        self._origin = "/".join(base_url.split("/")[:3]) + "/"

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        """Sign `r`, if it goes to the Nexus API (requests calls this)."""
        if not isinstance(r, requests.PreparedRequest):
            raise self._reject(r)
        url = str(r.url)
        if not url.startswith(self._origin) and not self._has(url):  # the first, which is quick, nearly always tells
            self._say_no_token_sent(url)
            return r
        signature = self._signature
        if signature is None or not signature.serves():
            signature = self._new_signature(r)
        r.headers["Authorization"] = signature.authorization
        r.hooks["response"].append(signature.mend)
        return r

    def _new_signature(self, request: requests.PreparedRequest) -> "_Signature":
        """Return what to sign `request` with; keep it for others, unless this call has been held up for it."""
        token = self._credentials.fresh_token(self._limits.leeway)
        if token is None:
            call = Call(self._limits)
            token = self._token(self._obtain(call), request)
            return _Signature(token, self._credentials, self._limits, self._mended, call)
        # Another one mends: this auth and what it is lent would not be freed at once if its signature held it. It is of
        # no subclass, which may be made in another way.
        mender = self._twin(NexusAuth)
        signature = self._signature = _Signature(token, self._credentials, self._limits, mender._mended)
        return signature

    def _mended(
        self, response: requests.Response, token: Token, call: Call | None, options: dict[str, Any]
    ) -> requests.Response:
        """Return what comes of sending a request once more whose `token` the API refused, or `response`."""
        # After redirects within the API it is that of the last one.
        request: requests.PreparedRequest | None = getattr(response, "request", None)
        if request is None:
            return response  # of a mock or an adapter that does not say what it answers
        if request.headers.get("Authorization") != token.authorization or not self._has(str(request.url)):
            return response  # of a stranger to whom the API redirected
        self._credentials.answered(token.access_token, response.status_code)
        if response.status_code != 401:
            return response
        response.content  # noqa: B018  once it is read, its connection is free for what follows
        connection: Any = getattr(response, "connection", None)  # of the adapter, unless that made a bare response
        call = call or Call(self._limits)
        call.repeatable = connection is not None and _rewound(request)
        renewed = self._replay_token(self._obtain(call, token.access_token), call, request)
        if renewed is None or connection is None:
            return response
        replay = _replay_of(response, renewed)
        with self._replay(call) as status_codes:
            answer: requests.Response = connection.send(replay, **options)
            status_codes.append(answer.status_code)
        answer.history.append(response)
        return answer

    def _has(self, url: str) -> bool:
        """Tell whether `url` is within the environment's own origin."""
        # Requests counts https as a better http, which here is another origin.
        is_other_scheme = url.partition(":")[0].lower() != self._origin.partition(":")[0]
        return not is_other_scheme and not SessionRedirectMixin().should_strip_auth(self._origin, url)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_signature": None})  # that one mends by way of the auth that was copied

    def _travelling(self) -> requests.Session | None:
        lent = self._borrowed
        if lent is None or isinstance(self._lent, weakref.ref):  # a copy of such a session lends itself
            return None
        settings = Session()
        for name in ("proxies", "verify", "cert", "trust_env", "adapters"):
            setattr(settings, name, getattr(lent, name))
        return travelling(settings, "session that is lent")

    def _send(self, step: SendTokenRequest) -> Response | Failed:
        with leaving_no_locals():
            return self._exchange(step)

    def _exchange(self, step: SendTokenRequest) -> Response | Failed:
        deadline = time.monotonic() + step.timeout
        url = step.client.token_endpoint
        headers = {**HEADERS, "User-Agent": user_agent(default_user_agent())}
        prepared = requests.Request("POST", url, headers=headers, data=form(step.client)).prepare()
        options: dict[str, Any] = {"timeout": step.timeout, "allow_redirects": False, "stream": True}
        with contextlib.ExitStack() as stack:
            try:
                session = self._borrowed
                if session is None:
                    session = stack.enter_context(_default_session(url))
                send = own_send(session)
                if send is None:
                    adapter = session.get_adapter(url)
                    send = _TokenSession(adapter).send
                    options = {**session.merge_environment_settings(url, {}, True, None, None), **options}
                    if isinstance(adapter, HTTPAdapter):  # others need not know that kind
                        options["timeout"] = Timeout(total=step.timeout)
                response = send(prepared, **options)
                stack.callback(response.close)
                return Response(response.status_code, response.headers, _body(response, deadline))
            except requests.RequestException as error:
                return self._failed(error)


def _default_session(url: str) -> Session:
    """Return a session for where none is lent; plain http is loopback, and no proxy leads there."""
    session = Session()
    session.trust_env = not url.lower().startswith("http:")
    return session


class _TokenSession(Session):
    """A session for one token request, with nothing of the caller's in it but an adapter."""

    def __init__(self, adapter: BaseAdapter) -> None:
        super().__init__()
        once = _without_retries(adapter)
        for prefix in self.adapters:
            self.adapters[prefix] = once

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None: no redirect is followed, and none is prepared, which would read the whole body."""


def _without_retries(adapter: BaseAdapter) -> BaseAdapter:
    """Return an adapter with the pools of `adapter` that sends each request once: what is sent more often counts more.

    A copy by `copy.copy` would have new pools, and lose what a subclass added.
    """
    retries = getattr(adapter, "max_retries", None)
    if not isinstance(adapter, HTTPAdapter) or not isinstance(retries, Retry):
        return adapter
    if retries.total == 0 and not retries.status_forcelist:  # a status of that list would be raised as an error
        return adapter
    kind = type(adapter)
    # A twin that closes itself in the end would close the pools that it shares.
    twin: Any = object.__new__(HTTPAdapter if hasattr(kind, "__del__") else kind)
    twin.__dict__.update(adapter.__dict__)
    for base in kind.__mro__:
        for name, slot in vars(base).items():
            if inspect.ismemberdescriptor(slot) and hasattr(adapter, name):
                object.__setattr__(twin, name, getattr(adapter, name))
    object.__setattr__(twin, "max_retries", Retry(0, read=False))
    return twin  # type: ignore[no-any-return]


def _body(response: requests.Response, deadline: float) -> bytes | None:
    """Return the body of `response`, None if it is longer than `MAX_BODY`; raise an error of requests at `deadline`."""
    raw, body = response.raw, bytearray()
    if not isinstance(raw, HTTPResponse) or raw.tell():
        return _body_already_read(response)
    try:
        with cut_off_at(deadline, raw):
            for chunk in _chunks(raw):
                body += chunk
                if len(body) > MAX_BODY:
                    return None
                if time.monotonic() > deadline:
                    break
    except (HTTPError, ValueError) as error:  # ValueError: a length that is none
        if time.monotonic() <= deadline and not isinstance(error, ReadTimeoutError):
            raise requests.exceptions.ChunkedEncodingError(str(error)) from error
    if time.monotonic() > deadline:
        raise requests.ReadTimeout("the answer has not come to its end in time")
    if raw.length_remaining:  # pragma: no cover  # urllib3 1.26 does not mind
        raise requests.exceptions.ChunkedEncodingError("the answer has come to its end too early")
    return unpacked(bytes(body), response.headers.get("Content-Encoding", ""))


def _body_already_read(response: requests.Response) -> bytes | None:
    """Return the body of a `response` that an adapter has read, or a mock has made."""
    content: Any = response.content or b""
    if not isinstance(content, bytes):  # a `unittest.mock.Mock` may have nothing but its `json`
        content = json.dumps(response.json()).encode()
    return content if len(content) <= MAX_BODY else None


def _chunks(raw: HTTPResponse) -> Iterator[bytes]:
    """Yield the parts of a body as they come, still packed."""
    # urllib3 1.26 has no read1; there a part comes when it is complete, or the connection is cut off.
    read: Any = getattr(raw, "read1", raw.read)
    while chunk := read(CHUNK, decode_content=False):
        yield chunk


def _replay_of(refused: requests.Response, token: Token) -> requests.PreparedRequest:
    """Return the request of the response `refused` with another `token`, and the cookies that came with the 401."""
    replay = refused.request.copy()  # the caller's own may be sent again, with its hook
    replay.headers["Authorization"] = token.authorization
    sent = str(replay.headers.pop("Cookie", ""))  # the libraries add none where there is one
    if cookies := merged_cookies(sent, get_cookie_header(refused.cookies, replay) or ""):
        replay.headers["Cookie"] = cookies
    return replay


def _rewound(request: requests.PreparedRequest) -> bool:
    """Tell whether the body of `request` can be sent again whole, and set a file back to where it stood."""
    body = request.body
    if body is None or isinstance(body, REPEATABLE):
        return True
    try:
        rewind_body(request)
    except (requests.exceptions.UnrewindableBodyError, ValueError):  # ValueError: closed meanwhile
        return False
    return True


class _Signature:
    """What requests are signed with: the header of a token, and the hook that mends a 401 to it.

    An auth makes one for each token, since one for each request would be a third of what it adds to a call.
    """

    __slots__ = ("_call", "_credentials", "_fresh_until", "_mended", "_token", "authorization")

    def __init__(
        self,
        token: Token,
        credentials: Credentials,
        limits: Limits,
        mended: Callable[[requests.Response, Token, Call | None, dict[str, Any]], requests.Response],
        call: Call | None = None,
    ) -> None:
        self.authorization = token.authorization
        self._token = token
        self._credentials = credentials
        self._fresh_until = token.fresh_until(limits.leeway)
        self._mended = mended
        self._call = call  # the only one that is signed with it, if that was held up for its token

    def serves(self) -> bool:
        """Tell whether its token is the one that is known, and is fresh."""
        return self._token is self._credentials.known.token and self._credentials.clock() < self._fresh_until

    def mend(self, response: requests.Response, **options: Any) -> requests.Response:
        """Return `response`, or what came of sending its request once more after a 401 (a response hook)."""
        call = self._call
        if call is not None and not response.is_redirect:
            self._call = None  # its request may be sent again, and is another call then
        if response.status_code != 401 and self._credentials.known.renewals.on_trial is None:
            return response
        return self._mended(response, self._token, call, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoSignature, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Signature":
        return self


class _NoSignature:
    """What stands for a signature in a pickle of its request, with a response or an error: it takes no secret along."""

    def mend(self, response: requests.Response, **_: Any) -> requests.Response:
        """Return `response` (a response hook)."""
        return response


class NexusSession(requests.Session):
    """A `requests.Session` that takes paths relative to `base_url`, and keeps the token on redirects within it."""

    __attrs__: list[str] = [*requests.Session.__attrs__, "base_url", "lends_itself"]  # noqa: RUF012
    base_url: str
    auth: Any  # as requests has it
    lends_itself: bool = False

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """Prepare `request`, its URL joined to `base_url` unless it is absolute."""
        given: Any = request.url  # requests takes bytes, and objects with a text
        url = (given.decode() if isinstance(given, bytes) else str(given or "")).lstrip()
        if not re.match(r"[a-z][a-z0-9+.-]*://", url, re.IGNORECASE):
            request = copy.copy(request)
            request.url = f"{self.base_url.rstrip('/')}/{url.lstrip('/')}"
        return super().prepare_request(request)

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Keep the token on redirects within the API, where requests would prefer an entry of netrc to it."""
        url = str(prepared_request.url)
        if self.should_strip_auth(self.base_url, url):
            super().rebuild_auth(prepared_request, response)
        elif self.should_strip_auth(str(response.request.url), url):
            prepared_request.headers.pop("Authorization", None)  # that of a stranger

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.lends_itself and isinstance(self.auth, NexusAuth):
            self.lend_to(self.auth)

    def lend_to(self, auth: NexusAuth) -> None:
        """Sign with a copy of `auth` to which this session is lent: weakly, or neither would be freed at once."""
        self.lends_itself = True
        self.auth = auth.lent(weakref.ref(self))


class SessionOptions(TypedDict, total=False):
    """The options of `nexus_session`, for type checkers."""

    scope: str
    leeway: float
    timeout: float
    max_wait: float
    store: "StoreArgument | None"
    iso8601: bool


@overload
def nexus_session(
    client_id: str, client_secret: str, environment: Environment | str, **options: "Unpack[SessionOptions]"
) -> NexusSession: ...
@overload
def nexus_session(**options: "Unpack[SessionOptions]") -> NexusSession: ...
def nexus_session(
    client_id: str | None = None,
    client_secret: str | None = None,
    environment: Environment | str | None = None,
    *,
    scope: str = "api1",
    leeway: float = 60,
    timeout: float = 10,
    max_wait: float = 75,
    store: "StoreArgument | None" = None,
    iso8601: bool = False,
) -> NexusSession:
    """Return a session for the Nexus API: `session.get("/customer")`. Its settings hold for token requests too.

    Without `client_id`, `client_secret` and `environment` it is that of the environment variables; see
    `NexusAuth.from_env`. `iso8601` asks the API for dates as `yyyy-MM-ddTHH:mm:ssZ`. The other arguments and the errors
    are those of `NexusAuth` (`timeout` is for token requests; requests takes that of an API call with each call).
    """
    client_secret, store = hidden_secret(client_secret), hidden(store)
    if client_id is client_secret is environment is None:
        store = store or store_from_env()
    auth = NexusAuth(
        *credentials_or_env(client_id, client_secret, environment),
        scope=scope, leeway=leeway, timeout=timeout, max_wait=max_wait, store=store,
    )  # fmt: skip
    session = NexusSession()
    session.base_url = auth.environment.base_url
    session.lend_to(auth)
    if iso8601:
        session.headers["request_iso8601"] = "true"
    return session
