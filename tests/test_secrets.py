"""Secrets: no client secret, token or password in what is shown, logged, pickled or collected by error trackers."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import itertools
import json
import pickle
import pprint
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from conftest import Driver, makers, nowhere, outcome, url
from server import closed_port

from nexus_auth import TEST, TokenRequestError, forget_tokens
from nexus_auth.grant import Fault, judge
from nexus_auth.secret import HiddenText, hidden, leaving_no_locals
from nexus_auth.steps import Client, Response
from nexus_auth.testing import NexusSandbox

pytestmark = pytest.mark.usefixtures("quick_retries")

SECRET = "S3cret~ /+&=%41'<\"ä€\N{KEY}:x"
LEGIBLE = "Qs3cretQ77xyzzy42plugh"  # is spelt one way only, and can be told from a part of it
TOKEN = "t0ken-that-nobody-may-see"
PASSWORD = "pr0xy-passw0rd"


SPELT: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in Python": lambda text: repr(text)[1:-1],
    "in JSON": lambda text: json.dumps(text)[1:-1],
    "in HTML": html.escape,
    "as a form": quote_plus,
    "as a form, its slashes as they are": lambda text: quote_plus(text, safe="/"),
    "as a path": quote,
    "as .NET does": lambda text: quote(text, safe=""),
    "in lower case": lambda text: re.sub("%..", lambda match: match[0].lower(), quote_plus(text)),
    "in bytes": lambda text: text.encode().decode("latin-1"),  # as some read header values
}
# All from which anybody could read a secret.
HIDDEN = {*(spell(SECRET) for spell in SPELT.values()), LEGIBLE[2:11], LEGIBLE[9:18], TOKEN, PASSWORD}


def assert_hidden(texts: Iterable[str], secrets: Iterable[str] = ()) -> None:
    for text in texts:
        for secret in (*HIDDEN, *secrets):
            assert secret not in text


def looks(value: Any, depth: int = 4) -> Iterator[str]:
    """Yield what trackers show of a value: its repr, its parts, and the beginning of a text."""
    yield from (str(outcome(show, value)) for show in (repr, pprint.pformat))  # of what is half made repr may fail
    parts: Iterable[Any] = ()
    if isinstance(value, (str, bytes, bytearray)):
        yield repr(value[:200])
    elif isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value) if field.repr]
    if depth:
        for part in parts:
            yield from looks(part, depth - 1)


def chain(error: BaseException) -> list[BaseException]:
    """Return `error` and all errors that hang on it: causes, contexts, arguments and attributes."""
    found = [error]
    for one in found:
        linked = [one.__cause__, one.__context__, *one.args, *vars(one).values()]
        found += [other for other in linked if isinstance(other, BaseException) and other not in found]
    return found


def local_variables(error: BaseException) -> Iterator[Any]:
    """Yield the local variables of all frames that `error` came through, but for the tests', which are the user's."""
    for one in chain(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if Path(frame.f_code.co_filename).parent != Path(__file__).parent:
                yield from frame.f_locals.values()


def message_texts(message: Any) -> Iterator[str]:
    """Yield the texts of a request or response of any library, or of whatever else it is."""
    yield f"{message!r} {message}"
    for name in ("url", "headers", "body", "_content", "history", "hooks", "extensions"):
        value = getattr(message, name, None)
        yield repr(list(value.items()) if isinstance(value, Mapping) else value)


def shown(error: BaseException) -> Iterator[str]:
    """Yield all that an error shows of itself, wherever it is sent."""
    for one in chain(error):
        yield f"{one} {one!r} {one.args!r} {getattr(one, '__notes__', '')}"
        for value in vars(one).values():
            yield from message_texts(value)
        with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):  # then it goes nowhere
            yield pickle.dumps(one).decode("latin-1")
    yield "".join(traceback.format_exception(error))
    for value in local_variables(error):
        yield from looks(value)


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Look in the end at all that any library has logged, and how handlers would write it down."""
    caplog.set_level(0)
    yield
    records = caplog.get_records("call")
    assert records
    for record in records:
        if record.getMessage().startswith("receive_response_"):  # the server's words, and httpcore's to show
            continue
        assert_hidden([record.getMessage(), *looks(record.args)])
        for error in (*(record.args or ()), *(record.exc_info or ())):
            if isinstance(error, BaseException):
                assert_hidden(shown(error))


@pytest.mark.parametrize("secret", [hidden(SECRET), hidden(SECRET).encode(), hidden(SECRET.encode())])
def test_what_is_hidden_shows_itself_in_no_way_to_look(secret: Any) -> None:
    assert secret in (SECRET, SECRET.encode())
    again = pickle.loads(pickle.dumps(secret))
    assert again == secret
    assert_hidden([*looks([secret, again]), *looks({secret: secret}), f"{[secret]}"])


