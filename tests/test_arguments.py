"""Arguments: each wrong one is refused when the auth is made, by its name, and none of the errors shows the secret."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DRIVERS, INSTALLED, Driver, outcome, url

from nexus_auth import PRODUCTION, TEST, Environment, forget_tokens
from nexus_auth.testing import NexusSandbox

SECRET = "s3cret-of-the-client"

TEXTS: list[tuple[object, type[Exception], str]] = [
    ("", ValueError, "is empty"),
    ("   ", ValueError, "is empty"),
    ("\n", ValueError, "is empty"),
    ("\t\u3000\n", ValueError, "is empty"),
    (f"{SECRET}\n", ValueError, "ends with a newline"),
    (f"{SECRET}\r\n", ValueError, "ends with a newline"),
    (f"{SECRET}\r", ValueError, "ends with a newline"),
    (f"{SECRET}\udc80", ValueError, "has lone surrogates"),
    ("\ud800", ValueError, "has lone surrogates"),
    (None, TypeError, "must be a str, not nonetype"),
    (SECRET.encode(), TypeError, "must be a str, not bytes"),
    (12345, TypeError, "must be a str, not int"),
    ([SECRET], TypeError, "must be a str, not list"),
    (range(3), TypeError, "must be a str, not range"),
]
INFINITE = float("inf")
NUMBERS: list[tuple[type[Exception], list[object]]] = [
    # What no clock and no socket takes is no sensible number of seconds either.
    (ValueError, [float("nan"), INFINITE, -INFINITE, -1, -0.001, 1e300, 10**400, 1e11]),
    (TypeError, [True, False, "10", None, (3, 5), 1j]),
]


@pytest.fixture(params=[name for name in INSTALLED if "-" not in name])
def door(request: pytest.FixtureRequest) -> types.ModuleType:
    """The module of each library."""
    module: types.ModuleType = DRIVERS[request.param]().door
    return module


def makers(door: Any) -> list[Callable[..., Any]]:
    """Return all that takes the arguments of a `NexusAuth`."""
    names = ("NexusAuth", "nexus_session", "nexus_client", "nexus_async_client")
    return [getattr(door, name) for name in names if hasattr(door, name)]


@pytest.mark.parametrize("argument", ["client_id", "client_secret", "scope"])
def test_texts(door: Any, argument: str) -> None:
    arguments: dict[str, Any] = {"client_id": "id", "client_secret": SECRET, "environment": "test"}
    for value, kind, words in TEXTS:
        error = outcome(door.NexusAuth, **{**arguments, argument: value})
        assert type(error) is kind, value
        assert str(error).lower().startswith(f"{argument} {words}")
        assert SECRET not in f"{error}{error!r}"


@pytest.mark.parametrize("argument", ["leeway", "timeout", "max_wait"])
def test_numbers(door: Any, argument: str) -> None:
    for kind, values in NUMBERS:
        for value in values:
            error = outcome(door.NexusAuth, "id", SECRET, "test", **{argument: value})
            assert type(error) is kind, value
            assert re.match(f"{argument} must be a (sensible )?number of seconds, not ", str(error))


def test_zero_seconds(door: Any) -> None:
    with pytest.raises(ValueError, match=r"^timeout must be more than 0 seconds"):
        door.NexusAuth("id", SECRET, "test", timeout=0)
    assert door.NexusAuth("id", SECRET, "test", leeway=0, max_wait=0)


def test_a_number_that_is_taken_works(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client()
    for seconds in (0.5, 100_000, 1e6, 10**9):
        forget_tokens()
        auth = driver.auth(sandbox, leeway=seconds, timeout=seconds, max_wait=seconds)
        assert driver.get(client, url(sandbox), auth=auth).status == 200, seconds


def test_only_keywords_after_the_environment(door: Any) -> None:
    for make in makers(door):
        with pytest.raises(TypeError):
            make("id", SECRET, "test", "api1")


def test_factories_check_their_arguments_too(door: Any) -> None:
    for make in makers(door):
        with pytest.raises(ValueError, match=r"^scope is empty"):
            make("id", SECRET, "test", scope="")
        with pytest.raises(ValueError, match=r"^leeway must be "):
            make("id", SECRET, "test", leeway=-1)


def test_an_unknown_environment(door: Any) -> None:
    values = ["prod", "TEST", "test ", "", "https://testapi.quantoz.com"]
    for make, value in itertools.product(makers(door), values):
        with pytest.raises(ValueError, match="unknown environment") as raised:
            make("id", SECRET, value)
        assert str(raised.value) == f"unknown environment {value!r}: 'test' or 'production', or an Environment"


def test_what_is_no_environment(door: Any) -> None:
    values: list[object] = [1, b"test", ("test", "https://a.example"), ["test"], Path("test")]
    for make, value in itertools.product(makers(door), values):
        with pytest.raises(TypeError, match=r"^environment must be 'test' or 'production', or an Environment of nexus"):
            make("id", SECRET, value)


def test_the_environment_of_a_copy_of_the_package_is_named_as_such(door: Any) -> None:
    foreign = type("Environment", (), {"__module__": "acme._vendor.nexus_auth.environment"})
    for make in makers(door):
        with pytest.raises(TypeError, match=r"Environment of nexus_auth, not .*\(a acme\._vendor\.nexus_auth\.env"):
            make("id", SECRET, foreign())


def test_no_environment_by_default(door: Any) -> None:
    with pytest.raises(TypeError, match="environment"):
        door.NexusAuth("id", SECRET)
    with pytest.raises(TypeError, match="environment"):
        door.NexusAuth("id", SECRET, None)


def test_the_environments_by_name(door: Any) -> None:
    assert door.NexusAuth("id", SECRET, "test").environment is TEST
    assert door.NexusAuth("id", SECRET, "production").environment is PRODUCTION


def test_documented_environments() -> None:
    assert (TEST.name, TEST.token_endpoint, TEST.base_url) == (
        "test", "https://testidentity.quantoz.com/connect/token", "https://testapi.quantoz.com",
    )  # fmt: skip
    assert (PRODUCTION.name, PRODUCTION.token_endpoint, PRODUCTION.base_url) == (
        "production", "https://identity.quantoz.com/connect/token", "https://api.quantoz.com",
    )  # fmt: skip


REFUSED = [
    "http://testapi.quantoz.com", "HTTP://TESTAPI.QUANTOZ.COM", "http://testapi.quantoz.com:443",
    "http://127.0.0.1.evil.example", "http://localhost.evil.example", "http://evil-localhost",
    "http://localhost@evil.example", "http://localhost:80@evil.example", "http://127.0.0.1@evil.example",
    "http://evil.example#@localhost", "http://evil.example\\@localhost", "http://localhost\\@evil.example",
    "http://localhost\\.evil.example", "http://localhost\t.evil.example", "http://localhost\n.evil.example",
    "http://[::1].evil.example", "http://evil.example[::1]", "http://[::2]", "http://[::ffff:1.2.3.4]",
    "http://128.0.0.1", "http://1127.0.0.1", "http://127.0.0.1.1",
    "http://127.0.0.\u0662",  # a digit, but no IP address
    "http://0.0.0.0",
    "http://localho\u017ft",  # a long s
    "http\u017f://testapi.quantoz.com", "https://user@testapi.quantoz.com", "https://user:password@testapi.quantoz.com",
    "https://testapi.quantoz.com@evil.example", "https://testapi.quantoz.com#fragment",
    "https://testapi.quantoz.com/?tenant=1", "https://testapi.quantoz.com\\evil",
    "https://testapi.quantoz.com/with space", " https://testapi.quantoz.com", "https://testapi.quantoz.com ",
    "https://testapi.quantoz.com\n", "https://testapi.quantoz.com\r\nX-Injected: 1", "https://testapi.quantoz.com\x00",
    "https://testapi.quantoz.com:port", "https://testapi.quantoz.com:70000", "https://testapi.quantoz.com:-1",
    "https://testapi.quantoz.com:44\u0663", "https://[::1", "https://[testapi]", "https:///path", "https://",
    "https:testapi.quantoz.com", "//testapi.quantoz.com", "testapi.quantoz.com", "ftp://testapi.quantoz.com",
    "file:///etc/passwd", "javascript:alert(1)", "", " ",
]  # fmt: skip
TAKEN = [
    "https://testapi.quantoz.com", "HTTPS://TESTAPI.QUANTOZ.COM/V1", "https://testapi.quantoz.com:443",
    "https://testapi.quantoz.com:8443/nexus/", "https://[2001:db8::1]:8443", "https://bücher.example",
    "https://xn--bcher-kva.example", "http://localhost", "HTTP://LocalHost:8080", "http://127.0.0.1:8080/nexus",
    "http://127.1.2.3", "http://[::1]:8080",
]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED, ids=ascii)
def test_urls_that_are_refused(address: str) -> None:
    for argument in ("token_endpoint", "base_url"):
        urls = {"token_endpoint": "https://identity.example", "base_url": "https://api.example", argument: address}
        with pytest.raises(ValueError, match=f"^{argument} must be ") as raised:
            Environment("mine", **urls)
        assert "password" not in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1


def test_urls_that_are_taken(door: Any) -> None:
    for address in TAKEN:
        environment = Environment("mine", token_endpoint=address, base_url=address)
        assert (environment.name, environment.token_endpoint, environment.base_url) == ("mine", address, address)
        assert door.NexusAuth("id", SECRET, environment).environment is environment


@pytest.mark.parametrize("argument", ["token_endpoint", "base_url"])
@pytest.mark.parametrize("value", [None, b"https://api.example", 1, ["https://api.example"]], ids=repr)
def test_urls_that_are_no_str(argument: str, value: Any) -> None:
    urls = {"token_endpoint": "https://identity.example", "base_url": "https://api.example", argument: value}
    with pytest.raises(TypeError, match=f"^{argument} must be a str"):
        Environment("mine", **urls)


def test_urls_that_only_the_library_refuses(driver: Driver, sandbox: NexusSandbox) -> None:
    """It is a `ValueError` when the auth is made, or an error of the library before anything is sent."""
    addresses = ["https://[v1.x]", "https://999.1.1.1", "https://ä..example", "https://xn--a"]
    for argument, address in itertools.product(("token_endpoint", "base_url"), addresses):

        def call(argument: str = argument, address: str = address) -> object:
            urls = {"token_endpoint": "http://127.0.0.1:9", "base_url": "http://127.0.0.1:9", argument: address}
            auth = driver.auth(sandbox, environment=Environment("mine", **urls), max_wait=0)
            return driver.get(driver.client(auth), "http://127.0.0.1:9/customer")

        assert isinstance(outcome(call), (driver.library_error, ValueError)), (argument, address)


@pytest.mark.parametrize("name", ["a\nb", None, 1], ids=repr)
def test_the_name_of_an_environment_is_printable(name: Any) -> None:
    with pytest.raises(TypeError, match=r"^name of an Environment must be a str of printable characters"):
        Environment(name, token_endpoint="https://identity.example/token", base_url="https://api.example")


def test_an_environment_is_frozen() -> None:
    for name in ("name", "token_endpoint", "base_url", "another"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(TEST, name, "http://evil.example")
        with pytest.raises((AttributeError, TypeError)):
            delattr(TEST, name)
    assert TEST != PRODUCTION
    assert {TEST, PRODUCTION, TEST} == {TEST, PRODUCTION}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(TEST, protocol)) == copy.deepcopy(TEST) == TEST


def test_no_way_around_the_check_of_an_environment() -> None:
    for way in ("_replace", "__replace__"):
        if replace := getattr(TEST, way, None):
            with pytest.raises((ValueError, TypeError)):
                replace(token_endpoint="http://evil.example")
    assert not hasattr(Environment, "_make")


NAMES = ("CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT", "TOKEN_ENDPOINT", "BASE_URL", "STORE")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the environment variables of a prefix to its arguments, and no others."""

    def set_them(prefix: str = "NEXUS_", **values: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(prefix + name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(prefix + name, value)

    return set_them


def test_from_env_by_name(door: Any, variables: Any) -> None:
    variables(CLIENT_ID="id", CLIENT_SECRET=SECRET, ENVIRONMENT="production")
    auth = door.NexusAuth.from_env()
    assert (type(auth), auth.client_id, auth.environment) == (door.NexusAuth, "id", PRODUCTION)


def test_from_env_by_urls(driver: Driver, sandbox: NexusSandbox, variables: Any) -> None:
    environment = sandbox.environment
    urls = {"TOKEN_ENDPOINT": environment.token_endpoint, "BASE_URL": environment.base_url}
    variables("ACME_", CLIENT_ID=sandbox.client_id, CLIENT_SECRET=sandbox.client_secret, **urls)
    auth = driver.door.NexusAuth.from_env("ACME_", scope="sanctionlist", leeway=30, timeout=5, max_wait=10)
    client = driver.client(auth)
    assert driver.get(client, url(sandbox)).status == 200
    assert dict(sandbox.token_requests[0].form)["scope"] == "sanctionlist"
    assert driver.get(client, url(sandbox), auth=driver.auth(sandbox, scope="sanctionlist")).status == 200
    assert len(sandbox.token_requests) == 1
    with pytest.raises(ValueError, match="NEXUS_CLIENT_ID"):
        driver.door.NexusAuth.from_env()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, {"CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT"}),
        ({"CLIENT_ID": "id"}, {"CLIENT_SECRET", "ENVIRONMENT"}),
        ({"ENVIRONMENT": "test"}, {"CLIENT_ID", "CLIENT_SECRET"}),
        ({"STORE": "folder", "ENVIRONMENT": "test"}, {"CLIENT_ID", "CLIENT_SECRET"}),
        ({"CLIENT_ID": "id", "CLIENT_SECRET": SECRET}, {"ENVIRONMENT"}),
        ({"CLIENT_SECRET": SECRET, "ENVIRONMENT": ""}, {"CLIENT_ID", "ENVIRONMENT"}),
        ({"TOKEN_ENDPOINT": "https://a.example"}, {"CLIENT_ID", "CLIENT_SECRET", "BASE_URL"}),
        ({"CLIENT_SECRET": SECRET, "BASE_URL": "https://a.example"}, {"CLIENT_ID", "TOKEN_ENDPOINT"}),
        ({"BASE_URL": "https://a.example", "TOKEN_ENDPOINT": "https://b.example"}, {"CLIENT_ID", "CLIENT_SECRET"}),
    ],
)
def test_from_env_names_all_that_is_missing_at_once(
    door: Any, variables: Any, given: dict[str, str], missing: set[str]
) -> None:
    for prefix in ("NEXUS_", "ACME_"):
        variables(prefix, **given)
        with pytest.raises(ValueError, match="environment variables not set: ") as raised:
            door.NexusAuth.from_env(prefix)
        assert {name for name in NAMES if f"{prefix}{name}" in str(raised.value)} == missing
        assert SECRET not in str(raised.value)


