"""The auth object: what every `NexusAuth` is, whichever HTTP library it signs for."""

import contextlib
import copy
import os
import time
from typing import Any, ClassVar, TypeVar

from .credentials import credentials_of
from .environment import Environment
from .errors import TokenRequestError, TokenWaitError
from .grant import Sleep, Steps, T, Terms, Token, TokenRequest

A = TypeVar("A", bound="BaseAuth")
LONGEST = 10**9  # seconds; what locks and sockets take for a time ends not far above


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
            _check_text(name, text)
        for name, seconds in (("leeway", leeway), ("timeout", timeout), ("max_wait", max_wait)):
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
            if not 0 <= seconds <= LONGEST or (name == "timeout" and not seconds):
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
        names = ("CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT", "TOKEN_ENDPOINT", "BASE_URL")
        client_id, client_secret, known, *urls = values = [os.environ.get(prefix + name, "") for name in names]
        if known and any(urls):
            raise ValueError(f"{prefix}ENVIRONMENT is set, and so is a URL that takes its place: unset one of them")
        unneeded = names[2:3] if any(urls) else names[3:]
        if missing := [prefix + n for n, value in zip(names, values, strict=True) if not value and n not in unneeded]:
            raise ValueError(f"environment variables not set: {', '.join(missing)}")
        environment = known or Environment("custom", token_endpoint=urls[0], base_url=urls[1])
        return cls(client_id, client_secret, environment, **options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} client_id={self.client_id!r} environment={self.environment.name!r}>"

    def __getstate__(self) -> dict[str, Any]:
        import pickle  # loaded by now, since this is what it calls, or copy

        state = {**vars(self), "_credentials": None}
        try:
            if lent := copy.copy(self._lent):
                lent.auth = None  # which may be this very object
            pickle.dumps(lent)
        except Exception:
            state["_lent"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._credentials = credentials_of(self.environment.token_endpoint, *self._terms[1:4])

    def _has(self, url: Any) -> bool:
        """Tell whether `url` is within the environment's own origin."""
        raise NotImplementedError

    def _send(self, request: TokenRequest) -> Any:
        """Send `request` with what was lent, or anew, and return the response with its content."""
        raise NotImplementedError

    def _fresh_token(self) -> Token | None:
        token = self._credentials.token
        return token if token and token.is_fresh(time.monotonic(), self._terms.leeway) else None

    def _is_refusal(self, response: Any, token: Token) -> bool:
        """Tell whether `response` is the API's 401 to `token`, and not that of whoever it redirected to."""
        request = response.request
        ours = response.status_code == 401 and request.headers.get("Authorization") == token.authorization
        return ours and self._has(request.url)

    def _perform(self, steps: Steps[T], request: Any) -> T:
        """Perform `steps` so that `request` can be signed, blocking, and return what they come to."""
        answer: Any = None
        with contextlib.closing(steps), contextlib.ExitStack() as held:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as done:
                    return done.value  # type: ignore[no-any-return]
                except self._errors[0] as error:
                    error.request = request  # type: ignore[attr-defined]  # not that with the secret in it
                    raise
                if isinstance(step, TokenRequest):
                    try:
                        answer = self._send(step)
                    except Exception as failure:
                        answer = failure
                elif isinstance(step, Sleep):
                    time.sleep(step.seconds)
                elif answer := self._credentials.lock.acquire(timeout=step.seconds):
                    held.callback(self._credentials.lock.release)

    def _wrong_door(self, request: object) -> TypeError:
        own, other = (kind.__module__.partition(".")[0] for kind in (self._errors[0], type(request)))
        return TypeError(f"this NexusAuth is for {own}; for {other}: from {__package__}.{other} import NexusAuth")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if not value.strip() or value.endswith(("\n", "\r")):
        raise ValueError(f"{name} {'ends with a newline: strip() what is read' if value.strip() else 'is empty'}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} has lone surrogates, as bytes decoded wrongly do")
