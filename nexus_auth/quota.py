"""Permits that run out: the quota of a token endpoint, and the turn to fetch a token. Nothing here waits.

The server counts arrivals per IP address. A request has arrived by the time its answer is here, so its permit is kept
for one period after the answer: that keeps every period on the server's own clock within the limit. One that is never
answered (a process is killed, a call broken off) may arrive until its timeout is over, so its permit lasts that long
and a period more. All times are seconds on the monotonic clock.
"""

from __future__ import annotations

import inspect
import os
import threading

from .steps import Steps
from .value import Value, replace

LIMIT, PERIOD = 60, 60.0  # token requests, in so many seconds
KEEP = PERIOD + 0.1  # seconds that a permit is kept after its answer: clocks do not tick alike
KEEP_IN_LINE = 2.0  # seconds after its last look that a caller keeps its place in the line

# For short changes to what threads share. Re-entrant, since a signal handler or `__del__` may come in between.
LOCK = threading.RLock()


def new_owner() -> str:
    """Return an owner of a permit or turn that nobody else has."""
    return os.urandom(16).hex()


class Permits(Value):
    """Who holds a permit until when, and who waits in line for one, last seen when. Replaced whole."""

    held: tuple[Permit, ...] = ()
    line: tuple[InLine, ...] = ()


class Permit(Value):
    """The right to one token request; until that is answered, `ends_at` is the latest that is possible."""

    owner: str
    ends_at: float


class InLine(Value):
    """A place in the line, kept as long as its owner looks again in time."""

    owner: str
    seen_at: float


def acquire(permits: Permits, owner: str, hold: float, now: float) -> tuple[Permits, float]:
    """Return the permits after `owner` asked for one, and the seconds to wait: 0 if it holds one, for `hold` seconds.

    Who has to wait stands in line, in the order of the first call, for as long as it calls again within `KEEP_IN_LINE`
    seconds. The wait is the least that is possible: requests under way may be answered at once.
    """
    held = tuple(permit for permit in permits.held if permit.ends_at > now)
    line = tuple(other for other in permits.line if other.seen_at + KEEP_IN_LINE > now)
    ahead = next((i for i, other in enumerate(line) if other.owner == owner), len(line))
    wait = _opens_at(held, ahead, now) - now
    if wait > 0:
        return Permits(held, (*line[:ahead], InLine(owner, now), *line[ahead + 1 :])), wait
    return Permits((*held, Permit(owner, now + hold)), line[:ahead] + line[ahead + 1 :]), 0.0


def _opens_at(held: tuple[Permit, ...], ahead: int, now: float) -> float:
    """Return when a permit is free for whom `ahead` others precede in the line."""
    ends = sorted(min(permit.ends_at, now + KEEP) for permit in held)  # as if all were answered now
    for _ in range(ahead):
        opening = ends[-LIMIT] if len(ends) >= LIMIT else now
        ends.append(max(opening, now) + KEEP)
    return ends[-LIMIT] if len(ends) >= LIMIT else now


def answered(permits: Permits, owner: str, now: float) -> Permits:
    """Return the permits after the request of `owner` was answered: it counts for one period from now on."""
    others = given_back(permits, owner)
    return replace(others, held=(*others.held, Permit(owner, now + KEEP)))


def given_back(permits: Permits, owner: str) -> Permits:
    """Return the permits after `owner` gave up its own without sending a request."""
    return replace(permits, held=tuple(permit for permit in permits.held if permit.owner != owner))


def left_line(permits: Permits, owner: str) -> Permits:
    """Return the permits after `owner` gave up its place in the line."""
    return replace(permits, line=tuple(other for other in permits.line if other.owner != owner))


class Endpoint:
    """What this process knows of a token endpoint: the permits given, and until when it wants to be left alone."""

    def __init__(self) -> None:
        self.permits: Permits = Permits()
        self.closed_until: float = 0.0
        self.closed_because: str = ""  # words of an error, if there is more to say than Retry-After

    def forget(self) -> None:
        """Know nothing."""
        self.permits = Permits()
        self.closed_until = 0.0
        self.closed_because = ""

    def acquire(self, owner: str, hold: float, now: float) -> float:
        """Return the seconds that `owner` has to wait; 0: it may send one request, and holds a permit for `hold`."""
        while True:
            before = self.permits
            after, wait = acquire(before, owner, hold, now)
            if self._swap(before, after):
                return wait

    def answered(self, owner: str, now: float) -> None:
        """Count the request of `owner` as arrived by now."""
        while not self._swap(before := self.permits, answered(before, owner, now)):
            pass

    def give_back(self, owner: str) -> None:
        """Free the permit of `owner`, who has not sent a request."""
        while not self._swap(before := self.permits, given_back(before, owner)):
            pass

    def leave_line(self, owner: str) -> None:
        """Give up the place of `owner` in the line."""
        while not self._swap(before := self.permits, left_line(before, owner)):
            pass

    def _swap(self, before: Permits, after: Permits) -> bool:
        """Replace `before`, unless somebody else was faster."""
        with LOCK:
            is_unchanged = self.permits is before
            if is_unchanged:
                self.permits = after
        return is_unchanged

    def close(self, until: float, because: str = "") -> None:
        """Send nothing before `until`, as the server asked (RFC 9110 section 10.2.3)."""
        with LOCK:
            if until > self.closed_until:
                self.closed_until, self.closed_because = until, because


class Place(Value):
    """Where a call is made: the thread, or the task and its event loop."""

    caller: object
    loop: object | None = None


class Holder(Value):
    """Who fetches: the caller, its steps, when they send a token request and until when they have to."""

    caller: object
    steps: Steps[object]
    sends_at: float
    ends_at: float

    @property
    def is_alive(self) -> bool:
        """Tell whether the steps have neither come to an end nor been broken off."""
        return inspect.getgeneratorstate(self.steps) != inspect.GEN_CLOSED


class Turn:
    """The turn to fetch a token, for one caller at a time. It runs out, so that nobody holds it for ever."""

    def __init__(self) -> None:
        self.holder: Holder | None = None
        self.owner: str = new_owner()  # of the turn that processes share: whoever takes over here has it already

    def take(self, asking: Holder, now: float) -> Holder | None:
        """Give the turn to `asking`, who may have it already; return the other who has it, and keeps it."""
        with LOCK:
            holder = self.holder
            if holder is None or holder.steps is asking.steps or now >= holder.ends_at or not holder.is_alive:
                self.holder = asking
                return None
        return holder

    def is_of(self, steps: Steps[object]) -> bool:
        """Tell whether `steps` have the turn, or had it last."""
        holder = self.holder
        return holder is not None and holder.steps is steps

    def give_back(self, steps: Steps[object]) -> None:
        """Free the turn, if it is that of `steps`, and let go of the caller: it may be a task with all it holds."""
        with LOCK:
            if self.holder is not None and self.holder.steps is steps:
                self.holder = None
