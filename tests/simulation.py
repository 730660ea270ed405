"""A simulation of the core: callers in threads, event loops and processes on a virtual clock, over servers of any mood.

Whatever happens in a world is a life: a generator that yields the seconds until it goes on. The world resumes whichever
is due, lets others go on where the core reads its clock in the middle of a step, and interrupts callers at both. What
the core promises is checked at each step. All that is random follows from a seed, which every failure names.
"""

from __future__ import annotations

import email.utils
import heapq
import json
import math
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nexus_auth import quota
from nexus_auth.credentials import TURN_MARGIN, Credentials
from nexus_auth.grant import FaultKind
from nexus_auth.known import Call, Decision, GiveUp, Limits, Raise, TooLong, Use
from nexus_auth.quota import Endpoint, Place
from nexus_auth.secret import HiddenText
from nexus_auth.shared import Shared
from nexus_auth.steps import CallStore, Client, Failed, Response, SendTokenRequest, Sleep, Step, Steps

T = TypeVar("T")
Life = Generator[float, None, T]

MOMENT = 0.01  # seconds that others go on at most, while a caller stands between two instructions
PATIENT = Limits(leeway=60, timeout=10, max_wait=75)
WRONG = HiddenText("wrong")
INVALID_CLIENT = b'{"error": "invalid_client"}'


class InterruptedCall(BaseException):
    """What a signal handler or a cancellation raises into a call."""


class Loop:
    """An event loop: what callers in one have in common."""


@dataclass(frozen=True)
class Mood:
    """How the token endpoint and the API behave for a while.

    `status` is that of token requests, 0 if the endpoint cannot be reached. Delays are seconds, at most.
    """

    status: int = 200
    delay: float = 0.5
    stuck_for: float = 0.0  # seconds that a thread is held up beyond its timeout
    retry_after: int | None = None
    as_date: bool = False
    body: bytes | None = b""  # in place of a token
    expires_in: Any = 3600
    lifetime: float = 3600.0  # in truth
    gives_same_token: bool = False
    counts: bool = False  # answers 429 beyond the quota
    api_delay: float = 0.5
    api_refuses_all: bool = False


WELL = Mood()


@dataclass(eq=False)
class TokenRequest:
    """A token request, which may arrive at any moment between being sent and its end."""

    caller: Caller
    sent_at: float
    timeout: float
    answered_at: float = math.inf
    is_under_way: bool = True

    @property
    def end(self) -> float:
        """The last moment at which it may arrive."""
        return min(self.answered_at, self.sent_at + self.timeout)


