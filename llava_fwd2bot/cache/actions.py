"""What each of `fwd2bot cache`'s actions calls; the command line itself is cli/cache.py."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from . import duplicates
from . import maintenance as tools
from .format import FILES
from .legacy import OldCache
from .nearest import filtered
from .reader import SummaryCache
from .tables import ABOUT, OK


def open_cache(args: Namespace) -> SummaryCache:
    cache = SummaryCache.open(args.cache)
    if isinstance(cache, OldCache):
        raise ValueError(f"{args.cache} is of an earlier format: run `fwd2bot cache migrate {args.cache}` first.")
    return cache


CHANGE = ("migrate", "repair", "merge", "optimize", "import-metadata", "rm", "prune", "restore", "index")


def run(args: Namespace) -> dict[str, Any]:
    """The figures of an action that changes or measures a cache."""
    found = _run(args)
    if args.action in CHANGE:
        tools.keep_stats(open_cache(args))
    return found


def _run(args: Namespace) -> dict[str, Any]:
    if args.action == "migrate":
        from .migrate import migrate

        return migrate(args.cache)
    if args.action == "repair":
        from .repair import repair

        return repair(args.cache)
    cache = open_cache(args)
    if args.action == "export":
        from ..files.outputs import refuse_overlap
        from .export import export
        from .summary_file import check_output

        refuse_overlap("--output", args.output, models={"the cache": args.cache})

        return export(cache, check_output(args.output, args.overwrite), args.to)
    if args.action == "merge":
        others = [SummaryCache.open(other, cache.settings.fingerprint) for other in args.others]
        return {"added": sum(tools.merge(cache, other)["added"] for other in others), "rows": len(cache)}
    if args.action == "optimize":
        return tools.optimize(cache, args.older_than)
    if args.action == "import-metadata":
        if bool(args.file) == args.exif:
            raise ValueError("import-metadata takes a FILE, or --exif.")
        from .metadata import import_metadata, read_exif

        return read_exif(cache) if args.exif else import_metadata(cache, args.file)
    if args.action in ("rm", "prune"):
        if not args.dry_run:
            cache.forget(args.chosen, args.action)
        return {"removed": 0 if args.dry_run else len(args.chosen), "rows": len(cache)}
    if args.action == "restore":
        return _restored(cache, args.version)
    if args.action == "index":
        from .index import build

        return build(cache, args.kind)
    if args.action == "verify":
        return tools.verify(cache)
    return tools.keep_stats(cache)


def _restored(cache: SummaryCache, version: int | None) -> dict[str, Any]:
    if version is not None:
        return tools.restore(cache, version)
    rows = tools.commits(cache)
    return {"versions": [f"{row['version']} ({row['what']}, {row['rows']:,} files, {row['at'][:19]})" for row in rows]}


def chosen_to_go(args: Namespace) -> list[str]:
    """The sources that `rm` or `prune` would take out.

    Raises:
        ValueError: nothing is named, a name is not there, or a whole folder is missing.
    """
    cache = open_cache(args)
    if args.action == "prune":
        return tools.to_prune(cache, args.missing_roots)
    if not args.names and not args.filter:
        raise ValueError("rm takes ids, paths, folders that end in /, or --filter.")
    return tools.chosen(cache, args.names, args.filter)


def listed(args: Namespace) -> Iterator[dict[str, Any]]:
    """Rows of `ls`, `skipped` and `dedup`."""
    cache = open_cache(args)
    if args.action == "skipped":
        for row in cache.skipped():
            yield {"source": row["source"], "reason": row["reason"]}
    elif args.action == "ls":
        names = ["source"] if args.paths else ["id", "source", "width", "height", "bytes", "taken", "camera"]
        if args.filter:
            yield from filtered(cache, names, f"status = '{OK}'", args.filter, [*ABOUT, *cache.users_columns])
            return
        for rows in cache.batches(FILES, [*names, "status"]):
            for row in rows.to_pylist():
                if row.pop("status") == OK:
                    yield row
    else:
        for group in duplicates.copies(cache):
            yield {"copies": "same bytes", **{str(i): source for i, source in enumerate(group)}}
        if args.near is not None:
            for one, other, score in duplicates.near(cache, args.near):
                yield {"copies": f"alike {score:.4f}", "0": one, "1": other}
