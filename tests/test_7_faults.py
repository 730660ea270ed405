"""7. Faults of the token endpoint: what is tried again and when, Retry-After, and how long a failure is remembered."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from conftest import Driver, Log, outcome, url
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
    a_token,
    access_token,
    limits,
    response,
    retry_after,
    token,
)

from nexus_auth.grant import Fault, FaultKind, Pause, judge, pause_after
from nexus_auth.known import Call, Failure, Fetch, Known, Raise, TooLong, Use, decide, failed
from nexus_auth.steps import Failed, Response
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

REFUSED, ODD_ANSWER, BUSY, UNAVAILABLE, UNREACHABLE = FaultKind


def a_fault(kind: FaultKind = UNREACHABLE, **fields: Any) -> Fault:
    return Fault(kind, "", "", **fields)


def verdict(answer: Response | Failed) -> Fault:
    fault = judge(answer, CLIENT, WALL_CLOCK)
    assert isinstance(fault, Fault)
    return fault


# What is wrong: no answer, or one that may be another in a moment


ADVICE = {
    BUSY: "Try again later.",
    UNAVAILABLE: "Check token_endpoint; if it is right, try again later.",
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
        (NO_ROUTE, UNREACHABLE, "could not be reached (ConnectError: no route)"),
        (Answer(Failed("ConnectError", "no\nroute")), UNREACHABLE, "could not be reached (ConnectError: no route)"),
        (SILENCE, UNREACHABLE, "could not be reached (ReadTimeout: there was no answer)"),
    ],
)
def test_what_is_wrong(answer: Answer, kind: FaultKind, reason: str) -> None:
    fault = verdict(answer.answer)
    assert (fault.kind, fault.advice) == (kind, ADVICE[kind])
    assert fault.reason.startswith(reason)


def test_a_fault_without_an_answer_names_the_error_of_the_library() -> None:
    silence, no_route = verdict(SILENCE.answer), verdict(NO_ROUTE.answer)
    assert (silence.library_error, silence.timed_out, silence.status_code) == ("ReadTimeout", True, None)
    assert (no_route.library_error, no_route.timed_out) == ("ConnectError", False)


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
        (a_fault(UNAVAILABLE, retry_after=1), 3, 0, Pause(1, 1)),  # the endpoint is closed besides
        (a_fault(UNAVAILABLE, retry_after=1), 2, 0, Pause.asked_for(1)),
        (a_fault(UNAVAILABLE, retry_after=60), 1, 0, Pause.asked_for(60)),
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
    fault, call, token_ = a_fault(), a_call(spent=15), a_token("t", NOW, NOW, NOW)
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


def pauses(herd: Herd) -> list[float]:
    """Return the seconds from each token request to the next."""
    return [later - sooner for sooner, later in pairwise(herd.sent)]


def test_faults_of_all_kinds_share_four_tries() -> None:
    herd = Herd(NO_ROUTE, DOWN, SILENCE, token("t"))
    assert access_token(herd.call()) == "t"
    no_route, down, silence = pauses(herd)
    assert 0.25 <= no_route <= 0.5 <= down <= 1 <= silence - 10 <= 2
    herd = Herd(NO_ROUTE, DOWN, SILENCE, DOWN, token("t"))
    decision = herd.call()
    assert isinstance(decision, Raise)
    assert (decision.failure.fault.status_code, decision.failure.out_of_time) == (503, False)
    assert len(herd.sent) == 4


def test_a_429_uses_up_no_try() -> None:
    """It waits 1 s without Retry-After, and each time twice as long, up to 15 s."""
    busy = response(429)
    retry_after_two = response(429, Retry_After="2")  # it has no part in the doubling
    herd = Herd(busy, retry_after_two, *[busy] * 5, NO_ROUTE, NO_ROUTE, busy, NO_ROUTE, token("t"))
    assert access_token(herd.call()) == "t"
    least = [1, 2, 2, 4, 8, 15, 15, 0.25, 0.5, 15, 1]
    assert all(seconds - 1e-6 <= pause <= 2 * seconds for pause, seconds in zip(pauses(herd), least, strict=True))
    assert pauses(herd)[6] < 16.6


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
    assert herd.call(max_wait=0.3) == caller.outcome  # it is remembered as well
    assert len(herd.sent) == 1


def test_who_has_little_time_left_tries_again_within_it() -> None:
    for _ in range(20):
        herd = Herd(NO_ROUTE, token("t"))
        assert access_token(herd.call(max_wait=0.3)) == "t"
        assert herd.sent[1] <= 0.3


# By hand: Retry-After


class Loop:
    """An event loop."""


@pytest.mark.parametrize(("status", "value"), [(429, "20"), (503, "20"), (503, "Sun, 06 Nov 1994 08:49:50 GMT")])
def test_retry_after_is_obeyed_and_callers_come_back_at_different_moments(status: int, value: str) -> None:
    sent = []
    for _ in range(20):
        herd = Herd(response(status, Retry_After=value), token("t"))
        assert access_token(herd.call()) == "t"
        sent.append(herd.sent[1])
    assert 20 <= min(sent) < max(sent) - 1
    assert max(sent) <= 23


def test_what_takes_just_as_long_as_max_wait_is_waited_for() -> None:
    herd = Herd(token("t"))
    herd.endpoint.close(herd.clock() + 0.5)
    assert access_token(herd.call(max_wait=0.5)) == "t"
    assert herd.sent == [0.5]
    herd = Herd(response(429, Retry_After="5"), token("t"))
    assert isinstance(herd.call(max_wait=5), TooLong)  # but no further token request starts then
    assert herd.sent == [0]


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


def test_retry_after_of_an_endpoint_that_is_down_is_logged_as_the_one_wait_that_it_is(log: Log) -> None:
    herd = Herd(response(503, Retry_After="5"), token("t"))
    assert access_token(herd.call()) == "t"
    (warning,) = [message for level, message in log() if level == "WARNING"]
    assert re.search(r"is down \(HTTP 503\): the next try is in [56]\.\d s", warning)


@pytest.mark.parametrize("status", [429, 503])
def test_what_is_longer_than_max_wait_is_said_at_once(log: Log, status: int) -> None:
    herd = Herd(response(status, Retry_After="76"))
    caller = herd.start()
    herd.run()
    assert (caller.waited, len(herd.sent)) == (0, 1)
    assert isinstance(caller.outcome, TooLong)
    assert retry_after(caller.outcome) == pytest.approx(76)
    assert log() == []  # no next try is promised


def test_what_is_left_of_it_counts_down_across_calls() -> None:
    herd = Herd(response(429, Retry_After="100"), token("t"))
    waits = []
    while not isinstance(decision := herd.call(), Use):
        waits.append(retry_after(decision))
        assert herd.credentials.known.failure is None  # it is never remembered
        herd.wait(10)
    assert waits == pytest.approx([100, 90, 80])  # then it is no longer than max_wait
    assert len(herd.sent) == 2
    assert 100 <= herd.sent[1] <= 110


@pytest.mark.parametrize(("closed_for", "least"), [(1, 15), (30, 30)])
def test_of_two_waits_the_longer_counts(closed_for: float, least: float) -> None:
    """That of a flight which pauses, and what another has been told meanwhile."""
    herd = Herd(*[response(429)] * 5, token("t"))
    caller = herd.start()
    herd.run(20)
    asked_at = herd.sent[4]  # the next try is due after fifteen seconds
    herd.endpoint.close(herd.clock.now + asked_at - herd.now + closed_for)
    herd.run()
    assert access_token(caller.outcome) == "t"
    assert least <= herd.sent[5] - asked_at <= 1.1 * least + 1


def test_who_pauses_is_told_at_once_that_the_endpoint_has_closed_meanwhile() -> None:
    herd = Herd(response(429))
    caller = herd.start(max_wait=20)
    herd.wait(0.5)
    herd.endpoint.close(herd.clock() + 100)
    herd.wait(0.1)
    assert retry_after(caller.outcome) == pytest.approx(100, abs=0.1)


def test_a_wait_for_another_try_is_a_warning(log: Log) -> None:
    herd = Herd(response(429, Retry_After="20"), token("t"))
    herd.call()
    (level, message), _ = log()
    assert level == "WARNING"
    assert message.startswith(f"token endpoint {CLIENT.token_endpoint} is busy: ")
    assert message.endswith(f": the next try is in {herd.sent[1]:.1f} s")


# By hand: a failure is remembered


@pytest.mark.parametrize(
    ("fault", "tries", "rests"),
    [(NO_ROUTE, 4, [2, 4, 8, 16, 30, 30]), (response(404), 1, [2, 4]), (REFUSAL, 1, [10, 20, 40, 60, 60])],
    ids=["down", "odd", "refused"],
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


# Over real sockets


@pytest.mark.usefixtures("quick_retries")
def test_faults_are_tried_again(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.fail_token_requests(drop=True)
    sandbox.fail_token_requests(status=503)
    sandbox.fail_token_requests(2, status=429)
    sandbox.fail_token_requests(status=500)
    assert driver.get(driver.client(driver.auth(sandbox)), url(sandbox)).status == 200
    assert (len(sandbox.token_requests), len(sandbox.requests)) == (6, 1)


def test_what_would_take_too_long_is_said_at_once(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, max_wait=5))
    sandbox.fail_token_requests(status=429, retry_after=30)
    for _ in range(2):
        error: Any = outcome(driver.get, client, url(sandbox))
        assert isinstance(error, driver.door.TokenWaitError)
        assert 25 < error.retry_after <= 30
    assert len(sandbox.token_requests) == 1
