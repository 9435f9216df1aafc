"""Converts caches of format 1 (legacy.py), where a row was known by a name, to the tables by content and by place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from .format import (
    COMMITS,
    FILES,
    FORMAT,
    OLD_TABLES,
    SUMMARIES,
    TABLES,
    CacheSettings,
    is_local,
    lancedb_module,
    lock,
)
from .legacy import OLD_ABOUT, OldCache
from .reader import SummaryCache
from .rows import file_rows, summary_rows, tokens_in, vectors_in
from .tables import BROKEN, KEYS, OK, create_tables
from .writer import MANY, root_of


def migrate(path: str | os.PathLike) -> dict[str, Any]:
    """Converts a cache of format 1 in its place; killed on the way, it is still of format 1, and can be begun again.

    Returns:
        {"rows", "damaged": ids of rows that were not what was written, and are left out}

    Raises:
        ValueError: it is not of format 1.
    """
    text = os.fspath(path)
    with lock(text):
        old = SummaryCache.open(text)
        if not isinstance(old, OldCache):
            raise ValueError(f"{text} is of the newest format already.")
        settings = CacheSettings(**{**old.settings.__dict__, "format": FORMAT})
        database = lancedb_module().connect(text)
        for name in TABLES:  # of a conversion that was killed
            if name in database.list_tables().tables:
                database.drop_table(name)
        create_tables(text, settings, (SUMMARIES, FILES))
        tables = {name: database.open_table(name) for name in (SUMMARIES, FILES)}
        damaged = _convert(old, settings, tables)
        create_tables(text, settings, (COMMITS,))  # from here on it is of format 2
    cache = SummaryCache.open(text)
    with cache.writing():
        cache.record("migrate")
    if is_local(text):
        for name in OLD_TABLES:
            shutil.rmtree(Path(text) / f"{name}.lance", ignore_errors=True)
    else:
        for name in OLD_TABLES:
            database.drop_table(name)
    return {"rows": len(cache), "damaged": damaged}


def _convert(old: OldCache, settings: CacheSettings, tables: dict[str, Any]) -> list[str]:
    damaged: list[str] = []

    def put(name: str, rows: Any) -> None:
        tables[name].merge_insert(KEYS[name]).when_not_matched_insert_all().execute(rows)

    def entry(row: dict[str, Any], **more: Any) -> dict[str, Any]:
        own = {name: row[name] for name in ("source", "bytes", "modified")}
        root = root_of(row["source"], row["id"])
        return {**own, "root": root, "id": row["source"][len(root.rstrip("/")) + 1 :], **more}

    for rows in old.batches():
        wrong = old.wrong(rows)
        damaged += [name for name, bad in zip(rows["id"].to_pylist(), wrong, strict=True) if bad]
        rows = rows.filter((~wrong).tolist())
        if not rows.num_rows:
            continue
        keys = rows["sha256"].to_pylist()
        first = sorted({key: i for i, key in reversed(list(enumerate(keys)))}.values())
        some = rows.take(first)
        sizes = list(zip(some["width"].to_pylist(), some["height"].to_pylist(), strict=True))
        tokens, vectors = tokens_in(settings, some, old.blocks), vectors_in(some)
        put(SUMMARIES, summary_rows(settings, some["sha256"].to_pylist(), sizes, tokens, vectors))
        about = rows.select(list(OLD_ABOUT)).to_pylist()
        kept = ("sha256", "width", "height", "added")
        put(FILES, file_rows(settings, [entry(r, status=OK, **{n: r[n] for n in kept}) for r in about]))
    skipped = old.skipped()
    for at in range(0, len(skipped), MANY):
        part = [entry(row, status=BROKEN, reason=row["reason"]) for row in skipped[at : at + MANY]]
        put(FILES, file_rows(settings, part))
    return damaged
