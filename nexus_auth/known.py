"""What is known of an access token, and what to do for a call that wants one.

Knowledge is a value (`Known`) that is replaced as a whole, and so is each decision: they can be printed, compared and
tabled. The functions are pure; their times are seconds on the monotonic clock.
"""

from __future__ import annotations

import math

from .grant import Fault, FaultKind
from .token import State, Token, state_of
from .value import Value, replace

# Seconds for which a failure is remembered, doubled while nothing but failures comes: from the one to the other.
REFUSAL_MEMORY, MAX_REFUSAL_MEMORY = 10.0, 60.0
FAULT_MEMORY, MAX_FAULT_MEMORY = 2.0, 30.0
FRUITLESS_PAUSE, MAX_FRUITLESS_PAUSE = 1.0, 60.0  # seconds without a renewal, after one that did not help; doubled
UNREPEATABLE_PAUSE = 10.0  # seconds between renewals for requests that cannot be sent again


class Limits(Value):
    """The times of an auth object, in seconds."""

    leeway: float
    timeout: float
    max_wait: float


class Call:
    """One call of a user: its limits, and what it has spent of them.

    A call is not `repeatable` if its body cannot be sent again after a 401. One that `insists` wants another token in
    place of the refused one, and has no 401 to be content with.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        repeatable: bool = True,
        insists: bool = False,
        spent: float = 0.0,
        token_requests: int = 0,
        begun_at: float = math.inf,
    ) -> None:
        self.limits = limits
        self.repeatable = repeatable
        self.insists = insists
        self.spent = spent  # seconds of `max_wait`, before the present wait
        self.token_requests = token_requests
        self.begun_at = begun_at  # the present wait
        self.renewed: str | None = None  # the access token that took the place of the refused one

    @property
    def deadline(self) -> float:
        """When the budget of the call is spent, if it waits until then."""
        return self.begun_at + self.limits.max_wait - self.spent

    @property
    def budget(self) -> float:
        """The seconds that the present wait may take."""
        return self.limits.max_wait - self.spent

    def is_spent(self, now: float) -> bool:
        """Tell whether `max_wait` is over, so that no further token request starts; the first of a call may."""
        return now >= self.deadline and self.token_requests > 0

    def was_under_way(self, moment: float) -> bool:
        """Tell whether the call was under way when the answer to a token request came, its own or another's."""
        return moment >= self.begun_at


class Failure(Value):
    """A fault as it is remembered: until when, and for whom, by the limits of the one who met it.

    With `out_of_time` its `max_wait` had no room for all tries.
    """

    fault: Fault
    timeout: float
    max_wait: float
    met_at: float
    memory: float
    out_of_time: bool = False

    @property
    def until(self) -> float:
        """When the token endpoint is asked again."""
        return self.met_at + self.memory

    def holds_for(self, call: Call, now: float) -> bool:
        """Tell whether `call` would fare no better: a refusal is one for all, else more patience may help."""
        if now >= self.until and not call.was_under_way(self.met_at):
            return False
        if self.fault.kind is FaultKind.REFUSED:
            return True
        return call.limits.timeout <= self.timeout and call.budget <= self.max_wait


class Renewals(Value, hidden={"on_trial"}):
    """What is known of renewals after a 401: how long to leave it after some that did not help."""

    pause: float = 0.0  # the last one
    after: float = 0.0  # none before this moment
    unrepeatable_after: float = 0.0  # none before this moment for a request that cannot be sent again
    on_trial: str | None = None  # the access token of a renewal of which is not known yet whether it helped
    has_replay: bool = False  # whether its replay tells; else the first answer to that token does


class Known(Value):
    """All that is known of the token of one API client."""

    token: Token | None = None
    failure: Failure | None = None  # nothing but failures since the last token
    ahead_after: float = 0.0  # no renewal ahead of expiry before this moment
    renewals: Renewals = Renewals()


class Use(Value):
    """Send the call with this token."""

    token: Token


class Raise(Value):
    """Tell the caller of this failure."""

    failure: Failure


class TooLong(Value):
    """Tell the caller that `max_wait` would not last: in how many seconds to try again, and what is waited for."""

    retry_after: float
    reason: str  # continues a sentence that begins with the token endpoint


class GiveUp(Value):
    """Leave it at the 401, for so many seconds: another token would not help, or `max_wait` is spent."""

    retry_after: float


