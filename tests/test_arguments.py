"""Wrong arguments: each is refused when the auth is built, by its name, and none of them shows the secret."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from conftest import DRIVERS, HTTPX, AsyncHTTPX, Driver, outcome

from nexus_auth import PRODUCTION, TEST, Environment, forget_tokens
from nexus_auth.testing import NexusSandbox

DOORS = [driver for driver in DRIVERS if not isinstance(driver, AsyncHTTPX)]
SECRET = "s3cret-of-the-client"

TEXTS: list[tuple[object, type[Exception], str]] = [
    ("", ValueError, "empty"),
    ("   ", ValueError, "empty"),
    ("\n", ValueError, "empty"),
    ("\t\u3000\n", ValueError, "empty"),
    (f"{SECRET}\n", ValueError, "newline"),
    (f"{SECRET}\r\n", ValueError, "newline"),
    (f"{SECRET}\r", ValueError, "newline"),
    (f"{SECRET}\udc80", ValueError, "surrogate"),
    ("\ud800", ValueError, "surrogate"),
    (None, TypeError, "NoneType"),
    (SECRET.encode(), TypeError, "bytes"),
    (12345, TypeError, "int"),
    ([SECRET], TypeError, "list"),
    (range(3), TypeError, "range"),
]

NUMBERS: list[tuple[object, type[Exception]]] = [
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    (float("-inf"), ValueError),
    (-1, ValueError),
    (-0.001, ValueError),
    (1e300, ValueError),  # what no clock and no socket takes is no sensible number of seconds either
    (10**400, ValueError),
    (1e11, ValueError),
    (True, TypeError),
    (False, TypeError),
    ("10", TypeError),
    (None, TypeError),
    ((3, 5), TypeError),
    (1j, TypeError),
]


@pytest.fixture(params=DOORS, ids=repr)
def door(request: pytest.FixtureRequest) -> Any:
    driver: Driver = request.param
    return driver.door


@pytest.mark.parametrize("argument", ["client_id", "client_secret", "scope"])
@pytest.mark.parametrize(("value", "kind", "word"), TEXTS, ids=lambda value: ascii(value)[:24])
def test_texts(door: Any, argument: str, value: object, kind: type[Exception], word: str) -> None:
    arguments: dict[str, Any] = {"client_id": "id", "client_secret": SECRET, "environment": "test", argument: value}
    with pytest.raises(kind) as raised:
        door.NexusAuth(**arguments)
    text = str(raised.value)
    assert text.startswith(f"{argument} ")
    assert word in text
    assert SECRET not in f"{text}{raised.value!r}"


@pytest.mark.parametrize("argument", ["leeway", "timeout", "max_wait"])
@pytest.mark.parametrize(("value", "kind"), NUMBERS, ids=lambda value: repr(value)[:24])
def test_numbers(door: Any, argument: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{argument} must be "):
        door.NexusAuth("id", SECRET, "test", **{argument: value})


def test_a_timeout_of_nothing(door: Any) -> None:
    with pytest.raises(ValueError, match=r"^timeout must be "):
        door.NexusAuth("id", SECRET, "test", timeout=0)
    assert door.NexusAuth("id", SECRET, "test", leeway=0, max_wait=0)


def test_a_number_that_is_taken_works(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client()
    for seconds in (100_000, 1e6, 10**7, 1e8, 10**9, 1e10):
        auth = outcome(lambda: driver.auth(sandbox, leeway=seconds, timeout=seconds, max_wait=seconds))  # noqa: B023
        if isinstance(auth, ValueError):
            assert seconds > 100_000  # a day and more is sensible
        else:
            assert driver.get(client, f"{sandbox.environment.base_url}/customer", auth=auth).status == 200, seconds
            forget_tokens()
    driver.close(client)


@pytest.mark.parametrize("value", ["prod", "TEST", "test ", "", "https://testapi.quantoz.com"])
def test_an_unknown_environment(door: Any, value: str) -> None:
    for make in (door.NexusAuth, *factories(door)):
        with pytest.raises(ValueError, match="unknown environment") as raised:
            make("id", SECRET, value)
        assert repr(value) in str(raised.value)
        assert "'test' or 'production'" in str(raised.value)


@pytest.mark.parametrize("value", [None, 1, b"test", ("test", "https://a.example", "https://b.example"), ["test"]])
def test_what_is_no_environment(door: Any, value: Any) -> None:
    for make in (door.NexusAuth, *factories(door)):
        with pytest.raises(TypeError, match="environment"):
            make("id", SECRET, value)


def test_no_environment_by_default(door: Any) -> None:
    for make in (door.NexusAuth, *factories(door)):
        with pytest.raises(TypeError, match="environment"):
            make("id", SECRET)


def factories(door: Any) -> list[Any]:
    names = ("nexus_session", "nexus_client", "nexus_async_client")
    return [getattr(door, name) for name in names if hasattr(door, name)]


# Environments

REFUSED = [
    "http://testapi.quantoz.com",
    "HTTP://TESTAPI.QUANTOZ.COM",
    "http://testapi.quantoz.com:443",
    "http://127.0.0.1.evil.example",
    "http://localhost.evil.example",
    "http://evil-localhost",
    "http://localhost@evil.example",
    "http://localhost:80@evil.example",
    "http://127.0.0.1@evil.example",
    "http://evil.example#@localhost",
    "http://evil.example\\@localhost",
    "http://localhost\\@evil.example",
    "http://localhost\\.evil.example",
    "http://localhost\t.evil.example",
    "http://localhost\n.evil.example",
    "http://[::1].evil.example",
    "http://evil.example[::1]",
    "http://[::2]",
    "http://[::ffff:1.2.3.4]",
    "http://128.0.0.1",
    "http://1127.0.0.1",
    "http://127.0.0.1.1",
    "http://127.0.0.\u0662",  # a digit, but no IP address
    "http://0.0.0.0",
    "http://localho\u017ft",  # a long s
    "http\u017f://testapi.quantoz.com",
    "https://user@testapi.quantoz.com",
    "https://user:password@testapi.quantoz.com",
    "https://testapi.quantoz.com@evil.example",
    "https://testapi.quantoz.com#fragment",
    "https://testapi.quantoz.com\\evil",
    "https://testapi.quantoz.com/with space",
    " https://testapi.quantoz.com",
    "https://testapi.quantoz.com ",
    "https://testapi.quantoz.com\n",
    "https://testapi.quantoz.com\r\nX-Injected: 1",
    "https://testapi.quantoz.com\x00",
    "https://testapi.quantoz.com:port",
    "https://testapi.quantoz.com:70000",
    "https://testapi.quantoz.com:-1",
    "https://testapi.quantoz.com:44\u0663",
    "https://[::1",
    "https://[testapi]",
    "https:///path",
    "https://",
    "https:testapi.quantoz.com",
    "//testapi.quantoz.com",
    "testapi.quantoz.com",
    "ftp://testapi.quantoz.com",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "",
    " ",
]
TAKEN = [
    "https://testapi.quantoz.com",
    "HTTPS://TESTAPI.QUANTOZ.COM/V1",
    "https://testapi.quantoz.com:443",
    "https://testapi.quantoz.com:8443/nexus/",
    "https://[2001:db8::1]:8443",
    "https://bücher.example",
    "https://xn--bcher-kva.example",
    "http://localhost",
    "HTTP://LocalHost:8080",
    "http://127.0.0.1:8080/nexus",
    "http://127.1.2.3",
    "http://[::1]:8080",
]


@pytest.mark.parametrize("argument", ["token_endpoint", "base_url"])
@pytest.mark.parametrize("url", REFUSED, ids=ascii)
def test_urls_that_are_refused(argument: str, url: str) -> None:
    urls = {"token_endpoint": "https://identity.example", "base_url": "https://api.example", argument: url}
    with pytest.raises(ValueError, match=f"^{argument} must be ") as raised:
        Environment("mine", **urls)
    assert "password" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("url", TAKEN, ids=ascii)
def test_urls_that_are_taken(door: Any, url: str) -> None:
    environment = Environment("mine", token_endpoint=url, base_url=url)
    assert (environment.name, environment.token_endpoint, environment.base_url) == ("mine", url, url)
    assert door.NexusAuth("id", SECRET, environment).environment is environment


def test_a_base_url_has_no_query() -> None:
    with pytest.raises(ValueError, match=r"^base_url "):
        Environment("mine", token_endpoint="https://identity.example", base_url="https://api.example/?tenant=1")


@pytest.mark.parametrize("url", [None, b"https://api.example", 1, ["https://api.example"]])
def test_urls_that_are_no_str(url: Any) -> None:
    for argument in ("token_endpoint", "base_url"):
        urls = {"token_endpoint": "https://identity.example", "base_url": "https://api.example", argument: url}
        with pytest.raises(TypeError, match=f"^{argument} must be a str"):
            Environment("mine", **urls)


@pytest.mark.parametrize("url", ["https://[v1.x]", "https://999.1.1.1", "https://ä..example", "https://xn--a"])
@pytest.mark.parametrize("argument", ["token_endpoint", "base_url"])
@pytest.mark.parametrize("driver", DOORS, ids=repr)
def test_urls_that_only_the_library_refuses(driver: Driver, argument: str, url: str) -> None:
    # When the auth is built, or as the caller of the library knows it; and before anything is sent.
    urls = {"token_endpoint": "http://127.0.0.1:9", "base_url": "http://127.0.0.1:9", argument: url}
    try:
        auth = driver.door.NexusAuth("id", SECRET, Environment("mine", **urls), max_wait=0)
    except ValueError:
        return
    client = driver.client(auth)
    called = outcome(lambda: driver.get(client, "http://127.0.0.1:9/customer"))
    driver.close(client)
    assert isinstance(called, (driver.library_error, ValueError))


def test_an_environment_is_frozen() -> None:
    for name in ("name", "token_endpoint", "base_url", "another"):
        with pytest.raises(AttributeError):
            setattr(TEST, name, "http://evil.example")
    assert TEST != PRODUCTION
    assert {TEST, PRODUCTION, TEST} == {TEST, PRODUCTION}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(TEST, protocol)) == copy.deepcopy(TEST) == TEST


def test_no_way_around_the_check_of_an_environment() -> None:
    for way in ("_replace", "__replace__"):
        if replace := getattr(TEST, way, None):
            with pytest.raises((ValueError, TypeError)):
                replace(token_endpoint="http://evil.example")
    if make := getattr(Environment, "_make", None):
        with pytest.raises((ValueError, TypeError)):
            make(["test", "http://evil.example", "http://evil.example"])


def test_documented_environments() -> None:
    assert (TEST.name, TEST.token_endpoint, TEST.base_url) == (
        "test", "https://testidentity.quantoz.com/connect/token", "https://testapi.quantoz.com",
    )  # fmt: skip
    assert (PRODUCTION.name, PRODUCTION.token_endpoint, PRODUCTION.base_url) == (
        "production", "https://identity.quantoz.com/connect/token", "https://api.quantoz.com",
    )  # fmt: skip


# from_env

NAMES = ("CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT", "TOKEN_ENDPOINT", "BASE_URL")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what sets the environment variables of NEXUS_ to its arguments, and no others."""

    def set_them(prefix: str = "NEXUS_", **values: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(f"NEXUS_{name}", raising=False)
            monkeypatch.delenv(f"{prefix}{name}", raising=False)
        for name, value in values.items():
            monkeypatch.setenv(prefix + name, value)

    return set_them


def test_from_env_by_name(door: Any, variables: Any) -> None:
    variables(CLIENT_ID="id", CLIENT_SECRET=SECRET, ENVIRONMENT="production")
    auth = door.NexusAuth.from_env(scope="sanctionlist", leeway=30, timeout=5, max_wait=10)
    assert (auth.client_id, auth.environment) == ("id", PRODUCTION)
    assert auth._credentials is door.NexusAuth("id", SECRET, "production", scope="sanctionlist")._credentials


def test_from_env_by_urls(door: Any, variables: Any) -> None:
    urls = {"TOKEN_ENDPOINT": "https://identity.example/token", "BASE_URL": "https://api.example"}
    variables("ACME_", CLIENT_ID="id", CLIENT_SECRET=SECRET, **urls)
    environment = door.NexusAuth.from_env("ACME_").environment
    assert (environment.token_endpoint, environment.base_url) == tuple(urls.values())
    with pytest.raises(ValueError, match="NEXUS_CLIENT_ID"):
        door.NexusAuth.from_env()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, {"CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT"}),
        ({"CLIENT_ID": "id"}, {"CLIENT_SECRET", "ENVIRONMENT"}),
        ({"ENVIRONMENT": "test"}, {"CLIENT_ID", "CLIENT_SECRET"}),
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
        with pytest.raises(ValueError, match="not set") as raised:
            door.NexusAuth.from_env(prefix)
        text = str(raised.value)
        assert {name for name in NAMES if f"{prefix}{name}" in text} == missing
        assert SECRET not in text


