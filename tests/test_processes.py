"""Processes: what they share through a store, what a fork and a pickle take along, all of it in real processes.

What very many of them do beside each other is proved on a virtual clock, in `test_simulation.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import INSTALLED, Driver, GatedSandbox, Log, outcome, url
from herd import MemoryStore
from server import Server, closed_port, running_server

import nexus_auth
from nexus_auth import credentials
from nexus_auth.testing import NexusSandbox

requests: Any = pytest.importorskip("requests", reason="the processes sign calls of requests")
DOORS = [name for name in INSTALLED if not name.endswith("trio")]

SCRIPT = """
import asyncio, importlib, json, sys, threading, time
from nexus_auth import Environment, credentials, quota, shared
job = json.loads(sys.argv[1])
library_name, _, is_async = job["door"].partition("-")
library, door = importlib.import_module(library_name), importlib.import_module("nexus_auth." + library_name)
environment = Environment("sandbox", **job["urls"])
address = environment.base_url + "/customer"
credentials.STORE_LIMIT, credentials.STORE_TIME = 20.0, 40.0  # a busy machine is no outage
if job["quota"]:
    quota.LIMIT = shared.LIMIT = job["quota"]
    credentials.KEEP = shared.KEEP = quota.KEEP = job["quota"] + 0.1

async def call_async(auth):
    async with library.AsyncClient(auth=auth) as client:
        return await client.get(address)

def call(client_id):
    auth = door.NexusAuth(client_id, job["client_secret"], environment, store=job["store"], timeout=job["timeout"])
    for _ in range(job["calls"]):
        response = asyncio.run(call_async(auth)) if is_async else library.get(address, auth=auth)
        said.append(response.status_code)
        time.sleep(job["pause"])

