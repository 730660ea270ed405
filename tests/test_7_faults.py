"""7. Faults of the token endpoint: what is tried again and when, Retry-After, and how long a failure is remembered."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Driver, GatedSandbox, Log, outcome, url
from herd import (
    CLIENT,
    NO_ROUTE,
    NOW,
    REFUSAL,
    SILENCE,
    WALL_CLOCK,
    Answer,
    Herd,
    a_call,
    access_token,
    limits,
    response,
    retry_after,
    token,
    tokens,
)

from nexus_auth.grant import Fault, FaultKind, Pause, judge, pause_after
from nexus_auth.known import Call, Failure, Fetch, Known, Raise, TooLong, Use, decide, failed
from nexus_auth.steps import Failed, Response
from nexus_auth.testing import NexusSandbox
from nexus_auth.token import Token
from nexus_auth.value import replace

REFUSED, ODD_ANSWER, BUSY, UNAVAILABLE, UNREACHABLE = FaultKind


def a_fault(kind: FaultKind = UNREACHABLE, **fields: Any) -> Fault:
    return Fault(kind, "", "", **fields)


def verdict(answer: Response | Failed) -> Fault:
    fault = judge(answer, CLIENT, WALL_CLOCK)
    assert isinstance(fault, Fault)
    return fault


# What is wrong


ADVICE = {
    BUSY: "Try again later.",
    REFUSED: "Check client_id, client_secret and scope: are they of this environment?",
    UNREACHABLE: "Check network, proxy and TLS settings; those of a session= or client= that you lend apply.",
}


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (response(429), BUSY, "is busy"),
        (response(429, {"error": "invalid_client"}), BUSY, "is busy"),
        (response(500), UNAVAILABLE, "is down (HTTP 500)"),
        (response(503, {"error": "odd", "error_description": "why"}), UNAVAILABLE, "is down: odd, why (HTTP 503)"),
        (response(599), UNAVAILABLE, "is down"),
        (response(499), ODD_ANSWER, "gave neither a token nor an OAuth error"),
        (response(428), ODD_ANSWER, "gave neither a token nor an OAuth error"),
        (response(400, {"error": "invalid_client"}), REFUSED, "refused client 'abc': invalid_client (HTTP 400)"),
        (response(401, {"error": "odd", "error_description": "why"}), REFUSED, "refused client 'abc': odd, why"),
        (response(302, Location="https://else.example/"), ODD_ANSWER, "redirected to https://else.example/,"),
        (response(300, Location="/else"), ODD_ANSWER, "redirected to /else,"),
        (NO_ROUTE, UNREACHABLE, "could not be reached (ConnectError: no route)"),
        (SILENCE, UNREACHABLE, "could not be reached (ReadTimeout: there was no answer)"),
    ],
)
def test_what_is_wrong(answer: Answer, kind: FaultKind, reason: str) -> None:
    fault = verdict(answer.answer)
    assert fault.kind is kind
    assert fault.reason.startswith(reason)
    assert fault.advice == ADVICE.get(kind, "Check token_endpoint; if it is right, try again later.")


def test_a_fault_keeps_what_an_error_tells() -> None:
    document = {"error": "invalid_scope", "error_description": "no such\nscope"}
    refusal = verdict(response(400, document, Retry_After="7").answer)
    assert (refusal.status_code, refusal.error, refusal.error_description) == (400, "invalid_scope", "no such scope")
    assert (refusal.retry_after, refusal.library_error, refusal.timed_out) == (7, None, False)
    silence = verdict(SILENCE.answer)
    assert (silence.library_error, silence.timed_out, silence.status_code) == ("ReadTimeout", True, None)
    assert not verdict(NO_ROUTE.answer).timed_out


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone that is not that of Retry-After."""
    set_zone = getattr(time, "tzset", lambda: None)  # Windows has none
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XYZ-07:00")
        set_zone()
        yield
    set_zone()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7), ("0007", 7), ("0", 0), ("3600", 3600), ("3601", 3600), ("9" * 400, 3600),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 7),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 7),  # obsolete, as is the next; a recipient must take both
        ("Sun Nov  6 08:49:37 1994", 7),
        ("Sun, 06 Nov 1994 09:49:37 +0100", 7),
        ("Sun, 06 Nov 1994 08:49:23 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("", None), (" ", None), ("-5", None), ("soon", None), ("1.5", None), ("1e9", None), ("+7", None),
        ("0x10", None), ("7 s", None), ("\u00b2", None), ("7, 8", None), ("Sun, 06 Nov 1994", None),
        ("08:49:37", None), ("\udcff", None), ("GMT", None), ("Sun, 06 Nov 99999999 08:49:37 GMT", None),
        (f"Sun, 06 Nov {9**30} 08:49:37 GMT", None),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "replace").decode(),
)  # fmt: skip
@pytest.mark.usefixtures("far_from_greenwich")
def test_what_retry_after_asks_for(value: str, seconds: float | None) -> None:
    assert verdict(Response(503, {"Retry-After": value}, b"")).retry_after == seconds


