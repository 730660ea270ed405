"""The core in simulated worlds: it keeps its promises in random ones, and herds cost what they should.

A failure names the seed of its world: `pytest tests/test_simulation.py -k random --first-world SEED --worlds 1`.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from simulation import INVALID_CLIENT, PATIENT, WELL, WRONG, Caller, Life, Loop, Mood, Process, World

from nexus_auth import quota, shared
from nexus_auth.known import Limits, Raise, TooLong
from nexus_auth.secret import HiddenText
from nexus_auth.steps import Client
from nexus_auth.store import _seal

HOUR = 3600.0
DOWN, BUSY = Mood(status=0), Mood(status=429)
SILENT, STUCK = Mood(delay=1e6), Mood(delay=1e6, stuck_for=20)
MOODS = (
    WELL, WELL, Mood(api_delay=20), Mood(delay=0.01), Mood(delay=15), SILENT, STUCK, DOWN, Mood(status=0, delay=5),
    Mood(status=302), Mood(status=404), Mood(status=503), Mood(status=500, delay=5), Mood(status=503, retry_after=30),
    BUSY, Mood(status=429, retry_after=0), Mood(status=429, retry_after=4), Mood(status=429, retry_after=100),
    Mood(status=429, retry_after=20, as_date=True), Mood(status=400, body=INVALID_CLIENT),
    Mood(status=401, body=INVALID_CLIENT, retry_after=7), Mood(body=b"<html>"), Mood(body=b'{"access_token": ""}'),
    Mood(body=None), Mood(expires_in=2, lifetime=2, delay=4), Mood(expires_in=5, lifetime=5),
    Mood(expires_in=20, lifetime=20), Mood(expires_in=90, lifetime=90, delay=3), Mood(expires_in=None, lifetime=50),
    Mood(expires_in="soon", lifetime=10), Mood(expires_in="30", lifetime=30), Mood(expires_in=0, lifetime=20),
    Mood(lifetime=5), Mood(gives_same_token=True), Mood(api_refuses_all=True),
    Mood(api_refuses_all=True, api_delay=20), Mood(api_refuses_all=True, gives_same_token=True),
)  # fmt: skip


def client(number: int = 0, secret: str = "right") -> Client:
    return Client("https://nexus.example/connect/token", f"client-{number}", HiddenText(secret), "api1")


CLIENTS = [*(client(number) for number in range(8)), client(8, WRONG)]


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Derive keys and log in no time."""
    monkeypatch.setattr(_seal, "_N", 2)
    logger = logging.getLogger("nexus_auth")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture
