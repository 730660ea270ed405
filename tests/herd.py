"""A herd of callers on a virtual clock: the steps to a token performed by hand, and a token endpoint with a script.

Nothing waits, and nothing is left to chance but the jitter that the core draws. Callers whose time is the same go in
the order in which they came. All times are in seconds, those of a herd since it was made.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from conftest import Clock

from nexus_auth.credentials import Credentials
from nexus_auth.known import Call, Decision, GiveUp, Limits, TooLong, Use
from nexus_auth.quota import Endpoint, Place
from nexus_auth.secret import HiddenText
from nexus_auth.shared import Shared
from nexus_auth.steps import CallStore, Client, Failed, Response, SendTokenRequest, Sleep, Steps
from nexus_auth.store import Store
from nexus_auth.token import Token

CLIENT = Client("https://id.example/connect/token", "abc", HiddenText("s3cret"), "api1")
NOW = 1000.0  # when a table is looked at
WALL_CLOCK = 784111770.0  # Sun, 06 Nov 1994 08:49:30 GMT
MOST_STEPS = 100_000  # of one run, which takes far fewer if it comes to an end


@dataclass(frozen=True)
class Answer:
    """What a token request comes to, and after how many seconds: at most its timeout, unless it `blocks`."""

    answer: Response | Failed
    takes: float = 0.0
    blocks: bool = False


def response(status: int, document: Any = None, *, takes: float = 0.0, **headers: str) -> Answer:
    """Return an answer with a JSON document; `Retry_After="7"` is its header Retry-After."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(Response(status, names, json.dumps(document).encode()), takes)


def token(access_token: str, lifetime: Any = 3600, *, takes: float = 0.0) -> Answer:
    """Return an answer with a token."""
    return response(200, {"access_token": access_token, "token_type": "Bearer", "expires_in": lifetime}, takes=takes)


def tokens(lifetime: Any = 3600, *, takes: float = 0.0) -> Iterator[Answer]:
    """Yield an answer with another token for each request: t1, t2, ..."""
    return (token(f"t{number}", lifetime, takes=takes) for number in itertools.count(1))


SILENCE = Answer(Failed("ReadTimeout", "there was no answer", timed_out=True), math.inf)
NO_ROUTE = Answer(Failed("ConnectError", "no route"))
REFUSAL = response(400, {"error": "invalid_client"})


def limits(leeway: float = 60, timeout: float = 10, max_wait: float = 75) -> Limits:
    return Limits(leeway, timeout, max_wait)


def a_call(**fields: Any) -> Call:
    """Return a call that begins to wait at `NOW`, for the tables."""
    fields.setdefault("begun_at", NOW)
    return Call(limits(), **fields)


def a_token(access_token: str, expires_at: float, half_life: float, arrived_at: float) -> Token:
    """Return a token in whatever state."""
    return Token(access_token, f"Bearer {access_token}", expires_at, half_life, arrived_at)


def access_token(decision: Decision | None) -> str:
    """Return the access token of a decision to use one."""
    assert isinstance(decision, Use), decision
    return decision.token.access_token


def retry_after(decision: Decision | None) -> float:
    """Return the seconds of a decision not to wait any longer."""
    assert isinstance(decision, (TooLong, GiveUp)), decision
    return decision.retry_after


@dataclass
class Caller:
    """One caller, and what came of it; None: nothing yet."""

    call: Call
    steps: Steps[Decision]
    started_at: float
    outcome: Decision | None = None
    ended_at: float = math.nan
    slept: list[float] = field(default_factory=list[float])

    @property
    def waited(self) -> float:
        return self.ended_at - self.started_at

    def break_off(self) -> None:
        """Do what a cancellation does."""
        self.steps.close()