def test_without_retry_after_nothing_is_asked_for() -> None:
    assert verdict(response(503).answer).retry_after is None


# What is tried again


@pytest.mark.parametrize(
    ("fault", "tries", "busy_answers", "pause"),
    [
        (a_fault(UNREACHABLE), 1, 0, Pause(0.25, 0.25)),
        (a_fault(UNREACHABLE), 2, 0, Pause(0.5, 0.5)),
        (a_fault(UNREACHABLE), 3, 0, Pause(1, 1)),
        (a_fault(UNREACHABLE), 4, 0, None),
        (a_fault(UNAVAILABLE), 3, 5, Pause(1, 1)),
        (a_fault(UNAVAILABLE), 4, 0, None),
        (a_fault(UNAVAILABLE, retry_after=60), 1, 0, Pause(0.25, 0.25)),  # the endpoint is closed besides
        (a_fault(UNAVAILABLE, retry_after=60), 4, 0, None),
        (a_fault(REFUSED), 1, 0, None),
        (a_fault(REFUSED, retry_after=1), 0, 0, None),
        (a_fault(ODD_ANSWER), 1, 0, None),
        (a_fault(BUSY), 0, 1, Pause(1, 0.1)),
        (a_fault(BUSY), 0, 2, Pause(2, 0.2)),
        (a_fault(BUSY), 3, 4, Pause(8, 0.8)),
        (a_fault(BUSY), 0, 5, Pause(15, 1.5)),
        (a_fault(BUSY), 4, 99, Pause(15, 1.5)),  # it uses up no try
        (a_fault(BUSY, retry_after=0), 0, 1, Pause(1, 0.1)),
        (a_fault(BUSY, retry_after=20), 4, 7, Pause(20, 3)),
        (a_fault(BUSY, retry_after=3600), 0, 0, Pause(3600, 361)),
    ],
)
def test_the_pause_after_a_fault(fault: Fault, tries: int, busy_answers: int, pause: Pause | None) -> None:
    found = pause_after(fault, tries, busy_answers)
    assert (found is None) is (pause is None)
    if found and pause:
        assert (found.least, found.jitter) == pytest.approx((pause.least, pause.jitter))


@pytest.mark.parametrize(("left", "most"), [(100, 26), (26, 26), (23, 23), (20.5, 20.5), (20, 20), (5, 20), (-5, 20)])
def test_jitter_takes_no_more_than_is_left(left: float, most: float) -> None:
    random.seed(1)
    pauses = [Pause(20, 6).within(left) for _ in range(500)]
    assert 20 <= min(pauses) <= max(pauses) <= most
    assert max(pauses) - min(pauses) >= 0.9 * (most - 20)
    assert len(set(pauses)) > 400 or most == 20  # no two callers come together


# What is remembered


@pytest.mark.parametrize(
    ("faults", "memories"),
    [
        ([UNREACHABLE] * 7, [2, 4, 8, 16, 30, 30, 30]),
        ([REFUSED] * 5, [10, 20, 40, 60, 60]),
        ([UNAVAILABLE, BUSY, ODD_ANSWER, UNREACHABLE], [2, 4, 8, 16]),
        ([UNREACHABLE, REFUSED, UNREACHABLE], [2, 10, 20]),
        ([REFUSED, REFUSED, UNREACHABLE, UNREACHABLE, REFUSED], [10, 20, 30, 30, 60]),
    ],
)
def test_a_failure_is_remembered_for_longer_each_time(faults: list[FaultKind], memories: list[float]) -> None:
    known, found = Known(), []
    for number, kind in enumerate(faults):
        known = failed(known, a_fault(kind), a_call(), NOW + number)
        assert known.failure is not None
        assert known.failure.until == known.ahead_after == NOW + number + known.failure.memory
        found.append(known.failure.memory)
    assert found == memories


