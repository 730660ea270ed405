"""The doors: what each loads, and what it says when its library is not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import nexus_auth

HEAVY = ("requests", "httpx", "httpx2", "anyio", "authlib")


def loaded_by(statement: str) -> set[str]:
    """Return which of the libraries are loaded after `statement`, in a process of its own."""
    code = f"{statement}\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def need(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def test_importing_the_package_loads_no_library() -> None:
    assert loaded_by("import nexus_auth; nexus_auth.TEST; nexus_auth.Environment") == set()
    assert loaded_by("from nexus_auth.testing import NexusSandbox") == set()
    assert loaded_by("from nexus_auth import forget_tokens; forget_tokens()") == set()


def test_the_requests_door_loads_requests_alone() -> None:
    need("requests")
    assert loaded_by("from nexus_auth import NexusAuth, nexus_session; NexusAuth('a', 'b', 'test')") == {"requests"}


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_the_httpx_doors_load_neither_requests_nor_each_other(library: str) -> None:
    need(library)
    loaded = loaded_by(f"from nexus_auth.{library} import NexusAuth; NexusAuth('a', 'b', 'test')")
    assert loaded == {library}


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
