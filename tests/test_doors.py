"""The doors: what each loads, the sessions and clients that they make, and how they fit in with their libraries."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import pydoc
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import BLOCKING, INSTALLED, ON_HTTPX, ON_REQUESTS, Driver, makers, nowhere, outcome, url

import nexus_auth
from nexus_auth import Environment, NexusAuthError
from nexus_auth.testing import NexusSandbox

LOADED_LATE = ("requests", "httpx", "httpx2", "anyio", "authlib", "cryptography", "sqlite3", "redis",
               "nexus_auth.store", "nexus_auth.shared")  # fmt: skip


# What is loaded, and what there is


def loaded_by(*statements: str) -> list[str]:
    """Return what is loaded of `LOADED_LATE` after each statement, in a process of its own; a line for each."""
    look = f"import sys; print(*[name for name in {LOADED_LATE} if name in sys.modules])"
    code = "\n".join(line for statement in statements for line in (statement, look))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_package_loads_no_library() -> None:
    assert loaded_by(
        "import nexus_auth; nexus_auth.TEST; nexus_auth.Environment",
        "from nexus_auth import forget_tokens; forget_tokens()",
        "from nexus_auth.testing import NexusSandbox",
    ) == ["", "", ""]


@pytest.mark.parametrize("library", BLOCKING)
def test_a_door_loads_its_own_library_alone(library: str) -> None:
    of_library, of_door = loaded_by(
        f"import {library}", f"from nexus_auth.{library} import NexusAuth; NexusAuth('a', 'b', 'test')"
    )
    assert of_door == of_library


@pytest.mark.skipif("requests" not in INSTALLED, reason="requests is not installed")
def test_the_package_has_the_names_of_the_door_for_requests() -> None:
    door = importlib.import_module("nexus_auth.requests")
    assert (nexus_auth.NexusAuth, nexus_auth.nexus_session) == (door.NexusAuth, door.nexus_session)
    text = pydoc.plain(pydoc.render_doc(nexus_auth))
    for name in ("class NexusAuth(", "class Environment(", "nexus_session(", "forget_tokens()"):
        assert name in text


@pytest.mark.parametrize("library", ["requests", "httpx", "httpx2"])
def test_a_door_without_its_library_says_which_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    home = Path(nexus_auth.__file__).with_name(f"{library}.py")
    spec = importlib.util.spec_from_file_location("nexus_auth.again", home)
    assert spec
    assert spec.loader
    with pytest.raises(ModuleNotFoundError, match=f"nexus_auth.again needs {library}: pip install {library}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nexus_auth' has no attribute 'nexus_client'"):
        nexus_auth.nexus_client  # noqa: B018
    assert not hasattr(nexus_auth, "nexus_async_client")


def test_the_names_of_a_door_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendored copy may lack it; with the door alone, its library may be missing."""
    for module, kind, words in (
        ("nexus_auth.requests", AttributeError, "this copy has no door for requests"),
        ("requests", ModuleNotFoundError, "nexus_auth.requests needs requests: pip install requests"),
    ):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "nexus_auth.requests", raising=False)
            patch.setitem(sys.modules, module, None)
            with pytest.raises(kind, match=words):
                nexus_auth.NexusAuth  # noqa: B018
            assert ("NexusAuth" in dir(nexus_auth)) == (module == "requests")
    monkeypatch.setitem(sys.modules, "nexus_auth.requests", types.SimpleNamespace(__spec__=None))
    assert "NexusAuth" in dir(nexus_auth)


