"""`fwd2bot cache stats | merge | optimize | prune | rm | restore`: inspect, merge, clean up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .format import COMMITS, FILES, RESTORING, SUMMARIES, guarded, is_local, one_of, quoted
from .nearest import filtered
from .plan import is_gone
from .reader import SummaryCache
from .remembered import keep, state_of
from .repair import marked
from .sizes import CODEC_NAMES, bytes_per_token
from .store import MANY
from .tables import ABOUT, OK, users_columns
from .tidy import Tidy
from .verify import verify  # noqa: F401  it is one of them
from .writer import prefixes

UNUSED = timedelta(hours=1)  # how old a summary without a file must be to be removed where there is no lock


def stats(cache: SummaryCache) -> dict[str, Any]:
    """Rows, bytes on disk, and bytes per image: of the summary, of the vector, and of the image's own file."""
    import pyarrow.compute as pc

    rows, settings = len(cache), cache.settings
    total, sources = on_disk(cache), 0
    for batch in cache.batches(FILES, ["bytes", "status"], 65536):
        own = batch.filter(pc.equal(batch["status"], OK))["bytes"]
        sources += pc.sum(own).as_py() or 0
    with guarded(cache.path):
        distinct, skipped = cache.table(SUMMARIES).count_rows(), cache.table(FILES).count_rows("reason IS NOT NULL")
    found: dict[str, Any] = {"rows": rows, "contents": distinct, "skipped": skipped}
    found |= {"k": settings.k, "dim": settings.size, "codec": settings.codec, "model": settings.model, "bytes": total}
    found |= {**settings.reading.as_settings(), "decoding": settings.decoding}
    found["bytes_per_image"] = settings.k * bytes_per_token(settings.codec, settings.size)
    found["bytes_per_vector"] = 2 * settings.size
    found["bytes_on_disk_per_image"] = None if total is None or not rows else round(total / rows, 1)
    found["bytes_per_source_image"] = round(sources / rows, 1) if rows else None
    found["bytes_per_image_by_codec"] = {
        name: settings.k * bytes_per_token(name, settings.size) for name in CODEC_NAMES
    }
    return found


def keep_stats(cache: SummaryCache) -> dict[str, Any]:
    """`stats`; kept in the folder of a local cache, where `cache stats` finds them until the cache changes."""
    before = state_of(cache.path)
    figures = stats(cache)
    keep(cache.path, figures, before)
    return figures


def merge(into: SummaryCache, other: SummaryCache) -> dict[str, Any]:
    """Adds the images of another cache of the same settings; of the same path the row already there stays.

    Raises:
        ValueError: they are of other settings, or a path is of different images; nothing is added.
    """
    if name := into.settings.differs(other.settings):
        ours, theirs = getattr(into.settings, name), getattr(other.settings, name)
        raise ValueError(f"{other.path} has {name} = {theirs}, {into.path} has {ours}: they cannot be joined.")
    for rows in other.batches(FILES, ["source", "id", "sha256"]):
        theirs = dict(zip(*(rows[name].to_pylist() for name in ("source", "sha256")), strict=True))
        for row in into.files_of(list(theirs)):
            if row["status"] == OK and theirs[row["source"]] not in (None, row["sha256"]):
                raise ValueError(f"{row['source']} is one image in {into.path} and another in {other.path}.")
    before = len(into)
    tidy = Tidy(into)
    for rows in other.batches(SUMMARIES, size=1024):
        other.check(rows)
        into.commit(rows.cast(into.table(SUMMARIES).schema), what="merge")
        tidy.after_commit()
    schema = into.table(FILES).schema
    for rows in other.batches(FILES):
        known = {row["source"] for row in into.files_of(rows["source"].to_pylist())}
        fresh = [row for row in rows.to_pylist() if row["source"] not in known]
        into.commit(entries=[{n: row[n] for n in row if n in schema.names} for row in fresh], what="merge")
    return {"added": len(into) - before, "rows": len(into)}


def optimize(cache: SummaryCache, older_than: float = 1.0) -> dict[str, Any]:
    """Removes summaries that no file has, joins small files, brings the indexes up to date, and removes old versions.

    Args:
        older_than: hours; versions of that age are removed, and with them the way back to them.
    """
    if older_than < 0:
        raise ValueError(f"--older-than takes a number of hours of at least 0, not {older_than:g}.")
    before = on_disk(cache)
    removed = _remove_unused(cache)
    done = cache.optimize(timedelta(hours=older_than))
    found = {"bytes_before": before, "bytes": on_disk(cache), "rows": len(cache), "removed_summaries": removed}
    if not done:
        found["note"] = "an index is being built, or others write: small files were left as they are"
    elif before is not None and found["bytes"] > before and older_than:
        found["note"] = (
            f"replaced files are kept for {older_than:g} h, so that `restore` can use them; --older-than 0 removes "
            "them now"
        )
    return found


def _remove_unused(cache: SummaryCache) -> int:
    """Summaries that are no file's. Where there is no lock, another writer may be about to name the newest ones."""
    files = [prefixes(rows["sha256"].to_pylist()) for rows in cache.batches(FILES, ["sha256"], 65536)]
    used = np.unique(np.concatenate(files)) if files else np.empty(0, np.uint64)
    summaries = cache.table(SUMMARIES)
    if not cache.local:
        limit = datetime.now(timezone.utc) - UNUSED
        old = [v["version"] for v in summaries.list_versions() if _aware(v["timestamp"]) < limit]
        if not old:
            return 0
        summaries.checkout(max(old))
    rows = summaries.search().select(["sha256"]).limit(None).to_arrow()["sha256"].to_pylist()
    unused = [key for key, there in zip(rows, np.isin(prefixes(rows), used), strict=True) if not there]
    for at in range(0, len(unused), MANY):
        cache.drop_rows(SUMMARIES, one_of("sha256", unused[at : at + MANY]), "optimize")
    return len(unused)


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.astimezone(timezone.utc)


