"""Files of records: a JSON list, or one JSON object per line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .text import decode_text, parse_json


def read_records(path: str | Path, lines: bool | None = None) -> list[dict]:
    """The records of a .json list or a .jsonl (`lines`, whatever its name is); errors name the file and the place."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    return parse_records(path.read_bytes(), path, path.suffix == ".jsonl" if lines is None else lines)


def parse_records(content: bytes, path: Path, lines: bool) -> list[dict]:
    """The records in the `content` of `path`, or in a part of it; ValueError that names `path` and the place."""
    text = decode_text(content, path)
    records: Any = []
    if lines:
        # Not splitlines(): a string may hold U+2028 and its like, which are no line ends in JSON.
        for number, part in enumerate(text.split("\n"), start=1):
            part = part.removeprefix("\ufeff")  # files with marks may have been joined
            records += [parse_json(part, path, number)] if part.strip() else []
    elif text.strip():
        records = parse_json(text, path)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: should be a list of records (JSON objects)")
    if not records:
        raise ValueError(f"{path}: no records")
    return records
