"""The sandbox: what its token endpoint and its API answer, what can be scripted, and that it leaves nothing behind."""

from __future__ import annotations

import http.client
import json as json_module
import os
import socket
import ssl
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import pytest
import trustme

from nexus_auth import testing
from nexus_auth.testing import Answer, Arrival, NexusSandbox

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
LONG = 60.0  # seconds, more than any test waits for


class Reply(NamedTuple):
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json_module.loads(self.body)


@pytest.fixture
def nexus() -> Iterator[NexusSandbox]:
    with NexusSandbox() as nexus:
        yield nexus


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test there are as many threads and file descriptors as before."""
    threads, descriptors = threading.active_count(), open_descriptors()
    yield
    assert threading.active_count() <= threads
    assert open_descriptors() <= descriptors


def open_descriptors() -> int:
    """Return how many there are, where that can be seen."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def address(nexus: NexusSandbox) -> tuple[str, int]:
    return "127.0.0.1", urlsplit(nexus.environment.base_url).port or 0


def call(nexus: NexusSandbox, path: str = "/customer", method: str = "GET", body: Any = None, **headers: str) -> Reply:
    """Make a request with these headers, in a connection of its own."""
    with closing(http.client.HTTPConnection(*address(nexus), timeout=10)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())


def ask(nexus: NexusSandbox, /, *more: tuple[str, str], **fields: str | None) -> Reply:
    """Make a token request, with these fields other than they should be."""
    right = {
        "client_id": nexus.client_id,
        "client_secret": nexus.client_secret,
        "scope": "api1",
        "grant_type": "client_credentials",
    }
    form = [(name, value) for name, value in {**right, **fields}.items() if value is not None]
    return call(nexus, "/connect/token", "POST", urlencode([*form, *more]), **FORM)


def signed(nexus: NexusSandbox) -> str:
    """Return the header that a new token makes."""
    return f"Bearer {ask(nexus).json['access_token']}"


def exchange(nexus: NexusSandbox, data: bytes) -> list[str]:
    """Send bytes and nothing after them, and return the status lines of all answers until the connection is closed."""
    with socket.create_connection(address(nexus), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):  # as the end of a connection whose server has not read everything
            while piece := connection.recv(65536):
                received += piece
    return [line for line in received.decode().split("\r\n") if line.startswith("HTTP/")]


# The token endpoint


def test_a_token_that_the_api_takes(nexus: NexusSandbox) -> None:
    reply = ask(nexus, scope="sanctionlist api1")
    assert (reply.status, reply.headers["Cache-Control"]) == (200, "no-store")
    document = reply.json
    token = document.pop("access_token")
    assert document == {"token_type": "Bearer", "expires_in": 3600}
    for scheme in ("Bearer", "bearer"):
        assert call(nexus, Authorization=f"{scheme} {token}").status == 200
    assert ask(nexus).json["access_token"] != token


def test_other_fields_are_ignored_and_recorded(nexus: NexusSandbox) -> None:
    others = [("audience", "a"), ("audience", "b"), ("scope", "")]
    assert ask(nexus, *others).status == 200
    assert nexus.token_requests[0].form[-3:] == others


REFUSALS: list[tuple[dict[str, str | None], list[tuple[str, str]], str, str]] = [
    ({"client_id": None}, [], "invalid_request", "client_id is missing"),
    ({"client_secret": ""}, [], "invalid_request", "client_secret is missing"),
    ({"scope": None}, [], "invalid_request", "scope is missing"),
    ({"grant_type": None}, [], "invalid_request", "grant_type is missing"),
    ({}, [("scope", "api1")], "invalid_request", "scope is repeated"),
    ({}, [("client_id", "other")], "invalid_request", "client_id is repeated"),
    ({"grant_type": "password"}, [], "unsupported_grant_type", "client_credentials"),
    ({"client_id": "other"}, [], "invalid_client", "client_id"),
    ({"client_secret": "wrong"}, [], "invalid_client", "client_secret"),
    ({"scope": 'api1 "é\\'}, [], "invalid_scope", "unknown: ???"),
    ({"scope": "api1  sanctionlist"}, [], "invalid_scope", "unknown: "),
]