# ---------------------------------------------------------------------- taking out
def prunable(cache: SummaryCache) -> tuple[list[str], list[str]]:
    """(sources whose file is not there any more, roots that are not there at all)."""
    gone, roots = [], set()
    for rows in cache.batches(FILES, ["source", "root"], 65536):
        for row in rows.to_pylist():
            if is_gone(row):
                gone.append(row["source"])
                if is_local(row["root"]) and not Path(row["root"]).exists():
                    roots.add(row["root"])
    return gone, sorted(roots)


def prune(cache: SummaryCache, missing_roots: bool = False) -> dict[str, Any]:
    """Takes out the images, and the skipped files, whose file is not there any more.

    Args:
        missing_roots: also those of folders that are not there at all.

    Raises:
        ValueError: a whole folder is missing: a drive that is away looks like that.
    """
    gone = to_prune(cache, missing_roots)
    cache.forget(gone, "prune")
    return {"removed": len(gone), "rows": len(cache)}


def to_prune(cache: SummaryCache, missing_roots: bool = False) -> list[str]:
    """The sources that `prune` would take out; ValueError where a whole folder is missing."""
    gone, roots = prunable(cache)
    if roots and not missing_roots:
        raise ValueError(
            f"{', '.join(roots[:3])} {'is' if len(roots) == 1 else 'are'} not there at all. If a drive is away, "
            "nothing should be removed; if the folder is gone for good, pass --missing-roots."
        )
    return gone


def chosen(cache: SummaryCache, names: Sequence[str], where: str | None) -> list[str]:
    """The sources of files by id, path, folder ("beach/"), or an SQL condition.

    Args:
        names: ids, or paths; a relative path that is no id is looked up in the working directory.

    Raises:
        ValueError: nothing has one of the names.
    """
    found: dict[str, None] = {}
    if where is not None:
        known = [*ABOUT, *users_columns(cache.table(FILES).schema)]
        found.update(dict.fromkeys(row["source"] for row in filtered(cache, ["source"], "true", where, known)))
    for name in names:
        rows = _named(cache, name)
        if not rows and "://" not in name:
            rows = _named(cache, os.path.abspath(name) + "/" * name.endswith("/"))
        if not rows:
            raise ValueError(f"{cache.path} has no image {name}: neither an id nor a path.")
        found.update(dict.fromkeys(row["source"] for row in rows))
    return list(found)


def _named(cache: SummaryCache, name: str) -> list[dict[str, Any]]:
    if name.endswith("/"):
        end = name[:-1] + "0"  # the character after "/"
        parts = (f"({c} >= {quoted(name)} AND {c} < {quoted(end)})" for c in ("id", "source"))
        return cache.rows(FILES, ["source"], " OR ".join(parts)).to_pylist()
    return cache.rows(FILES, ["source"], f"{one_of('id', [name])} OR {one_of('source', [name])}").to_pylist()


# ---------------------------------------------------------------------- the way back
def commits(cache: SummaryCache) -> list[dict[str, Any]]:
    """The commits whose files can be restored, the newest first: version, at, what, rows.

    A version is listed once, with the commit that made it: `repair` may record one that changed no file.
    """
    with guarded(cache.path):
        there = {entry["version"] for entry in cache.table(FILES).list_versions()}
    made: dict[int, dict[str, Any]] = {}
    for row in sorted(cache.rows(COMMITS).to_pylist(), key=lambda row: row["at"]):
        if row["what"] != RESTORING:
            made.setdefault(row["files_version"], row)
    rows = sorted(made.values(), key=lambda row: row["at"], reverse=True)
    return [
        {"version": row["files_version"], "at": str(row["at"]), "what": row["what"], "rows": row["files_rows"]}
        for row in rows
        if row["files_version"] in there
    ]


def restore(cache: SummaryCache, version: int) -> dict[str, Any]:
    """Files as they were at a version; the summaries that they name are there until `optimize` removes them.

    Raises:
        ValueError: there is no such version any more.
    """
    there = {row["version"] for row in commits(cache)}
    if version not in there:
        shown = ", ".join(map(str, sorted(there, reverse=True)[:10]))
        raise ValueError(f"{cache.path} has no version {version} to go back to; there are {shown or 'none'}.")
    with cache.writing():
        cache.record(RESTORING)  # also where this process is killed now, others read all keys again
        table = cache.table(FILES)
        table.checkout(version)
        table.restore()
        cache.record("restore")
    rows = len(cache)
    lost = _without_summary(cache)
    return {"version": version, "rows": rows, "lost": lost}


def _without_summary(cache: SummaryCache) -> list[str]:
    """Ids of files whose summary was removed since; they are marked, so that `compress` makes it again."""
    lost: list[dict[str, Any]] = []
    for rows in cache.batches(FILES):
        own = [row for row in rows.to_pylist() if row["status"] == OK]
        there = cache.stored([row["sha256"] for row in own])
        lost += [row for row in own if row["sha256"] not in there]
    for rows in marked(cache, lost, "its summary was removed"):
        cache.put_files(rows, "restore")
    return [row["id"] for row in lost]


def on_disk(cache: SummaryCache) -> int | None:
    if not cache.local:
        return None
    return sum(file.stat().st_size for file in Path(cache.path).rglob("*") if file.is_file())
