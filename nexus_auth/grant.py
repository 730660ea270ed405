"""The client credentials grant (RFC 6749 section 4.4): one generator that says what to do next on the way to a token.

A driver performs its steps and judges nothing; a test drives it by hand. Every wait, every retry and every answer of
the token endpoint is judged here.
"""

import contextlib
import email.utils
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

from .environment import Environment
from .errors import TokenRequestError, TokenWaitError
from .quota import LIMIT, Quota, Slot

TRIES = 4
BACKOFF = 0.5  # seconds at most before the second try, doubled before each further one
HEADERS = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
IMPORTING = threading.Lock()  # not to be forked within: a child waits for ever for what another thread was importing
T = TypeVar("T")
logger: logging.Logger = logging.getLogger(__package__)


class Terms(NamedTuple):
    """What an auth object asks for, in what times (seconds), and the errors of its door.

    `library_error` is the base of all errors of the door's HTTP library, and so of the other two.
    """

    environment: Environment
    client_id: str
    client_secret: str
    scope: str
    leeway: float
    timeout: float
    max_wait: float
    library_error: type[Exception]
    token_request_error: type[TokenRequestError]
    token_wait_error: type[TokenWaitError]

    def __repr__(self) -> str:
        return f"token endpoint {self.environment.token_endpoint} ({self.environment.name})"


class Sleep(float):
    """Wait so many seconds. Nothing is sent back."""


class TokenRequest(float):
    """POST `form` with `HEADERS` to the token endpoint, with a timeout of so many seconds; follow no redirect.

    Sent back: the HTTP library's response, or the exception that it raised.
    """


Steps = Generator[Sleep | TokenRequest, Any, T]


class Token:
    """An access token, asked for at `asked_at` on the monotonic clock, with `lifetime` seconds to live from then."""

    def __init__(self, access_token: str, lifetime: float, asked_at: float) -> None:
        self.authorization: str = f"Bearer {access_token}"  # RFC 6750 section 2.1
        self.expires_at: float = asked_at + lifetime
        self.half_life: float = asked_at + lifetime / 2

    def is_fresh(self, now: float, leeway: float) -> bool:
        """Tell whether more than `leeway` seconds are left to live, or more than half of the lifetime."""
        return now < self.half_life or now < self.expires_at - leeway


def client_credentials_grant(
    terms: Terms, quota: Quota, deadline: float, ahead: bool = False, clock: Callable[[], float] = time.monotonic
) -> Steps[Token]:
    """Yield the steps to a new token, and return it.

    Connection errors, 429 and 5xx are tried again, `TRIES` in all, none after `deadline`. With `ahead` nothing is
    waited for, since the caller has a token that still serves. Raises the errors of `terms`.
    """
    attempt = 0
    while True:
        attempt, slot = attempt + 1, Slot()
        try:
            while (wait := quota.wait(slot, clock())) > 0:
                yield _sleep(wait, f"takes {LIMIT} requests a minute", terms, 0.0 if ahead else deadline - clock())
            asked_at = clock()
            answer = yield TokenRequest(min(terms.timeout, max(0.001, deadline - asked_at)))
        finally:
            quota.release(slot, clock())
        try:
            return _token(answer, terms, asked_at)
        except terms.library_error:
            delay = _retry_delay(answer, BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1))
            if delay is None or ahead or attempt == TRIES:
                raise
        problem = type(answer).__name__ if isinstance(answer, Exception) else f"HTTP {answer.status_code}"
        yield _sleep(delay, f"failed with {problem}", terms, deadline - clock(), logging.WARNING)


def form(terms: Terms) -> str:
    """Return the body of the token request (RFC 6749 section 4.4.2), with the client secret in it."""
    fields = urlencode({"grant_type": "client_credentials", "scope": terms.scope})
    method = _oauth_client(terms).client_auth("client_secret_post")
    return str(method.prepare("POST", terms.environment.token_endpoint, {}, fields)[2])


def _oauth_client(terms: Terms) -> Any:
    with IMPORTING:
        from authlib.oauth2.client import OAuth2Client  # loaded late: it takes long, and who has a token needs none

    return OAuth2Client(None, terms.client_id, terms.client_secret)


