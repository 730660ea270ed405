"""What is asked of a store on the way to a token: processes whose steps are performed by hand, over one store."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Log
from herd import CLIENT, REFUSAL, Answer, Herd, MemoryStore, access_token, limits, response, retry_after, token, tokens

from nexus_auth.credentials import Credentials
from nexus_auth.known import Call, Decision, GiveUp, Known, Raise, TooLong, Use
from nexus_auth.quota import LIMIT, Endpoint, Permits, Place
from nexus_auth.shared import News, Shared
from nexus_auth.steps import CallStore
from nexus_auth.store import _seal
from nexus_auth.store._seal import Seal
from nexus_auth.token import Token

Asked = list[tuple[str, str, Any]]  # what was asked for, of which kind, and for how many seconds

LOOK_IN_VAIN: Asked = [("get", "token", 0), ("acquire", "turn", 11), ("get", "failure", 0), ("get", "closed", 0)]
LOOK: Asked = [*LOOK_IN_VAIN, ("get", "token", 0)]  # once more, since it has the turn
PERMIT: Asked = [("acquire", "quota", 72.1)]
COUNTED: Asked = [("release", "quota", 60.1)]
LAST_LOOK: Asked = [("get", "token", 0)]  # nobody ends without a look for a token
TURN_BACK: Asked = [("release", "turn", 0)]
NO_FAILURE: Asked = [("get", "failure", 0)]  # to put away, once there is a token


class RecordingStore(MemoryStore):
    """A store that notes what it is asked for."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.meanwhile: list[Callable[[], object]] = []  # what comes while the quota is asked for, in turn
        self.rows: list[tuple[str, bytes]] = []  # names and values that were put
        self.permits: set[str] = set()  # owners of those of the quota
        self.is_away = False
        self._asked: Asked = []

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        self._note("acquire", name, hold)
        if name.startswith("quota:") and self.meanwhile:
            self.meanwhile.pop(0)()
        wait = super().acquire(name, owner, limit, hold)
        if name.startswith("quota:") and wait <= 0:
            self.permits.add(owner)
        return wait

    def release(self, name: str, owner: str, keep: float) -> None:
        self._note("release", name, keep)
        if keep <= 0:
            self.permits.discard(owner)
        super().release(name, owner, keep)

    def get(self, name: str) -> tuple[bytes, float] | None:
        self._note("get", name)
        return super().get(name)

    def put(self, name: str, value: bytes, ttl: float) -> None:
        self._note("put", name, ttl)
        self.rows.append((name, value))
        super().put(name, value, ttl)

    def asked(self) -> Asked:
        """Return what was asked for since the last look."""
        asked, self._asked = self._asked, []
        return asked

    def _note(self, operation: str, name: str, seconds: float = 0) -> None:
        self._asked.append((operation, name.partition(":")[0], round(seconds, 3)))
        if self.is_away:
            raise ConnectionError("the store is away")


class Processes(Herd):
    """A herd in several processes, which share no more than a store."""

    def __init__(self) -> None:
        super().__init__(more=tokens(90))
        self.store = RecordingStore(self.clock)

    def process(self) -> Credentials:
        """Return what another process knows of the API client: nothing yet."""
        return self.client(store=self.store, endpoint=Endpoint())

    def own_process(self) -> Credentials:
        """Return the same for the process of `endpoint`."""
        return self.client(store=self.store)

    def call_of_another(self, **options: Any) -> Decision:
        """Return what comes of the first call of another process."""
        return self.call(credentials=self.process(), **options)


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_seal, "_N", 2)


@pytest.fixture
def herd() -> Processes:
    return Processes()


# What is asked for


def test_for_the_first_token(herd: Processes) -> None:
    one = herd.process()
    first = next(one.obtain(Call(limits()), Place(object())))
    assert isinstance(first, CallStore)
    assert first.limit == 10  # seconds to make the keys: a look takes two at most
    assert access_token(herd.call(credentials=one)) == "t1"
    assert herd.store.asked() == [*LOOK, *PERMIT, ("put", "token", 90), *NO_FAILURE, *COUNTED, *TURN_BACK]
    assert access_token(herd.call(credentials=one)) == "t1"
    assert herd.store.asked() == []  # a token in hand costs nothing


