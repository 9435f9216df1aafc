"""The one thread that runs the model: jobs wait in line, and those of one kind run together.

A model is in one stage at a time, so that two threads cannot use it. Kinds of jobs take turns; of one kind the oldest
run first. A run may hand back jobs that it has not finished, so that others need not wait for a long answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from .errors import busy

log = logging.getLogger("fwd2bot.serve")
GATHER = 0.005  # seconds that the first job waits for others, where the model has nothing to do


class Job:
    """A piece of work for the model.

    Args:
        kind: jobs of one kind run together.
        payload: what the kind's function reads.
        emit: called in the model's thread with each piece of an answer, and with True.

    Attributes:
        future: the result, or the error.
    """

    def __init__(self, kind: str, payload: Any, emit: Callable[[str], None] | None = None) -> None:
        self.kind, self.payload, self.emit = kind, payload, emit
        self.future: Future[Any] = Future()
        self.arrived = time.monotonic()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Nobody waits for it any more: it is dropped, or ended at its next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def finish(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Batcher:
    """The line and its thread.

    Args:
        runs: of each kind, a function that runs a list of jobs, and returns those that must go on.
        sizes: of each kind, how many run together at most.
        most: jobs that may wait.
    """

    def __init__(
        self,
        runs: dict[str, Callable[[list[Job]], Sequence[Job] | None]],
        sizes: dict[str, int],
        most: int,
        gather: float = GATHER,
    ) -> None:
        self.runs, self.sizes, self.most, self.gather = runs, sizes, most, gather
        self._lines: dict[str, deque[Job]] = {kind: deque() for kind in runs}
        self._turn = list(runs)  # the kind that ran last stands at the end
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from other threads
    def submit(self, job: Job) -> Job:
        """Raises APIError 429 where too many wait, or where the server stops."""
        with self._change:
            if self._closing:
                raise busy("The server is stopping.")
            if self.waiting() >= self.most:
                raise busy(f"{self.most} requests wait already: try again later.")
            self._lines[job.kind].append(job)
            self._change.notify_all()
        return job

    def waiting(self, kind: str | None = None) -> int:
        """Jobs in line, without those that run."""
        return len(self._lines[kind]) if kind else sum(map(len, self._lines.values()))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, patience: float = 60.0) -> None:
        """Finishes what waits, then ends the thread."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(patience)

    # ------------------------------------------------------------------ the thread
    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            if not jobs:
                continue
            rest: Sequence[Job] = ()
            try:
                rest = self.runs[jobs[0].kind](jobs) or ()
            except BaseException as error:  # whatever it was, the other jobs must run
                if len(jobs) == 1:
                    jobs[0].fail(error)
                else:
                    self._alone(jobs)
            with self._change:
                self._lines[jobs[0].kind].extendleft(reversed(rest))

    def _alone(self, jobs: Sequence[Job]) -> None:
        """One job may have made all of them fail: each runs by itself."""
        for job in jobs:
            rest: Sequence[Job] = (job,)
            while rest and not job.future.done():
                try:
                    rest = self.runs[job.kind]([job]) or ()
                except BaseException as error:
                    job.fail(error)

    def _next(self) -> list[Job] | None:
        """The jobs that run now; None at the end."""
        with self._change:
            if not self.waiting():
                while not self.waiting():
                    if self._closing:
                        return None
                    self._change.wait()
                if self.gather and not self._closing:  # others may come with the first
                    self._change.wait_for(self._closing_or_full, self.gather)
            kind = next(kind for kind in self._turn if self._lines[kind])
            self._turn.remove(kind)
            self._turn.append(kind)
            line, jobs = self._lines[kind], []
            while line and len(jobs) < self.sizes[kind]:
                job = line.popleft()
                if job.cancelled:
                    job.future.cancel()
                else:
                    jobs.append(job)
            return jobs

    def _closing_or_full(self) -> bool:
        return self._closing or any(len(self._lines[kind]) >= self.sizes[kind] for kind in self._lines)
