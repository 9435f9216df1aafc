"""Damages caches, kills what works on them at random moments, and lets many write at once: is every row there, once,
whole, and found, and is never a wrong number given?

    python scripts/torture_cache.py --kills 100 --writers 8 --damages 200

Writers add rows, replace files, move and skip them, take some out, join small files, go back to a version. Signals are
KILL, TERM and INT in turn. Writers at once are tried with the lock of a local folder and without, as on a bucket.
Damage is 1 to 200 random bytes written over, a file cut, or a file removed, anywhere in a cache; then nothing may be
read that was not written, `verify` must name what is wrong, and `repair` must mend it.
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
from torture_damage import damages
from torture_rows import ROWS, SETTINGS, about, rows

from llava_fwd2bot.cache.index import build
from llava_fwd2bot.cache.maintenance import commits, restore
from llava_fwd2bot.cache.reader import SummaryCache
from llava_fwd2bot.cache.verify import verify

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def write(path: str, first: int, last: int, early: bool) -> None:
    """For each seed all that a fill does: adds rows, replaces them, moves one, skips a file; now and then joins files.

    Says the seed on stdout once that is done.
    """
    if early:  # the kill may come in `create`
        print("ready", flush=True)
    cache = SummaryCache.create(path, SETTINGS)
    if not early:
        print("ready", flush=True)
    alone = last - first > 500
    for seed in range(first, last):
        ids, summary, vectors = rows(ROWS, seed)
        cache.add(ids, -summary, vectors, about(ids, 1))
        cache.add(ids, summary, vectors, about(ids))
        moved = {**about([ids[0]])[0], "root": "/nowhere", "id": f"{seed}-moved", "source": f"/nowhere/{seed}-moved"}
        cache.commit(entries=[moved], gone=[f"/nowhere/{ids[0]}"], what="move")
        cache.skip([{"id": f"{seed}-bad", "source": f"/nowhere/{seed}-bad", "reason": "broken", "bytes": 1}])
        if seed % 5 == 4:
            cache.optimize(timedelta(hours=1))
        if seed % 7 == 6 and alone:  # going back takes back what others have written, too
            here = commits(cache)[0]["version"]
            cache.forget([f"/nowhere/{ids[1]}"])
            restore(cache, here)
        print(seed, flush=True)


def start(path: Path | str, first: int, last: int, early: bool = False) -> subprocess.Popen:
    return started("--write", path, first, last, int(early))


def started(*command: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def build_indexes(path: str) -> None:
    """The index anew, again and again, with a commit that it does not know yet in between."""
    cache = SummaryCache.open(path)
    print("ready", flush=True)
    for seed in itertools.count(int(time.time() * 1000) % 10**9):
        build(cache)
        ids, summary, vectors = rows(ROWS, seed)
        cache.add(ids, summary, vectors, about(ids))
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
        # killed between the commit of the new name and that of the old one's end, both are there; between taking one
        # out and going back, one is not
        allowed = [ids, [moved, *ids[1:]], [moved, *ids], [moved, *ids[2:]]]
        assert sorted(names) in map(sorted, allowed), f"commit {seed} is there in part or twice: {names}"
        kept, whole = cache.get(ids[2:]), summary[2:].half().float()
        first = torch.equal(kept, -whole)
        assert first or torch.equal(kept, whole), f"commit {seed} is not as it was written"
        if moved in names:
            assert not first and torch.equal(cache.get([moved]), summary[:1].half().float())
        if moved in names and ids[0] not in names and ids[1] in names and seed in skipped:
            done.add(seed)
    return done


def kills(path: Path, times: int, longest: float = 1.0) -> dict[str, int]:
    """`times` writers, each ended by a signal after up to `longest` seconds of writing; checked after each."""
    told: set[int] = set()
    for attempt in range(times):
        process = start(path, 1000 * attempt, 1000 * attempt + 999, early=attempt % 4 == 0)
        assert process.stdout.readline() == "ready\n"
        time.sleep(longest * random.random())
        process.send_signal(SIGNALS[attempt % len(SIGNALS)])
        told |= {int(line) for line in process.stdout.read().split()}
        process.wait()
        process.stdout.close()
        cache = SummaryCache.create(path, SETTINGS)
        lost = told - whole_commits(cache)
        assert not lost, f"commits {sorted(lost)} were lost"
        found = verify(cache)
        assert found["ok"], found
    return {"kills": times, "commits": len(told), "rows": len(cache)}


def kills_of_indexing(path: Path, times: int, longest: float = 1.0) -> dict[str, int]:
    """`times` builders of an index, each ended while it builds or joins; then every row is found, by the index too."""
    cache = SummaryCache.create(path, SETTINGS)
    for seed in range(300 // ROWS + 1):
        ids, summary, vectors = rows(ROWS, seed)
        cache.add(ids, summary, vectors, about(ids))
    for attempt in range(times):
        process = started("--index", path)
        assert process.stdout.readline() == "ready\n"
        time.sleep(longest * random.random())
        process.send_signal(SIGNALS[attempt % len(SIGNALS)])
        process.wait()
        process.stdout.close()
        cache = SummaryCache.open(path)
        found = verify(cache)
        assert found["ok"], found
        names = [row["id"] for row in cache.about(["id"])]
        assert len(names) == len(set(names)) and len(names) % ROWS == 0, f"{len(names)} rows"
        for name in random.sample(names, 5):
            seed, place = map(int, name.split("-"))
            vector = rows(ROWS, seed)[2][place]
            for exact in (True, False):
                hit = cache.search(vector, top=1, exact=exact)[0]
                assert hit["id"] == name and hit["score"] > 0.99, f"{name} is not found (exact={exact}): {hit}"
    return {"kills": times, "rows": len(cache)}


def together(path: Path | str, count: int, commits: int = 20) -> dict[str, int]:
    """`count` processes write at once."""
    SummaryCache.create(path, SETTINGS)
    writers = [start(path, commits * i, commits * (i + 1)) for i in range(count)]
    for process in writers:
        process.stdout.read()
        assert process.wait() == 0
        process.stdout.close()
    cache = SummaryCache.open(path)
    assert whole_commits(cache) == set(range(commits * count))
    found = verify(cache)
    assert found["ok"], found
    return {"writers": count, "commits": commits * count, "rows": len(cache)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--index", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if args.index:
        return build_indexes(args.index)
    if args.write:
        write(args.write[0], int(args.write[1]), int(args.write[2]), args.write[3] == "1")
        return
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.damages:
            found["damaged"] = damages(folder, args.damages, args.seed)
        if args.kills:
            found["killed"] = kills(folder / "killed", args.kills)
            found["killed_while_indexing"] = kills_of_indexing(folder / "indexed", args.kills)
        if args.writers:
            found["together"] = together(folder / "together", args.writers)
            found["together_without_locks"] = together(f"file://{folder}/unlocked", args.writers, commits=5)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
