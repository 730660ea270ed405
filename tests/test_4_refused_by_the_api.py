"""4. A 401 from the API: the token is renewed, the request sent once more, and what does not help is not repeated."""

from __future__ import annotations

import io
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from conftest import BLOCKING, INSTALLED, ON_REQUESTS, Driver, Log, Reply, outcome, statuses, url
from herd import CLIENT, NO_ROUTE, NOW, SILENCE, Herd, a_call, a_token, access_token, limits, response, token, tokens

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

OLD = a_token("old", expires_at=NOW + 600, half_life=NOW + 60, arrived_at=NOW - 9)
NEW = a_token("new", expires_at=NOW + 3600, half_life=NOW + 1800, arrived_at=NOW)
STALE = a_token("stale", expires_at=NOW + 30, half_life=NOW - 1, arrived_at=NOW - 9)
EXPIRED = a_token("old", expires_at=NOW - 1, half_life=NOW - 60, arrived_at=NOW - 99)
FAULT = Fault(FaultKind.UNREACHABLE, "", "")
FAILURE = Failure(FAULT, timeout=10, max_wait=75, met_at=NOW - 1, memory=2)


# What to do, and what is known then


@pytest.mark.parametrize(
    ("known", "call", "decision"),
    [
        (Known(OLD), a_call(), Fetch()),
        (Known(EXPIRED), a_call(), Fetch()),
        (Known(replace(STALE, access_token="old")), a_call(), Fetch()),
        (Known(), a_call(), Fetch()),
        (Known(OLD, ahead_after=NOW + 9), a_call(), Fetch()),  # although a renewal failed ahead of time
        (Known(OLD, FAILURE), a_call(), Raise(FAILURE)),
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
    ],
)
def test_what_to_do_after_a_401(known: Known, call: Call, decision: Decision) -> None:
    assert decide(known, NOW, call, "old") == decision


def test_without_a_401_what_did_not_help_is_no_matter() -> None:
    renewals = Renewals(pause=60, after=NOW + 60, unrepeatable_after=NOW + 10)
    for known, decision in ((OLD, Use(OLD)), (None, Fetch()), (EXPIRED, Fetch())):
        assert decide(Known(known, renewals=renewals), NOW, a_call(repeatable=False)) == decision


def test_the_end_of_a_call_whose_budget_is_spent() -> None:
    assert over(a_call(), NOW, None, NOW + 2, "why") == TooLong(2, "why")
    assert over(a_call(), NOW, "old", NOW + 2, "why") == GiveUp(2)  # there is a 401 to be content with
    assert over(a_call(insists=True), NOW, "old", NOW + 2, "why") == TooLong(2, "why")
    assert over(a_call(), NOW, "old", NOW - 2, "why") == GiveUp(0)


PAUSED = Renewals(pause=4, after=NOW + 4, unrepeatable_after=NOW + 9, on_trial="x", has_replay=True)
ON_TRIAL = replace(PAUSED, on_trial="new")
FRUITLESS = replace(PAUSED, pause=8, after=NOW + 8, on_trial=None)


@pytest.mark.parametrize(
    ("token", "call", "renewals"),
    [
        (NEW, a_call(), ON_TRIAL),
        (NEW, a_call(repeatable=False), replace(ON_TRIAL, has_replay=False, unrepeatable_after=NOW + 10)),
        (NEW, a_call(insists=True), replace(ON_TRIAL, has_replay=False)),
        (replace(OLD, arrived_at=NOW), a_call(), FRUITLESS),  # the same token again is no renewal
        (OLD, a_call(repeatable=False), replace(FRUITLESS, unrepeatable_after=NOW + 10)),
    ],
)
def test_what_is_known_after_a_renewal(token: Token, call: Call, renewals: Renewals) -> None:
    known = Known(OLD, FAILURE, NOW + 9, PAUSED)
    assert landed(known, token, call, NOW, "old") == Known(token, None, 0.0, renewals)


def test_a_failure_is_no_matter_of_renewals() -> None:
    assert failed(Known(NEW, renewals=PAUSED), FAULT, a_call(), NOW).renewals == PAUSED


def test_a_pause_without_renewals_doubles_from_one_second_to_sixty() -> None:
    known = Known(NEW, renewals=Renewals(unrepeatable_after=NOW + 9, on_trial="new"))
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        known = fruitless(known, NOW)
        assert known == Known(NEW, renewals=Renewals(pause, NOW + pause, NOW + 9, None))


