"""6. Quota: at most 60 token requests in any 60 s, for everybody; who is over it waits in line, or is told at once."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from conftest import Driver, Log, outcome, statuses, url
from herd import CLIENT, NO_ROUTE, SILENCE, Answer, Herd, access_token, response, retry_after, token, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_auth import quota
from nexus_auth.credentials import Credentials, credentials_of
from nexus_auth.known import TooLong
from nexus_auth.quota import (
    KEEP,
    KEEP_IN_LINE,
    LIMIT,
    PERIOD,
    Endpoint,
    Permits,
    acquire,
    answered,
    given_back,
    left_line,
)
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

NONE = Permits()
HOLD = 70.1  # seconds of a permit whose request has a timeout of 10


def used(*requests: tuple[int, float]) -> Permits:
    """Return the permits after so many requests were answered at each of these times."""
    permits = NONE
    for number, (times, at) in enumerate(requests):
        for owner in (f"{number}-{i}" for i in range(times)):
            permits = answered(permits, owner, at)
    return permits


def under_way(times: int, since: float, permits: Permits = NONE) -> Permits:
    """Return the permits after so many requests were sent that are not answered."""
    for number in range(times):
        permits, wait = acquire(permits, f"under way {number}", HOLD, since)
        assert wait == 0
    return permits


def in_line(permits: Permits, owners: list[str], now: float) -> tuple[Permits, list[float]]:
    """Return the permits after these have asked for one, and the seconds that each has to wait."""
    waits: list[float] = []
    for owner in owners:
        permits, wait = acquire(permits, owner, HOLD, now)
        waits.append(wait)
    return permits, waits


def test_the_numbers_are_those_of_nexus() -> None:
    assert (LIMIT, PERIOD) == (60, 60)
    assert pytest.approx(60.1) == KEEP


@pytest.mark.parametrize(
    ("permits", "now", "wait"),
    [
        (NONE, 0, 0),
        (used((59, 0)), 0, 0),
        (used((60, 0)), 0, KEEP),
        (used((60, 0)), 30, KEEP - 30),
        (used((60, 0)), 60, 0.1),
        (used((60, 0)), KEEP, 0),
        (used((60, 0)), 1000, 0),
        (used((61, 0)), 30, KEEP - 30),
        (used((59, 0), (1, 30)), 30, KEEP - 30),
        (used((59, 0), (1, 30)), 60.2, 0),
        (used((1, 0), (59, 30)), 31, KEEP - 31),
        (used((1, 0), (59, 30)), KEEP, 0),
        (used((30, 0), (30, 50)), 55, KEEP - 55),
        (used((60, 0), (60, KEEP)), KEEP, KEEP),  # no bucket that fills up meanwhile: not 120 in a minute
        (used((60, -1e6)), -1e6, KEEP),  # a monotonic clock starts anywhere
        # Requests under way may be answered at once, and count for a period then; else until their timeout and that.
        (under_way(60, 0), 1, KEEP),
        (under_way(60, 0), 30, HOLD - 30),
        (under_way(60, 0), HOLD - KEEP, KEEP),
        (under_way(60, 0), HOLD, 0),
        (under_way(59, 0), 1, 0),
        (under_way(1, 0, used((59, 0))), 20, KEEP - 20),
        (under_way(2, 50, used((58, 0))), 55, KEEP - 55),
    ],
)
def test_the_wait_for_a_permit(permits: Permits, now: float, wait: float) -> None:
    after, seconds = acquire(permits, "me", HOLD, now)
    assert seconds == pytest.approx(wait, abs=1e-6)
    assert [place.owner for place in after.line] == (["me"] if wait else [])
    mine = [permit for permit in after.held if permit.owner == "me"]
    assert [(permit.ends_at, permit.under_way) for permit in mine] == ([] if wait else [(now + HOLD, True)])


def test_an_answer_counts_for_a_period_from_then_on() -> None:
    permits = under_way(60, 0)
    for number in range(60):
        permits = answered(permits, f"under way {number}", 5)
    assert len(permits.held) == 60
    assert acquire(permits, "me", HOLD, 6)[1] == pytest.approx(KEEP - 1)


def test_an_answer_that_comes_after_its_permit_has_ended_counts_too() -> None:
    permits, _ = acquire(under_way(60, 0), "me", HOLD, HOLD)
    assert len(permits.held) == 1
    late = answered(permits, "under way 7", HOLD + 1)
    assert sorted(permit.ends_at for permit in late.held) == pytest.approx([HOLD + 1 + KEEP, 2 * HOLD])


def test_a_permit_that_is_given_back_is_free() -> None:
    permits = given_back(under_way(60, 0), "under way 7")
    assert acquire(permits, "me", HOLD, 0)[1] == 0
    assert given_back(permits, "nobody") == permits


def test_the_line_is_served_in_order() -> None:
    owners = [f"{number}" for number in range(150)]
    permits, waits = in_line(used((60, 0)), owners, 10)
    assert waits == pytest.approx([KEEP - 10] * 60 + [2 * KEEP - 10] * 60 + [3 * KEEP - 10] * 30)
    permits = seen_again(permits, owners, KEEP)
    # A newcomer takes no place of the line, however late the line is.
    permits, (newcomer,) = in_line(permits, ["newcomer"], KEEP)
    assert newcomer == pytest.approx(2 * KEEP)
    permits, waits = in_line(permits, owners[:61], KEEP)
    assert waits == pytest.approx([0] * 60 + [KEEP])
    assert [place.owner for place in permits.line] == [*owners[60:], "newcomer"]


def seen_again(permits: Permits, owners: list[str], until: float) -> Permits:
    """Return the permits after those in line have looked again and again."""
    now = max(place.seen_at for place in permits.line)
    while now < until - 1:
        now += 1
        permits, waits = in_line(permits, owners, now)
        assert 0 not in waits
    return permits


def test_who_does_not_look_again_loses_the_place() -> None:
    permits, _ = in_line(used((60, 0)), ["first", "second"], 10)
    permits, _ = in_line(permits, ["second"], 11)
    assert in_line(permits, ["second"], 10 + KEEP_IN_LINE - 0.1)[0].line[0].owner == "first"
    permits, _ = in_line(permits, ["second", "first"], 10 + KEEP_IN_LINE)
    assert [place.owner for place in permits.line] == ["second", "first"]


def test_those_behind_move_up_when_somebody_leaves() -> None:
    owners = [f"{number}" for number in range(61)]
    permits, _ = in_line(used((60, 0)), owners, 0)
    permits = left_line(permits, "7")
    permits, (wait,) = in_line(permits, ["60"], 1)
    assert wait == pytest.approx(KEEP - 1)
    assert left_line(permits, "nobody") == permits


def test_what_is_over_is_forgotten() -> None:
    permits = used((60, 0))
    permits, _ = in_line(permits, ["me"], KEEP)
    assert len(permits.held) == 1
    permits, _ = in_line(used((60, 0)), ["me"], 10)
    assert acquire(permits, "another", HOLD, 10 + KEEP_IN_LINE)[0].line[0].owner == "another"


def test_an_endpoint_does_what_the_functions_say() -> None:
    endpoint = Endpoint()
    waits = [endpoint.acquire(f"{number}", HOLD, 0) for number in range(61)]
    assert waits == [0] * 60 + [pytest.approx(KEEP)]
    endpoint.answered("0", 3)
    endpoint.give_back("1")
    assert endpoint.acquire("60", HOLD, 4) == 0
    assert endpoint.acquire("61", HOLD, 4) == pytest.approx(KEEP - 1)
    endpoint.leave_line("61")
    assert endpoint.permits.line == ()
    endpoint.close(9)
    endpoint.close(7)  # the longest holds
    assert endpoint.closed_until == 9
    endpoint.forget()
    assert (endpoint.permits, endpoint.closed_until) == (Permits(), 0)


@pytest.mark.parametrize("change", ["acquire", "answered", "give_back", "leave_line"])
def test_a_change_by_somebody_else_in_between_is_not_lost(change: str) -> None:
    class Interrupted(Endpoint):
        """An endpoint at which another thread is faster, once."""

        def _swap(self, before: Permits, after: Permits) -> bool:
            if not faster:
                faster.append("another")
                self.acquire("another", HOLD, 0)
            return super()._swap(before, after)

    endpoint, faster = Interrupted(), list[str]()
    arguments = {"acquire": ("me", HOLD, 0), "answered": ("me", 0)}.get(change, ("me",))
    getattr(endpoint, change)(*arguments)
    assert "another" in [permit.owner for permit in endpoint.permits.held]
    assert ("me" in [permit.owner for permit in endpoint.permits.held]) is (change in ("acquire", "answered"))


# A simulated run


class Request(NamedTuple):
    """One request of a simulated run; all in seconds."""

    start: float
    flight: float  # from sending to answer
    arrives: float  # how much of its flight is over when the server sees it
    patience: float  # when it gives up waiting
    is_answered: bool


class Run:
    """What comes of `requests` that share one endpoint: when each was sent (None: gave up), and when they arrived."""

    look = 1.9  # seconds until who waits looks again

    def __init__(self, requests: list[Request]) -> None:
        endpoint = Endpoint()
        self.sent: list[float | None] = [None] * len(requests)
        self.arrivals: list[float] = []
        # Answers are here before others wake up at the same time, and who came first wakes up first.
        events = [(request.start, 1, number) for number, request in enumerate(requests)]
        heapq.heapify(events)
        while events:
            now, is_caller, number = heapq.heappop(events)
            request, owner = requests[number], str(number)
            if not is_caller:
                endpoint.answered(owner, now)
            elif now > request.start + request.patience:
                endpoint.leave_line(owner)
            elif wait := endpoint.acquire(owner, 20 + KEEP, now):
                heapq.heappush(events, (now + min(wait, self.look), 1, number))
            else:
                self.sent[number] = now
                self.arrivals.append(now + request.arrives * request.flight)
                if request.is_answered:
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


def runs(flight: float, patience: float, unanswered: bool) -> st.SearchStrategy[list[Request]]:
    """Bursts of up to 80 requests with up to 40 seconds between them, each flight and patience the longest at most."""

    def times(most: float) -> st.SearchStrategy[float]:
        return st.sampled_from([0.0, most]) | st.floats(0, most)

    def unfold(bursts: list[tuple[float, int, list[tuple[float, float, float, bool]]]]) -> list[Request]:
        requests, now = list[Request](), 0.0
        for pause, number_of_requests, kinds in bursts:
            now += pause
            requests += [Request(now, *kinds[number % len(kinds)]) for number in range(number_of_requests)]
        return requests

    is_answered = st.booleans() if unanswered else st.just(True)
    patiences = st.just(math.inf) if patience == math.inf else times(patience)
    kind = st.tuples(times(flight), times(1.0), patiences, is_answered)
    burst = st.tuples(times(40.0), st.integers(1, 80), st.lists(kind, min_size=1, max_size=4))
    return st.lists(burst, min_size=1, max_size=3).map(unfold)


@given(runs(flight=20, patience=100, unanswered=True))
@settings(max_examples=15, deadline=None)
def test_no_minute_of_the_server_holds_more_than_it_allows(requests: list[Request]) -> None:
    """However slow the answers, wherever the requests arrive, whoever gives up or is never answered."""
    assert Run(requests).most_in_a_period() <= 60


@given(runs(flight=0, patience=math.inf, unanswered=False))
@settings(max_examples=15, deadline=None)
def test_the_line_moves_in_order_and_no_slower_than_it_must(requests: list[Request]) -> None:
    sent = Run(requests).sent
    ideal: list[float] = []
    for number, request in enumerate(requests):
        ideal.append(max(request.start, ideal[number - 60] + KEEP) if number >= 60 else request.start)
    assert sent == pytest.approx(ideal, abs=Run.look)
    assert all(later >= earlier for earlier, later in pairwise(time for time in sent if time is not None))


# By hand


def use_up(herd: Herd, ago: float = 0.0, times: int = LIMIT) -> None:
    """Count so many requests of other API clients that were answered `ago` seconds before now."""
    for number in range(times):
        herd.endpoint.answered(f"other {number}", herd.clock() - ago)


def others(herd: Herd, number: int) -> Credentials:
    """Return the credentials of another API client."""
    return herd.client(replace(CLIENT, client_id=f"client-{number}"))


def test_over_the_quota_a_caller_waits() -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=20)
    caller = herd.start()
    herd.run()
    assert access_token(caller.outcome) == "t"
    assert herd.sent == [pytest.approx(40.1)]
    assert max(caller.slept) <= 0.1 + 1e-6  # it might be told sooner that there is a token


def test_a_hundred_callers_of_one_client_take_one_permit() -> None:
    herd = Herd(token("t", takes=1))
    herd.crowd(100)
    herd.run()
    assert len(herd.endpoint.permits.held) == 1


def test_over_the_quota_and_max_wait_a_caller_is_told_at_once() -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=20)
    caller = herd.start(max_wait=40)
    herd.run()
    assert caller.waited == 0
    assert isinstance(caller.outcome, TooLong)
    assert retry_after(caller.outcome) == pytest.approx(40.1)
    assert "60 token requests a minute" in caller.outcome.reason
    assert (len(herd.endpoint.permits.held), herd.endpoint.permits.line, herd.sent) == (60, (), [])


def test_who_is_too_far_behind_in_the_line_is_told_at_once() -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=10)
    callers = [herd.start(credentials=others(herd, number)) for number in range(62)]
    herd.run(0)
    assert [caller.outcome for caller in callers[:60]] == [None] * 60
    assert [retry_after(caller.outcome) for caller in callers[60:]] == pytest.approx([110.2] * 2)
    assert len(herd.endpoint.permits.line) == 60


def test_callers_are_served_in_the_order_in_which_they_came() -> None:
    herd = Herd(token("t"))
    for number in range(LIMIT):
        herd.endpoint.answered(f"other {number}", herd.clock() - 58 + number / 4)
    for number in range(10):
        herd.start(credentials=others(herd, number))
        herd.wait(0.07)
    herd.run()
    assert [request.client.client_id for request in herd.requests] == [f"client-{number}" for number in range(10)]
    openings = [2.1 + number / 4 for number in range(10)]
    assert herd.sent == pytest.approx(openings, abs=0.11)
    assert all(sent >= opening - 1e-6 for sent, opening in zip(herd.sent, openings, strict=True))


def test_every_try_counts() -> None:
    herd = Herd(NO_ROUTE)
    use_up(herd, times=58)
    assert isinstance(herd.call(max_wait=50), TooLong)
    assert len(herd.sent) == 2


def test_a_slow_answer_counts_from_when_it_is_here() -> None:
    herd = Herd(token("t", takes=7), token("t"))
    use_up(herd, ago=-100, times=59)
    herd.start()
    herd.run()
    herd.call(credentials=others(herd, 1))
    assert herd.sent == pytest.approx([0, 67.1])


@pytest.mark.parametrize("timeout", [10, 13])
def test_a_request_that_is_broken_off_counts_from_when_its_timeout_would_be_over(timeout: float) -> None:
    """It may still be on its way."""
    herd = Herd(SILENCE, token("t"))
    use_up(herd, ago=-100, times=59)
    broken_off = herd.start(timeout=timeout)
    herd.run(2)
    broken_off.break_off()
    herd.call(credentials=others(herd, 1))
    assert herd.sent == pytest.approx([0, timeout + 60.1], abs=0.11)


def test_a_request_that_times_out_is_as_good_as_answered() -> None:
    herd = Herd(SILENCE, token("t"))
    use_up(herd, ago=-100, times=59)
    assert access_token(herd.call()) == "t"
    assert herd.sent == pytest.approx([0, 70.1], abs=0.11)


def test_who_breaks_off_while_in_line_leaves_it() -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=20)
    caller = herd.start()
    herd.run(1)
    assert len(herd.endpoint.permits.line) == 1
    caller.break_off()
    assert len(herd.endpoint.permits.line) == 0


def test_who_waits_for_answers_looks_again_and_waits_on() -> None:
    herd = Herd(*[Answer(token("t").answer, takes=5)] * 60, token("t"))
    for number in range(60):
        herd.start(credentials=others(herd, number))
    late = herd.start(credentials=others(herd, 60))
    herd.run()
    assert access_token(late.outcome) == "t"
    assert herd.sent[60] == pytest.approx(65.1, abs=0.11)


def test_ahead_of_time_nobody_stands_in_line() -> None:
    herd = Herd(more=tokens(lifetime=100))
    herd.call()
    herd.wait(70)
    use_up(herd, ago=60.05)
    caller = herd.start()
    herd.run()
    assert (access_token(caller.outcome), caller.waited) == ("t1", 0)
    assert (herd.sent, herd.endpoint.permits.line) == ([0], ())
    herd.wait(1)
    assert access_token(herd.call()) == "t2"


def test_who_comes_after_a_failure_in_line_is_not_held_up_by_it() -> None:
    herd = Herd(response(429, Retry_After="5"), token("t"))
    use_up(herd, times=59, ago=0)
    caller = herd.start()
    herd.run()
    assert access_token(caller.outcome) == "t"
    assert herd.sent == pytest.approx([0, 60.1], abs=0.11)


def test_a_long_wait_is_a_warning_once(log: Log) -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=58.5)
    herd.call()
    (level, message), _ = log()
    assert level == "WARNING"
    assert message.endswith("takes 60 token requests a minute, and they have been made: the next may go in 1.6 s")


def test_a_short_wait_is_none(log: Log) -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=59.2)
    herd.call()
    assert [level for level, _ in log()] == ["DEBUG", "DEBUG"]


# Over real sockets


def fill(doors: list[Driver], sandbox: NexusSandbox) -> None:
    """Use up the quota, with an API client for each token request, through all doors."""
    for number, driver in zip(range(LIMIT), itertools.cycle(doors), strict=False):
        sandbox.clients[f"client-{number}"] = "secret"
        driver.access_token(driver.auth(sandbox, client_id=f"client-{number}", client_secret="secret"))
    assert len(sandbox.token_requests) == LIMIT


def test_the_quota_is_one_for_all_credentials_and_doors(doors: list[Driver], sandbox: NexusSandbox) -> None:
    fill(doors, sandbox)
    credentials_of.cache_clear()  # for whom they were made may be forgotten, how many were made may not
    for driver in doors:
        client = driver.client(driver.auth(sandbox, max_wait=5))
        started = time.monotonic()
        with pytest.raises(driver.library_error) as raised:
            driver.get(client, url(sandbox))
        error: Any = raised.value
        assert isinstance(error, driver.door.TokenWaitError)
        assert 30 < error.retry_after <= 60.1
        assert time.monotonic() - started < 4  # at once, and not after max_wait
    assert len(sandbox.token_requests) == LIMIT
    with NexusSandbox() as another:  # which has a quota of its own
        for driver in doors:
            assert driver.get(driver.client(driver.auth(another, max_wait=1)), url(another)).status == 200


def test_over_the_quota_a_call_waits(
    doors: list[Driver], sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For which a minute is made shorter."""
    monkeypatch.setattr(quota, "KEEP", 0.7)
    sandbox.limit = 1000
    fill(doors, sandbox)
    calls = []
    for number, driver in enumerate(doors):
        sandbox.clients[f"late-{number}"] = "secret"
        client = driver.client(driver.auth(sandbox, client_id=f"late-{number}", client_secret="secret"))
        calls.append(driver.in_background(functools.partial(driver.get, client, url(sandbox))))
    assert {call.result().status for call in calls} == {200}
    times = [arrival.time for arrival in sandbox.token_requests]
    assert all(late - early > 0.69 for early, late in zip(times, times[LIMIT:], strict=False))


