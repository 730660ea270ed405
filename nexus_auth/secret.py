"""Texts that hide themselves: what error trackers, debuggers and logs show of them says nothing.

Trackers walk the local variables of every frame of a traceback and show their `repr`, or a slice of it. A secret is
kept in a `HiddenText` from the moment it comes in until it is on the wire, so there is no frame to find it in.
"""

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
