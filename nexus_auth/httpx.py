"""The door for httpx: `NexusAuth` signs a client, `nexus_client` and `nexus_async_client` make one for Nexus."""

try:
    import httpx
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(f"{__name__} needs httpx: pip install httpx") from _missing

from . import errors
from ._httpx_flow import ClientFactory, HTTPXAuth


class TokenRequestError(errors.TokenRequestError, httpx.RequestError):
    """`nexus_auth.TokenRequestError` as httpx knows it."""


class TokenWaitError(errors.TokenWaitError, httpx.RequestError):
    """`nexus_auth.TokenWaitError` as httpx knows it."""


class NexusAuth(HTTPXAuth[httpx.Client | httpx.AsyncClient], httpx.Auth):
    """Signs a client's requests to the Nexus API: `httpx.Client(auth=NexusAuth(client_id, client_secret, "test"))`.

    The token is fetched when first needed, shared by all auth objects with the same credentials, renewed before it
    expires and when the API refuses it (401), and sent to the environment's own origin only.

    `environment` is "test", "production" or an `Environment`; `scope` one string, scopes separated by spaces (RFC 6749
    section 3.3). In seconds: from `leeway` before expiry the token is renewed, never before half of its life is over;
    `timeout` is for one token request, connect and read each; `max_wait` is the longest that one call is held up for
    want of a token. `client` is lent for token requests: its proxies, TLS settings and mounts apply, nothing else.

    Raises `TypeError` or `ValueError` for a wrong argument. Calls raise `TokenRequestError` or `TokenWaitError`, both
    `httpx.RequestError` as well, or the connection error that httpx raised for the token request.
    """

    _library = httpx
    _errors = (httpx.RequestError, TokenRequestError, TokenWaitError)


nexus_client: ClientFactory[httpx.Client] = ClientFactory(httpx.Client, NexusAuth)
nexus_async_client: ClientFactory[httpx.AsyncClient] = ClientFactory(httpx.AsyncClient, NexusAuth)
