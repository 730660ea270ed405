"""Benchmark of a signed call: nexus_auth beside what its users would pick instead, and beside a bare header.

`tox -e benchmark`, or `python tests/benchmark.py [--markdown FILE] [--json FILE] [--only WORD]`; about four minutes.

Contestants take turns in short rounds. A ratio is to what is done *by hand* in the same round. Shown are medians, and
in brackets the first and third quartile. Every connection is to loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import inspect
import io
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import requests
from requests.adapters import BaseAdapter

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)  # what is measured is the working tree, even where another nexus_auth is installed

from nexus_auth import __version__  # noqa: E402
from nexus_auth.testing import NexusSandbox  # noqa: E402

CONTESTANTS = ("nexus_auth", "Authlib", "requests_auth", "httpx_auth", "requests_oauth2client", "by hand")
NEXUS, AUTHLIB, REQUESTS_AUTH, HTTPX_AUTH, REQUESTS_OAUTH2CLIENT, BY_HAND = CONTESTANTS
# What a script imports to sign calls. Where httpx2 is installed, Authlib's httpx_client is for that and not for httpx.
MODULES = {
    "requests": {NEXUS: "nexus_auth.requests", AUTHLIB: "authlib.integrations.requests_client",
                 REQUESTS_AUTH: "requests_auth", REQUESTS_OAUTH2CLIENT: "requests_oauth2client", BY_HAND: "requests"},
    "httpx": {NEXUS: "nexus_auth.httpx", HTTPX_AUTH: "httpx_auth", BY_HAND: "httpx"},
    "httpx2": {NEXUS: "nexus_auth.httpx2", AUTHLIB: "authlib.integrations.httpx_client", BY_HAND: "httpx2"},
}  # fmt: skip
DRIVERS = {"requests": ("requests", "Session"), "httpx": ("httpx", "Client"), "httpx async": ("httpx", "AsyncClient"),
           "httpx2": ("httpx2", "Client"), "httpx2 async": ("httpx2", "AsyncClient")}  # fmt: skip
SYNC, ASYNC = ("requests", "httpx", "httpx2"), ("httpx async", "httpx2 async")
# What would lead a call elsewhere than to loopback, give one library another trust store, or keep children slow.
UNWANTED = re.compile("(all|https?)_proxy|(requests|curl)_ca_bundle|ssl_cert_(file|dir)|pythondontwritebytecode", re.I)
INSTANT = b'{"access_token": "fixed", "token_type": "Bearer", "expires_in": 3600}'
LOOP = asyncio.new_event_loop()

Api = tuple[str, str, str, str]  # token endpoint, URL to call, client_id, client_secret
Row = tuple[str, dict[str, dict[str, Any]]]  # a measure, and of each contestant its "text" and figures


# The contestants. Child processes run these functions too, from their source, so they import what they need.


def make_auth(who: str, library: str, api: Api, lent: Any) -> Any:
    """Auth object; its token requests go through what is lent, or by its own default."""
    endpoint, url, client_id, client_secret = api
    lending = {"session" if library == "requests" else "client": lent}
    if who == "nexus_auth":
        environment = import_module(who).Environment("sandbox", token_endpoint=endpoint, base_url=url)
        if store := os.environ.get("TOKEN_FOLDER"):
            lending["store"] = store
        return import_module(f"{who}.{library}").NexusAuth(client_id, client_secret, environment, **lending)
    if who == "requests_oauth2client":
        peer: Any = import_module(who)
        by_form = peer.ClientSecretPost(client_id, client_secret)
        client = peer.OAuth2Client(endpoint, auth=by_form, testing=True, **lending)  # testing: plain http will do
        return peer.OAuth2ClientCredentialsAuth(client, scope="api1")
    if who in ("requests_auth", "httpx_auth"):
        auth = import_module(who).OAuth2ClientCredentials(endpoint, client_id, client_secret, scope="api1", **lending)
        # It knows Basic only, and the token endpoint wants the form only: the one is taken off, the other completed.
        auth.data.update(client_id=client_id, client_secret=client_secret)
        if who == "requests_auth":
            auth.session.auth = None
        else:
            auth._configure_client = lambda client: None
        return auth

    def call(self: Any, request: Any) -> Any:
        request.headers["Authorization"] = "Bearer fixed"
        return request

    def auth_flow(self: Any, request: Any) -> Iterator[Any]:
        request.headers["Authorization"] = "Bearer fixed"
        yield request

    if library == "requests":
        return type("BareHeader", (import_module("requests.auth").AuthBase,), {"__call__": call})()
    return type("BareHeader", (import_module(library).Auth,), {"auth_flow": auth_flow})()


def make_client(who: str, library: str, kind: str, api: Api, **options: Any) -> Any:
    """Session or client that signs its calls."""
    endpoint, _, client_id, client_secret = api
    if who == "Authlib":
        module = "requests_client" if library == "requests" else "httpx_client"
        name = {"Session": "OAuth2Session", "Client": "OAuth2Client", "AsyncClient": "AsyncOAuth2Client"}[kind]
        peer = getattr(import_module(f"authlib.integrations.{module}"), name)
        options |= {"token_endpoint_auth_method": "client_secret_post", "grant_type": "client_credentials"}
        return peer(client_id, client_secret, scope="api1", token_endpoint=endpoint, **options)
    client = getattr(import_module(library), kind)(**options)
    client.auth = make_auth(who, library, api, client if who == "nexus_auth" else None)
    return client


async def call(client: Any, url: str) -> Any:
    """Answer to a call with any client."""
    if getattr(client, "token", "") is None:  # Authlib's fetches its first token only when told to
        token = client.fetch_token()
        if hasattr(token, "__await__"):
            await token
    answer = client.get(url)
    return await answer if hasattr(answer, "__await__") else answer


def run(coroutine: Any, loop: Any) -> Any:
    """Result of a coroutine; without a loop, of one that never waits."""
    if loop:
        return loop.run_until_complete(coroutine)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("the coroutine waits")


def cold_start(who: str, library: str, kind: str, module: str, api: Api, spawned: float) -> list[float]:
    """Seconds of the import, from process start to the first answer, and of Authlib's import if that is set apart."""

    async def first_answer() -> float:
        if who == "by hand":
            client = getattr(import_module(library), kind)()
            form = {"client_id": api[2], "client_secret": api[3], "scope": "api1", "grant_type": "client_credentials"}
            answer = client.post(api[0], data=form)
            token = (await answer if kind == "AsyncClient" else answer).json()["access_token"]
            client.headers["Authorization"] = f"Bearer {token}"
        else:
            client = make_client(who, library, kind, api)
        (await call(client, api[1])).raise_for_status()
        return time.monotonic()

    begun = time.monotonic()
    import_module(module)
    imported = time.monotonic()
    if who == "nexus_auth":  # which does this itself when it asks for a token, a moment later
        import_module("authlib.oauth2.client")
    authlib = time.monotonic() - imported
    loop = import_module("asyncio").new_event_loop() if kind == "AsyncClient" else None
    return [imported - begun, run(first_answer(), loop) - spawned, authlib]


