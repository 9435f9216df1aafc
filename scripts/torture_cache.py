"""Kills writers of a cache, and builders of its index, at random moments, and lets many write at once: is every row
there, once, whole, and found?

python scripts/torture_cache.py --kills 100 --writers 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.functional import normalize

from llava_fwd2bot.cache.format import CacheSettings
from llava_fwd2bot.cache.maintenance import index, verify
from llava_fwd2bot.cache.reader import SummaryCache

K, D, ROWS = 6, 32, 16  # of a summary; rows of a commit
SETTINGS = CacheSettings("f" * 64, K, D, "float16", "mean")


def about(n: int, **more: object) -> list[dict]:
    row = {"sha256": "s", "source": "/nowhere.jpg", "bytes": 10, "modified": 1, "width": 4, "height": 3}
    return [{**row, **more} for _ in range(n)]


def rows(n: int, seed: int = 0) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Ids, summaries [n, K, D] and unit vectors [n, D] that follow from the seed."""
    summary = torch.randn(n, K, D, generator=torch.Generator().manual_seed(seed))
    return [f"{seed}-{i}" for i in range(n)], summary, normalize(summary.mean(1), dim=-1)


def write(path: str, first: int, last: int, early: bool) -> None:
    """For each seed all that a fill does: adds rows, replaces them, moves one, skips a file; now and then joins files.

    Says the seed on stdout once that is done.
    """
    if early:  # the kill may come in `create`
        print("ready", flush=True)
    cache = SummaryCache.create(path, SETTINGS)
    if not early:
        print("ready", flush=True)
    for seed in range(first, last):
        ids, summary, vectors = rows(ROWS, seed)
        cache.add(ids, -summary, vectors, about(ROWS))
        cache.add(ids, summary, vectors, about(ROWS))
        cache.adopt([(ids[0], f"{seed}-moved", about(1)[0])], gone=[ids[0]])
        cache.skip([{"id": f"{seed}-bad", "reason": "broken", "source": "x", "bytes": 1, "modified": 1}])
        if seed % 5 == 4:
            cache.optimize(timedelta(hours=1))
        print(seed, flush=True)


def start(path: Path, first: int, last: int, early: bool = False) -> subprocess.Popen:
    return started("--write", path, first, last, int(early))


def started(*command: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, *map(str, command)], stdout=subprocess.PIPE, text=True)


def build_indexes(path: str) -> None:
    """The index anew, again and again, with a commit that it does not know yet in between."""
    cache = SummaryCache.open(path)
    print("ready", flush=True)
    for seed in itertools.count(int(time.time() * 1000) % 10**9):
        index(cache)
        ids, summary, vectors = rows(ROWS, seed)
        cache.add(ids, summary, vectors, about(ROWS))
        cache.optimize(timedelta(hours=1))


def whole_commits(cache: SummaryCache) -> set[int]:
    """The seeds that are there to the end. AssertionError where one is in part, twice, or not as written."""
    found: dict[int, list[str]] = {}
    for row in cache.about(["id"]):
        found.setdefault(int(row["id"].split("-")[0]), []).append(row["id"])
    skipped = {int(row["id"].split("-")[0]) for row in cache.skipped()}
    done = set()
    for seed, names in found.items():
        ids, summary, _ = rows(ROWS, seed)
        moved = f"{seed}-moved"
        # killed between the commit of the new name and that of the old one's end, both are there
        allowed = (ids, [moved, *ids[1:]], [moved, *ids])
        assert sorted(names) in map(sorted, allowed), f"commit {seed} is there in part or twice: {names}"
        kept, whole = cache.get(ids[1:]), summary[1:].half().float()
        first = torch.equal(kept, -whole)
        assert first or torch.equal(kept, whole), f"commit {seed} is not as it was written"
        if moved in names:
            assert not first and torch.equal(cache.get([moved]), summary[:1].half().float())
        if moved in names and ids[0] not in names and seed in skipped:
            done.add(seed)
    return done


def kills(path: Path, times: int, longest: float = 1.0) -> dict[str, int]:
    """`times` writers, each killed by SIGKILL after up to `longest` seconds of writing; checked after each."""
    told: set[int] = set()
    for attempt in range(times):
        process = start(path, 1000 * attempt, 1000 * attempt + 999, early=attempt % 4 == 0)
        assert process.stdout.readline() == "ready\n"
        time.sleep(longest * random.random())
        process.send_signal(signal.SIGKILL)
        told |= {int(line) for line in process.stdout.read().split()}
        process.wait()
        process.stdout.close()
        cache = SummaryCache.create(path, SETTINGS)
        lost = told - whole_commits(cache)
        assert not lost, f"commits {sorted(lost)} were lost"
        assert verify(cache)["ok"]
    return {"kills": times, "commits": len(told), "rows": len(cache)}


def kills_of_indexing(path: Path, times: int, longest: float = 1.0) -> dict[str, int]:
    """`times` builders of an index, each killed while it builds or joins; then every row is found, by the index too."""
    cache = SummaryCache.create(path, SETTINGS)
    for seed in range(300 // ROWS + 1):
        ids, summary, vectors = rows(ROWS, seed)
        cache.add(ids, summary, vectors, about(ROWS))
    for _ in range(times):
        process = started("--index", path)
        assert process.stdout.readline() == "ready\n"
        time.sleep(longest * random.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = SummaryCache.open(path)
        assert verify(cache)["ok"]
        names = [row["id"] for row in cache.about(["id"])]
        assert len(names) == len(set(names)) and len(names) % ROWS == 0, f"{len(names)} rows"
        for name in random.sample(names, 5):
            seed, place = map(int, name.split("-"))
            vector = rows(ROWS, seed)[2][place]
            for exact in (True, False):
                hit = cache.search(vector, top=1, exact=exact)[0]
                assert hit["id"] == name and hit["score"] > 0.99, f"{name} is not found (exact={exact}): {hit}"
    return {"kills": times, "rows": len(cache)}


def together(path: Path, count: int, commits: int = 20) -> dict[str, int]:
    """`count` processes write at once."""
    writers = [start(path, commits * i, commits * (i + 1)) for i in range(count)]
    for process in writers:
        process.stdout.read()
        assert process.wait() == 0
        process.stdout.close()
    cache = SummaryCache.open(path)
    assert whole_commits(cache) == set(range(commits * count)) and verify(cache)["ok"]
    return {"writers": count, "commits": commits * count, "rows": len(cache)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--write", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--index", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.index:
        return build_indexes(args.index)
    if args.write:
        write(args.write[0], int(args.write[1]), int(args.write[2]), args.write[3] == "1")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {"killed": kills(Path(folder) / "killed", args.kills)}
        found["killed_while_indexing"] = kills_of_indexing(Path(folder) / "indexed", args.kills)
        found["together"] = together(Path(folder) / "together", args.writers)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
