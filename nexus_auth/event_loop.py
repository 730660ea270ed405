"""The event loop as a place to wait in: what `BaseAuth._perform` does blocking, done with anyio (asyncio, trio)."""

import contextlib
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio.lowlevel import RunVar

from .credentials import Credentials
from .grant import Sleep, Steps, T, TokenRequest

_locks: "RunVar[weakref.WeakKeyDictionary[Credentials, anyio.Lock]]" = RunVar("_locks")


async def perform(
    credentials: Credentials, steps: Steps[T], send: Callable[[TokenRequest], Awaitable[Any]],
    library_error: type[Exception], request: Any,
) -> T:  # fmt: skip
    """Perform `steps` so that `request` can be signed, and return what they come to.

    All tasks of one event loop share one lock of the credentials, which dies with the loop.
    """
    locks = _locks.get(None) or weakref.WeakKeyDictionary()
    _locks.set(locks)
    lock = locks.setdefault(credentials, anyio.Lock())
    answer: Any = None
    with contextlib.closing(steps), contextlib.ExitStack() as held:
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            except library_error as error:
                error.request = request  # type: ignore[attr-defined]
                raise
            answer = None
            if isinstance(step, TokenRequest):
                try:
                    answer = await send(step)
                except Exception as failure:
                    answer = failure
            elif isinstance(step, Sleep):
                await anyio.sleep(step.seconds)
            elif step.seconds or not lock.locked():
                with anyio.move_on_after(step.seconds or None):
                    await lock.acquire()
                    answer = held.callback(lock.release)