# Answers


def refusal(error: object, description: object = None) -> dict[str, Any]:
    return {"status": 400, "json": {"error": error, "error_description": description}}


SAID: dict[str, dict[str, Any]] = {
    "in the description": refusal("invalid_client", f"no client has {SECRET}"),
    "in the error": refusal(SECRET),
    "late in the description": refusal("invalid_client", f"{'.' * 190}{SECRET}"),
    "on lines of its own": refusal("invalid_client", f"secret:\n{SECRET}\n{SECRET}"),
    "as a member": {"status": 400, "json": {"error": {"client_secret": SECRET}, "client_secret": SECRET}},
    "in a page": {"status": 500, "body": f"<html>{SECRET}"},
    "with status 200": {"body": f"client_secret={quote_plus(SECRET)}"},
    "in headers": {"status": 400, "headers": {"X-Echo": quote_plus(SECRET), "Retry-After": quote_plus(SECRET)}},
    "in a cookie": {"status": 400, "headers": {"Set-Cookie": f"secret={quote(SECRET)}; Path=/"}},
    "a token of another type": {"json": {"access_token": TOKEN, "token_type": f"mac {TOKEN}"}},
    "a token with a line break": {"json": {"access_token": f"{TOKEN}\r\nX: y"}},
    "a token and an error": {"status": 400, "json": {"error": "invalid_scope", "access_token": TOKEN}},
    "a token in a broken document": {"body": '{"access_token": "' + TOKEN},
    "a token in bad UTF-8": {"body": TOKEN.encode() + b"\xff"},
    "a token in a fragment": {"status": 302, "headers": {"Location": f"https://else.example/#access_token={TOKEN}"}},
    "a token in a query": {"status": 302, "headers": {"Location": f"/else?access_token={TOKEN}"}},
    "unavailable": {"status": 503, "body": SECRET},
    "too many": {"status": 429, "json": {"error_description": SECRET}, "headers": {"Retry-After": "1000"}},
}  # fmt: skip
for how, spell in SPELT.items():
    location = f"https://else.example/connect?client_secret={spell(SECRET)}&a=b"
    SAID[f"redirected, spelt {how}"] = {"status": 307, "headers": {"Location": location}}
    SAID[f"redirected to a path, spelt {how}"] = {"status": 307, "headers": {"Location": f"/{spell(SECRET)}"}}
    SAID[f"refused, spelt {how}"] = refusal("invalid_client", f"x={spell(SECRET)}&y")
# What the libraries read, and might tell of, themselves.
READ_BY_THE_LIBRARY: dict[str, dict[str, Any]] = {
    "in place of a chunk size": {"headers": {"Transfer-Encoding": "chunked"}, "body": f"{quote(SECRET)}\r\nx\r\n"},
    "in place of a length": {"headers": {"Content-Length": quote(SECRET)}, "body": "x"},
    "broken gzip": {"body": TOKEN, "headers": {"Content-Encoding": "gzip"}},
    "dropped": {"drop": True},
}
ON_THE_WIRE = {name: SAID[name] for name in (
    "in the description", "in the error", "in a page", "with status 200", "in headers", "in a cookie",
    "a token and an error", "a token in a fragment", "unavailable", "too many",
)} | READ_BY_THE_LIBRARY  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_whatever_the_token_endpoint_says(name: str) -> None:
    said = SAID[name]
    body = json.dumps(said["json"]) if "json" in said else said.get("body", "")
    content = body if isinstance(body, bytes) else body.encode()
    client = Client(TEST.token_endpoint, "id", HiddenText(SECRET), "api1")
    fault = judge(Response(said.get("status", 200), said.get("headers", {}), content), client, wall_clock=0)
    assert isinstance(fault, Fault)
    assert_hidden(looks(list(vars(fault).values())))


ERROR_CODES = ("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type",
               "invalid_scope")  # fmt: skip


@pytest.mark.parametrize("secret", [*ERROR_CODES, "client"])
def test_an_error_code_is_shown_though_the_secret_is_a_word_of_it(secret: str) -> None:
    """Those of RFC 6749 section 5.2; without them nobody would know what is wrong."""
    client = Client(TEST.token_endpoint, "id", HiddenText(secret), "api1")
    for code in ERROR_CODES:
        document = {"error": code, "error_description": f"your secret is {secret}"}
        fault = judge(Response(400, {}, json.dumps(document).encode()), client, wall_clock=0)
        assert isinstance(fault, Fault)
        assert (fault.error, fault.error_description) == (code, "(withheld: the secret is in it)")
        assert fault.reason == f"refused client 'id': {code}, (withheld: the secret is in it) (HTTP 400)"