def test_a_refusal_says_what_is_wrong(nexus: NexusSandbox) -> None:
    for fields, more, error, description in REFUSALS:
        reply = ask(nexus, *more, **fields)
        assert (reply.status, reply.json["error"]) == (400, error)
        assert description in reply.json["error_description"]


def test_what_is_no_token_request(nexus: NexusSandbox) -> None:
    for method, headers, description in (
        ("GET", FORM, "POST"),
        ("POST", {**FORM, "Authorization": "Basic YTpi"}, "header"),
        ("POST", {"Content-Type": "application/json"}, "Content-Type"),
    ):
        reply = call(nexus, "/connect/token", method, b"\xff&=", **headers)
        assert (reply.status, reply.json["error"]) == (400, "invalid_request")
        assert description in reply.json["error_description"]
        assert nexus.token_requests[-1].form[0] == ("\ufffd", "")


def test_clients_and_scopes_are_as_they_are_set() -> None:
    with NexusSandbox(client_id="one", client_secret="secret", scopes=("read",), expires_in=None) as nexus:
        nexus.clients["two"] = "another"
        assert ask(nexus).json["error"] == "invalid_scope"
        assert "expires_in" not in ask(nexus, client_id="two", client_secret="another", scope="read").json
        nexus.scopes, nexus.expires_in = ("api1",), "soon"
        assert ask(nexus).json["expires_in"] == "soon"
    assert NexusSandbox().client_secret != NexusSandbox().client_secret


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list, to be set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_token_expires_and_can_be_revoked(nexus: NexusSandbox, clock: list[float]) -> None:
    first = signed(nexus)
    clock[0] += 3600
    assert call(nexus, Authorization=first).status == 200
    clock[0] += 0.1
    second = signed(nexus)
    assert [call(nexus, Authorization=token).status for token in (first, second)] == [401, 200]
    nexus.revoke_tokens()
    third = signed(nexus)
    assert [call(nexus, Authorization=token).status for token in (second, third)] == [401, 200]
    assert call(nexus, "/sandbox/revoke", Authorization=third).status == 200  # a path of the API, except for POST
    reply = call(nexus, "/sandbox/revoke", "POST")
    assert (reply.status, reply.body) == (204, b"")
    assert call(nexus, Authorization=third).status == 401
    assert [arrival.method for arrival in nexus.requests] == ["GET"] * 7


def test_limit_in_any_minute(clock: list[float]) -> None:
    with NexusSandbox(limit=3) as nexus:
        for later, status in ((0, 200), (20, 200), (10, 200), (29.5, 429), (0.5, 200), (0, 429), (20, 200), (0, 429)):
            clock[0] += later
            reply = ask(nexus)
            assert reply.status == status
        assert reply.headers["Retry-After"] == "11"
        assert [arrival.time - 1000 for arrival in nexus.token_requests] == [0, 20, 30, 59.5, 60, 60, 80, 80]
        clock[0] += 60
        assert [ask(nexus, client_secret="wrong").status for _ in range(4)] == [400, 400, 400, 429]
        nexus.limit = 4
        assert [ask(nexus).status for _ in range(2)] == [200, 429]


def test_a_limit_of_nothing() -> None:
    with NexusSandbox(limit=0) as nexus:
        assert [ask(nexus).status for _ in range(2)] == [429, 429]
        assert ask(nexus).headers["Retry-After"] == "61"


def test_token_requests_that_fail(nexus: NexusSandbox) -> None:
    nexus.limit = 1
    nexus.fail_token_requests(2, retry_after=7, headers={"X-Mine": "1"})
    nexus.fail_token_requests(status=200, body="[")
    nexus.fail_token_requests(status=400, json={"error": "invalid_client"}, retry_after="soon")
    nexus.fail_token_requests(None, status=500)
    replies = [ask(nexus) for _ in range(6)]
    assert [reply.status for reply in replies] == [503, 503, 200, 400, 500, 500]
    assert [reply.headers["Retry-After"] for reply in replies] == ["7", "7", None, "soon", None, None]
    assert (replies[0].headers["X-Mine"], replies[2].body, replies[3].json["error"]) == ("1", b"[", "invalid_client")
    nexus.fail_token_requests(drop=True)  # which ends what would have been for ever
    with pytest.raises(http.client.RemoteDisconnected):
        ask(nexus)
    assert [ask(nexus).status for _ in range(2)] == [200, 429]
    assert len(nexus.token_requests) == 9