def small_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few callers use up the quota."""
    monkeypatch.setattr(quota, "LIMIT", 6)
    monkeypatch.setattr(shared, "LIMIT", 6)


# Random worlds


def random_world(seed: int) -> World:
    random.seed(seed)
    has_store = random.random() < 0.5
    delay, interrupts = random.choice((0.01, 0.01, 0.5, 2.2)), random.choice((0, 0, 0.002, 0.02))
    preemptions = random.choice((0, 0, 0.02, 0.2))
    world = World(seed, has_store=has_store, store_delay=delay, interrupts=interrupts, preemptions=preemptions)
    for _ in range(random.randrange(1, 5) if has_store else 1):
        populate(world)
    world.start(weather(world))
    return world


def populate(world: World) -> None:
    """Start a process and some callers in it."""
    process = Process(world, offset=random.uniform(0, 1e6))
    clients = random.sample(CLIENTS, random.choice((1, 1, 2, 9)))
    loops = [None, None, Loop(), Loop()]
    for _ in range(random.randrange(1, 12)):
        limits = Limits(random.choice((0, 5, 60)), random.choice((1, 5, 10)), random.choice((0, 3, 20, 75, 75, 75)))
        caller = Caller(process, random.choice(clients), limits, random.choice(loops), random.choice((0, 0, 0.5, 1)))
        caller.start(math.inf, random.choice((0.5, 2, 10, 60)), insists=random.random() < 0.2)


def weather(world: World) -> Life[None]:
    """Change the mood of the servers; revoke tokens, kill and freeze processes, set clocks, take the store away."""
    while True:
        world.mood = random.choice(MOODS)
        world.is_store_away = random.random() < 0.03
        for _ in range(random.randrange(4)):
            yield random.expovariate(1 / 15)
            process = random.choice(world.processes)
            if random.random() < 0.3:
                world.tokens.clear()
            if random.random() < 0.1:
                process.wall_offset = random.uniform(-100, 100)
            if random.random() < 0.1:
                process.freeze(random.uniform(0, 100), with_clock=random.random() < 0.5)
            if world.has_store and random.random() < 0.1:
                process.is_alive = False
                world.processes.remove(process)
                populate(world)


def check_that_nothing_stays_locked(world: World) -> None:
    """Check that every caller gets another token at once, when all calls are broken off and all is well again."""
    world.stop()
    for process in world.processes:
        world.check(not process.endpoint.permits.line, "nobody stays in the line")
    world.run(HOUR + 500)  # no pause is longer
    for caller in [caller for process in world.processes for caller in process.callers]:
        caller.unrepeatable = 0.0
        for _ in range(2):  # the first may learn that the last renewal has not helped
            world.run(70)
            world.tokens.clear()
            world.values.clear()
            caller.start()
            world.run(40)
        outcome = caller.outcomes[-1] if caller.outcomes else None
        is_well = outcome == 200 or (isinstance(outcome, Raise) and caller.client.client_secret == WRONG)
        world.check(is_well and caller.held_up < 1 + caller.overtime, "nothing stays locked")


def check_random_worlds(seeds: range) -> None:
    for seed in seeds:
        world = random_world(seed)
        world.run(200)
        check_that_nothing_stays_locked(world)


@pytest.mark.usefixtures("small_quota")
def test_random_worlds(request: pytest.FixtureRequest) -> None:
    options = request.config.option
    check_random_worlds(range(options.first_world, options.first_world + options.worlds))


@pytest.mark.slow
@pytest.mark.usefixtures("small_quota")
def test_hundreds_of_random_worlds() -> None:
    check_random_worlds(range(1_000_000, 1_000_200))


@pytest.mark.usefixtures("small_quota")
def test_a_seed_tells_the_same_world_again() -> None:
    def history(seed: int) -> list[tuple[str, float, float]]:
        world = random_world(seed)
        world.run(100)
        return [(request.caller.client.client_id, request.sent_at, request.answered_at) for request in world.sent]

    assert history(5) == history(5) != history(6)


# Herds


def run_herd(world: World, count: int, seconds: float, loops: int = 0, **options: Any) -> list[Caller]:
    """Let so many threads, and so many tasks in each of `loops`, make a call each at the same moment."""
    process = Process(world)
    places = [None, *(Loop() for _ in range(loops))]
    callers = [Caller(process, CLIENTS[0], loop=loop, **options).start() for loop in places for _ in range(count)]
    world.run(seconds)
    return callers


def outcomes(callers: list[Caller]) -> Counter[object]:
    """Return how many calls came to each status code or kind of decision."""
    found = [outcome for caller in callers for outcome in caller.outcomes]
    return Counter(outcome if isinstance(outcome, int) else type(outcome) for outcome in found)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("count", "loops"), [(60, 0), (20, 2)])
def test_a_cold_herd_costs_one_token_request_for_its_threads_and_one_for_each_loop(
    count: int, loops: int, seed: int
) -> None:
    world = World(seed, preemptions=0.1)
    callers = run_herd(world, count, seconds=60, loops=loops)
    assert outcomes(callers) == {200: 60}
    assert len({request.caller.loop for request in world.sent}) == len(world.sent) == 1 + loops


def test_a_revoked_token_costs_a_herd_one_renewal() -> None:
    world = World(preemptions=0.1)
    callers = run_herd(world, 60, seconds=60)
    world.tokens.clear()
    for caller in callers:
        caller.start()
    world.run(60)
    assert outcomes(callers) == {200: 120}
    assert len(world.sent) == 2


def test_a_herd_over_a_silent_endpoint_is_told_together_after_four_tries() -> None:
    world = World(mood=SILENT)
    callers = run_herd(world, 60, seconds=80)
    assert outcomes(callers) == {Raise: 60}
    assert len(world.sent) == 4
    assert max(caller.done_at for caller in callers) - min(caller.done_at for caller in callers) < 3


def test_one_token_request_that_is_stuck_starves_nobody() -> None:
    """A thread cannot break off whatever holds it up; its turn runs out."""
    world = World(mood=Mood(delay=1e6, stuck_for=1000))
    callers = run_herd(world, 60, seconds=0.5)
    world.mood = WELL
    world.run(PATIENT.timeout + 3)
    assert outcomes(callers) == {200: 59}
    assert len(world.sent) == 2


@pytest.mark.parametrize("expires_in", [1, 2, 3, 4])
def test_a_token_that_is_hardly_alive_when_it_comes_serves_all_who_waited(expires_in: int) -> None:
    """It costs none of them another token request."""
    world = World(mood=Mood(expires_in=expires_in, delay=6))
    callers = run_herd(world, 40, seconds=60)
    assert outcomes(callers) == {200: 40}
    assert len(world.sent) <= 2


@pytest.mark.usefixtures("small_quota")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize(("processes", "store_delay"), [(1, 0.0), (3, 0.01), (3, 1.9)])
def test_the_quota_holds_over_slow_answers_and_broken_calls(processes: int, store_delay: float, seed: int) -> None:
    mood = Mood(delay=15, expires_in=5, lifetime=5)
    world = World(seed, mood, has_store=processes > 1, store_delay=store_delay, interrupts=0.01)
    for _ in range(processes):
        process = Process(world)
        for a_client in CLIENTS:
            Caller(process, a_client, loop=random.choice((None, Loop()))).start(math.inf, pause=5)
    for _ in range(10):
        world.run(60)
        if processes > 1:
            world.processes.pop(0).is_alive = False
            Caller(Process(world), random.choice(CLIENTS)).start(math.inf, pause=5)
    assert len(world.sent) > 40  # and each was looked at


@pytest.mark.usefixtures("small_quota")
def test_the_line_over_the_quota_keeps_its_order_and_tells_the_hopeless_at_once() -> None:
    world = World()
    process = Process(world)
    callers = [Caller(process, client(number)) for number in range(15)]
    for caller in callers:
        caller.start()
        world.run(0.001)
    world.run(5)
    assert outcomes(callers) == {200: 6, TooLong: 3}
    world.run(75)
    assert outcomes(callers) == {200: 12, TooLong: 3}
    assert [request.caller for request in world.sent] == callers[:12]


def test_a_herd_outlives_a_busy_endpoint() -> None:
    world = World(mood=BUSY)
    callers = run_herd(world, 40, seconds=50)
    world.mood = WELL
    world.run(25)
    assert outcomes(callers) == {200: 40}
    assert len(world.sent) < 10


def test_renewals_ahead_that_fail_are_few_and_keep_nobody_waiting() -> None:
    """The first call after the expiry does not hear of them, but asks."""
    world = World(mood=Mood(expires_in=100, lifetime=100))
    process = Process(world)
    callers = [Caller(process, CLIENTS[0]).start(math.inf, pause=5) for _ in range(50)]
    world.run(45)
    world.mood = DOWN
    world.run(52)
    assert 5 <= len(world.sent) <= 8  # with pauses of 2, 4, 8, 16 and 30 seconds
    world.mood = WELL
    world.run(20)
    assert set(outcomes(callers)) == {200}
    assert max(caller.longest for caller in callers) < 1


def test_401s_to_what_cannot_be_sent_again_cost_one_renewal_in_ten_seconds() -> None:
    world = World(mood=Mood(lifetime=1))
    process = Process(world)
    for _ in range(20):
        Caller(process, CLIENTS[0], unrepeatable=1.0).start(math.inf, pause=1)
    world.run(600)
    assert 40 < len(world.sent) <= 62


# What an hour costs


def token_requests_of_an_hour(mood: Mood, secret: str = "right", pause: float = 60, **options: Any) -> int:
    world = World(mood=mood)
    process = Process(world)
    for _ in range(200):
        Caller(process, client(secret=secret), **options).start(math.inf, pause=pause)
    world.run(HOUR)
    return len(world.sent)


@pytest.mark.parametrize(
    ("mood", "secret", "least", "most"),
    [
        pytest.param(DOWN, "right", 300, 450, id="connections-refused"),
        pytest.param(WELL, "wrong", 50, 70, id="wrong-secret"),
        pytest.param(Mood(status=429, retry_after=3600), "right", 1, 1, id="retry-after"),
        pytest.param(Mood(api_refuses_all=True), "right", 50, 100, id="permanent-401s"),
    ],
)
def test_an_hour_of_trouble_costs_200_callers_few_token_requests(
    mood: Mood, secret: str, least: int, most: int
) -> None:
    assert least <= token_requests_of_an_hour(mood, secret) <= most


@pytest.mark.slow
def test_an_hour_of_401s_costs_no_more_where_calls_are_many() -> None:
    assert token_requests_of_an_hour(Mood(api_refuses_all=True), pause=5) <= 100


def test_an_hour_of_401s_to_what_cannot_be_sent_again_costs_few_token_requests() -> None:
    assert token_requests_of_an_hour(Mood(api_refuses_all=True), unrepeatable=1.0) <= 100


# Processes that share a store


def run_processes(world: World, count: int, seconds: float = 60, **options: Any) -> list[Caller]:
    """Let so many processes start at the same moment, and make a call each."""
    callers = [Caller(Process(world, random.uniform(0, 1e6)), CLIENTS[0], **options).start() for _ in range(count)]
    world.run(seconds)
    return callers


def test_a_cold_start_of_40_processes_costs_one_token_request() -> None:
    world = World(has_store=True, preemptions=0.1)
    assert outcomes(run_processes(world, 40)) == {200: 40}
    assert outcomes(run_processes(world, 15)) == {200: 15}  # one script after the other costs nothing
    assert len(world.sent) == 1


def test_when_the_process_that_fetches_is_killed_all_others_are_served_within_its_hold() -> None:
    world = World(mood=Mood(delay=5), has_store=True)
    callers = run_processes(world, 40, seconds=0.5)
    fetches = world.sent[0].caller
    fetches.process.is_alive = False
    world.run(30)
    assert outcomes(callers) == {200: 39}
    assert max(caller.done_at for caller in callers) < fetches.limits.timeout + 1 + 5 + 2
    assert len(world.sent) == 2


@pytest.mark.parametrize("seed", range(3))
def test_two_revocations_cost_12_busy_processes_two_renewals(seed: int) -> None:
    world = World(seed, has_store=True, preemptions=0.05)
    callers = [Caller(Process(world), CLIENTS[0]).start(calls=30, pause=1) for _ in range(12)]
    for _ in range(2):
        world.run(5)
        world.tokens.clear()
    world.run(100)
    assert outcomes(callers) == {200: 360}
    assert len(world.sent) <= 5
    assert max(caller.longest for caller in callers) < 3


def test_a_wrong_secret_costs_70_processes_one_token_request_for_each_pause() -> None:
    world = World(has_store=True)
    for _ in range(70):
        Caller(Process(world), client(secret="wrong")).start(math.inf, pause=20)
    world.run(HOUR / 4)
    sent_at = [request.sent_at for request in world.sent]
    assert all(later - sooner > 10 for sooner, later in pairwise(sent_at))
    assert len(sent_at) <= 20


def test_who_waits_for_another_process_looks_ever_more_rarely_and_every_second_at_least() -> None:
    world = World(mood=Mood(delay=1e9), has_store=True)
    Caller(Process(world), CLIENTS[0]).start()
    world.run(1)
    before, waits = world.store_operations, Caller(Process(world), CLIENTS[0]).start()
    world.run(8.9)  # the first is waiting for its answer, which comes to nothing after 10 s
    assert world.store_operations - before == 14 * 4  # looks, each for a token, the turn, a failure and Retry-After
    world.mood = WELL
    world.run(5)
    assert waits.outcomes == [200]
    assert waits.done_at < 13


def test_who_has_too_little_patience_for_another_process_is_told_when_to_try_again() -> None:
    world = World(mood=Mood(delay=1e9), has_store=True)
    Caller(Process(world), CLIENTS[0]).start()
    world.run(2)
    hasty = Caller(Process(world), CLIENTS[0], Limits(leeway=60, timeout=10, max_wait=3)).start()
    world.run(3.5)
    ((outcome),) = hasty.outcomes
    assert isinstance(outcome, TooLong)
    assert outcome.reason == "is being asked by another process"
    assert outcome.retry_after == pytest.approx(11 - 5, abs=0.2)  # when its turn ends


def test_a_renewal_ahead_that_fails_for_one_process_is_put_off_by_all() -> None:
    """Also by those with more patience: with a token in hand it is no matter of that."""
    world = World(mood=Mood(expires_in=90), has_store=True)
    hasty, patient = Process(world), Process(world)
    callers = [Caller(process, CLIENTS[0]).start() for process in (hasty, patient)]
    world.run(50)
    world.mood = DOWN
    callers.append(Caller(hasty, CLIENTS[0], Limits(leeway=60, timeout=1, max_wait=1)).start())
    world.run(0.5)
    callers.append(Caller(patient, CLIENTS[0]).start())
    world.run(0.5)
    assert outcomes(callers) == {200: 4}
    assert len(world.sent) == 2


def test_permanent_401s_cost_20_processes_no_more_than_one() -> None:
    """Each learns of the renewals of the others, and whether they have helped."""
    world = World(mood=Mood(api_refuses_all=True), has_store=True)
    for process in [Process(world) for _ in range(20)]:
        for _ in range(5):
            Caller(process, CLIENTS[0]).start(math.inf, pause=20)
    world.run(HOUR / 2)
    assert len(world.sent) <= 50


def test_no_call_ends_without_the_token_that_another_process_has_brought() -> None:
    world = World(has_store=True)
    brings, told = Process(world), Process(world)
    Caller(brings, CLIENTS[0]).start()
    world.run(5)
    world.mood = Mood(status=429, retry_after=3000)
    other = Caller(told, CLIENTS[1]).start()  # it closes the endpoint to all calls of its process
    world.run(5)
    caller = Caller(told, CLIENTS[0]).start()
    world.run(5)
    assert outcomes([other]) == {TooLong: 1}
    assert outcomes([caller]) == {200: 1}
    assert len(world.sent) == 2


def test_retry_after_closes_the_endpoint_for_all_processes() -> None:
    world = World(mood=Mood(status=429, retry_after=500), has_store=True)
    assert outcomes(run_processes(world, 40, seconds=100)) == {TooLong: 40}
    run_processes(world, 40, seconds=390)
    assert len(world.sent) == 1


@pytest.mark.usefixtures("small_quota")
def test_processes_share_the_quota_and_are_all_served() -> None:
    world = World(has_store=True)
    callers = [Caller(Process(world), client(number)).start() for number in range(12)]
    world.run(75)
    assert outcomes(callers) == {200: 12}


# Long runs


@pytest.mark.slow
def test_a_day_of_200_callers_in_changing_weather() -> None:
    world = World(7, interrupts=0.0005, preemptions=0.002)
    process = Process(world)
    places = [None, Loop(), Loop()]
    for number in range(200):
        Caller(process, CLIENTS[number % 3], loop=places[number % 3]).start(math.inf, pause=60)
    world.start(climate(world))
    world.run(24 * HOUR)
    check_that_nothing_stays_locked(world)
    told = outcomes(process.callers)
    print(f"A day: {told}, {len(world.sent)} token requests")
    assert told[200] > 0.8 * told.total()
    assert len(world.sent) < 3000


def climate(world: World) -> Life[None]:
    """Let all be well, and every half an hour or so something else for some minutes."""
    while True:
        world.mood = Mood(expires_in=3600)
        yield random.expovariate(1 / 1500)
        world.mood = random.choice(MOODS)
        yield random.expovariate(1 / 300)
        world.tokens.clear()


@pytest.mark.slow
def test_a_thousand_machines_over_one_store(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(mood=Mood(counts=True), has_store=True)
    operations: list[int] = []  # in each second
    world.start(count_operations(world, operations))
    callers = run_processes(world, 1000)
    assert outcomes(callers) == {200: 1000}
    assert len(world.sent) == 1
    longest_wait, most_operations = max(caller.held_up for caller in callers), max(operations)

    for caller in callers:
        caller.start(math.inf, pause=120)
    world.run(HOUR)
    assert set(outcomes(callers)) == {200}
    token_requests, operations_of_hour = len(world.sent), sum(operations)

    world.run(HOUR - 300)
    sent_before, calls_before = len(world.sent), outcomes(callers)
    world.is_store_away = True  # while the token expires
    world.run(600)
    world.is_store_away = False
    sent_without, calls_without = len(world.sent) - sent_before, outcomes(callers) - calls_before
    world.run(120)
    sent_before, calls_before = len(world.sent), outcomes(callers)
    world.run(HOUR)
    calls_after = outcomes(callers) - calls_before
    sent_after = len(world.sent) - sent_before
    assert longest_wait < 5
    assert most_operations < 50_000
    assert token_requests <= 4
    assert calls_without[200] > 0.5 * calls_without.total()
    assert set(calls_after) == {200}
    assert sent_after <= 4
    with capsys.disabled():
        print(
            f"""
1000 machines that start at once wait {longest_wait:.1f} s at most and make {most_operations} store operations in the
busiest second. The first hour costs {token_requests} token requests and {operations_of_hour} store operations.
When the store is away for ten minutes while the token expires, {sent_without} token requests are made, and
{calls_without.total() - calls_without[200]} of {calls_without.total()} calls fail. The hour after that costs
{sent_after} token requests, and no call fails."""
        )


def count_operations(world: World, operations: list[int]) -> Life[None]:
    while True:
        before = world.store_operations
        yield 1
        operations.append(world.store_operations - before)