@pytest.mark.parametrize("driver", ["requests"], indirect=True)
@pytest.mark.parametrize("fault", [{"status": 503, "retry_after": 0}, {"drop": True}], ids=["503", "drop"])
@pytest.mark.usefixtures("quick_retries")
def test_retries_of_a_lent_sessions_adapter_are_not_made(
    driver: Driver, sandbox: NexusSandbox, fault: dict[str, Any]
) -> None:
    import urllib3

    lent = driver.client()
    lent.mount("http://", driver.library.adapters.HTTPAdapter(max_retries=urllib3.Retry(5, status_forcelist=[503])))
    sandbox.fail_token_requests(None, **fault)
    with pytest.raises(driver.library_error):
        driver.get(driver.client(driver.auth(sandbox, session=lent)), url(sandbox))
    assert len(sandbox.token_requests) == 4
    sandbox.answer("/customer", times=2, **{name: fault[name] for name in fault if name != "retry_after"})
    assert driver.get(lent, url(sandbox)).status == 401  # with an adapter that tries again as before
    assert len(sandbox.requests) == 3


@pytest.mark.slow
def test_no_minute_holds_more_than_sixty_token_requests(doors: list[Driver]) -> None:
    """What the server sees of many API clients that want a token through all doors, for more than a minute."""
    with NexusSandbox(limit=10_000) as sandbox:
        clients = {driver: driver.client() for driver in doors}
        starts = [0.0] * 30 + [6.0] * 35 + [8.0] * 20 + [9.0] * 10 + [50.0] * 5

        def call(number: int, driver: Driver) -> Any:
            client_id = f"{starts[number]} {number}"
            sandbox.clients[client_id] = "secret"
            auth = driver.auth(sandbox, client_id=client_id, client_secret="secret")
            time.sleep(starts[number])
            return outcome(lambda: driver.get(clients[driver], url(sandbox), auth=auth))

        with ThreadPoolExecutor(len(starts)) as pool:
            outcomes = list(pool.map(call, range(len(starts)), itertools.cycle(doors)))
    assert statuses(outcomes) == {200}
    times = [arrival.time for arrival in sandbox.token_requests]
    assert len(times) == len(starts)
    assert min(late - early for early, late in zip(times, times[LIMIT:], strict=False)) > 60
    # None waits needlessly: the first thirty make room after a minute, and the next thirty six seconds later.
    assert times[LIMIT + 30 - 1] - times[0] < 60 + 5
    assert times[-1] - times[0] < 66 + 5
    # They go in order, but for those whose turn comes at the same moment.
    order = [float(dict(arrival.form)["client_id"].split()[0]) for arrival in sandbox.token_requests]
    assert [*order[:60], *sorted(order[60:90]), *sorted(order[90:])] == starts
