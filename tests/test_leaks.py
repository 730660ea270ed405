"""Leaks: no secret and no token in what is shown or logged, and no token but to the API's own origin."""

from __future__ import annotations

import contextlib
import html
import io
import json
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus, urlsplit

import pytest
from conftest import DRIVERS, AsyncHTTPX, Driver, Requests, closed_port, nowhere, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_auth import TEST, Environment, NexusAuthError, TokenRequestError, forget_tokens, grant
from nexus_auth.testing import NexusSandbox

SYNC = [driver for driver in DRIVERS if not isinstance(driver, AsyncHTTPX)]
SECRET = "S3cret~ /+&=%41'<\"ä€\N{KEY}:x"
TOKEN = "t0ken-that-nobody-may-see"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grant, "BACKOFF", 0.0)


def url(sandbox: NexusSandbox, path: str = "/customer") -> str:
    return sandbox.environment.base_url + path


def lend(driver: Driver, client: Any) -> dict[str, Any]:
    return {"session" if isinstance(driver, Requests) else "client": client}


# What is shown


def spellings(secret: str) -> set[str]:
    """Return all the ways to write `secret` from which anybody could read it."""
    percent = {quote(secret), quote_plus(secret), quote(secret, safe=""), quote_plus(secret, safe="/")}
    lower = {re.sub("%..", lambda match: match[0].lower(), text) for text in percent}
    latin = secret.encode().decode("latin-1")  # as header values are read by some
    return {secret, latin, html.escape(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1], *percent, *lower}


def exceptions(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and all that is chained to it or one of its arguments."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or error in seen:
            continue
        seen.append(error)
        yield error
        waiting += [error.__cause__, error.__context__]
        waiting += [value for value in (*error.args, *vars(error).values()) if isinstance(value, BaseException)]


def message_texts(message: Any) -> Iterator[str]:
    """Yield the text of a request or response of any library, or of whatever else it is."""
    yield f"{message!r} {message}"
    for name in ("url", "headers", "body", "content", "_content", "text", "cookies", "history", "request", "hooks"):
        with contextlib.suppress(Exception):  # e.g. what a stream holds is not there to be read
            value = getattr(message, name)
            if name == "request":
                yield from message_texts(value)
            elif isinstance(value, Mapping):
                yield repr(list(value.items()))
            else:
                yield value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def shown(error: BaseException) -> Iterator[str]:
    """Yield all that `error` shows of itself: texts, arguments, attributes, requests and responses, and its trace."""
    for one in exceptions(error):
        yield f"{one} {one!r} {one.args!r} {getattr(one, '__notes__', '')}"
        for value in vars(one).values():  # the requests and responses of all three libraries among them
            yield from message_texts(value)
    yield "".join(traceback.format_exception(error, limit=1))  # all but more lines of source


def seen(auth: Any, client: Any) -> Iterator[str]:
    """Yield what a debugger or a log would show of `auth` and of `client`, which is signed by it."""
    yield f"{auth} {auth!r} {vars(auth)} {vars(auth._credentials)} {auth._terms} {auth._terms!r} {client} {client!r}"
    yield f"{vars(client)}"


def flat(value: Any) -> Iterator[str]:
    """Yield `value` as a handler would that writes the arguments of records down, whatever they hold."""
    yield f"{value} {value!r}"
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, BaseException):
        yield from shown(value)


def logged(records: list[logging.LogRecord]) -> Iterator[str]:
    for record in records:
        yield f"{record.name} {record.getMessage()}"
        yield from flat(record.args)
        yield str(record.exc_text)
        if record.exc_info and record.exc_info[1]:
            yield from shown(record.exc_info[1])


def check(texts: Iterator[str], secrets: set[str]) -> None:
    for text in texts:
        for secret in secrets:
            assert secret not in text


SPELT: dict[str, Callable[[str], str]] = {
    "form": quote_plus,
    "path": quote,
    "component": lambda text: quote(text, safe=""),  # as JavaScript and .NET write it
    "lower case": lambda text: re.sub("%..", lambda match: match[0].lower(), quote_plus(text)),
    "bytes": lambda text: text.encode().decode("latin-1"),  # so that http.server sends them as they are
}


class Scene(NamedTuple):
    """What the token endpoint does; `raises` tells whether the call does."""

    status: int = 200
    body: str | bytes = ""
    headers: dict[str, str] = {}  # noqa: RUF012
    drop: bool = False
    raises: bool = True


