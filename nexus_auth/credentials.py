"""Credentials: the one token of one API client in this process, whoever signs with it.

A token is *fresh* and used without any lock; or *stale*, within the leeway: one caller renews it while the others go
on with it; or *expired*: one caller fetches another, and all that wait share what comes of it. A 401 of the API means
that a token was refused: who comes with an older token than the one at hand takes that.
"""

import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from .errors import TokenRequestError, TokenWaitError
from .grant import IMPORTING, Acquire, Steps, Terms, Token, client_credentials_grant
from .quota import Quota

# Seconds without another try, after an error response, after any other failure, and while an old token still serves.
REFUSAL_MEMORY, FAILURE_MEMORY, AHEAD_PAUSE = 10.0, 2.0, 5.0
MAX_PAUSE = 60.0  # seconds between renewals that do not help
KNOWN = 1024  # API clients whose token is kept while no auth object holds it

logger: logging.Logger = logging.getLogger(__package__)


class Credentials:
    """The token of one API client for one scope, and when to try for another."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.lock: threading.Lock = threading.Lock()
        self.clock: Callable[[], float] = time.monotonic
        self.forget()

    def forget(self) -> None:
        """Know neither a token nor a failure."""
        self.token: Token | None = None
        self._failure: Exception | None = None
        self._refused: Token | None = None
        self._next_try = self._ahead_after = self._pause = self._patience = 0.0

    def obtain(self, terms: Terms) -> Steps[Token]:
        """Yield the steps to a token that serves, and return it."""
        token, now = self.token, self.clock()
        if token is None or now >= token.expires_at:
            return (yield from self._replace(token, terms))
        if token.is_fresh(now, terms.leeway) or now < self._ahead_after or not (yield Acquire(0)):
            return token
        try:
            return self._newer(token, terms) or (yield from self._fetch(terms, now + terms.max_wait, ahead=True))
        except Exception as failure:
            logger.warning("a token that is about to expire could not be renewed, and is used on: %s", str(failure))
            self._ahead_after = self.clock() + AHEAD_PAUSE
        return token if self.clock() < token.expires_at else (yield from self._fetch(terms, now + terms.max_wait))

    def renew(self, refused: Token, terms: Terms) -> Steps[Token | None]:
        """Yield the steps after a 401 to `refused`, and return another token; None while renewing does not help."""
        if self.token is refused and self.clock() < self._next_try and not self._failure:
            return None
        token = yield from self._replace(refused, terms)
        if self._refused is not refused:
            self._refused = refused
            self._next_try, self._pause = self.clock() + self._pause, min(2 * self._pause or 1.0, MAX_PAUSE)
            logger.info("%s: renewed the token of client %r after a 401", str(terms), terms.client_id)
        return token

    def judge(self, accepted: bool, terms: Terms) -> None:
        """Learn whether the API accepted what `renew` returned."""
        self._pause *= not accepted
        self._next_try = self.clock() + self._pause
        if not accepted:
            what = "%s gave client %r another token that the API refuses (401). Check base_url and what it may do."
            logger.warning(what, str(terms), terms.client_id)

    def _replace(self, old: Token | None, terms: Terms) -> Steps[Token]:
        """Yield the steps to another token than `old`: one that another caller fetched meanwhile, or a new one."""
        deadline = self.clock() + terms.max_wait
        if token := self._newer(old, terms):
            return token
        if not (yield Acquire(terms.max_wait)):
            error = terms.token_wait_error(f"{terms} keeps another caller waiting, for more than max_wait. Try later.")
            error.retry_after = FAILURE_MEMORY
            raise error
        return self._newer(old, terms) or (yield from self._fetch(terms, deadline))

    def _newer(self, old: Token | None, terms: Terms) -> Token | None:
        """Return the token that has replaced `old`, None if none has; raise the failure that is remembered."""
        if self.token and self.token is not old:
            return self.token
        failure = self._failure if self.clock() < self._next_try else None
        # What took too long for one caller need not for another with more patience.
        if failure and (not isinstance(failure, TokenWaitError) or terms.max_wait <= self._patience):
            raise _as_error_of(terms, failure)
        return None

    def _fetch(self, terms: Terms, deadline: float, ahead: bool = False) -> Steps[Token]:
        try:
            token = yield from client_credentials_grant(terms, self.quota, deadline, ahead, self.clock)
        except Exception as failure:
            if not ahead:
                refused = isinstance(failure, TokenRequestError) and failure.error
                self._next_try = self.clock() + (REFUSAL_MEMORY if refused else FAILURE_MEMORY)
                self._failure, self._patience = _as_error_of(terms, failure), terms.max_wait
            raise
        self.token, self._failure = token, None
        return token


def _as_error_of(terms: Terms, failure: Exception) -> Exception:
    """Return `failure` anew, as an error of the caller's door: none is to be raised in several threads."""
    kind: type[Exception] = type(failure)
    if not isinstance(failure, terms.library_error):
        kind = terms.token_wait_error if isinstance(failure, TokenWaitError) else terms.token_request_error
    error = kind.__new__(kind)
    error.args = failure.args
    members = {name: value for name, value in vars(failure).items() if "request" not in name}  # the caller's own comes
    vars(error).update({**vars(terms.library_error("")), **members})
    return error


_lock = threading.Lock()
_live: weakref.WeakValueDictionary[tuple[str, ...], Credentials] = weakref.WeakValueDictionary()
_quotas: dict[str, Quota] = {}  # of each token endpoint, to which requests count whoever made them


@functools.lru_cache(maxsize=KNOWN)
def credentials_of(*client: str) -> Credentials:
    """Return the one object for a token endpoint, client_id, client_secret and scope."""
    with _lock:
        return _live.setdefault(client, Credentials(_quotas.setdefault(client[0], Quota())))


def forget_tokens() -> None:
    """Forget every token, remembered failure and quota count of this process. For tests."""
    for credentials in list(_live.values()):
        credentials.forget()
    for quota in list(_quotas.values()):
        quota.slots = []


def _replace_locks() -> None:
    """Free a forked child of the locks that other threads of its parent held."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    locked: list[Credentials | Quota] = [*_live.values(), *_quotas.values()]
    for each in locked:
        each.lock = threading.Lock()
    IMPORTING.release()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows does not fork
    os.register_at_fork(before=IMPORTING.acquire, after_in_parent=IMPORTING.release, after_in_child=_replace_locks)
