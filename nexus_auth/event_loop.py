"""What the asynchronous driver needs of an event loop, be it of asyncio or trio: anyio, imported with the first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .late_import import LateImport
from .quota import Place
from .threads import start_thread

T = TypeVar("T")
FIRST_LOOK, LOOK = 0.001, 0.02  # seconds until a task looks again whether a thread is done: from the one to the other

anyio: LateImport = LateImport("anyio")  # it takes a fifth of the time that httpx takes, and blocking callers need none
lowlevel: LateImport = LateImport("anyio.lowlevel")


def here() -> Place:
    """Return the event loop and the task in which this is called."""
    token = lowlevel().current_token()
    return Place(anyio().get_current_task().id, getattr(token, "native_token", token))


async def in_own_thread(function: Callable[[], T]) -> T:
    """Call a `function` that blocks in a thread of its own, without blocking the event loop."""
    future = start_thread(function)
    pause = FIRST_LOOK
    while not future.done():
        await anyio().sleep(pause)
        pause = min(2 * pause, LOOK)
    return future.result()