def test_a_failure_is_remembered_with_the_limits_of_the_one_who_met_it() -> None:
    fault, call, token_ = a_fault(), a_call(spent=15), Token("t", NOW, NOW, NOW)
    known = Known(token_)
    assert failed(known, fault, call, NOW) == Known(token_, Failure(fault, 10, 60, NOW, 2), NOW + 2)
    ahead = failed(known, fault, call, NOW, budget=0.0).failure
    late = failed(known, fault, call, NOW, out_of_time=True).failure
    assert ahead == Failure(fault, 10, 0, NOW, 2)
    assert late == Failure(fault, 10, 60, NOW, 2, out_of_time=True)


@pytest.mark.parametrize(
    ("kind", "call", "now", "holds"),
    [
        (UNREACHABLE, Call(limits(60, 10, 75)), NOW, True),
        (UNREACHABLE, Call(limits(60, 10, 75)), NOW + 1.9, True),
        (UNREACHABLE, Call(limits(60, 10, 75)), NOW + 2, False),
        (UNREACHABLE, Call(limits(0, 5, 60)), NOW, True),
        (UNREACHABLE, Call(limits(60, 10.1, 75)), NOW, False),  # who has more patience may fare better
        (UNREACHABLE, Call(limits(60, 10, 75.1)), NOW, False),
        (UNREACHABLE, Call(limits(60, 10, 100), spent=30), NOW, True),
        (REFUSED, Call(limits(60, 99, 999)), NOW, True),
        (REFUSED, Call(limits(60, 99, 999)), NOW + 2, False),
        # Who was waiting when it came need not ask again.
        (UNREACHABLE, Call(limits(60, 10, 75), begun_at=NOW), NOW + 9, True),
        (UNREACHABLE, Call(limits(60, 10, 75), begun_at=NOW - 1), NOW + 9, True),
        (UNREACHABLE, Call(limits(60, 10, 75), begun_at=NOW + 0.1), NOW + 9, False),
        (UNREACHABLE, Call(limits(60, 10, 76), begun_at=NOW), NOW + 9, False),
        (REFUSED, Call(limits(60, 99, 999), begun_at=NOW), NOW + 9, True),
    ],
)
def test_for_whom_a_failure_holds(kind: FaultKind, call: Call, now: float, holds: bool) -> None:
    failure = Failure(a_fault(kind), timeout=10, max_wait=75, met_at=NOW, memory=2)
    assert failure.holds_for(call, now) is holds
    assert decide(Known(failure=failure), now, call) == (Raise(failure) if holds else Fetch())


# By hand: tries


DOWN = response(503)
FAULTS = {"no route": NO_ROUTE, "silence": SILENCE, "500": response(500), "503": DOWN, "504": response(504)}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_fault_is_tried_again(name: str, times: int) -> None:
    herd = Herd(*[FAULTS[name]] * times, token("t"))
    assert access_token(herd.call()) == "t"
    assert len(herd.sent) == times + 1
    takes = min(FAULTS[name].takes, 10)
    pauses = [later - sooner - takes for sooner, later in zip(herd.sent, herd.sent[1:], strict=False)]
    assert all(0.249 * 2**number < pause < 0.501 * 2**number for number, pause in enumerate(pauses))


def test_faults_of_all_kinds_share_the_four_tries() -> None:
    herd = Herd(NO_ROUTE, DOWN, SILENCE, DOWN, token("t"))
    decision = herd.call()
    assert isinstance(decision, Raise)
    assert (decision.failure.fault.status_code, decision.failure.out_of_time) == (503, False)
    assert len(herd.sent) == 4


@pytest.mark.parametrize("answer", [REFUSAL, response(404), response(200, {}), response(302, Location="/")])
def test_what_is_no_fault_of_the_moment_is_not_tried_again(answer: Answer) -> None:
    herd = Herd(answer, token("t"))
    assert isinstance(herd.call(), Raise)
    assert herd.sent == [0]


