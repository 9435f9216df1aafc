"""The life of a request: it ends with its answer, with its time, or when its client goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request

from .errors import APIError

Result = TypeVar("Result")


class Deadline:
    """When a request must be done."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def error(self) -> APIError:
        return APIError(504, f"The request took more than {self.seconds:g} seconds, which is the limit.", "timeout")


async def gone(request: Request) -> None:
    """Returns once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def within(request: Request, work: Awaitable[Result], deadline: Deadline) -> Result:
    """What `work` gives; it is cancelled where the time is over or the client has gone.

    Raises:
        APIError: 504 or 499.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        done, _ = await asyncio.wait({task, watch}, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise APIError(499, "The client has gone.", "client_gone") if watch in done else deadline.error()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def result_of(job: Any) -> Any:
    """The result of a job of the model; where nobody waits any more, the job is cancelled."""
    try:
        return await asyncio.wrap_future(job.future)
    except asyncio.CancelledError:
        job.cancel()
        raise