def with_file(who: str, library: str, kind: str, module: str, api: Api, spawned: float) -> list[float]:
    """Seconds from process start to the first answer of a script that keeps its token in a file, if it can."""
    folder = os.environ["TOKEN_FOLDER"]
    peer: Any = import_module(module)
    if who in ("requests_auth", "httpx_auth"):
        peer.OAuth2.token_cache = peer.JsonTokenFileCache(os.path.join(folder, f"{who}.json"))
    loop = import_module("asyncio").new_event_loop() if kind == "AsyncClient" else None
    if who == "by hand":
        client = getattr(import_module(library), kind)()
        form = {"client_id": api[2], "client_secret": api[3], "scope": "api1", "grant_type": "client_credentials"}
        token = client.post(api[0], data=form).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
    else:
        client = make_client(who, library, kind, api)
    run(call(client, api[1]), loop).raise_for_status()
    return [time.monotonic() - spawned]


def memory(who: str, library: str, kind: str, module: str, api: Api, _: float) -> list[float]:
    """Bytes of one more client that has made a call, with credentials of its own if it has any; mean of 50."""
    options = {} if library == "requests" else {"verify": False}  # no trust store
    clients, traced = [], []
    import_module(module)
    tracemalloc.start()
    for n in range(55):
        if n == 5:
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])
        clients.append(make_client(who, library, kind, (api[0], api[1], f"client-{n}", api[3]), **options))
        if who == "by hand":
            clients[-1].auth = clients[0].auth  # the one that does not count
        run(call(clients[-1], api[1]), None)
    gc.collect()
    return [(tracemalloc.get_traced_memory()[0] - traced[0]) / 50]


