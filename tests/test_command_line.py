"""The command line: every command and every exit status, in this process and, where it matters, in one of its own."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

requests = pytest.importorskip("requests")

from server import closed_port  # noqa: E402

import nexus_auth.__main__ as command_line  # noqa: E402
from nexus_auth import forget_tokens  # noqa: E402
from nexus_auth.store import SQLiteStore  # noqa: E402
from nexus_auth.testing import NexusSandbox  # noqa: E402

VARIABLES = ["NEXUS_CLIENT_ID", "NEXUS_CLIENT_SECRET", "NEXUS_TOKEN_ENDPOINT", "NEXUS_BASE_URL", "NEXUS_ENVIRONMENT"]
STORE = "store-1.sqlite3"
STEPS = ["environment variables", "store", "network", "credentials", "API"]  # of a check
COMMANDS = [["get", "/customer"], ["token"], ["token", "--details"], ["check"]]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """What is on stderr, which is one line, and no traceback."""
        (line,) = self.err.splitlines()
        assert line.startswith("nexus_auth stopped: ")
        assert self.err == line + "\n"
        assert line.isprintable()
        return line.removeprefix("nexus_auth stopped: ")

    @property
    def steps(self) -> list[str]:
        """What the lines of `check` are about."""
        return [line.partition(":")[0] for line in self.out.splitlines()]


Run = Callable[..., Outcome]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The user's cache folder."""
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No variable of ours is set, and whatever a command sets is gone in the end."""
    for name in [*VARIABLES, "NEXUS_STORE"]:
        monkeypatch.setenv(name, "")  # what was never set is not restored to that
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("LOCALAPPDATA", str(cache))
    monkeypatch.setattr("nexus_auth.grant.BACKOFF", 0.002)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process as if in a new one. Its output never has the secret in it."""

    def run(*argv: str) -> Outcome:
        forget_tokens()
        try:
            status = command_line.main(list(argv))
        except SystemExit as usage:
            status = int(str(usage.code or 0))
        captured = capsys.readouterr()
        outcome = Outcome(status, captured.out, captured.err)
        assert os.environ.get("NEXUS_CLIENT_SECRET", "no secret") not in outcome.out + outcome.err
        return outcome

    return run


@pytest.fixture
def nexus(in_variables: NexusSandbox) -> NexusSandbox:
    """A sandbox that the environment variables lead to."""
    return in_variables


def spawn(*argv: str, stdout: Any = subprocess.PIPE) -> Any:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "nexus_auth", *argv],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=Path(command_line.__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        text=True,
    )


def finish(process: Any) -> Outcome:
    with process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # which is nothing for one that has ended
    return Outcome(process.returncode, out or "", err)


# get


def test_get_prints_plain_json_in_a_pipe(run: Run, nexus: NexusSandbox) -> None:
    for path in ("/customer?page=2", "customer?page=2"):
        outcome = run("get", path)
        assert (outcome.status, outcome.err, outcome.out.count("\n")) == (0, "", 1)
        assert json.loads(outcome.out)["values"] == {"method": "GET", "path": "/customer?page=2", "body": ""}
    assert run("get", "--iso8601", "/customer").status == 0
    assert [arrival.headers["request_iso8601"] for arrival in nexus.requests] == [None, None, "true"]


def test_get_prints_for_people_on_a_terminal(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    nexus.answer("/customer", json={"name": "José €"}, times=None)
    assert run("get", "/customer").out == '{"name": "Jos\\u00e9 \\u20ac"}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("get", "/customer").out == '{\n  "name": "José €"\n}\n'
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="latin-1")  # which cannot show everything
    assert run("get", "/customer").out == '{\n  "name": "Jos\\u00e9 \\u20ac"\n}\n'


STEERING = "\x00\x07\x1b\x7f\x85\x9b\xad\u061c\u200f\u2028\u202e\u2066\U000e0041"