def test_the_gate_holds_answers_back(nexus: NexusSandbox) -> None:
    with ThreadPoolExecutor(3) as pool:
        nexus.gate.clear()
        replies = [pool.submit(ask, nexus) for _ in range(3)]
        nexus.wait_for(token_requests=3)
        assert call(nexus).status == 401  # the API has no gate
        nexus.wait_for(token_requests=3, requests=1)
        assert not any(reply.done() for reply in replies)
        with pytest.raises(TimeoutError, match=r"only 3 token requests and 1 requests .* 0.01 s, not 4 and 0"):
            nexus.wait_for(token_requests=4, timeout=0.01)
        nexus.gate.set()
        assert {reply.result().status for reply in replies} == {200}


# The API


def test_the_api_says_401_or_echoes(nexus: NexusSandbox) -> None:
    token = signed(nexus)
    for authorization in ("", "Bearer", "Bearer x", "Basic YTpi", token.replace("Bearer", "Basic"), token[7:]):
        reply = call(nexus, Authorization=authorization)
        assert (reply.status, reply.json["message"], reply.json["values"]) == (401, "Unauthorized", None)
        assert reply.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    reply = call(nexus, "/customer?page=2", "PATCH", b"\xffa", Authorization=token, X_Mine="1")
    assert reply.json["errors"] is None
    assert reply.json["values"] == {"method": "PATCH", "path": "/customer?page=2", "body": "\ufffda"}
    arrival = nexus.requests[-1]
    assert (arrival.method, arrival.path, arrival.body) == ("PATCH", "/customer?page=2", b"\xffa")
    assert (arrival.headers["x-mine"], arrival.headers["X-Other"]) == ("1", None)
    assert time.monotonic() - 10 < arrival.time < time.monotonic()