class Fetch(Value):
    """Make a token request; `fallback` still serves, if that fails."""

    fallback: Token | None = None


Decision = Use | Raise | TooLong | GiveUp | Fetch


def decide(known: Known, now: float, call: Call, refused: str | None = None) -> Decision:
    """Return what to do for `call`, to which the API has refused the access token `refused`."""
    token, failure, renewals = known.token, known.failure, known.renewals
    state = state_of(token, now, call.limits.leeway, refused)
    if token and state is State.FRESH:
        return Use(token)
    if token and state is not State.REFUSED and call.was_under_way(token.arrived_at):
        return Use(token)  # what was waited for, even if its answer took a good part of its life, or all of it
    if token and state is State.STALE:
        return Use(token) if now < known.ahead_after else Fetch(fallback=token)
    if state is State.REFUSED and now < renewals.after:
        return GiveUp(renewals.after - now)
    if state is State.REFUSED and now < renewals.unrepeatable_after and not call.repeatable:
        return GiveUp(renewals.unrepeatable_after - now)
    if failure and failure.holds_for(call, now):
        return Raise(failure)
    return Fetch()


def over(call: Call, now: float, refused: str | None, retry_at: float, reason: str) -> Decision:
    """Return the end of `call`, whose `max_wait` is spent: a 401 goes to the caller, else there is nothing to give."""
    seconds = max(0.0, retry_at - now)
    return TooLong(seconds, reason) if refused is None or call.insists else GiveUp(seconds)


def landed(known: Known, token: Token, call: Call, now: float, refused: str | None = None) -> Known:
    """Return what is known after a token request that brought `token`, in place of `refused`."""
    renewals = replace(known.renewals, on_trial=None)
    after = replace(known, token=token, failure=None, ahead_after=0.0, renewals=renewals)
    if refused is None:
        return after
    if not call.repeatable:
        renewals = replace(renewals, unrepeatable_after=now + UNREPEATABLE_PAUSE)
    if token.access_token == refused:
        return fruitless(replace(after, renewals=renewals), now)
    has_replay = call.repeatable and not call.insists
    return replace(after, renewals=replace(renewals, on_trial=token.access_token, has_replay=has_replay))


def failed(
    known: Known, fault: Fault, call: Call, now: float, *, budget: float | None = None, out_of_time: bool = False
) -> Known:
    """Return what is known after a token request that brought `fault`, for those with no more than `budget` seconds.

    That is the budget of `call`, if it is not given.
    """
    is_refusal = fault.kind is FaultKind.REFUSED
    first, last = (REFUSAL_MEMORY, MAX_REFUSAL_MEMORY) if is_refusal else (FAULT_MEMORY, MAX_FAULT_MEMORY)
    memory = min(max(first, 2 * known.failure.memory), last) if known.failure else first
    budget = call.budget if budget is None else budget
    failure = Failure(fault, call.limits.timeout, budget, now, memory, out_of_time)
    return replace(known, failure=failure, ahead_after=failure.until)


def told(known: Known, failure: Failure) -> Known:
    """Return what is known after another process has told of its `failure`."""
    return replace(known, failure=failure, ahead_after=failure.until)


def judged(known: Known, access_token: str, status_code: int | None, now: float, *, of_replay: bool) -> Known:
    """Return what is known after the API answered to `access_token`, which a renewal had brought; None: it did not.

    Only the newest token says whether its renewal helped. Without an answer to its replay the next call tells.
    """
    renewals = known.renewals
    if known.token is None or known.token.access_token != access_token:
        return known
    if status_code is None:
        return replace(known, renewals=replace(renewals, has_replay=False))
    if renewals.has_replay and not of_replay and not (status_code == 401 and renewals.pause):
        return known  # unless renewals have not helped before: then there is no need to wait for the replay
    if status_code == 401:
        return fruitless(known, now) if renewals.on_trial == access_token else known  # once for each renewal
    return replace(known, renewals=replace(renewals, pause=0.0, after=0.0, on_trial=None))


def fruitless(known: Known, now: float) -> Known:
    """Return what is known after a renewal that did not help."""
    pause = min(max(FRUITLESS_PAUSE, 2 * known.renewals.pause), MAX_FRUITLESS_PAUSE)
    return replace(known, renewals=replace(known.renewals, pause=pause, after=now + pause, on_trial=None))