def test_a_429_uses_up_no_try() -> None:
    """It waits 1 s without Retry-After, and each time twice as long, up to 15 s."""
    busy = response(429)
    retry_after_two = response(429, Retry_After="2")  # it has no part in the doubling
    herd = Herd(busy, retry_after_two, *[busy] * 5, NO_ROUTE, NO_ROUTE, busy, NO_ROUTE, token("t"))
    assert access_token(herd.call()) == "t"
    pauses = [later - sooner for sooner, later in zip(herd.sent, herd.sent[1:], strict=False)]
    least = [1, 2, 2, 4, 8, 15, 15, 0.25, 0.5, 15, 1]
    assert all(pause >= seconds - 1e-6 for pause, seconds in zip(pauses, least, strict=True))
    assert all(pause <= 2 * seconds for pause, seconds in zip(pauses, least, strict=True))
    assert pauses[6] < 16.6


def test_a_429_is_tried_again_until_max_wait_is_over() -> None:
    herd = Herd(response(429, Retry_After="5"))
    caller = herd.start()
    herd.run()
    assert isinstance(caller.outcome, TooLong)
    assert 70 - 6.6 < caller.ended_at <= 75
    assert 11 <= len(herd.sent) <= 15
    assert retry_after(caller.outcome) == pytest.approx(5, abs=0.01)


def test_a_back_off_that_max_wait_would_not_outlast_is_not_waited_for() -> None:
    herd = Herd(Answer(NO_ROUTE.answer, takes=0.2))
    caller = herd.start(max_wait=0.3)
    herd.run()
    assert isinstance(caller.outcome, Raise)
    assert caller.outcome.failure.out_of_time
    assert caller.waited == pytest.approx(0.2)


def test_who_has_little_time_left_tries_again_within_it() -> None:
    for _ in range(20):
        herd = Herd(NO_ROUTE, token("t"))
        assert access_token(herd.call(max_wait=0.3)) == "t"
        assert herd.sent[1] <= 0.3


def test_no_call_is_held_up_longer_than_max_wait_and_one_timeout() -> None:
    scripts = [SILENCE, NO_ROUTE, DOWN, response(429), response(429, Retry_After="9"), response(503, Retry_After="9")]
    chance = random.Random(7)
    for _ in range(100):
        herd = Herd(*chance.choices(scripts, k=8), token("t"))
        max_wait, timeout = chance.uniform(0, 60), chance.choice([1, 10])
        callers = herd.crowd(3, max_wait=max_wait, timeout=timeout)
        herd.run()
        assert max(caller.waited for caller in callers) <= max_wait + timeout + 1e-6
        assert max(herd.sent) <= max_wait + 1e-6


# By hand: Retry-After


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(status: int) -> None:
    herd = Herd(response(status, Retry_After="20"), token("t"))
    assert access_token(herd.call()) == "t"
    assert 20 <= herd.sent[1] <= 23


def test_after_a_date_nobody_comes_before_it() -> None:
    herd = Herd(response(503, Retry_After="Sun, 06 Nov 1994 08:49:50 GMT"), token("t"))
    herd.call()
    assert 20 <= herd.sent[1] <= 23


def test_the_endpoint_is_closed_for_less_than_a_second_too() -> None:
    herd = Herd(token("t"))
    herd.endpoint.close(herd.clock() + 0.5)
    herd.call()
    assert 0.5 <= herd.sent[0] <= 1.6


def test_what_takes_just_as_long_as_max_wait_is_waited_for() -> None:
    herd = Herd(token("t"))
    herd.endpoint.close(herd.clock() + 5)
    assert access_token(herd.call(max_wait=5)) == "t"
    assert herd.sent == [5]
    herd = Herd(response(429, Retry_After="5"), token("t"))
    assert isinstance(herd.call(max_wait=5), TooLong)  # but no further token request starts then
    assert herd.sent == [0]


def test_callers_come_back_at_different_moments() -> None:
    sent = []
    for _ in range(50):
        herd = Herd(response(429, Retry_After="20"), token("t"))
        herd.call()
        sent.append(herd.sent[1])
    assert len(set(sent)) > 40
    assert min(sent) < 20.5
    assert max(sent) > 22.5


