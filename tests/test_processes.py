"""Processes: what they share through a store, what a fork and a pickle take along, all of it in real processes."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import INSTALLED, Driver, GatedSandbox, outcome, url
from server import Server, closed_port, running_server

from nexus_auth.testing import NexusSandbox

pytest.importorskip("requests", reason="the processes sign calls of requests")
DOORS = [name for name in INSTALLED if not name.endswith("trio")]

SCRIPT = """
import asyncio, importlib, json, sys, threading, time
from nexus_auth import Environment, NexusAuthError
job = json.loads(sys.argv[1])
library, _, is_async = job["door"].partition("-")
door = importlib.import_module("nexus_auth." + library)
environment = Environment("sandbox", **job["urls"])
arguments = {"environment": environment, "store": job["store"], "max_wait": job["max_wait"]}
if job["quota"]:
    from nexus_auth import quota, shared
    quota.LIMIT = shared.LIMIT = job["quota"]
    quota.PERIOD, quota.KEEP = float(job["quota"]), job["quota"] + 0.1
    import nexus_auth.credentials as credentials
    credentials.KEEP = shared.KEEP = quota.KEEP

async def call_async(auth):
    async with getattr(importlib.import_module(library), "AsyncClient")(auth=auth) as client:
        return (await client.get(environment.base_url + "/customer")).status_code

def call(client_id):
    auth = door.NexusAuth(client_id, job["client_secret"], **arguments, timeout=job["timeout"])
    try:
        if is_async:
            return asyncio.run(call_async(auth))
        return importlib.import_module(library).get(environment.base_url + "/customer", auth=auth).status_code
    except (NexusAuthError, OSError) as error:
        return getattr(error, "error", None) or type(error).__name__

def calls(client_id):
    for _ in range(job["calls"]):
        said.append(call(client_id))
        time.sleep(job["pause"])

said = []
threads = [threading.Thread(target=calls, args=(client_id,)) for client_id in job["client_ids"]]
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
        self.started: list[subprocess.Popen[str]] = []

    def start(self, **options: Any) -> subprocess.Popen[str]:
        environment = self.nexus.environment
        job = {
            "urls": {"token_endpoint": environment.token_endpoint, "base_url": environment.base_url},
            "client_ids": [self.nexus.client_id],
            "client_secret": self.nexus.client_secret,
            "store": str(self.store),
            "door": DOORS[len(self.started) % len(DOORS)],
            "calls": 1,
            "pause": 0,
            "timeout": 10,
            "max_wait": 75,
            "quota": None,
        }
        command = [sys.executable, "-W", "error", "-c", SCRIPT, json.dumps({**job, **options})]
        self.started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return self.started[-1]

    def said(self) -> list[Any]:
        """Return what came of all calls of all processes, once they have ended."""
        return [status for process in self.started for status in json.loads(process.communicate(timeout=90)[0] or "[]")]


@pytest.fixture(params=["SQLite", pytest.param("Redis", marks=pytest.mark.slow)])
def processes(gated: GatedSandbox, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Processes]:
    store: Path | str = tmp_path / "store"
    if request.param == "Redis":
        pytest.importorskip("redis", reason="its library is not installed")
        store = f"{request.getfixturevalue('server').url}/0"
    processes = Processes(gated, store)
    yield processes
    for process in processes.started:
        process.kill()
        process.communicate()


in_a_folder = pytest.mark.parametrize("processes", ["SQLite"], indirect=True)
in_redis = pytest.mark.parametrize("processes", ["Redis"], indirect=True)