@pytest.mark.parametrize("lifetime", [90, math.inf])
def test_for_the_token_of_another_process_which_has_what_is_left_of_its_life(herd: Processes, lifetime: float) -> None:
    herd.then(token("t", lifetime))
    herd.call_of_another()
    herd.store.asked()
    herd.wait(30)
    decision = herd.call_of_another()
    assert isinstance(decision, Use)
    assert (decision.token.access_token, decision.token.lifetime) == ("t", lifetime)
    assert decision.token.expires_at == herd.clock() + lifetime - 30
    assert herd.store.asked() == LOOK_IN_VAIN[:1]


def test_between_tries_the_turn_is_kept(herd: Processes) -> None:
    """For the pause, and the timeout and a second after that."""
    herd.then(response(503), token("t"))
    herd.call_of_another()
    kept: Asked = [("acquire", "turn", pytest.approx(11 + herd.sent[1], abs=0.01))]
    told: Asked = [("put", "token", 3600), *NO_FAILURE, *COUNTED, *TURN_BACK]
    assert herd.store.asked() == [*LOOK, *PERMIT, *COUNTED, *kept, *LOOK, *PERMIT, *told]


def test_a_turn_lasts_four_seconds_longer_than_without_a_store(herd: Processes) -> None:
    herd.then(Answer(response(503).answer, takes=100, blocks=True), token("t2"))
    one = herd.process()
    herd.start(credentials=one)
    herd.call(credentials=one)
    assert herd.sent == pytest.approx([0, 15], abs=0.1)


def test_a_turn_that_has_run_out_is_not_touched(herd: Processes) -> None:
    """By the time the answer is here it may be another caller's."""
    herd.then(Answer(response(503).answer, takes=100, blocks=True), token("t2"))
    one = herd.process()
    herd.start(credentials=one, timeout=1, max_wait=200)
    herd.run(50)
    assert access_token(herd.call(credentials=one)) == "t2"
    assert herd.store.asked()[-2:] == [*TURN_BACK, *COUNTED]  # of the one, and then of the other


@pytest.mark.parametrize(("answer", "memory"), [(REFUSAL, 10), (response(200, {}), 2)])
def test_a_failure_is_told_to_all(herd: Processes, answer: Answer, memory: float) -> None:
    herd.then(answer)
    met = herd.call_of_another()
    told: Asked = [("put", "failure", memory), *COUNTED, *TURN_BACK]
    assert herd.store.asked() == [*LOOK, *PERMIT, *told, *LAST_LOOK]
    herd.wait(1)
    told_of = herd.call_of_another()
    assert isinstance(met, Raise)
    assert isinstance(told_of, Raise)
    assert told_of.failure == met.failure
    assert herd.store.asked() == [*LOOK_IN_VAIN[:3], ("get", "token", 0), *TURN_BACK, *LAST_LOOK]
    assert len(herd.sent) == 1


def test_retry_after_is_told_to_all(herd: Processes) -> None:
    herd.then(response(429, Retry_After="100"))
    assert isinstance(herd.call_of_another(), TooLong)
    kept: Asked = [("acquire", "turn", pytest.approx(117, abs=6))]  # until after the next try
    told: Asked = [("put", "closed", 100), *COUNTED, *kept]
    assert herd.store.asked() == [*LOOK, *PERMIT, *told, *LAST_LOOK, *TURN_BACK]
    herd.wait(10)
    assert retry_after(herd.call_of_another()) == pytest.approx(90, abs=11)
    assert herd.store.asked() == [*LOOK, *TURN_BACK, *LAST_LOOK]