def test_nothing_that_comes_steers_a_terminal(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    escaped = json.dumps(STEERING)[1:-1]
    document = {"message": STEERING + "\ud800", "errors": ["\r\n"], "values": None}
    nexus.answer("/customer", status=400, json=document)
    outcome = run("get", "/customer")
    assert json.loads(outcome.out) == document
    assert outcome.out.replace("\n", "").isprintable()
    assert outcome.reason.endswith(escaped + r"\ud800: \r\n")
    nexus.answer("/page", body=f"<p>\n\té{STEERING}", headers={"Content-Type": "text/html; charset=utf-8"})
    assert run("get", "/page").out == f"<p>\n\té{escaped}\n"
    nexus.fail_token_requests(status=400, json={"error": "odd", "error_description": STEERING})
    assert "odd" in run("token", "--no-store").reason
    assert run("get", "/a", "\x9b", "\u202e").err.endswith(r"unrecognized arguments: \u009b \u202e" + "\n")


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, '{"message": "Not found", "errors": ["No customer A1", "Nor\\nA2"], "values": null}',
         r"404 Not Found: Not found: No customer A1: Nor\nA2"),
        (500, '["no", "envelope"]', "500 Internal Server Error"),
        (500, '"a text"', "500 Internal Server Error"),
        (500, '{"message": null}', "500 Internal Server Error"),
        (500, '{"errors": 3}', "500 Internal Server Error"),
        (500, "", "500 Internal Server Error"),
        (304, "", "304 Not Modified"),
    ],
)  # fmt: skip
def test_get_says_why_the_api_refuses_and_prints_its_answer(
    run: Run, nexus: NexusSandbox, status: int, body: str, reason: str
) -> None:
    nexus.answer("/customer", status=status, body=body)
    outcome = run("get", "/customer")
    assert (outcome.status, outcome.out.removesuffix("\n")) == (1, body)
    assert outcome.reason == f"GET {nexus.environment.base_url}/customer: HTTP {reason}"


def test_get_prints_what_is_no_json_as_it_came(nexus: NexusSandbox, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    nexus.answer("/page", status=204)
    for page in (b"", b"<p>Bonjour \xe9\x9b</p>"):
        assert command_line.main(["get", "/page"]) == 0
        assert capfdbinary.readouterr() == (page, b"")
        nexus.answer("/page", body=b"<p>Bonjour \xe9\x9b</p>", headers={"Content-Type": "text/html"})


# token


def test_token_prints_a_token_and_nothing_else(run: Run, nexus: NexusSandbox) -> None:
    outcome = run("token")
    assert (outcome.status, outcome.err) == (0, "")
    token = outcome.out.removesuffix("\n")
    assert token.split() == [token]
    url = f"{nexus.environment.base_url}/customer"
    assert requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10).status_code == 200
    assert len(nexus.requests) == 1


def test_token_details(run: Run, nexus: NexusSandbox) -> None:
    for lifetime in (1200, None):
        nexus.expires_in = lifetime
        outcome = run("token", "--details", "--no-store")
        assert (outcome.status, outcome.err) == (0, "")
        assert json.loads(outcome.out) == {"environment": "custom", "scope": "api1", "lifetime": lifetime}


# check


def test_check_says_that_all_is_right(run: Run, nexus: NexusSandbox, cache: Path) -> None:
    outcome = run("check")
    assert (outcome.status, outcome.err, outcome.steps) == (0, "", STEPS)
    environment = nexus.environment
    for fact in (nexus.client_id, environment.token_endpoint, environment.base_url, "HTTP 200", str(cache)):
        assert fact in outcome.out
    assert run("check", "--no-store").steps == [step for step in STEPS if step != "store"]


def test_check_stops_where_nobody_answers(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    for name, path, steps in (("NEXUS_BASE_URL", "", STEPS[:4]), ("NEXUS_TOKEN_ENDPOINT", "/connect/token", STEPS[:2])):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}{path}")
        outcome = run("check")
        assert (outcome.status, outcome.steps) == (1, steps)
        assert str(port) in outcome.reason
    assert (len(nexus.token_requests), nexus.requests) == (1, [])


def test_check_stops_at_the_credentials(run: Run, nexus: NexusSandbox) -> None:
    nexus.clients.clear()
    outcome = run("check")
    assert (outcome.status, outcome.steps) == (1, STEPS[:3])
    assert "invalid_client" in outcome.reason
    assert (len(nexus.token_requests), nexus.requests) == (1, [])


def test_check_is_content_with_an_api_that_does_not_refuse_the_token(run: Run, nexus: NexusSandbox) -> None:
    for status in (204, 400, 404, 405):
        nexus.answer("/", status=status)
        outcome = run("check")
        assert (outcome.status, outcome.err, outcome.steps) == (0, "", STEPS)
        assert f"HTTP {status}" in outcome.out


def test_check_stops_at_an_api_that_refuses(run: Run, nexus: NexusSandbox) -> None:
    for status in (401, 403, 429, 503):
        nexus.answer("/", status=status, json={"message": "No", "errors": ["Not you"]}, times=None)
        outcome = run("check")
        assert (outcome.status, outcome.steps) == (1, STEPS[:4])
        assert f"HTTP {status}" in outcome.reason
        assert outcome.reason.endswith(": No: Not you")