SCRIPTS: dict[str, tuple[list[dict[str, Any]], str, list[int]]] = {
    "once": ([{}], "GET /a", [201, 401]),
    "whatever the query": ([{}], "GET /a?b=c", [201, 401]),
    "whatever the method": ([{"times": 3}], "DELETE /a", [201, 201, 201, 401]),
    "not another path": ([{}], "GET /a/b", [401]),
    "without its slash": ([{"path": "a"}], "GET /a", [201, 401]),
    "the root": ([{"path": ""}], "GET /", [201, 401]),
    "asked as a proxy": ([{}], "GET http://api.example/a?b=c", [201, 401]),
    "for a query": ([{"path": "/a?b=c"}], "GET /a?b=c", [201, 401]),
    "for a query in braces": ([{"path": "/a?b={c}"}], "GET /a?b={c}", [201, 401]),
    "not for another query": ([{"path": "/a?b=c"}], "GET /a?b=d", [401]),
    "whatever the case of its percent-encoding": ([{"path": "/a%c3%A9"}], "GET /a%C3%a9", [201, 401]),
    "for a method": ([{"method": "post"}], "POST /a", [201, 401]),
    "not for another method": ([{"method": "POST"}], "GET /a", [401]),
    "in order": ([{}, {"status": 202, "times": 2}], "GET /a", [201, 202, 202, 401]),
    "not at all": ([{"times": 0}], "GET /a", [401]),
    "for ever": ([{"times": None}], "GET /a", [201] * 5),
    "until the next call": ([{"times": None}, {"status": 202}], "GET /a", [202, 401]),
    "until no more": ([{"times": None}, {"times": 0}], "GET /a", [401]),
    "twice, then for ever": ([{"times": 2}, {"status": 202, "times": None}], "GET /a", [201, 201, 202, 202]),
    "method first": ([{"times": 2}, {"method": "GET", "status": 202}], "GET /a", [202, 201, 201, 401]),
    "query first": ([{}, {"path": "/a?b=c", "status": 202}], "GET /a?b=c", [202, 201, 401]),
    "method before query": ([{"path": "/a?b"}, {"method": "GET", "status": 202}], "GET /a?b", [202, 201, 401]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripted_answers(nexus: NexusSandbox, name: str) -> None:
    scripts, request, statuses = SCRIPTS[name]
    for script in scripts:
        arguments: dict[str, Any] = {"path": "/a", "status": 201, **script}
        nexus.answer(**arguments)
    method, path = request.split()
    assert [call(nexus, path, method).status for _ in statuses] == statuses
    assert [arrival.path for arrival in nexus.requests] == [path] * len(statuses)


def test_bodies_and_headers_of_an_answer(nexus: NexusSandbox) -> None:
    document = {"name": "José"}
    nexus.answer("/a", json=document)
    document["name"] = "changed later"
    reply = call(nexus, "/a")
    assert (reply.json, reply.headers.get_all("Content-Type")) == ({"name": "José"}, ["application/json"])
    nexus.answer("/a", body="é", headers={"content-type": "text/plain", "X-Mine": "\xe9"})
    reply = call(nexus, "/a")
    assert (reply.body.decode(), reply.headers.get_all("Content-Type")) == ("é", ["text/plain"])
    assert reply.headers["X-Mine"] == "\xe9"
    nexus.answer("/a", status=299, body=b"\xff")
    assert call(nexus, "/a")[::2] == (299, b"\xff")
    nexus.answer("/a", status=204)
    reply = call(nexus, "/a")
    assert (reply.status, reply.body, reply.headers["Content-Length"]) == (204, b"", None)


def test_an_answer_that_takes_its_time_and_one_that_never_comes(nexus: NexusSandbox) -> None:
    nexus.answer("/a", delay=0.05)
    nexus.answer("/a", drop=True)
    started = time.monotonic()
    assert call(nexus, "/a").status == 200
    assert time.monotonic() - started >= 0.05
    with pytest.raises(http.client.RemoteDisconnected):
        call(nexus, "/a")


def test_a_function_answers_what_is_authorised_and_not_scripted() -> None:
    seen: list[Arrival] = []

    def customers(arrival: Arrival) -> Answer | None:
        seen.append(arrival)
        if arrival.method == "PUT":
            shop.answer(arrival.path, json=json_module.loads(arrival.body), times=None)
            return Answer(201)
        return Answer(404, json={"message": "Not found"}) if arrival.path.startswith("/customer/") else None

    with NexusSandbox(api=customers) as shop:
        token = signed(shop)
        shop.answer("/scripted")
        assert call(shop, "/customer/1").status == 401
        assert call(shop, "/scripted", Authorization=token).body == b""
        assert seen == []
        assert call(shop, "/customer/1", Authorization=token).json == {"message": "Not found"}
        assert call(shop, "/other", Authorization=token).json["values"]["path"] == "/other"
        assert call(shop, "/customer/1", "PUT", b'{"id": 1}', Authorization=token).status == 201
        assert call(shop, "/customer/1", Authorization=token).json == {"id": 1}
        assert seen == shop.requests[2:-1]


class Exit(BaseException):
    """As pytest's own `Failed` is none of Exception."""


@pytest.mark.parametrize("error", [AssertionError("no page"), Exit("no page")])
@pytest.mark.parametrize("block_fails", [False, True])
def test_an_error_of_the_function_is_raised_where_the_block_ends(error: BaseException, block_fails: bool) -> None:
    def fail(arrival: Arrival) -> None:
        raise error

    with pytest.raises(type(error), match="no page") as raised, NexusSandbox(api=fail) as nexus:  # noqa: PT012
        reply = call(nexus, Authorization=signed(nexus))
        assert (reply.status, reply.json["errors"]) == (500, [f"{type(error).__name__}: no page"])
        assert not block_fails, "of the block"
    assert ("of the block" in str(raised.value.__context__)) is block_fails


def test_an_interrupt_goes_before_an_error_of_the_function() -> None:
    def fail(arrival: Arrival) -> None:
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt), NexusSandbox(api=fail) as nexus:  # noqa: PT012
        assert call(nexus, Authorization=signed(nexus)).status == 500
        raise KeyboardInterrupt


def test_what_is_no_answer_is_an_error() -> None:
    with pytest.raises(TypeError, match="api must return an Answer or None, not dict"):  # noqa: SIM117
        with NexusSandbox(api=lambda arrival: {}) as nexus:  # type: ignore[arg-type, return-value]
            call(nexus, Authorization=signed(nexus))


# Wrong arguments


async def coroutine(arrival: Arrival) -> None: ...


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
Wrong = dict[type[Exception], dict[str, list[Any]]]  # values of arguments, by the error that they are
WRONG_ARGUMENTS: Wrong = {
    TypeError: {
        "client_id": [None], "client_secret": [b"x"], "expires_in": [{1}], "scopes": ["api1", None, (1,)],
        "limit": [None, 1.5, True], "ssl_context": [True], "api": ["https://api.example", coroutine], "port": ["8080"],
    },
    ValueError: {
        "client_id": [""], "client_secret": [""], "scopes": [("api1 sanctionlist",)], "limit": [-1],
        "ssl_context": [ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)], "port": [-1, 65536],
    },
}  # fmt: skip
WRONG_ANSWERS: Wrong = {
    TypeError: {
        "status": ["200"], "json": [object(), CIRCLE], "body": [1, {"message": "no"}], "headers": ["X: y", {1: "x"}],
        "delay": ["1"], "drop": [1],
    },
    ValueError: {
        "status": [199, 1000], "headers": [{"X": "a\r\nY: b"}, {"X:": "a"}, {"X": "\u20ac"}],
        "delay": [-0.1, 1e10, float("inf"), float("nan")],
    },
}  # fmt: skip
WRONG_TIMES: Wrong = {TypeError: {"times": [1.0, "2"]}, ValueError: {"times": [-1]}}
WRONG_COMBINATIONS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "json and body", {"json": 1, "body": "1"}),
    (TypeError, "Retry-After", {"headers": {"Retry-After": 5}}),
    (ValueError, "body must be empty with status 204", {"body": "x", "status": 204}),
]
WRONG_PATHS: list[tuple[type[Exception], str, list[Any]]] = [
    (ValueError, "without method and host", ["GET /customer", "DELETE", "https://testapi.quantoz.com/customer"]),
    (ValueError, "percent-encoded and without a fragment", ["/custom er", "/customér", "/customer#1", '/a"b', "/{id}"]),
    (ValueError, "without '.' and '..'", ["/a/../b", "/.", "/a/./b?c"]),
    (ValueError, "fail_token_requests", ["/connect/token", "connect/token?x=1"]),
    (ValueError, "revoke", ["/sandbox/revoke"]),
    (TypeError, "path must be str", [b"/customer", None]),
]


