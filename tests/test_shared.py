"""What is asked of a store on the way to a token: processes whose steps are performed by hand, over one store."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from conftest import Clock
from herd import CLIENT, REFUSAL, Answer, Herd, access_token, response, retry_after, token, tokens

from nexus_auth.credentials import Credentials
from nexus_auth.known import Known, Raise, TooLong, Use
from nexus_auth.quota import LIMIT, Endpoint, Permits
from nexus_auth.secret import HiddenText
from nexus_auth.shared import News, Shared
from nexus_auth.store import _seal
from nexus_auth.store._seal import Seal
from nexus_auth.token import Token
from nexus_auth.value import replace

Asked = list[tuple[str, str, float]]  # what was asked for, of which kind, and for how many seconds

LOOK_IN_VAIN: Asked = [("get", "token", 0), ("acquire", "turn", 11), ("get", "failure", 0), ("get", "closed", 0)]
LOOK: Asked = [*LOOK_IN_VAIN, ("get", "token", 0)]  # once more, since it has the turn
PERMIT: Asked = [("acquire", "quota", 72.1)]


class RecordingStore:
    """A store in memory that notes what it is asked for."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.quota_is_full_until: float = 0.0
        self.meanwhile: list[Callable[[], object]] = []  # what comes while the quota is asked for, in turn
        self._asked: Asked = []
        self._permits: dict[str, dict[str, float]] = {}
        self._values: dict[str, tuple[bytes, float]] = {}

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        held = self._held("acquire", name, hold)
        if name.startswith("quota:") and self.meanwhile:
            self.meanwhile.pop(0)()
        if name.startswith("quota:") and self.clock.now < self.quota_is_full_until:
            return self.quota_is_full_until - self.clock.now
        if owner not in held and len(held) >= limit:
            return min(held.values()) - self.clock.now
        held[owner] = self.clock.now + hold
        return 0.0

    def release(self, name: str, owner: str, keep: float) -> None:
        self._held("release", name, keep)[owner] = self.clock.now + keep

    def get(self, name: str) -> tuple[bytes, float] | None:
        self._note("get", name)
        value, ends_at = self._values.get(name, (b"", -math.inf))
        return (value, ends_at - self.clock.now) if ends_at > self.clock.now else None

    def put(self, name: str, value: bytes, ttl: float) -> None:
        self._note("put", name, ttl)
        self._values[name] = value, self.clock.now + ttl

    def asked(self) -> Asked:
        """Return what was asked for since the last look."""
        asked, self._asked = self._asked, []
        return asked

    def _held(self, operation: str, name: str, seconds: float) -> dict[str, float]:
        self._note(operation, name, seconds)
        held = self._permits.get(name, {})
        self._permits[name] = {owner: ends_at for owner, ends_at in held.items() if ends_at > self.clock.now}
        return self._permits[name]

    def _note(self, operation: str, name: str, seconds: float = 0) -> None:
        self._asked.append((operation, name.partition(":")[0], round(seconds, 3)))


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_seal, "_N", 2)


@pytest.fixture
def herd() -> Herd:
    return Herd(more=tokens(90))


@pytest.fixture
def store(herd: Herd) -> RecordingStore:
    return RecordingStore(herd.clock)


def process(herd: Herd, store: RecordingStore, endpoint: Endpoint | None = None) -> Credentials:
    """Return what another process knows of the API client: nothing yet."""
    return Credentials(CLIENT, endpoint or Endpoint(), Shared(store, CLIENT, herd.clock), herd.clock)


# What is asked for


def test_for_the_first_token(herd: Herd, store: RecordingStore) -> None:
    one = process(herd, store)
    assert access_token(herd.call(credentials=one)) == "t1"
    told: Asked = [("put", "token", 90), ("release", "quota", 60.1), ("release", "turn", 0)]
    assert store.asked() == [*LOOK, *PERMIT, *told]
    assert access_token(herd.call(credentials=one)) == "t1"
    assert store.asked() == []  # a token in hand costs nothing


def test_for_the_token_of_another_process(herd: Herd, store: RecordingStore) -> None:
    herd.call(credentials=process(herd, store))
    store.asked()
    herd.wait(30)
    decision = herd.call(credentials=process(herd, store))
    assert isinstance(decision, Use)
    assert (decision.token.access_token, decision.token.lifetime) == ("t1", 90)
    assert decision.token.expires_at == herd.clock.now + 60
    assert store.asked() == [("get", "token", 0)]


