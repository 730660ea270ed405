"""Arguments: each wrong one is refused when the auth is made, by its name, and none of the errors shows the secret."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DRIVERS, INSTALLED, Driver, makers, outcome, url

from nexus_auth import PRODUCTION, TEST, Environment, forget_tokens
from nexus_auth.auth import AuthOptions
from nexus_auth.testing import NexusSandbox
from nexus_auth.value import replace

NexusAuth: Any = DRIVERS[INSTALLED[0]]().door.NexusAuth  # that of one door, for what all doors share
SECRET = "s3cret-of-the-client"
RIGHT: dict[str, Any] = {"client_id": "id", "client_secret": SECRET, "environment": "test"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [("client_id", ""), ("client_secret", " "), ("environment", "prod"), ("scope", ""), ("leeway", -1),
     ("max_wait", -1), ("store", "")],
)  # fmt: skip
def test_every_door_checks_its_arguments(door: Any, argument: str, value: object) -> None:
    for make in makers(door):
        with pytest.raises(ValueError, match=rf"^(unknown )?{argument} "):
            make(**{**RIGHT, argument: value})


def test_every_door_checks_its_timeout(door: Any) -> None:
    with pytest.raises(ValueError, match=r"^timeout must be more than 0 seconds"):
        door.NexusAuth(**RIGHT, timeout=0)


def options_of(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the options that are texts and numbers, with their defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    return {name: default for name, default in defaults.items() if type(default) in (str, int, float)}


def test_every_option_is_checked_and_arrives(door: Any) -> None:
    """Whatever options there are, wherever they can be given."""
    for make in makers(door):
        for name, default in options_of(make).items():
            with pytest.raises(TypeError, match=f"^{name} must be"):
                make(**RIGHT, **{name: object()})
            value = f"other-{default}" if isinstance(default, str) else default + 1
            made = make(**RIGHT, **{name: value})
            auth = getattr(made, "auth", made)
            assert {**vars(auth._client), **vars(auth._limits)}[name] == value


def test_every_option_is_described_and_typed(door: Any) -> None:
    auth, *factories = makers(door)
    options = set(inspect.signature(auth).parameters) - set(RIGHT)
    for name in ("environment", *options):
        assert f"`{name}`" in str(auth.__doc__)
    assert options <= set(AuthOptions.__annotations__)
    typed = door.SessionOptions if hasattr(door, "SessionOptions") else door.FactoryOptions
    for factory in factories:
        found = set(inspect.signature(factory).parameters) - set(RIGHT) - {"client_options"}
        assert found <= set(typed.__annotations__)


@pytest.mark.parametrize("argument", ["client_id", "client_secret", "scope"])
def test_texts(argument: str) -> None:
    for kind, words, values in (
        (ValueError, "is empty", ["", "   ", "\n", "\t\u3000\n"]),
        (ValueError, "ends with a newline", [f"{SECRET}\n", f"{SECRET}\r\n", f"{SECRET}\r"]),
        (ValueError, "has lone surrogates", [f"{SECRET}\udc80", "\ud800"]),
        (TypeError, "must be a str, not bytes", [SECRET.encode()]),
        (TypeError, "must be a str, not (NoneType|int|list|range)", [None, 12345, [SECRET], range(3)]),
    ):
        for value in values:
            error = outcome(NexusAuth, **{**RIGHT, argument: value})
            assert type(error) is kind, value
            assert re.match(f"{argument} {words}", str(error))
            assert SECRET not in f"{error}{error!r}"


@pytest.mark.parametrize("argument", ["leeway", "timeout", "max_wait"])
def test_numbers(argument: str) -> None:
    infinite = float("inf")
    for kind, values in (
        # What no clock and no socket takes is no sensible number of seconds either.
        (ValueError, [float("nan"), infinite, -infinite, -1, -0.001, 1e300, 10**400, 1e11]),
        (TypeError, [True, False, "10", None, (3, 5), 1j]),
    ):
        for value in values:
            error = outcome(NexusAuth, **RIGHT, **{argument: value})
            assert type(error) is kind, value
            assert re.match(f"{argument} must be a (sensible )?number of seconds, not ", str(error))


def test_numbers_that_are_taken_work(driver: Driver, sandbox: NexusSandbox) -> None:
    for timeout, others in ((7.5, 0), (10**9, 10**9)):
        forget_tokens()
        client = driver.client(driver.auth(sandbox, timeout=timeout, leeway=others, max_wait=others))
        assert driver.get(client, url(sandbox)).status == 200, timeout


def test_what_is_lent_is_of_the_right_library(doors: list[Driver], sandbox: NexusSandbox) -> None:
    for driver in doors:
        strangers = [other.client() for other in doors if other.library is not driver.library]
        for value in ("", "session", 0, driver.library, *strangers):
            with pytest.raises(TypeError, match=f"^{driver.lent_as} must be a ") as raised:
                driver.auth(sandbox, **driver.lend(value))
            assert str(raised.value).endswith(f", not {type(value).__name__}")
            assert driver.library.__name__ in str(raised.value)


def test_arguments_cannot_be_assigned() -> None:
    """It would do nothing; so it says so."""
    names = [*inspect.signature(NexusAuth).parameters, "session", "client"]
    auth = NexusAuth(**RIGHT)
    for one, name in itertools.product((auth, copy.copy(auth), pickle.loads(pickle.dumps(auth))), names):
        with pytest.raises(AttributeError, match=f"^{name} of a NexusAuth stays as it is: make another NexusAuth"):
            setattr(one, name, "another")
        assert (one.client_id, one.environment) == ("id", TEST)
    auth.note = "a user's own"  # is none of ours


def test_what_an_auth_shows() -> None:
    auth = NexusAuth(**RIGHT)
    assert (auth.client_id, auth.environment) == ("id", TEST)
    assert repr(auth) == str(auth) == "<NexusAuth client_id='id' environment='test'>"


# Environments


def test_the_environments_by_name() -> None:
    for name, token_endpoint, base_url in (
        ("test", "https://testidentity.quantoz.com/connect/token", "https://testapi.quantoz.com"),
        ("production", "https://identity.quantoz.com/connect/token", "https://api.quantoz.com"),
    ):
        documented = Environment(name, token_endpoint=token_endpoint, base_url=base_url)
        assert NexusAuth("id", SECRET, name).environment == documented
        assert documented in {TEST, PRODUCTION}
    assert TEST != PRODUCTION


def test_an_unknown_environment() -> None:
    for value in ("prod", "TEST", "test ", "", "https://testapi.quantoz.com"):
        with pytest.raises(ValueError, match="unknown environment") as raised:
            NexusAuth("id", SECRET, value)
        assert str(raised.value) == f"unknown environment {value!r}: 'test' or 'production', or an Environment"


def test_a_secret_in_place_of_an_environment_is_not_shown() -> None:
    with pytest.raises(ValueError, match="unknown environment") as raised:
        NexusAuth("id", "test", SECRET)
    assert SECRET not in str(raised.value)


def test_what_is_no_environment() -> None:
    """That of a copy of the package is none either, and is named as such."""
    words = "environment must be 'test' or 'production', or an Environment of nexus_auth, not "
    foreign = type("Environment", (), {"__module__": "acme._vendor.nexus_auth.environment"})
    for value in (None, 1, b"test", ("test", "https://a.example"), ["test"], Path("test"), foreign()):
        with pytest.raises(TypeError) as raised:
            NexusAuth("id", SECRET, value)
        assert str(raised.value) == f"{words}{value!r} (a {type(value).__module__}.{type(value).__qualname__})"


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


@pytest.mark.parametrize("argument", ["token_endpoint", "base_url"])
def test_urls_that_are_refused(argument: str) -> None:
    urls: dict[str, Any] = {"token_endpoint": "https://identity.example", "base_url": "https://api.example"}
    for address in REFUSED:
        error = outcome(Environment, "mine", **{**urls, argument: address})
        assert type(error) is ValueError, address
        assert str(error).startswith(f"{argument} must be ")
        assert "password" not in str(error)
        assert len(str(error).splitlines()) == 1
    value: Any
    for value in (None, b"https://api.example", 1, ["https://api.example"]):
        with pytest.raises(TypeError, match=f"^{argument} must be a str"):
            Environment("mine", **{**urls, argument: value})


def test_urls_that_are_taken(door: Any) -> None:
    for address in TAKEN:
        environment = Environment("mine", token_endpoint=address, base_url=address)
        assert (environment.name, environment.token_endpoint, environment.base_url) == ("mine", address, address)
        assert door.NexusAuth("id", SECRET, environment).environment is environment


def test_urls_that_only_the_library_refuses(driver: Driver, sandbox: NexusSandbox) -> None:
    """It is a `ValueError` when the auth is made, or an error of the library before anything is sent."""
    own = "http://127.0.0.1:9"

    def call(**urls: str) -> None:
        environment = Environment("mine", **{"token_endpoint": own, "base_url": own, **urls})
        auth = driver.auth(sandbox, environment=environment, max_wait=0)
        driver.get(driver.client(auth), f"{own}/customer")

    for address in ("https://[v1.x]", "https://999.1.1.1", "https://ä..example", "https://xn--a"):
        for argument in ("token_endpoint", "base_url"):
            error = outcome(call, **{argument: address})
            assert isinstance(error, (driver.library_error, ValueError)), (argument, address)


def test_the_name_of_an_environment_is_printable() -> None:
    name: Any
    for name in ("a\nb", None, 1):
        with pytest.raises(TypeError, match=r"^name of an Environment must be a str of printable characters"):
            Environment(name, token_endpoint="https://identity.example/token", base_url="https://api.example")


def test_an_environment_is_a_value_and_no_change_goes_around_its_checks() -> None:
    for name in ("name", "token_endpoint", "base_url", "another"):
        with pytest.raises(AttributeError):
            setattr(TEST, name, "http://evil.example")
    with pytest.raises(ValueError, match="must be https"):
        replace(TEST, token_endpoint="http://evil.example")
    assert pickle.loads(pickle.dumps(TEST)) == copy.deepcopy(TEST) == TEST


# Environment variables


NAMES = ("CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT", "TOKEN_ENDPOINT", "BASE_URL", "STORE")
API, IDENTITY = "https://api.example", "https://identity.example"
BY_NAME = {"CLIENT_ID": "id", "CLIENT_SECRET": SECRET, "ENVIRONMENT": "production"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the environment variables of a prefix to its arguments, and no others."""

    def set_them(prefix: str = "NEXUS_", **values: str) -> None:
        for name in NAMES:
            monkeypatch.setenv(prefix + name, values.get(name, ""))

    return set_them