@pytest.mark.parametrize("urls", [{"BASE_URL"}, {"TOKEN_ENDPOINT"}, {"TOKEN_ENDPOINT", "BASE_URL"}], ids=str)
def test_from_env_does_not_guess_which_environment_was_meant(door: Any, variables: Any, urls: set[str]) -> None:
    given = dict.fromkeys(urls, "https://a.example")
    variables(CLIENT_ID="id", CLIENT_SECRET=SECRET, ENVIRONMENT="test", **given)
    with pytest.raises(ValueError, match="NEXUS_ENVIRONMENT"):
        door.NexusAuth.from_env()


def test_from_env_checks_what_it_finds(door: Any, variables: Any) -> None:
    given = {"CLIENT_ID": "id", "CLIENT_SECRET": SECRET, "ENVIRONMENT": "test"}
    for name, value, word in (
        ("CLIENT_SECRET", f"{SECRET}\n", "client_secret"),
        ("CLIENT_ID", " ", "client_id"),
        ("ENVIRONMENT", "prod", "'prod'"),
    ):
        variables(**{**given, name: value})
        with pytest.raises(ValueError, match=word) as raised:
            door.NexusAuth.from_env()
        assert SECRET not in str(raised.value)
    variables(**given)
    with pytest.raises(TypeError):
        door.NexusAuth.from_env(client_id="another")


