"""Faults of long runs, each with a test: signals, time, what hangs, what is left out, what is loaded for nothing."""
# ruff: noqa: F811 (fixtures are imported, and named as arguments)

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

pytest.importorskip("lancedb")

from llava_fwd2bot.cache.compressor import Compressor  # noqa: E402
from llava_fwd2bot.cache.entries import Entry  # noqa: E402
from llava_fwd2bot.cache.pipeline import fill  # noqa: E402
from llava_fwd2bot.cache.pool import Pool, Stopped  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.signals import Interrupted, Stop  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402
from llava_fwd2bot.cache.verify import verify  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from cache_toys import loaded, made, picture  # noqa: E402, F401
from torture_damage import damages  # noqa: E402
from torture_rows import SETTINGS, about, rows  # noqa: E402


def pipeline_model(cache, run):
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, tuple))


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