def defaults(function: Any) -> dict[str, Any]:
    """Return the defaults of the parameters of `function`."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_signatures(doors: list[Driver]) -> None:
    """As the contract has them: users rely on names and defaults, and on keywords after the environment."""
    names = ["client_id", "client_secret", "environment"]
    options = {"scope": "api1", "leeway": 60, "timeout": 10, "max_wait": 75, "store": None}
    required = dict.fromkeys(names, inspect.Parameter.empty)
    for driver in doors:
        auth: Any = driver.door.NexusAuth
        assert defaults(auth) == {**required, **options, driver.lent_as: None}
        assert defaults(auth.from_env) == {"prefix": "NEXUS_", "options": inspect.Parameter.empty}
        assert "wherever you send it" in auth.access_token.__doc__
        assert isinstance(outcome(auth, "id", "secret", "test", "api1"), TypeError)
        for factory in makers(driver.door)[1:]:
            assert inspect.isfunction(factory)
            assert factory.__doc__
            found = {"timeout": 10, **defaults(factory)}  # a client's is among the options of httpx
            assert found == {**found, **dict.fromkeys(names), **options, "iso8601": False}
            assert isinstance(outcome(factory, "id", "secret", "test", "api1"), TypeError)


# What the factories make


def test_a_factory_makes_a_plain_client(driver: Driver, sandbox: NexusSandbox) -> None:
    plain, made = driver.client(), driver.ready_made(sandbox)
    assert isinstance(made, type(plain))
    assert isinstance(made.auth, driver.door.NexusAuth)
    assert str(made.base_url).rstrip("/") == sandbox.environment.base_url
    assert "request_iso8601" not in made.headers


@ON_HTTPX
def test_what_a_factory_makes_itself_cannot_be_given(driver: Driver, sandbox: NexusSandbox) -> None:
    for option in ("auth", "base_url"):
        with pytest.raises(TypeError, match=f"^{option} cannot be given"):
            driver.ready_made(sandbox, **{option: sandbox.environment.base_url})


def test_urls(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    for path in ("/customer", "customer", "/customer?page=2", "customer/1/", "?page=2", ""):
        assert driver.get(client, path).status == 200, path
        assert sandbox.requests[-1].path == f"/{path.lstrip('/')}"
    for absolute in (url(sandbox, "/absolute"), url(sandbox, "/absolute").replace("http:", "HTTP:")):
        assert driver.get(client, absolute).status == 200, absolute
        assert sandbox.requests[-1].path == "/absolute"
    for only_looks_absolute in ("//evil.example/x", "@evil.example/x", "/https://evil.example", ".evil.example/x",
                                "\\\\evil.example", "?https://evil.example"):  # fmt: skip
        assert driver.get(client, only_looks_absolute).status == 200, only_looks_absolute


class URL:
    """As other libraries have them: an object with a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


@ON_REQUESTS
def test_urls_that_only_look_absolute_to_requests(driver: Driver, sandbox: NexusSandbox) -> None:
    """Its sessions join nothing themselves, so this is for the door to do."""
    client = driver.ready_made(sandbox)
    for only_looks_absolute in (":443@evil.example", "https:evil.example", "https:/evil.example"):
        assert driver.get(client, only_looks_absolute).status == 200, only_looks_absolute
    for absolute in (URL(url(sandbox, "/absolute")), f"  {url(sandbox, '/absolute')}"):  # which requests takes, too
        assert client.get(absolute).status_code == 200
        assert sandbox.requests[-1].path == "/absolute"
    request = driver.library.Request("GET", b"/bytes")
    assert client.send(client.prepare_request(request)).status_code == 200
    assert (sandbox.requests[-1].path, request.url) == ("/bytes", b"/bytes")  # the caller's own stays as it is


def test_relative_urls_to_a_base_url_with_a_path(driver: Driver, sandbox: NexusSandbox) -> None:
    for base_url in (url(sandbox, "/nexus/v1"), url(sandbox, "/nexus/v1/")):
        environment = Environment("v1", token_endpoint=sandbox.environment.token_endpoint, base_url=base_url)
        client = driver.keep(driver.from_factory(sandbox.client_id, sandbox.client_secret, environment))
        assert driver.get(client, "/customer").status == 200
        assert sandbox.requests[-1].path == "/nexus/v1/customer"


def test_iso8601(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox, iso8601=True)
    sandbox.answer("/customer", status=401)
    assert driver.get(client, "/customer").history == [401]
    assert [arrival.headers["request_iso8601"] for arrival in sandbox.requests] == ["true"] * 2
    assert [arrival.headers["request_iso8601"] for arrival in sandbox.token_requests] == [None] * 2


def test_the_timeout_of_a_factory_is_that_of_token_requests(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox, timeout=0.1, max_wait=0)
    sandbox.fail_token_requests(delay=5)
    call = driver.in_background(driver.get, client, "/customer")
    assert isinstance(call.exception(timeout=4), driver.library_error)
    assert sandbox.requests == []


