"""Ctrl-C, SIGTERM and SIGHUP, so that what is finished is stored before the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; what was finished is stored. `code`: the exit code that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Stop(threading.Event):
    """Set by the first signal; the second one ends the process as always."""

    number = signal.SIGINT

    def raise_if_set(self) -> None:
        if self.is_set():
            raise Interrupted(self.number)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Within, the first signal sets the event that is given; in other threads than the main one, none does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def first(number: int, frame: object) -> None:
        stop.number = number
        stop.set()
        for own, handler in before.items():
            signal.signal(own, handler)

    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, first)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is first:
                signal.signal(number, handler)