def test_check_is_not_content_with_an_answer_from_elsewhere(
    run: Run, nexus: NexusSandbox, stranger: NexusSandbox
) -> None:
    elsewhere = f"{stranger.environment.base_url}/sign-in"
    stranger.answer("/sign-in")
    nexus.answer("/", status=302, headers={"Location": elsewhere})
    outcome = run("check")
    assert outcome.status == 1
    assert f"no sign that {nexus.environment.base_url} takes the token" in outcome.reason
    assert elsewhere in outcome.reason


# The store


def test_commands_share_a_token_and_check_proves_the_secret(run: Run, nexus: NexusSandbox) -> None:
    first = run("token").out
    assert run("token").out == first
    assert run("get", "/customer").status == 0
    assert len(nexus.token_requests) == 1
    assert run("check").status == 0
    assert len(nexus.token_requests) == 2
    assert run("token").out != first  # but the one of the check, for which nobody need ask again
    assert len(nexus.token_requests) == 2
    assert run("token", "--no-store").status == 0
    assert len(nexus.token_requests) == 3


def next_request_in(outcome: Outcome) -> float:
    """Return in how many seconds the next token request may go, as the reason says."""
    (seconds,) = re.findall(r"the next token request may go in ([0-9.]+) s", outcome.reason)
    return float(seconds)


def test_check_counts_with_others(run: Run, nexus: NexusSandbox, cache: Path) -> None:
    for _ in range(2):
        assert run("check", "--max-wait", "2").status == 0  # none holds up the next one
    store = SQLiteStore(cache / "nexus_auth")
    endpoint = hashlib.sha256(nexus.environment.token_endpoint.encode()).hexdigest()
    for number in range(58):
        assert store.acquire(f"quota:{endpoint}", str(number), 60, 30.0) == 0
    outcome = run("check", "--max-wait", "2")
    assert outcome.steps == STEPS[:2]
    assert 20 < next_request_in(outcome) <= 30
    assert len(nexus.token_requests) == 2


def test_check_leaves_an_endpoint_alone_that_wants_it(run: Run, nexus: NexusSandbox) -> None:
    nexus.fail_token_requests(status=429, retry_after=30)
    for command in ("token", "check"):
        assert 20 < next_request_in(run(command)) < 40
        assert len(nexus.token_requests) == 1


def test_check_asks_again_where_others_were_refused(run: Run, nexus: NexusSandbox) -> None:
    nexus.clients.clear()
    for _ in range(2):
        assert "invalid_client" in run("token").reason
        assert len(nexus.token_requests) == 1
    nexus.clients[nexus.client_id] = nexus.client_secret
    assert run("check").status == 0
    assert run("token").status == 0


