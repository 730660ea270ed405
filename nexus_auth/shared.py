"""What one API client shares with other processes through a store: its token, the turn to fetch, the quota.

All of it blocks, so the core asks a driver to call it. Nothing here raises: a store that is out of order is left alone
for a while, and the process goes on as it would without one.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .grant import Fault, FaultKind, logger
from .known import Failure
from .quota import KEEP, LIMIT
from .steps import Client
from .store import Store
from .store._seal import Seal
from .token import Token

T = TypeVar("T")

OUTAGE = 30.0  # seconds without another call of a store that is out of order
UNKNOWN_LIFETIME = 86400.0  # seconds that a token is kept which has no lifetime


@dataclass(frozen=True)
class News:
    """What others have left in the store, and in how many seconds the turn to fetch may be free; 0: it is ours."""

    token: Token | None = None
    failure: Failure | None = None
    closed_for: float = 0.0  # seconds that the token endpoint wants to be left alone
    turn_in: float = 0.0


class Shared:
    """The place of one API client in a store."""

    def __init__(self, store: Store, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._seal = Seal(client.client_secret, client.token_endpoint, client.client_id, client.scope)
        self._clock = clock
        endpoint = hashlib.sha256(client.token_endpoint.encode()).hexdigest()
        self._quota, self._closed = f"quota:{endpoint}", f"closed:{endpoint}"
        self._health = _health_of(store)

    def look(self, owner: str, hold: float, known: Collection[str | None], concerns: Callable[[Failure], bool]) -> News:
        """Return what others have left: a token that is not `known`, or a failure that `concerns` the call.

        If there is nothing, take the turn to fetch, or keep it: it is that of `owner` for `hold` seconds.
        """

        def look() -> News:
            now = self._clock()
            token = self._get("token", _token_from_json, now)
            if token is not None and token.access_token not in known:
                return News(token=token)
            failure = self._get("failure", _failure_from_json, now)
            if failure is not None and concerns(failure):
                return News(failure=failure)
            if closed := self._store.get(self._closed):
                return News(closed_for=closed[1])
            return News(turn_in=self._store.acquire(self._seal.name("turn"), owner, 1, hold))

        return self._health.call(look, News(), self._clock)

    def acquire(self, permit: str, hold: float) -> float:
        """Return the seconds to wait for a permit of the quota; 0: `permit` is held for `hold` seconds."""
        return self._health.call(lambda: self._store.acquire(self._quota, permit, LIMIT, hold), 0.0, self._clock)

    def tell(self, permit: str, owner: str, outcome: Token | Failure | None, closed_for: float) -> bool:
        """Say that the token request of `permit` was answered, and what came of it; then it is another's turn.

        Without an outcome `owner` keeps the turn, for its next try.
        """

        def tell() -> None:
            now = self._clock()
            if isinstance(outcome, Token):
                self._put("token", _token_to_json(outcome), min(outcome.expires_at - now, UNKNOWN_LIFETIME))
            if isinstance(outcome, Failure):
                self._put("failure", _failure_to_json(outcome), outcome.until - now)
            if closed_for > 0:
                self._store.put(self._closed, b"1", closed_for)
            self._store.release(self._quota, permit, KEEP)
            if outcome is not None:
                self._store.release(self._seal.name("turn"), owner, 0.0)

        self._health.call(tell, None, self._clock)
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

    def _get(self, kind: str, read: Callable[[dict[str, Any], float, float], T], now: float) -> T | None:
        """Return the value of that kind, None if there is none that can be read: it may be of another version."""
        found = self._store.get(self._seal.name(kind))
        opened = self._seal.open(kind, found[0]) if found else None
        if found is None or opened is None:
            return None
        try:
            return read(json.loads(opened), now, found[1])
        except (KeyError, TypeError, ValueError):
            return None


def _token_to_json(token: Token) -> dict[str, Any]:
    return {"access_token": token.access_token, "lifetime": None if token.lifetime == math.inf else token.lifetime}


def _token_from_json(document: dict[str, Any], now: float, left: float) -> Token:
    lifetime = document["lifetime"]
    if lifetime is None:
        return Token.granted(str(document["access_token"]), math.inf, now, now)
    return Token.granted(str(document["access_token"]), float(lifetime), now + left - float(lifetime), now)


def _failure_to_json(failure: Failure) -> dict[str, Any]:
    document = asdict(failure)
    document["fault"]["kind"] = failure.fault.kind.value
    return document


def _failure_from_json(document: dict[str, Any], now: float, left: float) -> Failure:
    fault = document.pop("fault")
    fault["kind"] = FaultKind(fault["kind"])
    document["met_at"] = now + left - document["memory"]
    return Failure(Fault(**fault), **document)


class _Health:
    """Whether a store is in order: one that is not is left alone for a while, and the user told once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._back_at: float | None = None  # from when an outage may be over; None: there is none

    def call(self, function: Callable[[], T], otherwise: T, clock: Callable[[], float]) -> T:
        """Return what `function` returns, or `otherwise` if the store is out of order."""
        if self._back_at is not None and clock() < self._back_at:
            return otherwise
        try:
            outcome = function()
        except Exception as error:  # whatever a store of others raises: calls are not to fail for it
            self.is_out_of_order(error, clock())
            return otherwise
        if self._back_at is not None:
            self._back_at = None
            logger.info("%r is in order again", self._store)
        return outcome

    def is_out_of_order(self, reason: object, now: float) -> None:
        """Leave the store alone from `now` on, for a while."""
        if self._back_at is None:
            message = "%r is out of order, and this process does without it for a while: %s"
            logger.warning(message, self._store, reason)
        self._back_at = now + OUTAGE


@functools.lru_cache(maxsize=64)
def _health_of(store: Store) -> _Health:
    """Return the one object for a store and all that are equal to it."""
    return _Health(store)
