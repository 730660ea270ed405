"""3. Life of a token: fresh, stale, expired or absent; who fetches another, who waits, and what comes of it."""

from __future__ import annotations

import logging
import math
import time
from itertools import pairwise
from typing import Any

import pytest
from conftest import Driver, GatedSandbox, grow_old_in, statuses, url
from herd import (
    CLIENT,
    NO_ROUTE,
    NOW,
    REFUSAL,
    SILENCE,
    Answer,
    Herd,
    a_call,
    a_token,
    access_token,
    response,
    retry_after,
    token,
    tokens,
)

from nexus_auth import quota
from nexus_auth.credentials import Credentials
from nexus_auth.grant import Fault, FaultKind
from nexus_auth.known import Call, Decision, Failure, Fetch, Known, Raise, Renewals, TooLong, Use, decide, landed, told
from nexus_auth.quota import Endpoint, Holder, Turn
from nexus_auth.steps import Steps
from nexus_auth.testing import NexusSandbox
from nexus_auth.token import Token
from nexus_auth.value import replace

FRESH = a_token("fresh", expires_at=NOW + 600, half_life=NOW - 1, arrived_at=NOW - 9)
STALE = a_token("stale", expires_at=NOW + 30, half_life=NOW - 1, arrived_at=NOW - 9)
EXPIRED = a_token("expired", expires_at=NOW, half_life=NOW - 5, arrived_at=NOW - 9)
REFUSED = Failure(Fault(FaultKind.REFUSED, "", ""), timeout=10, max_wait=75, met_at=NOW - 1, memory=10)


# A token


@pytest.mark.parametrize(
    ("age", "leeway", "is_fresh"),
    [
        (0, 60, True),
        (939.9, 60, True),
        (940, 60, False),
        (999.9, 0, True),
        (1000, 0, False),
        (499.9, 600, True),  # the leeway is never more than half of the lifetime
        (500, 600, False),
        (499.9, 1e9, True),
        (500, 500, False),
    ],
)
def test_freshness(age: float, leeway: float, is_fresh: bool) -> None:
    assert Token.granted("t", 1000, asked_at=50, arrived_at=51).is_fresh(50 + age, leeway) is is_fresh


def test_a_token_is_as_old_as_its_request() -> None:
    granted = Token.granted("t", 1000, asked_at=50, arrived_at=60)
    assert granted == a_token("t", expires_at=1050, half_life=550, arrived_at=60)
    assert (granted.lifetime, granted.authorization) == (1000, "Bearer t")
    assert "'t'" not in repr(granted)


def test_a_token_without_a_lifetime_is_always_fresh() -> None:
    granted = Token.granted("t", math.inf, asked_at=50, arrived_at=60)
    assert granted.lifetime == math.inf
    assert granted.is_fresh(1e12, leeway=1e9)


# What to do


@pytest.mark.parametrize(
    ("known", "call", "decision"),
    [
        (Known(), a_call(), Fetch()),
        (Known(FRESH), a_call(), Use(FRESH)),
        (Known(FRESH, failure=REFUSED), a_call(), Use(FRESH)),
        (Known(FRESH), a_call(token_requests=1, spent=99), Use(FRESH)),
        (Known(STALE), a_call(), Fetch(fallback=STALE)),
        (Known(STALE, ahead_after=NOW), a_call(), Fetch(fallback=STALE)),
        (Known(STALE, ahead_after=NOW + 0.1), a_call(), Use(STALE)),
        (Known(STALE, failure=REFUSED, ahead_after=NOW + 1), a_call(), Use(STALE)),
        (Known(EXPIRED), a_call(), Fetch()),
        (Known(EXPIRED, ahead_after=NOW + 1), a_call(), Fetch()),
        (Known(EXPIRED), a_call(begun_at=NOW - 9), Use(EXPIRED)),  # lives shorter than its answer took
        (Known(EXPIRED), a_call(begun_at=NOW - 8.9), Fetch()),
        (Known(STALE), a_call(begun_at=NOW - 9), Use(STALE)),
        (Known(STALE), a_call(begun_at=NOW - 8.9), Fetch(fallback=STALE)),
        (Known(EXPIRED, failure=REFUSED), a_call(), Raise(REFUSED)),
        (Known(EXPIRED, Failure(REFUSED.fault, 10, 75, NOW - 1, 1)), a_call(), Fetch()),
    ],
)
def test_what_to_do_for_a_call(known: Known, call: Call, decision: Decision) -> None:
    assert decide(known, NOW, call) == decision


