"""8. Answers of the token endpoint that are no token, and how those are read that are one."""

from __future__ import annotations

import gzip
import json
import math
import re
import tracemalloc
import zlib
from typing import Any

import pytest
from conftest import Driver, outcome, url
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_auth import TokenRequestError, forget_tokens
from nexus_auth.grant import Fault, FaultKind, Grant, judge, unpacked
from nexus_auth.secret import HiddenText
from nexus_auth.steps import MAX_BODY, Client, Response
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

CLIENT = Client("https://identity.example/token", "id", HiddenText("s3cret"), "api1")
TOKEN = b'{"access_token": "a", "token_type": "Bearer"}'
NO_TOKEN_REASON = "gave no usable access_token"
OTHER_TYPE_REASON = "gave a token of another type than Bearer"
NEITHER_REASON = "gave neither a token nor an OAuth error"

# Each with its status, and what is wrong with it.
NO_TOKENS: dict[str, tuple[int, bytes, str]] = {
    "nothing": (200, b"", NO_TOKEN_REASON),
    "html": (200, b"<html>", NO_TOKEN_REASON),
    "null": (200, b"null", NO_TOKEN_REASON),
    "list": (200, b'["access_token"]', NO_TOKEN_REASON),
    "string": (200, b'"token"', NO_TOKEN_REASON),
    "deep": (200, b"[" * 100_000, NO_TOKEN_REASON),
    "bad utf-8": (200, b'{"access_token": "\xff"}', NO_TOKEN_REASON),
    "cut": (200, TOKEN[:-1], NO_TOKEN_REASON),
    "two documents": (200, TOKEN * 2, NO_TOKEN_REASON),
    "long number": (200, b'{"access_token": "t", "x": ' + b"9" * 9999 + b"}", NO_TOKEN_REASON),
    "no access_token": (200, b'{"token_type": "Bearer", "expires_in": 1}', NO_TOKEN_REASON),
    "null token": (200, b'{"access_token": null}', NO_TOKEN_REASON),
    "number": (200, b'{"access_token": 1, "token_type": "Bearer"}', NO_TOKEN_REASON),
    "empty": (200, b'{"access_token": "", "token_type": "Bearer"}', NO_TOKEN_REASON),
    "space": (200, b'{"access_token": "a b"}', NO_TOKEN_REASON),
    "newline": (200, b'{"access_token": "a\\n"}', NO_TOKEN_REASON),
    "another header": (200, b'{"access_token": "a\\r\\nX: y", "token_type": "Bearer"}', NO_TOKEN_REASON),
    "control": (200, b'{"access_token": "a\\u0000"}', NO_TOKEN_REASON),
    "umlaut": (200, '{"access_token": "ä", "token_type": "Bearer"}'.encode(), NO_TOKEN_REASON),
    "surrogate": (200, b'{"access_token": "\\ud800"}', NO_TOKEN_REASON),
    "mac": (200, b'{"access_token": "a", "token_type": "mac"}', OTHER_TYPE_REASON),
    "null type": (200, b'{"access_token": "a", "token_type": null}', OTHER_TYPE_REASON),
    "odd type": (200, b'{"access_token": "a", "token_type": []}', OTHER_TYPE_REASON),
    "redirect": (302, TOKEN, "redirected to https://else.example/login, which is not followed"),
    "bad request": (400, TOKEN, NEITHER_REASON),
    "not found": (404, b"<html>", NEITHER_REASON),
    "odd error": (400, b'{"error": 7, "error_description": []}', NEITHER_REASON),
    "empty error": (400, b'{"error": "", "error_description": "no"}', NEITHER_REASON),
    "error and token": (200, b'{"error": "invalid_scope", "access_token": "a"}', "refused client 'id': invalid_scope"),
}
LOCATION = "https://else.example/login?back=1#top"


def judged(body: bytes | None, status: int = 200, **headers: str) -> Grant | Fault:
    return judge(Response(status, headers, body), CLIENT, wall_clock=0.0)


@pytest.mark.parametrize("name", NO_TOKENS)
def test_what_is_no_token(name: str) -> None:
    status, body, reason = NO_TOKENS[name]
    fault = judged(body, status, Location=LOCATION)
    assert isinstance(fault, Fault)
    assert fault.kind is (FaultKind.REFUSED if "refused" in reason else FaultKind.ODD_ANSWER)
    assert fault.reason == f"{reason} (HTTP {status})"
    assert fault.advice.startswith("Check ")
    assert fault.status_code == status


