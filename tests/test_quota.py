"""The quota as a table of times: nothing waits, every time is an argument."""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_auth.quota import LIMIT, MARGIN, PERIOD, Quota, Slot

TURN = PERIOD + MARGIN  # seconds from an answer to the next use of its slot


def use(quota: Quota, times: int, now: float, answered: float | None = None) -> list[Slot]:
    """Send `times` requests at `now`, each of which has to be allowed; they are answered at once, or at `answered`."""
    slots = [Slot() for _ in range(times)]
    assert [quota.wait(slot, now) for slot in slots] == [0] * times
    for slot in slots:
        quota.release(slot, now if answered is None else answered)
    return slots


def queue(quota: Quota, times: int, now: float) -> list[Slot]:
    """Put `times` requests in line at `now`, each of which has to wait."""
    slots = [Slot() for _ in range(times)]
    assert all(quota.wait(slot, now) > 0 for slot in slots)
    return slots


def test_the_numbers_are_those_of_nexus() -> None:
    assert (LIMIT, PERIOD) == (60, 60)
    assert 0 < MARGIN <= 1


@pytest.mark.parametrize(
    ("used", "now", "wait"),
    [
        ([], 0, 0),
        ([(59, 0)], 0, 0),
        ([(60, 0)], 0, TURN),
        ([(60, 0)], 30, TURN - 30),
        ([(60, 0)], 60, MARGIN),
        ([(60, 0)], TURN, 0),
        ([(60, 0)], 1000, 0),
        ([(59, 0), (1, 30)], 30, TURN - 30),
        ([(59, 0), (1, 30)], 60.2, 0),
        ([(1, 0), (59, 30)], 31, TURN - 31),
        ([(1, 0), (59, 30)], TURN, 0),
        ([(30, 0), (30, 50)], 55, TURN - 55),
        ([(60, 0), (60, TURN)], TURN, TURN),  # no bucket that fills up meanwhile: not 120 in a minute
        ([(60, 0), (60, 100)], 101, TURN - 1),
        ([(60, -1e6)], -1e6, TURN),  # a monotonic clock starts anywhere
    ],
)
def test_the_wait_after_what_was_used(used: list[tuple[int, float]], now: float, wait: float) -> None:
    quota = Quota()
    for times, time in used:
        use(quota, times, time)
    assert quota.wait(Slot(), now) == pytest.approx(wait, abs=1e-6)


def test_after_a_turn_there_is_room_for_as_many_as_went_before() -> None:
    quota = Quota()
    use(quota, 40, 0)
    use(quota, 20, 10)
    use(quota, 40, TURN)
    assert quota.wait(Slot(), TURN) == pytest.approx(10)


def test_a_slow_answer_counts_from_the_answer() -> None:
    quota = Quota()
    use(quota, 60, 0, answered=5)
    assert quota.wait(Slot(), 6) == pytest.approx(TURN - 1)


def test_who_waits_for_slow_answers_looks_again_and_waits_on() -> None:
    quota = Quota()
    slow = [Slot() for _ in range(60)]
    assert [quota.wait(slot, 0) for slot in slow] == [0] * 60
    (waiting,) = queue(quota, 1, 1)
    for slot in slow:
        quota.release(slot, 5)
    assert quota.wait(waiting, TURN) == pytest.approx(5)
    assert quota.wait(waiting, TURN + 5) == 0


def test_the_line_is_served_in_order() -> None:
    quota = Quota()
    use(quota, 60, 0)
    line = [Slot() for _ in range(150)]
    waits = [quota.wait(slot, 10) for slot in line]
    assert waits == pytest.approx([TURN - 10] * 60 + [2 * TURN - 10] * 60 + [3 * TURN - 10] * 30)
    # A newcomer takes no place of the line, however late the line is.
    newcomer = Slot()
    assert quota.wait(newcomer, TURN) == pytest.approx(2 * TURN)
    assert [quota.wait(slot, TURN) for slot in line[:60]] == [0] * 60
    assert quota.wait(line[60], TURN) == pytest.approx(TURN)


def test_to_look_again_keeps_the_place_in_line() -> None:
    quota = Quota()
    use(quota, 60, 0)
    line = queue(quota, 120, 0)
    for now in (1, 20, 59):
        assert quota.wait(line[59], now) == pytest.approx(TURN - now)
        assert quota.wait(line[60], now) == pytest.approx(2 * TURN - now)


def test_who_leaves_the_line_takes_no_slot() -> None:
    quota = Quota()
    use(quota, 60, 0)
    for slot in queue(quota, 100, 0):
        quota.release(slot, 1)
    assert quota.wait(Slot(), 2) == pytest.approx(TURN - 2)


