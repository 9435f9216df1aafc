"""Answers in the form in which they are compared."""

from __future__ import annotations

import re


def normal(answer: str) -> str:
    """An answer for comparison: lower case, without end mark, articles and repeated spaces.

    An answer that consists of these alone is kept, as otherwise an empty answer would equal the option "A".
    """
    text = answer.strip().lower()
    words = re.sub(r"[.!?]+$", "", text).replace("_", " ").split() or text.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