class World:
    """Processes over one token endpoint and API, and over one store at most, whose operations take `store_delay`.

    `interrupts` is how probable one is at each step and each reading of a clock, `preemptions` at the latter.
    """

    def __init__(
        self, seed: int = 0, mood: Mood = WELL, *, has_store: bool = False, store_delay: float = 0.01,
        interrupts: float = 0.0, preemptions: float = 0.0,
    ) -> None:  # fmt: skip
        random.seed(seed)  # for the jitter of the core too
        self.seed, self.mood, self.interrupts, self.preemptions = seed, mood, interrupts, preemptions
        self.now = 0.0
        self.processes: list[Process] = []
        self.sent: list[TokenRequest] = []
        self.taken: list[float] = []  # when token requests arrived, but for those beyond the quota
        self.tokens: dict[str, float] = {}  # until when the API takes them
        self.fetched_by: dict[str, Caller] = {}
        self.has_store, self.store_delay = has_store, store_delay  # seconds, at most
        self.is_store_away = self.was_store_away = False
        self.store_operations = 0
        self.permits: dict[str, dict[str, float]] = {}
        self.values: dict[str, tuple[bytes, float]] = {}
        self.slack = 0.1 + 4 * store_delay  # seconds that count as nothing: some moments and store operations
        self._agenda: list[tuple[float, float, Life[None], Caller | None]] = []
        self._running: list[Caller] = []  # each but the last stands where its clock lets others go on
        self._readings = 0  # of clocks, since time last went on

    def check(self, is_kept: bool, promise: str) -> None:
        assert is_kept, f"world {self.seed}, second {self.now:.3f}: broken is the promise that {promise}"

    def start(self, life: Life[None], caller: Caller | None = None) -> None:
        self._plan(0.0, life, caller)

    def run(self, seconds: float) -> None:
        """Let time go on, and all who are due."""
        until = self.now + seconds
        while self._agenda and self._agenda[0][0] <= until:
            due, _, life, caller = heapq.heappop(self._agenda)
            if due > self.now:
                self.now, self._readings = due, 0
            if caller is None or caller.process.is_alive:  # else it is closed, which nobody else sees
                self._resume(life, caller)
        self.now = max(self.now, until)

    def stop(self) -> None:
        """End all lives, as the cancellation of all calls does; from now on nothing odd happens."""
        self.mood, self.interrupts, self.preemptions, self.is_store_away = WELL, 0.0, 0.0, False
        for _, _, life, _ in self._agenda:
            life.close()
        self._agenda.clear()

    def _plan(self, seconds: float, life: Life[None], caller: Caller | None) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, random.random(), life, caller))  # at once: in any order

    def _resume(self, life: Life[None], caller: Caller | None) -> None:
        if caller is None:
            self._plan(next(life), life, None)
            return
        if caller.process.frozen_until > self.now:
            self._plan(caller.process.frozen_until - self.now, life, caller)
            return
        if caller.loop is not None and any(other.loop is caller.loop for other in self._running):
            self._plan(MOMENT, life, caller)
            return
        self._running.append(caller)
        try:
            seconds = life.throw(InterruptedCall()) if random.random() < self.interrupts else next(life)
        except (StopIteration, InterruptedCall):  # the latter before its first step
            return
        finally:
            self._running.pop()
        self._plan(seconds, life, caller)

    def is_running(self, process: Process) -> bool:
        return any(caller.process is process for caller in self._running)

    def clock_is_read(self) -> None:
        """Interrupt the caller that reads it, or let others go on while it stands between two instructions."""
        self._readings += 1
        self.check(self._readings < 50_000, "nobody goes round in circles")
        if not self._running:
            return
        if random.random() < self.interrupts:
            raise InterruptedCall
        if len(self._running) < 3 and random.random() < self.preemptions:
            self.run(random.uniform(0, MOMENT))

    def run_apart(self, function: Callable[[], T]) -> T:
        """Call `function` as in a thread of its own, which nobody interrupts."""
        running, self._running = self._running, []
        try:
            return function()
        finally:
            self._running = running

    def call_api(self, access_token: str) -> Life[int]:
        """Call the API, which takes a while, and return the status code."""
        yield random.uniform(0, self.mood.api_delay)
        return 401 if self.mood.api_refuses_all or self.tokens.get(access_token, 0.0) <= self.now else 200

    def send(self, caller: Caller, step: SendTokenRequest) -> Life[Response | Failed]:
        """Send a token request, which may get lost on its way there or back, and return the answer."""
        request = TokenRequest(caller, self.now, step.timeout)
        self._check_flights(request)
        self.sent.append(request)
        self._check_quota(caller.process)
        delay, stuck_for = random.uniform(0, self.mood.delay), 0.0 if caller.loop else self.mood.stuck_for
        way_there = random.uniform(0, delay)
        answer: Response | Failed = Failed("ReadTimeout", "no answer", timed_out=True)
        try:
            yield min(way_there, step.timeout)
            if way_there < step.timeout:
                given = self._answer(caller)
                yield min(delay, step.timeout) - way_there
                answer = given if delay < step.timeout else answer
            elif stuck_for:
                caller.overtime += stuck_for
                yield stuck_for
            request.answered_at = self.now
        finally:
            request.is_under_way = False
        return answer

    def _answer(self, caller: Caller) -> Response | Failed:
        """Return the answer to a token request that has arrived."""
        mood, client_id, headers = self.mood, caller.client.client_id, dict[str, str]()
        if mood.status == 0:
            return Failed("ConnectionError", "refused")
        if mood.counts and len(self.taken) >= quota.LIMIT and self.taken[-quota.LIMIT] > self.now - quota.PERIOD:
            seconds = self.taken[-quota.LIMIT] + quota.PERIOD - self.now
            return Response(429, {"Retry-After": str(math.ceil(seconds))}, b"")
        self.taken.append(self.now)
        if mood.retry_after is not None:
            date = email.utils.formatdate(self.now + mood.retry_after, usegmt=True)
            headers["Retry-After"] = date if mood.as_date else str(mood.retry_after)
        if caller.client.client_secret == WRONG:
            return Response(400, headers, INVALID_CLIENT)
        if mood.status != 200 or mood.body != b"":
            return Response(mood.status, headers, mood.body)
        newest = next(reversed(self.tokens), "")
        is_same = mood.gives_same_token and newest.endswith(f"-of-{client_id}")
        access_token = newest if is_same else f"{len(self.taken)}-of-{client_id}"
        self.tokens[access_token], self.fetched_by[access_token] = self.now + mood.lifetime, caller
        return Response(200, {}, json.dumps({"access_token": access_token, "expires_in": mood.expires_in}).encode())

    def _check_quota(self, process: Process) -> None:
        """Check that no minute sees more than the quota, wherever between sending and end the requests arrive."""
        count = 0
        for request in reversed(self.sent):
            if request.sent_at < self.now - 2 * quota.PERIOD:
                break
            counts = request.caller.process is process or (self.has_store and not self.was_store_away)
            count += counts and request.end > self.now - quota.PERIOD
        self.check(count <= quota.LIMIT, f"at most {quota.LIMIT} token requests arrive in any minute")

    def _check_flights(self, request: TokenRequest) -> None:
        """Check that no other flies for the same API client in the same place, unless its turn has run out."""
        caller = request.caller
        if 2 * self.store_delay > TURN_MARGIN:  # the turn may run out before the request is sent
            return
        for other in self.sent[-20:]:
            turn_ends_at = other.sent_at + other.timeout + TURN_MARGIN - self.slack
            is_flying = other.is_under_way and other.caller.process.is_alive and self.now < turn_ends_at
            if is_flying and other.caller.client == caller.client:
                self.check(not caller.is_beside(other.caller), "one flight among the threads, one in each event loop")
                self.check(not self.has_store or self.was_store_away, "one flight among all who share a store")


