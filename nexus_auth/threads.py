"""Threads of our own, for what blocks: those of the application may all be waiting for what is done here."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def start_thread(function: Callable[[], T]) -> "Future[T]":
    """Call `function` in a thread of its own, and return the future of what it returns."""
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


def result_of(future: "Future[T]", limit: float) -> T | None:
    """Return the result of `future`, blocking; None if it is not there in `limit` seconds."""
    wait([future], limit)
    return future.result() if future.done() else None