def test_retry_after_closes_the_endpoint_for_everybody() -> None:
    """Whichever API client asks, from a thread or a loop."""
    herd = Herd(response(429, Retry_After="40"), token("t"))
    another = herd.client(replace(CLIENT, client_id="another"))
    first = herd.start()
    herd.run(10)
    callers = [herd.start(), herd.start(loop=Loop()), herd.start(credentials=another)]
    hasty = [herd.start(max_wait=20), herd.start(max_wait=20, credentials=another), herd.start(max_wait=0)]
    herd.run(10)
    assert [retry_after(caller.outcome) for caller in hasty] == pytest.approx([30, 30, 30])
    herd.run()
    assert {access_token(caller.outcome) for caller in (first, *callers)} == {"t"}
    assert min(herd.sent[1:]) >= 40
    assert max(herd.sent) <= 45


class Loop:
    """An event loop."""


def test_what_is_left_of_it_counts_down_across_calls() -> None:
    herd = Herd(response(429, Retry_After="100"), token("t"))
    waits = []
    while not isinstance(decision := herd.call(), Use):
        waits.append(retry_after(decision))
        herd.wait(10)
    assert waits == pytest.approx([100, 90, 80])  # then it is no longer than max_wait
    assert len(herd.sent) == 2
    assert 100 <= herd.sent[1] <= 110


def test_a_loop_of_hasty_callers_does_not_ask_before_it_is_over() -> None:
    herd = Herd(response(429, Retry_After="1000"), token("t"))
    while herd.now < 1000:
        assert isinstance(herd.call(max_wait=5), TooLong) or herd.now >= 1000
        herd.wait(7)
    assert len(herd.sent) <= 2
    assert herd.credentials.known.failure is None  # a TokenWaitError is never remembered


def test_a_renewal_ahead_does_not_ask_either() -> None:
    herd = Herd(token("t1", 1000), response(503, Retry_After="200"), more=tokens())
    herd.call(leeway=400)
    herd.wait(600)
    while herd.now < 990:
        assert access_token(herd.call(leeway=400)) in ("t1", "t2")
        herd.wait(1)
    assert herd.sent[:2] == [0, 600]
    assert 800 <= herd.sent[2] <= 822


def test_after_a_503_the_longer_of_both_waits_counts() -> None:
    herd = Herd(NO_ROUTE, DOWN, response(503, Retry_After="1"), token("t"))
    herd.call()
    assert herd.sent[3] - herd.sent[2] >= 1
    herd = Herd(NO_ROUTE, DOWN, response(503, Retry_After="0"), token("t"))
    herd.call()
    assert herd.sent[3] - herd.sent[2] >= 1


def test_a_flight_that_pauses_learns_that_the_endpoint_is_closed_meanwhile() -> None:
    herd = Herd(response(429), response(503, Retry_After="30"), token("t"))
    first, second = herd.start(), herd.start(loop=Loop())
    herd.run()
    assert access_token(first.outcome) == access_token(second.outcome) == "t"
    assert len(herd.sent) == 3
    assert 30 <= herd.sent[2] <= 34


@pytest.mark.parametrize(("value", "seconds"), [("76", 76), ("86400", 3600), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600)])
def test_what_is_longer_than_max_wait_is_said_at_once(value: str, seconds: float, log: Log) -> None:
    herd = Herd(response(429, Retry_After=value))
    caller = herd.start()
    herd.run()
    assert (caller.waited, len(herd.sent)) == (0, 1)
    assert isinstance(caller.outcome, TooLong)
    assert retry_after(caller.outcome) == pytest.approx(seconds)
    assert log() == []  # no next try is promised


def test_what_is_left_of_max_wait_counts() -> None:
    herd = Herd(response(429, Retry_After="40"))
    caller = herd.start()
    herd.run()
    assert isinstance(caller.outcome, TooLong)
    assert 40 <= caller.waited <= 45
    assert len(herd.sent) == 2


def test_who_has_more_patience_waits_for_what_another_was_told_to_be_too_long() -> None:
    herd = Herd(response(429, Retry_After="80"), token("t"))
    assert isinstance(herd.call(), TooLong)
    assert access_token(herd.call(max_wait=100)) == "t"


