"""4. A 401 from the API: the token is renewed, the request sent once more, and what does not help is not repeated."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
from conftest import INSTALLED, Driver, GatedSandbox, Log, Reply, outcome, statuses, url
from herd import (
    CLIENT,
    NO_ROUTE,
    NOW,
    REFUSAL,
    SILENCE,
    Herd,
    a_call,
    access_token,
    limits,
    response,
    retry_after,
    token,
    tokens,
)

from nexus_auth.credentials import Credentials
from nexus_auth.grant import Fault, FaultKind
from nexus_auth.known import (
    Call,
    Decision,
    Failure,
    Fetch,
    GiveUp,
    Known,
    Raise,
    Renewals,
    TooLong,
    Use,
    decide,
    failed,
    fruitless,
    judged,
    landed,
    over,
)
from nexus_auth.quota import Endpoint
from nexus_auth.testing import NexusSandbox
from nexus_auth.token import Token
from nexus_auth.value import replace

OLD = Token("old", expires_at=NOW + 600, half_life=NOW + 60, arrived_at=NOW - 9)
NEW = Token("new", expires_at=NOW + 3600, half_life=NOW + 1800, arrived_at=NOW)
STALE = Token("stale", expires_at=NOW + 30, half_life=NOW - 1, arrived_at=NOW - 9)
EXPIRED = Token("old", expires_at=NOW - 1, half_life=NOW - 60, arrived_at=NOW - 99)
FAULT = Fault(FaultKind.UNREACHABLE, "", "")
FAILURE = Failure(FAULT, timeout=10, max_wait=75, met_at=NOW - 1, memory=2)


# What to do, and what is known then


@pytest.mark.parametrize(
    ("known", "call", "decision"),
    [
        (Known(OLD), a_call(), Fetch()),
        (Known(EXPIRED), a_call(), Fetch()),
        (Known(), a_call(), Fetch()),
        (Known(NEW), a_call(), Use(NEW)),  # another caller has renewed it meanwhile
        (Known(NEW, renewals=Renewals(after=NOW + 1)), a_call(), Use(NEW)),
        (Known(STALE), a_call(), Fetch(fallback=STALE)),
        (Known(OLD, renewals=Renewals(after=NOW + 1.5)), a_call(), GiveUp(1.5)),
        (Known(OLD, renewals=Renewals(after=NOW)), a_call(), Fetch()),
        (Known(EXPIRED, renewals=Renewals(after=NOW + 1.5)), a_call(), GiveUp(1.5)),
        (Known(OLD, FAILURE, renewals=Renewals(after=NOW + 1.5)), a_call(), GiveUp(1.5)),
        (Known(OLD, renewals=Renewals(unrepeatable_after=NOW + 4)), a_call(), Fetch()),
        (Known(OLD, renewals=Renewals(unrepeatable_after=NOW + 4)), a_call(repeatable=False), GiveUp(4)),
        (Known(OLD, renewals=Renewals(unrepeatable_after=NOW)), a_call(repeatable=False), Fetch()),
        (Known(NEW, renewals=Renewals(unrepeatable_after=NOW + 4)), a_call(repeatable=False), Use(NEW)),
        (Known(OLD, FAILURE), a_call(), Raise(FAILURE)),
    ],
)
def test_what_to_do_after_a_401(known: Known, call: Call, decision: Decision) -> None:
    assert decide(known, NOW, call, "old") == decision


def test_without_a_401_what_did_not_help_is_no_matter() -> None:
    renewals = Renewals(pause=60, after=NOW + 60, unrepeatable_after=NOW + 10)
    assert decide(Known(OLD, renewals=renewals), NOW, a_call(repeatable=False)) == Use(OLD)
    assert decide(Known(None, renewals=renewals), NOW, a_call(repeatable=False)) == Fetch()
    assert decide(Known(EXPIRED, renewals=renewals), NOW, a_call(repeatable=False)) == Fetch()


@pytest.mark.parametrize(
    ("call", "refused", "retry_at", "end"),
    [
        (a_call(), None, NOW + 2, TooLong(2, "why")),
        (a_call(), None, NOW - 2, TooLong(0, "why")),
        (a_call(), "old", NOW + 2, GiveUp(2)),
        (a_call(), "old", NOW - 2, GiveUp(0)),
        (a_call(insists=True), "old", NOW + 2, TooLong(2, "why")),
    ],
)
def test_the_end_of_a_call_whose_budget_is_spent(
    call: Call, refused: str | None, retry_at: float, end: Decision
) -> None:
    assert over(call, NOW, refused, retry_at, "why") == end


PAUSED = Renewals(pause=4, after=NOW + 4, unrepeatable_after=NOW + 9, on_trial="x", has_replay=True)
TRIED = Renewals(unrepeatable_after=NOW + 9, on_trial="new", has_replay=True)


@pytest.mark.parametrize(
    ("call", "renewals"),
    [
        (a_call(), replace(PAUSED, on_trial="new")),
        (a_call(repeatable=False), replace(PAUSED, on_trial="new", has_replay=False, unrepeatable_after=NOW + 10)),
        (a_call(insists=True), replace(PAUSED, on_trial="new", has_replay=False)),
    ],
)
def test_what_is_known_after_a_renewal(call: Call, renewals: Renewals) -> None:
    known = Known(OLD, FAILURE, NOW + 9, PAUSED)
    assert landed(known, NEW, call, NOW, "old") == Known(NEW, None, 0.0, renewals)


def test_the_same_token_again_is_no_renewal() -> None:
    again = replace(OLD, arrived_at=NOW)
    known = landed(Known(OLD, FAILURE, NOW + 9, PAUSED), again, a_call(), NOW, "old")
    assert known == Known(again, None, 0.0, replace(PAUSED, pause=8, after=NOW + 8, on_trial=None))


def test_the_same_token_again_is_no_renewal_for_what_cannot_be_sent_again_either() -> None:
    known = landed(Known(OLD), OLD, a_call(repeatable=False), NOW, "old")
    assert known.renewals == Renewals(pause=1, after=NOW + 1, unrepeatable_after=NOW + 10)


def test_a_pause_without_renewals_doubles_from_one_second_to_sixty() -> None:
    known, pauses = Known(NEW, renewals=Renewals(unrepeatable_after=NOW + 9, on_trial="new")), []
    for _ in range(8):
        known = fruitless(known, NOW)
        assert known.renewals.after == NOW + known.renewals.pause
        pauses.append(known.renewals.pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert known == Known(NEW, renewals=Renewals(60, NOW + 60, NOW + 9, None))


HELPED = Renewals(0, 0, NOW + 9, None, has_replay=True)
NOT_HELPED = Renewals(1, NOW + 1, NOW + 9, None, has_replay=True)
NO_REPLAY = replace(TRIED, has_replay=False)
PAUSED_BEFORE = replace(TRIED, pause=4, after=NOW - 1)
COUNTED = replace(NOT_HELPED, after=NOW + 0.5)


@pytest.mark.parametrize(
    ("before", "access_token", "status", "of_replay", "after"),
    [
        (TRIED, "new", 401, True, NOT_HELPED),
        (TRIED, "new", 200, True, HELPED),
        (TRIED, "new", 500, True, HELPED),
        (TRIED, "new", 403, True, HELPED),
        (TRIED, "new", None, True, NO_REPLAY),
        (PAUSED_BEFORE, "new", 401, True, replace(NOT_HELPED, pause=8, after=NOW + 8)),
        (PAUSED_BEFORE, "new", 200, True, HELPED),
        (COUNTED, "new", 401, True, COUNTED),
        (COUNTED, "new", 200, True, HELPED),
        # Another call's: the replay will tell, unless there is none, or renewals have not helped before.
        (TRIED, "new", 401, False, TRIED),
        (TRIED, "new", 200, False, TRIED),
        (PAUSED_BEFORE, "new", 200, False, PAUSED_BEFORE),
        (PAUSED_BEFORE, "new", 401, False, replace(NOT_HELPED, pause=8, after=NOW + 8)),
        (NO_REPLAY, "new", 401, False, replace(NOT_HELPED, has_replay=False)),
        (NO_REPLAY, "new", 200, False, replace(HELPED, has_replay=False)),
        # Only the newest token says whether its renewal has helped.
        (TRIED, "old", 401, True, TRIED),
        (TRIED, "old", 200, True, TRIED),
        (TRIED, "old", None, True, TRIED),
    ],
)
def test_what_an_answer_says_of_a_renewal(
    before: Renewals, access_token: str, status: int | None, of_replay: bool, after: Renewals
) -> None:
    known = Known(NEW, FAILURE, NOW + 1, before)
    assert judged(known, access_token, status, NOW, of_replay=of_replay) == replace(known, renewals=after)
    assert judged(Known(), access_token, status, NOW, of_replay=of_replay) == Known()


def test_a_failure_is_no_matter_of_renewals() -> None:
    assert failed(Known(NEW, renewals=PAUSED), FAULT, a_call(), NOW).renewals == PAUSED


# By hand


@pytest.fixture
def herd() -> Herd:
    """A herd whose token is t1; each token request brings another: t2, t3, ..."""
    herd = Herd(more=tokens())
    herd.call()
    return herd


def a_401(herd: Herd, *, replay: int | None = 200, **fields: Any) -> str | None:
    """Have the API refuse the newest token to a call; return the token of its replay, if there is one."""
    assert herd.credentials.known.token is not None
    refused, call = herd.credentials.known.token.access_token, Call(limits(), **fields)
    herd.credentials.answered(refused, 401)
    decision = herd.call(refused, call=call)
    if not isinstance(decision, Use) or not call.repeatable:
        return None
    renewed = decision.token.access_token
    assert renewed == call.renewed != refused
    herd.credentials.replayed(renewed, replay)
    return renewed


def test_a_hundred_callers_with_a_refused_token_cost_one_renewal(herd: Herd) -> None:
    herd.then(token("t2", takes=2))
    callers = herd.crowd(100, "t1")
    herd.run()
    callers += herd.crowd(3, "t1")  # late with the older token: the newer one is there
    herd.run()
    assert {access_token(caller.outcome) for caller in callers} == {"t2"}
    assert len(herd.sent) == 2
    assert [caller.call.renewed for caller in callers].count("t2") == 1  # that one's replay tells whether it helped


def test_renewals_that_help_are_never_put_off(herd: Herd) -> None:
    assert [a_401(herd) for _ in range(5)] == ["t2", "t3", "t4", "t5", "t6"]


def test_renewals_that_do_not_help_are_ever_rarer(herd: Herd) -> None:
    """However many calls are refused, each with the token that is the newest then."""
    start = herd.now
    while herd.now < start + 300:
        a_401(herd, replay=401)
        herd.wait(0.5)
    assert [sent - start for sent in herd.sent[1:]] == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    herd.wait(60)
    assert a_401(herd, replay=200)
    assert a_401(herd, replay=401)  # at once: the last one has helped
    assert not a_401(herd)


def test_a_call_that_is_always_refused_between_good_ones_does_not_cost_a_renewal_each(herd: Herd) -> None:
    start = herd.now
    for _ in range(60):
        a_401(herd, replay=401)
        herd.credentials.answered(f"t{len(herd.sent)}", 200)
        herd.wait(0.5)
    assert [sent - start for sent in herd.sent[1:]] == [0, 1, 3, 7, 15]


def test_what_cannot_be_sent_again_costs_one_renewal_in_ten_seconds(herd: Herd) -> None:
    start = herd.now
    for _ in range(60):
        a_401(herd, repeatable=False)
        herd.credentials.answered(f"t{len(herd.sent)}", 200)  # each renewal has helped
        herd.wait(0.5)
    assert [sent - start for sent in herd.sent[1:]] == [0, 10, 20]
    assert a_401(herd) == "t5"  # which puts off nobody else


def test_a_renewal_for_what_cannot_be_sent_again_is_judged_by_the_next_answer(herd: Herd) -> None:
    a_401(herd, repeatable=False)
    assert herd.credentials.known.renewals.on_trial == "t2"
    herd.credentials.answered("t1", 200)  # late, and to the older token
    assert herd.credentials.known.renewals.on_trial == "t2"
    herd.credentials.answered("t2", 200)
    assert herd.credentials.known.renewals.on_trial is None
    herd.credentials.answered("t2", 401)  # the second answer, which says nothing of the renewal
    assert a_401(herd) == "t3"


ORDERS = {
    "helped": ([("t2", 200)], True),
    "did not help": ([("t2", 401)], False),
    "helped, and another call was refused": ([("t2", 200), ("t2", 401)], True),
    "did not help, and another call was good": ([("t2", 401), ("t2", 200)], False),
    "helped, and a late call with the old token was refused": ([("t1", 401), ("t2", 200)], True),
    "did not help, and a late call with the old token was good": ([("t1", 200), ("t2", 401)], False),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("insists", [False, True])
def test_the_first_answer_to_the_new_token_tells(herd: Herd, order: str, insists: bool) -> None:
    """Whichever call it is of."""
    answers, may_renew = ORDERS[order]
    herd.call("t1", call=Call(limits(), repeatable=insists, insists=insists))
    for answered, status in answers:
        herd.credentials.answered(answered, status)
    assert isinstance(herd.call("t2"), Use if may_renew else GiveUp)


@pytest.mark.parametrize(("status", "may_renew"), [(200, True), (401, False)])
def test_a_replay_that_was_broken_off_leaves_it_to_the_next_answer(herd: Herd, status: int, may_renew: bool) -> None:
    assert a_401(herd, replay=None) == "t2"
    herd.credentials.answered("t2", status)
    assert isinstance(herd.call("t2"), Use if may_renew else GiveUp)


def test_of_a_renewal_its_own_replay_tells(herd: Herd) -> None:
    """Not what other calls with the new token were answered before."""
    call = Call(limits())
    herd.call("t1", call=call)
    herd.credentials.answered("t2", 401)
    herd.credentials.replayed("t2", 200)
    assert isinstance(herd.call("t2"), Use)


def test_while_renewals_do_not_help_no_replay_is_waited_for(herd: Herd) -> None:
    """Else every caller that is refused before the replay is answered would renew once more."""
    a_401(herd, replay=401)
    herd.wait(1)
    herd.call("t2", call=Call(limits()))
    herd.credentials.answered("t3", 401)
    assert isinstance(herd.call("t3"), GiveUp)
    herd.credentials.replayed("t3", 401)  # counts no second time
    assert herd.credentials.known.renewals.pause == 2
    herd.wait(2)
    assert access_token(herd.call("t3")) == "t4"


def test_a_good_call_does_not_say_that_a_renewal_has_helped_which_its_replay_will_tell(herd: Herd) -> None:
    a_401(herd, replay=401)
    herd.wait(1)
    herd.call("t2", call=Call(limits()))
    herd.credentials.answered("t3", 200)
    herd.credentials.replayed("t3", 401)
    assert herd.credentials.known.renewals.pause == 2


def test_the_answer_to_an_older_token_says_nothing_of_the_newest(herd: Herd) -> None:
    herd.call("t1")
    herd.call("t2")
    herd.credentials.replayed("t2", 401)
    assert access_token(herd.call("t3")) == "t4"


def test_what_another_thread_learns_at_the_same_moment_is_not_lost() -> None:
    learnt = Known(NEW)

    def clock() -> float:
        credentials.known = learnt
        return NOW

    credentials = Credentials(CLIENT, Endpoint(), clock=clock)
    credentials.known = Known(OLD)
    credentials.replayed("old", 401)
    assert credentials.known == learnt


def test_a_server_that_gives_the_same_token_again_is_asked_ever_more_rarely(log: Log) -> None:
    herd = Herd(token("t1"))
    herd.call()
    start = herd.now
    for _ in range(60):
        call = Call(limits())
        assert isinstance(herd.call("t1", call=call), GiveUp)
        assert call.renewed is None
        herd.wait(0.5)
    assert [sent - start for sent in herd.sent[1:]] == [0, 1, 3, 7, 15]
    assert {level for level, _ in log()} == {"DEBUG"}  # nothing was renewed


def test_all_that_wait_for_a_renewal_which_brings_the_same_token_give_up() -> None:
    herd = Herd(token("t1", takes=2))
    herd.call()
    callers = herd.crowd(20, "t1")
    herd.run()
    assert {type(caller.outcome) for caller in callers} == {GiveUp}
    assert len(herd.sent) == 2


def test_who_insists_waits_for_a_token_that_is_another() -> None:
    """There is no 401 to be content with."""
    herd = Herd(token("t1"), token("t1"), token("t1"), token("t2"))
    herd.call()
    insists = herd.start("t1", call=Call(limits(), insists=True))
    herd.run()
    assert access_token(insists.outcome) == "t2"
    assert herd.sent == pytest.approx([0, 0, 1, 3])


def test_who_insists_is_told_when_it_would_take_longer_than_max_wait() -> None:
    herd = Herd(token("t1"))
    herd.call()
    decision = herd.call("t1", call=Call(limits(max_wait=2.5), insists=True))
    assert isinstance(decision, TooLong)
    assert decision.retry_after == pytest.approx(2)
    assert "refused, one after the other" in decision.reason
    assert herd.sent == pytest.approx([0, 0, 1])


def test_after_a_401_a_token_is_renewed_although_that_failed_ahead_of_time(herd: Herd) -> None:
    herd.wait(3570)
    herd.then(NO_ROUTE, token("t2"))
    assert access_token(herd.call()) == "t1"
    assert access_token(herd.call("t1")) == "t2"


@pytest.mark.parametrize(("fault", "memory"), [(NO_ROUTE, 2), (REFUSAL, 10)], ids=["down", "refused"])
def test_after_a_401_a_failure_is_remembered_too(herd: Herd, fault: Any, memory: float) -> None:
    herd.then(fault)
    assert isinstance(herd.call("t1"), Raise)
    asked = len(herd.sent)
    herd.then(token("t2"))
    herd.wait(memory - 0.1)
    assert isinstance(herd.call("t1"), Raise)
    assert len(herd.sent) == asked
    herd.wait(0.1)
    assert access_token(herd.call("t1")) == "t2"


def test_what_came_while_the_api_was_at_work_was_not_waited_for() -> None:
    herd, call = Herd(token("t1", takes=1), NO_ROUTE), Call(limits())
    herd.call(call=call)
    assert isinstance(herd.call("t1"), Raise)
    herd.wait(2.1)
    herd.then(token("t2"))
    assert access_token(herd.call("t1", call=call)) == "t2"


# By hand: one budget per call


def test_a_renewal_has_what_the_first_token_has_left_of_max_wait() -> None:
    herd, call = Herd(token("t1", takes=7), SILENCE), Call(limits(max_wait=20))
    herd.call(call=call)
    assert call.spent == pytest.approx(7)
    herd.wait(1000)  # the API takes its time, which does not count
    herd.call("t1", call=call)
    assert [request.left for request in herd.requests] == pytest.approx([20, 13, 2.6], abs=0.2)
    assert call.spent == pytest.approx(27.4, abs=0.2)  # the last one has started in time, and keeps its timeout


def test_once_the_budget_is_spent_a_401_goes_to_the_caller() -> None:
    herd, call = Herd(token("t1", takes=7), SILENCE), Call(limits(max_wait=5))
    assert access_token(herd.call(call=call)) == "t1"  # a request that has started keeps its timeout
    assert herd.call("t1", call=call) == GiveUp(0)
    assert herd.sent == [0]


@pytest.mark.parametrize("way", ["another renews", "closed", "over the quota"])
def test_who_has_nothing_left_does_not_wait_for_what_would_take_longer(herd: Herd, way: str) -> None:
    """Not even long enough to be told so."""
    if way == "another renews":
        herd.then(SILENCE)
        herd.start("t1")
        herd.wait(1)
    elif way == "closed":
        herd.endpoint.close(herd.clock() + 30)
    else:
        for number in range(60):
            herd.endpoint.answered(f"other {number}", herd.clock())
    caller = herd.start("t1", call=Call(limits(max_wait=2), spent=2.001))
    herd.wait(0)
    assert isinstance(caller.outcome, GiveUp)


def test_a_call_whose_token_was_there_may_ask_once_whatever_its_max_wait(herd: Herd) -> None:
    assert access_token(herd.call("t1", call=Call(limits(max_wait=0)))) == "t2"


def test_who_waits_for_the_renewal_of_another_gets_the_401_once_its_budget_is_spent(herd: Herd) -> None:
    herd.then(token("t2", takes=9))
    herd.start("t1")
    waits = herd.start("t1", max_wait=3)
    herd.run()
    assert isinstance(waits.outcome, GiveUp)
    assert retry_after(waits.outcome) == pytest.approx(8)
    assert waits.waited == pytest.approx(3)


def test_a_renewal_that_would_take_longer_is_no_matter_of_the_401(herd: Herd) -> None:
    herd.then(response(429, Retry_After="80"))
    decision = herd.call("t1")
    assert isinstance(decision, TooLong)
    assert retry_after(decision) == pytest.approx(80)


# Over real sockets


@pytest.fixture
def signed(driver: Driver, sandbox: NexusSandbox) -> Any:
    """A client whose token has just been revoked."""
    client = driver.client(driver.auth(sandbox))
    assert driver.get(client, url(sandbox)).status == 200
    sandbox.revoke_tokens()
    return client


def test_a_revoked_token_costs_one_renewal(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    reply = driver.get(signed, url(sandbox))
    assert (reply.status, reply.history) == (200, [401])  # not the token request
    assert driver.get(signed, url(sandbox)) == (200, reply.body, [])
    assert len(sandbox.token_requests) == 2
    tokens = [arrival.headers["Authorization"] for arrival in sandbox.requests]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]


def test_a_hundred_callers_with_a_revoked_token_cost_one_renewal_of_a_driver(
    driver: Driver, gated: GatedSandbox
) -> None:
    gated.gate.set()
    client = driver.client(driver.auth(gated))
    driver.get(client, url(gated))
    gated.revoke_tokens()
    gated.gate.clear()
    calls = driver.in_background(lambda: driver.at_once([client] * 50, url(gated)))
    gated.wait_for(token_requests=2, requests=51)
    gated.gate.set()
    assert statuses(calls.result()) == {200}
    assert (len(gated.token_requests), len(gated.requests)) == (2, 101)


CONTENT = b"0123456789" * 20_000


def a_file(content: bytes = CONTENT, stands_at: int = 0) -> io.BytesIO:
    file = io.BytesIO(content)
    file.seek(stands_at)
    return file


class Pipe(io.RawIOBase):
    """A file that cannot seek."""

    def __init__(self, content: bytes) -> None:
        self._source = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.readinto(buffer)


class ClosesItself(io.BytesIO):
    """A file that is closed once it has been read."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if not content:
            self.close()
        return content