def test_those_behind_move_up_when_somebody_leaves() -> None:
    quota = Quota()
    use(quota, 60, 0)
    line = queue(quota, 61, 0)
    assert quota.wait(line[60], 1) == pytest.approx(2 * TURN - 1)
    quota.release(line[7], 1)
    assert quota.wait(line[60], 1) == pytest.approx(TURN - 1)


def test_to_release_what_never_stood_in_line_is_harmless() -> None:
    quota = Quota()
    quota.release(Slot(), 0)
    use(quota, 60, 0)
    assert quota.wait(Slot(), 0) == TURN


def test_what_is_over_is_forgotten() -> None:
    quota = Quota()
    for turn in range(50):
        use(quota, 60, turn * 2 * TURN)
    assert len(quota.slots) <= 2 * LIMIT


# A simulated run


class Request(NamedTuple):
    """One request of a simulated run; all in seconds."""

    start: float
    flight: float  # from sending to answer
    arrives: float  # how much of its flight is over when the server sees it
    late: float  # how long its waiter oversleeps
    patience: float  # when it gives up waiting


class Run:
    """What comes of `requests` that share one quota: when each was sent (None: gave up), and when they arrived."""

    def __init__(self, requests: list[Request]) -> None:
        quota = Quota()
        slots = [Slot() for _ in requests]
        self.sent: list[float | None] = [None] * len(requests)
        self.arrivals: list[float] = []
        # Answers are here before others wake up at the same time, and who came first wakes up first.
        events = [(request.start, 1, number) for number, request in enumerate(requests)]
        heapq.heapify(events)
        while events:
            now, is_caller, number = heapq.heappop(events)
            request, slot = requests[number], slots[number]
            if not is_caller or now > request.start + request.patience:
                quota.release(slot, now)
            elif wait := quota.wait(slot, now):
                wake = min(now + wait + request.late, request.start + request.patience + 1e-9)
                heapq.heappush(events, (wake, 1, number))
            else:
                self.sent[number] = now
                self.arrivals.append(now + request.arrives * request.flight)
                heapq.heappush(events, (now + request.flight, 0, number))
        self.arrivals.sort()

    def most_in_a_period(self) -> int:
        """Return how many arrived in the fullest half-open period of 60 seconds."""
        first = most = 0
        for last, arrival in enumerate(self.arrivals):
            while self.arrivals[first] <= arrival - 60:
                first += 1
            most = max(most, last - first + 1)
        return most


def runs(flight: float, late: float, patience: float) -> st.SearchStrategy[list[Request]]:
    """Bursts of up to 90 requests with up to 40 seconds between them; the arguments are the most of each."""

    def times(most: float) -> st.SearchStrategy[float]:
        return st.sampled_from([0.0, most]) | st.floats(0, most)

    def unfold(bursts: list[tuple[float, int, list[tuple[float, float, float, float]]]]) -> list[Request]:
        requests, now = [], 0.0
        for pause, times, kinds in bursts:
            now += pause
            for number in range(times):
                takes, arrives, oversleeps, waits = kinds[number % len(kinds)]
                requests.append(Request(now, takes, arrives, oversleeps, waits if patience < 1e9 else 1e9))
        return requests

    kind = st.tuples(times(flight), times(1.0), times(late), times(min(patience, 200)))
    burst = st.tuples(times(40.0), st.integers(1, 90), st.lists(kind, min_size=1, max_size=4))
    return st.lists(burst, min_size=1, max_size=6).map(unfold)


@given(runs(flight=55, late=50, patience=200))
@settings(max_examples=100, deadline=None)
def test_no_minute_of_the_server_holds_more_than_it_allows(requests: list[Request]) -> None:
    """However slow the answers, wherever the requests arrive, whoever oversleeps or gives up."""
    assert Run(requests).most_in_a_period() <= 60


@given(runs(flight=20, late=0, patience=1e9))
@settings(max_examples=100, deadline=None)
def test_the_line_moves_in_order_and_no_slower_than_it_must(requests: list[Request]) -> None:
    sent = [time for time in Run(requests).sent if time is not None]
    assert len(sent) == len(requests)
    assert all(later > earlier - 1e-6 for earlier, later in pairwise(sent))  # but for what floats round
    for number, (request, time) in enumerate(zip(requests, sent, strict=True)):
        # Sixty places on, the one ahead has had its answer a turn ago.
        allowed = max(request.start, sent[number - 60] + 20 + TURN) if number >= 60 else request.start
        assert time <= allowed + 1e-6


@given(runs(flight=0, late=0, patience=1e9))
@settings(max_examples=50, deadline=None)
def test_with_instant_answers_each_goes_as_soon_as_it_may(requests: list[Request]) -> None:
    ideal: list[float] = []
    for number, request in enumerate(requests):
        ideal.append(max(request.start, ideal[number - 60] + TURN) if number >= 60 else request.start)
    assert Run(requests).sent == pytest.approx(ideal)