@pytest.mark.parametrize("urls", [["BASE_URL"], ["TOKEN_ENDPOINT"], ["TOKEN_ENDPOINT", "BASE_URL"]], ids=str)
def test_from_env_does_not_guess_which_environment_was_meant(door: Any, variables: Any, urls: list[str]) -> None:
    given = dict.fromkeys(urls, "https://a.example")
    variables(CLIENT_ID="id", CLIENT_SECRET=SECRET, ENVIRONMENT="test", **given)
    with pytest.raises(ValueError, match="NEXUS_ENVIRONMENT is set, and so is a URL that takes its place"):
        door.NexusAuth.from_env()


def test_from_env_checks_what_it_finds(door: Any, variables: Any) -> None:
    given = {"CLIENT_ID": "id", "CLIENT_SECRET": SECRET, "ENVIRONMENT": "test"}
    for name, value, words in (
        ("CLIENT_SECRET", f"{SECRET}\n", "client_secret ends with a newline"),
        ("CLIENT_ID", " ", "client_id is empty"),
        ("ENVIRONMENT", "prod", "unknown environment 'prod'"),
    ):
        variables(**{**given, name: value})
        with pytest.raises(ValueError, match=words) as raised:
            door.NexusAuth.from_env()
        assert SECRET not in str(raised.value)
    variables(**given)
    for options in ({"client_id": "another"}, {"leewey": 1}):
        with pytest.raises(TypeError):
            door.NexusAuth.from_env(**options)


