"""The README: its examples are run against the sandbox, its table of options is that of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import nexus_auth
from nexus_auth import grant
from nexus_auth.testing import NexusSandbox

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(
    number: int, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEXUS_CLIENT_ID", sandbox.client_id)
    monkeypatch.setenv("NEXUS_CLIENT_SECRET", sandbox.client_secret)
    monkeypatch.setenv("NEXUS_TOKEN_ENDPOINT", sandbox.environment.token_endpoint)
    monkeypatch.setenv("NEXUS_BASE_URL", sandbox.environment.base_url)
    monkeypatch.delenv("NEXUS_ENVIRONMENT", raising=False)
    monkeypatch.setattr(grant, "BACKOFF", 0.002)
    names: dict[str, Any] = {
        "client_id": sandbox.client_id,
        "client_secret": sandbox.client_secret,
        "environment": sandbox.environment,
        "pytest": pytest,
    }
    example = EXAMPLES[number].replace('"test"', "environment")
    example = example.replace("https://testidentity.quantoz.com/connect/token", sandbox.environment.token_endpoint)
    example = example.replace("https://testapi.quantoz.com", sandbox.environment.base_url)
    exec(compile(example, f"README example {number}", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    for test in tests:
        with NexusSandbox() as nexus:
            test(nexus)
    if "print(" in example:
        assert "Successfully" in capsys.readouterr().out
    assert tests or sandbox.requests or "fixture" in example


def test_options_are_those_of_the_signature() -> None:
    table = README.split("## Options")[1].split("##")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE)
    documented = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    for door in ("requests", "httpx"):
        auth = pytest.importorskip(f"nexus_auth.{door}", reason="its library is not installed").NexusAuth
        parameters = list(inspect.signature(auth).parameters.values())[2:]
        lent = {"requests": "client", "httpx": "session"}[door]
        assert [p.name for p in parameters] == [name for name in documented if name != lent]
        for parameter in parameters[1:]:
            quoted = str(parameter.default) if not isinstance(parameter.default, str) else f'"{parameter.default}"'
            assert documented[parameter.name] == f"`{quoted}`"


def test_every_public_name_has_a_docstring() -> None:
    for module in ("requests", "httpx", "httpx2", "testing"):
        try:
            home = __import__(f"nexus_auth.{module}", fromlist=["*"])
        except ImportError:
            continue
        for name, value in vars(home).items():
            if getattr(value, "__module__", "") == home.__name__ and not name.startswith("_"):
                assert inspect.getdoc(value), name
    assert all(inspect.getdoc(getattr(nexus_auth, name)) for name in nexus_auth.__all__)


def test_it_can_be_read_in_one_go() -> None:
    assert 80 <= len(README.splitlines()) <= 150
    first, second = re.findall(r"```sh\n(.*?)\n(.*?)\n```", README)[0]
    assert first == "pip install . && python -m nexus_auth get /customer --sandbox"
    assert second in (Path(__file__).parent.parent / ".ci" / "run").read_text(encoding="utf-8")
