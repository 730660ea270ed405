"""Threads of our own, for what blocks: those of the application may all be waiting for what is done here."""

from __future__ import annotations

import contextlib
import contextvars
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
AFTER_DEADLINE = 0.01  # seconds until a deadline has passed for certain: a timer may be a little early


def start_thread(function: Callable[[], T]) -> Future[T]:
    """Call `function` in a thread of its own, and return the future of what it returns."""
    from concurrent.futures import Future  # loaded only where a thread is needed

    future: Future[T] = Future()
    context = contextvars.copy_context()

    def call() -> None:
        try:
            future.set_result(context.run(function))
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=call, name=__package__, daemon=True).start()
    except RuntimeError:  # at the end of the interpreter no thread can be started
        call()
    return future


def result_of(future: Future[T], limit: float) -> T | None:
    """Return the result of `future`, blocking; None if it is not there in `limit` seconds."""
    from concurrent.futures import wait

    wait([future], limit)
    return future.result() if future.done() else None


class HasFileno(Protocol):
    """A socket, or what reads from one."""

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        ...


@contextlib.contextmanager
def cut_off_at(deadline: float, connection: HasFileno) -> Generator[None, None, None]:
    """Shut `connection` down at `deadline`, on the monotonic clock: whoever reads from it then finds its end.

    A timeout of a socket is for one read, and a body takes many, as does a single line of it. Without a socket (a
    mock has none) nothing is shut down.
    """
    with contextlib.ExitStack() as stack:
        # No socket has no descriptor, or none that is open; at the end of the interpreter no thread can be started.
        with contextlib.suppress(AttributeError, OSError, ValueError, RuntimeError):
            # A duplicate: the descriptor itself may be another connection's by then.
            duplicate = socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM)
            stack.callback(duplicate.close)
            timer = threading.Timer(deadline - time.monotonic() + AFTER_DEADLINE, _shut_down, [duplicate])
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
        yield


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has come to its end by itself
        connection.shutdown(socket.SHUT_RDWR)
