"""The distributions: what is in them, and that they work where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.package
ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT, cwd=dist)
    return dist


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new virtual environment."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True)
    return home / ("Scripts" if os.name == "nt" else "bin") / "python"


def test_metadata(dist: Path) -> None:
    files = [str(path) for path in dist.iterdir()]
    assert len(files) == 2
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist)


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if name.startswith("nexus_auth/")}
    files = [path for path in (ROOT / "nexus_auth").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert inside == {path.relative_to(ROOT).as_posix() for path in files}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nexus_auth"}


def test_the_wheel_runs_the_first_command(dist: Path, python: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    for command in ([python, "-m", "nexus_auth"], [python.with_name("nexus-auth")]):
        assert "Successfully" in run(*command, "get", "/customer", "--sandbox", cwd=tmp_path)
    assert run(python, "-c", "import nexus_auth; print(nexus_auth.__file__)", cwd=tmp_path).count("site-packages") == 1


def test_the_sdist_can_run_its_tests(dist: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (home,) = tmp_path.iterdir()
    assert "passed" in run(sys.executable, "-m", "pytest", "-q", "tests/test_readme.py", cwd=home)
