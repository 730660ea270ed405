"""The client credentials grant driven by hand: no network, no waiting, and a clock that is set."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, quote_plus

import pytest
from conftest import Clock, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_auth import Environment, TokenRequestError, TokenWaitError
from nexus_auth.grant import Sleep, Terms, Token, TokenRequest, client_credentials_grant, form
from nexus_auth.quota import LIMIT, Quota, Slot

ENVIRONMENT = Environment("here", token_endpoint="https://id.example/connect/token", base_url="https://api.example")
SECRET = "s3cret /+&=%~é\"'<:>"


class LibraryError(Exception):
    """The base of all errors of an HTTP library."""


class ConnectError(LibraryError):
    """An error of that library, as it raises it."""


class LibraryTokenRequestError(TokenRequestError, LibraryError):
    """What a door raises."""


class LibraryTokenWaitError(TokenWaitError, LibraryError):
    """What a door raises."""


class Response(NamedTuple):
    """A response of any library."""

    status_code: int
    content: bytes
    headers: Mapping[str, str] = MappingProxyType({})


Answer = Response | Exception


def response(document: Any, status: int = 200, **headers: str) -> Response:
    return Response(status, json.dumps(document).encode(), {name.replace("_", "-"): headers[name] for name in headers})


def fault(status: int, **headers: str) -> Response:
    return response(None, status, **headers)


GOOD = response({"access_token": "t0ken", "token_type": "Bearer", "expires_in": 3600})


def terms(max_wait: float = 75, timeout: float = 10, client_id: str = "abc", secret: str = SECRET) -> Terms:
    errors = LibraryError, LibraryTokenRequestError, LibraryTokenWaitError
    return Terms(ENVIRONMENT, client_id, secret, "api1", 60, timeout, max_wait, *errors)


class Grant:
    """One run of the grant: it is given `answers` in order, each after `takes` seconds, and nothing is waited for."""

    def __init__(self, *answers: Answer, takes: float = 0.25, quota: Quota | None = None, **options: Any) -> None:
        self.answers = list(answers)
        self.takes = takes
        self.clock = Clock()
        self.quota = quota or Quota()
        ahead = options.pop("ahead", False)
        self.terms = terms(**options)
        deadline = self.clock() + self.terms.max_wait
        self.steps = client_credentials_grant(self.terms, self.quota, deadline, ahead, self.clock)
        self.sleeps: list[float] = []
        self.requests: list[TokenRequest] = []

    def run(self) -> Token:
        """Return the token that the grant comes to, or raise its error."""
        answer: Any = None
        while True:
            try:
                step = self.steps.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            if isinstance(step, TokenRequest):
                self.requests.append(step)
                self.clock.now += min(self.takes, step)
                answer = self.answers.pop(0)
            else:
                assert isinstance(step, Sleep)
                assert step > 0
                self.sleeps.append(step)
                self.clock.now += step
                answer = None

    def error(self) -> Any:
        """Return the error that the grant comes to, which is one of the library."""
        with pytest.raises(LibraryError) as raised:
            self.run()
        return raised.value


def used_up(clock: Clock, ago: float = 0.0, times: int = LIMIT) -> Quota:
    """Return a quota from which `times` requests were made `ago` seconds before `clock`."""
    quota = Quota()
    for slot in [Slot() for _ in range(times)]:
        assert quota.wait(slot, clock() - ago) == 0
        quota.release(slot, clock() - ago)
    return quota


# The token request and its answer (RFC 6749 sections 4.4.2, 4.4.3, 5.1)


def test_a_token() -> None:
    grant = Grant(GOOD)
    token = grant.run()
    assert token.authorization == "Bearer t0ken"
    assert token.expires_at == 1000 + 3600  # from when it was asked for, not from when it came
    assert (grant.requests, grant.sleeps) == ([TokenRequest(10)], [])


@pytest.mark.parametrize("secret", [SECRET, "a b+c&d=e%41", "\N{KEY}", "a:b", '"'])
def test_the_form_has_four_fields(secret: str) -> None:
    body = form(terms(client_id=f"id {secret}", secret=secret))
    assert sorted(parse_qsl(body, strict_parsing=True)) == [
        ("client_id", f"id {secret}"),
        ("client_secret", secret),
        ("grant_type", "client_credentials"),
        ("scope", "api1"),
    ]


@pytest.mark.parametrize(
    ("expires_in", "lifetime"),
    [
        (3600, 3600), (1, 1), (20.5, 20.5), ("3600", 3600), ("1e3", 1000), (1e9, 1e9),
        (None, math.inf), (0, math.inf), (-5, math.inf), (0.5, math.inf), (True, math.inf), ("soon", math.inf),
        ("", math.inf), ([], math.inf), ({}, math.inf), ([3600], math.inf), (math.nan, math.inf), (math.inf, math.inf),
        (-math.inf, math.inf), (10**400, math.inf), ("nan", math.inf), ("-inf", math.inf), ("9" * 5000, math.inf),
    ],
    ids=lambda value: repr(value)[:9],
)  # fmt: skip
def test_a_lifetime(expires_in: Any, lifetime: float) -> None:
    token = Grant(response({"access_token": "t", "token_type": "bearer", "expires_in": expires_in})).run()
    assert token.expires_at == 1000 + lifetime
    assert token.is_fresh(1000, leeway=1e9)


def test_an_absurd_lifetime_is_a_lifetime() -> None:
    token = Grant(response({"access_token": "t", "token_type": "Bearer", "expires_in": 1e308})).run()
    assert token.expires_at >= 1e308


def test_the_leeway_is_never_more_than_half_of_the_lifetime() -> None:
    token = Token("t", 100, 1000)
    assert [token.is_fresh(1000 + age, leeway=10) for age in (0, 89, 90, 91)] == [True, True, False, False]
    assert [token.is_fresh(1000 + age, leeway=60) for age in (0, 49, 50, 51)] == [True, True, False, False]
    assert [token.is_fresh(1000 + age, leeway=0) for age in (0, 99, 100)] == [True, True, False]


@pytest.mark.parametrize("token_type", ["Bearer", "bearer", "BEARER", None])
def test_token_types(token_type: str | None) -> None:
    members = {"token_type": token_type} if token_type else {}
    assert Grant(response({"access_token": "t", **members})).run().authorization == "Bearer t"


NO_TOKENS = {
    "nothing": b"",
    "html": b"<html>",
    "null": b"null",
    "list": b'["access_token"]',
    "string": b'"token"',
    "deep": b"[" * 99999,
    "bad utf-8": b'{"access_token": "\xff"}',
    "long number": b'{"access_token": "t", "x": ' + b"9" * 9999 + b"}",
    "no access_token": b'{"token_type": "Bearer", "expires_in": 1}',
    "null token": b'{"access_token": null}',
    "number": b'{"access_token": 1}',
    "empty": b'{"access_token": ""}',
    "space": b'{"access_token": "a b"}',
    "newline": b'{"access_token": "a\\n"}',
    "control": b'{"access_token": "a\\u0000"}',
    "umlaut": b'{"access_token": "\\u00e4"}',
    "surrogate": b'{"access_token": "\\ud800"}',
    "mac": b'{"access_token": "t", "token_type": "mac"}',
    "null type": b'{"access_token": "t", "token_type": null}',
    "odd type": b'{"access_token": "t", "token_type": []}',
}


@pytest.mark.parametrize("name", NO_TOKENS)
def test_an_answer_that_is_no_token(name: str) -> None:
    grant = Grant(Response(200, NO_TOKENS[name]))
    error = grant.error()
    assert isinstance(error, LibraryTokenRequestError)
    assert (error.status_code, error.error, error.environment) == (200, None, ENVIRONMENT)
    assert str(error).startswith("token endpoint https://id.example/connect/token (here) gave ")
    assert len(grant.requests) == 1


# Error responses (RFC 6749 section 5.2)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404])
@pytest.mark.parametrize("code", ["invalid_client", "invalid_scope", "unauthorized_client"])
def test_an_oauth_error_is_not_tried_again(status: int, code: str) -> None:
    grant = Grant(response({"error": code, "error_description": "no such\nclient"}, status, Retry_After="1"))
    error = grant.error()
    assert isinstance(error, LibraryTokenRequestError)
    assert (error.error, error.error_description, error.status_code) == (code, "no such client", status)
    assert f"refused client 'abc': {code}, no such client (HTTP {status}). Check client_id" in str(error)
    assert (len(grant.requests), grant.sleeps) == (1, [])


@pytest.mark.parametrize(
    "document", [{"error": 7}, {"error": []}, {"error": None, "error_description": {}}, {"error": ""}]
)
def test_odd_members_of_an_error_are_passed_over(document: Any) -> None:
    error = Grant(response(document, 400)).error()
    assert (error.error, error.error_description, error.status_code) == (None, None, 400)


def test_a_redirect_says_where_to() -> None:
    error = Grant(fault(302, Location="https://else.example/token")).error()
    assert "redirected to https://else.example/token, which is not followed (HTTP 302)" in str(error)


def test_a_long_description_is_cut() -> None:
    error = Grant(response({"error": "invalid_client", "error_description": "long " * 9999}, 400)).error()
    assert len(str(error)) < 600


# Tries


FAULTS: list[Answer] = [ConnectError("no route"), LibraryError("timed out"), *map(fault, (429, 500, 502, 503, 504))]


@pytest.mark.parametrize("answer", FAULTS, ids=str)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_fault_is_tried_again(answer: Answer, times: int) -> None:
    grant = Grant(*[answer] * times, GOOD)
    assert grant.run().authorization == "Bearer t0ken"
    assert len(grant.requests) == times + 1
    assert len(grant.sleeps) == times
    assert all(0.25 * 2**n <= sleep <= 0.5 * 2**n for n, sleep in enumerate(grant.sleeps))


def test_the_token_is_as_old_as_the_try_that_got_it() -> None:
    grant = Grant(fault(503), GOOD)
    assert grant.run().expires_at == 1000 + 0.25 + grant.sleeps[0] + 3600


def test_the_back_off_doubles_and_has_jitter() -> None:
    grants = [Grant(*[fault(503)] * 3, GOOD) for _ in range(50)]
    for grant in grants:
        grant.run()
    for number, least in enumerate((0.25, 0.5, 1)):
        sleeps = {grant.sleeps[number] for grant in grants}
        assert len(sleeps) > 40
        assert least <= min(sleeps) < 1.5 * least < max(sleeps) <= 2 * least


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_after_four_tries_the_answer_is_the_error(status: int) -> None:
    grant = Grant(*[fault(status)] * 4)
    error = grant.error()
    assert isinstance(error, LibraryTokenRequestError)
    assert (error.status_code, error.error) == (status, None)
    assert (len(grant.requests), len(grant.sleeps)) == (4, 3)


def test_after_four_tries_the_librarys_own_error_is_raised() -> None:
    failures = [ConnectError(f"no route {number}") for number in range(4)]
    grant = Grant(*failures)
    error = grant.error()
    assert error is failures[3]
    assert type(error) is ConnectError
    assert "https://id.example/connect/token" in str(error)
    assert "ConnectError: no route 3" in str(error)
    assert (len(grant.requests), len(grant.sleeps)) == (4, 3)


def test_the_same_error_raised_again_is_explained_once() -> None:
    error = Grant(*[ConnectError("no route")] * 4).error()
    assert str(error).count("could not be reached") == 1
    assert str(error).endswith("ConnectError: no route")


@pytest.mark.parametrize("failure", [RuntimeError("the client has been closed"), TypeError("odd"), OSError("disk")])
def test_what_is_no_fault_of_the_endpoint_is_raised_at_once(failure: Exception) -> None:
    grant = Grant(failure)
    with pytest.raises(type(failure)) as raised:
        grant.run()
    assert raised.value is failure
    assert str(failure) in ("the client has been closed", "odd", "disk")
    assert len(grant.requests) == 1


def test_faults_of_all_kinds_share_the_four_tries() -> None:
    grant = Grant(ConnectError(), fault(503), fault(429, Retry_After="3"), GOOD)
    grant.run()
    assert grant.sleeps[2] == 3


def test_a_retry_is_logged_as_a_warning_without_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nexus_auth")
    Grant(fault(503), ConnectError(SECRET), GOOD).run()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [re.search("failed with ([^:]+)", warning) is not None for warning in warnings] == [True, True]
    assert "HTTP 503" in warnings[0]
    assert "ConnectError" in warnings[1]
    assert SECRET not in caplog.text
    assert "t0ken" not in caplog.text


# Retry-After (RFC 9110 section 10.2.3)

NOW = 784111770.0  # Sun, 06 Nov 1994 08:49:30 GMT


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It is 08:49:30 GMT on 6 November 1994, in a place that is not on GMT."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setenv("TZ", "XYZ-07:00")
    if hasattr(time, "tzset"):
        time.tzset()
    yield
    monkeypatch.undo()
    if hasattr(time, "tzset"):
        time.tzset()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7), ("0007", 7), ("60", 60),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 7),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 7),  # obsolete, as is the next; a recipient must take both
        ("Sun Nov  6 08:49:37 1994", 7),
        ("Sun, 06 Nov 1994 09:49:37 +0100", 7),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("wall_clock")
def test_retry_after_is_obeyed(status: int, value: str, seconds: float) -> None:
    grant = Grant(fault(status, Retry_After=value), GOOD)
    grant.run()
    assert grant.sleeps == [seconds]


@pytest.mark.parametrize(
    "value",
    [
        "0", "-5", "", " ", "soon", "1.5", "1e9", "+7", "0x10", "7 s", "\u00b2", "7, 8",
        "Sun, 06 Nov 1994 08:49:23 GMT",
        "Sun, 06 Nov 1994", "08:49:37", "\udcff", "GMT",
        "Sun, 06 Nov 99999999 08:49:37 GMT",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("wall_clock")
def test_an_odd_or_past_retry_after_leaves_the_back_off(value: str) -> None:
    grant = Grant(fault(503, Retry_After=value), GOOD)
    grant.run()
    assert 0.25 <= grant.sleeps[0] <= 0.5


def test_retry_after_never_shortens_the_back_off() -> None:
    grant = Grant(fault(503), fault(503), fault(429, Retry_After="0"), GOOD)
    grant.run()
    assert grant.sleeps[2] >= 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("76", 76), ("86400", 86400), ("9" * 20, 1e20), ("9" * 400, math.inf),
        ("Sun, 06 Nov 1994 08:51:00 GMT", 90), ("Fri, 31 Dec 9999 23:59:59 GMT", 252618188229),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
@pytest.mark.usefixtures("wall_clock")
def test_a_retry_after_beyond_max_wait_is_said_at_once(value: str, seconds: float) -> None:
    grant = Grant(fault(429, Retry_After=value))
    error = grant.error()
    assert isinstance(error, LibraryTokenWaitError)
    assert error.retry_after == pytest.approx(seconds)
    assert "token endpoint https://id.example/connect/token (here)" in str(error)
    assert (len(grant.requests), grant.sleeps) == (1, [])


def test_what_is_left_of_max_wait_counts() -> None:
    grant = Grant(fault(429, Retry_After="40"), fault(429, Retry_After="40"))
    assert isinstance(grant.error(), LibraryTokenWaitError)
    assert grant.sleeps == [40]


def test_a_back_off_beyond_max_wait_is_not_waited_for() -> None:
    grant = Grant(ConnectError("no route"), max_wait=0.3, takes=0.2)
    error = grant.error()
    assert isinstance(error, LibraryTokenWaitError)
    assert 0 < error.retry_after <= 0.5


def test_the_timeout_is_no_longer_than_what_is_left_of_max_wait() -> None:
    grant = Grant(*[ConnectError("timed out")] * 4, max_wait=22, takes=10)
    grant.error()
    first, second, third = map(float, grant.requests)
    assert (first, second) == (10, 10)
    assert 0 < third < 2


@pytest.mark.usefixtures("no_log")
@given(
    answers=st.lists(
        st.sampled_from([*FAULTS, GOOD])
        | st.builds(
            lambda status, n: fault(status, Retry_After=str(n)), st.sampled_from([429, 503]), st.integers(0, 50)
        ),
        min_size=4,
        max_size=4,
    ),
    takes=st.floats(0, 20),
    max_wait=st.floats(0.1, 200),
    ago=st.floats(0, 60),
    times=st.integers(55, 60),
)
@settings(max_examples=200, deadline=None)
def test_no_call_is_held_up_longer_than_max_wait(
    answers: list[Answer], takes: float, max_wait: float, ago: float, times: int
) -> None:
    grant = Grant(*answers, takes=takes, max_wait=max_wait, quota=used_up(Clock(), ago, times))
    with contextlib.suppress(LibraryError):
        grant.run()
    assert grant.clock() - 1000 <= max_wait + 0.01
    assert len(grant.requests) <= 4


# The quota


def test_every_try_counts() -> None:
    clock = Clock()
    quota = used_up(clock, ago=1, times=57)
    Grant(*[fault(503)] * 4, quota=quota, max_wait=10).error()
    assert quota.wait(Slot(), clock.now) > 50
    assert len(quota.slots) == 57 + 3 + 1


def test_over_the_quota_a_call_waits() -> None:
    grant = Grant(GOOD, quota=used_up(Clock(), ago=20))
    grant.run()
    assert grant.sleeps == pytest.approx([40.1])
    assert len(grant.requests) == 1


def test_a_wait_of_more_than_a_second_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nexus_auth")
    Grant(GOOD, quota=used_up(Clock(), ago=20)).run()
    (record,) = caplog.records
    assert "60 requests a minute" in record.getMessage()


def test_over_the_quota_and_max_wait_a_call_fails_at_once_and_takes_no_slot() -> None:
    quota = used_up(Clock(), ago=20)
    grant = Grant(GOOD, quota=quota, max_wait=40)
    error = grant.error()
    assert isinstance(error, LibraryTokenWaitError)
    assert error.retry_after == pytest.approx(40.1)
    assert (grant.requests, grant.sleeps) == ([], [])
    assert len(quota.slots) == 60
    assert quota.wait(Slot(), 1000 + 40.2) == 0


def test_the_line_is_looked_at_again_after_every_wait() -> None:
    clock = Clock()
    quota = Quota()
    slow = [Slot() for _ in range(60)]
    for slot in slow:
        quota.wait(slot, clock())
    steps = client_credentials_grant(terms(), quota, clock() + 75, clock=clock)
    step = next(steps)
    assert isinstance(step, Sleep)
    for slot in slow:
        quota.release(slot, clock() + 7)
    clock.now += step
    step = next(steps)
    assert isinstance(step, Sleep)
    assert step == pytest.approx(7)
    clock.now += 7
    assert isinstance(next(steps), TokenRequest)


# Ahead of time, while an old token still serves


def test_ahead_of_time_a_token_is_asked_for_as_ever() -> None:
    assert Grant(GOOD, ahead=True).run().authorization == "Bearer t0ken"


@pytest.mark.parametrize("answer", [*FAULTS, fault(503, Retry_After="1"), fault(400)], ids=str)
def test_ahead_of_time_nothing_is_tried_again(answer: Answer) -> None:
    grant = Grant(answer, ahead=True)
    grant.error()
    assert (len(grant.requests), grant.sleeps) == (1, [])


def test_ahead_of_time_nobody_stands_in_line() -> None:
    quota = used_up(Clock(), ago=60.05)
    grant = Grant(GOOD, ahead=True, quota=quota)
    assert isinstance(grant.error(), LibraryTokenWaitError)
    assert (grant.requests, grant.sleeps, len(quota.slots)) == ([], [], 60)


# Broken off


def test_broken_off_while_it_waits_for_the_quota_it_leaves_the_line() -> None:
    quota = used_up(Clock(), ago=20)
    grant = Grant(GOOD, quota=quota)
    assert isinstance(next(grant.steps), Sleep)
    assert len(quota.slots) == 61
    grant.steps.close()
    assert len(quota.slots) == 60


@pytest.mark.parametrize("how", ["close", "throw"])
def test_broken_off_while_it_asks_it_counts_until_then(how: str) -> None:
    quota = used_up(Clock(), times=59)
    grant = Grant(GOOD, quota=quota)
    assert isinstance(next(grant.steps), TokenRequest)
    grant.clock.now += 5
    if how == "close":
        grant.steps.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            grant.steps.throw(KeyboardInterrupt())
    assert len(quota.slots) == 60
    assert max(slot.time for slot in quota.slots) == 1005


def test_broken_off_between_two_tries_it_holds_nothing() -> None:
    quota = Quota()
    grant = Grant(quota=quota)
    next(grant.steps)
    assert isinstance(grant.steps.send(fault(503)), Sleep)
    grant.steps.close()
    assert [slot.sent for slot in quota.slots] == [True]


# Whatever comes


@pytest.fixture
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """To keep what thousands of examples log takes longer than to make it."""
    monkeypatch.setattr(logging.getLogger("nexus_auth"), "disabled", True)


texts = st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
json_values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(texts, scalars, max_size=2)
odd_numbers = st.sampled_from([1e308, -0.0, 10**400, "1e999", "9" * 5000, "\u0663"])
numbers = st.integers() | st.floats() | odd_numbers | json_values
documents = st.fixed_dictionaries(
    {},
    optional={
        "access_token": st.from_regex(r"[\x20-\x7f]{1,30}", fullmatch=True) | json_values,
        "token_type": st.sampled_from(["Bearer", "bearer", "mac"]) | json_values,
        "expires_in": numbers,
        "expires_at": numbers,
        "refresh_token": scalars,
        "error": st.just("invalid_client") | json_values,
        "error_description": json_values,
    },
)
bodies = (documents | json_values).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60)
dates = st.from_regex(r"(Sun, )?\d{1,3}[ -]Nov[ -]\d{1,6} \d\d:\d{1,3}(:\d\d)?( GMT| [+-]\d{4,9})?", fullmatch=True)
headers = st.fixed_dictionaries({}, optional={"Retry-After": numbers.map(str) | texts | dates, "Location": texts})
statuses = st.integers(100, 599) | st.sampled_from([0, 200, 200, 200, 302, 400, 401, 429, 503, 999])
answers = st.builds(Response, statuses, bodies, headers)


@pytest.mark.usefixtures("no_log")
@given(answers, st.booleans())
@settings(max_examples=2000, deadline=None)
def test_whatever_comes_ends_in_a_token_or_an_error_of_the_library(answer: Answer, again: bool) -> None:
    grant = Grant(*[answer] * 4) if again else Grant(answer, GOOD)
    came = outcome(grant.run)
    if isinstance(came, Token):
        assert re.fullmatch(r"Bearer [\x21-\x7e]+", came.authorization)
        assert came.expires_at >= 1000 + 1
    else:
        assert isinstance(came, (LibraryTokenRequestError, LibraryTokenWaitError))
        assert str(came).isprintable()
    assert sum(grant.sleeps) <= 75
    assert 1 <= len(grant.requests) <= 4
    assert all(slot.sent for slot in grant.quota.slots)


# The secret


def lower(text: str) -> str:
    return re.sub("%..", lambda match: match[0].lower(), text)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "raw": str,
    "form": quote_plus,
    "path": quote,
    "component": lambda text: quote(text, safe=""),
    "form, lower case": lambda text: lower(quote_plus(text)),
    "path, lower case": lambda text: lower(quote(text)),
    "json": lambda text: json.dumps(text)[1:-1],
}
PLACES: dict[str, Callable[[str], Answer]] = {
    "error": lambda text: response({"error": text}, 400),
    "description": lambda text: response({"error": "invalid_client", "error_description": f"got {text}!"}, 400),
    "late in the description": lambda text: response({"error": "e", "error_description": "." * 190 + text}, 400),
    "location": lambda text: fault(302, Location=f"https://else.example/?client_secret={text}"),
    "body": lambda text: Response(400, text.encode()),
    "connection error": lambda text: ConnectError(f"illegal status line: {text}"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_secret_is_never_shown(place: str, spelling: str) -> None:
    echo = SPELLINGS[spelling](SECRET)
    error = Grant(*[PLACES[place](echo)] * 4).error()
    text = f"{error} {error!r} {error.args} {vars(error)}"
    assert SECRET not in text
    assert echo not in text


@pytest.mark.usefixtures("no_log")
@given(secret=st.text(st.characters(exclude_categories=["Cs"]), min_size=8, max_size=30).map(lambda text: f"q{text}q"),
       place=st.sampled_from(sorted(PLACES)), spelling=st.sampled_from(sorted(SPELLINGS)))  # fmt: skip
@settings(max_examples=500, deadline=None)
def test_no_secret_is_ever_shown(secret: str, place: str, spelling: str) -> None:
    echo = SPELLINGS[spelling](secret)
    error = Grant(*[PLACES[place](echo)] * 4, secret=secret).error()
    assert echo not in f"{error} {vars(error)}"