def check_refused(wrong: Wrong, *takers: Callable[..., object]) -> None:
    """Check that each of `takers` refuses each value, with an error that names the argument."""
    for kind, arguments in wrong.items():
        for (name, values), taker in product(arguments.items(), takers):
            for value in values:
                with pytest.raises(kind, match=name):
                    taker(**{name: value})


def test_wrong_arguments_are_named_at_once(nexus: NexusSandbox) -> None:
    answer, fail = partial(nexus.answer, "/a"), nexus.fail_token_requests
    check_refused(WRONG_ARGUMENTS, NexusSandbox)
    check_refused(WRONG_ANSWERS, answer, fail, Answer)
    check_refused(WRONG_TIMES, answer, fail)
    check_refused({TypeError: {"method": [404]}, ValueError: {"method": ["/customer", "", "GET "]}}, answer)
    check_refused({TypeError: {"retry_after": [0.5, True]}, ValueError: {"retry_after": [-1]}}, fail)
    for (kind, words, arguments), taker in product(WRONG_COMBINATIONS, (answer, fail, Answer)):
        with pytest.raises(kind, match=words):
            taker(**arguments)
    for kind, words, paths in WRONG_PATHS:
        for path in paths:
            with pytest.raises(kind, match=words):
                nexus.answer(path)
    assert (call(nexus, "/a").status, ask(nexus).status) == (401, 200)  # nothing of all that has been scripted


