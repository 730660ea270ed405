"""5. Only the environment's own origin ever gets the token: scheme, host and port of its `base_url`."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from conftest import Answered, Driver, Log, Sent, outcome, url
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_auth import TEST, Environment, forget_tokens
from nexus_auth.testing import NexusSandbox

API = ("https", "testapi.quantoz.com", 443)
OWN = [
    "https://testapi.quantoz.com/x", "https://testapi.quantoz.com", "https://testapi.quantoz.com:443/x",
    "https://testapi.quantoz.com:/x", "https://TESTAPI.Quantoz.COM/x", "HTTPS://TESTAPI.QUANTOZ.COM:443/x",
    "https://testapi.quantoz.com?x=https://evil.example", "https://testapi.quantoz.com//evil.example/x",
    "https://testapi.quantoz.com/@evil.example/x", "https://user:password@testapi.quantoz.com/x",
]  # fmt: skip
FOREIGN = [
    "https://testapi.quantoz.com@evil.example/x", "https://testapi.quantoz.com:443@evil.example/x",
    "https://testapi.quantoz.com%2f@evil.example/x", "https://testapi.quantoz.com.evil.example/x",
    "https://testapi.quantoz.com:443.evil.example/x", "https://testapi.quantoz.com%2eevil.example/x",
    "https://testapi.quantoz.com\\.evil.example/x", "https://testapi.quantoz.com\\@evil.example/x",
    "https://evil.example\\@testapi.quantoz.com/x", "https://evil.example/@testapi.quantoz.com/x",
    "https://evil.example#@testapi.quantoz.com/x", "https://evil.example?@testapi.quantoz.com/x",
    "https://evil.example/https://testapi.quantoz.com/x", "https://eviltestapi.quantoz.com/x",
    "https://evil.testapi.quantoz.com/x", "https://quantoz.com/x", "https://testidentity.quantoz.com/x",
    "https://api.quantoz.com/x", "https://testapi.quantoz.co/x", "https://testapi.quantoz.com./x",
    "https://testapi-quantoz.com/x",
    "https://t\u0435stapi.quantoz.com/x",  # a Cyrillic e
    "https://xn--tstapi-4of.quantoz.com/x",
    "https://testapi.quantoz.com\u3002evil.example/x",  # an ideographic full stop
    "https://testapi.quantoz.com:8443/x", "https://testapi.quantoz.com:80/x", "https://testapi.quantoz.com:4430/x",
    "http://testapi.quantoz.com/x", "http://testapi.quantoz.com:443/x", "https://[::1]/x", "https://127.0.0.1/x",
]  # fmt: skip
ORIGINS = [  # base_url, another spelling of its origin, and another origin
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
]
PIECES = ["https://", "http://", "//", "testapi.quantoz.com", "evil.example", "[::1]", "localhost", "TESTAPI", "@",
          ":", ":443", ":80", "/", "\\", ".", "%2e", "%40", "%5c", "#", "?", "[", "]", "\t", " ", "\u3002",
          "\u00ad", "\u200b", "x", "1"]  # fmt: skip


class World:
    """All hosts that there are: they give out tokens, redirect, and answer 200 to whoever shows a token, else 401."""

    def __init__(self, driver: Driver, environment: Environment = TEST) -> None:
        self.environment = environment
        self.redirects: dict[str, str] = {}  # from a path, to a URL
        self.token_requests = 0
        self.told: list[tuple[tuple[str, str, int], bool]] = []  # who was asked, and whether they saw a token
        self.refusing: tuple[str, str, int] | None = None  # an origin that takes no token
        self.client = driver.client_without_network(self.answer)
        self.client.auth = driver.door.NexusAuth("id", "s3cret", environment, **driver.lend(self.client))

    def answer(self, sent: Sent) -> Answered:
        if sent.url == self.environment.token_endpoint:
            self.token_requests += 1
            return Answered(200, json.dumps({"access_token": f"token-{self.token_requests}"}).encode())
        has_token = (sent.authorization or "").startswith("Bearer token-")
        self.told.append((sent.origin, has_token))
        if location := self.redirects.get(urlsplit(sent.url).path):
            return Answered(307, headers={"Location": location})
        return Answered(200 if has_token and sent.origin != self.refusing else 401)

    def check(self) -> None:
        """Check that the API has seen the token each time, and nobody else at any time."""
        for origin, has_token in self.told:
            assert has_token == (origin == API), origin
        assert self.token_requests <= 1


def test_own_origin_gets_the_token_however_spelt(driver: Driver) -> None:
    for address in OWN:
        world = World(driver)
        world.redirects["/away"] = address
        assert driver.get(world.client, address).status == 200, address
        assert driver.get(world.client, "https://testapi.quantoz.com/away").status == 200, address
        assert world.told == [(API, True)] * 3


def test_no_other_origin_gets_the_token(driver: Driver) -> None:
    for address in FOREIGN:
        world = World(driver)
        world.redirects["/away"] = address
        for start in (address, "https://testapi.quantoz.com/away"):
            outcome(driver.get, world.client, start)  # which the library may refuse itself
        world.check()
        assert (API, True) in world.told


def test_no_address_draws_the_token_elsewhere(driver: Driver) -> None:
    world = World(driver)

    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(["https://testapi.quantoz.com", "https://", "http://", "//"]),
           st.lists(st.sampled_from(PIECES)))  # fmt: skip
    def draw(start: str, rest: list[str]) -> None:
        world.redirects["/away"] = address = start + "".join(rest)
        outcome(driver.get, world.client, address)
        outcome(driver.get, world.client, "https://testapi.quantoz.com/away")
        world.check()

    draw()
    assert {has_token for _, has_token in world.told} == {True, False}


def test_origins_of_all_kinds(driver: Driver) -> None:
    for base_url, own, foreign in ORIGINS:
        forget_tokens()
        world = World(driver, Environment("mine", token_endpoint="https://identity.example/token", base_url=base_url))
        # In a Location header an internationalised name is spelt in ASCII.
        world.redirects = {"/in": base_url if base_url.isascii() else own, "/out": foreign}
        origin = "/".join(base_url.split("/")[:3])
        for address, status in (
            (base_url, 200), (own, 200), (foreign, 401), (f"{origin}/in", 200), (f"{origin}/out", 401),
        ):  # fmt: skip
            assert driver.get(world.client, address).status == status, (base_url, address)
        assert [has_token for _, has_token in world.told] == [True, True, False, True, True, True, False]
        assert world.token_requests == 1


def test_https_instead_of_http_is_another_origin(driver: Driver) -> None:
    world = World(driver, Environment("local", token_endpoint="http://localhost/token", base_url="http://localhost"))
    assert driver.get(world.client, "https://localhost").status == 401
    assert driver.get(world.client, "http://localhost").status == 200


def test_a_401_after_a_redirect_to_another_scheme_renews_nothing(driver: Driver) -> None:
    """From http to https on the default ports of a host the libraries take the header along, as to a better http."""
    environment = Environment("local", token_endpoint="http://localhost/token", base_url="http://localhost")
    world = World(driver, environment)
    world.redirects["/up"] = "https://localhost/x"
    world.refusing = ("https", "localhost", 443)
    assert driver.get(world.client, "http://localhost/up").status == 401
    assert [origin for origin, _ in world.told] == [("http", "localhost", 80), world.refusing]
    assert world.token_requests == 1


def authorizations(sandbox: NexusSandbox) -> list[str | None]:
    """Return the scheme of each Authorization header that arrived."""
    headers = [arrival.headers["Authorization"] for arrival in sandbox.requests]
    return [header and header.partition(" ")[0] for header in headers]


def test_another_host_gets_no_token(driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    assert driver.get(client, url(stranger)).status == 401
    assert sandbox.token_requests == []
    assert driver.get(client, url(sandbox)).status == 200
    assert driver.get(client, url(stranger)).status == 401
    assert authorizations(stranger) == [None, None]
    assert len(sandbox.token_requests) == 1


def test_requests_elsewhere_pass_through_untouched(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox, log: Log
) -> None:
    client = driver.client(driver.auth(sandbox))
    for authorization in ("Basic mine", "Bearer mine"):
        headers = {"Authorization": authorization, "X-Mine": "mine"}
        assert driver.send(client, "POST", url(stranger), b"mine", headers=headers).history == []
        arrival = stranger.requests[-1]
        assert (arrival.body, arrival.headers["X-Mine"]) == (b"mine", "mine")
        assert arrival.headers["Authorization"] == authorization
    with_more = url(stranger).replace("//", "//user:pass@") + "?signature=mine#mine"
    driver.get(client, with_more)
    assert log() == [("DEBUG", f"no token sent to {url(stranger)}: not of environment sandbox")] * 3
    assert sandbox.token_requests == []


def test_the_host_of_the_token_endpoint_is_not_the_api(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox
) -> None:
    environment = Environment(
        "split", token_endpoint=sandbox.environment.token_endpoint, base_url=stranger.environment.base_url
    )
    client = driver.client(driver.auth(sandbox, environment=environment))
    stranger.answer("/away", status=302, headers={"Location": url(sandbox)})
    assert driver.get(client, url(sandbox)).status == 401
    assert driver.get(client, url(stranger, "/away")).status == 401
    assert authorizations(stranger) == ["Bearer"]
    assert authorizations(sandbox) == [None, None]
    assert len(sandbox.token_requests) == 1


def test_no_token_follows_a_redirect_elsewhere(driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox) -> None:
    for client in (driver.client(driver.auth(sandbox)), driver.ready_made(sandbox)):
        for status in (301, 302, 303, 307, 308):
            sandbox.answer("/away", status=status, headers={"Location": url(stranger)})
            assert driver.send(client, "POST", url(sandbox, "/away"), b"body").status == 401
    assert authorizations(stranger) == [None] * 10
    assert len(sandbox.token_requests) == 1


def test_redirected_elsewhere_and_back(driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox) -> None:
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/away", status=307, headers={"Location": url(stranger, "/back")})
    stranger.answer("/back", status=307, headers={"Location": url(sandbox)})
    assert driver.get(client, url(sandbox, "/away")).status == 401
    assert authorizations(stranger) == [None]
    assert authorizations(sandbox) == ["Bearer", None]
    assert len(sandbox.token_requests) == 1


def test_what_a_stranger_is_shown_does_not_follow_to_the_api(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox
) -> None:
    client = driver.ready_made(sandbox)
    shown: list[dict[str, Any]] = [{"headers": {"Authorization": "Custom mine"}}, {"auth": ("mine", "mine")}]
    for options in shown:
        stranger.answer("/away", status=302, headers={"Location": url(sandbox)})
        assert driver.get(client, url(stranger, "/away"), **options).status == 401
    assert authorizations(stranger) == ["Custom", "Basic"]
    assert authorizations(sandbox) == [None, None]
    assert sandbox.token_requests == []


def test_a_401_of_a_stranger_is_not_read(driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox) -> None:
    """It may be of any length: here the whole of it never comes."""
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/away", status=302, headers={"Location": url(stranger, "/endless")})
    stranger.answer("/endless", status=401, headers={"Content-Length": "1000000"}, times=None)
    for address in (url(sandbox, "/away"), url(stranger, "/endless")):
        assert driver.in_background(driver.status_of, client, address).result(timeout=10) == 401
    assert len(sandbox.token_requests) == 1


def test_a_redirect_within_the_api_keeps_the_token(driver: Driver, sandbox: NexusSandbox) -> None:
    for client in (driver.client(driver.auth(sandbox)), driver.ready_made(sandbox)):
        sandbox.answer("/payment", status=303, headers={"Location": "/payment/1"})
        assert driver.send(client, "POST", url(sandbox, "/payment"), b"12.50").history == [303]
    assert authorizations(sandbox) == ["Bearer"] * 4
    assert len(sandbox.token_requests) == 1


def test_refused_after_a_redirect_within_the_api(driver: Driver, sandbox: NexusSandbox) -> None:
    """What was refused is sent again, not what was accepted before."""
    client = driver.client(driver.auth(sandbox))
    sandbox.answer("/payment", status=303, headers={"Location": "/payment/1"})
    sandbox.answer("/payment/1", status=401)
    assert driver.send(client, "POST", url(sandbox, "/payment"), b"12.50").status == 200
    assert [(arrival.method, arrival.path) for arrival in sandbox.requests] == [
        ("POST", "/payment"), ("GET", "/payment/1"), ("GET", "/payment/1"),
    ]  # fmt: skip