said = []
print("ready", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=call, args=(client_id,)) for client_id in job["client_ids"]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(said))
"""


class Processes:
    """Scripts that call the sandbox through all doors in turn, each in a process of its own."""

    def __init__(self, nexus: NexusSandbox, store: Path | str) -> None:
        self.nexus = nexus
        self.store = store
        self.running: list[subprocess.Popen[str]] = []

    def start(self, count: int, **options: Any) -> None:
        for _ in range(count):
            self.start_one([self.nexus.client_id], **options)

    def start_one(
        self,
        client_ids: list[str],
        *,
        calls: int = 1,
        pause: float = 0.0,
        timeout: float = 10.0,
        quota: int | None = None,
    ) -> None:
        """Start a process with a thread for each of `client_ids`, which makes `calls`, and a pause after each."""
        environment = self.nexus.environment
        job = {
            "urls": {"token_endpoint": environment.token_endpoint, "base_url": environment.base_url},
            "client_ids": client_ids,
            "client_secret": self.nexus.client_secret,
            "store": str(self.store),
            "door": DOORS[len(self.running) % len(DOORS)],
            "calls": calls,
            "pause": pause,
            "timeout": timeout,
            "quota": quota,
        }
        command = [sys.executable, "-W", "error", "-c", SCRIPT, json.dumps(job)]
        self.running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def go(self) -> None:
        """Have all processes call at once, when the last is ready."""
        for process in self.running:
            assert process.stdout
            process.stdout.readline()
        for process in self.running:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()

    def said(self) -> list[int]:
        """Return what came of the calls of all processes that are running, once they have ended."""
        outputs = [process.communicate(timeout=90)[0] for process in self.running]
        self.running.clear()
        return [status for output in outputs for status in json.loads(output.splitlines()[-1])]


@pytest.fixture(params=["SQLite", pytest.param("Redis", marks=pytest.mark.slow)])
def processes(gated: GatedSandbox, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Processes]:
    store: Path | str = tmp_path / "store"
    if request.param == "Redis":
        pytest.importorskip("redis", reason="its library is not installed")
        store = request.getfixturevalue("server").url
    processes = Processes(gated, store)
    yield processes
    for process in processes.running:
        process.kill()
        process.communicate()


def auth_for(sandbox: NexusSandbox, **options: Any) -> Any:
    return nexus_auth.NexusAuth(sandbox.client_id, sandbox.client_secret, sandbox.environment, **options)


@pytest.mark.parametrize("count", [len(DOORS), pytest.param(20, marks=pytest.mark.slow)])
def test_processes_share_a_token_and_its_renewal(processes: Processes, gated: GatedSandbox, count: int) -> None:
    processes.start(count)
    processes.go()
    gated.arrived(1)
    time.sleep(0.5)  # any other that asks for a token does so by then
    gated.gate.set()
    assert processes.said() == [200] * count
    assert len(gated.token_requests) == 1
    gated.revoke_tokens()
    processes.start(2)
    processes.go()
    assert processes.said() == [200] * 2
    assert len(gated.token_requests) == 2


@pytest.mark.slow
def test_the_quota_holds_for_all_processes(processes: Processes, gated: GatedSandbox) -> None:
    """24 API clients in four processes, each with a token request to make, and a quota of 6 in 6 seconds."""
    gated.gate.set()
    client_ids = [f"client-{number}" for number in range(24)]
    gated.clients.update(dict.fromkeys(client_ids, gated.client_secret))
    for first in range(0, 24, 6):
        processes.start_one(client_ids[first : first + 6], quota=6)
    processes.go()
    assert processes.said() == [200] * 24
    arrivals = sorted(request.time for request in gated.token_requests)
    assert len(arrivals) == 24
    assert all(later - sooner > 6 for sooner, later in zip(arrivals, arrivals[6:], strict=False))


@pytest.mark.slow
def test_revocations_under_load_cost_a_renewal_each(processes: Processes, gated: GatedSandbox) -> None:
    gated.gate.set()
    processes.start(10, calls=30, pause=0.2)
    processes.go()
    for _ in range(2):
        time.sleep(2.5)  # of the seven or so that they go on
        gated.revoke_tokens()
    assert processes.said() == [200] * 300
    assert len(gated.token_requests) == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
def test_a_process_that_is_killed_while_it_fetches_holds_up_nobody_for_long(
    processes: Processes, gated: GatedSandbox
) -> None:
    processes.start(1, timeout=2)
    processes.go()
    gated.arrived(1)
    victim = processes.running.pop()
    victim.kill()
    victim.communicate()
    gated.gate.set()
    processes.start(3, timeout=2)
    processes.go()
    assert processes.said() == [200] * 3
    assert len(gated.token_requests) == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["Redis"], indirect=True)
def test_restarts_of_the_server_fail_no_call(processes: Processes, gated: GatedSandbox, tmp_path: Path) -> None:
    gated.gate.set()
    gated.expires_in = 4
    port = closed_port()
    processes.store = f"redis://127.0.0.1:{port}"
    with running_server(tmp_path, port=port):
        processes.start(8, calls=40, pause=0.2)
        processes.go()
        time.sleep(2)
    for _ in range(2):
        with running_server(tmp_path, port=port):
            time.sleep(1.5)
    with running_server(tmp_path, port=port):
        assert processes.said() == [200] * 320


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSTOP")
@pytest.mark.parametrize("processes", ["Redis"], indirect=True)
@pytest.mark.parametrize("signal_name", ["SIGSTOP", "SIGKILL"])
def test_a_server_that_is_away_fails_no_call(
    processes: Processes, gated: GatedSandbox, server: Server, signal_name: str
) -> None:
    gated.gate.set()
    os.kill(server.pid, getattr(signal, signal_name))
    processes.start(len(DOORS), calls=2)
    processes.go()
    assert processes.said() == [200] * 2 * len(DOORS)
    assert len(gated.token_requests) == len(DOORS)  # as without a store: one for each process


def test_a_store_that_cannot_be_used_fails_no_call_and_is_told_of_once(
    driver: Driver, sandbox: NexusSandbox, tmp_path: Path, log: Log
) -> None:
    store = tmp_path / "a file in place of the folder"
    store.touch()
    client = driver.client(driver.auth(sandbox, store=store))
    for _ in range(3):
        assert driver.get(client, url(sandbox)).status == 200
    sandbox.revoke_tokens()
    assert driver.get(client, url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 2  # as without a store
    warnings = [message for level, message in log() if level == "WARNING"]
    assert [message.partition(",")[0] for message in warnings] == [f"SQLiteStore({str(store)!r}) is out of order"]


class HungStore(MemoryStore):
    """A store that answers only once it is let go, or has been waited for much too long."""

    def __init__(self) -> None:
        super().__init__()
        self.is_over = threading.Event()
        self.answers = 0

    def get(self, name: str) -> tuple[bytes, float] | None:
        self.is_over.wait(10)
        self.is_over.set()
        self.answers += 1
        return super().get(name)


def test_a_store_that_hangs_is_not_waited_for_and_is_told_of_once(
    driver: Driver, sandbox: NexusSandbox, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(credentials, "STORE_LIMIT", 0.1)
    store = HungStore()
    client = driver.client(driver.auth(sandbox, store=store))
    for _ in range(2):
        assert driver.get(client, url(sandbox)).status == 200
        sandbox.revoke_tokens()
    assert (store.answers, len(sandbox.token_requests)) == (0, 2)
    warnings = [message for level, message in log() if level == "WARNING"]
    assert [message.rpartition(": ")[2] for message in warnings] == ["it does not answer"]
    store.is_over.set()


def test_a_pickled_auth_works_in_another_process_and_touches_no_file_without_a_store(sandbox: NexusSandbox) -> None:
    script = """
import pickle, requests, sys
auth = pickle.load(sys.stdin.buffer)
opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == "open" else None)
assert requests.get(sys.argv[1], auth=auth).status_code == 200
written = [path for path, mode, flags in opened if isinstance(mode, str) and set(mode) & set("wax+")]
assert not written, written
assert not {"sqlite3", "redis", "nexus_auth.store", "nexus_auth.shared"} & set(sys.modules)
"""
    command = [sys.executable, "-W", "error", "-c", script, url(sandbox)]
    subprocess.run(command, input=pickle.dumps(auth_for(sandbox)), check=True)


def test_a_password_of_a_store_does_not_travel(sandbox: NexusSandbox) -> None:
    pytest.importorskip("redis", reason="its library is not installed")
    pickled = pickle.dumps(auth_for(sandbox, store="redis://:passw0rd@127.0.0.1:1/0"))
    assert b"passw0rd" not in pickled
    assert requests.get(url(sandbox), auth=pickle.loads(pickled)).status_code == 200


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("has_store", [False, True])
def test_a_child_that_is_forked_while_others_fetch_works(gated: GatedSandbox, tmp_path: Path, has_store: bool) -> None:
    auth = auth_for(gated, store=tmp_path / "store" if has_store else None)

    def works() -> bool:
        return bool(requests.get(url(gated), auth=auth).status_code == 200)

    threads = [threading.Thread(target=works) for _ in range(4)]
    for thread in threads:
        thread.start()
    gated.arrived(1)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if outcome(works) is True else 1)
    gated.gate.set()
    assert os.waitpid(child, 0)[1] == 0
    for thread in threads:
        thread.join()