def test_a_new_token_ends_what_is_known_of_failures() -> None:
    renewals = Renewals(pause=4, after=NOW + 4, unrepeatable_after=NOW + 9, on_trial="x")
    known = landed(Known(STALE, REFUSED, NOW + 9, renewals), FRESH, a_call(), NOW)
    assert known == Known(FRESH, None, 0.0, replace(renewals, on_trial=None))


def test_what_another_process_tells() -> None:
    known = Known(STALE, REFUSED, NOW + 9, Renewals(pause=4))
    later = replace(REFUSED, met_at=NOW + 5)
    assert told(known, later) == Known(STALE, later, NOW + 15, Renewals(pause=4))


# The turn to fetch


def steps() -> Steps[object]:
    yield from ()
    return None


def holder(of: Steps[object], ends_at: float = NOW + 11) -> Holder:
    return Holder("caller", of, sends_at=NOW, ends_at=ends_at)


def test_a_turn_is_for_one_until_it_is_given_back() -> None:
    turn, first, second = Turn(), holder(steps()), holder(steps())
    assert turn.take(first, NOW) is None
    assert turn.take(second, NOW + 10.9) is first
    turn.give_back(second.steps)  # which has none
    assert turn.take(second, NOW) is first
    assert (turn.is_of(first.steps), turn.is_of(second.steps)) == (True, False)
    turn.give_back(first.steps)
    assert turn.take(second, NOW) is None
    assert (turn.is_of(first.steps), turn.is_of(second.steps)) == (False, True)


def test_a_turn_runs_out_unless_it_is_taken_again() -> None:
    turn, one, other = Turn(), steps(), holder(steps(), ends_at=NOW + 32)
    turn.take(holder(one), NOW)
    renewed = holder(one, ends_at=NOW + 21)
    assert turn.take(renewed, NOW + 10) is None
    assert turn.take(other, NOW + 20.9) is renewed
    assert turn.take(other, NOW + 21) is None
    assert turn.take(renewed, NOW + 21.1) is other  # whoever lost it waits


def test_a_turn_of_steps_that_were_broken_off_is_free() -> None:
    turn, broken_off = Turn(), steps()
    turn.take(holder(broken_off), NOW)
    broken_off.close()
    assert turn.take(holder(steps()), NOW) is None


# By hand: one caller


def test_the_first_caller_fetches() -> None:
    herd = Herd(token("t", takes=0.25))
    assert herd.call() == Use(a_token("t", expires_at=4600, half_life=2800, arrived_at=1000.25))
    assert herd.sent == [0]
    assert (herd.requests[0].timeout, herd.requests[0].left) == (10, 75)
    assert herd.requests[0].client is herd.credentials.client


def test_a_fresh_token_takes_no_step() -> None:
    herd = Herd(more=tokens())
    assert herd.credentials.fresh_token(60) is None
    herd.call()
    herd.wait(3539.9)
    fresh = herd.credentials.fresh_token(60)
    assert fresh is not None
    assert herd.call() == Use(fresh)
    herd.wait(0.1)
    assert herd.credentials.fresh_token(60) is None
    assert access_token(herd.call()) == "t2"
    assert herd.sent == [0, 3540]


def test_the_token_of_a_second_try_is_as_old_as_that() -> None:
    herd = Herd(NO_ROUTE, token("t"))
    decision = herd.call()
    assert isinstance(decision, Use)
    assert decision.token.expires_at == 1000 + herd.sent[1] + 3600


# By hand: many callers


def test_a_hundred_callers_cost_one_token_request() -> None:
    herd = Herd(token("t", takes=2), SILENCE)
    callers = herd.crowd(100)
    herd.run()
    assert {access_token(caller.outcome) for caller in callers} == {"t"}
    assert len(herd.sent) == len(herd.endpoint.permits.held) == 1
    assert max(caller.waited for caller in callers) < 2.11


