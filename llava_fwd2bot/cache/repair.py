"""Repairs a cache: removes wrong rows and marks their files to be compressed again.

A table whose newest manifest is lost or damaged goes back to the version before. Damaged manifests are moved to
`.damaged`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .entries import Entry, entry_of
from .format import (
    COMMITS,
    FILES,
    SUMMARIES,
    TABLES,
    DamagedCache,
    first_line,
    guarded,
    is_local,
    lancedb_module,
    lock,
    of_engine,
)
from .reader import SummaryCache
from .rows import with_checksum
from .tables import INDEXED, LOST, checked_settings, create_tables, settings_in
from .verify import look
from .writer import MANY


def repair(path: str | os.PathLike) -> dict[str, Any]:
    """Makes a cache sound; what cannot be kept is listed.

    Returns:
        {"removed": rows that were wrong, "lost": ids of files that must be compressed again, "mended": what else}
    """
    text = os.fspath(path)
    with lock(text):
        mended = _openable(text)
        cache = SummaryCache.open(text)
        if mended:  # a table may have gone back to an earlier version
            with guarded(text):
                cache.record("repair")
    found, removed = look(cache), 0
    mended += found.problems
    for name in (SUMMARIES, FILES):
        rows = sorted({*found.bad[name], *found.twice[name]})
        removed += len(rows)
        for at in range(0, len(rows), MANY):
            cache.drop_rows(name, f"_rowid IN ({', '.join(map(str, rows[at : at + MANY]))})", "repair")
    for name in (SUMMARIES, FILES):
        _indexes(cache, name, found.problems)
    if any(problem.startswith(COMMITS) for problem in found.problems):  # it is a log: it is begun anew
        with lock(text):
            lancedb_module().connect(text).drop_table(COMMITS)
            create_tables(text, cache.settings)
        cache = SummaryCache.open(text)
    for rows in marked(cache, found.lost, "its summary was damaged"):
        cache.put_files(rows, "repair")
    with cache.writing():
        cache.record("repair")
    again = look(cache)
    if again.problems or any(again.bad.values()):
        raise DamagedCache(f"{text} could not be mended: {'; '.join(again.problems) or 'rows are still wrong'}.")
    lost = sorted(row["id"] for row in cache.rows_lost())
    return {"removed": removed, "lost": lost, "mended": mended, "rows": len(cache)}


def lost_entries(cache: SummaryCache) -> list[Entry]:
    """The files whose summaries were damaged, for the pipeline."""
    return [entry_of(row["root"], row["id"], row["source"]) for row in cache.rows_lost()]


def marked(cache: SummaryCache, lost: Sequence[dict[str, Any]], reason: str) -> Iterator[Any]:
    """Rows of `files` whose summary is to be made again."""
    import pyarrow as pa

    schema = cache.table(FILES).schema
    for at in range(0, len(lost), MANY):
        rows = [{**row, "status": LOST, "reason": reason} for row in lost[at : at + MANY]]
        yield with_checksum(pa.Table.from_pylist(rows, schema=schema))


def _openable(path: str) -> list[str]:
    """Has every table open and read, at its newest version that can be; what was done."""
    done: list[str] = []
    values = None
    database = lancedb_module().connect(path)
    for name in TABLES:
        while True:
            try:
                table = database.open_table(name)
                table.count_rows()
                table.list_indices()
                values = values or settings_in(table, path)
                break
            except BaseException as error:
                if not of_engine(error):
                    raise
                if not is_local(path) or not (gone := _set_newest_aside(path, name)):
                    done.append(f"{name} is made anew: it could not be opened ({first_line(error)})")
                    break
                done.append(f"{name}: {gone} set aside ({first_line(error)})")
                database = lancedb_module().connect(path)
    if values is None:
        raise DamagedCache(f"{path}: none of its tables can be opened, so that it does not say what it was made with.")
    _set_broken_aside(path)
    create_tables(path, checked_settings(path, values, None))
    return done


def _set_newest_aside(path: str, name: str) -> str | None:
    """Moves the newest manifest of a table away; its name, or None where there is none left."""
    folder = Path(path) / f"{name}.lance" / "_versions"
    hint = folder / "latest_version_hint.json"
    hint.unlink(missing_ok=True)
    found = sorted(folder.glob("*.manifest"), key=_version, reverse=True)
    if not found:
        return None
    aside = Path(path) / ".damaged"
    aside.mkdir(exist_ok=True)
    os.replace(found[0], aside / f"{name}-{found[0].name}")
    return found[0].name


def _version(manifest: Path) -> int:
    """LanceDB names manifests by 2⁶⁴ − 1 − version, so that the newest comes first in a listing."""
    number = int(manifest.stem) if manifest.stem.isdecimal() else 0
    return 2**64 - 1 - number if number > 2**63 else number


def _set_broken_aside(path: str) -> None:
    """Moves the folders of tables away that have no manifest."""
    if not is_local(path):
        return
    for name in TABLES:
        folder = Path(path) / f"{name}.lance"
        if folder.exists() and not any((folder / "_versions").glob("*.manifest")):
            aside = Path(path) / ".damaged"
            aside.mkdir(exist_ok=True)
            target = aside / f"{name}-{len(list(aside.iterdir()))}.lance"
            os.replace(folder, target)


def _indexes(cache: SummaryCache, name: str, problems: Sequence[str]) -> None:
    """Builds the scalar indexes of a table anew where something is wrong with one; drops that of the vectors."""
    from lancedb.index import BTree

    if not any("index" in problem and name in problem for problem in problems):
        return
    with cache.writing():
        table = cache.table(name)
        for own in INDEXED[name]:
            table.create_index(own, config=BTree(), replace=True)
        for index in table.list_indices():
            if index.columns == ["embedding"]:
                table.drop_index(index.name)
