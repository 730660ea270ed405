"""The client credentials grant (RFC 6749 section 4.4): the token request, and how an answer to it is judged."""

from __future__ import annotations

import contextlib
import email.utils
import json
import logging
import math
import random
import re
import zlib
from collections.abc import Mapping
from enum import Enum
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

from ._version import __version__
from .late_import import LateImport
from .secret import HiddenText
from .steps import MAX_BODY, Client, Failed, Response
from .value import Value

logger: logging.Logger = logging.getLogger(__package__)
authlib_client: LateImport = LateImport("authlib.oauth2.client")

TRIES = 4
BACKOFF = 0.5  # seconds at most before the second try, doubled before each further one
BUSY_PAUSE, MAX_BUSY_PAUSE = 1.0, 15.0  # seconds after a 429 that has no Retry-After, doubled from the one to the other
MAX_RETRY_AFTER = 3600.0  # seconds; a server that asks for more is asked again then
HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # an answer is short, and one that is packed can be a bomb
    "Content-Type": "application/x-www-form-urlencoded",
}
OTHERS_COUNT = "it takes 60 token requests per minute for this IP address; other processes count too"
WHITE_SPACE_AND_QUOTES = " \t\r\n\"'"  # which files with variables leave around a value
# RFC 6749 section 5.2: shown in errors even where a secret is a word of one.
ERROR_CODES = frozenset(
    ("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type",
     "invalid_scope")
)  # fmt: skip


class FaultKind(Enum):
    """What is wrong when a token request brings no token."""

    REFUSED = "refused"  # with an OAuth error: to ask again is no use
    ODD_ANSWER = "odd answer"  # an answer that is neither a token nor an OAuth error
    BUSY = "busy"  # 429
    UNAVAILABLE = "unavailable"  # 5xx
    UNREACHABLE = "unreachable"  # no answer at all


class Fault(Value):
    """Why there is no token, as data: an error is made of it where it is raised, by the door that raises it."""

    kind: FaultKind
    reason: str  # continues a sentence that begins with the token endpoint
    advice: str
    status_code: int | None = None
    error: str | None = None
    error_description: str | None = None
    retry_after: float | None = None  # seconds
    library_error: str | None = None  # name of a class of the HTTP library
    timed_out: bool = False


class Grant(Value, hidden={"access_token"}):
    """A successful response (RFC 6749 section 5.1): the access token, and its lifetime in seconds."""

    access_token: str
    lifetime: float


class Pause(Value):
    """Seconds without a token request: `least` of them, and up to `jitter` more, for callers not to come together."""

    least: float
    jitter: float

    @classmethod
    def asked_for(cls, retry_after: float) -> Pause:
        """Return the pause that Retry-After asks for."""
        return cls(retry_after, retry_after / 10 + 1)

    def within(self, left: float) -> float:
        """Return how long it is this time; jitter takes no more than what is `left` of `max_wait`."""
        return self.least + random.uniform(0, max(0.0, min(self.jitter, left - self.least)))


def pause_after(fault: Fault, tries: int, busy_answers: int) -> Pause | None:
    """Return the pause before the next try, None if there is none.

    `tries` were made without the ones that came to a 429: those use up none, since others behind the same IP address
    use the same quota. `busy_answers` are the ones of them that had no Retry-After.
    """
    if fault.kind is FaultKind.BUSY and fault.retry_after:
        return Pause.asked_for(fault.retry_after)
    if fault.kind is FaultKind.BUSY:
        seconds = min(BUSY_PAUSE * 2 ** (busy_answers - 1), MAX_BUSY_PAUSE)
        return Pause(seconds, seconds / 10)
    if fault.kind in (FaultKind.UNAVAILABLE, FaultKind.UNREACHABLE) and tries < TRIES:
        seconds = BACKOFF * 2 ** (tries - 1)
        if fault.retry_after and fault.retry_after > seconds / 2:
            return Pause.asked_for(fault.retry_after)
        return Pause(seconds / 2, seconds / 2)
    return None


def form(client: Client) -> HiddenText:
    """Return the body of the token request (RFC 6749 section 4.4.2), with the client secret in it."""
    fields = urlencode({"grant_type": "client_credentials", "scope": client.scope})
    method = _oauth2_client(client).client_auth("client_secret_post")
    return HiddenText(method.prepare("POST", client.token_endpoint, {}, fields)[2])


def user_agent(library: str) -> str:
    """Return the User-Agent of token requests (RFC 9110 section 10.1.5), `library` being that of the HTTP library."""
    return f"nexus-auth/{__version__} {library}"


def judge(answer: Response | Failed, client: Client, wall_clock: float) -> Grant | Fault:
    """Return the token in `answer`, or why there is none; `wall_clock` is the time in seconds since the epoch."""
    if isinstance(answer, Failed):
        reason = _shown(f"{answer.error_name}: {answer.text}", client)
        return Fault(
            FaultKind.UNREACHABLE,
            f"could not be reached ({reason})",
            "Check network, proxy and TLS settings; those of a session= or client= that you lend apply.",
            library_error=answer.error_name,
            timed_out=answer.timed_out,
        )
    document = _json_object(answer.body)
    members = document or {}
    kind, reason, advice = _complaint(answer, document, client)
    if kind is None:
        return Grant(_parsed_access_token(client, members), _lifetime(members.get("expires_in")))
    return Fault(
        kind,
        f"{reason} (HTTP {answer.status_code})",
        advice,
        answer.status_code,
        _shown_error(members.get("error"), client),
        _shown(members.get("error_description"), client),
        _retry_after(answer.headers, wall_clock),
    )