def in_child(work: Callable[..., list[float]], nexus: NexusSandbox, who: str, driver: str) -> list[float]:
    """What a function returns in a process of its own."""
    library, kind = DRIVERS[driver]
    sources: list[str] = [inspect.getsource(function) for function in (make_auth, make_client, call, run, work)]
    imports = f"import os, sys, time{', gc, tracemalloc' if work is memory else ''}"
    arguments = '*sys.argv[1:], os.environ["API"].split(), float(os.environ["SPAWNED"])'
    script = ["from __future__ import annotations", imports, "from importlib import import_module", *sources]
    script.append(f"print(*{work.__name__}({arguments}))")
    command = [sys.executable, "-c", "\n".join(script), who, library, kind, MODULES[library][who]]
    environment = {**os.environ, "API": " ".join(api_of(nexus)), "SPAWNED": str(time.monotonic())}
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    return [float(figure) for figure in done.stdout.split()]


def api_of(nexus: NexusSandbox) -> Api:
    """What a caller of this sandbox is told."""
    url = f"{nexus.environment.base_url}/customer"
    return nexus.environment.token_endpoint, url, nexus.client_id, nexus.client_secret


def forget_peers() -> None:
    """Empty the caches that two of the peers keep for the whole process."""
    for peer in (REQUESTS_AUTH, HTTPX_AUTH):
        import_module(peer).OAuth2.token_cache.clear()


# Rounds, and what is made of them.


def race(turns: dict[str, partial[Any]], seconds: float) -> dict[str, list[Any]]:
    """What each turn returned in as many rounds as there is time for, each round in an order of its own."""
    results: dict[str, list[Any]] = {who: [] for who in turns}
    order = list(turns)
    for turn in turns.values():
        turn()  # this round does not count
    gc.collect()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(results[order[0]]) < 3:
        random.shuffle(order)  # if one always came after the same other, it would have that one's caches and garbage
        for who in order:
            results[who].append(turns[who]())
    return results


def ratio(values: list[float], floor: list[float], unit: float = 1) -> dict[str, Any]:
    """The ratio of values to a floor, round by round; where some sat out the last rounds, up to there."""
    low, middle, high = statistics.quantiles([a / b / unit for a, b in zip(values, floor, strict=False)], n=4)
    return {"text": f"{middle:.2f} [{low:.2f}-{high:.2f}]", "ratio": middle, "ratio_quartiles": [low, high]}


def compare(measure: str, seconds: dict[str, list[float]]) -> Row:
    """The row of times."""
    cells: dict[str, dict[str, Any]] = {}
    for who, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        scale, unit = (1e6, "µs") if middle < 1e-3 else (1e3, "ms")
        cells[who] = {"text": f"{middle * scale:.0f} {unit} [{low * scale:.0f}-{high * scale:.0f}]"}
        if who != BY_HAND:
            cells[who] = ratio(values, seconds[BY_HAND])
            cells[who]["text"] += f" {middle * scale:.0f} {unit}"
        cells[who] |= {"seconds": middle, "seconds_quartiles": [low, high], "rounds": len(values)}
    return measure, cells


# Calls with the token in hand, through a transport that answers at once.