def test_only_keywords_after_the_environment(door: Any) -> None:
    with pytest.raises(TypeError):
        door.NexusAuth("id", SECRET, "test", "api1")


# What is lent


def test_the_wrong_kind_is_lent() -> None:
    for driver in DOORS:
        name = "client" if isinstance(driver, HTTPX) else "session"
        for other in DOORS:
            if other is driver:
                continue
            lent = other.client()
            with pytest.raises(TypeError, match=name) as raised:
                driver.door.NexusAuth("id", SECRET, "test", **{name: lent})
            assert type(lent).__name__ in str(raised.value)
            assert driver.library.__name__ in str(raised.value)
            other.close(lent)
        for wrong in ("", "session", 0, driver.library):
            with pytest.raises(TypeError, match=name):
                driver.door.NexusAuth("id", SECRET, "test", **{name: wrong})


# The wrong door


@pytest.mark.parametrize("given", DOORS, ids=repr)
@pytest.mark.parametrize("level", ["client", "request"])
def test_an_auth_of_another_library(driver: Driver, sandbox: NexusSandbox, given: Driver, level: str) -> None:
    if given.library is driver.library:
        pytest.skip("the right door")
    auth = given.auth(sandbox)
    client = driver.client(auth if level == "client" else None)
    with pytest.raises(TypeError) as raised:
        driver.get(client, f"{sandbox.environment.base_url}/customer", **({} if level == "client" else {"auth": auth}))
    text = str(raised.value)
    assert text.startswith(f"this NexusAuth is for {given.library.__name__}")
    assert text.endswith(f"from nexus_auth.{driver.library.__name__} import NexusAuth")
    assert sandbox.token_requests == sandbox.requests == []
    driver.close(client)


@pytest.mark.parametrize("other", [driver for driver in DRIVERS if isinstance(driver, AsyncHTTPX)], ids=repr)
def test_a_client_of_the_other_kind_is_lent(other: Driver, sandbox: NexusSandbox) -> None:
    # Blocking and asynchronous clients are told apart when it shows for whom the token is: once a call is made.
    (driver,) = (driver for driver in DOORS if driver.library is other.library)
    client = driver.client(driver.auth(sandbox, client=other.client()))
    with pytest.raises(TypeError, match="Client"):
        driver.get(client, f"{sandbox.environment.base_url}/customer")
    assert sandbox.token_requests == []
    driver.close(client)


@pytest.mark.parametrize("name", ["a\nb", None, 1])
def test_the_name_of_an_environment_is_printable(name: Any) -> None:
    urls = {"token_endpoint": "https://identity.example/token", "base_url": "https://api.example"}
    with pytest.raises(TypeError, match="name"):
        Environment(name, **urls)


def test_nothing_of_an_environment_can_be_deleted() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        del TEST.name
    assert TEST.name == "test"
