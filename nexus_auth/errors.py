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
    status, `retry_after` the seconds that its Retry-After asked for (RFC 9110 section 10.2.3), an hour at most; each is
    None where there was none. `environment` is the one whose token endpoint was asked.
    """

    def __init__(
        self,
        message: str,
        *,
        error: str | None = None,
        error_description: str | None = None,
        status_code: int | None = None,
        environment: Environment | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.error = error
        self.error_description = error_description
        self.status_code = status_code
        self.environment = environment
        self.retry_after = retry_after


class TokenWaitError(NexusAuthError):
    """A token would have taken longer than `max_wait`; `retry_after` is in how many seconds to try again."""

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