class InstantAdapter(BaseAdapter):
    """A server that takes no time, for requests; its answer serves as a token too."""

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        response = requests.Response()
        response.status_code, response.request, response.url = 200, request, str(request.url)
        response.raw = io.BytesIO(INSTANT)
        return response

    def close(self) -> None:
        pass


def instant_client(who: str, driver: str, api: Api, yielding: bool = False) -> Any:
    """A client whose server takes no time; one that is yielding lets other tasks go on meanwhile."""
    library, kind = DRIVERS[driver]
    if library == "requests":
        client = make_client(who, library, kind, api)
        client.mount("http://", InstantAdapter())
        return client
    httpx = import_module(library)

    def answer(_: Any) -> Any:
        return httpx.Response(200, content=INSTANT)

    async def answer_async(_: Any) -> Any:
        if yielding:
            await asyncio.sleep(0)
        return httpx.Response(200, content=INSTANT)

    transport = httpx.MockTransport(answer_async if kind == "AsyncClient" else answer)
    return make_client(who, library, kind, api, transport=transport)


def warm_turns(work: Callable[..., Any], driver: str, yielding: bool = False) -> tuple[str, dict[str, partial[Any]]]:
    """A URL, and the work of each contestant with its token in hand; the sandbox is gone by then."""
    forget_peers()
    with NexusSandbox() as nexus:
        api = api_of(nexus)
        clients = {who: instant_client(who, driver, api, yielding) for who in MODULES[DRIVERS[driver][0]]}
        for client in clients.values():
            run(call(client, api[1]), LOOP if driver in ASYNC else None).raise_for_status()
    return api[1], {who: partial(work, driver in ASYNC, client, api[1]) for who, client in clients.items()}


def one_caller(waits: bool, client: Any, url: str, times: int = 8) -> float:
    """Seconds of a call, one after the other."""

    async def turn() -> float:
        start = time.perf_counter()
        for _ in range(times):
            answer = client.get(url)
            if waits:
                await answer
        return (time.perf_counter() - start) / times

    seconds: float = run(turn(), LOOP if waits else None)
    return seconds


def many_callers(waits: bool, client: Any, url: str, threads: int = 50, tasks: int = 200) -> float:
    """Seconds of a call, when that many are under way."""

    async def turn() -> float:
        start = time.perf_counter()
        await asyncio.gather(*(client.get(url) for _ in range(tasks)))
        return (time.perf_counter() - start) / tasks

    if waits:
        return LOOP.run_until_complete(turn())
    started: list[float] = []
    at_once(threads, lambda: client.get(url), lambda: started.append(time.perf_counter()))
    return (time.perf_counter() - started[0]) / threads


def at_once(threads: int, work: Callable[[], Any], when_ready: Callable[[], Any] | None = None) -> list[Any]:
    """What some work returns in each of as many threads, which all start together."""
    barrier = threading.Barrier(threads, when_ready)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda _: (barrier.wait(), work())[1], range(threads)))


def hot_path() -> Iterator[Row]:
    """Calls of one caller, of 50 threads and of 200 tasks."""
    for driver in DRIVERS:
        yield compare(f"one call: {driver}", race(warm_turns(one_caller, driver)[1], 4))
    for driver in (*SYNC, *ASYNC):
        crowd = "200 tasks" if driver in ASYNC else "50 threads"
        yield compare(f"one call of {crowd}: {driver}", race(warm_turns(many_callers, driver, yielding=True)[1], 4))


def known_sets(sets: int = 10_000) -> Iterator[Row]:
    """Calls while very many sets of credentials have a token: their ratio to those by hand, beside what it was before.

    Each set has a token endpoint of its own, since nexus_auth asks none for more than 60 tokens a minute. Of the peers,
    requests_auth and httpx_auth look their tokens up in a dict, and the others in the object that signs.
    """
    for driver in ("requests", "httpx"):
        url, turns = warm_turns(one_caller, driver)
        pair = {who: turns[who] for who in (NEXUS, BY_HAND)}
        before = race(pair, 2)
        lent, known = instant_client(BY_HAND, driver, ("", "", "", "")), []
        for n in range(1, sets):
            known.append(make_auth(NEXUS, driver, (f"{url}/{n}", url, f"client-{n}", "secret"), lent))
            lent.get(url, auth=known[-1])
        after = race(pair, 2)
        cell = ratio(after[NEXUS], after[BY_HAND], ratio(before[NEXUS], before[BY_HAND])["ratio"])
        yield f"one call with {sets} sets known, to that with 1: {driver}", {NEXUS: cell}