def test_the_store_of_the_environment_is_for_who_reads_the_environment(
    driver: Driver, sandbox: NexusSandbox, variables: Any, tmp_path: Path
) -> None:
    """A token in it outlives what the process knows."""
    environment = sandbox.environment
    urls = {"TOKEN_ENDPOINT": environment.token_endpoint, "BASE_URL": environment.base_url}
    names = {"CLIENT_ID": sandbox.client_id, "CLIENT_SECRET": sandbox.client_secret, **urls}
    variables(**names, STORE=str(tmp_path / "store"))
    client = driver.client()

    def calls(*auths: Any) -> int:
        """Return how many token requests it costs to call with each of `auths`, nothing being remembered between."""
        before = len(sandbox.token_requests)
        for auth in auths:
            forget_tokens()
            assert driver.get(client, url(sandbox), auth=auth).status == 200
        return len(sandbox.token_requests) - before

    assert calls(driver.door.NexusAuth.from_env(), driver.keep(driver.from_factory()).auth) == 1
    assert calls(driver.auth(sandbox), driver.ready_made(sandbox).auth) == 2
    assert calls(driver.auth(sandbox, store=tmp_path / "store")) == 0
    assert calls(*[driver.door.NexusAuth.from_env(store=tmp_path / "another")] * 2) == 1
    assert calls(*[driver.door.NexusAuth.from_env(store=None)] * 2) == 2


