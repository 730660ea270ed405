"""The door for httpx2: `NexusAuth` signs a client, `nexus_client` and `nexus_async_client` make one for Nexus."""

try:
    import httpx2
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(f"{__name__} needs httpx2: pip install httpx2") from _missing

from . import errors
from ._httpx_flow import ClientFactory, HTTPXAuth


class TokenRequestError(errors.TokenRequestError, httpx2.RequestError):
    """`nexus_auth.TokenRequestError` as httpx2 knows it."""


class TokenWaitError(errors.TokenWaitError, httpx2.RequestError):
    """`nexus_auth.TokenWaitError` as httpx2 knows it."""


class NexusAuth(HTTPXAuth[httpx2.Client | httpx2.AsyncClient], httpx2.Auth):
    """Signs a client's requests to the Nexus API: `httpx2.Client(auth=NexusAuth(client_id, client_secret, "test"))`.

    The token is fetched when first needed, shared by all auth objects with the same credentials, renewed before it
    expires and when the API refuses it (401), and sent to the environment's own origin only.

    `environment` is "test", "production" or an `Environment`; `scope` one string, scopes separated by spaces (RFC 6749
    section 3.3). In seconds: from `leeway` before expiry the token is renewed, never before half of its life is over;
    `timeout` is for one token request, connect and read each; `max_wait` is the longest that one call is held up for
    want of a token. `client` is lent for token requests: its proxies, TLS settings and mounts apply, nothing else.

    Raises `TypeError` or `ValueError` for a wrong argument. Calls raise `TokenRequestError` or `TokenWaitError`, both
    `httpx2.RequestError` as well, or the connection error that httpx2 raised for the token request.
    """

    _library = httpx2
    _errors = (httpx2.RequestError, TokenRequestError, TokenWaitError)


nexus_client: ClientFactory[httpx2.Client] = ClientFactory(httpx2.Client, NexusAuth)
nexus_async_client: ClientFactory[httpx2.AsyncClient] = ClientFactory(httpx2.AsyncClient, NexusAuth)
