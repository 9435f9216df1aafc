"""What an export says of itself, in `fwd2bot/export.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files.text import read_json
from ..version import __version__

CLIENT = "fwd2bot"  # the folder of the client's files, which no engine looks into
MANIFEST = "export.json"
TEMPLATE = "vllm_template.jinja"
FORMAT = 1
# asked of an engine about R in the place of a summary, to tell whether it is the one
PROBES = ("What is this?", "Is it day or night?", "How many people are there?")


def is_export(path: str | os.PathLike) -> bool:
    """Whether `fwd2bot export` wrote the folder `path`."""
    return (Path(path) / CLIENT / MANIFEST).is_file()


def read_manifest(export: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the export at `export`.

    Raises:
        FileNotFoundError: there is no export. ValueError: it is damaged, or of a later format.
    """
    file = Path(export) / CLIENT / MANIFEST
    if not is_export(export):
        raise FileNotFoundError(2, f"There is no export here: {CLIENT}/{MANIFEST} is missing", str(export))
    values = read_json(file)
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {values.get('format')!r}; this version ({__version__}) reads {FORMAT}: export again."
        )
    missing = [name for name in ("to", "stages", "k", "bridge", "base", "checkpoint") if name not in values]
    if missing:
        raise ValueError(f"{file} is damaged: {', '.join(missing)} is missing. Export again.")
    return values