def assert_fails_twice_and_tells_nothing(driver: Driver, auth: Any) -> Any:
    """Make two calls, the second of which is told what is remembered of the first; return its error."""
    client = driver.client(auth)
    errors = [outcome(driver.get, client, f"{auth.environment.base_url}/customer") for _ in range(2)]
    for error in errors:
        assert isinstance(error, driver.library_error)
        assert_hidden(shown(error))
    assert errors[0] is not errors[1]
    assert_hidden([f"{auth} {vars(client)}", *looks(vars(auth))])
    forget_tokens()
    return errors[1]


def test_errors_show_nothing_of_what_is_on_the_wire(driver: Driver, all_logs: None) -> None:
    with NexusSandbox(client_secret=SECRET) as sandbox:
        for answer in ON_THE_WIRE.values():
            script: dict[str, Any] = {"status": 200, **answer}
            sandbox.fail_token_requests(None, **script)
            # Of an answer without a length the end is waited for.
            assert_fails_twice_and_tells_nothing(driver, driver.auth(sandbox, timeout=0.5))


def test_a_wrong_secret(driver: Driver, sandbox: NexusSandbox, all_logs: None) -> None:
    auth = driver.auth(sandbox, client_secret=LEGIBLE)
    assert assert_fails_twice_and_tells_nothing(driver, auth).error == "invalid_client"


def test_token_requests_that_never_arrive(driver: Driver, sandbox: NexusSandbox, all_logs: None) -> None:
    sandbox.fail_token_requests(None, delay=5)
    through_proxy = driver.client_through_proxy(f"http://user:{PASSWORD}@127.0.0.1:{closed_port()}")
    for options in (
        {"environment": nowhere()},
        {"environment": nowhere(), **driver.lend(driver.client())},
        {"timeout": 0.05},
        driver.lend(through_proxy),
    ):
        auth = driver.auth(sandbox, **{"client_secret": LEGIBLE, "max_wait": 1, **options})
        assert not isinstance(assert_fails_twice_and_tells_nothing(driver, auth), TokenRequestError)


@pytest.mark.parametrize("name", ["unavailable", "dropped"])
def test_a_renewal_that_fails(driver: Driver, all_logs: None, name: str) -> None:
    with NexusSandbox(client_secret=SECRET) as sandbox:
        client = driver.client(driver.auth(sandbox))
        assert driver.get(client, url(sandbox)).status == 200
        sandbox.fail_token_requests(None, **ON_THE_WIRE[name])
        sandbox.revoke_tokens()
        error: Any = outcome(driver.get, client, url(sandbox))
        assert driver.library_error in type(error).__mro__
        token = error.request.headers.pop("Authorization")  # of the caller's own request, which was refused
        assert_hidden(shown(error), [token.removeprefix("Bearer ")])


def test_calls_that_succeed_are_mended_and_fail(
    driver: Driver, sandbox: NexusSandbox, caplog: pytest.LogCaptureFixture, all_logs: None
) -> None:
    auth = driver.auth(sandbox)
    client = driver.client(auth)
    for _ in range(2):
        assert driver.get(client, url(sandbox)).status == 200
        sandbox.revoke_tokens()
    tokens = {str(arrival.headers["Authorization"]).removeprefix("Bearer ") for arrival in sandbox.requests}
    assert len(tokens) == 2
    sandbox.answer("/customer", drop=True, times=None)
    error: Any = outcome(driver.get, client, url(sandbox))
    assert driver.library_error in type(error).__mro__
    assert error.request.headers.pop("Authorization").removeprefix("Bearer ") in tokens  # as on every request
    texts = [text for one in chain(error) for text in (f"{one!r}", *message_texts(getattr(one, "request", None)))]
    texts += [record.getMessage() for record in caplog.records]
    assert_hidden([*texts, f"{auth} {vars(client)}", *looks(vars(auth))], {sandbox.client_secret, *tokens})


def test_the_password_of_a_store(driver: Driver, sandbox: NexusSandbox, all_logs: None) -> None:
    pytest.importorskip("redis")
    store = f"redis://user:{PASSWORD}@127.0.0.1:{closed_port()}/0"
    auth = driver.auth(sandbox, store=store)
    assert driver.get(driver.client(auth), url(sandbox)).status == 200
    assert_hidden([f"{auth}", *looks(vars(auth))])
    assert_fails_twice_and_tells_nothing(driver, driver.auth(sandbox, store=store, client_secret=LEGIBLE))


