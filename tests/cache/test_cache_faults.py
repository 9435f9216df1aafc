"""Faults that a collection of files can meet: each was seen once, and lost a summary or gave a wrong one in silence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("lancedb")

from llava_fwd2bot import load_fwd2bot  # noqa: E402
from llava_fwd2bot.cache import feeder  # noqa: E402
from llava_fwd2bot.cache.compressor import Compressor  # noqa: E402
from llava_fwd2bot.cache.entries import Entry  # noqa: E402
from llava_fwd2bot.cache.format import CacheSettings, blocks, column  # noqa: E402
from llava_fwd2bot.cache.maintenance import commits, copies, prune, restore  # noqa: E402
from llava_fwd2bot.cache.pipeline import fill  # noqa: E402
from llava_fwd2bot.cache.pool import Pool, Stopped  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.repair import lost_entries, repair  # noqa: E402
from llava_fwd2bot.cache.signals import Interrupted, Stop  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402
from llava_fwd2bot.cache.verify import verify  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from torture_cache import SETTINGS, about, damages, rows, together  # noqa: E402


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_fwd2bot(checkpoint)


@pytest.fixture
def made(loaded, tmp_path):
    """A new cache, and a function that fills it from paths."""
    size = loaded[0].get_input_embeddings().weight.shape[1]
    cache = SummaryCache.create(tmp_path / "a.cache", CacheSettings("f" * 64, 4, size, "float16", "mean"))

    def run(*given: Path, **options):
        compressor = options.pop("compressor", None) or Compressor(*loaded, 4, 2)
        return fill(cache, Source([str(path) for path in given]), compressor, **options)

    return cache, run


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), colour).save(path)
    return path


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


def pipeline_model(cache, run):
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, tuple))


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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_loses_nothing_that_is_finished(made, loaded, tmp_path, name):
    """Up to 255 finished images were lost, and the bar had counted them."""
    cache, run = made
    for n in range(12):
        picture(tmp_path / "f" / f"{n:02}.png", (20 * n, 3, 3))
    number = getattr(signal, name)

    class Signalled(Compressor):
        calls = 0

        def __call__(self, prepared):
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), number)
            return super().__call__(prepared)

    compressor = Signalled(*loaded, 4, 2)
    with pytest.raises(Interrupted) as stop:
        run(tmp_path / "f", compressor=compressor)
    assert stop.value.code == 128 + number and len(cache) == 2 * compressor.calls == 6
    assert run(tmp_path / "f").compressed == 6 and verify(cache)["ok"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_is_finished_is_stored_after_some_seconds(made, loaded, tmp_path, monkeypatch):
    """So that SIGKILL costs seconds, however slow the images come."""
    cache, run = made
    monkeypatch.setattr("llava_fwd2bot.cache.sink.SECONDS", 0.2)
    for n in range(6):
        picture(tmp_path / "f" / f"{n}.png", (40 * n, 3, 3))
    seen = []

    class Slow(Compressor):
        def __call__(self, prepared):
            seen.append(len(cache))
            time.sleep(0.3)
            return super().__call__(prepared)

    run(tmp_path / "f", compressor=Slow(*loaded, 4, 2))
    assert seen == [0, 0, 4]


def test_a_named_pipe_and_a_dead_mount_do_not_hang(made, tmp_path):
    """Opening a pipe waits for a writer, and a mount that is away for its return: for ever, Ctrl-C included."""
    cache, run = made
    picture(tmp_path / "f" / "a.png", (1, 2, 3))
    os.mkfifo(tmp_path / "f" / "q.jpg")
    done = run(tmp_path / "f")
    assert done.compressed == 1 and "not a regular file" in done.skipped[0]["reason"]
    dead = threading.Event()
    entries = [
        Entry("/mount", "dead.png", 10, 1, read=dead.wait),
        *Source([str(picture(tmp_path / "b.png", (9, 9, 9)))]),
    ]
    source = fill(cache, entries, Compressor(*pipeline_model(cache, run), 4, 2), workers=1, patience=0.3)
    dead.set()
    assert source.compressed == 1 and "no answer in 0.3 seconds" in source.skipped[0]["reason"]


def test_waiting_for_a_file_ends_with_the_signal():
    pool, stop, never = Pool(1, 60), Stop(), threading.Event()
    task = pool.submit(never.wait)
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped):
        pool.result(task, stop)
    never.set()


def test_what_is_left_out_is_counted_by_reason(run, checkpoint, photos, tmp_path):
    """HEIC, SVG and files without an extension vanished uncounted, linked folders with them."""
    for name in ("a.heic", "b.heic", "c.svg", "noext"):
        (photos / name).write_text("x")
    (photos / "linked").symlink_to(tmp_path / "other")
    picture(tmp_path / "other" / "d.png", (1, 2, 3))
    (tmp_path / "other" / "circle").symlink_to(tmp_path / "other")
    command = (
        "compress",
        "--model",
        checkpoint,
        "--images",
        photos,
        "--cache",
        tmp_path / "p.cache",
        "--device",
        "cpu",
    )
    code, out, _ = run(*command, "--json")
    left = json.loads(out)["left_out"]
    assert code == 0 and left[".heic (pip install pillow-heif)"] == 2 and left[".svg"] == 1
    assert left["without an extension"] == 1 and left["linked folders that are read already"] == 1
    assert any(row["id"] == "linked/d.png" for row in SummaryCache.open(tmp_path / "p.cache").about(["id"]))
    assert "left out of the folders: 2 .heic (pip install pillow-heif)" in run(*command)[1]


def test_ids_do_not_command_the_terminal(run, made, tmp_path):
    """Escape sequences, line ends and U+202E in names went to the terminal as they are."""
    cache, go = made
    picture(tmp_path / "f" / "a\x1b[31m\n\u202eb.png", (1, 2, 3))
    go(tmp_path / "f")
    out = run("cache", "ls", cache.path)[1]
    assert "\x1b" not in out and "\u202e" not in out and len(out.splitlines()) == 1 and r"\x1b[31m\n\u202eb.png" in out
    raw = run("cache", "ls", cache.path, "--paths", "-0")[1]
    assert raw == str(tmp_path / "f" / "a\x1b[31m\n\u202eb.png") + "\0"


def test_numbers_that_are_out_of_all_bounds_are_told(run, made, checkpoint, tmp_path):
    """They ended in a traceback, or with the process."""
    cache, go = made
    picture(tmp_path / "f" / "a.png", (1, 2, 3))
    go(tmp_path / "f")
    vector = torch.ones(cache.settings.size)
    assert len(cache.search(vector, 1_000_000_000)) == 1
    code, _, err = run("cache", "vacuum", cache.path, "--older-than", "-5")
    assert code == 2 and "at least 0" in err
    for bomb in ("repeat(id, 100000000) = 'x'", "LPAD(id, 1000000000, 'x') = id"):
        with pytest.raises(ValueError, match="not allowed in a filter"):
            cache.search(vector, where=bomb)


def test_look_ups_use_the_indexes(tmp_path):
    """At a million rows a scan for each chunk took longer than the chunk."""
    cache = SummaryCache.create(tmp_path / "a.cache", SETTINGS)
    cache.add(*rows(4), about(rows(4)[0]))
    cache.optimize(timedelta(hours=1))
    for name, key in (("summaries", "sha256"), ("files", "source"), ("files", "id"), ("files", "sha256")):
        plan = cache.table(name).search().where(f"{key} IN ('a', 'b')").explain_plan()
        assert "ScalarIndexQuery" in plan, plan


def test_a_model_is_not_loaded_for_nothing(run, checkpoint, photos, tmp_path, monkeypatch):
    """Nor for a mistyped folder, which also left an empty cache."""
    command = ("compress", "--model", checkpoint, "--cache", tmp_path / "p.cache", "--device", "cpu", "--images")
    assert run(*command, photos)[0] == 0
    monkeypatch.setattr("llava_fwd2bot.cli.fill.load_model", lambda *args: pytest.fail("the model was loaded"))
    shutil.copy(photos / "a.png", photos / "copy.png")
    assert run(*command, photos)[0] == 0  # one file is new, its content is not
    assert run("compress", "--cache", tmp_path / "p.cache", "--images", photos)[0] == 0  # the cache names the model
    code, _, err = run(*command[:3], "--cache", tmp_path / "q.cache", "--images", tmp_path / "fotos")
    assert code == 1 and "None of the 1 image(s)" in err and not (tmp_path / "q.cache").exists()


def test_one_of_many_random_damages(tmp_path):
    """A few of what scripts/torture_cache.py does by the hundred."""
    found = damages(tmp_path, 6, seed=1)
    assert found["named"] + found["harmless"] == 6


def test_watching_tells_what_it_did_when_it_is_ended(run, checkpoint, photos, tmp_path, monkeypatch):
    """`--watch --json` printed nothing on Ctrl-C."""

    def ended(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_fwd2bot.cache.watch.time.sleep", ended)
    command = ("compress", "--model", checkpoint, "--images", photos, "--cache", tmp_path / "p.cache")
    code, out, err = run(*command, "--device", "cpu", "--watch", "--json")
    assert code == 130 and json.loads(out)["compressed"] == 5 and "what was finished is stored" in err


def test_a_full_disk_has_old_versions_removed_first(monkeypatch):
    """Joining files needs room that only removing old ones gives; where that cannot be done alone, the way is named."""
    from llava_fwd2bot.cache.writer import _optimize

    done = []

    class Table:
        def optimize(self, cleanup_older_than):
            done.append("optimize")
            if len(done) == 1:
                raise RuntimeError("IO error: No space left on device (os error 28)")

        def cleanup_old_versions(self, older_than):
            done.append("clean")

    _optimize(Table(), timedelta(0))
    assert done == ["optimize", "clean", "optimize"]
    done.clear()

    def missing(self, older_than):
        raise ImportError("The lance library is required")

    monkeypatch.setattr(Table, "cleanup_old_versions", missing)
    with pytest.raises(OSError, match="pip install pylance"):
        _optimize(Table(), timedelta(0))


def test_processes_that_share_a_folder_wait_for_each_other_by_claims(made, tmp_path):
    """A chunk that another process has is left to it, and taken once it is given back."""
    from llava_fwd2bot.cache.claims import Claims

    cache, run = made
    for n in range(4):
        picture(tmp_path / "f" / f"{n}.png", (40 * n, 3, 3))
    other = Claims(cache, 1)
    held = str(tmp_path / "f" / "2.png")
    number = other.take(held)
    seen = []

    def give_back():
        seen.append(len(cache))
        other.give(number)

    timer = threading.Timer(2.0, give_back)
    timer.start()
    assert run(tmp_path / "f", chunk=1).compressed == 4
    timer.join()
    assert seen == [3]  # what could be done was stored before the waiting