def check_replay(sandbox: NexusSandbox, reply: Reply, content: bytes) -> None:
    assert (reply.status, reply.history) == (200, [401])
    refused, accepted = sandbox.requests[-2:]
    assert content in refused.body
    assert accepted.body == refused.body
    framing = ("Content-Length", "Transfer-Encoding", "Content-Type")
    assert [accepted.headers[name] for name in framing] == [refused.headers[name] for name in framing]


@pytest.mark.parametrize("body", [CONTENT, b"", "t\u00e9xt".encode()], ids=["long", "empty", "text"])
def test_bytes_are_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any, body: bytes) -> None:
    check_replay(sandbox, driver.send(signed, "POST", url(sandbox), body), body)


def test_text_is_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    check_replay(sandbox, driver.send(signed, "POST", url(sandbox), "12.50"), b"12.50")


@pytest.mark.parametrize(
    ("options", "content"),
    [
        ({"json": {"amount": "12.50"}}, b"12.50"),
        ({"data": {"a": "1", "b": "\u00fc"}}, b"a=1&b=%C3%BC"),
        ({"files": {"file": ("name", CONTENT)}, "data": {"a": "1"}}, CONTENT),
    ],
    ids=["json", "form", "multipart"],
)
def test_what_the_libraries_encode_is_sent_again(
    driver: Driver, sandbox: NexusSandbox, signed: Any, options: dict[str, Any], content: bytes
) -> None:
    check_replay(sandbox, driver.send(signed, "POST", url(sandbox), **options), content)