def test_what_is_too_long() -> None:
    fault = judged(None)
    assert isinstance(fault, Fault)
    assert (fault.kind, fault.reason) == (FaultKind.ODD_ANSWER, "gave an answer longer than 1048576 bytes (HTTP 200)")


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404])
@pytest.mark.parametrize("error", ["invalid_client", "invalid_scope", "unauthorized_client", "of_another_kind"])
def test_an_oauth_error_is_a_refusal_whatever_its_status(status: int, error: str) -> None:
    """RFC 6749 section 5.2."""
    fault = judged(json.dumps({"error": error, "error_description": "no such\nclient"}).encode(), status)
    assert isinstance(fault, Fault)
    assert fault.kind is FaultKind.REFUSED
    assert (fault.error, fault.error_description, fault.status_code) == (error, "no such client", status)
    assert fault.reason == f"refused client 'id': {error}, no such client (HTTP {status})"
    assert fault.advice == "Check client_id, client_secret and scope: are they of this environment?"


def test_an_error_code_is_shown_where_the_secret_is_a_word_of_it() -> None:
    client = replace(CLIENT, client_secret=HiddenText("client"))
    document = {"error": "invalid_client", "error_description": "no such client"}
    fault = judge(Response(400, {}, json.dumps(document).encode()), client, wall_clock=0.0)
    assert isinstance(fault, Fault)
    assert (fault.error, fault.error_description) == ("invalid_client", "(withheld: the secret is in it)")


@pytest.mark.parametrize("document", [{"error": 7}, {"error": []}, {"error": None, "error_description": {}}])
def test_members_of_another_type_are_passed_over(document: Any) -> None:
    fault = judged(json.dumps(document).encode(), 400)
    assert isinstance(fault, Fault)
    assert (fault.error, fault.error_description) == (None, None)


def test_a_long_description_is_cut() -> None:
    document = {"error": "invalid_client", "error_description": "long " * 9999}
    fault = judged(json.dumps(document).encode(), 400)
    assert isinstance(fault, Fault)
    assert 300 < len(fault.reason) < 500


@pytest.mark.parametrize("token_type", ["Bearer", "bearer", "BEARER", None])
def test_a_token(token_type: str | None) -> None:
    members = {"token_type": token_type} if token_type else {}
    grant = judged(json.dumps({"access_token": "t0ken-._~+/=", "expires_in": 3600, **members}).encode())
    assert grant == Grant("t0ken-._~+/=", 3600.0)


@pytest.mark.parametrize("status", [200, 201, 299])
def test_a_token_comes_with_any_status_of_success(status: int) -> None:
    assert judged(TOKEN, status) == Grant("a", math.inf)


@pytest.mark.parametrize(
    ("expires_in", "lifetime"),
    [
        (3600, 3600), (1, 1), (20.5, 20.5), ("3600", 3600), ("1e3", 1000), (1e9, 1e9), (1e308, 1e308),
        (None, math.inf), (0, math.inf), (-5, math.inf), (0.5, math.inf), (True, math.inf), ("soon", math.inf),
        ("", math.inf), ([], math.inf), ({}, math.inf), ([3600], math.inf), (math.nan, math.inf), (math.inf, math.inf),
        (-math.inf, math.inf), (10**400, math.inf), ("nan", math.inf), ("-inf", math.inf), ("9" * 5000, math.inf),
    ],
    ids=lambda value: repr(value)[:9],
)  # fmt: skip
def test_its_lifetime(expires_in: Any, lifetime: float) -> None:
    """Where it is no sensible number, the token serves until the API refuses it."""
    assert judged(json.dumps({"access_token": "a", "expires_in": expires_in}).encode()) == Grant("a", lifetime)


PLAIN = b"x" * MAX_BODY


@pytest.mark.parametrize(
    ("body", "coding", "expected"),
    [
        (PLAIN, "", PLAIN),
        (PLAIN + b"x", "", None),
        (PLAIN, "identity", PLAIN),
        (gzip.compress(PLAIN), "gzip", PLAIN),
        (gzip.compress(PLAIN), " X-GZip ", PLAIN),
        (gzip.compress(PLAIN + b"x"), "gzip", None),
        (zlib.compress(PLAIN), "deflate", PLAIN),
        (zlib.compress(PLAIN + b"x"), "deflate", None),
        (b"no gzip", "gzip", b"no gzip"),
        (TOKEN, "br", TOKEN),
    ],
    ids=["plain", "too long", "identity", "gzip", "x-gzip", "gzip, too long", "deflate", "deflate, too long",
         "no gzip", "unknown"],
)  # fmt: skip
def test_bodies_that_are_packed(body: bytes, coding: str, expected: bytes | None) -> None:
    assert unpacked(body, coding) == expected


