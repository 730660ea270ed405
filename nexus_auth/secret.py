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


def hidden(secret: Any) -> Any:
    """Return `secret` as a text or bytes that hide themselves; a value of another type as it is."""
    if isinstance(secret, str):
        return HiddenText(secret)
    return HiddenBytes(secret) if isinstance(secret, bytes) else secret


@contextlib.contextmanager
def leaving_no_locals() -> Generator[None, None, None]:
    """Clear the local variables of what an exception comes through: a library copies what is hidden as it sends it."""
    before = sys.exc_info()[1]  # of the caller, whose local variables are its own
    try:
        yield
    except BaseException as error:
        one: BaseException | None = error
        while one is not None and one is not before:
            traceback.clear_frames(one.__traceback__)
            one = one.__context__
        raise
