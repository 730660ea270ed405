"""Modules that are imported when they are first used, since they take long and many need none of them, or lack one."""

from __future__ import annotations

import importlib
import os
import threading
from typing import Any


def has_module(name: str) -> bool:
    """Tell whether there is a module of that whole name: a vendored copy may lack a door."""
    from importlib.util import find_spec  # late, for it is seldom needed

    try:
        return find_spec(name) is not None
    except ValueError:  # it is there, and is no module that was imported
        return True


class LateImport:
    """A module that is imported when it is first called for.

    Its lock is held over a fork: a child would wait for ever for what another thread of its parent was importing.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Any = None
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows does not fork
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._lock.release
            )

    @property
    def is_loaded(self) -> bool:
        """Tell whether a call returns at once, without waiting for this or another thread to import."""
        return self._module is not None

    def __call__(self) -> Any:
        """Return the module."""
        if self._module is None:
            with self._lock:
                self._module = importlib.import_module(self._name)
        return self._module
