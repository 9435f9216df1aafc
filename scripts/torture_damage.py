"""Damages one place of a cache at a time: nothing wrong may be read, `verify` must name it, and `repair` mend it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch
from torch.nn.functional import normalize
from torture_rows import ROWS, SETTINGS, K, about, rows

from llava_fwd2bot.cache.index import build
from llava_fwd2bot.cache.reader import SummaryCache
from llava_fwd2bot.cache.repair import repair
from llava_fwd2bot.cache.verify import verify


def damage(path: Path, chance: random.Random) -> str:
    """Does one thing to one file; says what."""
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.name not in (".lock", ".indexing"))
    file = chance.choice(files)
    whole, kind = file.read_bytes(), chance.choice(("bytes", "bytes", "bytes", "cut", "gone"))
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(whole[: chance.randrange(len(whole) + 1)])
    elif whole:
        at = chance.randrange(len(whole))
        new = bytes(chance.randrange(256) for _ in range(chance.choice((1, 20, 200))))[: len(whole) - at]
        file.write_bytes(whole[:at] + new + whole[at + len(new) :])
    return f"{kind} in {file.relative_to(path)}"


def damages(folder: Path, times: int, seed: int = 0) -> dict[str, int]:
    """`times` caches, each damaged in one place. AssertionError where a wrong number is read, or a fault stays."""
    sound, chance = folder / "sound", random.Random(seed)
    cache = SummaryCache.create(sound, SETTINGS)
    truth = {}
    for number in range(20):
        ids, summary, vectors = rows(ROWS, number)
        cache.add(ids, summary, vectors, about(ids))
        truth |= dict(zip(ids, summary.half().float(), strict=True))
    build(cache)
    cache.skip([{"id": "bad", "source": "/nowhere/bad", "reason": "broken", "bytes": 1}])
    counts = {"damages": times, "named": 0, "harmless": 0, "rows_lost": 0}
    for _ in range(times):
        path = folder / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sound, path)
        told = damage(path, chance)
        wrong = set(truth) - readable(path, truth, told)
        try:
            found = verify(SummaryCache.open(path))
        except ValueError:
            found = {"ok": False}
        assert not (wrong and found["ok"]), f"{told}: {sorted(wrong)[:3]} cannot be read, and verify says nothing"
        counts["harmless" if found["ok"] else "named"] += 1
        if not found["ok"]:
            repair(path)
            mended = SummaryCache.open(path)
            again = verify(mended)
            assert again["unreadable"] is None and not again["twice"], f"{told}: {again}"
            assert set(again["damaged"]) == {row["id"] for row in mended.rows_lost()}, f"{told}: {again}"
            counts["rows_lost"] += len(truth) - len(readable(path, truth, told))
            mended.add(*rows(3, 999), about(rows(3, 999)[0]))  # it can be written to
            assert len(mended.get(rows(3, 999)[0])) == 3, told
    return counts


def readable(path: Path, truth: dict[str, torch.Tensor], told: str) -> set[str]:
    """The ids that can be read, at several k. AssertionError where a number is not what was written."""
    found = set()
    try:
        cache = SummaryCache.open(path)
    except ValueError:
        return found
    for k in (1, 3, K):
        try:
            got = dict(zip(truth, cache.get(list(truth), k), strict=True))  # at once, or else one by one
        except ValueError:
            got = {}
            for name in truth:
                try:
                    got[name] = cache.get([name], k)[0]
                except ValueError:
                    continue
        for name, value in got.items():
            assert torch.equal(value, truth[name][:k]), f"{told}: {name} is wrong at k = {k}"
        found = set(got) if k == 1 else found & set(got)
    for name in random.sample(sorted(truth), 3):
        vector = normalize(truth[name].mean(0), dim=-1)
        try:
            for hit in cache.search(vector, 3):
                right = torch.nn.functional.cosine_similarity(truth[hit["id"]].mean(0), vector, dim=0)
                assert abs(hit["score"] - right) < 0.01, f"{told}: {hit} for {right:.3f}"
        except ValueError:
            continue
    return found
