"""Locks for what must not be in progress in another thread at a fork: the child would wait for its end for ever."""

from __future__ import annotations

import os
import threading
from importlib import import_module

# It has such a lock, too, which is then taken after ours: by a fork, and by whoever imports what makes a logger.
import_module("logging")


def _kept_over_fork() -> threading.RLock:
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):  # pragma: no branch  # Windows does not fork
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


# All of them are here, and so registered before anything can be in progress. A fork takes the last one first: who
# holds one may take those above it.
importing = _kept_over_fork()  # what is imported on first use
deriving = _kept_over_fork()
using_sqlite = _kept_over_fork()  # SQLite has locks of its own
