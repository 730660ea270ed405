"""Credentials: the one token of one API client in this process, whoever signs with it, and the way to another.

A call whose token is fresh takes it, without any lock. Else one caller fetches, in its turn, while the others look
every now and then whether it has brought a token: one among all threads, and one in each event loop.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from .grant import OTHERS_COUNT, Fault, FaultKind, Grant, Pause, judge, logger, pause_after
from .known import (
    Call,
    Decision,
    Failure,
    Fetch,
    GiveUp,
    Known,
    TooLong,
    Use,
    decide,
    failed,
    judged,
    landed,
    over,
    told,
)
from .quota import KEEP, LIMIT, LOCK, Endpoint, Holder, Place, Turn, new_owner
from .steps import CallStore, Client, SendTokenRequest, Sleep, Steps
from .token import Token
from .value import Value, replace

if TYPE_CHECKING:
    from .shared import News, Shared
    from .store import Store

T = TypeVar("T")
FIRST_LOOK, LOOK = 0.01, 0.1  # seconds until a caller that waits looks again: from the one to the other
FIRST_SHARED_LOOK, SHARED_LOOK = 0.05, 1.0  # the same, for a look into a store
STORE_LIMIT = 2.0  # seconds for one look into a store, which counts as out of order after that
STORE_TIME = 2 * STORE_LIMIT  # seconds that may pass with a store between the turn and the token request
PREPARE_LIMIT = 10.0  # seconds for the keys to what is in it, which takes so long only beside many other processes
AHEAD_PAUSE = 1.0  # seconds without a renewal ahead of expiry, while another caller makes one
LONG_WAIT = 1.0  # seconds; a longer one is logged as a warning
TURN_MARGIN = 1.0  # seconds that a turn lasts longer than its token request should
KEPT_REFUSED = 8  # access tokens that the API has refused last
KEPT = 1024  # API clients whose token is kept while no auth object holds it


class Wait(Value):
    """What a call waits for before it may send a token request."""

    until: float  # the least that it can take
    retry_at: float  # when it is over for certain
    reason: str  # continues a sentence that begins with the token endpoint
    look_after: float  # seconds until it is worth looking again


LOOK_AGAIN = Wait(0.0, 0.0, "", 0.0)  # something has changed: it is to be decided anew


class Attempt:
    """What one call has done so far to fetch a token itself, in place of one that was `refused`."""

    steps: Steps[Decision]  # that make it

    def __init__(self, caller: object, turn: Turn, refused: str | None) -> None:
        self.caller = caller
        self.turn = turn
        self.refused = refused
        self.tries: int = 0
        self.busy_answers: int = 0
        self.sends_at: float = 0.0  # no token request before this moment
        self.reason: str = ""  # why not
        self.announced: dict[str, int] = {}  # what was logged as waited for, and at which level
        self.permit: str = new_owner()  # owner of the permit of the next token request
        self.is_sent: bool = False  # that request, which may arrive from then on
        self.has_shared_turn: bool = False
        self.shared_looks: int = 0  # at the store, in vain


class Credentials:
    """What this process knows of one API client's token, and how it gets another."""

    def __init__(
        self,
        client: Client,
        endpoint: Endpoint,
        shared: Shared | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.client = client
        self._name = f"token endpoint {client.token_endpoint}"
        self.known: Known = Known()
        self._refused: tuple[str, ...] = ()  # access tokens, the last ones; one may be in a store that was out of order
        self._endpoint = endpoint
        self._shared = shared
        self.clock = clock
        self._wall_clock = wall_clock
        self.free_turns()

    def _log(self, level: int, message: str, *arguments: object, seconds: float | None = None) -> None:
        """Log a `message` that begins with the token endpoint, with the fields that structured logs have of it."""
        fields: dict[str, object] = {"client_id": self.client.client_id, "token_endpoint": self.client.token_endpoint}
        if seconds is not None:
            fields["seconds"] = seconds
        logger.log(level, message, self._name, *arguments, extra=fields, stacklevel=2)

    def forget(self) -> None:
        """Know nothing of any token."""
        self.known = Known()
        self._refused = ()

    def free_turns(self) -> None:
        """Free the turns to fetch: one for all threads, and one for each event loop.

        Who waited for another loop might wait for one that has ended, or that it holds up itself.
        """
        self._thread_turn = Turn()
        self._loop_turns: weakref.WeakKeyDictionary[object, Turn] | None = None  # made when one comes: it is large

    def fresh_token(self, leeway: float) -> Token | None:
        """Return the token, if it is fresh."""
        token = self.known.token
        return token if token is not None and token.is_fresh(self.clock(), leeway) else None

    def seconds_left(self) -> float:
        """Return the seconds that the token has to live, 0 if there is none."""
        token = self.known.token
        return max(0.0, token.expires_at - self.clock()) if token is not None else 0.0

    def obtain(self, call: Call, place: Place, refused: str | None = None) -> Steps[Decision]:
        """Return the steps to a token for `call`, other than the access token `refused` of a 401.

        They come to `Use`, `Raise` or `TooLong`; to `GiveUp` only where a token was refused.
        """
        turn = self._thread_turn if place.loop is None else self._turn_of(place.loop)
        if refused is not None and refused not in self._refused:
            self._refused = (*self._refused, refused)[-KEPT_REFUSED:]
        attempt = Attempt(place.caller, turn, refused)
        attempt.steps = self._obtain(call, attempt)
        return attempt.steps

    def _turn_of(self, loop: object) -> Turn:
        with LOCK:
            if self._loop_turns is None:
                self._loop_turns = weakref.WeakKeyDictionary()
            return self._loop_turns.setdefault(loop, Turn())

    def answered(self, access_token: str, status_code: int) -> None:
        """Learn what the API answered to a call with `access_token`."""
        if self.known.renewals.on_trial == access_token:
            self._judge(access_token, status_code, of_replay=False)

    def replayed(self, access_token: str, status_code: int | None) -> None:
        """Learn what the API answered to the replay of a call that had the token renewed; None: nothing."""
        self._judge(access_token, status_code, of_replay=True)

    def _judge(self, access_token: str, status_code: int | None, *, of_replay: bool) -> None:
        was_on_trial = self.known.renewals.on_trial == access_token
        known = self._change(lambda known: judged(known, access_token, status_code, self.clock(), of_replay=of_replay))
        is_judged = was_on_trial and known.renewals.on_trial != access_token
        if status_code == 401 and is_judged:
            advice = "Check base_url, and what this client may do."
            message = "%s: the API refuses the new token of client %r too (401). " + advice
            self._log(logging.WARNING, message, self.client.client_id)

    def _change(self, change: Callable[[Known], Known]) -> Known:
        """Replace what is known by what `change` makes of it, once more if another was faster, and return that."""
        while True:
            before = self.known
            after = change(before)
            with LOCK:
                if self.known is before:
                    self.known = after
                    return after

    def _obtain(self, call: Call, attempt: Attempt) -> Steps[Decision]:
        call.begun_at = self.clock()
        try:
            decision = yield from self._approach(call, attempt)
            if self._shared is not None and not isinstance(decision, Use):
                yield from self._look_for_token(self._shared, call, attempt)
                decision = _use_if_possible(decide(self.known, self.clock(), call, attempt.refused)) or decision
            if attempt.has_shared_turn and self._shared is not None and attempt.turn.is_of(attempt.steps):
                shared = self._shared
                yield from self._in_store(lambda: shared.give_back_turn(attempt.turn.owner), False)
            return decision
        except BaseException:  # broken off: there will be no replay to say whether a renewal has helped
            if call.renewed is not None:
                self.replayed(call.renewed, None)
            raise
        finally:  # on cancellation too, when nothing can be yielded: what is held in a store runs out by itself
            attempt.turn.give_back(attempt.steps)
            self._endpoint.leave_line(attempt.permit)
            if not attempt.is_sent:
                self._endpoint.give_back(attempt.permit)
            call.spent += self.clock() - call.begun_at

    def _approach(self, call: Call, attempt: Attempt) -> Steps[Decision]:
        """Yield one step after the other towards a token: decide, then send a token request or wait, and again."""
        while True:
            known, now = self.known, self.clock()
            decision = decide(known, now, call, attempt.refused)
            if isinstance(decision, Fetch):
                wait = yield from self._clearance(call, attempt, known, decision.fallback)
                if wait is None:
                    yield from self._fetch(call, attempt, ahead=decision.fallback is not None)
                    continue
            elif isinstance(decision, GiveUp) and call.insists:
                until = now + decision.retry_after
                wait = Wait(until, until, "gives tokens that are refused, one after the other", LOOK)
            else:
                return decision
            if wait is LOOK_AGAIN or self.known is not known:
                continue  # nobody waits or gives up without a look at what others have brought meanwhile
            now = self.clock()
            if end := self._instead_of(wait, decision, call, attempt, now):
                return end
            self._announce(wait, call, attempt, now)
            yield Sleep(min(wait.look_after, call.deadline - now))

    def _instead_of(
        self, wait: Wait, decision: Fetch | GiveUp, call: Call, attempt: Attempt, now: float
    ) -> Decision | None:
        """Return what `call` comes to if it need not, or must not, wait; None: it waits."""
        if isinstance(decision, Fetch) and decision.fallback is not None:
            self._postpone(min(max(wait.until, now + AHEAD_PAUSE), wait.retry_at))
            return Use(decision.fallback)
        if now >= call.deadline:
            return over(call, now, attempt.refused, wait.retry_at, wait.reason)
        if wait.until > call.deadline:
            return TooLong(wait.retry_at - now, wait.reason)
        return None

    def _clearance(self, call: Call, attempt: Attempt, known: Known, fallback: Token | None) -> Steps[Wait | None]:
        """Return what `call` has to wait for before it may send a token request; None: it has turn and permit."""
        wait = self._turn(call, attempt)
        if wait is None and self.known is not known:
            return LOOK_AGAIN  # another caller has brought something, between the decision and this one's turn
        if wait is None and self._shared is not None:
            wait = yield from self._shared_turn(self._shared, call, attempt, fallback)
        if wait is None:
            wait = yield from self._permit(call, attempt)
        if wait is None and self._shared is not None and self._is_outdated(known, call):
            yield from self._give_back_permit(self._shared, attempt)
            return LOOK_AGAIN
        return wait

    def _is_outdated(self, known: Known, call: Call) -> bool:
        """Tell whether the decision to fetch, made of what was `known`, no longer stands once the store was asked."""
        now = self.clock()
        return self.known is not known or self._endpoint.closed_until > now or call.is_spent(now)

    def _give_back_permit(self, shared: Shared, attempt: Attempt) -> Steps[None]:
        """Free the permit of a token request that is not sent."""
        permit, attempt.permit = attempt.permit, new_owner()
        self._endpoint.give_back(permit)
        yield from self._in_store(functools.partial(shared.give_back_permit, permit), False)

    def _postpone(self, until: float) -> None:
        """Try no renewal ahead of expiry before `until`."""
        self._change(lambda known: replace(known, ahead_after=until))

    def _turn(self, call: Call, attempt: Attempt) -> Wait | None:
        """Return the wait for this process's turn to fetch; None: it is that of `call`, and no pause is in its way."""
        now = self.clock()
        pause = self._pause(call, attempt, now)
        if pause and pause.until > call.deadline:
            return pause  # whoever fetches: it is told at once
        sends_at = pause.until if pause else now
        hold = call.limits.timeout + TURN_MARGIN + (0 if self._shared is None else STORE_TIME)
        holder = Holder(attempt.caller, attempt.steps, sends_at, sends_at + hold)
        if other := attempt.turn.take(holder, now):
            return _wait_for(other, call, attempt, now)
        if pause is None and call.is_spent(now):
            return Wait(now, now, "has given no token in time", LOOK)
        return pause

    def _pause(self, call: Call, attempt: Attempt, now: float) -> Wait | None:
        """Return the wait that the token endpoint asked for, or that follows a fault."""
        closed_for = self._endpoint.closed_until - now
        if closed_for > max(0.0, attempt.sends_at - now):
            attempt.sends_at = now + Pause.asked_for(closed_for).within(call.deadline - now)
            attempt.reason = "wants no token request for now (Retry-After)"
            if self._endpoint.closed_because:
                attempt.reason += f"; {self._endpoint.closed_because}"
        if attempt.sends_at <= now:
            return None
        return Wait(attempt.sends_at, attempt.sends_at, attempt.reason, min(LOOK, attempt.sends_at - now))

    def _shared_turn(self, shared: Shared, call: Call, attempt: Attempt, fallback: Token | None) -> Steps[Wait | None]:
        """Return the wait for the turn that processes share, after a look at what they have left; None: it is ours."""

        def concerns(failure: Failure) -> bool:
            return fallback is not None or failure.holds_for(call, self.clock())

        familiar = yield from self._familiar(shared)
        look = functools.partial(shared.look, attempt.turn.owner, call.limits.timeout + TURN_MARGIN, familiar, concerns)
        news: News | None = yield from self._in_store(look, None)
        now = self.clock()
        if news is None:
            return None
        if news.token is not None:
            self._land_shared(news.token, call, attempt)
            return LOOK_AGAIN
        if news.failure is not None:
            failure = news.failure
            self._change(lambda known: told(known, failure))
            return LOOK_AGAIN
        if news.closed_for > 0:
            self._endpoint.close(now + news.closed_for)
            return LOOK_AGAIN
        attempt.has_shared_turn = news.turn_in <= 0
        if attempt.has_shared_turn:
            return None
        attempt.shared_looks += 1
        look_after = min(SHARED_LOOK, FIRST_SHARED_LOOK * 1.5**attempt.shared_looks)
        return Wait(now, now + news.turn_in, "is being asked by another process", look_after)

    def _look_for_token(self, shared: Shared, call: Call, attempt: Attempt) -> Steps[None]:
        """Keep the token that another process has brought meanwhile: no call ends without one that is there."""
        familiar = yield from self._familiar(shared)
        news: News | None = yield from self._in_store(functools.partial(shared.look_for_token, familiar), None)
        if news is not None and news.token is not None:
            self._land_shared(news.token, call, attempt)

    def _familiar(self, shared: Shared) -> Steps[set[str | None]]:
        """Return the access tokens that are no news, once what is in the store can be read."""
        if not shared.is_prepared:
            yield CallStore(shared.prepare, PREPARE_LIMIT)
        token = self.known.token
        return {*self._refused, token.access_token if token else None}

    def _land_shared(self, token: Token, call: Call, attempt: Attempt) -> None:
        """Keep a token of another process; only a call that has looked in vain before has waited for it."""
        now = self.clock()
        if attempt.shared_looks:
            token = replace(token, arrived_at=now)
        self._change(lambda known: landed(known, token, call, now, attempt.refused))
        message = "%s: took a token of client %r from the store, for %.0f s"
        seconds = token.expires_at - now
        self._log(logging.DEBUG, message, self.client.client_id, seconds, seconds=round(seconds, 3))
        if attempt.refused is not None:
            call.renewed = token.access_token  # its replay says whether the renewal of the other has helped

    def _permit(self, call: Call, attempt: Attempt) -> Steps[Wait | None]:
        """Return the wait for a permit of the quota; None: one is held."""
        now, look, hold = self.clock(), LOOK, call.limits.timeout + KEEP
        if self._shared is not None:
            hold += STORE_LIMIT  # that may pass between the permit and the token request
        seconds = self._endpoint.acquire(attempt.permit, hold, now)
        if seconds <= 0 and self._shared is not None:
            acquire = functools.partial(self._shared.acquire, attempt.permit, hold)
            seconds = yield from self._in_store(acquire, 0.0)
            now, look = self.clock(), SHARED_LOOK
            if seconds > 0:
                self._endpoint.give_back(attempt.permit)
        if seconds <= 0:
            return None
        reason = f"takes {LIMIT} token requests a minute, and they have been made"
        return Wait(now + seconds, now + seconds, reason, min(look, seconds))

    def _fetch(self, call: Call, attempt: Attempt, *, ahead: bool) -> Steps[None]:
        """Send a token request, and keep what the answer says."""
        asked_at = self.clock()
        call.token_requests += 1
        attempt.is_sent = True
        answer = yield SendTokenRequest(self.client, call.limits.timeout, call.deadline - asked_at)
        now = self.clock()
        self._endpoint.answered(attempt.permit, now)
        verdict = judge(answer, self.client, self._wall_clock())
        if isinstance(verdict, Grant):
            outcome: Token | Failure | None = self._land(verdict, call, attempt, asked_at, now)
        else:
            outcome = self._fail(verdict, call, attempt, now, ahead=ahead)
        permit, attempt.permit, attempt.is_sent = attempt.permit, new_owner(), False
        if self._shared is not None:
            shared, closed_for = self._shared, self._endpoint.closed_until - now
            attempt.has_shared_turn = outcome is None
            hold = max(0.0, attempt.sends_at - now) + call.limits.timeout + TURN_MARGIN
            owner = attempt.turn.owner
            if not attempt.turn.is_of(attempt.steps):  # it has run out, and may be another caller's by now
                owner, hold = new_owner(), 0.0
            tell = functools.partial(shared.tell, permit, owner, outcome, closed_for, hold)
            yield from self._in_store(tell, False)

    def _in_store(self, function: Callable[[], T], otherwise: T) -> Steps[T]:
        """Call a `function` of the store, and return `otherwise` if that takes too long."""
        answer = yield CallStore(function, STORE_LIMIT)
        if answer is None and self._shared is not None:
            self._shared.gave_up()
            return otherwise
        return answer  # type: ignore[no-any-return]

    def _announce(self, wait: Wait, call: Call, attempt: Attempt, now: float) -> None:
        """Log what is waited for, once at each level; what may be over at any moment, once it has taken a second."""
        message, seconds = "%s %s: the next may go in %.1f s", wait.until - now
        if seconds <= 0:
            message, seconds = "%s %s: waited for %.1f s so far", now - call.begun_at
            if seconds <= LONG_WAIT:
                return
        level = logging.WARNING if seconds > LONG_WAIT else logging.DEBUG
        if level <= attempt.announced.get(wait.reason, logging.NOTSET):
            return
        attempt.announced[wait.reason] = level
        self._log(level, message, wait.reason, seconds, seconds=round(seconds, 3))

    def _land(self, grant: Grant, call: Call, attempt: Attempt, asked_at: float, now: float) -> Token:
        """Keep a new token, and return it."""
        token = Token.granted(grant.access_token, grant.lifetime, asked_at, now)
        self._change(lambda known: landed(known, token, call, now, attempt.refused))
        message = "%s gave client %r a token for %s s"
        self._log(logging.DEBUG, message, self.client.client_id, grant.lifetime, seconds=grant.lifetime)
        if attempt.refused is not None and token.access_token != attempt.refused:
            call.renewed = token.access_token
            message = "%s: renewed the token of client %r after a 401"
            self._log(logging.INFO, message, self.client.client_id)
        return token

    def _fail(self, fault: Fault, call: Call, attempt: Attempt, now: float, *, ahead: bool) -> Failure | None:
        """Plan another try after `fault` and return None, or remember it and return the failure."""
        if fault.retry_after:
            self._endpoint.close(now + fault.retry_after, OTHERS_COUNT if fault.kind is FaultKind.BUSY else "")
        if ahead:
            message = "%s %s: the token of client %r, which is about to expire, is used on"
            self._log(logging.WARNING, message, fault.reason, self.client.client_id)
            # It waits for nothing: who would may fare better.
            return self._change(lambda known: failed(known, fault, call, now, budget=0.0)).failure
        if fault.kind is not FaultKind.BUSY:
            attempt.tries += 1
        elif not fault.retry_after:
            attempt.busy_answers += 1
        pause = pause_after(fault, attempt.tries, attempt.busy_answers)
        left = call.deadline - now
        if pause is None or (pause.least > left and not fault.retry_after):
            is_late = pause is not None
            return self._change(lambda known: failed(known, fault, call, now, out_of_time=is_late)).failure
        attempt.sends_at, attempt.reason = now + pause.within(left), fault.reason
        if pause.least <= left:  # else Retry-After is too long for this caller, which is told so next
            attempt.announced[fault.reason] = logging.WARNING
            seconds = attempt.sends_at - now
            self._log(
                logging.WARNING, "%s %s: the next try is in %.1f s", fault.reason, seconds, seconds=round(seconds, 3)
            )
        return None


def _use_if_possible(decision: Decision) -> Use | None:
    """Return the use of a token that serves, even if it is time to renew it."""
    if isinstance(decision, Fetch) and decision.fallback is not None:
        return Use(decision.fallback)
    return decision if isinstance(decision, Use) else None


def _wait_for(other: Holder, call: Call, attempt: Attempt, now: float) -> Wait:
    """Return the wait for the token request of another caller."""
    if other.caller == attempt.caller:
        reason = "is being asked in this very call: does a logging handler or a hook call the API?"
        return Wait(math.inf, other.ends_at, reason, LOOK)
    look_after = min(LOOK, FIRST_LOOK + (now - call.begun_at) / 4)
    return Wait(max(now, other.sends_at), other.ends_at, "is being asked for another caller", look_after)


_live: weakref.WeakValueDictionary[tuple[Client, Store | None], Credentials] = weakref.WeakValueDictionary()
_endpoints: dict[str, Endpoint] = {}  # one for each URL, to which requests count whoever made them


@functools.lru_cache(maxsize=KEPT)
def credentials_of(client: Client, store: Store | None = None) -> Credentials:
    """Return the one object for `client`, with what it shares through `store`."""
    shared = None
    if store is not None:
        from .shared import Shared  # loads what only a store needs

        shared = Shared(store, client)
    with LOCK:
        endpoint = _endpoints.setdefault(client.token_endpoint, Endpoint())
        return _live.setdefault((client, store), Credentials(client, endpoint, shared))


def forget_tokens() -> None:
    """Forget every token, remembered failure and quota count of this process. For tests."""
    with LOCK:
        for credentials in list(_live.values()):
            credentials.forget()
        for endpoint in _endpoints.values():
            endpoint.forget()


def _free_turns() -> None:  # pragma: no cover  # runs in children only
    """Free a forked child of the turns that threads of its parent have taken."""
    for credentials in list(_live.values()):
        credentials.free_turns()


if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows does not fork
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
    os.register_at_fork(after_in_child=_free_turns)