# By hand: a failure is remembered


@pytest.mark.parametrize(("fault", "memory"), [(NO_ROUTE, 2), (response(404), 2), (REFUSAL, 10)])
def test_a_failure_is_remembered_for_a_moment(fault: Answer, memory: float) -> None:
    herd = Herd(fault)
    first = herd.call()
    assert isinstance(first, Raise)
    asked = len(herd.sent)
    herd.then(token("t"))
    herd.wait(memory - 0.1)
    caller = herd.start()
    herd.run()
    assert (caller.outcome, caller.waited, len(herd.sent)) == (first, 0, asked)
    herd.wait(0.11)
    assert access_token(herd.call()) == "t"


@pytest.mark.parametrize(
    ("fault", "tries", "rests"),
    [(NO_ROUTE, 4, [2, 4, 8, 16, 30, 30]), (REFUSAL, 1, [10, 20, 40, 60, 60])],
    ids=["down", "refused"],
)
def test_a_loop_over_a_broken_endpoint_fails_fast_and_asks_ever_more_rarely(
    fault: Answer, tries: int, rests: list[int]
) -> None:
    herd = Herd(fault)
    for number, rest in enumerate(rests, 1):
        first = herd.call()
        assert isinstance(first, Raise)
        for _ in range(2 * rest):
            caller = herd.start()
            herd.wait(0.5)
            assert (caller.outcome, caller.waited) == (first, 0)
        assert len(herd.sent) == number * tries
        herd.wait(0.01)


def test_a_success_ends_the_growth() -> None:
    herd = Herd(REFUSAL, REFUSAL, token("t", lifetime=5), REFUSAL)
    memories = []
    for _ in range(4):
        decision = herd.call()
        memories.append(decision.failure.memory if isinstance(decision, Raise) else None)
        herd.wait(20)
    assert memories == [10, 20, None, 10]


def test_a_refusal_holds_for_all_callers_of_its_client_and_for_no_other() -> None:
    herd = Herd(REFUSAL, token("t"))
    another = herd.client(replace(CLIENT, client_id="another"))
    assert isinstance(herd.call(), Raise)
    assert isinstance(herd.call(timeout=100, max_wait=1000), Raise)
    assert access_token(herd.call(credentials=another)) == "t"


def test_another_failure_holds_for_those_with_no_more_patience() -> None:
    herd = Herd(*[NO_ROUTE] * 4, token("t"))
    assert isinstance(herd.call(timeout=5, max_wait=30), Raise)
    assert isinstance(herd.call(timeout=5, max_wait=30), Raise)
    assert isinstance(herd.call(timeout=1, max_wait=0), Raise)
    assert len(herd.sent) == 4
    assert access_token(herd.call(timeout=6, max_wait=30)) == "t"


def test_a_failure_of_a_renewal_ahead_holds_for_nobody_that_would_wait() -> None:
    herd = Herd(token("t1", 100), DOWN, token("t2"))
    herd.call()
    herd.wait(99)
    assert access_token(herd.call()) == "t1"
    herd.wait(1)
    assert access_token(herd.call(max_wait=0.5)) == "t2"


def test_broken_off_nothing_is_remembered() -> None:
    herd = Herd(SILENCE, token("t"))
    broken_off = herd.start()
    herd.run(1)
    broken_off.break_off()
    assert herd.credentials.known == Known()
    assert access_token(herd.call()) == "t"


def test_with_little_patience_a_failure_is_remembered_as_well() -> None:
    herd = Herd(Answer(NO_ROUTE.answer, takes=1))
    callers = herd.crowd(100, max_wait=2.5)
    herd.run()
    callers += herd.crowd(100, max_wait=2.5)
    herd.run()
    assert {type(caller.outcome) for caller in callers} <= {Raise, TooLong}
    assert len(herd.sent) == 2


# What is logged


def test_a_retry_is_a_warning(log: Log) -> None:
    herd = Herd(DOWN, NO_ROUTE, response(429, Retry_After="20"), token("t"))
    herd.call()
    *warnings, (level, _) = log()
    assert level == "DEBUG"  # for the token
    assert [level for level, _ in warnings] == ["WARNING"] * 3
    reasons = ["is down (HTTP 503)", "could not be reached (ConnectError: no route)", "is busy"]
    for number, reason in enumerate(reasons):
        pause = herd.sent[number + 1] - herd.sent[number]
        assert warnings[number][1].startswith(f"token endpoint {CLIENT.token_endpoint} {reason}")
        assert warnings[number][1].endswith(f": the next try is in {pause:.1f} s")


