"""Rows of one sequence each, told to transformers, which would look for packed sequences in their positions.

It asks the device whether there are any, in each call of a language model without an attention mask, and waits for the
answer; compiled, where it cannot ask, it makes a mask of T² numbers. Rows of both passes hold one sequence each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from transformers import masking_utils
except ImportError:  # before 4.53 transformers does not look
    masking_utils = None

_rows = threading.local()


@contextmanager
def one_sequence_each() -> Iterator[None]:
    """Within it, in this thread, no row is searched for packed sequences."""
    before = getattr(_rows, "whole", False)
    _rows.whole = True
    try:
        yield
    finally:
        _rows.whole = before


def _install() -> None:
    search = getattr(masking_utils, "find_packed_sequence_indices", None)
    if search is None:
        return

    def find_packed_sequence_indices(position_ids: Any) -> Any:
        return None if getattr(_rows, "whole", False) else search(position_ids)

    masking_utils.find_packed_sequence_indices = find_packed_sequence_indices


_install()