class Herd:
    """Callers that share one token endpoint, and one API client unless they name another.

    The endpoint gives the answers of its script one after the other, and then `more`, or the last one again and again.
    """

    def __init__(self, *script: Answer, more: Iterator[Answer] | None = None) -> None:
        self.clock = Clock()
        self.endpoint = Endpoint()
        self.credentials = self.client()
        self.then(*script, more=more)
        self.sent: list[float] = []  # when token requests were sent
        self.requests: list[SendTokenRequest] = []
        self._start = self.clock.now
        self._events: list[tuple[float, int, Caller, object]] = []
        self._order = itertools.count()

    def then(self, *script: Answer, more: Iterator[Answer] | None = None) -> None:
        """Go on with another script."""
        self._script = itertools.chain(script, more or itertools.repeat(script[-1]))

    @property
    def now(self) -> float:
        return self.clock.now - self._start

    def client(
        self, client: Client = CLIENT, store: Store | None = None, endpoint: Endpoint | None = None
    ) -> Credentials:
        """Return the credentials of an API client without a token; `endpoint` is that of another process."""
        shared = Shared(store, client, self.clock) if store is not None else None
        return Credentials(client, endpoint or self.endpoint, shared, self.clock, lambda: WALL_CLOCK)

    def start(
        self,
        refused: str | None = None,
        *,
        call: Call | None = None,
        caller: object = None,
        loop: object = None,
        credentials: Credentials | None = None,
        **times: float,
    ) -> Caller:
        """Have somebody call now, with the leeway, timeout and max_wait that are given."""
        call = call or Call(limits(**times))
        place = Place(object() if caller is None else caller, loop)
        one = Caller(call, (credentials or self.credentials).obtain(call, place, refused), self.now)
        self._expect(self.now, one, None)
        return one

    def crowd(self, times: int, refused: str | None = None, **options: Any) -> list[Caller]:
        """Have so many call at once."""
        return [self.start(refused, **options) for _ in range(times)]

    def call(self, refused: str | None = None, **options: Any) -> Decision:
        """Return what comes of a call; others go on meanwhile."""
        caller = self.start(refused, **options)
        self.run()
        assert caller.outcome is not None
        return caller.outcome

    def run(self, until: float = math.inf) -> None:
        """Let all go on to their end, or to what the clock shows `until` then."""
        for _ in range(MOST_STEPS):
            if not self._events or self._events[0][0] > until:
                break
            time, _, caller, answer = heapq.heappop(self._events)
            self.clock.now = self._start + time
            self._go_on(caller, answer)
        else:
            raise AssertionError(f"no end in sight after {len(self.sent)} token requests in {self.now:.0f} s")
        if until < math.inf:
            self.clock.now = self._start + until

    def wait(self, seconds: float) -> None:
        """Let so much time pass."""
        self.run(self.now + seconds)

    def _expect(self, time: float, caller: Caller, answer: object) -> None:
        heapq.heappush(self._events, (time, next(self._order), caller, answer))

    def _go_on(self, caller: Caller, answer: object) -> None:
        try:
            step = caller.steps.send(answer)
        except StopIteration as end:
            caller.outcome, caller.ended_at = end.value, self.now
            return
        if isinstance(step, Sleep):
            assert step.seconds > 0
            caller.slept.append(step.seconds)
            self._expect(self.now + step.seconds, caller, None)
            return
        if isinstance(step, CallStore):
            answer = step.function()
            self._expect(self.now, caller, answer)
            return
        assert isinstance(step, SendTokenRequest)
        self.sent.append(self.now)
        self.requests.append(step)
        scripted = next(self._script)
        takes = scripted.takes if scripted.blocks else min(scripted.takes, step.timeout)
        self._expect(self.now + takes, caller, scripted.answer)


class MemoryStore:
    """A store for the threads of one process: all that the protocol asks for."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._permits: dict[str, dict[str, float]] = {}
        self._values: dict[str, tuple[bytes, float]] = {}

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        with self._lock:
            now = self._clock()
            held = self._permits[name] = {who: end for who, end in self._permits.get(name, {}).items() if end > now}
            if owner not in held and len(held) >= limit:
                return sorted(held.values())[len(held) - limit] - now
            held[owner] = now + hold
            return 0.0

    def release(self, name: str, owner: str, keep: float) -> None:
        with self._lock:
            self._permits.setdefault(name, {})[owner] = self._clock() + keep

    def get(self, name: str) -> tuple[bytes, float] | None:
        value, end = self._values.get(name, (b"", -math.inf))
        left = end - self._clock()
        return (value, left) if left > 0 else None

    def put(self, name: str, value: bytes, ttl: float) -> None:
        self._values[name] = value, self._clock() + ttl