def _sleep(seconds: float, reason: str, terms: Terms, patience: float, level: int = logging.DEBUG) -> Sleep:
    message = f"{terms} {reason}: the next is due in {seconds:.1f} s"
    if seconds > patience:
        error = terms.token_wait_error(f"{message}, later than max_wait allows. Try again then.")
        error.retry_after = seconds
        raise error
    logger.log(logging.WARNING if seconds > 1 else level, message)
    return Sleep(seconds)


def _retry_delay(answer: Any, backoff: float) -> float | None:
    """Return the seconds until the next try: `backoff`, or what Retry-After asks for (RFC 9110 section 10.2.3)."""
    if not isinstance(answer, Exception):
        if answer.status_code != 429 and answer.status_code < 500:
            return None
        value = answer.headers.get("Retry-After", "")
        date: Any = email.utils.parsedate_tz(value)  # in all three formats
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return max(backoff, float(value) if value.isdecimal() else email.utils.mktime_tz(date) - time.time())
    return backoff


def _token(answer: Any, terms: Terms, asked_at: float) -> Token:
    """Return the token in `answer` (RFC 6749 section 5.1), or raise the error that stands in its place."""
    if isinstance(answer, terms.library_error) and not str(answer).startswith(str(terms)):  # a mock's may come twice
        cause: BaseException = answer
        while not str(cause) and cause.__context__:  # some errors say nothing, but what they came of does
            cause = cause.__cause__ or cause.__context__
        reason = _printable(f"{type(answer).__name__}: {cause}", terms)
        answer.args = (f"{terms} could not be reached. Check network, proxy and TLS settings. {reason}",)
    if isinstance(answer, Exception):
        raise answer
    members: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # no JSON, or JSON that is no object
        members = {**json.loads(answer.content)}
    if failure := _failure(answer, members, terms):
        raise failure
    lifetime = _lifetime(members.get("expires_in"))
    # Authlib is shown only what was looked at: it takes odd answers for tokens, and odd lifetimes raise.
    checked = SimpleNamespace(status_code=200, json=lambda: {"access_token": members["access_token"]})
    token = _oauth_client(terms).parse_response_token(checked)
    logger.debug("%s: a token for client %r, for %s s", str(terms), terms.client_id, lifetime)
    return Token(token["access_token"], lifetime, asked_at)


def _failure(response: Any, members: dict[str, Any], terms: Terms) -> TokenRequestError | None:
    """Return the error that `response` is (RFC 6749 section 5.2), None if it is a token."""
    status, token = response.status_code, members.get("access_token")
    error, description = (_printable(members.get(name), terms) for name in ("error", "error_description"))
    target = _printable(re.split("[?#]", response.headers.get("Location", ""))[0], terms)
    reasons = {
        f"refused client {terms.client_id!r}: {f'{error}, {description}' if description else error}": error,
        f"redirected to {target}, which is not followed": 300 <= status < 400,
        "is busy or down": status == 429 or status >= 500,
        "gave neither a token nor an OAuth error": not 200 <= status < 300,
        "gave no usable access_token": not (isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token)),  # A.12
        "gave a token of another type than Bearer": str(members.get("token_type", "Bearer")).lower() != "bearer",
    }
    reason = next((reason for reason, wrong in reasons.items() if wrong), None)
    if reason is None:
        return None
    advice = "Check client_id, client_secret and scope: are they of this environment?"
    advice = advice if error else "Check token_endpoint; if it is right, try again later."
    failure = terms.token_request_error(f"{terms} {reason} (HTTP {status}). {advice}")
    vars(failure).update(error=error, error_description=description, status_code=status, environment=terms.environment)
    return failure


def _lifetime(expires_in: Any) -> float:
    """Return seconds: infinite for no sensible number, so that the token serves until the API refuses it."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if expires_in is not True and (seconds := float(expires_in)) >= 1:
            return seconds
    return float("inf")


def _printable(text: object, terms: Terms) -> str | None:
    """Return what came from elsewhere as an error may show it: on one line, not long, and without the secret."""
    if not isinstance(text, str) or not text:
        return None
    # However it is spelt (percent, HTML, JSON, ...), its letters and digits stay as they are.
    if all(run in text for run in re.findall("[A-Za-z0-9]+", terms.client_secret)):
        return "(withheld: the secret is in it)"
    return "".join(c if c.isprintable() else " " for c in text)[:400]