def test_between_tries_the_turn_is_kept(herd: Herd, store: RecordingStore) -> None:
    """For the pause, and the timeout and a second after that."""
    herd.then(response(503), token("t"))
    herd.call(credentials=process(herd, store))
    asked = store.asked()
    at = len(LOOK) + len(PERMIT)
    assert asked[:at] == [*LOOK, *PERMIT]
    (released, (operation, kind, hold)), rest = asked[at : at + 2], asked[at + 2 :]
    assert (released, operation, kind) == (("release", "quota", 60.1), "acquire", "turn")
    assert hold == pytest.approx(11 + herd.sent[1], abs=0.01)
    assert rest == [*LOOK, *PERMIT, ("put", "token", 3600), ("release", "quota", 60.1), ("release", "turn", 0)]


def test_a_turn_that_has_run_out_is_not_touched(herd: Herd, store: RecordingStore) -> None:
    """By the time the answer is here it may be another caller's."""
    herd.then(Answer(response(503).answer, takes=100, blocks=True), token("t2"))
    one = process(herd, store)
    herd.start(credentials=one, timeout=1, max_wait=200)
    herd.run(50)
    assert access_token(herd.call(credentials=one)) == "t2"
    asked = store.asked()
    assert asked[-2:] == [("release", "turn", 0), ("release", "quota", 60.1)]  # of the one, and then of the other


@pytest.mark.parametrize(("answer", "memory"), [(REFUSAL, 10), (response(200, {}), 2)])
def test_a_failure_is_told_to_all(herd: Herd, store: RecordingStore, answer: Answer, memory: float) -> None:
    herd.then(answer)
    met = herd.call(credentials=process(herd, store))
    assert isinstance(met, Raise)
    told: Asked = [("put", "failure", memory), ("release", "quota", 60.1), ("release", "turn", 0)]
    assert store.asked() == [*LOOK, *PERMIT, *told, ("get", "token", 0)]  # nobody ends without a look for a token
    herd.wait(1)
    told_of = herd.call(credentials=process(herd, store))
    assert isinstance(told_of, Raise)
    assert told_of.failure == met.failure
    found: Asked = [*LOOK[:3], ("get", "token", 0), ("release", "turn", 0)]
    assert store.asked() == [*found, ("get", "token", 0)]
    assert len(herd.sent) == 1


def test_retry_after_is_told_to_all(herd: Herd, store: RecordingStore) -> None:
    herd.then(response(429, Retry_After="100"))
    assert isinstance(herd.call(credentials=process(herd, store)), TooLong)
    closed: Asked = [("put", "closed", 100), ("release", "quota", 60.1), ("acquire", "turn", 0)]
    asked = [(operation, kind, 0 if kind == "turn" else seconds) for operation, kind, seconds in store.asked()[6:]]
    assert asked == [*closed, ("get", "token", 0), ("release", "turn", 0)]
    herd.wait(10)
    assert retry_after(herd.call(credentials=process(herd, store))) == pytest.approx(90, abs=11)
    assert store.asked() == [*LOOK, ("release", "turn", 0), ("get", "token", 0)]


def test_a_full_quota_is_waited_for(herd: Herd, store: RecordingStore) -> None:
    """The permit of the process is given back meanwhile: it has made none of the requests that count."""
    one = process(herd, store)
    store.quota_is_full_until = herd.clock() + 100.5
    reason = f"takes {LIMIT} token requests a minute, and they have been made"
    assert herd.call(credentials=one) == TooLong(100.5, reason)
    assert store.asked() == [*LOOK, *PERMIT, ("get", "token", 0), ("release", "turn", 0)]
    herd.wait(30)
    caller = herd.start(credentials=one)
    herd.run()
    assert access_token(caller.outcome) == "t1"
    assert herd.sent == [pytest.approx(100.5, abs=0.01)]
    assert set(caller.slept[:-1]) == {1}  # it looks every second, for a token of another process may come


# What comes while the store is at work


def test_a_token_of_another_thread(herd: Herd, store: RecordingStore) -> None:
    endpoint = Endpoint()
    one = process(herd, store, endpoint)
    brought = Token.granted("brought", 3600, herd.clock(), herd.clock())
    store.meanwhile = [lambda: setattr(one, "known", Known(brought))]
    assert access_token(herd.call(credentials=one)) == "brought"
    assert herd.sent == []
    assert store.asked() == [*LOOK, *PERMIT, ("release", "quota", 0), ("release", "turn", 0)]
    assert endpoint.permits.held == ()


