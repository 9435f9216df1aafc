"""Faults that a collection of files can meet: each was seen once, and lost a summary or gave a wrong one in silence."""
# ruff: noqa: F811 (fixtures are imported, and named as arguments)

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("lancedb")

from llava_fwd2bot.cache import feeder  # noqa: E402
from llava_fwd2bot.cache.compressor import Compressor  # noqa: E402
from llava_fwd2bot.cache.duplicates import copies  # noqa: E402
from llava_fwd2bot.cache.format import blocks, column  # noqa: E402
from llava_fwd2bot.cache.maintenance import commits, prune, restore  # noqa: E402
from llava_fwd2bot.cache.pipeline import fill  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.repair import lost_entries, repair  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402
from llava_fwd2bot.cache.verify import verify  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from cache_toys import loaded, made, picture  # noqa: E402, F401
from torture_cache import together  # noqa: E402
from torture_rows import SETTINGS, about, rows  # noqa: E402


def flip(cache: SummaryCache, number: int, block: int = 0) -> str:
    """Changes one bit of a block of tokens of one row; gives its id."""
    row = cache.rows("summaries", ["sha256", column(cache.blocks[block])]).to_pylist()[number]
    name = cache.about(["id"], f"sha256 = '{row['sha256']}'")[0]["id"]
    for file in Path(cache.path).glob("summaries.lance/data/*"):
        whole = file.read_bytes()
        if (at := whole.find(row[column(cache.blocks[block])])) >= 0:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            return name
    raise AssertionError("the row is in no file")


def pipeline_model(cache, run):
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, tuple))


def test_damage_is_not_laundered_and_is_mended(made, tmp_path):
    """A touched file found its damaged summary again, which then had a new checksum over bytes that nobody checked."""
    cache, run = made
    for n in range(5):
        picture(tmp_path / "f" / f"{n}.png", (40 * n, 9, 9))
    run(tmp_path / "f")
    ids = sorted(row["id"] for row in cache.about(["id"]))
    truth = cache.get(ids)
    bad = flip(cache, 3)
    cache = SummaryCache.open(cache.path)
    for file in (tmp_path / "f").iterdir():
        os.utime(file, ns=(1, 1))
    assert run(tmp_path / "f").renamed == 5
    assert verify(cache)["damaged"] == [bad]
    with pytest.raises(ValueError, match=f"damaged at {bad}"):
        cache.get([bad])
    found = repair(cache.path)
    assert found["lost"] == [bad] and found["removed"] == 1
    cache = SummaryCache.open(cache.path)
    with pytest.raises(ValueError, match=f"no summary of {bad}.*its summary was damaged"):
        cache.get([bad])
    assert run(tmp_path / "f").compressed == 1 and not lost_entries(cache)
    assert verify(cache)["ok"] and torch.equal(cache.get(ids), truth)


def test_a_name_that_comes_again_overwrites_nothing(made, tmp_path):
    """A drive that is away, and another with a file of the same name: two images."""
    cache, run = made
    first, second = (picture(tmp_path / name / "x.jpg", (200 * n, 99, 9)) for n, name in enumerate(("f1", "f2")))
    run(tmp_path / "f1")
    before = cache.get(["x.jpg"])
    away = (tmp_path / "f1").rename(tmp_path / "away")
    assert run(tmp_path / "f2").compressed == 1 and len(cache) == 2
    away.rename(tmp_path / "f1")
    assert run(tmp_path / "f1").known == 1
    assert torch.equal(cache.get([str(first)]), before) and not torch.equal(cache.get([str(second)]), before)
    assert run(tmp_path / "f2" / ".." / "f1").known == 1 and len(cache) == 2


def test_prune_refuses_while_a_drive_is_away_and_there_is_a_way_back(made, tmp_path):
    cache, run = made
    for n in range(3):
        picture(tmp_path / "f" / f"{n}.png", (40 * n, 9, 9))
    run(tmp_path / "f")
    here = commits(cache)[0]["version"]
    away = (tmp_path / "f").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="not there at all"):
        prune(cache)
    assert len(cache) == 3
    assert prune(cache, missing_roots=True) == {"removed": 3, "rows": 0}
    assert restore(cache, here)["rows"] == 3 and not restore(cache, here)["lost"]
    away.rename(tmp_path / "f")
    assert run(tmp_path / "f").known == 3 and verify(cache)["ok"]
    (tmp_path / "f" / "0.png").unlink()
    assert prune(cache)["removed"] == 1
    with pytest.raises(ValueError, match="no version 9999"):
        restore(cache, 9999)


def test_writers_without_a_lock_double_nothing(tmp_path):
    """As on a bucket: by the key, LanceDB finds that two put in the same row."""
    assert together(f"file://{tmp_path}/a.cache", 2, commits=3)["rows"] == 96