# What cannot be made


WRONG: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("", LEGIBLE, "test"), {}),
    (("id", LEGIBLE, "prod"), {}),
    (("id", f"{LEGIBLE}\n", TEST), {}),
    (("id", f"\udc80{LEGIBLE}", TEST), {}),
    (("id", LEGIBLE.encode(), TEST), {}),
    (("id", (LEGIBLE,), TEST), {}),
    (("id", {"secret": LEGIBLE}, TEST), {}),
    (("id", bytearray(LEGIBLE, "ascii"), TEST), {}),
    (("id", LEGIBLE, TEST), {"scope": 7}),
    (("id", LEGIBLE, TEST), {"max_wait": -1}),
    (("id", LEGIBLE, TEST), {"store": 7}),
    (("id", LEGIBLE, TEST), {"store": f"other://:{PASSWORD}@127.0.0.1"}),
    (("id", LEGIBLE), {}),
    ((), {"client_secret": LEGIBLE, "environment": TEST}),
]


def assert_cannot_be_made(make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    error = outcome(make, *arguments, **options)
    assert isinstance(error, (TypeError, ValueError))
    assert_hidden(shown(error))


def test_what_cannot_be_made_tells_nothing(driver: Driver) -> None:
    for make in makers(driver.door):
        for arguments, options in WRONG:
            assert_cannot_be_made(make, *arguments, **options)
    assert_cannot_be_made(driver.door.NexusAuth, "id", LEGIBLE, TEST, **driver.lend(object()))


def test_environment_variables_that_do_not_suffice_tell_nothing(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_CLIENT_SECRET", LEGIBLE)
    wrong: list[dict[str, str]] = [
        {},
        {"NEXUS_CLIENT_ID": "id", "NEXUS_ENVIRONMENT": "prod"},
        {"NEXUS_CLIENT_ID": "id", "NEXUS_ENVIRONMENT": "test", "NEXUS_BASE_URL": "https://api.example"},
        {"NEXUS_CLIENT_ID": "id", "NEXUS_BASE_URL": "http://api.example", "NEXUS_TOKEN_ENDPOINT": "https://id.example"},
        {"NEXUS_CLIENT_ID": "id", "NEXUS_ENVIRONMENT": "test", "NEXUS_STORE": f"other://:{PASSWORD}@127.0.0.1"},
    ]
    for variables in wrong:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            for make in (driver.door.NexusAuth.from_env, *makers(driver.door)[1:]):
                assert_cannot_be_made(make)


# Error trackers, as they are by default


def as_python_shows(error: BaseException) -> str:
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def as_rich_shows(error: BaseException) -> str:
    screen = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=400)
    options = {"show_locals": True, "locals_max_string": 400, "max_frames": 200, "width": 400}
    kind = pytest.importorskip("rich.traceback").Traceback
    screen.print(kind.from_exception(type(error), error, error.__traceback__, **options))
    return str(screen.file.getvalue())


def as_sentry_collects(error: BaseException) -> str:
    sentry_sdk = pytest.importorskip("sentry_sdk")
    events: list[Any] = []

    def keep(event: Any, _: object) -> None:
        events.append(event)

    options = {"dsn": "http://a@127.0.0.1:9/1", "before_send": keep, "default_integrations": False}
    with sentry_sdk.isolation_scope() as scope:
        scope.set_client(sentry_sdk.Client(**options))
        sentry_sdk.capture_exception(error)
    return json.dumps(events)


@pytest.mark.slow
@pytest.mark.parametrize("look", [as_python_shows, as_rich_shows, as_sentry_collects])
def test_error_trackers_collect_no_secret(
    driver: Driver, sandbox: NexusSandbox, look: Callable[[BaseException], str]
) -> None:
    failures: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (refusal("invalid_client"), {}),
        ({"status": 503}, {}),
        ({"drop": True}, {}),
        ({"drop": True}, {"environment": nowhere()}),
        ({"drop": True}, {"environment": nowhere(), **driver.lend(driver.client())}),
    ]
    for script, options in failures:
        sandbox.fail_token_requests(None, **script)
        # Hidden, since the arguments are in frames of this test too, which are the user's.
        auth = driver.auth(sandbox, client_secret=hidden(LEGIBLE), **options)
        error = outcome(driver.get, driver.client(auth), f"{auth.environment.base_url}/customer")
        assert isinstance(error, driver.library_error)
        text = look(error)
        assert "nexus_auth" in text
        assert_hidden([text])
        forget_tokens()


