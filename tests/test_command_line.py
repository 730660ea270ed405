"""The command line: every command and every exit status, in this process and, where it matters, in one of its own."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

requests = pytest.importorskip("requests")

from server import closed_port  # noqa: E402

import nexus_auth.__main__ as command_line  # noqa: E402
from nexus_auth import Environment, forget_tokens  # noqa: E402
from nexus_auth.requests import nexus_session  # noqa: E402
from nexus_auth.store import SQLiteStore  # noqa: E402
from nexus_auth.testing import NexusSandbox  # noqa: E402

VARIABLES = ["NEXUS_CLIENT_ID", "NEXUS_CLIENT_SECRET", "NEXUS_TOKEN_ENDPOINT", "NEXUS_BASE_URL", "NEXUS_ENVIRONMENT"]
STORE = "store-1.sqlite3"


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
    """No variable of ours or of a proxy is set, and whatever a command sets is gone in the end."""
    proxies = [f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL", "NO")]
    for name in [*VARIABLES, "NEXUS_STORE", *proxies, *map(str.lower, proxies)]:
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


def spawn(*argv: str, module: str = "nexus_auth", **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    root = Path(command_line.__file__).parents[1]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    defaults: dict[str, Any] = {**pipes, "cwd": root, "env": environ, "text": True}
    return subprocess.Popen([sys.executable, "-W", "error", "-m", module, *argv], **{**defaults, **options})


def finish(process: subprocess.Popen[str]) -> Outcome:
    with process:
        out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out or "", err)


# get


@pytest.mark.parametrize("path", ["/customer?page=2", "customer?page=2"])
def test_get_prints_plain_json_in_a_pipe(run: Run, nexus: NexusSandbox, path: str) -> None:
    outcome = run("get", path)
    assert (outcome.status, outcome.err) == (0, "")
    assert json.loads(outcome.out)["values"]["path"] == "/customer?page=2"
    assert outcome.out.count("\n") == 1
    (arrival,) = nexus.requests
    assert arrival.method == "GET"
    assert arrival.headers["Authorization"].startswith("Bearer ")
    assert "request_iso8601" not in arrival.headers


def test_get_prints_for_people_on_a_terminal(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    nexus.answer("/customer", json={"name": "José"}, times=None)
    assert run("get", "/customer").out == '{"name": "Jos\\u00e9"}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("get", "/customer").out == '{\n  "name": "José"\n}\n'


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


class LatinTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_terminal_that_cannot_show_everything_gets_ascii(
    nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus.answer("/customer", json="José €")
    monkeypatch.setattr(sys, "stdout", LatinTerminal(shown := io.BytesIO(), encoding="latin-1"))
    assert command_line.main(["get", "/customer"]) == 0
    assert shown.getvalue() == b'"Jos\\u00e9 \\u20ac"\n'


def test_get_asks_for_iso8601_dates(run: Run, nexus: NexusSandbox) -> None:
    assert run("get", "--iso8601", "/customer").status == 0
    assert nexus.requests[0].headers["request_iso8601"] == "true"


def test_get_says_why_the_api_refuses_and_prints_its_answer(run: Run, nexus: NexusSandbox) -> None:
    refusal = {"message": "Not found", "errors": ["No customer A1", "Nor\nA2"], "values": None}
    nexus.answer("/customer/A1", status=404, json=refusal)
    outcome = run("get", "/customer/A1")
    assert outcome.status == 1
    assert json.loads(outcome.out) == refusal
    url = f"{nexus.environment.base_url}/customer/A1"
    assert outcome.reason == f"GET {url}: HTTP 404 Not Found: Not found: No customer A1: Nor\\nA2"


@pytest.mark.parametrize("answer", [["no", "envelope"], "a text", {"message": None}, {"errors": 3}, None])
def test_get_takes_a_refusal_in_any_form(run: Run, nexus: NexusSandbox, answer: Any) -> None:
    nexus.answer("/customer", status=500, json=answer)
    outcome = run("get", "/customer")
    assert outcome.status == 1
    assert outcome.reason.endswith(": HTTP 500 Internal Server Error")


@pytest.mark.parametrize(("status", "exit_status"), [(204, 0), (304, 1)])
def test_get_of_an_empty_answer_prints_nothing(run: Run, nexus: NexusSandbox, status: int, exit_status: int) -> None:
    nexus.answer("/customer", status=status)
    outcome = run("get", "/customer")
    assert (outcome.status, outcome.out) == (exit_status, "")
    assert not exit_status or "HTTP 304" in outcome.reason


def test_get_prints_what_is_no_json_as_it_came(nexus: NexusSandbox, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    nexus.answer("/page", body=b"<p>Bonjour \xe9\x9b</p>", headers={"Content-Type": "text/html"})
    nexus.answer("/page", body=b"<p>Bonjour \xe9\x9b</p>", status=404)
    assert command_line.main(["get", "/page"]) == 0
    assert capfdbinary.readouterr() == (b"<p>Bonjour \xe9\x9b</p>", b"")
    assert command_line.main(["get", "/page"]) == 1
    out, err = capfdbinary.readouterr()
    assert out == b"<p>Bonjour \xe9\x9b</p>"
    assert err.decode() == f"nexus_auth stopped: GET {nexus.environment.base_url}/page: HTTP 404 Not Found\n"


# token


def test_token_prints_a_token_and_nothing_else(run: Run, nexus: NexusSandbox) -> None:
    outcome = run("token")
    assert (outcome.status, outcome.err) == (0, "")
    token = outcome.out.removesuffix("\n")
    assert token.split() == [token]
    url = f"{nexus.environment.base_url}/customer"
    assert requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10).status_code == 200
    assert len(nexus.requests) == 1


@pytest.mark.parametrize(("expires_in", "lifetime"), [(1200, 1200), (None, None)])
def test_token_details(run: Run, nexus: NexusSandbox, expires_in: int | None, lifetime: int | None) -> None:
    nexus.expires_in = expires_in
    outcome = run("token", "--details")
    assert (outcome.status, outcome.err) == (0, "")
    details = json.loads(outcome.out)
    assert details == {"environment": "custom", "scope": "api1", "lifetime": lifetime}


# check


def test_check_says_that_all_is_right(run: Run, nexus: NexusSandbox, cache: Path) -> None:
    outcome = run("check")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.steps == ["environment variables", "store", "network", "credentials", "API"]
    environment = nexus.environment
    for fact in (nexus.client_id, environment.token_endpoint, environment.base_url, "HTTP 200", str(cache)):
        assert fact in outcome.out
    assert run("check", "--no-store").steps == ["environment variables", "network", "credentials", "API"]


def test_check_stops_at_the_environment_variables(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run("check")
    assert (outcome.status, outcome.out) == (1, "")
    assert "NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET" in outcome.reason
    monkeypatch.setenv("NEXUS_CLIENT_ID", "abc")
    monkeypatch.setenv("NEXUS_ENVIRONMENT", "prod")
    for secret, reason in (
        ("very secret", "unknown environment 'prod'"),
        ("very secret\n", "client_secret ends with a newline"),
        ("very secret\udcff", "client_secret has lone surrogates"),
    ):
        monkeypatch.setenv("NEXUS_CLIENT_SECRET", secret)
        outcome = run("check")
        assert (outcome.status, outcome.out) == (1, "")
        assert outcome.reason.startswith(reason)


def test_check_stops_at_the_network(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}/connect/token"
    monkeypatch.setenv("NEXUS_TOKEN_ENDPOINT", endpoint)
    outcome = run("check")
    assert outcome.status == 1
    assert outcome.steps == ["environment variables", "store"]
    assert endpoint in outcome.reason
    assert not nexus.requests


def test_check_stops_at_the_credentials(run: Run, nexus: NexusSandbox) -> None:
    nexus.clients.clear()
    outcome = run("check")
    assert outcome.status == 1
    assert outcome.steps == ["environment variables", "store", "network"]
    assert "invalid_client" in outcome.reason
    assert len(nexus.token_requests) == 1
    assert not nexus.requests


@pytest.mark.parametrize("status", [204, 400, 404, 405])
def test_check_is_content_with_an_api_that_does_not_refuse_the_token(
    run: Run, nexus: NexusSandbox, status: int
) -> None:
    nexus.answer("/", status=status)
    outcome = run("check")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"HTTP {status}" in outcome.out


@pytest.mark.parametrize("status", [401, 403, 429, 503])
def test_check_stops_at_an_api_that_refuses(run: Run, nexus: NexusSandbox, status: int) -> None:
    nexus.answer("/", status=status, json={"message": "No", "errors": ["Not you"]}, times=2)
    outcome = run("check")
    assert outcome.status == 1
    assert outcome.steps[-1] == "credentials"
    assert f"HTTP {status}" in outcome.reason
    assert outcome.reason.endswith(": No: Not you")


def test_check_stops_at_an_api_that_cannot_be_reached(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port()
    monkeypatch.setenv("NEXUS_BASE_URL", f"http://127.0.0.1:{port}")
    outcome = run("check")
    assert outcome.status == 1
    assert outcome.steps[-1] == "credentials"
    assert str(port) in outcome.reason
    assert len(nexus.token_requests) == 1


def test_check_is_not_content_with_an_answer_from_elsewhere(run: Run, nexus: NexusSandbox) -> None:
    with NexusSandbox() as stranger:
        stranger.answer("/sign-in")
        nexus.answer("/", status=302, headers={"Location": f"{stranger.environment.base_url}/sign-in"})
        outcome = run("check")
    assert outcome.status == 1
    assert f"no sign that {nexus.environment.base_url} takes the token" in outcome.reason
    assert f"{stranger.environment.base_url}/sign-in" in outcome.reason


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


def test_check_counts_with_others(run: Run, nexus: NexusSandbox, cache: Path) -> None:
    for _ in range(3):
        assert run("check", "--max-wait", "2").status == 0  # none holds up the next one
    store = SQLiteStore(cache / "nexus_auth")
    endpoint = hashlib.sha256(nexus.environment.token_endpoint.encode()).hexdigest()
    for number in range(57):
        assert store.acquire(f"quota:{endpoint}", str(number), 60, 30.0) == 0
    outcome = run("check", "--max-wait", "2")
    assert outcome.steps == ["environment variables", "store"]
    assert re.search(r"the next token request may go in (2\d\.\d|30\.0) s", outcome.reason)
    assert len(nexus.token_requests) == 3


def test_check_leaves_an_endpoint_alone_that_wants_it(run: Run, nexus: NexusSandbox) -> None:
    nexus.fail_token_requests(status=429, retry_after=30)
    for command in ("token", "check"):
        outcome = run(command)
        assert (outcome.status, len(nexus.token_requests)) == (1, 1)
        assert re.search(r"the next token request may go in [23]\d\.\d s", outcome.reason)


def test_check_asks_again_where_others_were_refused(run: Run, nexus: NexusSandbox) -> None:
    nexus.clients.clear()
    for count in (1, 1):
        assert "invalid_client" in run("token").reason
        assert len(nexus.token_requests) == count
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
    assert outcome.status == 1
    assert outcome.steps == ["environment variables", "store", "network", "credentials", "API"]
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
    for argv in (["token", "--no-store"], ["get", "/", "--sandbox"], ["check", "--sandbox"], ["token", "--sandbox"]):
        assert run(*argv).status == 0
    assert not cache.exists()
    monkeypatch.setenv("NEXUS_STORE", str(tmp_path / "own"))
    assert run("token").status == 0
    assert (tmp_path / "own" / STORE).exists()
    assert not cache.exists()
    monkeypatch.setenv("NEXUS_STORE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for folder in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        monkeypatch.setenv("LOCALAPPDATA", folder)
        assert run("token").status == 0
    assert (tmp_path / "home" / ".cache" / "nexus_auth" / STORE).exists()
    assert len(nexus.token_requests) == 3


@pytest.mark.parametrize(("system", "variable"), [("posix", "XDG_CACHE_HOME"), ("nt", "LOCALAPPDATA")])
def test_the_cache_folder_of_a_system(monkeypatch: pytest.MonkeyPatch, system: str, variable: str) -> None:
    folder = os.path.abspath(variable)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", system)
        patch.setenv(variable, folder)
        place = command_line._cache_folder()
        patch.setenv(variable, "relative")
        patch.setattr(os.path, "expanduser", lambda path: path)
        nowhere = command_line._cache_folder()
    assert place == os.path.join(folder, "nexus_auth")
    assert nowhere is None


def test_processes_at_once_share_a_token_and_a_refusal(nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [finish(process) for process in [spawn("token") for _ in range(6)]]
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == 0
    assert len(nexus.token_requests) == 1
    monkeypatch.setenv("NEXUS_CLIENT_SECRET", "wrong")
    for outcome in [finish(process) for process in [spawn("token") for _ in range(3)]]:
        assert "invalid_client" in outcome.reason
    assert len(nexus.token_requests) == 2


# Where a call goes, and how long it takes


@pytest.mark.parametrize("name", ["test", "production"])
def test_environment_goes_before_the_variables(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(_: Any, request: Any, **options: Any) -> None:
        raise requests.ConnectionError(f"no way to {request.url}")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    outcome = run("check", "--environment", name)
    assert outcome.status == 1
    assert repr(name) in outcome.out
    host = "testidentity.quantoz.com" if name == "test" else "identity.quantoz.com"
    assert f"no way to https://{host}/connect/token" in outcome.reason
    assert not nexus.token_requests


@pytest.mark.parametrize("argv", [["get", "/customer"], ["token"], ["token", "--details"], ["check"]])
def test_sandbox_option_needs_no_variables_and_takes_no_proxy(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NEXUS_ENVIRONMENT", "production")
    monkeypatch.setenv("NEXUS_STORE", "postgres://127.0.0.1/")
    outcome = run(*argv, "--sandbox")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out
    assert not nexus.token_requests


@pytest.mark.parametrize("argv", [["get", "/customer"], ["token"], ["token", "--details"]])
def test_missing_variables_and_refused_credentials(run: Run, request: pytest.FixtureRequest, argv: list[str]) -> None:
    outcome = run(*argv)
    assert (outcome.status, outcome.out) == (1, "")
    assert "NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET" in outcome.reason
    outcome = run(*argv, "--environment", "test")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.reason.endswith("NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET")
    os.environ.update(NEXUS_ENVIRONMENT="")
    request.getfixturevalue("nexus").clients.clear()
    outcome = run(*argv)
    assert (outcome.status, outcome.out) == (1, "")
    assert "invalid_client" in outcome.reason


@pytest.mark.parametrize(("options", "tries"), [([], 4), (["--max-wait", "0"], 1)])
def test_an_endpoint_that_never_answers_is_not_waited_for_long(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, options: list[str], tries: int
) -> None:
    monkeypatch.setattr(command_line, "TIMEOUT", 0.1)
    nexus.fail_token_requests(None, delay=60)
    outcome = run("token", *options)
    assert (outcome.status, outcome.out) == (1, "")
    assert "Timeout" in outcome.reason
    assert len(nexus.token_requests) == tries


def test_how_long_to_wait_for_a_token(run: Run, nexus: NexusSandbox) -> None:
    nexus.fail_token_requests(status=429, retry_after=1)
    outcome = run("token", "--max-wait", "0.5", "--no-store")
    assert outcome.status == 1
    assert "60 token requests per minute" in outcome.reason
    assert "IP address" in outcome.reason
    assert re.search(r"the next token request may go in [12]\.\d s", outcome.reason)
    nexus.fail_token_requests(status=429, retry_after=1)
    assert run("token", "--max-wait", "20", "--no-store").status == 0


def test_an_api_that_never_answers_is_not_waited_for_long(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "API_TIMEOUT", (0.1, 0.1))
    for command in (["get", "/"], ["check"]):
        nexus.answer("/", delay=60)
        started = time.monotonic()
        outcome = run(*command)
        assert time.monotonic() - started < 5
        assert outcome.status == 1
        assert "timed out" in outcome.reason


# Usage


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["login"],
        ["get"],
        ["get", "/a", "/b"],
        ["get", "https://testapi.quantoz.com/customer"],
        ["get", "/customer", "--details"],
        ["get", "/customer", "--environment", "prod"],
        ["get", "/customer", "--sandbox", "--environment", "test"],
        ["token", "--client-secret", "s"],
        ["token", "--max-wait", "-1"],
        ["token", "--max-wait", "1e10"],
        ["token", "--max-wait", "nan"],
        ["token", "--max-wait", "soon"],
        ["check", "/customer"],
        ["sandbox", "--sandbox"],
        ["sandbox", "--port", "65536"],
        ["sandbox", "--limit", "-1"],
        ["sandbox", "--expires-in", "1.5"],
    ],
)
@pytest.mark.parametrize("started_as", ["/usr/lib/nexus_auth/__main__.py", "/usr/bin/nexus-auth", "nexus-auth.exe"])
def test_wrong_usage(run: Run, monkeypatch: pytest.MonkeyPatch, started_as: str, argv: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    outcome = run(*argv)
    assert (outcome.status, outcome.out) == (2, "")
    name = "python -m nexus_auth" if "__main__" in started_as else "nexus-auth"
    assert outcome.err.startswith(f"usage: {name} ")


def test_help_suffices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nexus-auth"])
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    options = ["--environment", "--sandbox", "--no-store", "--max-wait", "--verbose", "--version"]
    for word in [*VARIABLES, "NEXUS_STORE", "get", "token", "check", "sandbox", *options]:
        assert word in out
    assert "nexus-auth get /customer --sandbox" in out
    for command, words in (("get", "--iso8601"), ("token", "--details"), ("check", ""), ("sandbox", "--port --limit")):
        shown = run(command, "--help")
        assert shown.status == 0
        assert all(word in shown.out for word in words.split())
    assert re.fullmatch(r"nexus_auth \d+\.\d+\.\d+\S*\n", run("--version").out)


def test_ctrl_c_is_quiet(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Session, "get", interrupt)
    assert run("get", "/customer") == (130, "", "")
    monkeypatch.setattr(time, "sleep", interrupt)
    outcome = run("sandbox")
    assert (outcome.status, outcome.out.count("export ")) == (0, 5)


def test_the_log_steers_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    command_line._log_to_stderr(logging.INFO)
    logging.getLogger("nexus_auth").info("a\x9bb\nc")
    assert capsys.readouterr().err == "INFO:nexus_auth:a\\u009bb\nc\n"


def test_a_reader_that_has_gone_is_not_complained_of(run: Run, nexus: NexusSandbox) -> None:
    nexus.answer("/missing", status=404, json={"message": "Not found"})
    for path in ("/customer", "/missing"):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stdout, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            status = command_line.main(["get", path])
        assert status == 1
    assert run("token").err == ""


# In processes of their own


def test_get_in_a_process_of_its_own(nexus: NexusSandbox) -> None:
    nexus.answer("/missing", status=404, json={"message": "Not found"})
    nexus.fail_token_requests(retry_after=0)  # one retry: a warning in the log, which nobody asked to see
    outcome = finish(spawn("get", "/missing"))
    assert outcome.status == 1
    assert json.loads(outcome.out) == {"message": "Not found"}
    assert outcome.reason.endswith("HTTP 404 Not Found: Not found")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        gone, wrong = spawn("get", "/customer", stdout=stdout), spawn("get")
        verbose = spawn("get", "/customer", "-v", "--no-store")
        assert finish(gone) == (1, "", "")
    assert finish(wrong).status == 2
    outcome = finish(verbose)
    assert outcome.status == 0
    assert "nexus_auth:token endpoint" in outcome.err
    assert nexus.client_secret not in outcome.err
    assert len(nexus.token_requests) == 3


def test_sandbox_serves_others_until_ctrl_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    process = spawn("sandbox", "--port", str(port), "--limit", "2", "--expires-in", "1234")
    request.addfinalizer(process.kill)  # which is nothing for one that has ended
    assert process.stdout
    assert process.stderr
    exports = [shlex.split(process.stdout.readline()) for _ in VARIABLES]
    assert [words[0] for words in exports] == ["export"] * len(VARIABLES)
    variables = dict(words[1].split("=", 1) for words in exports)
    assert list(variables) == VARIABLES
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert json.loads(finish(spawn("token", "--details")).out)["lifetime"] in range(1200, 1235)
    script = finish(spawn("get", "/customer"))
    assert (script.status, script.err) == (0, "")
    assert json.loads(script.out)["values"]["path"] == "/customer"
    client_id, client_secret, token_endpoint, base_url, _ = variables.values()
    assert base_url == f"http://127.0.0.1:{port}"
    hint = process.stderr.readline()
    assert hint.startswith("to revoke all its tokens: curl -X POST http://")
    environment = Environment("sandbox", token_endpoint=token_endpoint, base_url=base_url)
    with nexus_session(client_id, client_secret, environment, max_wait=1) as session:
        assert session.get("/customer", timeout=10).ok  # the second of two token requests
        url = urlsplit(hint.split()[-1])
        with closing(http.client.HTTPConnection(url.netloc, timeout=10)) as connection:
            connection.request("POST", url.path)
            assert connection.getresponse().status == 204
        with pytest.raises(requests.RequestException, match="60 token requests per minute"):
            session.get("/customer", timeout=10)
        process.send_signal(signal.SIGINT)  # while the connection is open
        assert finish(process) == (0, "", "")


def test_vendored_under_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "other" / "_vendor"
    shutil.copytree(Path(command_line.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other" / "__init__.py").touch()
    helped = spawn("--help", module="other._vendor", cwd=tmp_path)
    called = spawn("get", "/customer", "--sandbox", module="other._vendor", cwd=tmp_path)
    refused = spawn("get", "/customer", module="other._vendor", cwd=tmp_path)
    assert "python -m other._vendor get /customer --sandbox" in finish(helped).out
    assert finish(called).status == 0
    assert finish(refused).err.startswith("other._vendor stopped: environment variables not set")