def test_a_subclass_may_have_attributes_of_its_own() -> None:
    class Mine(NexusSandbox):
        def __init__(self) -> None:
            super().__init__()
            self.customers: list[str] = []

    with Mine() as nexus:
        assert nexus.customers == []


def test_attributes_are_checked_as_arguments_are(nexus: NexusSandbox) -> None:
    attributes = ("expires_in", "scopes", "limit", "api")
    for kind, arguments in WRONG_ARGUMENTS.items():
        wrong = {name: values for name, values in arguments.items() if name in attributes}
        check_refused({kind: wrong}, lambda **one: setattr(nexus, *one.popitem()))
    check_refused({TypeError: {"gate": [False, None]}}, lambda gate: setattr(nexus, "gate", gate))
    check_refused({TypeError: {"clients": [3, None]}}, lambda clients: setattr(nexus, "clients", clients))
    with pytest.raises(AttributeError, match="a NexusSandbox has no attribute 'expire_in'"):
        nexus.expire_in = 5  # type: ignore[attr-defined]
    for name in ("client_id", "client_secret"):
        with pytest.raises(AttributeError, match=f"^{name} of a NexusSandbox stays as it is"):
            setattr(nexus, name, getattr(nexus, name))
    check_refused({TypeError: {"requests": ["1"], "token_requests": [None]}}, nexus.wait_for)
    check_refused({ValueError: {"requests": [-1]}}, nexus.wait_for)
    with unittest.mock.patch.object(nexus, "revoke_tokens"):
        nexus.revoke_tokens()
    nexus.api = lambda _: Answer(404)
    token = ask(nexus).json["access_token"]
    assert call(nexus, "/a", Authorization=f"Bearer {token}").status == 404


# HTTP


