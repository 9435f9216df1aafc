"""`compress --watch`: lists a source again and again, until Ctrl-C, and compresses what is new."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence

from .entries import Entry

SETTLED = 2.0  # seconds that a file must lie unchanged before it is taken


def watch(source: Iterable[Entry], again: Callable[[Sequence[Entry]], object], every: float) -> None:
    """Calls `again` with what is new in `source`, every so many seconds; a file still being copied waits."""
    seen: dict[str, tuple[int, int]] = {}
    while True:
        now, fresh = time.time(), []
        for entry in source:
            state = (entry.bytes, entry.modified)
            settled = abs(now - entry.modified / 1e9) > SETTLED
            if entry.problem is None and settled and seen.get(entry.source) != state:
                fresh.append(entry)
                seen[entry.source] = state
        if fresh:
            try:
                again(fresh)
            except (ValueError, OSError) as error:  # a full disk, say: the next look tries again
                print(f"fwd2bot: {error}", file=sys.stderr)
                for entry in fresh:
                    del seen[entry.source]
        time.sleep(every)
