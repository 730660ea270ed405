"""Access tokens: how long one lives, and what state it is in.

All times are seconds on the monotonic clock.
"""

from __future__ import annotations

import math
from enum import Enum

from .value import Value


class State(Enum):
    """What can be done with the token that is known."""

    ABSENT = "absent"
    FRESH = "fresh"  # used as it is
    STALE = "stale"  # still serves, and is to be renewed ahead of its expiry
    EXPIRED = "expired"
    REFUSED = "refused"  # by the API, with a 401


class Token(Value, hidden={"access_token", "authorization"}):
    """An access token, which expires at `expires_at` and was here at `arrived_at`."""

    access_token: str
    authorization: str  # the value of that header (RFC 6750 section 2.1), made once since each call wants it
    expires_at: float
    half_life: float  # the moment when half of the lifetime is over
    arrived_at: float

    @classmethod
    def granted(cls, access_token: str, lifetime: float, asked_at: float, arrived_at: float) -> Token:
        """Return a token that lives `lifetime` seconds (infinite: until the API refuses it) from `asked_at` on."""
        half_life = asked_at + lifetime / 2
        return cls(access_token, f"Bearer {access_token}", asked_at + lifetime, half_life, arrived_at)

    @property
    def lifetime(self) -> float:
        """The seconds from being asked for to its expiry."""
        return math.inf if self.expires_at == math.inf else 2 * (self.expires_at - self.half_life)

    def fresh_until(self, leeway: float) -> float:
        """Return when it becomes stale: `leeway` seconds before it expires, but not before half of its life is over."""
        return max(self.half_life, self.expires_at - leeway)

    def is_fresh(self, now: float, leeway: float) -> bool:
        """Tell whether it need not be renewed yet."""
        return now < self.half_life or now < self.fresh_until(leeway)  # the first, which is quick, nearly always tells


def state_of(token: Token | None, now: float, leeway: float, refused: str | None = None) -> State:
    """Return the state of `token` at `now`, where the API has refused the access token `refused`.

    Tokens are compared by value: a server that gives the same one again has not renewed it.
    """
    if token is None:
        return State.ABSENT
    if token.access_token == refused:
        return State.REFUSED
    if token.is_fresh(now, leeway):
        return State.FRESH
    return State.STALE if now < token.expires_at else State.EXPIRED