def test_from_env_by_name(door: Any, variables: Any) -> None:
    variables(**BY_NAME)
    auth = door.NexusAuth.from_env()
    assert (type(auth), auth.client_id, auth.environment) == (door.NexusAuth, "id", PRODUCTION)


def test_from_env_by_urls(sandbox: NexusSandbox, variables: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    urls = {"TOKEN_ENDPOINT": sandbox.environment.token_endpoint, "BASE_URL": sandbox.environment.base_url}
    credentials = {"CLIENT_ID": sandbox.client_id, "CLIENT_SECRET": sandbox.client_secret}
    variables("ACME_", **credentials, **urls, STORE=str(store))
    auth = NexusAuth.from_env("ACME_", scope="sanctionlist", leeway=30, timeout=5, max_wait=10)
    assert auth.environment.base_url == sandbox.environment.base_url
    assert auth.access_token()
    assert store.exists()
    assert dict(sandbox.token_requests[0].form)["scope"] == "sanctionlist"
    with pytest.raises(ValueError, match="NEXUS_CLIENT_ID"):
        NexusAuth.from_env()


def test_from_env_names_all_that_is_missing_at_once(variables: Any) -> None:
    for given, missing in (
        ({}, {"CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT"}),
        ({"CLIENT_ID": "id"}, {"CLIENT_SECRET", "ENVIRONMENT"}),
        ({"ENVIRONMENT": "test"}, {"CLIENT_ID", "CLIENT_SECRET"}),
        ({"STORE": "folder", "ENVIRONMENT": "test"}, {"CLIENT_ID", "CLIENT_SECRET"}),
        ({"CLIENT_ID": "id", "CLIENT_SECRET": SECRET}, {"ENVIRONMENT"}),
        ({"TOKEN_ENDPOINT": IDENTITY}, {"CLIENT_ID", "CLIENT_SECRET", "BASE_URL"}),
        ({"CLIENT_SECRET": SECRET, "BASE_URL": API}, {"CLIENT_ID", "TOKEN_ENDPOINT"}),
        ({"BASE_URL": API, "TOKEN_ENDPOINT": IDENTITY}, {"CLIENT_ID", "CLIENT_SECRET"}),
    ):
        for prefix in ("NEXUS_", "ACME_"):
            variables(prefix, **given)
            with pytest.raises(ValueError, match="environment variables not set: ") as raised:
                NexusAuth.from_env(prefix)
            assert {name for name in NAMES if f"{prefix}{name}" in str(raised.value)} == missing
            assert SECRET not in str(raised.value)


def test_from_env_checks_what_it_finds(variables: Any) -> None:
    unclear = "NEXUS_ENVIRONMENT is set, and so is a URL that takes its place"
    for wrong, words in (
        ({"CLIENT_SECRET": f"{SECRET}\n"}, "client_secret ends with a newline"),
        ({"CLIENT_ID": " "}, "client_id is empty"),
        ({"ENVIRONMENT": "prod"}, "unknown environment 'prod'"),
        ({"ENVIRONMENT": "", "TOKEN_ENDPOINT": IDENTITY, "BASE_URL": f"{API} "}, "base_url must be .* no white space"),
        ({"BASE_URL": API}, unclear),
        ({"TOKEN_ENDPOINT": IDENTITY}, unclear),
        ({"TOKEN_ENDPOINT": IDENTITY, "BASE_URL": API}, unclear),
    ):
        variables(**{**BY_NAME, **wrong})
        with pytest.raises(ValueError, match=words) as raised:
            NexusAuth.from_env()
        assert SECRET not in str(raised.value)
        assert str(raised.value).startswith("environment variables NEXUS_*: ") or words == unclear
    variables(**BY_NAME)
    for options in ({"client_id": "another"}, {"leewey": 1}):
        with pytest.raises(TypeError):
            NexusAuth.from_env(**options)


@pytest.mark.usefixtures("in_variables")
def test_the_store_of_the_environment_is_for_who_reads_the_environment(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A token in it outlives what the process knows."""
    monkeypatch.setenv("NEXUS_STORE", str(tmp_path / "store"))
    from_env = driver.door.NexusAuth.from_env

    def cost_of(*auths: Any) -> int:
        """Return how many token requests the tokens of all `auths` take, nothing being remembered between."""
        before = len(sandbox.token_requests)
        for auth in auths:
            forget_tokens()
            driver.access_token(auth)
        return len(sandbox.token_requests) - before

    assert cost_of(from_env(), driver.keep(driver.from_factory()).auth) == 1
    assert cost_of(driver.auth(sandbox), driver.ready_made(sandbox).auth) == 2
    assert cost_of(driver.auth(sandbox, store=tmp_path / "store")) == 0
    assert cost_of(from_env(store=tmp_path / "another"), from_env(store=tmp_path / "another")) == 1
    assert cost_of(from_env(store=None), from_env(store=None)) == 2
