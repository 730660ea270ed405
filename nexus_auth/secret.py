"""Texts that hide themselves: what error trackers, debuggers and logs show of them says nothing.

Trackers walk the local variables of every frame of a traceback and show their `repr`, or a slice of it. A secret is
kept in a `HiddenText` from the moment it comes in until it is on the wire, so there is no frame to find it in.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Generator
from typing import Any

SHOWN = "(hidden)"


class HiddenText(str):
    """A `str` in all but its looks: `repr` and slices show "(hidden)", and `encode` gives `HiddenBytes`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"'{SHOWN}'"

    def __getitem__(self, key: Any) -> str:
        return SHOWN

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """Return the bytes that go over the wire."""
        return HiddenBytes(str.encode(self, encoding, errors))


class HiddenBytes(bytes):
    """The `bytes` of a `HiddenText`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"b'{SHOWN}'"

    def __getitem__(self, key: Any) -> Any:
        return SHOWN.encode()


class NotText:
    """What stands for a secret of a wrong type, of which nothing but the name of that is kept."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name


def hidden(secret: Any) -> Any:
    """Return `secret` as a text or bytes that hide themselves; a value of another type as it is."""
    if isinstance(secret, str):
        return HiddenText(secret)
    return HiddenBytes(secret) if isinstance(secret, bytes) else secret


def hidden_secret(secret: Any) -> Any:
    """Return what was given as a secret, hidden whatever it is; `None`, which stands for none, as it is."""
    if isinstance(secret, (str, bytes, NotText, type(None))):
        return hidden(secret)
    return NotText(type(secret).__name__)


@contextlib.contextmanager
def leaving_no_locals() -> Generator[None, None, None]:
    """Clear the local variables of what an exception comes through: a library copies what is hidden as it sends it."""
    before = sys.exc_info()[1]  # of the caller, whose local variables are its own
    try:
        yield
    except BaseException as error:
        seen, found = {id(before)}, [error]
        while found:
            one = found.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            found += [other for other in (one.__context__, one.__cause__, *_grouped(one)) if other is not None]
        raise


def _grouped(error: BaseException) -> list[BaseException]:
    """Return the exceptions of an `ExceptionGroup`, which Python 3.10 has from a package."""
    exceptions: tuple[object, ...] | None = getattr(error, "exceptions", None)
    return [one for one in exceptions if isinstance(one, BaseException)] if isinstance(exceptions, tuple) else []
