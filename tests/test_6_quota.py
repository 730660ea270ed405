"""6. Quota: at most 60 token requests in any 60 s, for everybody; who is over it waits in line, or is told at once."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Driver, Log, outcome, statuses, url
from herd import CLIENT, NO_ROUTE, SILENCE, Answer, Herd, access_token, retry_after, token, tokens

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
        for owner in range(times):
            permits = answered(permits, f"{number}-{owner}", at)
    return permits


def under_way(times: int, since: float, permits: Permits = NONE) -> Permits:
    """Return the permits after so many requests were sent that are not answered."""
    permits, waits = in_line(permits, [f"under way {number}" for number in range(times)], since)
    assert waits == [0] * times
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
    assert [permit.ends_at for permit in mine] == ([] if wait else [now + HOLD])


def test_an_answer_counts_from_then_on_though_its_permit_has_ended() -> None:
    permits, _ = acquire(under_way(60, 0), "me", HOLD, HOLD)
    assert len(permits.held) == 1  # what is over is forgotten
    late = answered(permits, "under way 7", HOLD + 1)
    assert sorted(permit.ends_at for permit in late.held) == pytest.approx([HOLD + 1 + KEEP, 2 * HOLD])


def test_a_permit_that_is_given_back_is_free() -> None:
    permits = given_back(under_way(60, 0), "under way 7")
    assert acquire(permits, "me", HOLD, 0)[1] == 0
    assert given_back(permits, "nobody") == permits


def test_the_line_is_served_in_order() -> None:
    owners = [f"{number}" for number in range(121)]
    permits, waits = in_line(used((60, 0)), owners, KEEP - 1)
    assert waits == pytest.approx([1] * 60 + [KEEP + 1] * 60 + [2 * KEEP + 1])
    # A newcomer takes no place of the line, however late the line is.
    permits, waits = in_line(permits, ["newcomer", *owners[:61]], KEEP)
    assert waits == pytest.approx([2 * KEEP] + [0] * 60 + [KEEP])
    assert [place.owner for place in permits.line] == [*owners[60:], "newcomer"]


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


@pytest.mark.parametrize(
    ("change", "function", "arguments", "holds"),
    [
        ("acquire", "acquire", (HOLD, 0), True),
        ("answered", "answered", (0,), True),
        ("give_back", "given_back", (), False),
        ("leave_line", "left_line", (), False),
    ],
)
def test_a_change_by_another_thread_in_between_is_not_lost(
    change: str, function: str, arguments: tuple[float, ...], holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, what_is_left = Endpoint(), getattr(quota, function)

    def overtaken(*arguments: Any) -> Any:
        after = what_is_left(*arguments)
        monkeypatch.undo()
        endpoint.acquire("another", HOLD, 0)
        return after

    monkeypatch.setattr(quota, function, overtaken)
    getattr(endpoint, change)("me", *arguments)
    assert [permit.owner for permit in endpoint.permits.held] == ["another", *["me"] * holds]


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


def test_over_the_quota_and_max_wait_a_caller_is_told_at_once() -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=20)
    caller = herd.start(max_wait=40)
    herd.run()
    assert caller.waited == 0
    assert isinstance(caller.outcome, TooLong)
    assert caller.outcome.retry_after == pytest.approx(40.1)
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


@pytest.mark.parametrize(
    ("answer", "broken_off", "counts_from"),
    [
        (token("t", takes=7), False, 7),
        (SILENCE, False, 12),  # it is as good as answered
        (SILENCE, True, 12),  # it may still be on its way, until its timeout is over
    ],
    ids=["slow answer", "no answer", "broken off"],
)
def test_from_when_a_request_counts(answer: Answer, broken_off: bool, counts_from: float) -> None:
    herd = Herd(answer, token("t"))
    use_up(herd, ago=-100, times=59)
    first = herd.start(timeout=12)
    herd.run(2)
    if broken_off:
        first.break_off()
    assert access_token(herd.call(credentials=others(herd, 1))) == "t"
    assert herd.sent == pytest.approx([0, counts_from + 60.1], abs=0.11)


def test_who_breaks_off_while_in_line_leaves_it() -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=20)
    caller = herd.start()
    herd.run(1)
    assert len(herd.endpoint.permits.line) == 1
    caller.break_off()
    assert len(herd.endpoint.permits.line) == 0


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


@pytest.mark.parametrize(("ago", "levels"), [(58.5, ["WARNING", "DEBUG"]), (59.2, ["DEBUG", "DEBUG"])])
def test_a_wait_of_more_than_a_second_is_a_warning_once(ago: float, levels: list[str], log: Log) -> None:
    herd = Herd(token("t"))
    use_up(herd, ago=ago)
    herd.call()
    (first, message), (second, _) = log()
    assert [first, second] == levels
    seconds = f"the next may go in {KEEP - ago:.1f} s"
    assert message.endswith(f"takes 60 token requests a minute, and they have been made: {seconds}")


# Over real sockets


def use_up_through(doors: list[Driver], sandbox: NexusSandbox, times: int) -> None:
    """Make so many token requests through all doors, each for an API client of its own."""
    for number, driver in zip(range(times), itertools.cycle(doors), strict=False):
        sandbox.clients[f"client-{number}"] = "secret"
        driver.access_token(driver.auth(sandbox, client_id=f"client-{number}", client_secret="secret"))
    assert len(sandbox.token_requests) == times


def test_the_quota_is_one_for_all_credentials_and_doors(
    doors: list[Driver], sandbox: NexusSandbox, stranger: NexusSandbox
) -> None:
    use_up_through(doors, sandbox, LIMIT)
    credentials_of.cache_clear()  # for whom they were made may be forgotten, how many were made may not
    for driver in doors:
        error: Any = outcome(driver.get, driver.client(driver.auth(sandbox, max_wait=1)), url(sandbox))
        assert isinstance(error, driver.door.TokenWaitError)
        assert 30 < error.retry_after <= 60.1
        # Another endpoint has a quota of its own.
        assert driver.get(driver.client(driver.auth(stranger, max_wait=1)), url(stranger)).status == 200
    assert len(sandbox.token_requests) == LIMIT


def test_over_the_quota_a_call_waits(
    doors: list[Driver], sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For which the quota and its minute are made smaller."""
    monkeypatch.setattr(quota, "LIMIT", len(doors))
    monkeypatch.setattr(quota, "KEEP", 0.5)
    use_up_through(doors, sandbox, len(doors))
    calls = []
    for number, driver in enumerate(doors):
        sandbox.clients[f"late-{number}"] = "secret"
        client = driver.client(driver.auth(sandbox, client_id=f"late-{number}", client_secret="secret"))
        calls.append(driver.in_background(driver.get, client, url(sandbox)))
    assert {call.result().status for call in calls} == {200}
    times = [arrival.time for arrival in sandbox.token_requests]
    assert all(late - early > 0.49 for early, late in zip(times, times[len(doors) :], strict=False))


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
