"""The README: its examples are run against the sandbox, and its tables are those of the code."""

from __future__ import annotations

import inspect
import logging
import re
import wsgiref.util
import wsgiref.validate
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Driver

import nexus_auth
from nexus_auth.testing import NexusSandbox

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NEEDED = [module for module in ("requests", "httpx") if f"import {module}" in README]


def wsgi_environ() -> dict[str, Any]:
    """Return the environment of a WSGI request (PEP 3333)."""
    environ: dict[str, Any] = {}
    wsgiref.util.setup_testing_defaults(environ)
    return {**environ, "QUERY_STRING": ""}


@pytest.fixture
def nexus_logger() -> Iterator[logging.Logger]:
    """The logger of nexus_auth, whose level is set back in the end."""
    logger = logging.getLogger("nexus_auth")
    yield logger
    logger.setLevel(logging.NOTSET)


@pytest.mark.usefixtures("in_variables", "nexus_logger", "quick_retries")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.strip().splitlines()[-1][:30])
def test_example(
    example: str,
    sandbox: NexusSandbox,
    secured: NexusSandbox,
    bundle: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in NEEDED:
        pytest.importorskip(module, reason="its library is not installed")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    sandbox.answer("/customer", json={"message": "Successfully processed your request"}, times=None)
    names: dict[str, Any] = {
        "client_id": sandbox.client_id,
        "client_secret": sandbox.client_secret,
        "environment": sandbox.environment,
        "pytest": pytest,
        "store": tmp_path / "store",
        "private": secured.environment,
        "private_ca": bundle,
    }
    if "private" in example:
        names |= {"client_id": secured.client_id, "client_secret": secured.client_secret}
    source = example.replace('"test"', "environment")
    source = source.replace("https://testidentity.quantoz.com/connect/token", sandbox.environment.token_endpoint)
    source = source.replace("https://testapi.quantoz.com", sandbox.environment.base_url)
    exec(compile(source, "an example of the README", "exec"), names)
    if "application" in names:
        answered: list[str] = []
        validated: Any = wsgiref.validate.validator(names["application"])
        for content in (b'{"message": "Successfully processed your request"}', b"Nexus does not answer"):
            body = validated(wsgi_environ(), lambda status, headers, _=None: answered.append(status))
            assert list(body) == [content]
            body.close()
            sandbox.answer("/customer", drop=True)
        assert answered == ["200 OK", "503 Service Unavailable"]
    for test in [value for name, value in names.items() if name.startswith("test_")]:
        with NexusSandbox() as nexus:
            fixtures = {"nexus": nexus}
            test(**{name: fixtures[name] for name in inspect.signature(test).parameters})
    if "print(" in example:
        assert "Successfully" in capsys.readouterr().out


def test_options_are_those_of_the_signature(driver: Driver) -> None:
    table = README.split("## Options")[1].split("##")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE)
    documented = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    for name, parameter in list(inspect.signature(driver.door.NexusAuth).parameters.items())[3:]:
        quoted = f'"{parameter.default}"' if isinstance(parameter.default, str) else str(parameter.default)
        assert documented[name] == f"`{quoted}`", name


def test_variables_are_those_that_are_read() -> None:
    documented = set(re.findall(r"^\| .*`NEXUS_.*? \|", README, re.MULTILINE))
    text = (ROOT / "nexus_auth" / "auth.py").read_text(encoding="utf-8")
    for name in re.findall(r"`NEXUS_(\w+)`", "".join(documented)):
        assert f'"{name}"' in text or f"{{prefix}}{name}" in text, name


def test_every_public_name_has_a_docstring() -> None:
    for module in ("requests", "httpx", "httpx2", "testing", "store"):
        try:
            home = __import__(f"nexus_auth.{module}", fromlist=["*"])
        except ImportError:
            continue
        for name, value in vars(home).items():
            if getattr(value, "__module__", "") == home.__name__ and not name.startswith("_"):
                assert inspect.getdoc(value), name
    assert all(inspect.getdoc(getattr(nexus_auth, name)) for name in nexus_auth.__all__ if not name.startswith("_"))


def test_two_commands_do_all_the_set_up() -> None:
    first, second = re.findall(r"```sh\n(.*?)\n(.*?)\n```", README)[0]
    assert first == "pip install . && python -m nexus_auth get /customer --sandbox"
    assert second in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
