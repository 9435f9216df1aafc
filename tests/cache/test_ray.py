"""`compress --cache --ray`: the same cache as without, also when a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

ray = pytest.importorskip("ray")
pytest.importorskip("lancedb")

from llava_fwd2bot.cache.format import CacheSettings  # noqa: E402
from llava_fwd2bot.cache.maintenance import verify  # noqa: E402
from llava_fwd2bot.cache.ray_fill import Reader, Worker, fill_by_ray  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402
from llava_fwd2bot.cache.summary_file import fingerprint_of  # noqa: E402
from llava_fwd2bot.checkpoint.read import read_checkpoint  # noqa: E402

LOADING = {"base": None, "device": "cpu", "dtype": "auto", "load_4bit": False, "load_8bit": False}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


class Mortal(Worker):
    """Kills its own process at its second batch, once: a mark on disk tells."""

    def __call__(self, batch):
        mark = next(Path(row.entry.root) / "killed" for row in batch["row"] if row.entry is not None)
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


class Robbed(Reader):
    """A file goes away between the list and the reading."""

    def __call__(self, batch):
        for row in batch["row"]:
            if row.entry is not None and row.entry.id == "gone.png":
                Path(row.entry.source).unlink()
        return super().__call__(batch)


def test_a_file_that_goes_away_is_told_and_comes_again(checkpoint, tmp_path):
    """It is no broken picture: nothing of it is kept, and the next run asks for it again."""
    for name in ("here.png", "gone.png"):
        Image.new("RGB", (20, 20), (len(name), 5, 5)).save(tmp_path / name)
    images = Source([str(tmp_path)])
    cache = SummaryCache.create(tmp_path / "ray.cache", settings_of(checkpoint))
    done = fill_by_ray(cache, images, checkpoint, LOADING, reader=Robbed)
    assert done.compressed == 1 and "gone.png: No such file" in done.skipped[0]["reason"]
    assert [row["id"] for row in cache.about(["id"])] == ["here.png"]


def settings_of(checkpoint) -> CacheSettings:
    size = read_checkpoint(checkpoint)["base"]["fingerprint"]["hidden_size"]
    return CacheSettings(fingerprint_of(checkpoint), 4, size, "float16", "mean")


def test_a_killed_worker_loses_nothing_and_doubles_nothing(checkpoint, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(12):
        Image.new("RGB", (20, 20), (20 * n, 5, 5)).save(folder / f"{n:02d}.png")
    (folder / "bad.png").write_text("no picture")
    images = Source([str(folder)])
    cache = SummaryCache.create(tmp_path / "ray.cache", settings_of(checkpoint))
    done = fill_by_ray(cache, images, checkpoint, LOADING, batch_size=3, worker=Mortal)
    assert (folder / "killed").exists()
    assert done.compressed == 12 and [entry["id"] for entry in done.skipped] == ["bad.png"]
    assert len(cache) == 12 and verify(cache)["ok"]
    # a second run reads nothing; a moved file is known by its content
    (folder / "00.png").rename(folder / "moved.png")
    again = fill_by_ray(cache, Source([str(folder)]), checkpoint, LOADING)
    assert (again.compressed, again.known, again.renamed, len(again.skipped)) == (0, 11, 1, 1)
    # moved over another one: no id is there twice
    (folder / "moved.png").rename(folder / "05.png")
    last = fill_by_ray(cache, Source([str(folder)]), checkpoint, LOADING)
    assert (last.compressed, last.known, last.renamed) == (0, 10, 1) and verify(cache)["ok"]


def test_the_same_as_without(run, checkpoint, photos, tmp_path):
    caches = []
    for more in ((), ("--ray",)):
        caches.append(tmp_path / f"{len(more)}.cache")
        command = (
            "compress",
            "--model",
            checkpoint,
            "--images",
            photos,
            "--cache",
            caches[-1],
            "--json",
            "--device",
            "cpu",
        )
        code, out, err = run(*command, "--batch-size", 1, *more)
        assert code == 0, err
        assert json.loads(out)["compressed"] == 5 and len(json.loads(out)["skipped"]) == 2
    plain, by_ray = (SummaryCache.open(path) for path in caches)
    ids = sorted(row["id"] for row in plain.about(["id"]))
    assert ids == sorted(row["id"] for row in by_ray.about(["id"]))
    torch.testing.assert_close(plain.get(ids), by_ray.get(ids), rtol=0, atol=2e-3)
