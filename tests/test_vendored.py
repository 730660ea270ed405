"""The folder copied into another package: it works there under its new name, with Authlib and one HTTP library."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import INSTALLED

import nexus_auth

HOME = Path(nexus_auth.__file__).parent
DOORS = {  # and the files of which each is made
    "requests": ["requests.py"],
    "httpx": ["httpx.py", "_httpx_flow.py"],
    "httpx2": ["httpx2.py", "_httpx_flow.py"],
}
LIBRARIES = [name for name in DOORS if name in INSTALLED]

# What the copy is to do, with the one library that it has a door for: {library} and the name of its {factory}.
SCRIPT = """
import sys
for name in {others}:
    sys.modules[name] = None
import {library}
from acme._vendor import nexus_auth as vendored
from acme._vendor.nexus_auth import TokenRequestError, forget_tokens
from acme._vendor.nexus_auth.{library} import NexusAuth, {factory} as make
from acme._vendor.nexus_auth.testing import NexusSandbox
import nexus_auth
assert "acme" in vendored.__file__ and vendored.__version__ == nexus_auth.__version__
assert vendored.TokenRequestError is not nexus_auth.TokenRequestError
with NexusSandbox() as nexus, make(nexus.client_id, nexus.client_secret, nexus.environment) as client:
    for _ in range(10):
        assert client.get("/customer").status_code == 200
    nexus.revoke_tokens()
    assert client.post("/customer", json={{"a": 1}}).json()["values"]["body"].replace(" ", "") == '{{"a":1}}'
    assert len(nexus.token_requests) == 2
    # The installed package has a state of its own.
    nexus_auth.forget_tokens()
    assert client.get("/customer").status_code == 200
    assert len(nexus.token_requests) == 2
    # A store is there, too.
    for _ in range(2):
        forget_tokens()
        NexusAuth(nexus.client_id, nexus.client_secret, nexus.environment, store="store").access_token()
    assert len(nexus.token_requests) == 3
    foreign = [type("Request", (), {{"__module__": library}}) for library in {others}]
    for wrong, words in (
        (lambda: NexusAuth(nexus.client_id, "wrong", nexus.environment).access_token(), "refused client"),
        (lambda: NexusAuth("id", "secret", nexus_auth.TEST), "an Environment of acme._vendor.nexus_auth, not"),
        (lambda: NexusAuth("id", "secret", nexus_auth.TEST), "(a nexus_auth.environment.Environment)"),
        (lambda: NexusAuth("id", "secret", "test")(object()), "this NexusAuth is for {library}, not for builtins"),
        *((lambda of=of: NexusAuth("id", "secret", "test")(of()), ", not for " + of.__module__) for of in foreign),
    ):
        try:
            wrong()
        except (TypeError, TokenRequestError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
assert hasattr(vendored, "NexusAuth") == ("NexusAuth" in dir(vendored)) == ("{library}" == "requests")
assert "forget_tokens" in dir(vendored)
assert not [name for name in sys.modules if name.startswith("nexus_auth.") and name.endswith(("requests", "flow"))]
print("fine")
"""


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """The folder in which there is the package acme with the copy in it."""
    shutil.copytree(HOME, tmp_path / "acme/_vendor/nexus_auth", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("acme", "acme/_vendor"):
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def run(code: list[str], vendored: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(vendored), str(HOME.parent)])
    return subprocess.run(
        [sys.executable, "-W", "error", *code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=vendored,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a Python for type checkers, in which a vendored copy's one library is, but no redis.

    Nor is another of the libraries that there are doors for.
    """

    def make(library: str) -> Path:
        venv.create(tmp_path / "venv", with_pip=False)
        (site_packages,) = (tmp_path / "venv").rglob("site-packages")
        absent = {*DOORS, "redis", "valkey"} - {library}
        for path in map(Path, site.getsitepackages()):
            for entry in path.iterdir():
                if entry.suffix != ".pth" and entry.name not in absent:
                    (site_packages / entry.name).symlink_to(entry)
        return tmp_path / "venv/bin/python"

    return make


def leave_one_door(vendored: Path, library: str) -> None:
    for name in {name for names in DOORS.values() for name in names} - set(DOORS[library]):
        (vendored / "acme/_vendor/nexus_auth" / name).unlink()


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_copy_keeps_the_contract(vendored: Path, library: str) -> None:
    leave_one_door(vendored, library)
    factory = "nexus_session" if library == "requests" else "nexus_client"
    script = SCRIPT.format(library=library, factory=factory, others=[name for name in DOORS if name != library])
    done = run(["-c", script], vendored)
    assert (done.stdout, done.stderr) == ("fine\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.skipif(os.name != "posix", reason="its Python is made of symbolic links")
@pytest.mark.parametrize(
    ("checker", "command"),
    [("mypy", ["--strict", "acme", "--python-executable"]), ("pyright", ["acme", "--pythonpath"])],
)
def test_the_copy_passes_type_checkers(
    vendored: Path, python: Callable[[str], Path], library: str, checker: str, command: list[str]
) -> None:
    """Those of the package that it is copied into, which checks it as its own code."""
    pytest.importorskip(checker, reason="this type checker is not installed")
    leave_one_door(vendored, library)
    if library != "requests":
        (vendored / "acme/_vendor/nexus_auth/__main__.py").unlink()  # which is of that door
    done = run(["-m", checker, *command, str(python(library))], vendored)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif("requests" not in INSTALLED, reason="the command line uses requests")
def test_the_copy_has_its_command_line(vendored: Path) -> None:
    done = run(["-m", "acme._vendor.nexus_auth", "get", "/customer", "--sandbox"], vendored)
    assert done.returncode == 0, done.stderr
    assert "Successfully" in done.stdout


def test_the_licence_is_inside(vendored: Path) -> None:
    text = (vendored / "acme/_vendor/nexus_auth/LICENSE").read_text()
    assert text.startswith("MIT License")
    assert text == (Path(__file__).parent.parent / "LICENSE").read_text()


def test_nothing_is_imported_by_its_own_name(vendored: Path) -> None:
    for source in (vendored / "acme/_vendor/nexus_auth").rglob("*.py"):
        for line in source.read_text().splitlines():
            assert not line.strip().startswith(("import nexus_auth", "from nexus_auth")), (source.name, line)