def test_retry_after_of_another_call(herd: Herd, store: RecordingStore) -> None:
    endpoint = Endpoint()
    one = process(herd, store, endpoint)
    store.meanwhile = [lambda: endpoint.close(herd.clock() + 100)]
    decision = herd.call(credentials=one)
    assert isinstance(decision, TooLong)
    assert retry_after(decision) == pytest.approx(100)
    assert herd.sent == []
    assert endpoint.permits.held == ()


def test_the_end_of_max_wait(herd: Herd, store: RecordingStore) -> None:
    def pass_time() -> None:
        herd.clock.now += 100

    herd.then(response(503), token("t"))
    store.meanwhile = [lambda: None, pass_time]
    assert isinstance(herd.call(credentials=process(herd, store)), TooLong)
    assert len(herd.sent) == 1


def test_a_cancellation(herd: Herd, store: RecordingStore) -> None:
    """What is not sent does not count; the store is not asked, since a call that is broken off cannot wait for it."""
    endpoint = Endpoint()
    caller = herd.start(credentials=process(herd, store, endpoint))
    store.meanwhile = [caller.break_off]
    herd.run()
    assert herd.sent == []
    assert endpoint.permits == Permits()
    herd.then(token("late", takes=5))
    caller = herd.start(credentials=process(herd, store, endpoint))
    herd.wait(12)  # the turn in the store has to run out first
    caller.break_off()
    assert len(herd.sent) == len(endpoint.permits.held) == 1  # which may still arrive


# What is read


def test_a_stale_token_of_another_process_is_renewed_ahead_of_expiry(herd: Herd, store: RecordingStore) -> None:
    herd.call(credentials=process(herd, store))
    herd.wait(80)
    assert access_token(herd.call(credentials=process(herd, store))) == "t2"
    herd.wait(80)
    herd.then(REFUSAL)
    assert access_token(herd.call(credentials=process(herd, store))) == "t2"  # it serves for ten more seconds
    assert len(herd.sent) == 3


def test_a_call_that_ends_otherwise_takes_a_stale_token_of_another_process(herd: Herd, store: RecordingStore) -> None:
    herd.call(credentials=process(herd, store))
    herd.wait(80)
    endpoint = Endpoint()
    endpoint.close(herd.clock() + 1000)
    assert access_token(herd.call(credentials=process(herd, store, endpoint))) == "t1"


def test_a_token_that_was_refused_before_is_not_taken_again(
    herd: Herd, store: RecordingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that can be read, and not written, goes on to have it."""
    one = process(herd, store)
    herd.call(credentials=one)
    monkeypatch.setattr(store, "put", lambda *_: None)
    assert access_token(herd.call("t1", credentials=one)) == "t2"
    assert access_token(herd.call("t2", credentials=one)) == "t3"


@pytest.mark.parametrize(
    "document",
    [b"no JSON", b"[]", b"{}", b'{"access_token": "t"}', b'{"access_token": "t", "lifetime": "x"}'],
)
def test_a_row_that_says_something_else_is_no_news(herd: Herd, store: RecordingStore, document: bytes) -> None:
    """It may be that of another version."""
    seal = Seal(CLIENT)
    store.put(seal.name("token"), seal.seal("token", document), 60)
    assert Shared(store, CLIENT).look_for_token(set()) == News()


@pytest.mark.parametrize("lifetime", [90, math.inf])
def test_a_token_has_what_is_left_of_its_life(herd: Herd, store: RecordingStore, lifetime: float) -> None:
    herd.then(token("t", lifetime))
    herd.call(credentials=process(herd, store))
    herd.wait(30)
    found = Shared(store, CLIENT, herd.clock).look_for_token(set()).token
    assert found is not None
    assert (found.access_token, found.lifetime) == ("t", lifetime)
    assert found.expires_at == herd.clock() + lifetime - 30


@pytest.mark.parametrize("name", vars(CLIENT))
def test_clients_that_differ_in_one_field_have_no_row_in_common(name: str) -> None:
    """A field of the token request that were not in the name of the row would hand one client the other's token."""
    mine, other = Seal(CLIENT), Seal(replace(CLIENT, **{name: HiddenText("another")}))
    assert mine.name("token") != other.name("token")
    assert other.open("token", mine.seal("token", b"token")) is None
