"""The end of a run on several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Destroys the process group, if there is one, when the block ends or raises SystemExit.

    Otherwise the group's threads outlive the interpreter, and a process that trained well may abort on its way out.
    After an error the group is left alone: the other processes may wait in a collective, and only the launcher can
    end them.
    """
    try:
        yield
    except SystemExit:
        _destroy()
        raise
    _destroy()


def _destroy() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
