"""The door for httpx: `NexusAuth` signs a client, `nexus_client` and `nexus_async_client` make one for Nexus."""

from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, overload

try:
    import httpx
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(f"{__name__} needs httpx: pip install httpx") from _missing

from . import errors
from ._httpx_flow import ClientOptions, FactoryOptions, HTTPXAuth, make_client
from .environment import Environment
from .secret import hidden, hidden_secret

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .auth import StoreArgument


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
    `timeout` is for one token request as a whole; `max_wait` is the longest that one call is held up for want of a
    token. `store` is where processes and machines share the token and the quota: a folder, a URL of Redis, or a
    `nexus_auth.store.Store`. `client` is lent for token requests: its proxies, TLS settings and mounts apply, nothing
    else.

    `environment`, `client_id`, `scope` and `expires_in` of an auth can be read.

    Raises `TypeError` or `ValueError` for a wrong argument. Calls raise `TokenRequestError` or `TokenWaitError`, both
    `httpx.RequestError` as well, or the connection error that httpx raised for the token request.
    """

    _library: ClassVar[Any] = httpx
    _library_errors: ClassVar[ModuleType] = httpx
    _library_error: ClassVar[type[Exception]] = httpx.RequestError
    _connection_error: ClassVar[type[Exception]] = httpx.ConnectError
    _timeout_error: ClassVar[type[Exception]] = httpx.TimeoutException
    _token_request_error: ClassVar[type[errors.TokenRequestError]] = TokenRequestError
    _token_wait_error: ClassVar[type[errors.TokenWaitError]] = TokenWaitError


@overload
def nexus_client(
    client_id: str, client_secret: str, environment: Environment | str, **options: "Unpack[FactoryOptions]"
) -> httpx.Client: ...
@overload
def nexus_client(**options: "Unpack[FactoryOptions]") -> httpx.Client: ...
def nexus_client(
    client_id: str | None = None,
    client_secret: str | None = None,
    environment: Environment | str | None = None,
    *,
    scope: str = "api1",
    leeway: float = 60,
    max_wait: float = 75,
    store: "StoreArgument | None" = None,
    iso8601: bool = False,
    **client_options: "Unpack[ClientOptions]",
) -> httpx.Client:
    """Return a client for the Nexus API: `client.get("/customer")`. Its settings hold for token requests too.

    Without `client_id`, `client_secret` and `environment` it is that of the environment variables; see
    `NexusAuth.from_env`. `iso8601` asks the API for dates as `yyyy-MM-ddTHH:mm:ssZ`; `client_options` are those of
    `httpx.Client`. The other arguments and the errors are those of `NexusAuth`.
    """
    client_secret, store = hidden_secret(client_secret), hidden(store)
    options = {"scope": scope, "leeway": leeway, "max_wait": max_wait, "store": store}
    credentials = client_id, client_secret, environment
    return make_client(httpx.Client, NexusAuth, credentials, options, iso8601, client_options)


@overload
def nexus_async_client(
    client_id: str, client_secret: str, environment: Environment | str, **options: "Unpack[FactoryOptions]"
) -> httpx.AsyncClient: ...
@overload
def nexus_async_client(**options: "Unpack[FactoryOptions]") -> httpx.AsyncClient: ...
def nexus_async_client(
    client_id: str | None = None,
    client_secret: str | None = None,
    environment: Environment | str | None = None,
    *,
    scope: str = "api1",
    leeway: float = 60,
    max_wait: float = 75,
    store: "StoreArgument | None" = None,
    iso8601: bool = False,
    **client_options: "Unpack[ClientOptions]",
) -> httpx.AsyncClient:
    """Return what `nexus_client` returns, as an asynchronous client.

    The arguments and the errors are those of `nexus_client`.
    """
    client_secret, store = hidden_secret(client_secret), hidden(store)
    options = {"scope": scope, "leeway": leeway, "max_wait": max_wait, "store": store}
    credentials = client_id, client_secret, environment
    return make_client(httpx.AsyncClient, NexusAuth, credentials, options, iso8601, client_options)