@pytest.mark.usefixtures("in_variables")
def test_a_factory_without_credentials_reads_the_environment_variables(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.keep(driver.from_factory(scope="sanctionlist"))
    assert driver.get(client, "/customer").status == 200
    assert dict(sandbox.token_requests[0].form)["scope"] == "sanctionlist"


def test_a_factory_with_some_credentials_names_what_is_missing(driver: Driver) -> None:
    """Without any of them it names the environment variables."""
    arguments = {"client_id": "id", "client_secret": "s3cret", "environment": "test"}
    for given in itertools.chain.from_iterable(itertools.combinations(arguments, count) for count in (1, 2)):
        with pytest.raises(TypeError) as raised:
            driver.from_factory(**{name: arguments[name] for name in given})
        missing = ", ".join(name for name in arguments if name not in given)
        assert str(raised.value).startswith(f"missing: {missing}; without all three the environment variables ")
        assert "s3cret" not in str(raised.value)
    with pytest.raises(ValueError, match="NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET, NEXUS_ENVIRONMENT"):
        driver.from_factory()


# The token itself


def test_the_token_for_what_is_no_http_call(driver: Driver, sandbox: NexusSandbox) -> None:
    """What it does with a token that was refused is proved where a 401 is."""
    auth = driver.auth(sandbox, scope="api1 sanctionlist")
    assert (auth.scope, auth.expires_in) == ("api1 sanctionlist", 0)  # there is none
    token = driver.access_token(auth)
    assert type(token) is str
    assert auth.expires_in == pytest.approx(3600, abs=60)
    assert driver.get(driver.client(auth), url(sandbox)).status == 200
    assert sandbox.requests[0].headers["Authorization"] == f"Bearer {token}"
    assert len(sandbox.token_requests) == 1


def test_the_token_for_what_is_no_http_call_has_the_errors_of_a_call(driver: Driver, sandbox: NexusSandbox) -> None:
    refused: Any = outcome(driver.access_token, driver.auth(sandbox, client_secret="wrong"))
    assert type(refused) is driver.door.TokenRequestError
    assert refused.error == "invalid_client"
    sandbox.fail_token_requests(status=429, retry_after=30)
    assert type(outcome(driver.access_token, driver.auth(sandbox, max_wait=5))) is driver.door.TokenWaitError


# How they fit in with their libraries


def test_an_auth_of_another_library(doors: list[Driver], sandbox: NexusSandbox) -> None:
    """It says what it is for, and which is the right one, whether the client has it or the call."""
    for driver, given in itertools.permutations(doors, 2):
        if driver.library is given.library:
            continue
        auth = given.auth(sandbox)
        own, other = given.library.__name__, driver.library.__name__
        for client, options in ((driver.client(auth), {}), (driver.client(), {"auth": auth})):
            with pytest.raises(TypeError) as raised:
                driver.get(client, url(sandbox), **options)
            expected = f"this NexusAuth is for {own}; for {other}: from nexus_auth.{other} import NexusAuth"
            assert str(raised.value) == expected
    assert sandbox.token_requests == sandbox.requests == []


def test_a_client_of_the_other_kind_is_lent(doors: list[Driver], sandbox: NexusSandbox) -> None:
    """Blocking and asynchronous clients are told apart once it shows for whom the token is: when a call is made."""
    for driver, other in itertools.permutations(doors, 2):
        lent = other.client()
        if driver.library is not other.library or isinstance(lent, type(driver.client())):
            continue
        auth = driver.auth(sandbox, **driver.lend(lent))
        call: Any = outcome(driver.get, driver.client(auth), url(sandbox))
        token: Any = outcome(driver.access_token, auth)
        assert type(call) is type(token) is TypeError
        assert str(call) == str(token)
        assert str(call).endswith(f"Client; its auth was lent one of kind {type(lent).__name__}")
    assert sandbox.token_requests == []


def test_a_subclass_may_be_made_in_another_way(driver: Driver, sandbox: NexusSandbox) -> None:
    class Tenants(driver.door.NexusAuth):  # type: ignore[misc, name-defined, unused-ignore]
        environment = sandbox.environment

        def __new__(cls, tenant: str) -> Any:
            return super().__new__(cls)

        def __init__(self, tenant: str) -> None:
            super().__init__(sandbox.client_id, sandbox.client_secret, self.environment)

    client = driver.client(Tenants("one"))
    for _ in range(3):
        assert driver.get(client, url(sandbox)).status == 200
    sandbox.revoke_tokens()
    assert driver.get(client, url(sandbox)).status == 200


def test_another_auth_of_the_client_is_left_alone(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.client(("user", "password"))
    assert driver.get(client, url(sandbox), auth=driver.auth(sandbox)).status == 200
    assert driver.get(client, url(sandbox)).status == 401
    assert sandbox.requests[1].headers["Authorization"].startswith("Basic ")


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a file with an entry for every host."""
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login user password from-netrc\ndefault login user password from-netrc\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))


@pytest.mark.usefixtures("netrc")
def test_netrc_never_replaces_the_token(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    for status in (301, 302, 303, 307, 308):
        sandbox.answer("/old", status=status, headers={"Location": "/older"})
        sandbox.answer("/older", status=status, headers={"Location": url(sandbox)})
        assert driver.get(client, "/old").status == 200
    sandbox.revoke_tokens()
    sandbox.answer("/old", status=307, headers={"Location": url(sandbox)})
    assert driver.get(client, "/old").status == 200
    assert all(arrival.headers["Authorization"].startswith("Bearer ") for arrival in sandbox.requests)
    assert [arrival.headers["Authorization"] for arrival in sandbox.token_requests] == [None] * 2


@ON_REQUESTS
@pytest.mark.usefixtures("netrc")
def test_netrc_serves_other_hosts_as_it_always_does(
    driver: Driver, sandbox: NexusSandbox, stranger: NexusSandbox
) -> None:
    sandbox.answer("/away", status=302, headers={"Location": url(stranger)})
    assert driver.get(driver.ready_made(sandbox), "/away").status == 401
    assert stranger.requests[0].headers["Authorization"].startswith("Basic ")


def test_hooks_see_the_api_alone(driver: Driver, sandbox: NexusSandbox) -> None:
    seen: list[tuple[str, int]] = []
    client = driver.ready_made(sandbox)
    driver.on_response(client, lambda response: seen.append((str(response.url), response.status_code)))
    driver.get(client, "/customer")
    sandbox.revoke_tokens()
    assert driver.get(client, "/customer").history == [401]
    assert {address for address, _ in seen} == {url(sandbox)}
    assert [seen[0][1], seen[-1][1]] == [200, 200]


def test_hooks_that_raise_for_status(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    driver.on_response(client, lambda response: response.raise_for_status())
    for status in (404, 503, 401):
        sandbox.answer("/odd", status=status, times=None)
        error: Any = outcome(driver.get, client, "/odd")
        assert not isinstance(error, NexusAuthError)
        assert error.response.status_code == status
        outcome(getattr, error.response, "content")  # which requests leaves to its user; once it is read, it is closed
        assert driver.get(client, "/customer").status == 200


@ON_REQUESTS
def test_hooks_of_requests_see_the_answer_that_the_caller_gets(driver: Driver, sandbox: NexusSandbox) -> None:
    seen: list[Any] = []
    client = driver.ready_made(sandbox)
    driver.on_response(client, lambda response: seen.append((response.status_code, len(response.history))))
    driver.get(client, "/customer")
    sandbox.revoke_tokens()
    driver.get(client, "/customer")
    # A hook of the call takes the place of the session's, as it always does.
    driver.get(client, "/customer", hooks={"response": lambda *_, **__: seen.append("its own")})
    assert seen == [(200, 0), (200, 1), "its own"]


def test_a_stream_is_the_callers_to_read(driver: Driver, sandbox: NexusSandbox) -> None:
    """Here its end never comes."""
    client = driver.ready_made(sandbox)
    sandbox.answer("/endless", status=401)
    sandbox.answer("/endless", headers={"Content-Length": "1000000"}, times=2)
    for _ in range(2):
        assert driver.in_background(driver.status_of, client, "/endless").result(timeout=10) == 200
    assert len(sandbox.token_requests) == 2


def test_the_timeout_of_a_call_holds_for_what_is_sent_again(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    driver.get(client, "/customer")
    sandbox.answer("/slow", status=401)
    sandbox.answer("/slow", delay=5)
    with pytest.raises(driver.timeout_error):
        driver.get(client, "/slow", timeout=0.1)


def test_what_the_caller_sends_is_sent_again_as_it_was(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    sandbox.answer("/customer", "POST", status=401, headers={"Set-Cookie": "refused=1; Path=/"})
    sandbox.answer("/customer", "POST", headers={"Set-Cookie": "accepted=1; Path=/"})
    headers = {"X-Mine": "mine", "Content-Type": "text/plain"}
    reply = driver.send(client, "POST", "/customer", b"mine", headers=headers, params={"page": "2"})
    assert (reply.status, reply.history) == (200, [401])
    for arrival in sandbox.requests:
        assert (arrival.method, arrival.path, arrival.body) == ("POST", "/customer?page=2", b"mine")
        assert [arrival.headers[name] for name in headers] == list(headers.values())
    assert dict(client.cookies) == {"refused": "1", "accepted": "1"}


@ON_REQUESTS
def test_a_prepared_request_can_be_sent_again_and_again(driver: Driver, sandbox: NexusSandbox) -> None:
    client = driver.ready_made(sandbox)
    prepared = client.prepare_request(driver.library.Request("POST", "/payment", json={"amount": 1}))
    for _ in range(3):
        sandbox.revoke_tokens()
        assert driver.get(client, "/customer").status == 200
        assert client.send(prepared).status_code == 200
    assert {arrival.body for arrival in sandbox.requests if arrival.method == "POST"} == {prepared.body}


def test_an_api_that_is_down_is_an_error_of_the_library(driver: Driver, sandbox: NexusSandbox) -> None:
    """As without the auth; the token is kept."""
    base_url = nowhere().base_url
    environment = Environment("down", token_endpoint=sandbox.environment.token_endpoint, base_url=base_url)
    client = driver.client(driver.auth(sandbox, environment=environment))
    for _ in range(2):
        with pytest.raises(driver.connection_error):
            driver.get(client, f"{base_url}/customer")
    assert len(sandbox.token_requests) == 1
