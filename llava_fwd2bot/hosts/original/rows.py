"""Rows as the original LLaVA expands them: of any length, and with an image for each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava.constants import IMAGE_TOKEN_INDEX
from torch import Tensor


@contextmanager
def untruncated(config: Any) -> Iterator[None]:
    """The host cuts its rows to the text's limit, and would cut an image of many crops without a word."""
    before = getattr(config, "tokenizer_model_max_length", None)
    config.tokenizer_model_max_length = None
    try:
        yield
    finally:
        config.tokenizer_model_max_length = before


def with_blanks(input_ids: Tensor, values: Any, blank: Any) -> list[Any]:
    """The inverse of `OriginalHost._own_images`: a blank again for each row of text alone."""
    own, found = iter(values), []
    for count in (input_ids == IMAGE_TOKEN_INDEX).sum(1).tolist():
        found += [next(own) for _ in range(count)] or [blank]
    return found