def test_what_is_hashed_is_what_is_decoded(made, tmp_path, monkeypatch):
    """A file that was replaced between the two had its new picture stored under its old content."""
    cache, run = made
    file = picture(tmp_path / "f" / "a.png", (200, 0, 0))
    old, read = file.read_bytes(), feeder.read_content

    def replaced(entry):
        content = read(entry)
        picture(file, (0, 200, 0))
        return content

    monkeypatch.setattr(feeder, "read_content", replaced)
    run(tmp_path / "f")
    monkeypatch.undo()
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "old.png").write_bytes(old)
    assert run(tmp_path / "g").renamed == 1 and run(tmp_path / "f").compressed == 1
    by_content = SummaryCache.create(tmp_path / "b.cache", cache.settings)
    picture(tmp_path / "h" / "red.png", (200, 0, 0))
    fill(by_content, Source([str(tmp_path / "h")]), Compressor(*pipeline_model(cache, run), 4, 2))
    assert torch.equal(cache.get(["old.png"]), by_content.get(["red.png"]))
    assert not torch.equal(cache.get(["old.png"]), cache.get(["a.png"]))


def test_the_same_bytes_are_compressed_once_in_a_run(made, tmp_path):
    """Also where they come in one batch; and a copy that is no picture is told by its own name."""
    cache, run = made
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(tmp_path / "f" / name, (7, 7, 7))
    for name in ("bad.png", "worse.png"):
        (tmp_path / "f" / name).write_text("no picture")
    done = run(tmp_path / "f")
    assert (done.compressed, done.renamed, len(cache)) == (1, 2, 3)
    assert {row["reason"].split(": ")[0] for row in done.skipped} == {
        str(tmp_path / "f" / name) for name in ("bad.png", "worse.png")
    }
    assert cache.table("summaries").count_rows() == 1
    assert copies(cache) == [[str(tmp_path / "f" / name) for name in ("a.png", "b.png", "sub/c.png")]]


@pytest.mark.parametrize("name", ["summaries", "files"])
def test_a_lost_manifest_shows(tmp_path, name):
    """`verify` said ok of a cache whose newest version was gone."""
    cache = SummaryCache.create(tmp_path / "a.cache", SETTINGS)
    for seed in range(2):
        cache.add(*rows(4, seed), about(rows(4, seed)[0]))
    folder = Path(cache.path) / f"{name}.lance" / "_versions"
    newest = min(folder.glob("*.manifest"))
    (folder / "latest_version_hint.json").unlink()
    newest.unlink()
    found = verify(SummaryCache.open(cache.path))
    assert not found["ok"] and "lost" in found["unreadable"]
    mended = repair(cache.path)
    assert len(mended["lost"]) == (4 if name == "summaries" else 0)
    cache = SummaryCache.open(cache.path)
    cache.add(*rows(4, 1), about(rows(4, 1)[0]))
    assert verify(cache)["ok"] and len(cache.get(rows(4, 1)[0])) == 4


def test_a_part_of_a_summary_is_checked(tmp_path):
    """One checksum over all tokens left a reading of the first few unchecked."""
    cache = SummaryCache.create(tmp_path / "a.cache", SETTINGS)
    ids, summary, vectors = rows(4)
    cache.add(ids, summary, vectors, about(ids))
    for block, (first, _) in enumerate(blocks(SETTINGS.k)):
        before = {f: f.read_bytes() for f in Path(cache.path).glob("summaries.lance/data/*")}
        bad = flip(cache, 2, block)
        opened = SummaryCache.open(cache.path)
        for k in range(1, SETTINGS.k + 1):
            if k <= first:
                assert torch.equal(opened.get(ids, k), summary[:, :k].half().float())
            else:
                with pytest.raises(ValueError, match=f"damaged at {bad}"):
                    opened.get(ids, k)
        for file, whole in before.items():
            file.write_bytes(whole)


def test_damage_in_a_small_table_is_one_line(run, made, tmp_path):
    """Every command ended with a traceback."""
    cache, go = made
    picture(tmp_path / "f" / "a.png", (1, 2, 3))
    go(tmp_path / "f")
    for file in Path(cache.path).glob("files.lance/data/*"):
        file.write_bytes(file.read_bytes()[:40])
    for command in (("cache", "stats"), ("cache", "skipped"), ("cache", "ls")):
        code, _, err = run(*command, cache.path)
        assert code == 1 and err.startswith("fwd2bot: error: ") and len(err.splitlines()) == 1, err
    assert run("cache", "verify", cache.path)[0] == 1
    code, out, err = run("cache", "repair", cache.path, "--no-compress", "--json")
    assert code == 0 and json.loads(out)["rows"] == 0, err
    assert go(tmp_path / "f").renamed == 1  # the summary itself is there


def test_an_index_is_built_while_others_write(tmp_path, monkeypatch):
    """The writers' lock was held for the whole build: others waited for half an hour without a word."""
    from llava_fwd2bot.cache.index import build

    cache = SummaryCache.create(tmp_path / "a.cache", SETTINGS)
    ids, summary, vectors = rows(300)
    cache.add(ids, summary, vectors, about(ids))
    begun, go_on = threading.Event(), threading.Event()
    kind = type(cache.table())
    plain = kind.create_index

    def slow(self, *args, **options):
        begun.set()
        assert go_on.wait(30)
        return plain(self, *args, **options)

    monkeypatch.setattr(kind, "create_index", slow)
    thread = threading.Thread(target=build, args=(SummaryCache.open(cache.path),))
    thread.start()
    assert begun.wait(30)
    late = rows(4, 1)
    cache.add(*late, about(late[0]))  # does not wait
    go_on.set()
    thread.join()
    assert cache.search(late[2][0], 1, exact=False)[0]["id"] == "1-0" and verify(cache)["ok"]