def test_no_more_is_unpacked_than_is_taken() -> None:
    bomb = gzip.compress(bytes(2**26))
    tracemalloc.start()
    try:
        assert unpacked(bomb, "gzip") is None
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_BODY
    finally:
        tracemalloc.stop()


TEXTS = st.text(max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(TEXTS, SCALARS, max_size=2)
NUMBERS = st.sampled_from([1e308, -0.0, 10**400, "1e999", "9" * 5000, "\u0663"]) | VALUES
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "access_token": st.from_regex(r"[\x20-\x7f]{1,30}", fullmatch=True) | VALUES,
        "token_type": st.sampled_from(["Bearer", "bearer", "mac"]) | VALUES,
        "expires_in": NUMBERS,
        "expires_at": NUMBERS,
        "refresh_token": SCALARS,
        "error": st.just("invalid_client") | VALUES,
        "error_description": VALUES,
    },
)
BODIES = (DOCUMENTS | VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60) | st.none()
DATES = st.from_regex(r"(Sun, )?\d{1,3}[ -]Nov[ -]\d{1,6} \d\d:\d{1,3}(:\d\d)?( GMT| [+-]\d{4,9})?", fullmatch=True)
HEADERS = st.fixed_dictionaries({}, optional={"Retry-After": NUMBERS.map(str) | TEXTS | DATES, "Location": TEXTS})
STATUSES = st.integers(100, 599) | st.sampled_from([0, 200, 200, 200, 302, 400, 401, 429, 503, 999])


@given(STATUSES, BODIES, HEADERS)
@settings(max_examples=200, deadline=None)
def test_whatever_comes_is_a_token_or_a_fault(status: int, body: bytes | None, headers: dict[str, str]) -> None:
    verdict = judge(Response(status, headers, body), CLIENT, wall_clock=784111770.0)
    if isinstance(verdict, Grant):
        assert re.fullmatch(r"[\x21-\x7e]+", verdict.access_token)
        assert verdict.lifetime >= 1
        assert 200 <= status < 300
    else:
        assert f"{verdict.reason}{verdict.error}{verdict.error_description}".isprintable()
        assert verdict.retry_after is None or 0 <= verdict.retry_after <= 3600


leaves_generators = pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning")  # as httpx does on trio


def test_no_answer_that_is_no_token_is_taken_for_one(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    names = ["nothing", "html", "deep", "bad utf-8", "another header", "mac", "redirect", "bad request",
             "error and token"]  # fmt: skip
    for name in names:
        status, body, reason = NO_TOKENS[name]
        sandbox.fail_token_requests(status=status, body=body, headers={"Location": LOCATION})
        error = outcome(driver.get, client, url(sandbox))
        assert isinstance(error, TokenRequestError), name
        assert isinstance(error, driver.library_error), name
        assert error.status_code == status, name
        assert reason.replace("'id'", "'sandbox-client'") in str(error), name
        forget_tokens()
    assert len(sandbox.token_requests) == len(names)
    assert sandbox.requests == []


@leaves_generators
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_no_answer_longer_than_one_mebibyte_is_read(driver: Driver, sandbox: NexusSandbox, packed: bool) -> None:
    """Neither as it travels nor unpacked; a token in one that is no longer is a token all the same."""

    def answer(length: int) -> None:
        body = TOKEN.rstrip(b"}") + b" " * (length - len(TOKEN)) + b"}"
        content, headers = (gzip.compress(body), {"Content-Encoding": "gzip"}) if packed else (body, {})
        sandbox.fail_token_requests(status=200, body=content, headers=headers)
        forget_tokens()

    sandbox.answer("/customer", json={}, times=None)
    for client in (driver.client(driver.auth(sandbox)), driver.ready_made(sandbox)):
        answer(MAX_BODY)
        driver.get(client, url(sandbox))
        assert sandbox.requests.pop().headers["Authorization"] == "Bearer a"
        answer(MAX_BODY + 1)
        with pytest.raises(TokenRequestError, match="gave an answer longer than 1048576 bytes"):
            driver.get(client, url(sandbox))


@leaves_generators
def test_an_answer_without_end_is_not_read_to_its_end(driver: Driver, sandbox: NexusSandbox) -> None:
    """After more than is taken nothing is waited for, here until the timeout."""
    sandbox.fail_token_requests(2, status=200, body=bytes(2 * MAX_BODY), headers={"Content-Length": f"{1 << 40}"})
    for client in (driver.client(driver.auth(sandbox, timeout=20)), driver.ready_made(sandbox)):
        forget_tokens()
        call = driver.in_background(driver.get, client, url(sandbox))
        assert isinstance(call.exception(timeout=10), TokenRequestError)
