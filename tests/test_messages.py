"""Messages: what a person sees in the likeliest mishaps: who was asked for what, what came back, what to do next."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme
from conftest import Driver, Requests, closed_port, outcome

from nexus_auth import PRODUCTION, TEST, Environment, forget_tokens, grant
from nexus_auth.quota import Slot
from nexus_auth.testing import NexusSandbox

# What to look for in each message, in this order; {} is the token endpoint.
TABLE: dict[str, list[str]] = {
    "wrong secret": ["token endpoint {} (sandbox) refused client 'sandbox-client': invalid_client (HTTP 400). Check "
                     "client_id, client_secret"],
    "production credentials in test": ["token endpoint {} (test) refused client 'of-production'", "invalid_client",
                                       "(HTTP 400). Check ", "this environment"],
    "wrong environment": ["unknown environment 'prod': 'test' or 'production', or an Environment"],
    "missing environment variables": ["environment variables not set: ", "NEXUS_CLIENT_ID", "NEXUS_CLIENT_SECRET",
                                      "NEXUS_ENVIRONMENT"],
    "no network": ["token endpoint {} (test) could not be reached. Check network, proxy and TLS settings.", "Connect",
                   "Temporary failure in name resolution"],
    "DNS failure": ["token endpoint {} (production) could not be reached. Check network, proxy and TLS settings.",
                    "Connect", "Name or service not known"],
    "TLS failure": ["token endpoint {} (sandbox) could not be reached. Check network, proxy and TLS settings.",
                    "CERTIFICATE_VERIFY_FAILED"],
    "dead proxy": ["token endpoint {} (sandbox) could not be reached. Check network, proxy and TLS settings.",
                   "Error: "],
    "rate limited by the server": ["token endpoint {} (sandbox) failed with HTTP 429", "due in 1000.0 s",
                                   "later than max_wait allows. Try again then."],
    "rate limited by the quota": ["token endpoint {} (sandbox) takes 60 requests a minute: the next is due in ",
                                  "later than max_wait allows. Try again then."],
    "identity server down": ["token endpoint {} (down) could not be reached. Check network, proxy and TLS settings.",
                             "Connect"],
    "identity server unavailable": ["token endpoint {} (sandbox) ", "(HTTP 503)", "try again later"],
    "redirected": ["token endpoint {} (sandbox) redirected to https://else.example/login, which is not followed "
                   "(HTTP 302). Check token_endpoint"],
    "not the token endpoint": ["token endpoint {} (sandbox) gave ", "(HTTP 404). Check token_endpoint"],
    "API refusing the token": ["token endpoint {} (sandbox)", "client 'sandbox-client'", "401", "Check "],
}  # fmt: skip
MISHAPS: dict[str, Callable[[Person], object]] = {}


class Person:
    """Somebody who makes a first call, with whichever library."""

    def __init__(
        self, driver: Driver, sandbox: NexusSandbox, secured: NexusSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.driver, self.sandbox, self.secured, self.monkeypatch = driver, sandbox, secured, monkeypatch
        self.endpoint = sandbox.environment.token_endpoint

    def call(self, environment: Any = None, lent: Any = None, **options: Any) -> object:
        """Return what comes of a call to `environment`, by default the sandbox."""
        environment = environment or self.sandbox.environment
        lent = lent or self.driver.client()
        own = {"client_id": self.sandbox.client_id, "client_secret": self.sandbox.client_secret, "max_wait": 30}
        options = {**own, **options}
        options["session" if isinstance(self.driver, Requests) else "client"] = lent
        client = self.driver.client(self.driver.door.NexusAuth(environment=environment, **options))
        self.endpoint = environment.token_endpoint
        try:
            return outcome(lambda: self.driver.get(client, f"{environment.base_url}/customer"))
        finally:
            self.driver.close(lent)
            self.driver.close(client)

    def lose(self, code: int, text: str) -> None:
        """Have nobody find any host but the own machine."""

        def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
            if host in ("localhost", "127.0.0.1"):
                return known(host, *arguments, **options)
            raise socket.gaierror(code, text)

        known = socket.getaddrinfo
        self.monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def mishap(name: str) -> Callable[[Callable[[Person], object]], Callable[[Person], object]]:
    def register(happens: Callable[[Person], object]) -> Callable[[Person], object]:
        MISHAPS[name] = happens
        return happens

    return register


@mishap("wrong secret")
def _(person: Person) -> object:
    return person.call(client_secret="wr0ng")


@mishap("production credentials in test")
def _(person: Person) -> object:
    sandbox = person.sandbox.environment
    environment = Environment("test", token_endpoint=sandbox.token_endpoint, base_url=sandbox.base_url)
    return person.call(environment, client_id="of-production", client_secret="pr0duction")


@mishap("wrong environment")
def _(person: Person) -> object:
    return outcome(lambda: person.driver.door.NexusAuth("id", "s3cret", "prod"))


@mishap("missing environment variables")
def _(person: Person) -> object:
    for name in os.environ:
        if name.startswith("NEXUS_"):
            person.monkeypatch.delenv(name)
    return outcome(person.driver.door.NexusAuth.from_env)


@mishap("no network")
def _(person: Person) -> object:
    person.lose(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return person.call(TEST)


@mishap("DNS failure")
def _(person: Person) -> object:
    person.lose(socket.EAI_NONAME, "Name or service not known")
    return person.call(PRODUCTION)


@mishap("TLS failure")
def _(person: Person) -> object:
    return person.call(person.secured.environment)


@mishap("dead proxy")
def _(person: Person) -> object:
    proxy = f"http://127.0.0.1:{closed_port()}"
    options = {"proxies": {"http": proxy}} if isinstance(person.driver, Requests) else {"proxy": proxy}
    return person.call(lent=person.driver.client(**options))


@mishap("rate limited by the server")
def _(person: Person) -> object:
    person.sandbox.fail_token_requests(status=429, retry_after=1000)
    return person.call()


@mishap("rate limited by the quota")
def _(person: Person) -> object:
    quota = person.driver.auth(person.sandbox)._credentials.quota
    for _ in range(60):
        quota.wait(Slot(), time.monotonic())
    return person.call()


@mishap("identity server down")
def _(person: Person) -> object:
    url = f"http://127.0.0.1:{closed_port()}"
    return person.call(Environment("down", token_endpoint=f"{url}/connect/token", base_url=url))


@mishap("identity server unavailable")
def _(person: Person) -> object:
    person.sandbox.fail_token_requests(4, status=503, body="<html>")
    return person.call()


@mishap("redirected")
def _(person: Person) -> object:
    person.sandbox.fail_token_requests(status=302, headers={"Location": "https://else.example/login?back=1"})
    return person.call()


@mishap("not the token endpoint")
def _(person: Person) -> object:
    person.sandbox.fail_token_requests(status=404, body="<html>")
    return person.call()


@mishap("API refusing the token")
def _(person: Person) -> object:
    person.sandbox.answer("/customer", status=401, times=2)
    return person.call()


@pytest.fixture(scope="module")
def certified() -> ssl.SSLContext:
    """The TLS context of a server whose authority nobody trusts."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def person(
    driver: Driver, sandbox: NexusSandbox, certified: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Person]:
    monkeypatch.setattr(grant, "BACKOFF", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with NexusSandbox(ssl_context=certified) as secured:
        yield Person(driver, sandbox, secured, monkeypatch)


def test_what_a_person_sees(person: Person, caplog: pytest.LogCaptureFixture) -> None:
    assert MISHAPS.keys() == TABLE.keys()
    missed = {}
    for name, happens in MISHAPS.items():
        caplog.clear()
        with person.monkeypatch.context() as person.monkeypatch:
            seen = happens(person)
        # Where the caller gets an answer and no error, the log has to tell; of it, what is shown by default.
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        text = str(seen) if isinstance(seen, Exception) else "\n".join(warnings)
        at = 0
        for fragment in TABLE[name]:
            at = text.find(fragment.format(person.endpoint), at)
            if at < 0 or len(text.splitlines()) > 3 or len(text) > 600:
                missed[name] = f"{fragment!r} not in {text!r}"
                break
        forget_tokens()
    assert missed == {}