def error_response(error: object, description: object = None) -> str:
    return json.dumps({"error": error, "error_description": description})


SCENES = {
    "echoed in description": Scene(400, error_response("invalid_client", f"no client has {SECRET}")),
    "echoed in error": Scene(400, error_response(SECRET)),
    "echoed late in description": Scene(400, error_response("invalid_client", f"{'.' * 190}{SECRET}")),
    "echoed on lines of its own": Scene(400, error_response("invalid_client", f"secret:\n{SECRET}\n{SECRET}")),
    "echoed as html": Scene(400, error_response("invalid_client", f"<b>{html.escape(SECRET)}</b>")),
    "echoed as json": Scene(400, error_response("invalid_client", json.dumps({"client_secret": SECRET}))),
    "echoed as a member": Scene(400, json.dumps({"error": {"client_secret": SECRET}, "client_secret": SECRET})),
    "echoed in a page": Scene(500, f"<html>{SECRET}"),
    "echoed with status 200": Scene(200, f"client_secret={quote_plus(SECRET)}"),
    "echoed in headers": Scene(400, "", {"X-Echo": quote_plus(SECRET), "Retry-After": quote_plus(SECRET)}),
    "echoed in a cookie": Scene(400, "", {"Set-Cookie": f"secret={quote(SECRET)}; Path=/"}),
    "token without a type of ours": Scene(200, json.dumps({"access_token": TOKEN, "token_type": f"mac {TOKEN}"})),
    "token with a line break": Scene(200, json.dumps({"access_token": f"{TOKEN}\r\nX: y", "token_type": "Bearer"})),
    "token and error": Scene(400, json.dumps({"error": "invalid_scope", "access_token": TOKEN})),
    "token in a list": Scene(200, json.dumps([TOKEN])),
    "token in a broken document": Scene(200, '{"access_token": "' + TOKEN),
    "token in bad utf-8": Scene(200, TOKEN.encode() + b"\xff"),
    "token in a redirect": Scene(302, "", {"Location": f"https://else.example/#access_token={TOKEN}"}),
    "token in a redirect's query": Scene(302, "", {"Location": f"/else?access_token={TOKEN}"}),
    "broken gzip": Scene(200, TOKEN, {"Content-Encoding": "gzip"}),
    "unavailable": Scene(503, SECRET.encode()),
    "too many": Scene(429, error_response("slow_down", SECRET), {"Retry-After": "1000"}),
    "dropped": Scene(drop=True),
    "success": Scene(200, json.dumps({"access_token": TOKEN, "expires_in": 3600, "me": SECRET}), raises=False),
}
for spelling, spell in SPELT.items():
    location = f"https://else.example/connect?client_secret={spell(SECRET)}&a=b"
    SCENES[f"echoed in a redirect as {spelling}"] = Scene(307, "", {"Location": location})
    SCENES[f"echoed in an error as {spelling}"] = Scene(400, error_response("invalid_client", f"x={spell(SECRET)}&y"))


@pytest.mark.parametrize("name", SCENES)
def test_whatever_the_token_endpoint_says(driver: Driver, caplog: pytest.LogCaptureFixture, name: str) -> None:
    if name == "broken gzip" and driver.name.endswith("trio"):
        pytest.skip("where httpx itself leaves asynchronous generators behind")
    caplog.set_level(0)
    scene = SCENES[name]
    with NexusSandbox(client_secret=SECRET) as sandbox:
        sandbox.fail_token_requests(4, status=scene.status, body=scene.body, headers=scene.headers, drop=scene.drop)
        auth = driver.auth(sandbox)
        client = driver.client(auth)
        sandbox.answer("/customer", json={})
        called = outcome(lambda: driver.get(client, url(sandbox)))
        secrets = {*spellings(SECRET), *spellings(sandbox.client_secret), TOKEN}
        if scene.raises:
            assert isinstance(called, driver.library_error), repr(called)
            check(shown(called), secrets)
            again = outcome(lambda: driver.get(client, url(sandbox)))  # what is remembered of it
            assert type(again) is type(called)
            assert again is not called
            check(shown(again), secrets)
        else:
            assert called.status == 200
        check(seen(auth, client), secrets)
        # With a level this low httpcore logs the headers of every response, which are the server's words, not ours.
        echoed = set(scene.headers) - {"Content-Encoding"}
        records = [record for record in caplog.records if not (echoed and record.name.startswith("httpcore"))]
        check(logged(records), secrets)
        driver.close(client)
    assert records