TRIED = Renewals(unrepeatable_after=NOW + 9, on_trial="new", has_replay=True)
HELPED = replace(TRIED, on_trial=None)
NOT_HELPED = replace(HELPED, pause=1, after=NOW + 1)
NO_REPLAY = replace(TRIED, has_replay=False)
PAUSED_BEFORE = replace(TRIED, pause=4, after=NOW - 1)
NOT_HELPED_AGAIN = replace(HELPED, pause=8, after=NOW + 8)
COUNTED = replace(NOT_HELPED, after=NOW + 0.5)


@pytest.mark.parametrize(
    ("before", "access_token", "status", "of_replay", "after"),
    [
        (TRIED, "new", 401, True, NOT_HELPED),
        (TRIED, "new", 200, True, HELPED),
        (TRIED, "new", 500, True, HELPED),
        (TRIED, "new", 403, True, HELPED),
        (TRIED, "new", None, True, NO_REPLAY),
        (PAUSED_BEFORE, "new", 401, True, NOT_HELPED_AGAIN),
        (PAUSED_BEFORE, "new", 200, True, HELPED),
        (COUNTED, "new", 401, True, COUNTED),
        (COUNTED, "new", 200, True, HELPED),
        # Another call's: the replay will tell, unless there is none, or renewals have not helped before.
        (TRIED, "new", 401, False, TRIED),
        (TRIED, "new", 200, False, TRIED),
        (PAUSED_BEFORE, "new", 200, False, PAUSED_BEFORE),
        (PAUSED_BEFORE, "new", 401, False, NOT_HELPED_AGAIN),
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


def when_renewed(herd: Herd, seconds: float, call: Callable[[], object]) -> list[float]:
    """Return when token requests are made for a call in every half second."""
    start = herd.now
    while herd.now < start + seconds:
        call()
        herd.wait(0.5)
    return [sent - start for sent in herd.sent[1:]]


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
    renewed = when_renewed(herd, 300, lambda: a_401(herd, replay=401))
    assert renewed == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    herd.wait(60)
    assert a_401(herd, replay=200)
    assert a_401(herd, replay=401)  # at once: the last one has helped
    assert not a_401(herd)


def test_a_call_that_is_always_refused_between_good_ones_does_not_cost_a_renewal_each(herd: Herd) -> None:
    def calls() -> None:
        a_401(herd, replay=401)
        herd.credentials.answered(f"t{len(herd.sent)}", 200)

    assert when_renewed(herd, 30, calls) == [0, 1, 3, 7, 15]


def test_what_cannot_be_sent_again_costs_one_renewal_in_ten_seconds(herd: Herd) -> None:
    def calls() -> None:
        a_401(herd, repeatable=False)
        herd.credentials.answered(f"t{len(herd.sent)}", 200)  # each renewal has helped

    assert when_renewed(herd, 30, calls) == [0, 10, 20]
    assert a_401(herd) == "t5"  # which puts off nobody else


def test_a_server_that_gives_the_same_token_again_is_asked_ever_more_rarely(log: Log) -> None:
    herd, call = Herd(token("t1")), Call(limits())
    herd.call()
    assert when_renewed(herd, 30, lambda: herd.call("t1", call=call)) == [0, 1, 3, 7, 15]
    assert call.renewed is None
    assert {level for level, _ in log()} == {"DEBUG"}  # nothing was renewed


@pytest.mark.parametrize(
    ("answers", "may_renew"),
    [
        ([("t2", 200)], True),
        ([("t2", 401)], False),
        ([("t2", 200), ("t2", 401)], True),
        ([("t2", 401), ("t2", 200)], False),
        ([("t1", 401), ("t2", 200)], True),  # the first is late, and to the older token
        ([("t1", 200), ("t2", 401)], False),
    ],
)
@pytest.mark.parametrize("repeatable", [True, False], ids=["a replay that is broken off", "no replay"])
def test_without_a_replay_the_first_answer_to_the_new_token_tells(
    herd: Herd, answers: list[tuple[str, int]], may_renew: bool, repeatable: bool
) -> None:
    """Whichever call it is of."""
    a_401(herd, replay=None, repeatable=repeatable)
    for answered, status in answers:
        herd.credentials.answered(answered, status)
    assert isinstance(herd.call("t2"), Use if may_renew else GiveUp)


def test_a_good_call_does_not_say_that_a_renewal_has_helped_which_its_replay_will_tell(herd: Herd) -> None:
    a_401(herd, replay=401)
    herd.wait(1)
    herd.call("t2")
    herd.credentials.answered("t3", 200)
    herd.credentials.replayed("t3", 401)
    assert herd.call("t3") == GiveUp(2)


def test_what_another_thread_learns_at_the_same_moment_is_not_lost() -> None:
    learnt = Known(NEW)

    def clock() -> float:
        credentials.known = learnt
        return NOW

    credentials = Credentials(CLIENT, Endpoint(), clock=clock)
    credentials.known = Known(OLD)
    credentials.replayed("old", 401)
    assert credentials.known == learnt


def test_who_insists_waits_for_a_token_that_is_another() -> None:
    """There is no 401 to be content with."""
    herd = Herd(token("t1"), token("t1"), token("t1"), token("t2"))
    herd.call()
    decision = herd.call("t1", call=Call(limits(max_wait=2.5), insists=True))
    assert isinstance(decision, TooLong)
    assert decision.retry_after == pytest.approx(2)
    assert decision.reason == "gives tokens that are refused, one after the other"
    assert access_token(herd.call("t1", call=Call(limits(), insists=True))) == "t2"
    assert herd.sent == pytest.approx([0, 0, 1, 3])


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
    assert access_token(herd.call("t1", max_wait=0)) == "t2"


def test_a_renewal_that_would_take_longer_is_no_matter_of_the_401(herd: Herd) -> None:
    herd.then(response(429, Retry_After="80"))
    decision = herd.call("t1")
    assert isinstance(decision, TooLong)
    assert decision.retry_after == pytest.approx(80)


# Over real sockets


@pytest.fixture
def signed(driver: Driver, sandbox: NexusSandbox) -> Any:
    """A client whose token has just been revoked."""
    client = driver.client(driver.auth(sandbox))
    assert driver.get(client, url(sandbox)).status == 200
    sandbox.revoke_tokens()
    return client


REQUESTS = [name for name in BLOCKING if name == "requests"]
HTTPX = [name for name in BLOCKING if name != "requests"]


def test_a_revoked_token_costs_one_renewal(driver: Driver, sandbox: NexusSandbox, signed: Any) -> None:
    reply = driver.get(signed, url(sandbox))
    assert (reply.status, reply.history) == (200, [401])  # not the token request
    assert driver.get(signed, url(sandbox)) == (200, reply.body, [])
    first, refused, replay, next_call = [arrival.headers["Authorization"] for arrival in sandbox.requests]
    assert first == refused != replay == next_call
    assert len(sandbox.token_requests) == 2
    sandbox.revoke_tokens()
    assert statuses(driver.at_once([signed] * 10, url(sandbox))) == {200}
    assert len(sandbox.token_requests) == 3


CONTENT = b"0123456789" * 20_000


def a_file(content: bytes = CONTENT, stands_at: int = 0) -> io.BytesIO:
    file = io.BytesIO(content)
    file.seek(stands_at)
    return file


def in_the_middle() -> io.BytesIO:
    return a_file(b"not this" + CONTENT, stands_at=8)


class Pipe(io.BytesIO):
    """A file that cannot seek."""

    def tell(self) -> int:
        raise io.UnsupportedOperation

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation


class Once:
    """A collection by its methods, which has its content once only, like a progress bar around a generator."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = iter(parts)

    def __len__(self) -> int:
        return 9

    def __contains__(self, part: object) -> bool:
        return False

    def __iter__(self) -> Any:
        yield from self.parts


class ClosesItself(io.BytesIO):
    """A file that is closed once it has been read."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if not content:
            self.close()
        return content


Options = Callable[[Driver], dict[str, Any]]
FROM_THERE = {"Content-Length": str(len(CONTENT))}  # httpx counts from the start of a file
SENT_AGAIN: dict[str, tuple[list[str], Options, bytes]] = {
    "json": (INSTALLED, lambda _: {"json": {"amount": "12.50"}}, b"12.50"),
    "files": (INSTALLED, lambda _: {"files": [("1", a_file()), ("2", a_file(stands_at=8))]}, CONTENT),
    "multipart": (BLOCKING, lambda _: {"files": {"file": ("name", CONTENT)}, "data": {"a": "1"}}, CONTENT),
    "form": (BLOCKING, lambda _: {"data": {"a": "1", "b": "\u00fc"}}, b"a=1&b=%C3%BC"),
    "bytes": (BLOCKING, lambda _: {"body": CONTENT}, CONTENT),
    "no bytes": (BLOCKING, lambda _: {"body": b""}, b""),
    "text": (BLOCKING, lambda _: {"body": "12.50"}, b"12.50"),
    "a file": (BLOCKING, lambda _: {"body": a_file()}, CONTENT),
    "an empty file": (BLOCKING, lambda _: {"body": a_file(b"")}, b""),
    "a file from the middle": (REQUESTS, lambda _: {"body": in_the_middle()}, CONTENT),
    "a bytearray": (REQUESTS, lambda _: {"body": bytearray(CONTENT)}, CONTENT),
    "a memoryview": (REQUESTS, lambda _: {"body": memoryview(CONTENT)}, CONTENT),
    "a deque of bytes": (REQUESTS, lambda _: {"body": deque([b"4", b"2"])}, b"42"),  # whose length it sends
    "a file from where it stands": (HTTPX, lambda _: {"body": in_the_middle(), "headers": FROM_THERE}, CONTENT),
    "values of a dict": (HTTPX, lambda _: {"body": {1: CONTENT, 2: b"the end"}.values()}, CONTENT + b"the end"),
    "a list of chunks": (HTTPX, lambda _: {"body": [CONTENT, b"", b"the end"]}, CONTENT + b"the end"),
}
NOT_SENT_AGAIN: dict[str, tuple[list[str], Options]] = {
    "a generator": (INSTALLED, lambda driver: {"body": driver.generator([b"all ", b"of it"])}),
    "a pipe": (BLOCKING, lambda _: {"body": Pipe(b"all of it")}),
    "a file that is closed meanwhile": (BLOCKING, lambda _: {"body": ClosesItself(b"all of it")}),
    "what only looks like a collection": (BLOCKING, lambda _: {"body": Once(b"all of it"), "timeout": 5}),
    "an iterator": (BLOCKING, lambda _: {"body": iter([b"all ", b"of it"])}),
    "a multipart of a pipe": (HTTPX, lambda _: {"files": {"file": Pipe(b"all of it")}}),
}


def on_drivers(bodies: dict[str, Any], *arguments: str) -> pytest.MarkDecorator:
    """Run a test with each of these bodies on each driver that is named for it."""
    rows = [
        pytest.param(driver, *row, id=f"{driver}: {name}")
        for name, (drivers, *row) in bodies.items()
        for driver in drivers
    ]
    return pytest.mark.parametrize(("driver", *arguments), rows, indirect=["driver"])


def check_replay(sandbox: NexusSandbox, reply: Reply, content: bytes) -> None:
    assert (reply.status, reply.history) == (200, [401])
    refused, accepted = sandbox.requests[-2:]
    assert accepted.body == refused.body
    assert content in accepted.body
    assert b"not this" not in accepted.body
    for name in ("Content-Length", "Transfer-Encoding", "Content-Type"):
        assert accepted.headers[name] == refused.headers[name]


@on_drivers(SENT_AGAIN, "options", "content")
def test_what_is_whole_is_sent_again(
    driver: Driver, sandbox: NexusSandbox, signed: Any, options: Options, content: bytes
) -> None:
    check_replay(sandbox, driver.send(signed, "POST", url(sandbox), **options(driver)), content)


@pytest.mark.parametrize("open_file", [tempfile.TemporaryFile, tempfile.SpooledTemporaryFile])
@pytest.mark.parametrize("driver", BLOCKING, indirect=True)
def test_a_file_on_disk_is_sent_again(driver: Driver, sandbox: NexusSandbox, signed: Any, open_file: Any) -> None:
    with open_file() as file:
        file.write(CONTENT)
        file.seek(0)
        check_replay(sandbox, driver.send(signed, "POST", url(sandbox), file), CONTENT)


@on_drivers(NOT_SENT_AGAIN, "options")
def test_what_cannot_be_sent_again_gets_its_401(
    driver: Driver, sandbox: NexusSandbox, signed: Any, options: Options, log: Log
) -> None:
    """The token is renewed all the same, but for such requests only once in ten seconds."""
    reply = driver.send(signed, "POST", url(sandbox), **options(driver))
    assert (reply.status, reply.history) == (401, [])
    assert b"all of it" in sandbox.requests[-1].body
    assert log()[-1] == ("INFO", f"POST {url(sandbox)}: not sent again after a 401, since its body cannot be")
    assert driver.get(signed, url(sandbox)).status == 200
    assert (len(sandbox.requests), len(sandbox.token_requests)) == (3, 2)
    sandbox.revoke_tokens()
    assert driver.send(signed, "POST", url(sandbox), **options(driver)).status == 401
    assert len(sandbox.token_requests) == 2
    assert driver.get(signed, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 3


@pytest.mark.parametrize("driver", BLOCKING, indirect=True)
def test_what_cannot_be_sent_again_gets_its_401_though_its_renewal_fails(
    driver: Driver, sandbox: NexusSandbox, signed: Any
) -> None:
    sandbox.fail_token_requests(status=400, json={"error": "invalid_client"})
    assert driver.send(signed, "POST", url(sandbox), driver.generator([b"x"])).status == 401
    assert isinstance(outcome(driver.get, signed, url(sandbox)), driver.door.TokenRequestError)
    assert len(sandbox.token_requests) == 2


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


@pytest.mark.parametrize("driver", BLOCKING, indirect=True)
def test_cookies_of_the_401_go_with_the_replay(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    for status, cookie in ((200, "session=old"), (200, "kept=1"), (401, "session=new")):
        sandbox.answer("/customer", status=status, headers={"Set-Cookie": f"{cookie}; Path=/"})
    for _ in range(4):
        assert driver.get(client, url(sandbox)).status == 200
    cookies = [set((arrival.headers["Cookie"] or "").split("; ")) for arrival in sandbox.requests]
    *_, refused, replay, next_call = cookies
    assert refused == {"session=old", "kept=1"}
    assert replay == next_call == {"session=new", "kept=1"}


def test_the_second_answer_is_the_callers(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And renewals that do not help are put off, here for a minute at once."""
    monkeypatch.setattr("nexus_auth.known.FRUITLESS_PAUSE", 60.0)
    client = driver.client(driver.auth(sandbox))
    for body in ("first", "second", "first"):
        sandbox.answer("/forbidden", status=401, body=body)
    assert driver.get(client, url(sandbox, "/forbidden")) == (401, b"second", [401])
    assert driver.get(client, url(sandbox)).status == 200
    assert driver.get(client, url(sandbox, "/forbidden")) == (401, b"first", [])  # another token would not help
    assert len(sandbox.token_requests) == 2


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
    error: Any = outcome(driver.get, signed, url(sandbox))
    assert isinstance(error, driver.door.TokenWaitError)
    assert 99 < error.retry_after <= 100


def test_a_401_after_a_token_that_took_long(driver: Driver, sandbox: NexusSandbox) -> None:
    """What is left of `max_wait` is less than the second that the token endpoint asks for then."""
    stranger = {"access_token": "unknown", "token_type": "Bearer"}
    sandbox.fail_token_requests(status=200, json=stranger, delay=0.3)
    sandbox.fail_token_requests(status=429, retry_after=1)
    client = driver.client(driver.auth(sandbox, max_wait=1.2))
    assert isinstance(outcome(driver.get, client, url(sandbox)), driver.door.TokenWaitError)


def test_what_a_call_has_waited_counts_after_a_redirect_too(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, max_wait=0.1))
    sandbox.fail_token_requests(status=200, json={"access_token": "unknown", "token_type": "Bearer"}, delay=0.2)
    sandbox.answer("/old", status=302, headers={"Location": "/customer"})
    assert driver.get(client, url(sandbox, "/old")).status == 401
    assert len(sandbox.token_requests) == 1


@ON_REQUESTS
def test_what_a_request_has_waited_is_no_matter_when_it_is_sent_again(driver: Driver, sandbox: NexusSandbox) -> None:
    session = driver.ready_made(sandbox, max_wait=0)
    request = session.prepare_request(driver.library.Request("GET", "/customer"))
    for _ in range(2):
        assert session.send(request).status_code == 200
        sandbox.revoke_tokens()


def test_what_one_call_has_waited_is_no_matter_to_the_next(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox, max_wait=0.1))
    sandbox.fail_token_requests(status=200, json={"access_token": "unknown", "token_type": "Bearer"}, delay=0.2)
    assert driver.get(client, url(sandbox)).status == 401  # it has spent its `max_wait`
    assert driver.get(client, url(sandbox)).status == 200


def test_what_no_refused_token_can_be(driver: Driver, sandbox: NexusSandbox) -> None:
    auth = driver.auth(sandbox)
    token = driver.access_token(auth)
    wrong: dict[type[Exception], list[Any]] = {ValueError: [f"Bearer {token}", ""], TypeError: [token.encode(), True]}
    for kind, values in wrong.items():
        for refused in values:
            with pytest.raises(kind, match="refused"):
                driver.access_token(auth, refused=refused)
    assert driver.access_token(auth) == token


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
