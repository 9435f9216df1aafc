"""The line before the model: who runs with whom and when, without a model."""

from __future__ import annotations

import threading

import pytest

for needed in ("fastapi", "prometheus_client"):
    pytest.importorskip(needed)

from llava_fwd2bot.serving.batcher import Batcher, Job  # noqa: E402
from llava_fwd2bot.serving.errors import APIError  # noqa: E402


class Held:
    """A batcher whose first job holds the thread until it is let go, so that others wait in a known order."""

    def __init__(self, sizes=None, most=100, **runs):
        self.ran: list[tuple[str, list]] = []
        self.gate = threading.Event()
        calls = {"hold": lambda jobs: self.gate.wait(10) and self._finish(jobs), "a": self._run, "b": self._run, **runs}
        sizes = {"hold": 1, "a": 3, "b": 3, **(sizes or {})}
        self.batcher = Batcher({kind: self._told(call) for kind, call in calls.items()}, sizes, most, gather=0)
        self.first = self.batcher.submit(Job("hold", 0))
        while self.batcher.waiting():
            pass

    def _told(self, call):
        def told(jobs):
            self.ran.append((jobs[0].kind, [job.payload for job in jobs]))
            return call(jobs)

        return told

    def _finish(self, jobs):
        for job in jobs:
            job.finish(job.payload)

    _run = _finish

    def submit(self, kind, *payloads):
        return [self.batcher.submit(Job(kind, payload)) for payload in payloads]

    def go(self):
        self.gate.set()
        self.batcher.close(10)
        assert not self.batcher.alive
        return self.ran[1:]


def test_alike_jobs_run_together_and_kinds_take_turns():
    """In the order of their arrival; many of one kind do not keep another waiting."""
    held = Held()
    held.submit("a", 1, 2, 3, 4, 5)
    [late] = held.submit("b", 6)
    assert held.go() == [("a", [1, 2, 3]), ("b", [6]), ("a", [4, 5])]
    assert late.future.result(0) == 6


def test_jobs_that_go_on_are_first_in_their_line():
    """But the other kind has its turn between."""
    left = {1: 2, 2: 1}

    def run(jobs):
        for job in jobs:
            left[job.payload] = left.get(job.payload, 1) - 1
            if not left[job.payload]:
                job.finish(job.payload)
        return [job for job in jobs if left[job.payload]]

    held = Held(a=run)
    jobs = held.submit("a", 1, 2, 3, 4) + held.submit("b", 5)
    assert held.go() == [("a", [1, 2, 3]), ("b", [5]), ("a", [1, 4])]
    assert [job.future.result(0) for job in jobs] == [1, 2, 3, 4, 5]


def test_jobs_that_nobody_waits_for_are_dropped():
    """Before they cost anything."""
    held = Held()
    one, two, three = held.submit("a", 1, 2, 3)
    two.cancel()
    assert held.go() == [("a", [1, 3])]
    assert two.future.cancelled() and three.future.result(0) == 3


def test_an_error_is_that_of_its_job():
    """The others of its batch have their results, and the thread lives on."""

    def run(jobs):
        if any(job.payload == 2 for job in jobs):
            raise RuntimeError("two")
        for job in jobs:
            job.finish(job.payload)

    held = Held(a=run)
    one, two, three = held.submit("a", 1, 2, 3)
    [later] = held.submit("b", 4)
    held.go()
    assert (one.future.result(0), three.future.result(0), later.future.result(0)) == (1, 3, 4)
    with pytest.raises(RuntimeError, match="two"):
        two.future.result(0)


def test_a_full_line_and_one_that_closes():
    """Both say 429: the client may come again."""
    held = Held(most=2)
    held.submit("a", 1, 2)
    with pytest.raises(APIError) as error:
        held.submit("a", 3)
    assert error.value.status == 429 and "2 requests wait" in error.value.message
    held.go()
    with pytest.raises(APIError, match="stopping"):
        held.submit("a", 4)