def test_a_full_quota_is_waited_for(herd: Processes) -> None:
    """The permit of the process is given back meanwhile: it has made none of the requests that count."""
    one, others = herd.process(), Shared(herd.store, CLIENT, herd.clock)
    for number in range(LIMIT):
        assert others.acquire(f"other {number}", hold=100.5) == 0
    herd.store.asked()
    reason = f"takes {LIMIT} token requests a minute, and they have been made"
    assert herd.call(credentials=one) == TooLong(100.5, reason)
    assert herd.store.asked() == [*LOOK, *PERMIT, *LAST_LOOK, *TURN_BACK]
    herd.wait(30)
    caller = herd.start(credentials=one)
    herd.run()
    assert access_token(caller.outcome) == "t1"
    assert herd.sent == [pytest.approx(100.5, abs=0.01)]
    assert set(caller.slept[:-1]) == {1}  # it looks every second, for a token of another process may come


def test_a_token_ends_what_is_known_of_a_failure(herd: Processes) -> None:
    herd.then(response(503), token("t1"), token("t2"))
    assert isinstance(herd.call_of_another(max_wait=0), Raise)
    assert access_token(herd.call_of_another()) == "t1"
    assert ("put", "failure", 1) in herd.store.asked()  # a second: some stores take whole ones only
    assert access_token(herd.call_of_another(refused="t1", max_wait=0)) == "t2"


def test_a_token_of_another_process_is_logged(herd: Processes, caplog: pytest.LogCaptureFixture) -> None:
    herd.call_of_another()
    caplog.set_level(logging.DEBUG, "nexus_auth")
    herd.call_of_another()
    (record,) = caplog.records
    assert record.getMessage().endswith(": took a token of client 'abc' from the store, for 90 s")
    assert vars(record)["seconds"] == 90


def test_nothing_of_the_client_or_its_token_can_be_read(herd: Processes) -> None:
    herd.call_of_another()
    herd.then(REFUSAL)
    herd.call_of_another(refused="t1")
    rows = repr(herd.store.rows)
    assert len(herd.store.rows) == 2
    for text in filter(None, map(str, (*vars(CLIENT).values(), "access_token", "invalid_client"))):
        assert text not in rows


def test_an_outage_is_told_of_once_and_the_store_left_alone_for_half_a_minute_each_time(
    herd: Processes, log: Log
) -> None:
    one, access = herd.process(), None
    for wait, is_away, is_asked in [
        (0, True, True), (29.9, True, False), (0.1, True, True), (29.9, False, False), (0.1, False, True),
    ]:  # fmt: skip
        herd.wait(wait)
        herd.store.is_away = is_away
        access = access_token(herd.call(access, credentials=one))
        assert bool(herd.store.asked()) == is_asked
    assert access == "t5"
    told = [(level, message.partition("> ")[2]) for level, message in log() if "order" in message]
    away = "is out of order, and this process does without it for a while: the store is away"
    assert told == [("WARNING", away), ("INFO", "is in order again")]


# What comes while the store is at work


def test_a_token_of_another_thread(herd: Processes) -> None:
    one = herd.own_process()
    brought = Token.granted("brought", 3600, herd.clock(), herd.clock())
    herd.store.meanwhile = [lambda: setattr(one, "known", Known(brought))]
    assert access_token(herd.call(credentials=one)) == "brought"
    assert (herd.sent, herd.endpoint.permits.held, herd.store.permits) == ([], (), set())
    assert herd.store.asked() == [*LOOK, *PERMIT, ("release", "quota", 0), *TURN_BACK]


def test_retry_after_of_another_call(herd: Processes) -> None:
    herd.store.meanwhile = [lambda: herd.endpoint.close(herd.clock() + 100)]
    assert retry_after(herd.call(credentials=herd.own_process())) == pytest.approx(100)
    assert (herd.sent, herd.endpoint.permits.held, herd.store.permits) == ([], (), set())


def test_the_end_of_max_wait(herd: Processes) -> None:
    def pass_time() -> None:
        herd.clock.now += 100

    herd.then(response(503), token("t"))
    herd.store.meanwhile = [lambda: None, pass_time]
    assert isinstance(herd.call_of_another(), TooLong)
    assert len(herd.sent) == 1