def _complaint(answer: Response, document: dict[str, Any] | None, client: Client) -> tuple[FaultKind | None, str, str]:
    """Return what is wrong with `answer`, in words, and what to do; no kind if nothing is."""
    members = document or {}
    status, access_token = answer.status_code, members.get("access_token")
    error = _shown_error(members.get("error"), client)
    description = _shown(members.get("error_description"), client)
    said = ", ".join(filter(None, (error, description)))
    try_later = "Check token_endpoint; if it is right, try again later."
    if status == 429:
        return FaultKind.BUSY, f"is busy: {OTHERS_COUNT}", "Try again later."
    if status >= 500:
        return FaultKind.UNAVAILABLE, f"is down{': ' if said else ''}{said}", try_later
    if error:
        advice = "Check client_id, client_secret and scope: are they of this environment?"
        if client.client_secret.strip(WHITE_SPACE_AND_QUOTES) != client.client_secret:
            advice += " The client_secret begins or ends with white space or a quote."
        return FaultKind.REFUSED, f"refused client {client.client_id!r}: {said}", advice
    if 300 <= status < 400 and (location := answer.headers.get("Location")):
        target = _shown(re.split("[?#]", location)[0], client)
        return FaultKind.ODD_ANSWER, f"redirected to {target}, which is not followed", try_later
    if not 200 <= status < 300:
        return FaultKind.ODD_ANSWER, "gave neither a token nor an OAuth error", try_later
    if answer.body is None:
        return FaultKind.ODD_ANSWER, f"gave an answer longer than {MAX_BODY} bytes", try_later
    if document is None:
        return FaultKind.ODD_ANSWER, "gave an answer that is no JSON object", try_later
    if not isinstance(access_token, str) or not re.fullmatch(r"[\x21-\x7e]+", access_token):  # RFC 6749 appendix A.12
        return FaultKind.ODD_ANSWER, "gave no usable access_token", try_later
    if str(members.get("token_type", "Bearer")).lower() != "bearer":
        return FaultKind.ODD_ANSWER, "gave a token of another type than Bearer", try_later
    return None, "", ""


def _json_object(body: bytes | None) -> dict[str, Any] | None:
    """Return the members of a JSON object; None if it is none."""
    with contextlib.suppress(ValueError, RecursionError):  # no JSON
        document: Any = json.loads(body or b"")
        if isinstance(document, dict):
            return {**document}
    return None


def _lifetime(expires_in: Any) -> float:
    """Return seconds: infinite for no sensible number, so that the token serves until the API refuses it."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if expires_in is not True and (seconds := float(expires_in)) >= 1:
            return seconds
    return math.inf


def _retry_after(headers: Mapping[str, str], wall_clock: float) -> float | None:
    """Return the seconds that Retry-After asks for (RFC 9110 section 10.2.3), None if it says nothing sensible."""
    value = headers.get("Retry-After", "")
    if value.isdecimal():
        return min(float(value), MAX_RETRY_AFTER)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date: Any = email.utils.parsedate_tz(value)  # in all three formats
        return min(max(0.0, email.utils.mktime_tz(date) - wall_clock), MAX_RETRY_AFTER)
    return None


def _shown_error(error: object, client: Client) -> str | None:
    return error if isinstance(error, str) and error in ERROR_CODES else _shown(error, client)


def _shown(text: object, client: Client) -> str | None:
    """Return what came from elsewhere as an error may show it: on one line, not long, and without the secret."""
    if not isinstance(text, str) or not text:
        return None
    # However it is spelt (percent, HTML, JSON, ...), its letters and digits stay as they are.
    if all(run in text for run in re.findall("[A-Za-z0-9]+", client.client_secret)):
        return "(withheld: the secret is in it)"
    return "".join(c if c.isprintable() else " " for c in text)[:400]


def unpacked(body: bytes, content_encoding: str) -> bytes | None:
    """Return `body` without its content coding (RFC 9110 section 8.4), None if it is longer than `MAX_BODY`.

    One that cannot be unpacked is returned as it is: it is no JSON then, and no token.
    """
    if content_encoding.strip().lower() in ("gzip", "x-gzip", "deflate"):
        with contextlib.suppress(zlib.error):
            body = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, MAX_BODY + 1)  # 32: either of them
    return body if len(body) <= MAX_BODY else None


def _oauth2_client(client: Client) -> Any:
    return authlib_client().OAuth2Client(None, client.client_id, client.client_secret)


def _parsed_access_token(client: Client, members: dict[str, Any]) -> str:
    # Authlib is shown only what was looked at: it takes odd answers for tokens, and odd lifetimes raise.
    checked = SimpleNamespace(status_code=200, json=lambda: {"access_token": members["access_token"]})
    return str(_oauth2_client(client).parse_response_token(checked)["access_token"])