# Exceptions from outside, which pass through with a traceback


class OutsideError(Exception):
    """What a signal handler raises, whatever is in progress."""


def test_frames_are_cleared_but_for_the_callers() -> None:
    def send(secret: str) -> None:
        raise KeyError

    def exchange(secret: str) -> None:
        try:
            send(secret)
        finally:
            raise OutsideError

    def call(secret: str) -> None:
        try:
            send(secret)
        except KeyError:  # the caller's, with what it knows
            with leaving_no_locals():
                exchange(secret)

    with pytest.raises(OutsideError) as raised:
        call(LEGIBLE)
    frames = [frame for one in chain(raised.value) for frame, _ in traceback.walk_tb(one.__traceback__)]
    assert [frame.f_code.co_name for frame in frames][1:] == ["call", "exchange", "exchange", "send", "call", "send"]
    assert [frame.f_code.co_name for frame in frames if LEGIBLE in frame.f_locals.values()] == ["call", "call", "send"]


class ErrorGroup(Exception):
    """As `ExceptionGroup` of Python 3.11 has them."""

    def __init__(self, *exceptions: object) -> None:
        super().__init__("a group")
        self.exceptions = exceptions


def test_frames_of_causes_and_of_grouped_errors_are_cleared_too() -> None:
    def send(secret: str) -> None:
        raise KeyError

    def raise_later(secret: str) -> None:
        error, cause = outcome(send, secret), outcome(send, secret)
        assert isinstance(error, BaseException)
        error.__context__ = cause
        raise ErrorGroup(error, "no error") from cause

    with pytest.raises(ErrorGroup) as raised, leaving_no_locals():
        raise_later(LEGIBLE)
    group = raised.value
    assert isinstance(group.__cause__, KeyError)
    for error in (group, group.__cause__, group.exceptions[0]):
        assert isinstance(error, BaseException)
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        assert frame.f_code.co_name in ("send", "raise_later")
        assert LEGIBLE not in frame.f_locals.values()


def test_errors_that_hang_on_one_another() -> None:
    """Each is looked at once; and what has an attribute of that name is not always a group."""
    one, other = OutsideError(), OutsideError()
    one.__context__, other.__context__ = other, one
    one.exceptions, other.exceptions = json, 7  # type: ignore[attr-defined]
    with pytest.raises(OutsideError) as raised, leaving_no_locals():
        raise one
    assert raised.value is one


class Interrupter:
    """Raises at the n-th line at which a frame holds the secret, from when Authlib is asked for the form on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from authlib.oauth2.client import OAuth2Client

        self.at = self.count = 0
        self.before: Any = None
        prepare = OAuth2Client.client_auth

        def client_auth(client: Any, method: str) -> Any:
            self.before = sys.gettrace()
            sys.settrace(self._trace)
            return prepare(client, method)

        monkeypatch.setattr(OAuth2Client, "client_auth", client_auth)

    def raise_at(self, number: int) -> None:
        self.at, self.count = number, 0

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is judge.__code__:  # the answer is here
            sys.settrace(self.before)
            return self.before
        if event == "line" and holds_the_secret(frame):
            self.count += 1
            if self.count == self.at:
                sys.settrace(self.before)
                raise OutsideError
        return self._trace


def holds_the_secret(frame: FrameType) -> bool:
    """Tell whether the secret can be read in a local variable of `frame`, which is none of these tests."""
    is_of_others = frame.f_code.co_filename != __file__
    return is_of_others and any(
        type(value) in (str, bytes) and LEGIBLE in str(value) for value in list(frame.f_locals.values())
    )


# What an exception breaks off in the middle, the libraries leave to the garbage collector.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_lent", [False, True])
def test_no_frame_holds_the_secret_whenever_an_exception_comes(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, is_lent: bool
) -> None:
    sandbox.clients[sandbox.client_id] = LEGIBLE
    sandbox.limit = 1000
    lent = driver.lend(driver.client()) if is_lent else {}
    auth = driver.auth(sandbox, client_secret=LEGIBLE, max_wait=1, **lent)
    driver.access_token(auth)  # what is imported late is here
    interrupter = Interrupter(monkeypatch)
    number, tracing = 0, sys.gettrace()
    for number in itertools.count(1):
        forget_tokens()
        interrupter.raise_at(number)
        error = outcome(driver.access_token, auth)
        sys.settrace(tracing)  # a trace function that raises ends what measures coverage, too
        if interrupter.count < number:
            break
        if isinstance(error, Exception):  # an event loop takes some for faults of its own
            assert_hidden(shown(error))
    assert number > 3