GET, POST = b"GET /a HTTP/1.1\r\n", b"POST /a HTTP/1.1\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
MESSAGES: dict[str, tuple[bytes, list[int], list[bytes]]] = {
    "one after the other": ((GET + b"\r\n") * 3, [200, 200, 200], [b"", b"", b""]),
    "the last says so": (GET + b"connection: Close\r\n\r\n" + GET + b"\r\n", [200], [b""]),
    "HTTP/1.0": (b"GET /a HTTP/1.0\r\n\r\n" + GET + b"\r\n", [200], [b""]),
    "only line feeds": (b"GET /a HTTP/1.1\nX: 1\n\n", [200], [b""]),
    "body and a further request": (POST + b"Content-Length: 2\r\n\r\nhi" + GET + b"\r\n", [200, 200], [b"hi", b""]),
    "the same length twice": (POST + b"Content-Length: 2\r\n" * 2 + b"\r\nhi", [200], [b"hi"]),
    "chunks": (CHUNKED + b"2\r\nhi\r\nA;x=y\r\n ten bytes\r\n0\r\nX: y\r\n\r\n" + GET + b"\r\n", [200, 200],
               [b"hi ten bytes", b""]),
    "chunks and length": (POST + b"Content-Length: 9\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", [200], [b""]),
    "expects 100": (POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi", [100, 200], [b"hi"]),
    "expects 100 too early": (b"POST /a HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", [200], [b""]),
    "nothing": (b"", [], []),
    "half a line": (b"GET /a", [400], []),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400], []),
    "HTTP/0.9": (b"GET /a\r\n\r\n", [400], []),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400], []),
    "a long line": (b"GET /" + b"a" * (65_536 - 5), [400], []),
    "a line as long as can be": (b"GET /a?" + b"a" * (65_536 - 18) + b" HTTP/1.1\r\n\r\n", [200], [b""]),
    "headers cut": (GET + b"Host: x\r\n", [400], []),
    "no colon": (GET + b"Host\r\n\r\n", [400], []),
    "space before the colon": (GET + b"Host : x\r\n\r\n", [400], []),
    "folded": (GET + b"X: 1\r\n 2\r\n\r\n", [400], []),
    "a header of spaces": (GET + b"X:" + b" " * 60_000 + b"1\r\n\r\n", [200], [b""]),
    **{f"length {length!r}": (POST + b"Content-Length: " + length + b"\r\n\r\nhi", [400], [])
       for length in (b"", b"-1", b"+2", b"1_0", b"2, 2", b"two", b"9" * 5000, b"3")},
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi", [400], []),
    "a length that is a lie": (POST + b"Content-Length: 999999999999999\r\n\r\nhi", [400], []),
    "another coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n", [400], []),
    **{f"chunk {chunk!r}": (CHUNKED + chunk, [400], [])
       for chunk in (b"", b"2", b"2\r\n", b"2\r\nh", b"2\r\nhi", b"2\r\nhi?!0\r\n\r\n", b"2\r\nhi\r\n", b"-2\r\nhi\r\n",
                     b"x\r\n", b"\r\n", b"0\r\n", b"0\r\nX\r\n\r\n", b"FFFFFFFFFFFF\r\nhi", b"F" * 5000)},
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_whatever_comes_is_answered_or_closed(
    nexus: NexusSandbox, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    data, statuses, bodies = MESSAGES[name]
    nexus.answer("/a", times=None)
    assert [int(line.split()[1]) for line in exchange(nexus, data)] == statuses
    assert [arrival.body for arrival in nexus.requests] == bodies
    assert call(nexus, "/a").status == 200
    assert capfd.readouterr() == ("", "")


def test_head_has_the_length_and_no_body(nexus: NexusSandbox) -> None:
    nexus.answer("/a", json={})
    reply = call(nexus, "/a", "HEAD")
    assert (reply.body, reply.headers["Content-Length"], reply.headers["Connection"]) == (b"", "2", None)
    assert call(nexus, "/a", "HEAD", Connection="close").headers["Connection"] == "close"
    assert exchange(nexus, b"HEAD /a HTTP/1.1\r\n\r\n" + GET + b"\r\n") == ["HTTP/1.1 401 Unauthorized"] * 2


def test_one_connection_serves_many_requests(nexus: NexusSandbox) -> None:
    headers = {"Authorization": signed(nexus)}
    with closing(http.client.HTTPConnection(*address(nexus), timeout=10)) as connection:
        for size in (0, 1, 70_000, 3_000_000):
            connection.request("POST", "/a", b"x" * size, headers)
            response = connection.getresponse()
            assert len(json_module.loads(response.read())["values"]["body"]) == size
        threads = threading.active_count()
        connection.request("POST", "/a", iter([b"a", b"b" * 70_000]), headers, encode_chunked=True)
        assert connection.getresponse().status == 200
        assert threading.active_count() == threads
    assert nexus.requests[-1].body == b"a" + b"b" * 70_000


def test_many_at_once_are_all_recorded(nexus: NexusSandbox) -> None:
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda number: ask(nexus, ("number", str(number))), range(100)))
    assert sorted(reply.status for reply in replies) == [200] * 60 + [429] * 40
    assert {dict(arrival.form)["number"] for arrival in nexus.token_requests} == {str(n) for n in range(100)}


def test_https() -> None:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    with NexusSandbox(ssl_context=server) as nexus:
        assert nexus.environment.token_endpoint.startswith("https://localhost:")
        with socket.create_connection(address(nexus)):  # who never shakes hands holds nobody up
            url = urlsplit(nexus.environment.base_url)
            with closing(http.client.HTTPSConnection(url.netloc, context=client, timeout=10)) as connection:
                connection.request("GET", "/a")
                assert connection.getresponse().status == 401
                started = time.monotonic()
                nexus.__exit__(None, None, None)
                assert time.monotonic() - started < 2


# Its life


def test_it_runs_in_its_block_once_at_a_time_and_again_and_again() -> None:
    nexus = NexusSandbox()
    with pytest.raises(RuntimeError, match=r"with NexusSandbox\(\) as nexus"):
        print(nexus.environment)
    with nexus:
        token = signed(nexus)
        with pytest.raises(RuntimeError, match="running already"), nexus:
            raise AssertionError
        assert call(nexus, Authorization=token).status == 200
    nexus.__exit__(None, None, None)
    with nexus as again:
        assert again is nexus
        assert call(nexus, Authorization=token).status == 200
    assert len(nexus.requests) == 2
    started = time.monotonic()
    for _ in range(20):
        with nexus:
            pass
    assert time.monotonic() - started < 5


