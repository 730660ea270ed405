"""Credentials: the one token of one API client in this process, whoever signs with it.

A token is *fresh* and used without any lock; or *stale*, within the leeway: one caller renews it while the others go
on with it; or *expired*, or refused by the API (401): one caller fetches another, and all that wait share what comes
of it.
"""

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable

from .errors import NexusAuthError, TokenRequestError, TokenWaitError
from .grant import IMPORTING, Sleep, Steps, Terms, Token, client_credentials_grant, logger
from .quota import LOCK, Quota

# Seconds without another try, after an error response, after any other failure, and while an old token still serves.
REFUSAL_MEMORY, FAILURE_MEMORY, AHEAD_PAUSE = 10.0, 2.0, 5.0
MAX_PAUSE = 60.0  # seconds between renewals that do not help
KNOWN = 1024  # API clients whose token is kept while no auth object holds it


class Credentials:
    """The token of one API client for one scope, and when to try for another."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.lock: threading.Lock = threading.Lock()  # of the thread that fetches; none blocks on it
        self.clock: Callable[[], float] = time.monotonic
        self.forget()

    def forget(self) -> None:
        """Know neither a token nor a failure."""
        self.token: Token | None = None
        self._failure: Exception | None = None
        self._refused: Token | None = None
        self._next_try = self._ahead_after = self._pause = self._patience = 0.0

    def obtain(self, terms: Terms, lock: threading.Lock, refused: Token | None = None) -> Steps[Token]:
        """Yield the steps to a token that serves, as `refused` does not, and return it.

        Who has `lock` fetches for all who come with it, and nobody blocks on it.
        """
        begun = self.clock()
        while True:
            token, failure, now = self.token, self._failure, self.clock()
            left = begun + terms.max_wait - now
            serves = token is not None and token is not refused and now < token.expires_at
            if token and serves and (token.is_fresh(now, terms.leeway) or now < self._ahead_after):
                return token
            # What took too long for one caller need not for another with more patience.
            impatient = terms.max_wait <= self._patience or not isinstance(failure, TokenWaitError)
            if failure and not serves and now < self._next_try and impatient:
                raise _as_error_of(terms, failure)
            if lock.acquire(blocking=False):
                try:
                    unchanged = self.token is token and self._failure is failure
                    if unchanged and (got := (yield from self._fetch(terms, now + left, ahead=serves))):
                        return got
                finally:
                    lock.release()
            elif token and serves:
                return token
            elif left <= 0:
                raise terms.token_wait_error(f"{terms} keeps another caller waiting, longer than max_wait. Try later.")
            else:  # looks that grow rarer: none comes later than a hundredth of a second and a quarter of the wait
                yield Sleep(min(left, 0.01 + (now - begun) / 4))

    def renew(self, refused: Token, terms: Terms, lock: threading.Lock) -> Steps[Token | None]:
        """Yield the steps after a 401 to `refused`, and return another token; None while renewing does not help."""
        if self.token is refused and self.clock() < self._next_try and not self._failure:
            return None
        token = yield from self.obtain(terms, lock, refused)
        if self._refused is not refused:
            self._refused = refused
            self._next_try, self._pause = self.clock() + self._pause, min(2 * self._pause or 1.0, MAX_PAUSE)
            logger.info("%s: renewed the token of client %r after a 401", str(terms), terms.client_id)
        return token

    def judge(self, status_code: int, terms: Terms) -> None:
        """Learn what the API answered to the token that `renew` returned."""
        if status_code != 401:
            self._pause = 0.0
        self._next_try = self.clock() + self._pause
        if status_code == 401:
            what = "%s gave client %r another token that the API refuses (401). Check base_url and what it may do."
            logger.warning(what, str(terms), terms.client_id)

    def _fetch(self, terms: Terms, deadline: float, ahead: bool) -> Steps[Token | None]:
        """Yield the steps to a new token, and return it; None if the old one is to be used on."""
        try:
            self.token = yield from client_credentials_grant(terms, self.quota, deadline, ahead, self.clock)
        except Exception as failure:
            if ahead:
                logger.warning("a token that is about to expire could not be renewed, and is used on: %s", str(failure))
                self._ahead_after = self.clock() + AHEAD_PAUSE
                return None
            if isinstance(failure, (NexusAuthError, terms.library_error)):  # others are the fault of what was lent
                refusal = isinstance(failure, TokenRequestError) and failure.error
                self._next_try = self.clock() + (REFUSAL_MEMORY if refusal else FAILURE_MEMORY)
                self._failure, self._patience = _as_error_of(terms, failure), terms.max_wait
            raise
        self._failure = None
        return self.token


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


_live: weakref.WeakValueDictionary[tuple[str, ...], Credentials] = weakref.WeakValueDictionary()
_quotas: dict[str, Quota] = {}  # of each token endpoint, to which requests count whoever made them


@functools.lru_cache(maxsize=KNOWN)
def credentials_of(*client: str) -> Credentials:
    """Return the one object for a token endpoint, client_id, client_secret and scope."""
    with LOCK:
        return _live.setdefault(client, Credentials(_quotas.setdefault(client[0], Quota())))


def forget_tokens() -> None:
    """Forget every token, remembered failure and quota count of this process. For tests."""
    for credentials in list(_live.values()):
        credentials.forget()
    for quota in list(_quotas.values()):
        quota.slots = []


def _unlock() -> None:
    """Free a forked child of what other threads of its parent were fetching."""
    for credentials in list(_live.values()):
        credentials.lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows does not fork
    os.register_at_fork(after_in_child=_unlock)
    for _lock in (IMPORTING, LOCK):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
