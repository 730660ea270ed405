"""What one API client shares with other processes through a store: its token, the turn to fetch, the quota.

All of it blocks, so the core asks a driver to call it. Nothing here raises: a store that is out of order is left alone
for a while, and the process goes on as it would without one.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from .grant import MAX_RETRY_AFTER, Fault, FaultKind, logger
from .known import Failure
from .quota import KEEP, LIMIT, LOCK
from .steps import Client
from .store import Store
from .store._seal import Seal
from .token import Token
from .value import Value

T = TypeVar("T")

OUTAGE = 30.0  # seconds without another call of a store that is out of order
MOST_STUCK = 8  # calls that hang in a store at most, each in its thread, before it is left alone until one returns
LAST_TIME = 1.0  # seconds that what is put away is kept, empty: some stores take whole seconds only
UNKNOWN_LIFETIME = 86400.0  # seconds that a token is kept which has no lifetime


class News(Value):
    """What others have left in the store, and in how many seconds the turn to fetch may be free; 0: it is ours."""

    token: Token | None = None
    failure: Failure | None = None
    closed_for: float = 0.0  # seconds that the token endpoint wants to be left alone
    turn_in: float = 0.0


class Shared:
    """The place of one API client in a store."""

    def __init__(self, store: Store, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._seal = Seal(client)
        self._clock = clock
        endpoint = hashlib.sha256(client.token_endpoint.encode()).hexdigest()
        self._quota, self._closed = f"quota:{endpoint}", f"closed:{endpoint}"
        self._health = _health_of(store)
        self.is_prepared: bool = False

    def prepare(self) -> bool:
        """Make the keys to what is in the store: it needs no store, but its time where many processes start at once."""

        def prepare() -> bool:
            self._seal.name("turn")
            return True

        self.is_prepared = self._health.call(prepare, False, self._clock)
        return True

    def look(self, owner: str, hold: float, known: Collection[str | None], concerns: Callable[[Failure], bool]) -> News:
        """Return what others have left: a token that is not `known`, or a failure that `concerns` the call.

        If there is nothing, take the turn to fetch, or keep it: it is that of `owner` for `hold` seconds.
        """

        def look() -> News:
            if news := self._new_token(known):
                return news
            turn = self._seal.name("turn")
            turn_in = _seconds(self._store.acquire(turn, owner, 1, hold))
            news = self._hindrance(concerns)
            if not turn_in:
                # Whoever had the turn may have left a token after the first look.
                news = self._new_token(known) or news
                if news:
                    self._store.release(turn, owner, 0.0)
            return news or News(turn_in=turn_in)

        return self._health.call(look, News(), self._clock)

    def look_for_token(self, known: Collection[str | None]) -> News:
        """Return a token that others have left, if there is one that is not `known`."""
        return self._health.call(lambda: self._new_token(known) or News(), News(), self._clock)

    def _new_token(self, known: Collection[str | None]) -> News | None:
        token = self._get("token", _token_from_json)
        return News(token=token) if token is not None and token.access_token not in known else None

    def _hindrance(self, concerns: Callable[[Failure], bool]) -> News | None:
        """Return what tells not to ask the token endpoint now, if anything does."""
        failure = self._get("failure", _failure_from_json)
        if failure is not None and concerns(failure):
            return News(failure=failure)
        closed = self._store.get(self._closed)
        closed_for = min(_seconds(closed[1]), MAX_RETRY_AFTER) if closed else 0.0
        return News(closed_for=closed_for) if closed_for else None

    def acquire(self, permit: str, hold: float) -> float:
        """Return the seconds to wait for a permit of the quota; 0: `permit` is held for `hold` seconds."""

        def acquire() -> float:
            return _seconds(self._store.acquire(self._quota, permit, LIMIT, hold))

        return self._health.call(acquire, 0.0, self._clock)

    def tell(
        self, permit: str, owner: str, outcome: Token | Failure | None, closed_for: float, hold: float = 0.0
    ) -> bool:
        """Say that the token request of `permit` was answered, and what came of it; then it is another's turn.

        Without an outcome `owner` keeps the turn for its next try, if it still has it: for `hold` seconds.
        """

        def tell() -> None:
            now = self._clock()
            if isinstance(outcome, Token):
                self._put("token", _token_to_json(outcome), min(outcome.expires_at - now, UNKNOWN_LIFETIME))
                self._forget("failure")
            if isinstance(outcome, Failure):
                self._put("failure", _failure_to_json(outcome), outcome.until - now)
            if closed_for > 0:
                self._store.put(self._closed, b"1", closed_for)
            self._store.release(self._quota, permit, KEEP)
            turn = self._seal.name("turn")
            if outcome is not None:
                self._store.release(turn, owner, 0.0)
            elif hold > 0:
                self._store.acquire(turn, owner, 1, hold)

        self._health.call(tell, None, self._clock)
        return True

    def give_back_permit(self, permit: str) -> bool:
        """Free the permit of a token request that is not sent."""
        self._health.call(lambda: self._store.release(self._quota, permit, 0.0), None, self._clock)
        return True

    def give_back_turn(self, owner: str) -> bool:
        """Free the turn to fetch, if it is that of `owner`."""
        self._health.call(lambda: self._store.release(self._seal.name("turn"), owner, 0.0), None, self._clock)
        return True

    def gave_up(self) -> None:
        """Leave the store alone for a while, which has not answered in time."""
        self._health.is_out_of_order("it does not answer", self._clock())

    def _put(self, kind: str, document: dict[str, Any], ttl: float) -> None:
        if ttl > 0:
            self._store.put(self._seal.name(kind), self._seal.seal(kind, json.dumps(document).encode()), ttl)

    def _forget(self, kind: str) -> None:
        """Put away the value of that kind, if there is one: no store need know how to delete."""
        if self._store.get(self._seal.name(kind)) is not None:
            self._store.put(self._seal.name(kind), b"", LAST_TIME)

    def _get(self, kind: str, read: Callable[[dict[str, Any], float, float], T]) -> T | None:
        """Return the value of that kind, None if there is none that can be read: it may be of another version."""
        found = self._store.get(self._seal.name(kind))
        opened = self._seal.open(kind, found[0]) if found else None
        if found is None or opened is None:
            return None
        try:
            return read(json.loads(opened), self._clock(), found[1])
        except (KeyError, TypeError, ValueError):
            return None


def _token_to_json(token: Token) -> dict[str, Any]:
    return {"access_token": token.access_token, "lifetime": None if token.lifetime == math.inf else token.lifetime}


def _token_from_json(document: dict[str, Any], now: float, left: float) -> Token:
    """Return the token of a row, which was there before whoever finds it asked for it."""
    access_token, lifetime = str(document["access_token"]), document["lifetime"]
    if lifetime is None:
        return Token.granted(access_token, math.inf, asked_at=now, arrived_at=-math.inf)
    return Token.granted(access_token, float(lifetime), asked_at=now + left - float(lifetime), arrived_at=-math.inf)


def _failure_to_json(failure: Failure) -> dict[str, Any]:
    fault = {**vars(failure.fault), "kind": failure.fault.kind.value}
    return {**vars(failure), "fault": fault}


def _failure_from_json(document: dict[str, Any], now: float, left: float) -> Failure:
    fault = document.pop("fault")
    fault["kind"] = FaultKind(fault["kind"])
    document["met_at"] = now + left - document["memory"]
    return Failure(Fault(**fault), **document)


def _seconds(number: float) -> float:
    """Return how long a store says to wait; what is no number raises an error, which is the store's."""
    return max(0.0, float(number))