def test_a_wait_for_retry_after_is_a_warning_once(log: Log) -> None:
    herd = Herd(token("t"))
    herd.endpoint.close(herd.clock() + 20)
    herd.call()
    (level, message), _ = log()
    assert level == "WARNING"
    assert "wants no token request for now (Retry-After): the next may go in 2" in message


# Over real sockets


@pytest.mark.usefixtures("quick_retries")
def test_faults_are_tried_again(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.fail_token_requests(drop=True)
    sandbox.fail_token_requests(status=503)
    sandbox.fail_token_requests(2, status=429)
    sandbox.fail_token_requests(status=500)
    assert driver.get(driver.client(driver.auth(sandbox)), url(sandbox)).status == 200
    assert (len(sandbox.token_requests), len(sandbox.requests)) == (6, 1)


def test_retry_after_is_obeyed_by_all_drivers(doors: list[Driver]) -> None:
    """In seconds and as a date, at the same time, since it takes its time."""
    with contextlib.ExitStack() as stack:
        date = int(time.time()) + 1
        calls, sandboxes = [], []
        values: tuple[int | str, ...] = 1, email.utils.formatdate(date, usegmt=True)
        for driver, value in itertools.product(doors, values):
            sandbox = stack.enter_context(NexusSandbox())
            sandbox.fail_token_requests(status=429, retry_after=value)
            client = driver.client(driver.auth(sandbox))
            calls.append(driver.in_background(functools.partial(driver.get, client, url(sandbox))))
            sandboxes.append((sandbox, value))
        assert {call.result().status for call in calls} == {200}
        for sandbox, value in sandboxes:
            first, second = [arrival.time for arrival in sandbox.token_requests]
            assert second - first >= (1 if value == 1 else 0)
            assert value == 1 or time.time() - time.monotonic() + second >= date - 0.05


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}], ids=["down", "drop"])
def test_after_four_tries_a_call_fails(driver: Driver, sandbox: NexusSandbox, fault: dict[str, Any]) -> None:
    sandbox.fail_token_requests(None, **fault)
    client = driver.client(driver.auth(sandbox))
    errors = [outcome(lambda: driver.get(client, url(sandbox))) for _ in range(2)]
    assert [isinstance(error, driver.library_error) for error in errors] == [True, True]
    assert [isinstance(error, driver.door.TokenRequestError) for error in errors] == ["status" in fault] * 2
    assert errors[0] is not errors[1]
    assert len(sandbox.token_requests) == 4


@pytest.mark.usefixtures("quick_retries")
def test_callers_of_an_endpoint_that_never_answers_are_all_told(driver: Driver, gated: GatedSandbox) -> None:
    client = driver.client(driver.auth(gated, timeout=0.05))
    errors = driver.at_once([client] * 30, url(gated))
    assert [error for error in errors if not isinstance(error, driver.timeout_error)] == []
    assert len(gated.token_requests) <= 4


def test_a_loop_with_a_wrong_secret_fails_fast(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, client_secret="wrong"))
    errors: list[Any] = [outcome(lambda: driver.get(client, url(sandbox))) for _ in range(50)]
    assert {(type(error), error.error) for error in errors} == {(driver.door.TokenRequestError, "invalid_client")}
    assert len({id(error) for error in errors}) == 50
    assert len(sandbox.token_requests) == 1


def test_what_would_take_too_long_is_said_at_once(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, max_wait=5))
    sandbox.fail_token_requests(status=429, retry_after=30)
    waits = []
    for _ in range(3):
        with pytest.raises(driver.library_error) as raised:
            driver.get(client, url(sandbox))
        error: Any = raised.value
        assert isinstance(error, driver.door.TokenWaitError)
        waits.append(error.retry_after)
        time.sleep(0.002)  # it counts milliseconds
    assert 25 < waits[2] < waits[1] < waits[0] <= 30
    assert len(sandbox.token_requests) == 1
