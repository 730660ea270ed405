"""What users write, for the type checkers: it is never run."""

from __future__ import annotations

import ssl

import httpx
import httpx2
import requests

import nexus_auth.httpx
import nexus_auth.httpx2
from nexus_auth import TEST, Environment, NexusAuth, NexusAuthError, TokenRequestError, TokenWaitError, nexus_session


def with_requests() -> float | None:
    session = requests.Session()
    session.auth = NexusAuth("id", "secret", TEST, scope="api1 sanctionlist", leeway=30, timeout=5, max_wait=20)
    session.auth = NexusAuth.from_env(session=session)
    own = Environment("own", token_endpoint="https://identity.example/connect/token", base_url="https://api.example")
    ready: requests.Session = nexus_session("id", "secret", own, timeout=5, iso8601=True)
    try:
        response: requests.Response = ready.get("/customer", params={"page": 1}, timeout=10)
        response.raise_for_status()
    except TokenWaitError as error:
        return error.retry_after
    except TokenRequestError as error:
        print(error.error, error.error_description, error.status_code, error.environment)
    except (NexusAuthError, requests.RequestException) as error:
        print(error)
    return None


async def with_httpx() -> None:
    auth = nexus_auth.httpx.NexusAuth("id", "secret", "test", client=httpx.Client())
    name: str = auth.environment.name + auth.client_id
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


async def with_httpx2() -> None:
    with httpx2.Client(auth=nexus_auth.httpx2.NexusAuth("id", "secret", "test", client=httpx2.Client())) as client:
        client.get("https://testapi.quantoz.com/customer")
    async with nexus_auth.httpx2.nexus_async_client("id", "secret", "production", http2=True, proxy=None) as client:
        response: httpx2.Response = await client.get("/customer")
        response.raise_for_status()


def what_is_wrong() -> None:
    nexus_session("id", "secret", "test", verify=False)  # type: ignore[call-arg]  # pyright: ignore
    nexus_auth.httpx.nexus_client("id", "secret", "test", follow=True)  # type: ignore[call-arg]  # pyright: ignore
    nexus_auth.httpx.nexus_client("id", "secret", "test", http2="yes")  # type: ignore[arg-type]  # pyright: ignore
    nexus_auth.httpx.NexusAuth("id", "secret", "test", client=httpx2.Client())  # type: ignore[arg-type]  # pyright: ignore
    NexusAuth("id", "secret")  # type: ignore[call-arg]  # pyright: ignore