# Processes of their own, and token requests.


def cold_starts() -> Iterator[Row]:
    """Import alone, and process start to first answer, beside a script that does the two calls by hand.

    For the last row of each driver, the import of Authlib is timed in nexus_auth's process and subtracted.
    """
    with NexusSandbox(limit=10_000) as nexus:
        for driver, (library, _) in DRIVERS.items():
            turns = {who: partial(in_child, cold_start, nexus, who, driver) for who in MODULES[library]}
            results = race(turns, 6)
            for who, more in race({who: turns[who] for who in (NEXUS, BY_HAND)}, 8).items():  # the others sit out
                results[who] += more
            imports, totals, authlib = ({who: [t[i] for t in ts] for who, ts in results.items()} for i in range(3))
            if driver in SYNC:
                yield compare(f"import: {driver}", imports)
            yield compare(f"cold start: {driver}", totals)
            rest = [a - b for a, b in zip(totals[NEXUS], authlib[NEXUS], strict=True)]
            yield compare(f"cold start less import of Authlib: {driver}", {NEXUS: rest, BY_HAND: totals[BY_HAND]})


def shared() -> Iterator[Row]:
    """Processes that keep their token in a file: token requests of many, and the time of a short script.

    The files of the peers are those that they have for it; Authlib and requests_oauth2client have none.
    """
    for scenario, at_a_time, times in (("40 processes at once", 40, 40), ("15 runs in a row", 1, 15)):
        cells: dict[str, dict[str, Any]] = {}
        for driver, who in (("requests", NEXUS), ("requests", REQUESTS_AUTH), ("httpx", HTTPX_AUTH)):
            with NexusSandbox(limit=10_000) as nexus, token_folder(), ThreadPoolExecutor(at_a_time) as pool:
                list(pool.map(lambda _: in_child(with_file, nexus, who, driver), range(times)))  # noqa: B023
                cells[who] = {"text": str(len(nexus.token_requests)), "asked": len(nexus.token_requests)}
        yield f"token requests: {scenario}", cells
    with NexusSandbox() as nexus, token_folder():
        token = {"access_token": "fixed", "token_type": "Bearer", "expires_in": 3600}
        nexus.fail_token_requests(None, status=200, json=token, delay=0.08)
        nexus.answer("/customer", times=None, json={})
        turns = {who: partial(in_child, with_file, nexus, who, "requests") for who in (NEXUS, REQUESTS_AUTH, BY_HAND)}
        seconds = {who: [value for (value,) in values] for who, values in race(turns, 20).items()}
        yield compare("a short script with a warm token file, identity server of 80 ms: requests", seconds)