def test_a_multipart_of_files_is_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    files = {"one": ("one", a_file()), "another": ("another", a_file(b"not this" + CONTENT, stands_at=8))}
    check_replay(sandbox, driver.send(signed, "POST", url(sandbox), files=files), CONTENT)


class Chunks(Collection[bytes]):
    """Chunks whose length is that of all of them, as requests expects it."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks

    def __len__(self) -> int:
        return sum(map(len, self._chunks))


OF_HTTPX: dict[str, Callable[[], Any]] = {
    "a file": a_file,
    "an empty file": lambda: a_file(b""),
    "a list of chunks": lambda: [CONTENT, b"", b"the end"],
    "a tuple of chunks": lambda: (b"12", b".50"),
}
CAN_BE_SENT_AGAIN: dict[str, dict[str, Callable[[], Any]]] = {
    "requests": {
        "a file": a_file,
        "a file from the middle": lambda: a_file(b"not this" + CONTENT, stands_at=8),
        "an empty file": lambda: a_file(b""),
        "a bytearray": lambda: bytearray(CONTENT),
        "a memoryview": lambda: memoryview(CONTENT),
        "chunks": lambda: Chunks(b"12", b".50"),
    },
    "httpx": OF_HTTPX,
    "httpx2": OF_HTTPX,
}
CANNOT_BE_SENT_AGAIN: dict[str, Callable[[], Any]] = {
    "a pipe": lambda: Pipe(b"all of it"),
    "a file that is closed meanwhile": lambda: ClosesItself(b"all of it"),
    "an iterator": lambda: iter([b"all ", b"of it"]),
}


BLOCKING = [name for name in CAN_BE_SENT_AGAIN if name in INSTALLED]


@pytest.mark.parametrize(
    ("driver", "body"),
    [pytest.param(name, body, id=f"{name} {body}") for name in BLOCKING for body in CAN_BE_SENT_AGAIN[name]],
    indirect=["driver"],
)
def test_what_a_library_can_send_again_is_sent_again(
    driver: Driver, sandbox: NexusSandbox, signed: Any, body: str
) -> None:
    content = CAN_BE_SENT_AGAIN[driver.library.__name__][body]()
    check_replay(sandbox, driver.send(signed, "POST", url(sandbox), content), b"")
    assert (sandbox.requests[-1].body == b"") is (body == "an empty file")
    assert b"not this" not in sandbox.requests[-1].body


@pytest.mark.parametrize("open_file", [tempfile.TemporaryFile, tempfile.SpooledTemporaryFile])
@pytest.mark.parametrize("driver", BLOCKING, indirect=True)
def test_a_file_on_disk_is_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any, open_file: Any) -> None:
    with open_file() as file:
        file.write(CONTENT)
        file.seek(0)
        check_replay(sandbox, driver.send(signed, "POST", url(sandbox), file), CONTENT)


@pytest.mark.parametrize("driver", BLOCKING[1:], indirect=True)
def test_httpx_sends_a_file_from_where_it_stood(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    body, headers = a_file(b"not this" + CONTENT, stands_at=8), {"Content-Length": str(len(CONTENT))}
    check_replay(sandbox, driver.send(signed, "POST", url(sandbox), body, headers=headers), CONTENT)
    assert sandbox.requests[-1].body == CONTENT


def check_no_replay(driver: Driver, sandbox: NexusSandbox, client: Any, reply: Reply) -> None:
    """Check that the caller got the 401 and the token was renewed all the same."""
    assert (reply.status, reply.history) == (401, [])
    assert b"all of it" in sandbox.requests[-1].body
    assert (len(sandbox.requests), len(sandbox.token_requests)) == (2, 2)
    assert driver.get(client, url(sandbox)).status == 200
    sandbox.revoke_tokens()
    assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 3


def test_a_generator_is_not_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    reply = driver.send(signed, "POST", url(sandbox), driver.generator([b"all ", b"of it"]))
    check_no_replay(driver, sandbox, signed, reply)


@pytest.mark.parametrize("body", CANNOT_BE_SENT_AGAIN)
@pytest.mark.parametrize("driver", BLOCKING, indirect=True)
def test_what_cannot_be_sent_again_is_not(driver: Driver, sandbox: NexusSandbox, signed: Any, body: str) -> None:
    reply = driver.send(signed, "POST", url(sandbox), CANNOT_BE_SENT_AGAIN[body]())
    check_no_replay(driver, sandbox, signed, reply)


@pytest.mark.parametrize("driver", [name for name in INSTALLED if name != "requests"], indirect=True)
def test_a_multipart_of_a_pipe_is_not_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    """Requests reads it before it sends it."""
    reply = driver.send(signed, "POST", url(sandbox), files={"file": Pipe(b"all of it")})
    check_no_replay(driver, sandbox, signed, reply)


def test_what_a_redirect_made_of_a_request_can_be_sent_again(
    driver: Driver, sandbox: NexusSandbox, signed: Any
) -> None:
    """A POST that is answered 303 is a GET without a body, whatever body it had."""
    driver.get(signed, url(sandbox))
    sandbox.requests.clear()
    sandbox.answer("/payment", status=303, headers={"Location": "/payment/1"})
    sandbox.answer("/payment/1", status=401)
    assert driver.send(signed, "POST", url(sandbox, "/payment"), driver.generator([b"once"])).status == 200
    # What was refused is sent again, not what was already accepted.
    assert [(a.method, a.path) for a in sandbox.requests] == [("POST", "/payment"), *[("GET", "/payment/1")] * 2]


def test_cookies_of_the_401_go_with_the_replay(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    cookies = {"Set-Cookie": "session=new; Path=/"}
    sandbox.answer("/customer", status=200, headers={"Set-Cookie": "session=old; Path=/"})
    sandbox.answer("/customer", status=200, headers={"Set-Cookie": "kept=1; Path=/"})
    sandbox.answer("/customer", status=401, headers=cookies)
    for _ in range(3):
        assert driver.get(client, url(sandbox)).status == 200
    *_, refused, replay = [set((arrival.headers["Cookie"] or "").split("; ")) for arrival in sandbox.requests]
    assert refused == {"session=old", "kept=1"}
    assert replay == {"session=new", "kept=1"}
    driver.get(client, url(sandbox))
    assert set(sandbox.requests[-1].headers["Cookie"].split("; ")) == {"session=new", "kept=1"}


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave it for a minute after the first renewal that has not helped."""
    monkeypatch.setattr("nexus_auth.known.FRUITLESS_PAUSE", 60.0)


