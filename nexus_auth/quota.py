"""The quota of a token endpoint: how long until the next token request may go. It never waits itself.

The server counts arrivals. A request has arrived by the time its answer is here, so its slot is free again one period
after the answer: that keeps every period on the server's own clock within the limit.
"""

import threading

LIMIT, PERIOD, MARGIN = 60, 60.0, 0.1  # requests, seconds, and seconds for clocks that do not tick alike
LOCK = threading.Lock()  # for short changes to what threads share


class Slot:
    """One token request: the `time` when it may go, when it went (from then on it is `sent`), when it was answered."""

    time: float = 0.0
    sent: bool = False


class Quota:
    """The requests to one token endpoint in order: those of the last period, and those that wait to go.

    Times are in seconds, on any one monotonic clock.
    """

    def __init__(self) -> None:
        self.slots: list[Slot] = []

    def wait(self, slot: Slot, now: float) -> float:
        """Return the seconds that `slot` has to wait, in line from the first call on; with none it is sent."""
        with LOCK:
            if slot not in self.slots:
                self.slots = [slot for slot in self.slots if slot.time + PERIOD + MARGIN > now] + [slot]
            before = sorted(slot.time for slot in self.slots[: self.slots.index(slot)])
            opening = before[-LIMIT] + PERIOD + MARGIN if len(before) >= LIMIT else now
            slot.time, slot.sent = max(now, opening), opening <= now
            return slot.time - now

    def release(self, slot: Slot, now: float) -> None:
        """Count `slot` as arrived by `now`, or leave the line if it was never sent."""
        with LOCK:
            if slot.sent:
                slot.time = now
            elif slot in self.slots:
                self.slots.remove(slot)
