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


_HOMES = {"NexusAuth": ".requests", "nexus_session": ".requests", "forget_tokens": ".credentials"}


def __getattr__(name: str) -> Any:
    # PEP 562: to import nexus_auth loads no HTTP library, to use it loads the one that is used.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name != __name__ + _HOMES[name]:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: this copy has no door for requests")


def __dir__() -> list[str]:
    from .late_import import has_module

    # help() and completion know of what is loaded late, too, unless it is not in this copy.
    return [name for name in __all__ if name not in _HOMES or has_module(__name__ + _HOMES[name])]