@pytest.mark.usefixtures("long_pauses")
def test_the_second_answer_is_the_callers(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/customer", status=401, body="first")
    sandbox.answer("/customer", status=401, body="second")
    assert driver.get(client, url(sandbox)) == (401, b"second", [401])
    sandbox.answer("/customer", status=401, body="first")
    assert driver.get(client, url(sandbox)) == (401, b"first", [])  # another token would not help
    assert len(sandbox.token_requests) == 2


@pytest.mark.usefixtures("long_pauses")
def test_an_api_that_always_says_401(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/forbidden", status=401, times=None)
    for _ in range(20):
        assert driver.get(client, url(sandbox, "/forbidden")).status == 401
        assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 2


def test_what_cannot_be_sent_again_gets_its_401_though_its_renewal_fails(
    driver: Driver, sandbox: NexusSandbox, signed: Any
) -> None:
    sandbox.fail_token_requests(status=400, json={"error": "invalid_client"})
    assert driver.send(signed, "POST", url(sandbox), driver.generator([b"x"])).status == 401
    assert isinstance(outcome(driver.get, signed, url(sandbox)), driver.door.TokenRequestError)
    assert len(sandbox.token_requests) == 2


def test_an_api_that_always_says_401_to_what_cannot_be_sent_again(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/forbidden", status=401, times=None)
    for _ in range(20):
        assert driver.send(client, "POST", url(sandbox, "/forbidden"), driver.generator([b"x"])).status == 401
        assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 2


def test_renewals_that_help_are_never_put_off_by_a_driver(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    for number in range(5):
        assert driver.get(signed, url(sandbox)).status == 200
        sandbox.revoke_tokens()
        assert len(sandbox.token_requests) == 2 + number


def test_the_first_answer_to_a_new_token_is_looked_at(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    """Where the call that had it renewed had no replay, or none that was answered."""
    driver.send(signed, "POST", url(sandbox), driver.generator([b"x"]))
    sandbox.answer("/forbidden", status=401, times=None)
    assert driver.get(signed, url(sandbox, "/forbidden")) == (401, b"", [])
    assert len(sandbox.token_requests) == 2


def test_a_replay_that_breaks_says_nothing_of_its_renewal(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/customer", status=401)
    sandbox.answer("/customer", drop=True)
    with pytest.raises(driver.library_error):
        driver.get(client, url(sandbox))
    assert driver.get(client, url(sandbox)).status == 200
    sandbox.revoke_tokens()
    assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 3


def test_a_401_while_no_token_is_to_be_had(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    sandbox.fail_token_requests(status=429, retry_after=100)
    with pytest.raises(driver.library_error) as raised:
        driver.get(signed, url(sandbox))
    error: Any = raised.value
    assert isinstance(error, driver.door.TokenWaitError)
    assert 99 < error.retry_after <= 100


def test_another_token_for_what_is_no_http_call(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    first = driver.access_token(auth)
    second = driver.access_token(auth, refused=first)
    assert second != first
    assert driver.access_token(auth, refused=first) == second  # which has taken its place already
    assert driver.get(driver.client(auth), url(sandbox)).status == 200
    assert sandbox.requests[0].headers["Authorization"] == f"Bearer {second}"
    assert driver.access_token(auth, refused=second) not in (first, second)
    assert len(sandbox.token_requests) == 3


# What is logged


def test_a_renewal_is_logged(driver: Driver, sandbox: NexusSandbox, log: Log) -> None:
    client, endpoint = driver.client(driver.auth(sandbox)), f"token endpoint {sandbox.environment.token_endpoint}"
    obtained = ("DEBUG", f"{endpoint} gave client 'sandbox-client' a token for 3600.0 s")
    driver.get(client, url(sandbox))
    assert log() == [obtained]
    sandbox.revoke_tokens()
    driver.get(client, url(sandbox))
    assert log() == [obtained, ("INFO", f"{endpoint}: renewed the token of client 'sandbox-client' after a 401")]
    driver.get(client, url(sandbox))
    assert log() == []


def test_what_is_not_sent_again_is_logged(driver: Driver, sandbox: NexusSandbox, log: Log, signed: Any) -> None:
    driver.send(signed, "POST", url(sandbox), driver.generator([b"x"]))
    not_sent = f"POST {url(sandbox)}: not sent again after a 401, since its body cannot be"
    assert log()[-1] == ("INFO", not_sent)


@pytest.mark.usefixtures("long_pauses")
def test_a_new_token_that_is_refused_too_is_a_warning(driver: Driver, sandbox: NexusSandbox, log: Log) -> None:
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/forbidden", status=401, times=None)
    driver.get(client, url(sandbox, "/forbidden"))
    assert [level for level, _ in log()] == ["DEBUG", "DEBUG", "INFO", "WARNING"]
    driver.get(client, url(sandbox, "/forbidden"))
    assert log() == []  # nothing was renewed
