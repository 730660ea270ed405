"""The auth object: what every `NexusAuth` is, whichever HTTP library it signs for."""

import contextlib
import copy
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from .credentials import credentials_of
from .environment import Environment
from .errors import TokenRequestError, TokenWaitError
from .grant import Sleep, Steps, Terms, Token

A = TypeVar("A", bound="BaseAuth")


class BaseAuth:
    """The arguments of a `NexusAuth`, checked, and the credentials that it shares with others of its kind.

    `environment` and `client_id` can be read; the secret is shown nowhere.
    """

    environment: Environment
    client_id: str
    _errors: ClassVar[tuple[type[Exception], type[TokenRequestError], type[TokenWaitError]]]

    def __init__(self, client_id: str, client_secret: str, environment: Environment | str, scope: str,
                 leeway: float, timeout: float, max_wait: float, lent: Any) -> None:  # fmt: skip
        for name, text in (("client_id", client_id), ("client_secret", client_secret), ("scope", scope)):
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a str, not {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"{name} is empty")
            if re.search(r"[\r\n]\Z|[\ud800-\udfff]", text):
                raise ValueError(f"{name} ends with a newline (strip() what is read), or has lone surrogates")
        for name, seconds in (("leeway", leeway), ("timeout", timeout), ("max_wait", max_wait)):
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
            if not 0 <= seconds <= 1e9 or (name == "timeout" and not seconds):
                raise ValueError(f"{name} must be a sensible number of seconds, not {seconds}")
        self.environment, self.client_id, self._lent = Environment.of(environment), client_id, lent
        times = leeway, timeout, max_wait
        self._terms = Terms(self.environment, client_id, client_secret, scope, *times, *self._errors)
        self._credentials = credentials_of(self.environment.token_endpoint, client_id, client_secret, scope)

    @classmethod
    def from_env(cls: type[A], prefix: str = "NEXUS_", **options: Any) -> A:
        """Return an auth for what the environment variables name; `options` are those of the constructor.

        They are `NEXUS_CLIENT_ID`, `NEXUS_CLIENT_SECRET` and `NEXUS_ENVIRONMENT` (test or production), or in place of
        the last both `NEXUS_TOKEN_ENDPOINT` and `NEXUS_BASE_URL`. Raises `ValueError`, naming all that is missing.
        """
        names = [prefix + name for name in ("CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT", "TOKEN_ENDPOINT", "BASE_URL")]
        client_id, client_secret, known, *urls = [os.environ.get(name, "") for name in names]
        if known and any(urls):
            raise ValueError(f"{names[2]} is set, and so is a URL that takes its place: unset one of them")
        needed = names[:2] + (names[3:] if any(urls) else names[2:3])
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise ValueError(f"environment variables not set: {', '.join(missing)}")
        environment = known or Environment("custom", token_endpoint=urls[0], base_url=urls[1])
        return cls(client_id, client_secret, environment, **options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} client_id={self.client_id!r} environment={self.environment.name!r}>"

    def __getstate__(self) -> dict[str, Any]:
        import pickle  # loaded by now, since this is what it calls, or copy

        state = {**vars(self), "_credentials": None, "_lent": None}
        with contextlib.suppress(Exception):  # what cannot be pickled is left behind
            lent = copy.copy(self._lent)
            lent.auth = None  # which may be this very object
            pickle.dumps(lent)
            state["_lent"] = self._lent
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._credentials = credentials_of(self.environment.token_endpoint, *self._terms[1:4])

    def __call__(self, request: Any) -> Any:
        """Raise `TypeError`: an auth of this library was given to another."""
        own, other = (kind.__module__.partition(".")[0] for kind in (self._errors[0], request.__class__))
        raise TypeError(f"this NexusAuth is for {own}; for {other}: from {__package__}.{other} import NexusAuth")

    def _has(self, url: Any) -> Any:
        """Tell whether `url` is within the environment's own origin."""

    def _rewound(self, request: Any, marks: Any) -> Any:
        """Tell whether the body of `request` can be sent again whole, and set it back to where it started."""

    def _send(self, timeout: float) -> Any:
        """Send a token request with what was lent, or anew, and return the response with its content."""

    def _fresh_token(self) -> Token | None:
        token = self._credentials.token
        return token if token and token.is_fresh(time.monotonic(), self._terms.leeway) else None

    def _token(self, request: Any, lock: threading.Lock, refused: Token | None = None) -> Steps[Any]:
        """Yield the steps to a token for `request`, and return it; None if another than `refused` would not help."""
        known, terms = self._credentials, self._terms
        try:
            return (yield from known.renew(refused, terms, lock) if refused else known.obtain(terms, lock))
        except self._errors[0] as error:
            error.request = request  # type: ignore[attr-defined]  # the token request has the secret in it
            raise

    def _renewed(self, refused: Token, response: Any, marks: Any, lock: threading.Lock) -> Steps[Any]:
        """Yield the steps after the 401 that is `response`, and return the token to send its request with once more."""
        request = response.request  # after redirects within the API, the last one
        if request.headers.get("Authorization") != refused.authorization or not self._has(request.url):
            return None  # a stranger says so, whom the API redirected to
        token = yield from self._token(request, lock, refused)
        return token if token and self._rewound(request, marks) else None

    def _perform(self, steps_of: Callable[..., Steps[Any]], *arguments: Any) -> Any:
        """Perform the steps of a method, blocking, and return what they come to."""
        answer: Any = None
        with contextlib.closing(steps_of(*arguments, self._credentials.lock)) as steps:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as done:
                    return done.value
                if isinstance(step, Sleep):
                    time.sleep(step)
                    continue
                try:
                    answer = self._send(step)
                except Exception as failure:
                    answer = failure
