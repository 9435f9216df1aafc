"""A pool of threads with a time limit: a file on a mount that does not answer must not block a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Stopped(Exception):
    """A signal came while a result was waited for."""


class Task:
    """One call in a thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.done = call, threading.Event()
        self.started: float | None = None
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        self.started = time.monotonic()
        try:
            self.value = self.call()
        except BaseException as error:  # it is raised where the result is asked for
            self.error = error
        self.call = None
        self.done.set()


class Pool:
    """So many threads. They are daemons: one that hangs does not keep the process."""

    def __init__(self, workers: int, limit: float) -> None:
        self.limit, self._tasks = limit, SimpleQueue()
        self.workers, self._closed = workers, False
        for _ in range(workers):
            self._start()

    def submit(self, call: Callable[..., Any], *args: Any) -> Task:
        task = Task(lambda: call(*args))
        self._tasks.put(task)
        return task

    def result(self, task: Task, stop: threading.Event) -> Any:
        """What the call gave.

        Raises:
            TimeoutError: it has run for `limit` seconds; another thread takes the place of its own.
            Stopped: `stop` was set.
        """
        while not task.done.wait(0.1):
            if stop.is_set():
                raise Stopped
            if task.started is not None and time.monotonic() - task.started > self.limit:
                self._start()
                raise TimeoutError(f"no answer in {self.limit:g} seconds")
        if task.error is not None:
            raise task.error
        return task.value

    def close(self) -> None:
        """No more is begun."""
        self._closed = True
        for _ in range(2 * self.workers):
            self._tasks.put(None)

    def _start(self) -> None:
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            task.run()
