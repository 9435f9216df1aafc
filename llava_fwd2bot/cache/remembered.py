"""The figures of `cache stats`, kept in the folder of a local cache: they need not be counted again until it changes.

LanceDB takes longer to be imported than to count. Whether a cache has changed shows in the names of its newest
manifests, which are new with every commit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAME = ".stats.json"
TABLES = ("summaries", "files", "commits")


def recall(path: str) -> dict[str, Any] | None:
    """The figures that were kept, where they still hold."""
    if (state := state_of(path)) is None:
        return None
    try:
        kept = json.loads((Path(path) / NAME).read_text(encoding="utf-8"))
        return kept["figures"] if kept["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):  # there are none, or they were damaged: they are counted again
        return None


def keep(path: str, figures: dict[str, Any], before: list[list[str]] | None) -> None:
    """Keeps figures that were counted when `state_of` gave `before`; does nothing where it cannot be written."""
    if before is None or state_of(path) != before:
        return
    file = Path(path) / NAME
    temporary = file.with_name(f"{NAME}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"state": before, "figures": figures}), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:  # a cache that may only be read
        temporary.unlink(missing_ok=True)


def state_of(path: str) -> list[list[str]] | None:
    """The newest manifests of each table, by name; None where it is no local cache."""
    found = []
    for name in TABLES:
        try:
            names = os.listdir(Path(path) / f"{name}.lance" / "_versions")
        except OSError:
            return None
        found.append(sorted(n for n in names if n.endswith(".manifest"))[:1])
    return found