class _Health:
    """Whether a store is in order: one that is not is left alone for a while, and the user told once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._back_at: float | None = None  # from when an outage may be over; None: there is none
        self._calling: set[threading.Thread] = set()

    def call(self, function: Callable[[], T], otherwise: T, clock: Callable[[], float]) -> T:
        """Return what `function` returns, or `otherwise` if the store is out of order."""
        thread, back_at = threading.current_thread(), self._back_at
        if back_at is not None and (clock() < back_at or self._is_stuck()):
            return otherwise
        self._calling.add(thread)
        try:
            outcome = function()
        except BaseException as error:  # whatever a store of others raises in this thread of ours: no call fails for it
            self.is_out_of_order(error, clock())
            return otherwise
        finally:
            self._calling.discard(thread)
        self._is_in_order(back_at)
        return outcome

    def is_out_of_order(self, reason: object, now: float) -> None:
        """Leave the store alone from `now` on, for a while."""
        with LOCK:
            is_news = self._back_at is None
            self._back_at = now + OUTAGE
        if is_news:
            message = "%r is out of order, and this process does without it for a while: %s"
            logger.warning(message, self._store, reason, extra={"store": repr(self._store)})

    def _is_in_order(self, back_at: float | None) -> None:
        """Learn that a call was answered which began when an outage might be over at `back_at`."""
        with LOCK:
            is_news = back_at is not None and self._back_at == back_at  # not if it was answered too late
            if is_news:
                self._back_at = None
        if is_news:
            logger.info("%r is in order again", self._store, extra={"store": repr(self._store)})

    def _is_stuck(self) -> bool:
        """Tell whether so many calls hang in the store that another thread is not to join them."""
        return sum(thread.is_alive() for thread in tuple(self._calling)) >= MOST_STUCK  # none is, of before a fork


_healths: weakref.WeakValueDictionary[Store, _Health] = weakref.WeakValueDictionary()


def _health_of(store: Store) -> _Health:
    """Return the one object for a store and all that are equal to it."""
    with LOCK:
        return _healths.setdefault(store, _Health(store))
