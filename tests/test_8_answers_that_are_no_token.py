"""8. Answers of the token endpoint that are no token, and how those are read that are one."""

from __future__ import annotations

import gzip
import json
import math
import re
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


def judged(body: bytes | None, status: int = 200, **headers: str) -> Grant | Fault:
    return judge(Response(status, headers, body), CLIENT, wall_clock=0.0)


def judged_json(document: Any, status: int = 200) -> Any:
    return judged(json.dumps(document).encode(), status)


# What is no token


NO_OBJECT, UNUSABLE = "gave an answer that is no JSON object", "gave no usable access_token"
OTHER_TYPE = "gave a token of another type than Bearer"
NEITHER = "gave neither a token nor an OAuth error"
LOCATION, AWAY = (
    "https://else.example/login?back=1#top",
    "redirected to https://else.example/login, which is not followed",
)
NO_TOKENS: list[tuple[int, str, list[bytes | None]]] = [
    (200, NO_OBJECT, [
        b"", b"<html>", b"null", b'["access_token"]', b'"token"', b"[" * 100_000, TOKEN[:-1], TOKEN * 2,
        b'{"access_token": "\xff"}', b'{"access_token": "t", "x": ' + b"9" * 9999 + b"}",
    ]),
    (200, UNUSABLE, [
        b'{"token_type": "Bearer"}', b'{"access_token": null}',
        b'{"access_token": 1}', b'{"access_token": ""}', b'{"access_token": "a b"}',
        b'{"access_token": "a\\n"}', b'{"access_token": "a\\r\\nX: y"}', b'{"access_token": "a\\u0000"}',
        '{"access_token": "ä"}'.encode(), b'{"access_token": "\\ud800"}',
    ]),
    (200, OTHER_TYPE, [b'{"access_token": "a", "token_type": %s}' % kind for kind in (b'"mac"', b"null", b"[]")]),
    (200, "gave an answer longer than 1048576 bytes", [None]),
    (300, AWAY, [None]),
    (302, AWAY, [TOKEN]),
    (400, NEITHER, [
        TOKEN, b'{"error": 7, "error_description": [1]}', b'{"error": {"a": 1}}',
        b'{"error": "", "error_description": "no"}',
    ]),
    (304, NEITHER, [b""]),
    (404, NEITHER, [b"<html>"]),
    (428, NEITHER, [TOKEN]),
    (499, NEITHER, [TOKEN]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "reason", "body"),
    [(status, reason, body) for status, reason, bodies in NO_TOKENS for body in bodies],
    ids=lambda value: repr(value)[:50],
)
def test_what_is_no_token(status: int, reason: str, body: bytes | None) -> None:
    fault = judged(body, status, **({"Location": LOCATION} if reason == AWAY else {}))
    assert isinstance(fault, Fault)
    assert (fault.kind, fault.reason) == (FaultKind.ODD_ANSWER, f"{reason} (HTTP {status})")
    assert fault.advice == "Check token_endpoint; if it is right, try again later."
    assert (fault.status_code, fault.error) == (status, None)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404])
@pytest.mark.parametrize("error", ["invalid_client", "invalid_scope", "of_another_kind"])
def test_an_oauth_error_is_a_refusal_whatever_its_status(status: int, error: str) -> None:
    """RFC 6749 section 5.2."""
    fault = judged_json({"error": error, "error_description": "no such\nclient", "access_token": "a"}, status)
    assert fault.kind is FaultKind.REFUSED
    assert (fault.error, fault.error_description, fault.status_code) == (error, "no such client", status)
    assert fault.reason == f"refused client 'id': {error}, no such client (HTTP {status})"
    assert fault.advice == "Check client_id, client_secret and scope: are they of this environment?"


@pytest.mark.parametrize("around", [" {}", "{}\t", '"{}"', "'{}'"])
def test_a_refusal_says_that_a_secret_has_something_around_it(around: str) -> None:
    """As files with variables leave it there."""
    client = replace(CLIENT, client_secret=HiddenText(around.format("s3cret")))
    fault = judge(Response(400, {}, b'{"error": "invalid_client"}'), client, wall_clock=0.0)
    assert isinstance(fault, Fault)
    assert fault.advice.endswith("? The client_secret begins or ends with white space or a quote.")


def test_a_long_description_is_cut() -> None:
    fault = judged_json({"error": "invalid_client", "error_description": "long " * 9999}, 400)
    assert 300 < len(fault.reason) < 500


# What is a token


@pytest.mark.parametrize("status", [200, 201, 299])
@pytest.mark.parametrize("members", [{"token_type": "Bearer"}, {"token_type": "bearer"}, {"token_type": "BEARER"}, {}])
def test_what_is_a_token(members: dict[str, str], status: int) -> None:
    document = {"access_token": "t0ken-._~+/=", "expires_in": 3600, **members}
    assert judged_json(document, status) == Grant("t0ken-._~+/=", 3600.0)


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
    assert judged_json({"access_token": "a", "expires_in": expires_in}) == Grant("a", lifetime)


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


# Whatever comes


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


# Over real sockets


def test_no_answer_that_is_no_token_is_taken_for_one(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    for body, reason in ((b"", NO_OBJECT), (b'{"access_token": "a", "token_type": "mac"}', OTHER_TYPE)):
        forget_tokens()
        sandbox.fail_token_requests(status=200, body=body)
        error = outcome(driver.get, client, url(sandbox))
        assert isinstance(error, driver.door.TokenRequestError)
        assert reason in str(error)
    assert (len(sandbox.token_requests), sandbox.requests) == (2, [])


@pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning")  # which httpx leaves behind on trio
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_no_answer_longer_than_one_mebibyte_is_read(driver: Driver, sandbox: NexusSandbox, packed: bool) -> None:
    """Neither as it travels nor unpacked; a token in one that is no longer is a token all the same."""

    def answer(length: int) -> None:
        body = TOKEN.rstrip(b"}") + b" " * (length - len(TOKEN)) + b"}"
        content, headers = (gzip.compress(body), {"Content-Encoding": "gzip"}) if packed else (body, {})
        sandbox.fail_token_requests(status=200, body=content, headers=headers)
        forget_tokens()

    for auth in (driver.auth(sandbox), driver.ready_made(sandbox).auth):
        answer(MAX_BODY)
        assert driver.access_token(auth) == "a"
        answer(MAX_BODY + 1)
        with pytest.raises(TokenRequestError, match="gave an answer longer than 1048576 bytes"):
            driver.access_token(auth)
