"""1. The token request: the client credentials grant (RFC 6749 section 4.4.2), and nothing else in it."""

from __future__ import annotations

import itertools
from typing import Any
from urllib.parse import parse_qsl

import pytest
from conftest import Driver, url
from hypothesis import given
from hypothesis import strategies as st

from nexus_auth import TokenRequestError, __version__, forget_tokens
from nexus_auth.grant import form
from nexus_auth.secret import HiddenText
from nexus_auth.steps import Client
from nexus_auth.testing import NexusSandbox

ODD = "S3cret~ /+&=%41'<\"ä€\N{KEY}:;#?\0x"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(client_id=TEXTS, client_secret=TEXTS, scope=TEXTS)
def test_form(client_id: str, client_secret: str, scope: str) -> None:
    client = Client("https://identity.example/token", client_id, HiddenText(client_secret), scope)
    assert sorted(parse_qsl(form(client), strict_parsing=True)) == [
        ("client_id", client_id),
        ("client_secret", client_secret),
        ("grant_type", "client_credentials"),
        ("scope", scope),
    ]


def test_what_is_in_the_form_is_in_the_key() -> None:
    """A field that were in the form alone would let two API clients share a token that only one of them may have."""
    client = Client("https://identity.example", "id", HiddenText("s"), "api1")
    sent = {name for name, _ in parse_qsl(form(client))}
    assert sent - {"grant_type"} == vars(client).keys() - {"token_endpoint"}


def test_four_fields_and_nothing_of_the_client(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox, iso8601=True)
    client.headers["X-Mine"] = "mine"
    client.cookies.set("mine", "mine")
    client.params = {"mine": "mine"}
    assert driver.get(client, "/customer").status == 200
    (token_request,) = sandbox.token_requests
    assert (token_request.method, token_request.path) == ("POST", "/connect/token")
    assert sorted(token_request.form) == [
        ("client_id", sandbox.client_id),
        ("client_secret", sandbox.client_secret),
        ("grant_type", "client_credentials"),
        ("scope", "api1"),
    ]
    assert token_request.headers.get_content_type() == "application/x-www-form-urlencoded"
    assert token_request.headers["Accept"] == "application/json"
    assert {name.lower() for name in token_request.headers} - {"connection"} == {
        "accept", "accept-encoding", "content-length", "content-type", "host", "user-agent",
    }  # fmt: skip
    assert "mine" not in f"{token_request.path}{token_request.headers}".lower()
    (request,) = sandbox.requests
    assert request.path == "/customer?mine=mine"
    assert (request.headers["X-Mine"], request.headers["Cookie"]) == ("mine", "mine=mine")


def test_user_agent(driver: Driver, sandbox: NexusSandbox) -> None:
    """RFC 9110 section 10.1.5: the product first, then the library that it is made with."""
    library = driver.library
    own = f"python-{library.__name__}/{library.__version__}"
    for client in (driver.ready_made(sandbox), driver.client(driver.auth(sandbox))):
        forget_tokens()
        assert driver.get(client, url(sandbox)).status == 200
        assert sandbox.token_requests[-1].headers["User-Agent"] == f"nexus-auth/{__version__} {own}"


def test_scope_is_sent_as_given(driver: Driver, sandbox: NexusSandbox) -> None:
    scope = "sanctionlist api1"
    for client in (driver.client(driver.auth(sandbox, scope=scope)), driver.ready_made(sandbox, scope=scope)):
        forget_tokens()
        assert driver.get(client, url(sandbox)).status == 200
        assert dict(sandbox.token_requests[-1].form)["scope"] == scope


def test_odd_characters_arrive_as_they_are(driver: Driver, sandbox: NexusSandbox) -> None:
    sandbox.clients[f"id {ODD}"] = f"secret {ODD}"
    auth = driver.auth(sandbox, client_id=f"id {ODD}", client_secret=f"secret {ODD}")
    assert driver.get(driver.client(auth), url(sandbox)).status == 200


def test_redirects_are_not_followed(driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox) -> None:
    """With 307 and 308 a library that follows sends the secret along."""
    lent = driver.client()
    clients: list[Any] = [
        driver.client(driver.auth(sandbox)),
        driver.client(driver.auth(sandbox, **driver.lend(lent))),
        driver.ready_made(sandbox),
    ]
    away = stranger.environment.token_endpoint
    redirects = [(301, away), (302, away), (303, away), (307, away), (308, away), (307, "/connect/2"), (308, "3"),
                 (302, "http://else.example:abc/"), (302, "mailto:x")]  # fmt: skip
    for client, (status, target) in itertools.product(clients, redirects):
        forget_tokens()
        sandbox.fail_token_requests(status=status, headers={"Location": target})
        with pytest.raises(TokenRequestError) as raised:
            driver.get(client, url(sandbox))
        assert raised.value.status_code == status
        assert f"redirected to {target}, which is not followed (HTTP {status})" in str(raised.value)
    assert len(sandbox.token_requests) == len(clients) * len(redirects)
    assert stranger.token_requests + stranger.requests + sandbox.requests == []