def test_a_cancellation(herd: Processes) -> None:
    """What is not sent does not count; the store is not asked, since a call that is broken off cannot wait for it."""
    caller = herd.start(credentials=herd.own_process())
    herd.store.meanwhile = [caller.break_off]
    herd.run()
    assert (herd.sent, herd.endpoint.permits) == ([], Permits())
    herd.then(response(503), token("late", takes=5))
    caller = herd.start(credentials=herd.own_process())
    herd.store.meanwhile = [lambda: None, caller.break_off]
    herd.wait(13)  # the turn in the store has to run out first
    assert len(herd.sent) == len(herd.endpoint.permits.held) == 1  # that of the first try
    caller = herd.start(credentials=herd.own_process())
    herd.wait(14)
    caller.break_off()
    assert len(herd.sent) == len(herd.endpoint.permits.held) == 2  # which may still arrive


def test_a_cancellation_after_a_renewal(herd: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no replay to say whether it has helped: the next answer to the new token does."""
    one = herd.own_process()
    herd.call(credentials=one)
    caller = herd.start("t1", credentials=one)
    monkeypatch.setattr(herd.store, "put", lambda *_: caller.break_off())
    herd.run()
    one.answered("t2", 401)
    assert isinstance(herd.call("t2", credentials=one), GiveUp)


def test_no_more_than_eight_threads_hang_in_a_store(herd: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging: list[str] = []
    moved, end = threading.Semaphore(0), threading.Event()

    def get(name: str) -> None:
        hanging.append(name)
        moved.release()
        end.wait()

    def look() -> None:
        shared.look_for_token(set())
        moved.release()

    monkeypatch.setattr(herd.store, "get", get)
    shared = Shared(herd.store, CLIENT, herd.clock)
    threads = [threading.Thread(target=look) for _ in range(12)]
    for thread in threads:
        thread.start()
        assert moved.acquire(timeout=10)
        shared.gave_up()
        herd.wait(30)  # then it is asked again
    end.set()
    for thread in threads:
        thread.join()
    assert len(hanging) == 8


# What is read


def test_a_token_of_another_process_that_was_waited_for_is_used_whatever_its_answer_took_of_its_life(
    herd: Processes,
) -> None:
    herd.then(token("t", 20, takes=15))
    callers = [herd.start(credentials=herd.process(), timeout=20) for _ in range(3)]
    herd.run()
    assert {access_token(caller.outcome) for caller in callers} == {"t"}
    assert herd.sent == [0]


def test_a_stale_token_of_another_process_is_renewed_ahead_of_expiry(herd: Processes) -> None:
    herd.call_of_another()
    herd.wait(80)
    assert access_token(herd.call_of_another()) == "t2"
    herd.wait(80)
    herd.then(REFUSAL)
    assert access_token(herd.call_of_another()) == "t2"  # it serves for ten more seconds
    assert len(herd.sent) == 3


def test_a_call_that_ends_otherwise_takes_a_stale_token_of_another_process(herd: Processes) -> None:
    herd.call_of_another()
    herd.wait(80)
    herd.endpoint.close(herd.clock() + 1000)
    assert access_token(herd.call(credentials=herd.own_process())) == "t1"


def test_a_token_that_was_refused_before_is_not_taken_again(herd: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that can be read, and not written, goes on to have it."""
    one = herd.process()
    herd.call(credentials=one)
    monkeypatch.setattr(herd.store, "put", lambda *_: None)
    assert access_token(herd.call("t1", credentials=one)) == "t2"
    for _ in range(9):  # however often it is told of the same
        assert access_token(herd.call("t2", credentials=one)) == "t3"
    assert access_token(herd.call("t3", credentials=one)) == "t4"


@pytest.mark.parametrize(
    "document",
    [b"no JSON", b"[]", b"{}", b'{"access_token": "t"}', b'{"access_token": "t", "lifetime": "x"}'],
)
def test_a_row_that_says_something_else_is_no_news(herd: Processes, document: bytes) -> None:
    """It may be that of another version."""
    seal = Seal(CLIENT)
    herd.store.put(seal.name("token"), seal.seal("token", document), 60)
    assert Shared(herd.store, CLIENT).look_for_token(set()) == News()