def test_a_wrong_secret(driver: Driver, sandbox: NexusSandbox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    client = driver.client(driver.auth(sandbox, client_secret=SECRET))
    called = outcome(lambda: driver.get(client, url(sandbox)))
    assert isinstance(called, TokenRequestError)
    assert called.error == "invalid_client"
    check(shown(called), spellings(SECRET) | {sandbox.client_secret})
    check(iter([pickle.dumps(called).decode("latin-1")]), spellings(SECRET))
    check(logged(caplog.records), spellings(SECRET))
    driver.close(client)


@pytest.mark.parametrize("failure", ["refused connection", "timeout", "no such proxy"])
def test_token_requests_that_never_arrive(
    driver: Driver, sandbox: NexusSandbox, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    caplog.set_level(0)
    environment = nowhere() if failure == "refused connection" else sandbox.environment
    proxy = f"http://user:pr0xy-passw0rd@127.0.0.1:{closed_port()}"
    options = {"proxies": {"http": proxy}} if isinstance(driver, Requests) else {"proxy": proxy}
    lent = driver.client(**options if failure == "no such proxy" else {})
    sandbox.fail_token_requests(4, delay=0.2)
    auth = driver.door.NexusAuth("id", SECRET, environment, timeout=0.02, **lend(driver, lent))
    client = driver.client(auth)
    for _ in range(2):
        called = outcome(lambda: driver.get(client, f"{environment.base_url}/customer"))
        assert isinstance(called, driver.library_error)
        assert not isinstance(called, NexusAuthError)
        check(shown(called), {"pr0xy-passw0rd", *spellings(SECRET)})
    check(logged(caplog.records), {"pr0xy-passw0rd", *spellings(SECRET)})
    assert [record for record in caplog.records if record.name == "nexus_auth" and record.levelname == "WARNING"]
    driver.close(client)
    driver.close(lent)


@pytest.mark.parametrize("first", SYNC, ids=repr)
@pytest.mark.parametrize("second", SYNC, ids=repr)
def test_a_failure_of_one_library_told_to_another(first: Driver, second: Driver) -> None:
    environment = nowhere()
    errors = []
    for driver in (first, second):
        client = driver.client(driver.door.NexusAuth("id", SECRET, environment))
        errors.append(outcome(lambda: driver.get(client, f"{environment.base_url}/customer")))  # noqa: B023
        driver.close(client)
    assert isinstance(errors[1], second.library_error)
    assert environment.token_endpoint in str(errors[1])
    for error in errors:
        check(shown(error), spellings(SECRET))
        with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
            check(iter([pickle.dumps(error).decode("latin-1")]), {TOKEN, *spellings(SECRET)})


@pytest.mark.parametrize("failure", ["refused", "unavailable", "dropped", "odd"])
@pytest.mark.parametrize("age", [0, 3590])
def test_a_renewal_that_fails(
    driver: Driver, sandbox: NexusSandbox, caplog: pytest.LogCaptureFixture, failure: str, age: int
) -> None:
    caplog.set_level(0)
    scene = {
        "refused": Scene(400, error_response("invalid_client", sandbox.client_secret)),
        "unavailable": Scene(503, sandbox.client_secret),
        "dropped": Scene(drop=True),
        "odd": Scene(200, sandbox.client_secret),
    }[failure]
    auth = driver.auth(sandbox, leeway=60)
    client = driver.client(auth)
    assert driver.get(client, url(sandbox)).status == 200
    token = auth._credentials.token
    sandbox.fail_token_requests(4, status=scene.status, body=scene.body, drop=scene.drop)
    if age:
        token.half_life, token.expires_at = token.half_life - age, token.expires_at - age
        assert driver.get(client, url(sandbox)).status == 200  # with the old token, on which nothing is waited for
        assert len(sandbox.token_requests) == 2
    else:
        sandbox.revoke_tokens()
        called = outcome(lambda: driver.get(client, url(sandbox)))
        # The caller's own request is the one that was refused: with the token that nobody takes any more.
        called.request.headers.pop("Authorization")
        assert isinstance(called, driver.library_error)
        check(shown(called), {sandbox.client_secret, token.authorization.removeprefix("Bearer ")})
    check(logged(caplog.records), {sandbox.client_secret, token.authorization.removeprefix("Bearer ")})
    driver.close(client)


def test_calls_that_succeed_and_calls_that_are_mended(
    driver: Driver, sandbox: NexusSandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    auth = driver.auth(sandbox)
    client = driver.client(auth)
    for _ in range(2):
        assert driver.get(client, url(sandbox)).status == 200
        sandbox.revoke_tokens()
    tokens = {str(arrival.headers["Authorization"]).removeprefix("Bearer ") for arrival in sandbox.requests}
    assert len(tokens) == 2
    check(logged(caplog.records), {sandbox.client_secret, *tokens})
    check(seen(auth, client), {sandbox.client_secret, *tokens})
    ours = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "nexus_auth"]
    assert [level for level, _ in ours] == ["DEBUG", "DEBUG", "INFO"]
    assert "3600" in ours[0][1]
    driver.close(client)


def test_a_call_that_fails_with_a_token_on_it(
    driver: Driver, sandbox: NexusSandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/customer", drop=True, times=2)
    called = outcome(lambda: driver.get(client, url(sandbox)))
    assert called.request.url == url(sandbox)
    token = called.request.headers.pop("Authorization").removeprefix("Bearer ")  # as every request has it
    assert isinstance(called, driver.library_error)
    check(shown(called), {sandbox.client_secret, token})
    check(logged(caplog.records), {sandbox.client_secret, token})
    driver.close(client)


def test_the_exceptions_request_is_the_callers(driver: Driver, sandbox: NexusSandbox) -> None:
    for drop, status in ((True, 0), (False, 400), (False, 503), (False, 200)):
        client = driver.client(driver.auth(sandbox))
        sandbox.fail_token_requests(4, status=status, drop=drop)
        for _ in range(2):
            called = outcome(lambda: driver.send(client, "POST", url(sandbox), b"mine"))  # noqa: B023
            assert (called.request.method, called.request.url) == ("POST", url(sandbox))
            assert getattr(called.request, "body", b"mine") == getattr(called.request, "content", b"mine") == b"mine"
            assert getattr(called, "response", None) is None
        driver.close(client)
        forget_tokens()


def test_what_is_pickled_of_a_response_is_readable_only_by_whom_it_is_sent_to(sandbox: NexusSandbox) -> None:
    # Other than the auth itself, which has to hold the secret to be of use elsewhere.
    driver = Requests()
    client = driver.client(driver.auth(sandbox))
    response = client.get(url(sandbox))
    assert sandbox.client_secret not in repr(vars(response)) + repr(vars(response.request))
    assert pickle.loads(pickle.dumps(response)).json() == response.json()
    driver.close(client)


# What arrives


@pytest.mark.parametrize("driver", SYNC, ids=repr)
def test_ids_and_secrets_of_any_characters_arrive_as_they_are(driver: Driver) -> None:
    texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
        lambda text: text.strip() and not text.endswith(("\n", "\r"))
    )
    likely = st.sampled_from(["a b", "a+b", "&=%", "%41", "'\"", "äöü", "\N{KEY}", "a:b", ";", "#?/", "\0", SECRET])
    with NexusSandbox(limit=10_000) as sandbox:
        client = driver.client()
        lent = driver.client()

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=[*HealthCheck])  # pyright: ignore[reportArgumentType]
        @given(client_id=texts | likely, client_secret=texts | likely, scope=texts | likely)
        def arrive(client_id: str, client_secret: str, scope: str) -> None:
            forget_tokens()
            options = {"scope": scope, **lend(driver, lent)}
            auth = driver.door.NexusAuth(client_id, client_secret, sandbox.environment, **options)
            sandbox.clients[client_id], sandbox.scopes = client_secret, tuple(scope.split(" "))
            assert driver.get(client, url(sandbox), auth=auth).status == 200
            assert sorted(sandbox.token_requests[-1].form) == [
                ("client_id", client_id), ("client_secret", client_secret),
                ("grant_type", "client_credentials"), ("scope", scope),
            ]  # fmt: skip

        arrive()
        driver.close(client)
        driver.close(lent)


# Redirects of the token endpoint


@pytest.mark.parametrize("way", ["plain", "lent", "made"])
def test_redirects_of_the_token_endpoint_are_not_followed(driver: Driver, sandbox: NexusSandbox, way: str) -> None:
    with NexusSandbox(client_secret=sandbox.client_secret) as stranger:
        client = driver.client() if way != "made" else driver.ready_made(sandbox)
        if way != "made":
            client.auth = driver.auth(sandbox, **(lend(driver, client) if way == "lent" else {}))
        for status in (301, 302, 303, 307, 308):
            for target in (stranger.environment.token_endpoint, url(sandbox, "/connect/2"), "/connect/3"):
                sandbox.fail_token_requests(status=status, headers={"Location": target})
                called = outcome(lambda: driver.get(client, url(sandbox)))
                assert isinstance(called, TokenRequestError)
                assert called.status_code == status
                assert f"redirected to {target}" in str(called)
                forget_tokens()
        assert len(sandbox.token_requests) == 5 * 3
        assert stranger.token_requests + stranger.requests + sandbox.requests == []
        driver.close(client)


# Where the token goes


class World:
    """Every host there is, none of them real: gives out a token, and answers all else by 401, or as it is told."""

    def __init__(self, driver: Driver, environment: Environment = TEST) -> None:
        self.driver = driver
        self.environment = environment
        self.token_requests = 0
        self.seen: list[tuple[tuple[str, str, int | None], str | None]] = []
        self.redirects: dict[str, str] = {}
        self.refusing: tuple[str, str, int | None] | None = None

    def client(self) -> Any:
        """Return a client whose every request comes here, signed."""
        if isinstance(self.driver, Requests):
            client = self.driver.client(trust_env=False)
            for scheme in ("http://", "https://"):
                client.mount(scheme, _adapter(self))
        else:
            transport = self.driver.library.MockTransport(self._answer_httpx)
            client = self.driver.client(transport=transport, trust_env=False)
        client.auth = self.driver.door.NexusAuth("id", SECRET, self.environment, **lend(self.driver, client))
        return client

    def answer(self, origin: tuple[str, str, int | None], request: Any) -> tuple[int, dict[str, str], bytes]:
        if str(request.url) == self.environment.token_endpoint:
            self.token_requests += 1
            return 200, {}, json.dumps({"access_token": f"{TOKEN}{self.token_requests}"}).encode()
        self.seen.append((origin, request.headers.get("Authorization")))
        path = urlsplit(str(request.url)).path
        if path in self.redirects:
            return 307, {"Location": self.redirects[path]}, b""
        signed = request.headers.get("Authorization", "").startswith("Bearer ")
        return (200 if signed and origin != self.refusing else 401), {}, b""

    def _answer_httpx(self, request: Any) -> Any:
        scheme, host = request.url.scheme, request.url.raw_host.decode().strip("[]")
        origin = scheme, host, request.url.port or {"http": 80, "https": 443}[scheme]
        status, headers, body = self.answer(origin, request)
        octets = [(name.encode(), value.encode()) for name, value in headers.items()]
        return self.driver.library.Response(status, headers=octets, content=body)

    @property
    def told(self) -> list[tuple[tuple[str, str, int | None], bool]]:
        """Who was asked, and whether they saw a token."""
        return [(origin, TOKEN in (authorization or "")) for origin, authorization in self.seen]


def _adapter(world: World) -> Any:
    import requests
    import urllib3
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
            connect = getattr(self, "get_connection_with_tls_context", None)  # since requests 2.32
            pool: Any = connect(request, True) if connect else self.get_connection(str(request.url))
            origin = pool.scheme, pool.host.strip("[]"), pool.port or {"http": 80, "https": 443}[pool.scheme]
            status, headers, body = world.answer(origin, request)
            raw = urllib3.HTTPResponse(io.BytesIO(body), headers, status, preload_content=False)
            return self.build_response(request, raw)

    return Adapter()


API = ("https", "testapi.quantoz.com", 443)
OWN = [
    "https://testapi.quantoz.com/x",
    "https://testapi.quantoz.com",
    "https://testapi.quantoz.com:443/x",
    "https://testapi.quantoz.com:/x",
    "https://TESTAPI.Quantoz.COM/x",
    "HTTPS://TESTAPI.QUANTOZ.COM:443/x",
    "https://testapi.quantoz.com?x=https://evil.example",
    "https://testapi.quantoz.com//evil.example/x",
    "https://testapi.quantoz.com/@evil.example/x",
    "https://user:password@testapi.quantoz.com/x",
]
FOREIGN = [
    "https://testapi.quantoz.com@evil.example/x",
    "https://testapi.quantoz.com:443@evil.example/x",
    "https://testapi.quantoz.com%2f@evil.example/x",
    "https://testapi.quantoz.com.evil.example/x",
    "https://testapi.quantoz.com:443.evil.example/x",
    "https://testapi.quantoz.com%2eevil.example/x",
    "https://testapi.quantoz.com\\.evil.example/x",
    "https://testapi.quantoz.com\\@evil.example/x",
    "https://evil.example\\@testapi.quantoz.com/x",
    "https://evil.example/@testapi.quantoz.com/x",
    "https://evil.example#@testapi.quantoz.com/x",
    "https://evil.example?@testapi.quantoz.com/x",
    "https://evil.example/https://testapi.quantoz.com/x",
    "https://eviltestapi.quantoz.com/x",
    "https://evil.testapi.quantoz.com/x",
    "https://quantoz.com/x",
    "https://testidentity.quantoz.com/x",
    "https://api.quantoz.com/x",
    "https://testapi.quantoz.co/x",
    "https://testapi.quantoz.com./x",
    "https://testapi-quantoz.com/x",
    "https://t\u0435stapi.quantoz.com/x",  # a Cyrillic e
    "https://xn--tstapi-4of.quantoz.com/x",
    "https://testapi.quantoz.com\u3002evil.example/x",  # an ideographic full stop
    "https://testapi.quantoz.com:8443/x",
    "https://testapi.quantoz.com:80/x",
    "https://testapi.quantoz.com:4430/x",
    "http://testapi.quantoz.com/x",
    "http://testapi.quantoz.com:443/x",
    "https://[::1]/x",
    "https://127.0.0.1/x",
]


def check_told(world: World) -> None:
    for origin, told in world.told:
        assert told == (origin == API), (origin, told)
    assert world.token_requests <= 1


def test_a_401_of_another_scheme_renews_nothing(driver: Driver) -> None:
    """Redirected from http to https on the default ports of a host, both libraries take the header along."""
    environment = Environment("local", token_endpoint="http://localhost/token", base_url="http://localhost")
    world = World(driver, environment)
    world.redirects["/up"] = "https://localhost/x"
    world.refusing = ("https", "localhost", 443)
    client = world.client()
    assert driver.get(client, "http://localhost/up").status == 401
    assert [origin for origin, _ in world.seen] == [("http", "localhost", 80), world.refusing]
    assert world.token_requests == 1
    driver.close(client)


def test_its_own_origin_gets_the_token_however_spelt(driver: Driver) -> None:
    for address in OWN:
        world = World(driver)
        client = world.client()
        assert driver.get(client, address).status == 200, address
        assert world.told == [(API, True)]
        world.redirects["/away"] = address
        assert driver.get(client, "https://testapi.quantoz.com/away").status == 200, address
        assert world.told == [(API, True)] * 3
        driver.close(client)


def test_no_other_origin_gets_the_token(driver: Driver) -> None:
    for address in FOREIGN:
        world = World(driver)
        client = world.client()
        outcome(lambda: driver.get(client, address))  # noqa: B023  the library may refuse it as well
        check_told(world)
        world.redirects["/away"] = address
        outcome(lambda: driver.get(client, "https://testapi.quantoz.com/away"))  # noqa: B023
        check_told(world)
        assert (API, True) in world.told
        driver.close(client)


def test_requests_elsewhere_pass_through_untouched(driver: Driver) -> None:
    world = World(driver)
    client = world.client()
    for authorization in ("Basic mine", "Bearer mine"):
        driver.get(client, "https://evil.example/x", headers={"Authorization": authorization})
        assert world.seen.pop() == (("https", "evil.example", 443), authorization)
    assert world.token_requests == 0
    driver.close(client)


@pytest.mark.parametrize("driver", SYNC, ids=repr)
def test_no_spelling_of_an_address_draws_the_token_elsewhere(driver: Driver) -> None:
    pieces = ["https://", "http://", "//", "testapi.quantoz.com", "evil.example", "[::1]", "localhost", "TESTAPI", "@",
              ":", ":443", ":80", "/", "\\", ".", "%2e", "%40", "%5c", "#", "?", "[", "]", "\t", " ", "\u3002",
              "\u00ad", "\u200b", "x", "1"]  # fmt: skip
    starts = ["https://testapi.quantoz.com", "https://", "http://", "//"]
    world = World(driver)
    client = world.client()

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=[*HealthCheck])  # pyright: ignore[reportArgumentType]
    @given(st.sampled_from(starts), st.lists(st.sampled_from(pieces)))
    def draw(start: str, rest: list[str]) -> None:
        address = start + "".join(rest)
        outcome(lambda: driver.get(client, address))
        world.redirects["/away"] = address
        outcome(lambda: driver.get(client, "https://testapi.quantoz.com/away"))
        check_told(world)

    draw()
    assert {told for _, told in world.told} == {True, False}
    driver.close(client)