def test_a_port_of_ones_own() -> None:
    with NexusSandbox() as first:
        port = address(first)[1]
        with pytest.raises(OSError, match="in use"):
            NexusSandbox(port=port).__enter__()
        assert ask(first).status == 200
    with ExitStack() as stack:
        for _ in range(2):
            with NexusSandbox(port=port) as second:
                assert second.environment.base_url == f"http://127.0.0.1:{port}"
                # The sandbox is the first to close this one, so that its port is not free at once.
                stack.enter_context(socket.create_connection(address(second)))
                assert ask(second).status == 200


def test_the_end_closes_every_connection_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever it is at, and also if the block raises."""
    wedged = [
        b"", b"GET /a", GET + b"Hos", POST + b"Content-Length: 2\r\n\r\n", CHUNKED + b"2\r\nh", GET + b"\r\n",
        b"GET /big HTTP/1.1\r\n\r\n", b"GET /late HTTP/1.1\r\n\r\n",
        b"POST /connect/token HTTP/1.1\r\nContent-Length: 5\r\n\r\nscope",
    ]  # fmt: skip
    connections: list[socket.socket] = []
    started = time.monotonic()
    nexus = NexusSandbox()
    nexus.answer("/a")
    nexus.answer("/big", body=b"x" * 30_000_000)
    nexus.answer("/late", delay=LONG)
    nexus.gate.clear()
    with ExitStack() as stack:
        with pytest.raises(ZeroDivisionError), nexus:  # noqa: PT012
            for data in wedged:
                connections.append(stack.enter_context(socket.create_connection(address(nexus), timeout=10)))
                connections[-1].sendall(data)
            nexus.wait_for(token_requests=1, requests=3)
            raise ZeroDivisionError
        assert time.monotonic() - started < 2
        for connection in connections:
            while connection.recv(1 << 20):
                pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address(nexus))
    assert capfd.readouterr() == ("", "")


def test_connections_that_come_while_it_ends() -> None:
    """Whoever comes late is refused or closed, and no thread serves him."""
    connected, ended = threading.Semaphore(0), threading.Event()

    def knock(nexus: NexusSandbox) -> None:
        while not ended.is_set():
            with suppress(OSError), socket.create_connection(address(nexus), timeout=10) as connection:
                connected.release()
                connection.recv(1)

    with ThreadPoolExecutor(4) as pool:
        with NexusSandbox() as nexus:
            for _ in range(4):
                pool.submit(knock, nexus)
            for _ in range(4):
                assert connected.acquire(timeout=10)
        names = [thread.name for thread in threading.enumerate()]
        ended.set()
    assert "NexusSandbox" not in names


def test_a_function_that_never_returns_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "PATIENCE", 0.05)
    leave = threading.Event()

    def stuck(arrival: Arrival) -> None:
        leave.wait(LONG)

    with ThreadPoolExecutor(1) as pool:
        nexus = NexusSandbox(api=stuck).__enter__()
        late = pool.submit(call, nexus, Authorization=signed(nexus))
        nexus.wait_for(requests=1)
        with pytest.warns(RuntimeWarning, match="api function has not returned"):
            nexus.__exit__(None, None, None)
        assert isinstance(late.exception(10), http.client.RemoteDisconnected)
        leave.set()
    for thread in threading.enumerate():
        if thread.name == "NexusSandbox":
            thread.join(10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_leaves_the_sandbox_to_its_parent(nexus: NexusSandbox) -> None:
    with closing(http.client.HTTPConnection(*address(nexus), timeout=10)) as connection:
        connection.request("GET", "/a")
        assert connection.getresponse().read()
        child = os.fork()
        if not child:
            nexus.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        connection.request("GET", "/a")
        assert connection.getresponse().status == 401