def test_what_is_no_store(door: Any) -> None:
    values = {"": ValueError, "ftp://cache.example": ValueError, 1: TypeError, object(): TypeError, dict: TypeError}
    for make, (value, kind) in itertools.product(makers(door), values.items()):
        with pytest.raises(kind, match=r"^store "):
            make("id", SECRET, "test", store=value)


def test_what_is_lent_is_of_the_right_library(doors: list[Driver], sandbox: NexusSandbox) -> None:
    for driver, other in itertools.permutations(doors, 2):
        if driver.library is other.library:
            continue
        lent = other.client()
        with pytest.raises(TypeError, match=f"^{driver.lent_as} must be a ") as raised:
            driver.auth(sandbox, **driver.lend(lent))
        assert str(raised.value).endswith(f", not {type(lent).__name__}")
        assert driver.library.__name__ in str(raised.value)


def test_what_is_lent_is_a_session_or_client(driver: Driver, sandbox: NexusSandbox) -> None:
    for value in ("", "session", 0, driver.library):
        with pytest.raises(TypeError, match=f"^{driver.lent_as} must be a "):
            driver.auth(sandbox, **driver.lend(value))


def test_arguments_cannot_be_assigned(door: Any) -> None:
    """It would do nothing; so it says so."""
    names = ["client_id", "client_secret", "environment", "scope", "leeway", "timeout", "max_wait", "store", "session",
             "client"]  # fmt: skip
    auth = door.NexusAuth("id", SECRET, "test")
    for one, name in itertools.product((auth, copy.copy(auth), pickle.loads(pickle.dumps(auth))), names):
        with pytest.raises(AttributeError, match=f"^{name} of a NexusAuth stays as it is: make another NexusAuth"):
            setattr(one, name, "another")
        assert (one.client_id, one.environment) == ("id", TEST)


def test_what_an_auth_shows(door: Any) -> None:
    auth = door.NexusAuth("id", SECRET, "test")
    assert (auth.client_id, auth.environment) == ("id", TEST)
    assert repr(auth) == str(auth) == "<NexusAuth client_id='id' environment='test'>"
    auth.note = "a user's own"  # is none of ours