@pytest.mark.parametrize(
    ("base_url", "own", "foreign"),
    [
        ("https://bücher.example", "https://xn--bcher-kva.example", "https://bucher.example"),
        ("https://xn--bcher-kva.example", "https://bücher.example:443", "https://bucher.example"),
        ("https://xn--bcher-kva.example", "https://XN--BCHER-KVA.example:443", "https://bucher.example"),
        ("https://[2001:db8::1]", "https://[2001:db8::1]:443", "https://[2001:db8::2]"),
        ("https://[2001:DB8::1]:8443", "https://[2001:db8::1]:8443", "https://[2001:db8::1]"),
        ("https://[2001:db8::1]:8443", "https://[2001:DB8::1]:8443", "https://[2001:db8::1]:443"),
        ("https://API.example:443/nexus/", "https://api.example/elsewhere", "https://api.example:8443/nexus/"),
        ("http://localhost", "http://LOCALHOST:80", "http://localhost:8080"),
        ("http://localhost:80/v1", "http://localhost/v2", "https://localhost:80/v1"),
        ("http://localhost:443", "http://localhost:443", "https://localhost"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", "http://127.0.0.1"),
        ("http://[::1]:8080", "http://[::1]:8080", "http://[::1]:8081"),
    ],
)
def test_origins_of_all_kinds(driver: Driver, base_url: str, own: str, foreign: str) -> None:
    world = World(driver, Environment("mine", token_endpoint="https://identity.example/token", base_url=base_url))
    client = world.client()
    for address in (base_url, own):
        assert driver.get(client, address).status == 200, address
    assert driver.get(client, foreign).status == 401
    assert [told for _, told in world.told] == [True, True, False]
    # In a Location header an internationalised name is spelt in ASCII.
    world.redirects.update({"/in": base_url if base_url.isascii() else own, "/out": foreign})
    origin = re.match("[a-z]+://[^/]+", base_url, re.IGNORECASE)
    assert origin
    assert driver.get(client, f"{origin[0]}/in").status == 200
    assert driver.get(client, f"{origin[0]}/out").status == 401
    assert [told for _, told in world.told][3:] == [True, True, True, False]
    assert world.token_requests == 1
    driver.close(client)


def test_https_instead_of_http_is_another_origin(driver: Driver) -> None:
    # On a redirect of that kind the libraries keep the token; plain http is for loopback, so it stays on the machine.
    base_url = "http://localhost"
    world = World(driver, Environment("mine", token_endpoint="https://identity.example/token", base_url=base_url))
    client = world.client()
    assert driver.get(client, "https://localhost").status == 401
    assert driver.get(client, base_url).status == 200
    driver.close(client)


def test_the_token_endpoints_host_is_not_the_api(driver: Driver, sandbox: NexusSandbox) -> None:
    with NexusSandbox() as stranger:
        environment = Environment(
            "split", token_endpoint=sandbox.environment.token_endpoint, base_url=stranger.environment.base_url
        )
        client = driver.client(driver.auth(sandbox, environment=environment))
        assert driver.get(client, url(sandbox)).status == 401
        assert "Authorization" not in sandbox.requests[0].headers
        stranger.answer("/away", status=302, headers={"Location": url(sandbox)})
        assert driver.get(client, url(stranger, "/away")).status == 401
        assert "Authorization" in stranger.requests[0].headers
        assert "Authorization" not in sandbox.requests[1].headers
        assert len(sandbox.token_requests) == 1
        driver.close(client)
