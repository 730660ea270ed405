"""The folder copied into another package: it works there under its new name, with Authlib and requests alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nexus_auth
from nexus_auth.testing import NexusSandbox

pytest.importorskip("requests", reason="the copy is used with requests")

SCRIPT = """
import sys, pickle, requests
for name in ("httpx", "httpx2"):
    sys.modules[name] = None
from acme._vendor import nexus_auth as vendored
from acme._vendor.nexus_auth import NexusAuth, TokenRequestError, nexus_session
from acme._vendor.nexus_auth.testing import NexusSandbox
import nexus_auth
assert "acme" in vendored.__file__ and vendored.__version__ == nexus_auth.__version__
assert vendored.TokenRequestError is not nexus_auth.TokenRequestError
with NexusSandbox() as nexus:
    credentials = nexus.client_id, nexus.client_secret, nexus.environment
    session = nexus_session(*credentials)
    for _ in range(10):
        assert session.get("/customer").status_code == 200
    nexus.revoke_tokens()
    assert session.post("/customer", json={"a": 1}).json()["values"]["body"] == '{"a": 1}'
    assert len(nexus.token_requests) == 2
    assert pickle.loads(pickle.dumps(session)).get("/customer").status_code == 200
    assert len(nexus.token_requests) == 2
    # The installed package has a state of its own.
    urls = {"token_endpoint": nexus.environment.token_endpoint, "base_url": nexus.environment.base_url}
    own = nexus_auth.Environment("own", **urls)
    assert nexus_auth.nexus_session(nexus.client_id, nexus.client_secret, own).get("/customer").status_code == 200
    assert len(nexus.token_requests) == 3
    try:
        nexus_session(nexus.client_id, "wrong", nexus.environment).get("/customer")
    except TokenRequestError as error:
        assert isinstance(error, requests.RequestException) and error.error == "invalid_client"
    try:
        NexusAuth(*credentials)(object())
    except TypeError as error:
        assert "from acme._vendor.nexus_auth." in str(error), error
assert not [name for name in sys.modules if name.startswith("nexus_auth.httpx")]
print("fine")
"""


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    home = Path(nexus_auth.__file__).parent
    shutil.copytree(home, tmp_path / "acme/_vendor/nexus_auth", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("acme", "acme/_vendor"):
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def run(code: list[str], vendored: Path) -> subprocess.CompletedProcess[str]:
    import os

    path = os.pathsep.join([str(vendored), str(Path(nexus_auth.__file__).parent.parent)])
    return subprocess.run(
        [sys.executable, "-W", "error", *code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=vendored,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_copy_keeps_the_contract(vendored: Path) -> None:
    done = run(["-c", SCRIPT], vendored)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_the_copy_has_its_command_line(vendored: Path) -> None:
    done = run(["-m", "acme._vendor.nexus_auth", "get", "/customer", "--sandbox"], vendored)
    assert done.returncode == 0, done.stderr
    assert "Successfully" in done.stdout


def test_the_licence_is_inside(vendored: Path) -> None:
    text = (vendored / "acme/_vendor/nexus_auth/LICENSE").read_text()
    assert text.startswith("MIT License")
    licence = Path(__file__).parent.parent / "LICENSE"
    assert text == licence.read_text()


def test_nothing_is_imported_by_its_own_name(vendored: Path) -> None:
    for source in (vendored / "acme/_vendor/nexus_auth").glob("*.py"):
        for line in source.read_text().splitlines():
            assert not line.strip().startswith(("import nexus_auth", "from nexus_auth")), (source.name, line)


def test_sandboxes_do_not_share_tokens() -> None:
    with NexusSandbox() as one, NexusSandbox() as other:
        assert one.client_secret != other.client_secret
