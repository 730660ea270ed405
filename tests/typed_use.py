"""What users write, for the type checkers: it is never run."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import httpx2
import redis
import requests

import nexus_auth.httpx
import nexus_auth.httpx2
from nexus_auth import TEST, Environment, NexusAuth, NexusAuthError, TokenRequestError, TokenWaitError, nexus_session
from nexus_auth.store import RedisStore, SQLiteStore, Store


def with_requests() -> float | None:
    session = requests.Session()
    session.auth = NexusAuth("id", "secret", TEST, scope="api1 sanctionlist", leeway=30, timeout=5, max_wait=20)
    session.auth = NexusAuth.from_env(session=session)
    session.auth = NexusAuth("id", "secret", "test", store=Path("~/.cache/nexus_auth").expanduser())
    token: str = session.auth.access_token()
    token = session.auth.access_token(refused=token)
    own = Environment("own", token_endpoint="https://identity.example/connect/token", base_url="https://api.example")
    ready: requests.Session = nexus_session("id", "secret", own, timeout=5, iso8601=True)
    ready = nexus_session(client_id="id", client_secret="secret", environment="test", store="redis://localhost/0")
    ready = nexus_session(max_wait=5)  # of the environment variables
    try:
        response: requests.Response = ready.get("/customer", params={"page": 1}, timeout=10)
        response.raise_for_status()
    except TokenWaitError as error:
        return error.retry_after
    except TokenRequestError as error:
        print(error.error, error.error_description, error.status_code, error.environment)
        return error.retry_after
    except (NexusAuthError, requests.RequestException) as error:
        print(error)
    return None


async def with_httpx() -> None:
    auth = nexus_auth.httpx.NexusAuth("id", "secret", "test", client=httpx.Client(), store="rediss://cache:6379/0")
    name: str = auth.environment.name + auth.client_id
    token: str = await auth.async_access_token()
    token = await auth.async_access_token(refused=token)
    token = auth.access_token(refused=token)
    with httpx.Client(auth=auth) as client:
        client.get(  # noqa: ASYNC212
            f"https://testapi.quantoz.com/{name}", auth=auth
        )
    with nexus_auth.httpx.nexus_client(
        "id", "secret", "test", verify=ssl.create_default_context(), timeout=5, headers={"api_version": "1.2"}
    ) as client:
        client.post("/customer", json={})
    async with nexus_auth.httpx.nexus_async_client(
        "id", "secret", "test", transport=httpx.AsyncHTTPTransport(retries=1), limits=httpx.Limits(max_connections=5)
    ) as async_client:
        response: httpx.Response = await async_client.get("/customer")
        response.raise_for_status()
    with nexus_auth.httpx.nexus_client(timeout=httpx.Timeout(5, read=2)) as client:
        client.get("/customer")
    async with nexus_auth.httpx.nexus_async_client(event_hooks={"request": [print]}) as async_client:
        await async_client.get("/customer")


async def with_httpx2() -> None:
    with httpx2.Client(auth=nexus_auth.httpx2.NexusAuth("id", "secret", "test", client=httpx2.Client())) as client:
        client.get("https://testapi.quantoz.com/customer")
    async with nexus_auth.httpx2.nexus_async_client("id", "secret", "production", http2=True, proxy=None) as client:
        response: httpx2.Response = await client.get("/customer")
        response.raise_for_status()


class OwnStore:
    """A store of a user's own: it inherits from nothing."""

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        return 0.0

    def release(self, name: str, owner: str, keep: float) -> None: ...

    def get(self, name: str) -> tuple[bytes, float] | None:
        return None

    def put(self, name: str, value: bytes, ttl: float) -> None: ...


def with_stores() -> None:
    stores: list[Store] = [OwnStore(), SQLiteStore("folder"), SQLiteStore(Path("folder")), RedisStore("redis://cache")]
    stores.append(RedisStore(redis.Redis(), prefix="nexus:"))
    for store in stores:
        NexusAuth("id", "secret", "test", store=store)
        nexus_auth.httpx2.nexus_client("id", "secret", "test", store=store)


def what_is_wrong() -> None:
    nexus_session("id", "secret")  # type: ignore[call-overload]  # pyright: ignore
    nexus_session("id", "secret", "test", store=1)  # type: ignore[call-overload]  # pyright: ignore
    nexus_session("id", "secret", "test", verify=False)  # type: ignore[call-overload]  # pyright: ignore
    nexus_auth.httpx.nexus_client("id", "secret", "test", follow=True)  # type: ignore[call-overload]  # pyright: ignore
    nexus_auth.httpx.nexus_client("id", "secret", "test", http2="yes")  # type: ignore[call-overload]  # pyright: ignore
    nexus_auth.httpx.NexusAuth("id", "secret", "test", client=httpx2.Client())  # type: ignore[arg-type]  # pyright: ignore
    NexusAuth("id", "secret", "test").access_token("refused")  # type: ignore[call-arg]  # pyright: ignore
    NexusAuth("id", "secret")  # type: ignore[call-arg]  # pyright: ignore