class Store:
    """The store of a world, as one process reaches it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        now = self._reach()
        held = {other: end for other, end in self._world.permits.get(name, {}).items() if end > now}
        if owner not in held and len(held) >= limit:
            return sorted(held.values())[len(held) - limit] - now
        self._world.permits[name] = {**held, owner: now + hold}
        return 0.0

    def release(self, name: str, owner: str, keep: float) -> None:
        now = self._reach()
        self._world.permits.setdefault(name, {})[owner] = now + keep

    def get(self, name: str) -> tuple[bytes, float] | None:
        now = self._reach()
        value, end = self._world.values.get(name, (b"", 0.0))
        return (value, end - now) if end > now else None

    def put(self, name: str, value: bytes, ttl: float) -> None:
        now = self._reach()
        self._world.values[name] = value, now + ttl

    def _reach(self) -> float:
        self._world.store_operations += 1
        if self._world.is_store_away:
            raise ConnectionError("the store is away")
        return self._world.now


class Process:
    """A process with clocks of its own, and what it knows of each API client."""

    def __init__(self, world: World, offset: float = 0.0) -> None:
        self.world, self.offset, self.wall_offset = world, offset, 0.0
        self.is_alive, self.frozen_until = True, 0.0
        self.callers: list[Caller] = []
        self.store_calls = 0  # at present
        self.closed_at = self.closed_until = 0.0  # when the token endpoint asked for a pause, and until when
        self.endpoint, self._store = Endpoint(), Store(world)
        self._credentials: dict[Client, Credentials] = {}
        world.processes.append(self)

    def now(self) -> float:
        return self.world.now + self.offset

    def clock(self) -> float:
        """Return the time as the core reads it."""
        if self.is_alive:
            self.world.clock_is_read()
        return self.now()

    def wall_clock(self) -> float:
        return self.world.now + self.wall_offset

    def freeze(self, seconds: float, with_clock: bool) -> None:
        """Stand still as if suspended, with or without the monotonic clock; not between a permit and its use."""
        if self.world.now >= self.frozen_until and not self.store_calls and not self.world.is_running(self):
            self.frozen_until = self.world.now + seconds
            self.offset -= seconds if with_clock else 0.0
            for caller in self.callers:
                caller.overtime += seconds

    def credentials_of(self, client: Client) -> Credentials:
        if client not in self._credentials:
            shared = Shared(self._store, client, self.now) if self.world.has_store else None
            self._credentials[client] = Credentials(client, self.endpoint, shared, self.clock, self.wall_clock)
        return self._credentials[client]


@dataclass(eq=False)
class Caller:
    """A thread, or a task of an event loop, which makes calls as the doors do."""

    process: Process
    client: Client
    limits: Limits = PATIENT
    loop: Loop | None = None
    unrepeatable: float = 0.0  # how many of its requests are
    held_up: float = 0.0  # seconds of the present call, before the present wait
    longest: float = 0.0  # of the calls so far
    overtime: float = 0.0  # seconds of the present call that are no fault of the core
    looked_at: float = 0.0  # when it could last see what is known
    outcomes: list[int | Decision] = field(default_factory=list)  # status codes, or why there was no token
    done_at: float = 0.0  # when the last one came

    def __post_init__(self) -> None:
        self.world, self.credentials = self.process.world, self.process.credentials_of(self.client)
        self.process.callers.append(self)

    def is_beside(self, other: Caller) -> bool:
        return other.process is self.process and other.loop is self.loop

    def start(self, calls: float = 1, pause: float = 0.0, *, insists: bool = False) -> Caller:
        """Make so many calls, with pauses of so many seconds on average; one that `insists` is for the token alone."""
        self.world.start(self._live(calls, pause, insists), self)
        return self

    def _live(self, calls: float, pause: float, insists: bool) -> Life[None]:
        while calls > 0:
            calls -= 1
            try:
                yield random.expovariate(1 / pause) if pause else 0.0
                self.outcomes.append((yield from self._call(insists)))
                self.done_at = self.world.now
            except InterruptedCall:
                pass

    def _call(self, insists: bool) -> Life[int | Decision]:
        """Call the API, and once more after a 401."""
        self.held_up = self.overtime = 0.0
        call = Call(self.limits, insists=insists)
        token = None if insists else self.credentials.fresh_token(self.limits.leeway)
        if token is None:
            decision = yield from self._obtain(call)
            if not isinstance(decision, Use):
                return decision
            token = decision.token
        status = yield from self.world.call_api(token.access_token)
        if status == 401 or self.credentials.known.renewals.on_trial is not None:
            self.credentials.answered(token.access_token, status)
        if status != 401:
            return status
        if insists:  # `access_token(refused=...)` is a call of its own
            self.held_up, call = 0.0, Call(self.limits, insists=True)
        call.repeatable = insists or random.random() >= self.unrepeatable
        decision = yield from self._obtain(call, token.access_token)
        if not isinstance(decision, Use):
            return 401 if isinstance(decision, GiveUp) else decision
        if not call.repeatable:
            return 401
        replay: int | None = None
        try:
            replay = yield from self.world.call_api(decision.token.access_token)
            return replay
        finally:
            if call.renewed is not None and not insists:
                self.credentials.replayed(call.renewed, replay)

    def _obtain(self, call: Call, refused: str | None = None) -> Life[Decision]:
        """Perform the steps to a token, as drivers do."""
        process, answer = self.process, None
        steps = self.credentials.obtain(call, Place(self, self.loop), refused)
        began = self.looked_at = process.now()
        try:
            while True:
                step = self._advance(steps, answer)
                held_up, asked_at = self.held_up + process.now() - began, process.now()
                left = self.limits.max_wait - held_up + self.overtime + self.world.slack
                self.world.check(left + self.limits.timeout > 0, "nobody waits longer than max_wait and one timeout")
                if not isinstance(step, Step):
                    self._check_end(step, call, refused, began)
                    self.held_up, self.longest = held_up, max(self.longest, held_up)
                    return step
                if isinstance(step, SendTokenRequest):
                    self._check_sending(call, refused, is_in_time=left > 0)
                try:
                    answer = yield from self._perform(step)
                except InterruptedCall as interrupt:
                    if random.random() < 0.5:
                        steps.throw(interrupt)
                    raise
                self.looked_at = asked_at - self.world.slack if isinstance(step, CallStore) else process.now()
        finally:
            steps.close()

    def _advance(self, steps: Steps[Decision], answer: Any) -> Step | Decision:
        """Return the next step, or what they came to."""
        try:
            step: Step | Decision = steps.send(answer)
        except StopIteration as end:
            step = end.value
        if isinstance(answer, Response) and answer.headers.get("Retry-After", "").isdecimal():
            until = self.world.now + float(answer.headers["Retry-After"]) - self.world.slack
            self.process.closed_at, self.process.closed_until = self.world.now, max(self.process.closed_until, until)
        return step

    def _perform(self, step: Step) -> Life[Any]:
        world, process = self.world, self.process
        match step:
            case Sleep(seconds):
                world.check(0 <= seconds <= 2, "who waits looks again in time")
                yield seconds
            case SendTokenRequest():
                return (yield from world.send(self, step))
            case CallStore(function, limit):
                delay = random.uniform(0, world.store_delay)
                seconds, until_done = min(delay, limit), random.uniform(0, min(delay, limit))
                process.store_calls += 1
                try:
                    yield until_done
                    answer = world.run_apart(function)
                    yield seconds - until_done
                finally:
                    process.store_calls -= 1
                    self.overtime += seconds
                world.was_store_away |= world.is_store_away or delay > limit
                return answer if delay <= limit else None
        return None

    def _check_sending(self, call: Call, refused: str | None, *, is_in_time: bool) -> None:
        """Check that a token request is needed, and allowed."""
        world, process, check, known = self.world, self.process, self.world.check, self.credentials.known
        check(is_in_time or call.token_requests == 1, "max_wait, once it is spent, allows no further token request")
        is_open = world.now >= process.closed_until or world.now < process.closed_at + world.slack
        check(is_open, "Retry-After is obeyed")
        token, failure, now = known.token, known.failure, process.now()
        if token is None or token.access_token == refused:
            return
        is_own = self.is_beside(world.fetched_by[token.access_token]) and not world.has_store
        is_news = token.arrived_at >= self.looked_at and not is_own
        is_needed = is_news or not token.is_fresh(now, self.limits.leeway)
        check(is_needed, "no token is fetched where a fresh one is at hand")
        is_early = failure is not None and self.looked_at > failure.met_at and now < failure.until
        check(now >= token.expires_at or not is_early, "no token is renewed ahead in the pause after a failure")

    def _check_end(self, decision: Decision, call: Call, refused: str | None, began: float) -> None:
        """Check what a call comes to whose wait `began` then."""
        check, now, slack, token = self.world.check, self.process.now(), self.world.slack, self.credentials.known.token
        left = self.limits.max_wait - self.held_up - (now - began)
        match decision:
            case Use(given):
                check(given.access_token != refused, "no call is given again the token that was refused to it")
                is_of_now = given.expires_at > now - slack or given.arrived_at >= began
                check(is_of_now, "no call is given a token of the past")
                return
            case TooLong(retry_after):
                is_fair = left < slack or left - slack < retry_after < math.inf
                check(is_fair, "who is told to come later would not be served in time")
                is_mere_401 = refused is not None and not call.insists and left <= -slack
                check(not is_mere_401, "a 401 goes to the caller once max_wait is spent")
            case Raise(failure):
                is_of_now = failure.until > now - slack or failure.met_at >= began
                check(is_of_now, "no call is told of a failure of the past")
                is_mine = failure.timeout >= self.limits.timeout and failure.max_wait >= left
                check(is_mine or failure.fault.kind is FaultKind.REFUSED, "no call is told of a hastier one's failure")
            case _:
                check(refused is not None and not call.insists, "only a 401 is left as it is")
        is_good = token is not None and token.access_token != refused and now < token.expires_at
        check(not is_good or token is None or token.arrived_at >= self.looked_at, "no call fails with a token at hand")
