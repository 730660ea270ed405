"""Authentication for callers of the Quantoz Nexus API, with requests, httpx or httpx2.

    session.auth = NexusAuth(client_id, client_secret, "test")

From then on every request of that session to the Nexus API carries a valid access token. `NexusAuth` and
`nexus_session` here are those of `nexus_auth.requests`; `nexus_auth.httpx` and `nexus_auth.httpx2` have their own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .environment import PRODUCTION, TEST, Environment
from .errors import NexusAuthError, TokenRequestError, TokenWaitError

if TYPE_CHECKING:
    from .credentials import forget_tokens

    # A vendored copy need not have this door.
    from .requests import NexusAuth, nexus_session  # type: ignore[import-not-found,unused-ignore]

__all__ = ["PRODUCTION", "TEST", "Environment", "NexusAuth", "NexusAuthError", "TokenRequestError", "TokenWaitError",
           "__version__", "forget_tokens", "nexus_session"]  # fmt: skip


def __getattr__(name: str) -> Any:
    # PEP 562: to import nexus_auth loads no HTTP library, to use it loads the one that is used.
    homes = {"NexusAuth": ".requests", "nexus_session": ".requests", "forget_tokens": ".credentials"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(homes[name], __name__), name)


def __dir__() -> list[str]:
    return __all__  # help() and completion know of what is loaded late, too
