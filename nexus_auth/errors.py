"""Errors between a call and its token, in the words of RFC 6749 section 5.2.

Each door raises subclasses that are errors of its HTTP library too (`requests.RequestException`,
`httpx.RequestError`), so an `except` clause that a script already has keeps working.
"""

from .environment import Environment


class NexusAuthError(Exception):
    """No token could be had. The base class of what nexus_auth raises while a call is made."""


class TokenRequestError(NexusAuthError):
    """The token endpoint refused, or answered with something that is no token.

    `error` and `error_description` are those of the error response (RFC 6749 section 5.2), `status_code` is its HTTP
    status; each is None where there was none. `environment` is the one whose token endpoint was asked.
    """

    error: str | None = None
    error_description: str | None = None
    status_code: int | None = None
    environment: Environment | None = None


class TokenWaitError(NexusAuthError):
    """A token would have taken longer than `max_wait`; `retry_after` is in how many seconds to try again."""

    retry_after: float = 0.0