def test_who_waits_looks_soon_and_then_ten_times_a_second() -> None:
    herd = Herd(token("t", takes=2))
    _, waits = herd.crowd(2)
    herd.run()
    assert waits.slept[:2] == pytest.approx([0.01, 0.0125])
    assert waits.slept[15:] == pytest.approx([0.1] * len(waits.slept[15:]))
    assert 20 < len(waits.slept) < 35


def test_callers_of_a_silent_endpoint_are_told_at_once_after_four_tries() -> None:
    herd = Herd(SILENCE)
    callers = herd.crowd(10)
    herd.run()
    assert len(herd.sent) == 4
    assert {type(caller.outcome) for caller in callers} == {Raise}
    ends = [caller.ended_at for caller in callers]
    assert max(ends) - min(ends) < 0.11


@pytest.mark.parametrize("lifetime", [5, 12])
def test_a_token_that_is_old_when_it_arrives_serves_all_that_waited(lifetime: float) -> None:
    """It may have expired, or be due for a renewal that would bring another of its kind."""
    herd = Herd(more=tokens(lifetime, takes=8))
    callers = herd.crowd(10)
    herd.run()
    assert {access_token(caller.outcome) for caller in callers} == {"t1"}
    assert herd.sent == [0]
    assert access_token(herd.call()) == "t2"  # who comes later has not waited for it


def test_who_waits_is_told_when_max_wait_is_over() -> None:
    herd = Herd(token("t", takes=9))
    fetches, waits, waits_not = herd.start(), herd.start(max_wait=3), herd.start(max_wait=0)
    herd.run()
    assert access_token(fetches.outcome) == "t"
    assert waits.waited == pytest.approx(3)
    assert retry_after(waits.outcome) == pytest.approx(8)  # then the turn of the other is over for certain
    assert waits_not.waited == 0
    assert retry_after(waits_not.outcome) == pytest.approx(11)


def test_who_would_wait_too_long_for_the_next_try_of_another_is_told_at_once() -> None:
    herd = Herd(*[response(429)] * 5, token("t"))
    tries = herd.start()
    herd.run(20)
    assert len(herd.sent) == 5  # and the next one is due after fifteen seconds
    waits, waits_not = herd.start(), herd.start(max_wait=5)
    herd.run()
    assert access_token(tries.outcome) == access_token(waits.outcome) == "t"
    assert waits_not.waited == 0
    assert retry_after(waits_not.outcome) > 5


def test_who_has_more_patience_than_the_one_that_fetched_goes_on() -> None:
    herd = Herd(*[SILENCE] * 5, token("t"))
    hasty = herd.start(timeout=1, max_wait=60)
    patient, as_hasty, with_less_time = herd.start(), herd.start(timeout=1, max_wait=60), herd.start(max_wait=50)
    herd.run()
    assert [type(caller.outcome) for caller in (hasty, as_hasty)] == [Raise, Raise]
    assert as_hasty.ended_at == pytest.approx(hasty.ended_at, abs=0.11)
    assert access_token(patient.outcome) == access_token(with_less_time.outcome) == "t"
    assert [request.timeout for request in herd.requests] == [1, 1, 1, 1, 10, 10]


@pytest.mark.parametrize(("who", "sent"), [(0, [0, 3]), (1, [0])], ids=["who fetches", "who waits"])
def test_whoever_breaks_off_harms_nobody_else(who: int, sent: list[float]) -> None:
    herd = Herd(more=tokens(takes=5))
    callers = herd.crowd(3)
    herd.run(3)
    callers.pop(who).break_off()
    herd.run()
    assert {access_token(caller.outcome) for caller in callers} == {f"t{len(sent)}"}
    assert herd.sent == pytest.approx(sent, abs=0.11)


@pytest.mark.parametrize("seconds", [12, 30])
def test_a_token_request_that_is_stuck_starves_nobody(seconds: float) -> None:
    """As one may be that waits for a name look-up, which nothing can interrupt."""
    herd = Herd(Answer(NO_ROUTE.answer, takes=seconds, blocks=True), token("t", takes=5))
    stuck, *others = herd.crowd(5)
    herd.run()
    assert herd.sent == [0, pytest.approx(11, abs=0.11)]  # its timeout and a second; who lost the turn waits
    assert {access_token(caller.outcome) for caller in (stuck, *others)} == {"t"}
    assert max(caller.ended_at for caller in others) == pytest.approx(16, abs=0.21)
    assert stuck.ended_at == pytest.approx(max(seconds, 16), abs=0.21)