@contextlib.contextmanager
def token_folder() -> Generator[None, None, None]:
    """Give child processes a new folder to keep tokens in."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        os.environ["TOKEN_FOLDER"] = folder
        yield
        del os.environ["TOKEN_FOLDER"]


def memories() -> Iterator[Row]:
    """Memory of a client with its credentials, less that of a client with a bare header."""
    for driver in SYNC:
        with NexusSandbox(limit=10_000) as nexus:
            nexus.clients.update({f"client-{n}": nexus.client_secret for n in range(100)})
            sizes = {who: in_child(memory, nexus, who, driver)[0] for who in MODULES[driver]}
        floor = sizes.pop(BY_HAND)
        more = {who: {"text": f"{size - floor:.0f} B", "bytes": size - floor} for who, size in sizes.items()}
        yield f"memory per further set of credentials: {driver}", more


def token_requests() -> Iterator[Row]:
    """Token requests that the sandbox counts, the fewest to the most where callers race, and how many calls fail."""
    for scenario in (
        "100 calls", "100 callers at once, cold", "100 callers at once, after a revocation",
        "100 calls, each auth built anew", "50 calls, tokens live 20 s",
    ):  # fmt: skip
        cells: dict[str, dict[str, Any]] = {}
        for driver, (library, _) in DRIVERS.items():
            for who in (who for who in MODULES[library] if who != BY_HAND):
                runs = [count(who, driver, scenario) for _ in range(2 if "at once" in scenario else 1)]
                asked, failed = zip(*runs, strict=True)
                text = "-".join(str(number) for number in sorted({min(asked), max(asked)}))
                text += f" ({max(failed)} failed)" if any(failed) else ""
                cells.setdefault(who, {})[driver] = {"text": text, "asked": asked, "failed": failed}
        for cell in cells.values():
            by_text = {part["text"]: driver for driver, part in cell.items()}
            texts = [f"{driver}: {part['text']}" for driver, part in cell.items()]
            cell["text"] = next(iter(by_text)) if len(by_text) == 1 else ", ".join(texts)
        yield f"token requests: {scenario}", cells


def count(who: str, driver: str, scenario: str) -> tuple[int, int]:
    """Numbers of token requests and of failed calls."""
    forget_peers()
    (library, kind), loop = DRIVERS[driver], LOOP if driver in ASYNC else None
    options = {} if library == "requests" else {"verify": False}  # no trust store
    with NexusSandbox(limit=10_000, expires_in=20 if "20 s" in scenario else 3600) as nexus:
        api = api_of(nexus)

        async def fails(client: Any) -> bool:
            try:
                return bool((await call(client, api[1])).status_code != 200)
            except Exception:
                return True

        async def all_fail() -> list[bool]:
            return await asyncio.gather(*(fails(client) for _ in range(100)))

        client = make_client(who, library, kind, api, **options)
        if "revocation" in scenario:
            run(fails(client), loop)
            nexus.revoke_tokens()
            nexus.token_requests.clear()
        if "at once" in scenario:
            failed = run(all_fail(), loop) if loop else at_once(100, lambda: run(fails(client), None))
        else:
            failed = []
            for _ in range(50 if "50" in scenario else 100):
                if "anew" in scenario:
                    client = make_client(who, library, kind, api, **options)
                failed.append(run(fails(client), loop))
        return len(nexus.token_requests), sum(failed)


def main() -> None:
    """Every measure, one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table there too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there")
    parser.add_argument("--only", metavar="WORD", default="", help="run only the parts with that word in their name")
    options = parser.parse_args()
    started, rows = time.monotonic(), list[Row]()
    # Bytecode of children is kept here, so that it does not matter whose is installed already.
    with tempfile.TemporaryDirectory() as cache:
        for variable in filter(UNWANTED.fullmatch, list(os.environ)):
            del os.environ[variable]
        os.environ.update(PYTHONPYCACHEPREFIX=cache, PYTHONPATH=ROOT, PYTHONSAFEPATH="1")
        for part in (hot_path, cold_starts, token_requests, shared, memories, known_sets):
            for row in part() if options.only in part.__name__ else ():
                rows.append(row)
                print(f"{time.monotonic() - started:4.0f} s  {row[0]}", file=sys.stderr, flush=True)
    versions = {"Python": platform.python_version(), NEXUS: __version__}
    versions |= {name: metadata.version(name) for name in ("requests", "httpx", "httpx2", *CONTESTANTS[1:5])}
    about = f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()} with {os.cpu_count()} processors, "
    about += ", ".join(map(" ".join, versions.items()))
    lines = [[f"{about[:10]}", *CONTESTANTS]]
    lines += [[measure, *(cells.get(who, {"text": "-"})["text"] for who in CONTESTANTS)] for measure, cells in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    table = "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines) + f"\n\n{about}\n"
    print(table)
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")
    if options.json:
        figures = {"about": about, "versions": versions, "measures": dict(rows)}
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
