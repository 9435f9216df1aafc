"""How long it takes to find that nothing is new, how long look-ups take, and whether a fill slows as a cache grows.

    python scripts/bench_plan.py plan --rows 1000000 --folder /tmp/plan --output eval/results/cache_plan.json
    python scripts/bench_plan.py fill --rows 2000000 --folder /tmp/fill --output eval/results/cache_grow.json

plan: so many files on disk, 1,000 in a folder, all of them known; a process of its own walks and joins them. fill: rows
of 16 × SIZE int4 with random bytes go through the plan and the sink as those of a model without cost would.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from llava_fwd2bot.cache.entries import Entry
from llava_fwd2bot.cache.format import FILES, SUMMARIES, CacheSettings, one_of
from llava_fwd2bot.cache.maintenance import on_disk
from llava_fwd2bot.cache.pipeline import CHUNK
from llava_fwd2bot.cache.plan import Filled, Plan, blocks_of
from llava_fwd2bot.cache.reader import SummaryCache
from llava_fwd2bot.cache.sink import CacheSink
from llava_fwd2bot.cache.sources import Source
from llava_fwd2bot.files.writing import write_json

SETTINGS = CacheSettings("f" * 64, 16, 1024, "int4", "mean")
PER_FOLDER, BATCH = 1000, 20_000


class Bar:
    """In the place of a progress bar."""

    def update(self, count: int) -> None: ...

    def write(self, text: str, file: Any = None) -> None: ...


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def content(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def prepare(folder: Path, rows: int) -> None:
    """So many files, all known to a cache."""
    photos = folder / "photos"
    cache = SummaryCache.create(folder / "plan.cache", SETTINGS)
    for start in range(0, rows, BATCH):
        entries = []
        for number in range(start, min(rows, start + BATCH)):
            place, name = divmod(number, PER_FOLDER)
            path = photos / f"{place:05d}" / f"{name:04d}.jpg"
            if not name:
                path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            told = path.stat()
            entry = Entry(str(photos.absolute()), f"{place:05d}/{name:04d}.jpg", told.st_size, told.st_mtime_ns)
            entries.append(entry.row(sha256=content(number), width=4, height=3))
        cache.commit(entries=entries)
    cache.optimize(timedelta(0))


def plan(folder: Path) -> dict[str, Any]:
    """Walks and joins; what `compress` does where nothing is new."""
    start = time.perf_counter()
    cache, result = SummaryCache.open(folder / "plan.cache"), Filled()
    planned = Plan(cache, False, result)
    new = sum(len(planned.todo(block)) for block in blocks_of(Source([str(folder / "photos")])))
    seconds = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time()}
    told = {name: round(value, 2) for name, value in seconds.items()}
    return {"known": result.known, "new": new, **told, "peak_bytes": peak_bytes()}


def lookups(folder: Path, rows: int) -> dict[str, float]:
    """Median milliseconds of look-ups of 64 contents, of 64 paths, and of one id."""
    cache, chance = SummaryCache.open(folder / "plan.cache"), np.random.default_rng(0)
    took: dict[str, list[float]] = {"64 contents": [], "64 paths": [], "1 id": []}
    photos = str((folder / "photos").absolute())
    for _ in range(30):
        some = chance.integers(0, rows, 64).tolist()
        names = [f"{n // PER_FOLDER:05d}/{n % PER_FOLDER:04d}.jpg" for n in some]
        for name, run in {
            "64 contents": lambda some=some: cache.rows(
                FILES, ["source"], one_of("sha256", [content(n) for n in some])
            ),
            "64 paths": lambda names=names: cache.files_of([f"{photos}/{n}" for n in names]),
            "1 id": lambda names=names: cache.named(names[:1]),
        }.items():
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    return {name: round(1000 * statistics.median(values), 2) for name, values in took.items()}


def grow(folder: Path, rows: int, size: int) -> dict[str, Any]:
    """Rows a second of each tenth of a fill by a model without cost: plan, look-ups, commits, upkeep."""
    settings = replace(SETTINGS, size=size)
    cache, result = SummaryCache.create(folder / "grow.cache", settings), Filled()
    token, chance = cache.codec.bytes_per_token(size), np.random.default_rng(0)
    sink, planned = CacheSink(cache, result, Bar()), Plan(cache, False, result)
    rates, processor, memory, part, upkeep = [], [], [], rows // 10, [0.0]
    sink.tidy = Timed(sink.tidy, upkeep)
    for tenth in range(10):
        start, before = time.perf_counter(), time.process_time()
        entries = (Entry("/photos", f"{n:09d}.jpg", 100, 1) for n in range(tenth * part, (tenth + 1) * part))
        for block in blocks_of(entries):
            fresh = planned.todo(block)
            for at in range(0, len(fresh), CHUNK):
                chunk = planned.todo(fresh[at : at + CHUNK])  # as it is looked at again once it is claimed
                keys = [content(int(entry.id[:9])) for entry in chunk]
                assert not cache.has(keys)
                tokens = chance.integers(0, 256, (len(chunk), settings.k, token), np.uint8)
                vectors = tokens[:, 0, :1].astype(np.float16).repeat(size, 1)
                for i, entry in enumerate(chunk):
                    sink.made(entry, keys[i], (4, 3), {}, tokens[i], vectors[i])
                if sink.due:
                    sink.flush()
        rates.append(round(part / (time.perf_counter() - start), 1))
        processor.append(round(part / (time.process_time() - before), 1))
        memory.append(resident_bytes())
        told = {"tenth": tenth, "rows_s": rates[-1], "rows_per_processor_s": processor[-1]}
        told |= {"resident_bytes": memory[-1], "upkeep_s": round(upkeep[0], 1)}
        print(json.dumps(told), file=sys.stderr, flush=True)
    sink.flush()
    start = time.perf_counter()
    sink.tidy.finish()
    return {
        "rows": rows,
        "shape": f"{settings.k} x {size} {settings.codec}",
        "rows_s": rates,
        "last_over_first": round(rates[-1] / rates[0], 3),
        "rows_per_processor_s": processor,
        "last_over_first_by_processor": round(processor[-1] / processor[0], 3),
        "commits": sink.commits,
        "upkeep_s": round(upkeep[0], 1),
        "finish_s": round(time.perf_counter() - start, 1),
        "resident_bytes": memory,
        "peak_bytes": peak_bytes(),
        "fragments": {name: fragments(cache, name) for name in (SUMMARIES, FILES)},
        "bytes_on_disk": on_disk(cache),
        "rows_counted": {name: cache.table(name).count_rows() for name in (SUMMARIES, FILES)},
    }


class Timed:
    """Adds up the seconds that upkeep takes during a fill."""

    def __init__(self, tidy: Any, seconds: list[float]) -> None:
        self.tidy, self.seconds, self.finish = tidy, seconds, tidy.finish

    def after_commit(self) -> None:
        start = time.perf_counter()
        self.tidy.after_commit()
        self.seconds[0] += time.perf_counter() - start


def fragments(cache: SummaryCache, name: str) -> int:
    return cache.table(name).stats()["fragment_stats"]["num_fragments"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "fill", "alone"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=1024, help="of a token, with fill; default: 1024")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.what == "alone":
        print(json.dumps(plan(args.folder)))
        return
    if args.what == "plan":
        if not (args.folder / "plan.cache").exists():
            prepare(args.folder, args.rows)
        command = [sys.executable, __file__, "alone", "--folder", str(args.folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found |= {"rows": args.rows, "look_ups_ms": lookups(args.folder, args.rows)}
    else:
        found = grow(args.folder, args.rows, args.size)
    own = f" --size {args.size}" if args.what == "fill" else ""
    command = f"python scripts/bench_plan.py {args.what} --rows {args.rows}{own}"
    found |= {"date": str(date.today()), "command": command}
    print(json.dumps(found))
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