@pytest.mark.parametrize("count", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_processes_that_start_at_once_make_one_token_request(
    processes: Processes, gated: GatedSandbox, count: int
) -> None:
    for _ in range(count):
        processes.start()
    gated.gate.set()
    assert processes.said() == [200] * count
    assert len(gated.token_requests) == 1


@in_a_folder
def test_processes_one_after_the_other_make_one_token_request(processes: Processes, gated: GatedSandbox) -> None:
    gated.gate.set()
    for _ in range(3):
        processes.start().wait(60)
    assert processes.said() == [200] * 3
    assert len(gated.token_requests) == 1


@pytest.mark.slow
def test_revocations_under_load(processes: Processes, gated: GatedSandbox) -> None:
    gated.gate.set()
    for _ in range(12):
        processes.start(calls=30, pause=0.2)
    for _ in range(2):
        time.sleep(2.5)  # of the seven or so that they go on
        gated.revoke_tokens()
    assert processes.said() == [200] * 360
    assert 2 <= len(gated.token_requests) <= 5


@pytest.mark.slow
def test_tokens_that_live_shortly_are_renewed_by_one_process_each_time(
    processes: Processes, gated: GatedSandbox
) -> None:
    gated.gate.set()
    gated.expires_in = 4
    for _ in range(10):
        processes.start(calls=30, pause=0.2)
    assert set(processes.said()) == {200}
    took = gated.token_requests[-1].time - gated.token_requests[0].time
    assert len(gated.token_requests) <= took / 2 + 2  # half of a life after the other


@pytest.mark.slow
def test_the_quota_holds_for_all_processes(processes: Processes, gated: GatedSandbox) -> None:
    """24 API clients in four processes, each with a token request to make, and a quota of 6 in 6 seconds."""
    gated.gate.set()
    gated.limit = 1000  # it tells of no minute: its record is looked at
    client_ids = [f"client-{number}" for number in range(24)]
    gated.clients.update(dict.fromkeys(client_ids, gated.client_secret))
    for start in range(0, 24, 6):
        processes.start(client_ids=client_ids[start : start + 6], quota=6)
    assert processes.said() == [200] * 24
    arrivals = sorted(request.time for request in gated.token_requests)
    assert len(arrivals) == 24
    assert all(later - sooner > 6 for sooner, later in zip(arrivals, arrivals[6:], strict=False))


@pytest.mark.slow
@in_redis
def test_restarts_of_the_server_fail_no_call(processes: Processes, gated: GatedSandbox, tmp_path: Path) -> None:
    gated.gate.set()
    gated.expires_in = 4
    port = closed_port()
    processes.store = f"redis://127.0.0.1:{port}/0"
    with running_server(tmp_path, port=port):
        for _ in range(8):
            processes.start(calls=40, pause=0.2)
        time.sleep(2)
    for _ in range(2):
        with running_server(tmp_path, port=port):
            time.sleep(1.5)
    with running_server(tmp_path, port=port):
        assert set(processes.said()) == {200}


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGSTOP", "SIGKILL"])
@in_redis
def test_a_server_that_is_away_fails_no_call(
    processes: Processes, gated: GatedSandbox, server: Server, signal_name: str
) -> None:
    gated.gate.set()
    os.kill(server.pid, getattr(signal, signal_name))
    for _ in range(2):
        processes.start(calls=2)
    assert processes.said() == [200] * 4
    assert len(gated.token_requests) == 2  # as without a store: one for each process


def test_a_revoked_token_is_renewed_by_one_process(processes: Processes, gated: GatedSandbox) -> None:
    gated.gate.set()
    processes.start().wait(60)
    gated.revoke_tokens()
    for _ in range(4):
        processes.start(calls=5)
    assert processes.said() == [200] * 21
    assert len(gated.token_requests) == 2


@in_a_folder
def test_a_wrong_secret_costs_one_token_request_and_leaves_the_right_one_alone(
    processes: Processes, gated: GatedSandbox
) -> None:
    gated.gate.set()
    processes.start().wait(60)
    for _ in range(4):
        processes.start(client_secret="wrong")
    assert processes.said() == [200] + ["invalid_client"] * 4
    assert len(gated.token_requests) == 2


@pytest.mark.slow
def test_retry_after_closes_the_endpoint_for_all_processes(processes: Processes, gated: GatedSandbox) -> None:
    gated.gate.set()
    gated.fail_token_requests(times=9, status=429, retry_after=600)
    for _ in range(2):
        processes.start(max_wait=1).wait(60)
    processes.start(max_wait=1)
    assert processes.said() == ["TokenWaitError"] * 3
    assert len(gated.token_requests) == 1


@pytest.mark.slow
@in_a_folder
@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
def test_a_process_that_is_killed_while_it_fetches_holds_up_nobody_for_long(
    processes: Processes, gated: GatedSandbox
) -> None:
    victim = processes.start(timeout=2)
    gated.arrived(1)
    for _ in range(3):
        processes.start(timeout=2)
    victim.send_signal(signal.SIGKILL)
    gated.gate.set()
    assert processes.said() == [200] * 3
    assert len(gated.token_requests) == 2


@in_a_folder
def test_a_store_that_cannot_be_used_fails_no_call(processes: Processes, gated: GatedSandbox, tmp_path: Path) -> None:
    gated.gate.set()
    processes.store = tmp_path / "a file in place of the folder"
    processes.store.touch()
    processes.start(calls=3)
    assert processes.said() == [200] * 3
    assert len(gated.token_requests) == 1  # as without a store: one for the process


@in_a_folder
def test_what_is_in_the_store_is_for_its_owner_and_sealed(processes: Processes, gated: GatedSandbox) -> None:
    gated.gate.set()
    processes.start()
    assert processes.said() == [200]
    folder = Path(processes.store)
    token = gated.requests[-1].headers["Authorization"].partition(" ")[2]
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert content
    for text in (token, gated.client_secret, gated.client_id, gated.environment.token_endpoint):
        assert text.encode() not in content
    if os.name == "posix":
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        assert folder.stat().st_mode & 0o777 == 0o700


def test_without_a_store_no_library_for_one_is_loaded(gated: GatedSandbox) -> None:
    gated.gate.set()
    script = (
        "import sys, requests\n"
        "from nexus_auth import Environment, NexusAuth\n"
        "client_id, client_secret, token_endpoint, base_url = sys.argv[1:]\n"
        "environment = Environment('sandbox', token_endpoint=token_endpoint, base_url=base_url)\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == 'open' else None)\n"
        "auth = NexusAuth(client_id, client_secret, environment)\n"
        "before = set(sys.modules)\n"
        "assert requests.get(base_url, auth=auth).status_code == 200\n"
        "written = [path for path, mode, flags in opened if isinstance(mode, str) and set(mode) & set('wax+')]\n"
        "assert not written, written\n"
        "assert not {'sqlite3', 'redis', 'nexus_auth.store', 'nexus_auth.shared'} & set(sys.modules)\n"
    )
    environment = gated.environment
    arguments = gated.client_id, gated.client_secret, environment.token_endpoint, environment.base_url
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Forks


def in_fork(work: Callable[[], bool]) -> bool:
    """Return what `work` returns in a forked child, which ends within ten seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if outcome(work) is True else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("has_store", [False, True])
def test_a_child_that_is_forked_while_others_fetch_works(gated: GatedSandbox, tmp_path: Path, has_store: bool) -> None:
    import requests

    from nexus_auth import NexusAuth

    options: dict[str, Any] = {"store": tmp_path / "store"} if has_store else {}
    auth = NexusAuth(gated.client_id, gated.client_secret, gated.environment, timeout=1, **options)
    threads = [
        threading.Thread(target=lambda: outcome(lambda: requests.get(url(gated), auth=auth)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    gated.arrived(1)
    timer = threading.Timer(0.2, gated.gate.set)
    timer.start()
    time.sleep(0.05)  # the others wait by then, or are about to
    assert in_fork(lambda: bool(requests.get(url(gated), auth=auth).status_code == 200))
    for thread in (*threads, timer):
        thread.join()


# Copies


def status_of_pickled(pickled: bytes, address: str, results: Any) -> None:
    """Make a call in a process that was spawned."""
    import requests

    results.put(requests.get(address, auth=pickle.loads(pickled)).status_code)


def test_an_auth_travels_to_a_process_that_is_spawned(sandbox: NexusSandbox) -> None:
    from nexus_auth import NexusAuth

    auth = NexusAuth(sandbox.client_id, sandbox.client_secret, sandbox.environment)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=status_of_pickled, args=(pickle.dumps(auth), url(sandbox), results))
    process.start()
    assert results.get(timeout=60) == 200
    process.join()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda auth: pickle.loads(pickle.dumps(auth))])
def test_a_copy_shares_the_token(driver: Driver, sandbox: NexusSandbox, copied: Callable[[Any], Any]) -> None:
    auth = driver.auth(sandbox)
    for one in (auth, copied(auth), auth):
        assert driver.get(driver.client(one), url(sandbox)).status == 200
    assert len(sandbox.token_requests) == 1


def test_a_password_of_a_store_does_not_travel(driver: Driver, sandbox: NexusSandbox) -> None:
    pytest.importorskip("redis", reason="its library is not installed")
    auth = driver.auth(sandbox, store="redis://:passw0rd@127.0.0.1:1/0")
    pickled = pickle.dumps(auth)
    assert b"passw0rd" not in pickled
    assert driver.get(driver.client(pickle.loads(pickled)), url(sandbox)).status == 200
