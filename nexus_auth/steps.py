"""Steps on the way to a token: what the core asks of a driver, and what the driver answers.

The core is a generator that yields steps and does no I/O. A driver performs one after the other, sends each answer
back and judges nothing; there is a blocking one (`auth`) and one for event loops (`_httpx_flow`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

from .secret import HiddenText
from .value import Value

T = TypeVar("T")


class Client(Value):
    """An API client and the scope it asks for: whom a token belongs to.

    Every field goes into the token request, and all of them together are the key under which a token is shared, in the
    process and in a store.
    """

    token_endpoint: str
    client_id: str
    client_secret: HiddenText
    scope: str


class Sleep(Value):
    """Wait so many seconds. Nothing is sent back."""

    seconds: float


class SendTokenRequest(Value):
    """Send one token request for `client`, once, and follow no redirect; `timeout` is for all of it, in seconds.

    `left` is what is left of the caller's `max_wait`. The request keeps its timeout all the same, unless it goes
    through something that may send it again and again.
    Sent back: the `Response`, or `Failed` for an error of the HTTP library. Any other exception is the caller's.
    """

    client: Client
    timeout: float
    left: float


class CallStore(Value):
    """Call `function`, which blocks on a store, in a thread of its own; it raises nothing, and never returns None.

    Sent back: what it returns, or None if that takes longer than `limit` seconds.
    """

    function: Callable[[], Any]
    limit: float


class Response(Value, hidden={"body"}):
    """An answer of the token endpoint; `body` is None if it is longer than `MAX_BODY`, as it came or unpacked."""

    status_code: int
    headers: Mapping[str, str]
    body: bytes | None


class Failed(Value, hidden={"text"}):
    """An error of the HTTP library in place of an answer: the name of its class, and what it says."""

    error_name: str
    text: str
    timed_out: bool = False


MAX_BODY = 2**20  # bytes
Step = Sleep | SendTokenRequest | CallStore
Steps = Generator[Step, Any, T]
