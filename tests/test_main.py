"""The command line: every command and every exit status, in this process and, where it matters, in one of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

requests = pytest.importorskip("requests")

from conftest import closed_port  # noqa: E402

import nexus_auth.__main__ as command_line  # noqa: E402
from nexus_auth import Environment  # noqa: E402
from nexus_auth.requests import nexus_session  # noqa: E402
from nexus_auth.testing import NexusSandbox  # noqa: E402

VARIABLES = ["NEXUS_CLIENT_ID", "NEXUS_CLIENT_SECRET", "NEXUS_TOKEN_ENDPOINT", "NEXUS_BASE_URL", "NEXUS_ENVIRONMENT"]


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


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours or of a proxy is set, and whatever a command sets is gone in the end."""
    proxies = [f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL", "NO")]
    for name in [*VARIABLES, *proxies, *map(str.lower, proxies)]:
        monkeypatch.setenv(name, "")  # what was never set is not restored to that
        monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process. Its output never has the secret in it."""

    def run(*argv: str) -> Outcome:
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
def nexus(sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> NexusSandbox:
    """A sandbox that the environment variables lead to."""
    monkeypatch.setenv("NEXUS_CLIENT_ID", sandbox.client_id)
    monkeypatch.setenv("NEXUS_CLIENT_SECRET", sandbox.client_secret)
    monkeypatch.setenv("NEXUS_TOKEN_ENDPOINT", sandbox.environment.token_endpoint)
    monkeypatch.setenv("NEXUS_BASE_URL", sandbox.environment.base_url)
    return sandbox


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds slept between tries, which take none here."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


@pytest.fixture
def web_page() -> Iterator[str]:
    """The URL of a server that knows nothing of Nexus, and answers with a page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()
            self.wfile.write(b"<p>Bonjour \xe9</p>")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def spawn(*argv: str, module: str = "nexus_auth", **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    root = Path(command_line.__file__).parents[1]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    defaults: dict[str, Any] = {**pipes, "cwd": root, "env": environ, "text": True}
    return subprocess.Popen([sys.executable, "-W", "error", "-m", module, *argv], **{**defaults, **options})


def finish(process: subprocess.Popen[str]) -> Outcome:
    with process:
        out, err = process.communicate(timeout=20)
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
    nexus.answer("/customer", json={"name": "José"}, times=2)
    assert run("get", "/customer").out == '{"name": "Jos\\u00e9"}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("get", "/customer").out == '{\n  "name": "José"\n}\n'


def test_get_prints_what_a_terminal_cannot_show_as_it_came(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    nexus.answer("/customer", json={"name": "\ud800"})
    assert run("get", "/customer") == (0, '{"name": "\\ud800"}', "")


def test_get_asks_for_iso8601_dates(run: Run, nexus: NexusSandbox) -> None:
    assert run("get", "--iso8601", "/customer").status == 0
    assert nexus.requests[0].headers["request_iso8601"] == "true"


def test_get_says_why_the_api_refuses_and_prints_its_answer(run: Run, nexus: NexusSandbox) -> None:
    refusal = {"message": "Not found", "errors": ["No customer A1", "Nor\nA2 \x1b[31m"], "values": None}
    nexus.answer("/customer/A1", status=404, json=refusal)
    outcome = run("get", "/customer/A1")
    assert outcome.status == 1
    assert json.loads(outcome.out) == refusal
    url = f"{nexus.environment.base_url}/customer/A1"
    assert outcome.reason == f"GET {url}: HTTP 404 Not Found: Not found: No customer A1: Nor A2  [31m"


@pytest.mark.parametrize("answer", [["no", "envelope"], "a text", {"message": None}, {"errors": 3}, None])
def test_get_takes_a_refusal_in_any_form(run: Run, nexus: NexusSandbox, answer: Any) -> None:
    nexus.answer("/customer", status=500, json=answer)
    outcome = run("get", "/customer")
    assert outcome.status == 1
    assert outcome.reason.endswith(": HTTP 500 Internal Server Error")


def test_get_of_an_empty_answer_prints_nothing(run: Run, nexus: NexusSandbox) -> None:
    nexus.answer("/customer", status=204)
    assert run("get", "/customer") == (0, "", "")


def test_get_counts_a_redirect_to_nowhere_as_a_failure(run: Run, nexus: NexusSandbox) -> None:
    nexus.answer("/customer", status=304)
    assert "HTTP 304" in run("get", "/customer").reason


def test_get_prints_what_is_no_json_as_it_came(
    nexus: NexusSandbox, web_page: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("NEXUS_BASE_URL", web_page)
    assert command_line.main(["get", "/page"]) == 0
    assert capfdbinary.readouterr() == (b"<p>Bonjour \xe9</p>", b"")
    assert command_line.main(["get", "/missing"]) == 1
    out, err = capfdbinary.readouterr()
    assert out == b"<p>Bonjour \xe9</p>"
    assert err.decode() == f"nexus_auth stopped: GET {web_page}/missing: HTTP 404 Not Found\n"
    assert len(nexus.token_requests) == 1


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
    assert json.loads(outcome.out) == {"environment": "custom", "scope": "api1", "lifetime": lifetime}


# check


def test_check_says_that_all_is_right(run: Run, nexus: NexusSandbox) -> None:
    outcome = run("check")
    assert (outcome.status, outcome.err) == (0, "")
    assert [line.partition(":")[0] for line in outcome.out.splitlines()] == [
        "environment variables",
        "network",
        "credentials",
        "API",
    ]
    for fact in (nexus.client_id, nexus.environment.token_endpoint, nexus.environment.base_url, "HTTP 200"):
        assert fact in outcome.out


def test_check_stops_at_the_environment_variables(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run("check")
    assert (outcome.status, outcome.out) == (1, "")
    assert "NEXUS_CLIENT_ID" in outcome.reason
    assert "NEXUS_CLIENT_SECRET" in outcome.reason
    monkeypatch.setenv("NEXUS_CLIENT_ID", "abc")
    monkeypatch.setenv("NEXUS_CLIENT_SECRET", "very secret")
    monkeypatch.setenv("NEXUS_ENVIRONMENT", "prod")
    outcome = run("check")
    assert (outcome.status, outcome.out) == (1, "")
    assert "'prod'" in outcome.reason


def test_check_stops_at_the_network(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}/connect/token"
    monkeypatch.setenv("NEXUS_TOKEN_ENDPOINT", endpoint)
    outcome = run("check")
    assert outcome.status == 1
    assert [line.partition(":")[0] for line in outcome.out.splitlines()] == ["environment variables"]
    assert endpoint in outcome.reason
    assert sum(naps) < command_line.MAX_WAIT
    assert not nexus.requests


def test_check_stops_at_the_credentials(run: Run, nexus: NexusSandbox) -> None:
    nexus.clients.clear()
    outcome = run("check")
    assert outcome.status == 1
    assert [line.partition(":")[0] for line in outcome.out.splitlines()] == ["environment variables", "network"]
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
    assert "API" not in outcome.out
    assert "credentials" in outcome.out
    assert f"HTTP {status}" in outcome.reason
    assert outcome.reason.endswith(": No: Not you")


def test_check_stops_at_an_api_that_cannot_be_reached(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port()
    monkeypatch.setenv("NEXUS_BASE_URL", f"http://127.0.0.1:{port}")
    outcome = run("check")
    assert outcome.status == 1
    assert "credentials" in outcome.out
    assert str(port) in outcome.reason
    assert len(nexus.token_requests) == 1


def test_check_is_not_content_with_an_answer_from_elsewhere(run: Run, nexus: NexusSandbox, web_page: str) -> None:
    nexus.answer("/", status=302, headers={"Location": f"{web_page}/sign-in"})
    outcome = run("check")
    assert outcome.status == 1
    assert f"no sign that {nexus.environment.base_url} takes the token" in outcome.reason
    assert f"{web_page}/sign-in" in outcome.reason


# Where a call goes


@pytest.mark.parametrize("name", ["test", "production"])
def test_environment_goes_before_the_variables(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, naps: list[float], name: str
) -> None:
    def refuse(_: Any, request: Any, **options: Any) -> None:
        raise requests.ConnectionError(f"no way to {request.url}")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    outcome = run("check", "--environment", name)
    assert outcome.status == 1
    assert repr(name) in outcome.out
    host = "testidentity.quantoz.com" if name == "test" else "identity.quantoz.com"
    assert f"no way to https://{host}/connect/token" in outcome.reason
    assert len(naps) == 3
    assert not nexus.token_requests


@pytest.mark.parametrize("argv", [["get", "/customer"], ["token"], ["token", "--details"], ["check"]])
def test_sandbox_option_needs_no_variables_and_takes_no_proxy(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NEXUS_ENVIRONMENT", "production")
    outcome = run(*argv, "--sandbox")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out
    assert not nexus.token_requests
    assert nexus.client_secret != os.environ["NEXUS_CLIENT_SECRET"]


@pytest.mark.parametrize("argv", [["get", "/customer"], ["token"], ["token", "--details"]])
def test_missing_variables_are_named(run: Run, argv: list[str]) -> None:
    outcome = run(*argv)
    assert (outcome.status, outcome.out) == (1, "")
    assert "NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET" in outcome.reason
    outcome = run(*argv, "--environment", "test")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.reason.endswith("NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET")


@pytest.mark.parametrize("argv", [["get", "/customer"], ["token"], ["token", "--details"]])
def test_refused_credentials(run: Run, nexus: NexusSandbox, argv: list[str]) -> None:
    nexus.clients.clear()
    outcome = run(*argv)
    assert (outcome.status, outcome.out) == (1, "")
    assert "invalid_client" in outcome.reason


@pytest.mark.usefixtures("naps")
@pytest.mark.parametrize(("timeout", "max_wait"), [(0.05, 60), (60, 0.1)])
def test_an_endpoint_that_never_answers_is_not_waited_for_long(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch, timeout: float, max_wait: float
) -> None:
    monkeypatch.setattr(command_line, "TIMEOUT", timeout)
    monkeypatch.setattr(command_line, "MAX_WAIT", max_wait)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("NEXUS_TOKEN_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}/connect/token")
        started = time.monotonic()
        outcome = run("token")
    assert time.monotonic() - started < 2
    assert (outcome.status, outcome.out) == (1, "")
    assert "Timeout" in outcome.reason
    assert not nexus.token_requests


def test_an_api_that_never_answers_is_not_waited_for_long(
    run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "API_TIMEOUT", (0.1, 0.1))
    for command in (["get", "/"], ["check"]):
        nexus.answer("/", delay=60)
        started = time.monotonic()
        outcome = run(*command)
        assert time.monotonic() - started < 2
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
        ["get", "/customer", "--details"],
        ["get", "/customer", "--environment", "prod"],
        ["get", "/customer", "--sandbox", "--environment", "test"],
        ["token", "--client-secret", "s"],
        ["check", "/customer"],
        ["sandbox", "--sandbox"],
    ],
)
def test_wrong_usage(run: Run, argv: list[str]) -> None:
    outcome = run(*argv)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("usage: python -m nexus_auth")


def test_help_suffices(run: Run) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for word in [*VARIABLES, "get", "token", "check", "sandbox", "--environment", "--sandbox", "--verbose"]:
        assert word in out
    assert "python -m nexus_auth get /customer --sandbox" in out
    for command in ("get", "token", "check", "sandbox"):
        assert run(command, "--help").status == 0


def test_ctrl_c_is_quiet(run: Run, nexus: NexusSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Session, "get", interrupt)
    assert run("get", "/customer") == (130, "", "")
    monkeypatch.setattr(time, "sleep", interrupt)
    # The one command that is to show a secret: that of the sandbox, made up for it.
    monkeypatch.setattr(command_line, "print", lambda *_, **options: None, raising=False)
    assert run("sandbox") == (0, "", "")


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
    nexus.fail_token_requests(retry_after=0)  # One retry: a warning in the log, which nobody asked to see.
    quiet, verbose, missing = spawn("get", "/customer"), spawn("get", "/customer", "-v"), spawn("get", "/missing")
    outcome = finish(missing)
    assert outcome.status == 1
    assert json.loads(outcome.out) == {"message": "Not found"}
    assert outcome.reason.endswith("HTTP 404 Not Found: Not found")
    outcomes = finish(quiet), finish(verbose)
    for outcome in outcomes:
        assert outcome.status == 0
        assert json.loads(outcome.out)["message"]
        assert nexus.client_secret not in outcome.out + outcome.err
    assert outcomes[0].err == ""
    assert "nexus_auth:token endpoint" in outcomes[1].err


def test_a_reader_that_has_gone_and_a_wrong_usage_in_processes_of_their_own(nexus: NexusSandbox) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        gone, wrong = spawn("get", "/customer", stdout=stdout), spawn("get")
        assert finish(gone) == (1, "", "")
    assert finish(wrong).status == 2
    assert len(nexus.requests) == 1


def test_sandbox_serves_a_script_until_ctrl_c(request: pytest.FixtureRequest) -> None:
    process = spawn("sandbox")
    request.addfinalizer(process.kill)  # which is nothing for one that has ended
    assert process.stdout
    lines = [process.stdout.readline() for _ in VARIABLES]
    exports = [shlex.split(line) for line in lines]
    assert [words[0] for words in exports] == ["export"] * len(VARIABLES)
    variables = dict(words[1].split("=", 1) for words in exports)
    assert list(variables) == VARIABLES
    script = finish(spawn("get", "/customer", env={**os.environ, **variables}))
    assert (script.status, script.err) == (0, "")
    assert json.loads(script.out)["values"]["path"] == "/customer"
    client_id, client_secret, token_endpoint, base_url, _ = variables.values()
    environment = Environment("sandbox", token_endpoint=token_endpoint, base_url=base_url)
    with nexus_session(client_id, client_secret, environment) as session:
        assert session.get("/customer", timeout=10).ok
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
