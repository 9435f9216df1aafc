"""The fingerprint of a model, by which a cache recognises it; messages about ids that a cache does not have."""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path

from ..config import CONFIG_NAME

SPELLED = 50_000  # ids among which the likeliest is looked for


def fingerprint_of(checkpoint: str | os.PathLike) -> str:
    """By which a file of summaries knows its model: a hash of the settings, which hold a hash of every weight file."""
    return hashlib.sha256((Path(checkpoint) / CONFIG_NAME).read_bytes()).hexdigest()


def unknown_id(path: Path, name: str, known: list[str], skipped: list[dict[str, str]]) -> str:
    """What to tell of an id that is not there: why it was skipped, or which ones are close."""
    for entry in skipped:
        if entry["id"] == name:
            return f"{path} has no summary of {name}, which was skipped: {entry['reason']}"
    close = [k for k in known if name and k.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]]
    alike = difflib.get_close_matches(name, known) if len(known) <= SPELLED else []  # it takes 10 s for a million
    close = list(dict.fromkeys([*close, *alike]))[:3]
    hint = f"Close ones: {', '.join(close)}." if close else f"It has {len(known)}, the first is {known[0]}."
    return f"{path} has no id {name!r}. {hint}"


def escaped(text: str) -> str:
    """A text with its control and direction characters as Python writes them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
