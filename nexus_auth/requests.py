"""The door for requests: `NexusAuth` signs a session, `nexus_session` makes one for Nexus."""

import contextlib
import copy
import functools
import re
from typing import Any

try:
    import requests
    from requests.auth import AuthBase
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(f"{__name__} needs requests: pip install requests") from _missing

from . import errors
from .auth import BaseAuth
from .environment import Environment
from .grant import HEADERS, Token, form


class TokenRequestError(errors.TokenRequestError, requests.RequestException):
    """`nexus_auth.TokenRequestError` as requests knows it."""


class TokenWaitError(errors.TokenWaitError, requests.RequestException):
    """`nexus_auth.TokenWaitError` as requests knows it."""


class NexusAuth(BaseAuth, AuthBase):
    """Signs the requests of a session to the Nexus API: `session.auth = NexusAuth(client_id, client_secret, "test")`.

    The token is fetched when first needed, shared by all auth objects with the same credentials, renewed before it
    expires and when the API refuses it (401), and sent to the environment's own origin only.

    `environment` is "test", "production" or an `Environment`; `scope` one string, scopes separated by spaces (RFC 6749
    section 3.3). In seconds: from `leeway` before expiry the token is renewed, never earlier than half of its life;
    `timeout` is for one token request, connect and read each; `max_wait` is the longest that one call is held up for
    want of a token. `session` is lent for token requests: its proxies, TLS settings and mounts apply, nothing else.

    Raises `TypeError` or `ValueError` for a wrong argument. Calls raise `TokenRequestError` or `TokenWaitError`, both
    `requests.RequestException` as well, or the connection error that requests raised for the token request.
    """

    _errors = (requests.RequestException, TokenRequestError, TokenWaitError)

    def __init__(self, client_id: str, client_secret: str, environment: Environment | str, *, scope: str = "api1",
                 leeway: float = 60, timeout: float = 10, max_wait: float = 75,
                 session: requests.Session | None = None) -> None:  # fmt: skip
        if not isinstance(session, (requests.Session, type(None))):
            raise TypeError(f"session must be a requests.Session, not {type(session).__name__}")
        super().__init__(client_id, client_secret, environment, scope, leeway, timeout, max_wait, session)
        spelt = str(requests.Request("GET", self.environment.base_url).prepare().url)
        self._origin = "/".join(spelt.split("/")[:3]) + "/"

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        """Sign `r`, if it goes to the Nexus API (requests calls this)."""
        if not isinstance(r, requests.PreparedRequest):
            return super().__call__(r)
        if str(r.url).startswith(self._origin) or self._has(r.url):
            token = self._fresh_token() or self._perform(self._token, r)
            r.headers["Authorization"] = token.authorization
            r.hooks["response"].append(_Hook(self._mend, token))
        return r

    def _mend(self, token: Token, response: requests.Response, **kwargs: Any) -> requests.Response:
        """Return what comes of sending a request once more whose `token` the API refused, or `response`."""
        if response.status_code != 401:
            return response
        response.content  # noqa: B018  once it is read, its connection is free for what follows
        renewed = self._perform(self._renewed, token, response, None)
        if renewed is None:
            return response
        replay = response.request.copy()  # the caller's own may be sent again, with this hook
        replay.headers["Authorization"] = renewed.authorization
        answer: requests.Response = response.connection.send(replay, **kwargs)
        answer.history.append(response)
        self._credentials.judge(answer.status_code, self._terms)
        return answer

    def _has(self, url: Any) -> bool:
        # Requests counts https as a better http, which here is another origin.
        is_other_scheme = url.partition(":")[0].lower() != self._origin.partition(":")[0]
        return not is_other_scheme and not requests.sessions.SessionRedirectMixin().should_strip_auth(self._origin, url)

    def _rewound(self, request: requests.PreparedRequest, marks: Any) -> bool:  # noqa: ARG002
        with contextlib.suppress(requests.exceptions.UnrewindableBodyError, ValueError):  # ValueError: closed meanwhile
            if not isinstance(request.body, (bytes, str, type(None))):
                requests.utils.rewind_body(request)
            return True
        return False

    def _send(self, timeout: float) -> requests.Response:
        # By the adapter, not the session: no header, cookie, hook or auth of a session gets in, and no redirect.
        url = self.environment.token_endpoint
        prepared = requests.Request("POST", url, headers=HEADERS, data=form(self._terms)).prepare()
        with contextlib.nullcontext(self._lent) if self._lent else requests.Session() as session:
            settings = session.merge_environment_settings(url, {}, False, None, None)
            response = session.get_adapter(url).send(prepared, timeout=timeout, **settings)
            response.content  # noqa: B018  read before the session closes
            return response


class _Hook(functools.partial[requests.Response]):
    """A response hook that stays behind when its request is pickled, with a response or an error: it has the secret."""

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (_pass_on,)


def _pass_on(response: requests.Response, **_: Any) -> requests.Response:
    return response


class NexusSession(requests.Session):
    """A `requests.Session` that takes paths relative to `base_url`, and keeps the token on redirects within it."""

    __attrs__: list[str] = [*requests.Session.__attrs__, "base_url"]  # noqa: RUF012
    base_url: str

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """Prepare `request`, its URL joined to `base_url` unless it is absolute."""
        url = request.url.decode() if isinstance(request.url, bytes) else request.url or ""
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


def nexus_session(client_id: str, client_secret: str, environment: Environment | str, *, scope: str = "api1",
                  leeway: float = 60, timeout: float = 10, max_wait: float = 75,
                  iso8601: bool = False) -> NexusSession:  # fmt: skip
    """Return a session for the Nexus API: `session.get("/customer")`. Its settings hold for token requests too.

    `iso8601` asks the API for dates as `yyyy-MM-ddTHH:mm:ssZ`. The other arguments and the errors are those of
    `NexusAuth` (`timeout` is for token requests; requests takes that of an API call with each call).
    """
    session = NexusSession()
    session.base_url = Environment.of(environment).base_url
    session.auth = NexusAuth(client_id, client_secret, environment, scope=scope, leeway=leeway, timeout=timeout,
                             max_wait=max_wait, session=session)  # fmt: skip
    if iso8601:
        session.headers["request_iso8601"] = "true"
    return session