def test_a_store_that_does_not_work(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "file"
    place.write_text("no folder")
    monkeypatch.setenv("NEXUS_STORE", str(place))
    outcome = run("check")
    assert (outcome.status, outcome.steps) == (1, STEPS)
    assert f"{str(place)!r}) does not work" in outcome.out
    assert outcome.reason.startswith("everything works but the store: ")
    assert run("get", "/customer")[::2] == (0, "")
    monkeypatch.setenv("NEXUS_STORE", "postgres://127.0.0.1/")
    assert "store" in run("token").reason
    monkeypatch.setenv("NEXUS_STORE", "redis://127.0.0.1/")
    monkeypatch.setitem(sys.modules, "redis", None)
    assert "redis" in run("token").reason
    assert run("token", "--no-store").status == 0
    assert len(nexus.token_requests) == 3


def test_where_the_store_is(
    run: Run, nexus: NexusSandbox, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NEXUS_STORE", str(tmp_path / "own"))
    assert run("token").status == 0
    assert (tmp_path / "own" / STORE).exists()
    monkeypatch.setenv("NEXUS_STORE", "")
    for argv in (["token", "--no-store"], ["get", "/", "--sandbox"], ["check", "--sandbox"], ["token", "--sandbox"]):
        assert run(*argv).status == 0
    assert not cache.exists()
    assert run("token").status == 0
    assert (cache / "nexus_auth" / STORE).exists()


@pytest.mark.parametrize(("system", "variable"), [("posix", "XDG_CACHE_HOME"), ("nt", "LOCALAPPDATA")])
def test_the_cache_folder_of_a_system(monkeypatch: pytest.MonkeyPatch, system: str, variable: str) -> None:
    cache, home = os.path.abspath("cache"), os.path.abspath("home")
    places = []
    with monkeypatch.context() as patch:  # pytest itself wants the true name
        patch.setattr(os, "name", system)
        for folder, tilde in ((cache, home), ("relative", home), ("", home), ("", "~")):
            patch.setenv(variable, folder)
            patch.setattr(os.path, "expanduser", lambda path, tilde=tilde: path.replace("~", tilde))
            places.append(command_line._cache_folder())
    in_home = os.path.join(home, ".cache", "nexus_auth")
    assert places == [os.path.join(cache, "nexus_auth"), in_home, in_home, None]


# Where a call goes, and how long it takes


@pytest.mark.parametrize(
    ("name", "host"), [("test", "testidentity.quantoz.com"), ("production", "identity.quantoz.com")]
)
def test_environment_goes_before_the_variables(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, name: str, host: str
) -> None:
    def refuse(_: Any, request: Any, **options: Any) -> None:
        raise requests.ConnectionError(f"no way to {request.url}")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    outcome = run("check", "--environment", name)
    assert outcome.status == 1
    assert repr(name) in outcome.out
    assert f"no way to https://{host}/connect/token" in outcome.reason


def test_sandbox_option_needs_no_variables_and_takes_no_proxy(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NEXUS_ENVIRONMENT", "production")
    monkeypatch.setenv("NEXUS_STORE", "postgres://127.0.0.1/")
    for command in COMMANDS:
        outcome = run(*command, "--sandbox")
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out
    assert nexus.token_requests == []


def test_variables_that_do_not_suffice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS:
        for options in ([], ["--environment", "test"]):
            outcome = run(*command, *options)
            assert (outcome.status, outcome.out) == (1, "")
            assert "NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET" in outcome.reason
    monkeypatch.setenv("NEXUS_CLIENT_ID", "abc")
    monkeypatch.setenv("NEXUS_CLIENT_SECRET", "very secret\udcff")
    assert "client_secret has lone surrogates" in run("check").reason


def test_without_stdout(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", None)
            assert command_line.main(list(command)) == 1
    assert nexus.token_requests == []


def test_credentials_that_are_refused(run: Run, nexus: NexusSandbox) -> None:
    nexus.clients.clear()
    for command in COMMANDS[:-1]:
        outcome = run(*command)
        assert (outcome.status, outcome.out) == (1, "")
        assert "invalid_client" in outcome.reason


def test_who_never_answers_is_not_waited_for_long(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "API_TIMEOUT", (10, 0.1))
    nexus.answer("/", delay=4, times=None)
    for command in (["get", "/"], ["check"]):
        outcome = run(*command)
        assert outcome.status == 1
        assert "timed out" in outcome.reason
    monkeypatch.setattr(command_line, "TIMEOUT", 0.2)
    nexus.fail_token_requests(None, delay=4)
    outcome = run("token", "--max-wait", "0", "--no-store")  # and so no second try
    assert (outcome.status, outcome.out) == (1, "")
    assert "Timeout" in outcome.reason
    nexus.wait_for(token_requests=3)
    assert len(nexus.token_requests) == 3


# Usage


WRONG_USAGE = [
    "", "login", "get", "get /a /b", "get https://testapi.quantoz.com/customer", "get /customer --details",
    "get /customer --environment prod", "get /customer --sandbox --environment test", "token --client-secret s",
    "token --max-wait -1", "token --max-wait 1e10", "token --max-wait nan", "token --max-wait soon", "check /customer",
    "sandbox --sandbox", "sandbox --port 65536", "sandbox --limit -1", "sandbox --expires-in 1.5",
]  # fmt: skip


def test_wrong_usage(run: Run) -> None:
    for words in WRONG_USAGE:
        outcome = run(*words.split())
        assert (outcome.status, outcome.out) == (2, ""), words
        assert outcome.err.startswith("usage: ")


def test_it_calls_itself_as_it_was_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "__package__", "other._vendor")
    for started_as, name in (
        ("/usr/lib/other/_vendor/__main__.py", "python -m other._vendor"),
        ("/usr/bin/nexus-auth", "nexus-auth"),
        ("nexus-auth.exe", "nexus-auth"),
    ):
        monkeypatch.setattr(sys, "argv", [started_as])
        assert run().err.startswith(f"usage: {name} ")
        assert f"{name} get /customer --sandbox" in run("--help").out
    assert run("get", "/customer", "--no-store").err.startswith("other._vendor stopped: environment variables not set")


def test_help_suffices(run: Run) -> None:
    options = ["--environment", "--sandbox", "--no-store", "--max-wait", "--verbose", "--version"]
    for argv, words in (
        ([], [*VARIABLES, "NEXUS_STORE", "get", "token", "check", "sandbox", *options]),
        (["get"], ["--iso8601"]),
        (["token"], ["--details"]),
        (["check"], ["--max-wait"]),
        (["sandbox"], ["--port", "--limit", "--expires-in"]),
    ):
        status, out, err = run(*argv, "--help")
        assert (status, err) == (0, "")
        assert [word for word in words if word not in out] == []
    assert re.fullmatch(r"nexus_auth \d+\.\d+\.\d+\S*\n", run("--version").out)


def test_ctrl_c_is_quiet(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Session, "get", interrupt)
    assert run("get", "/customer") == (130, "", "")


@contextmanager
def logging_of_its_own() -> Generator[None, None, None]:
    """Let a command set up the log as in a process of its own."""
    handlers, level = logging.root.handlers, logging.root.level
    logging.root.handlers = []
    try:
        yield
    finally:
        logging.root.handlers = handlers
        logging.root.setLevel(level)


def test_the_log_is_for_who_asks_for_it_and_steers_no_terminal(
    run: Run, nexus: NexusSandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    nexus.fail_token_requests()  # a retry is a warning
    with logging_of_its_own():
        assert run("token", "--no-store").err == ""
    with logging_of_its_own():
        assert "\nDEBUG:nexus_auth:token endpoint " in "\n" + run("token", "--no-store", "-v").err
        logging.getLogger("nexus_auth").info("a\x9bb\nc")
        assert capsys.readouterr().err == "INFO:nexus_auth:a\\u009bb\nc\n"


# In processes of their own


def test_get_in_a_process_of_its_own(nexus: NexusSandbox) -> None:
    nexus.answer("/missing", status=404, json={"message": "Not found"})
    nexus.fail_token_requests(retry_after=0)  # one retry: a warning in the log, which nobody asked to see
    outcome = finish(spawn("get", "/missing"))
    assert outcome.status == 1
    assert json.loads(outcome.out) == {"message": "Not found"}
    assert outcome.reason.endswith("HTTP 404 Not Found: Not found")


def test_a_reader_that_has_gone_is_not_complained_of(nexus: NexusSandbox) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        assert finish(spawn("get", "/customer", stdout=stdout)) == (1, "", "")


@pytest.fixture
def ctrl_c() -> Generator[signal.Signals, None, None]:
    """The signal of Ctrl-C, which children take no notice of if these tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.SIGINT
    signal.signal(signal.SIGINT, before)


def test_a_sandbox_on_a_port_that_is_taken(run: Run, nexus: NexusSandbox) -> None:
    port = nexus.environment.base_url.rpartition(":")[2]
    outcome = run("sandbox", "--port", port)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.reason.startswith(f"--port {port}: ")


def test_a_sandbox_whose_variables_nobody_reads(request: pytest.FixtureRequest) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = spawn("sandbox", stdout=writing)
    os.close(writing)
    request.addfinalizer(process.kill)
    with process:
        assert process.wait(30) == 1
        assert process.stderr.read() == ""


def test_sandbox_serves_others_until_ctrl_c(
    run: Run, ctrl_c: signal.Signals, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port()
    process = spawn("sandbox", "--port", str(port), "--limit", "2", "--expires-in", "1234")
    request.addfinalizer(process.kill)
    exports = [shlex.split(process.stdout.readline()) for _ in VARIABLES]
    assert {word for word, _ in exports} == {"export"}
    variables = dict(assignment.split("=", 1) for _, assignment in exports)
    assert list(variables) == VARIABLES
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hint = process.stderr.readline()
    assert hint.startswith(f"# to revoke all its tokens: curl -X POST http://127.0.0.1:{port}/")
    assert json.loads(run("token", "--details").out)["lifetime"] in range(1200, 1235)
    assert requests.post(hint.split()[-1], timeout=10).status_code == 204
    assert run("get", "/customer").status == 0  # with the second of two tokens
    assert "60 token requests per minute" in run("token", "--no-store", "--max-wait", "1").reason
    process.send_signal(ctrl_c)
    assert finish(process) == (0, "", "# token requests: 3, API requests: 2\n")