def test_the_turn_lasts_through_all_pauses_and_tries() -> None:
    herd = Herd(SILENCE, response(429, Retry_After="30"), Answer(token("t").answer, takes=9))
    callers = herd.crowd(2)
    herd.run()
    assert {access_token(caller.outcome) for caller in callers} == {"t"}
    assert len(herd.sent) == 3


@pytest.mark.parametrize(
    ("known", "decision"),
    [(Known(FRESH), Use(FRESH)), (Known(failure=REFUSED), Raise(REFUSED))],
    ids=["token", "failure"],
)
@pytest.mark.parametrize("others", [0, 1])
def test_what_another_thread_brings_on_the_way_to_the_turn_is_looked_at_before_anything_else(
    known: Known, decision: Decision, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for what is there; nor, while another fetches, is told to wait for it."""
    herd = Herd(SILENCE)
    herd.crowd(others)
    herd.wait(0)
    take = Turn.take

    def take_late(turn: Turn, asking: Holder, now: float) -> Holder | None:
        herd.credentials.known = known
        return take(turn, asking, now)

    monkeypatch.setattr(Turn, "take", take_late)
    caller = herd.start(max_wait=0)
    herd.wait(0)
    assert (caller.outcome, len(herd.sent)) == (decision, others)


# By hand: threads and event loops


class Loop:
    """An event loop."""


def test_there_is_one_flight_among_the_threads_and_one_in_each_loop() -> None:
    herd, loops = Herd(more=tokens(takes=2)), [Loop(), Loop()]
    callers = [herd.start(loop=loop) for loop in (None, *loops) for _ in range(10)]
    herd.run()
    assert herd.sent == [0, 0, 0]
    assert {access_token(caller.outcome) for caller in callers} <= {"t1", "t2", "t3"}
    assert access_token(herd.call()) == "t3"


@pytest.mark.parametrize(
    ("fault", "comes_at"),
    [(NO_ROUTE, 1.95), (REFUSAL, 1.95), (response(429, Retry_After="30"), 1.95), (response(429, Retry_After="30"), 5)],
    ids=["down", "refused", "busy", "pausing"],
)
def test_who_has_failed_or_waits_takes_the_token_that_another_flight_brought(fault: Answer, comes_at: float) -> None:
    herd = Herd(Answer(fault.answer, takes=2), token("t", takes=comes_at))
    callers = in_thread, waits, _ = herd.start(), herd.start(), herd.start(loop=Loop())
    herd.run()
    assert {access_token(caller.outcome) for caller in callers} == {"t"}
    assert herd.sent == [0, 0]
    assert max(in_thread.waited, waits.waited) < comes_at + 0.15


def test_a_token_of_another_flight_that_has_expired_when_it_arrives_is_an_outcome_too() -> None:
    herd = Herd(SILENCE, token("t", lifetime=2, takes=4))
    _, waits, in_loop = herd.start(), herd.start(), herd.start(loop=Loop())
    herd.run(5)
    assert access_token(in_loop.outcome) == access_token(waits.outcome) == "t"


def test_what_another_flight_has_failed_at_is_no_matter_while_there_is_a_token() -> None:
    herd = Herd(token("t"), REFUSAL)
    callers = [herd.start(), herd.start(loop=Loop())]
    herd.run()
    assert [type(caller.outcome) for caller in callers] == [Use, Use]
    assert access_token(herd.call()) == "t"


# By hand: a call within a call, and what is left of one that was broken off


def test_a_call_within_the_flight_of_the_same_thread_is_told_at_once() -> None:
    """As one would be that a logging handler makes. Those of other threads and loops wait as ever."""
    herd = Herd(more=tokens(takes=5))
    outer = herd.start(caller="thread")
    herd.run(1)
    inner = herd.start(caller="thread")
    others = [herd.start(caller="another"), herd.start(caller="thread", loop=Loop())]
    herd.run()
    assert inner.waited == 0
    assert isinstance(inner.outcome, TooLong)
    assert retry_after(inner.outcome) == pytest.approx(10)  # then the turn of the outer one is over for certain
    assert inner.outcome.reason == "is being asked in this very call: does a logging handler or a hook call the API?"
    assert [type(caller.outcome) for caller in (outer, *others)] == [Use] * 3
    assert herd.sent == [0, 1]


def test_after_an_interrupt_the_same_thread_fetches_again() -> None:
    herd = Herd(SILENCE, token("t"))
    interrupted = herd.start(caller="thread")
    herd.run(1)
    with pytest.raises(KeyboardInterrupt):
        interrupted.steps.throw(KeyboardInterrupt())
    assert access_token(herd.call(caller="thread")) == "t"
    assert herd.sent == [0, 1]


# By hand: stale is not expired


@pytest.fixture
def stale() -> Herd:
    """A herd whose token t1 has 30 of its 3600 seconds left; what comes next is up to the test."""
    herd = Herd(token("t1"))
    herd.call()
    herd.wait(3570)
    return herd


def test_while_one_renews_the_others_go_on(stale: Herd) -> None:
    stale.then(token("t2", takes=5))
    renews, *others = stale.crowd(10)
    stale.run(3574)
    others += stale.crowd(10)
    stale.wait(0)
    assert stale.credentials.known.ahead_after == stale.clock() + 1  # until then nobody looks whose turn it is
    stale.run()
    assert {(access_token(caller.outcome), caller.waited) for caller in others} == {("t1", 0)}
    assert (access_token(renews.outcome), renews.waited) == ("t2", 5)
    assert stale.sent == [0, 3570]


@pytest.mark.parametrize(
    ("fault", "pauses"),
    [
        (NO_ROUTE, [2, 4, 8, 16, 30, 30]),
        (REFUSAL, [10, 20, 40, 60, 60]),
        (SILENCE, [12, 14, 18]),  # 10 s of each for the request
        (response(503), [2, 4, 8]),
        (response(429), [2, 4, 8]),
        (response(429, Retry_After="1"), [2, 4, 8]),
        (response(404), [2, 4, 8]),
    ],
)
def test_a_renewal_ahead_that_fails_is_not_felt_and_tried_again_after_a_growing_pause(
    fault: Answer, pauses: list[int]
) -> None:
    herd = Herd(token("t1", 1000), fault)
    herd.call(leeway=300)
    herd.wait(700)
    while len(herd.sent) < len(pauses) + 2:
        assert access_token(herd.call(leeway=300)) == "t1"
        herd.wait(0.5)
    assert [later - sooner for sooner, later in pairwise(herd.sent[1:])] == pauses


def test_after_a_renewal_that_failed_the_next_may_succeed(stale: Herd) -> None:
    stale.then(NO_ROUTE, token("t2"), NO_ROUTE)
    assert access_token(stale.call()) == "t1"
    stale.wait(2)
    assert access_token(stale.call()) == "t2"
    assert stale.credentials.known == Known(stale.credentials.known.token)


def test_a_token_that_expires_while_its_renewal_fails_is_not_used(stale: Herd) -> None:
    stale.wait(25)
    stale.then(SILENCE, token("t2"))
    assert access_token(stale.call()) == "t2"


def test_an_expired_token_is_replaced_at_once_although_its_renewal_failed(stale: Herd) -> None:
    stale.wait(29)
    stale.then(NO_ROUTE, token("t2"))
    assert access_token(stale.call()) == "t1"
    stale.wait(1)
    assert access_token(stale.call(max_wait=0.5)) == "t2"
    assert stale.sent == [0, 3599, 3600]


def test_a_renewal_ahead_waits_for_nothing(stale: Herd) -> None:
    stale.endpoint.close(stale.clock() + 1.5)
    caller = stale.start()
    stale.run()
    assert (access_token(caller.outcome), caller.waited) == ("t1", 0)
    assert stale.sent == [0]
    assert 1.5 <= stale.credentials.known.ahead_after - stale.clock() < 3


def test_a_renewal_ahead_that_is_broken_off_spoils_nothing(stale: Herd) -> None:
    stale.then(SILENCE, token("t2"))
    renews = stale.start()
    goes_on = stale.start()
    stale.wait(1)
    assert (access_token(goes_on.outcome), goes_on.waited) == ("t1", 0)
    renews.break_off()
    stale.wait(0)  # a second has passed for which the other had left it to the first
    assert access_token(stale.call()) == "t2"


def test_a_call_within_a_renewal_ahead_uses_the_old_token() -> None:
    herd = Herd(token("t1", 90), token("t2", takes=5), token("t3"))
    herd.call()
    herd.wait(60)
    outer = herd.start(caller="thread")
    herd.wait(1)
    inner = herd.start(caller="thread")
    herd.wait(1)
    assert (access_token(inner.outcome), inner.waited) == ("t1", 0)
    outer.break_off()
    herd.wait(12)
    assert access_token(herd.call()) == "t3"  # it has put off nobody for long


ENDPOINT = f"token endpoint {CLIENT.token_endpoint}"


def test_what_the_log_says_of_the_life_of_a_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nexus_auth")
    herd = Herd(response(503), token("t0", 90), NO_ROUTE, more=tokens())
    herd.call()
    herd.wait(60)
    herd.call()
    herd.call("t0")
    herd.credentials.answered("t1", 401)  # of another call
    herd.credentials.replayed("t1", 200)
    herd.call("t1")
    herd.credentials.replayed("t2", 401)
    herd.wait(1)
    herd.call("t2")
    herd.credentials.replayed("t2", 401)  # as is known by now
    again, *others = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    obtained = f"DEBUG {ENDPOINT} gave client 'abc' a token for 3600.0 s"
    renewed = f"INFO {ENDPOINT}: renewed the token of client 'abc' after a 401"
    refused = "the API refuses the new token of client 'abc' too (401). Check base_url, and what this client may do."
    assert again.startswith(f"WARNING {ENDPOINT} is down (HTTP 503): the next try is in 0.")
    assert others == [
        f"DEBUG {ENDPOINT} gave client 'abc' a token for 90.0 s",
        f"WARNING {ENDPOINT} could not be reached (ConnectError: no route): the token of client 'abc', which is about "
        "to expire, is used on",
        *[obtained, renewed] * 2,
        f"WARNING {ENDPOINT}: {refused}",
        *[obtained, renewed],
    ]
    # For structured logs:
    fields = [vars(record) for record in caplog.records]
    assert {(each["client_id"], each["token_endpoint"]) for each in fields} == {("abc", CLIENT.token_endpoint)}
    assert 0.25 <= fields[0]["seconds"] == round(fields[0]["seconds"], 3) <= 0.5
    assert [each.get("seconds") for each in fields[1:]] == [90, None, 3600, None, 3600, None, None, 3600, None]


def test_what_is_waited_for_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nexus_auth")
    herd = Herd(token("t"))
    closed = "wants no token request for now (Retry-After); it is busy"
    herd.endpoint.close(herd.clock() + 0.98765, "it is busy")
    herd.endpoint.close(herd.clock() + 0.5, "of a wait that is over before")
    herd.start(max_wait=0.98765)
    herd.start()
    herd.run()
    assert [(record.levelname, record.getMessage(), vars(record)["seconds"]) for record in caplog.records[:2]] == [
        ("DEBUG", f"{ENDPOINT} {closed}: the next may go in 1.0 s", 0.988),
        ("DEBUG", f"{ENDPOINT} is being asked for another caller: the next may go in 1.0 s", 0.988),
    ]
    assert len(caplog.records) == 3  # with that of the token


def test_a_long_token_request_of_another_caller_is_logged_by_who_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nexus_auth")
    herd = Herd(token("t", takes=0.9), response(503), token("t2", takes=5))
    for refused in (None, "t"):
        herd.start(refused)
        herd.start(refused)
        herd.run()
    before, later = [record for record in caplog.records if "another caller" in record.getMessage()]
    assert (before.levelname, later.levelname) == ("DEBUG", "WARNING")
    assert before.getMessage().startswith(f"{ENDPOINT} is being asked for another caller: the next may go in 0.")
    assert later.getMessage().startswith(f"{ENDPOINT} is being asked for another caller: waited for 1.")


@pytest.mark.parametrize(("now", "left"), [(NOW, 600), (NOW + 599, 1), (NOW + 600, 0), (NOW + 601, 0)])
def test_the_seconds_that_are_left(now: float, left: float) -> None:
    credentials = Credentials(CLIENT, Endpoint(), clock=lambda: now)
    assert credentials.seconds_left() == 0
    credentials.known = Known(FRESH)
    assert credentials.seconds_left() == left


@pytest.mark.parametrize(("expires_in", "lifetime"), [(20, 10), (None, 1e6), (0, 1e6), ("soon", 1e6)])
def test_a_token_whose_lifetime_is_short_or_odd_is_not_fetched_for_every_call(expires_in: Any, lifetime: float) -> None:
    herd = Herd(more=tokens(expires_in))
    herd.call()
    herd.wait(lifetime - 0.1)
    assert access_token(herd.call()) == "t1"
    assert access_token(herd.call("t1")) == "t2"


# Over real sockets


def test_many_callers_at_once_cost_one_token_request_of_a_driver(driver: Driver, gated: GatedSandbox) -> None:
    client = driver.client(driver.auth(gated))
    calls = driver.in_background(driver.at_once, [client] * 30, url(gated))
    gated.arrived(1)
    gated.gate.set()
    assert statuses(calls.result()) == {200}
    assert (len(gated.token_requests), len(gated.requests)) == (1, 30)
    assert len({arrival.headers["Authorization"] for arrival in gated.requests}) == 1


def test_a_fresh_token_is_used_without_any_lock(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    driver.get(client, url(sandbox))
    with quota.LOCK:
        assert driver.in_background(driver.get, client, url(sandbox)).result(10).status == 200


def test_a_refusal_is_shared_and_each_caller_has_its_own_error(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, client_secret="wrong"))
    errors: list[Any] = driver.at_once([client] * 10, url(sandbox))
    assert {(type(error), error.error) for error in errors} == {(driver.door.TokenRequestError, "invalid_client")}
    assert len({id(error) for error in errors}) == 10
    assert len(sandbox.token_requests) == 1


def test_while_one_renews_the_others_go_on_of_a_driver(driver: Driver, gated: GatedSandbox) -> None:
    gated.gate.set()
    client = driver.client(driver.auth(gated))
    driver.get(client, url(gated))
    grow_old_in(gated, left=30)
    gated.gate.clear()
    calls = driver.in_background(driver.at_once, [client] * 5, url(gated))
    gated.wait_for(token_requests=2, requests=5)  # the first, and four of five
    gated.gate.set()
    assert statuses(calls.result()) == {200}
    tokens = [arrival.headers["Authorization"] for arrival in gated.requests]
    assert [token == tokens[0] for token in tokens] == [True] * 5 + [False]
    assert len(gated.token_requests) == 2


def test_each_client_renews_its_token_by_its_own_leeway(driver: Driver, sandbox: NexusSandbox) -> None:
    late, early = driver.ready_made(sandbox, leeway=20), driver.ready_made(sandbox, leeway=40)
    driver.get(late, "/customer")
    grow_old_in(sandbox, left=30)
    driver.get(late, "/customer")
    assert len(sandbox.token_requests) == 1
    driver.get(early, "/customer")
    assert len(sandbox.token_requests) == 2


def test_a_token_that_gets_old_between_two_calls_is_renewed(driver: Driver) -> None:
    with NexusSandbox(expires_in=1) as sandbox:
        sandbox.answer("/customer", times=None, json={})  # whatever the token: no 401 has it renewed
        client = driver.ready_made(sandbox)
        until = time.monotonic() + 10
        while len(sandbox.token_requests) < 2 and time.monotonic() < until:
            driver.get(client, "/customer")
        first, *_, last = (arrival.headers["Authorization"] for arrival in sandbox.requests)
        assert first != last


def test_a_renewal_ahead_that_fails_is_not_felt_until_the_token_expires(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    driver.get(client, url(sandbox))
    grow_old_in(sandbox, left=30)
    sandbox.fail_token_requests(drop=True)
    assert statuses(driver.at_once([client] * 5, url(sandbox))) == {200}
    assert len({arrival.headers["Authorization"] for arrival in sandbox.requests}) == 1
    assert len(sandbox.token_requests) == 2
    grow_old_in(sandbox, left=0)
    assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 3
