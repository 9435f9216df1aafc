"""A fill that stays as fast as its cache grows: known keys are held in memory, and never trusted beyond what holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("lancedb")

from llava_fwd2bot.cache import seen, tidy  # noqa: E402
from llava_fwd2bot.cache.entries import Entry  # noqa: E402
from llava_fwd2bot.cache.format import FILES, SUMMARIES  # noqa: E402
from llava_fwd2bot.cache.maintenance import commits, restore  # noqa: E402
from llava_fwd2bot.cache.plan import Filled, Plan  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from torture_rows import SETTINGS, about, content, rows  # noqa: E402


@pytest.fixture
def cache(tmp_path):
    return SummaryCache.create(tmp_path / "a.cache", SETTINGS)


def add(cache: SummaryCache, seed: int, count: int = 8) -> list[str]:
    ids, summary, vectors = rows(count, seed)
    cache.add(ids, summary, vectors, about(ids))
    return ids


def test_a_fill_of_new_images_looks_nothing_up(cache, monkeypatch):
    """Look-ups of what is not there scanned every row since the last index update: a fill slowed as it went."""
    for seed in range(3):
        add(cache, seed)
    monkeypatch.setattr(SummaryCache, "rows", lambda *args, **kw: pytest.fail("the tables were asked"))
    monkeypatch.setattr(SummaryCache, "_merge", lambda *args, **kw: pytest.fail("rows were merged by key"))
    new = [Entry("/new", f"{i}.png", 1, 1) for i in range(9)]
    assert Plan(cache, False, Filled()).todo(new) == new
    assert cache.has([content(f"new {i}") for i in range(9)]) == {}
    add(cache, 3)
    assert len(cache) == 32


def test_what_other_processes_commit_is_seen(cache):
    """Hashes that were loaded once would miss a later commit of another process, and its rows would be doubled."""
    ids = add(cache, 0)
    assert set(cache.has([content(name) for name in ids])) == {content(name) for name in ids}
    other = SummaryCache.open(cache.path)
    theirs = add(other, 1)
    assert set(cache.has([content(name) for name in theirs])) == {content(name) for name in theirs}
    add(cache, 1)  # the same rows again
    assert cache.table(SUMMARIES).count_rows() == cache.table(FILES).count_rows() == 16


def test_rows_that_a_restore_brings_back_are_not_doubled(cache):
    """A restored version has its row ids of long ago, before the last one that was read."""
    ids = add(cache, 0)
    add(cache, 1)
    here = commits(cache)[0]["version"]
    cache.forget([f"/nowhere/{name}" for name in ids])
    filler = SummaryCache.open(cache.path)
    filler.seen(FILES).may_have(["anything"] * 9)  # loaded while the rows are gone
    restore(cache, here)
    ids, summary, vectors = rows(8, 0)
    filler.add(ids, summary, vectors, about(ids))
    assert cache.table(FILES).count_rows() == 16


def test_joined_files_are_not_counted_twice(cache):
    """Joining gives every row a new row id; the hashes are read again and must not pile up."""
    for seed in range(4):
        add(cache, seed)
    known = cache.seen(SUMMARIES)
    known.may_have(["anything"] * 9)
    before = len(known)
    cache.optimize(tidy.RECENT)
    assert known.may_have([content("0-0"), "anything"]).tolist() == [True, False]
    assert len(known) == before == 4 * 8


def test_a_few_look_ups_in_a_large_cache_load_nothing(cache, monkeypatch):
    """One new image must not wait until the keys of ten million are read."""
    monkeypatch.setattr(seen, "WORTH", 1)
    add(cache, 0)
    cache = SummaryCache.open(cache.path)
    assert cache.seen(SUMMARIES).may_have(["anything"]) is None
    assert cache.has([content("0-0"), "anything"]) == {content("0-0"): (4, 3)}


def test_upkeep_takes_a_bounded_share_of_the_time(cache, monkeypatch):
    """Each upkeep costs more than the one before: by a fixed number of commits it takes ever more of a fill's time."""
    now, times, freed = [1000.0], [], []
    monkeypatch.setattr(tidy.time, "monotonic", lambda: now[0])

    def optimize(*args):
        times.append(now[0])
        now[0] += 10

    monkeypatch.setattr(cache, "optimize", optimize)
    monkeypatch.setattr(tidy, "give_back", lambda: freed.append(now[0]))  # what it took would stay for the whole fill
    upkeep = tidy.Tidy(cache)
    for _ in range(tidy.EVERY * 10):
        now[0] += 1
        upkeep.after_commit()
    assert (
        len(times) == len(freed) == 3 and min(b - a for a, b in zip(times, times[1:], strict=False)) >= 10 / tidy.SHARE
    )


def test_large_files_are_not_rewritten(cache, monkeypatch):
    """Joining rewrites up to a million rows at a time, which is not worth it where each file is large already."""
    add(cache, 0)
    assert not tidy.worth_joining(cache)  # one file
    add(cache, 1)
    assert tidy.worth_joining(cache)  # little altogether
    monkeypatch.setattr(tidy, "LITTLE", 0)
    assert not tidy.worth_joining(cache)
    monkeypatch.setattr(tidy, "EVERY", 2)
    assert tidy.worth_joining(cache)  # many and small
    monkeypatch.setattr(tidy, "SMALL", 100)
    assert not tidy.worth_joining(cache)
    monkeypatch.setattr(tidy, "UNINDEXED", 0)
    tidy.Tidy(cache).finish()
    table = cache.table(SUMMARIES)
    assert table.stats()["fragment_stats"]["num_fragments"] == 2
    assert table.index_stats("sha256_idx").num_unindexed_rows == 0
