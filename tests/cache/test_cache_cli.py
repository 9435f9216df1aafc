"""A folder goes in once; afterwards search and answers come from the cache alone, by the commands a user types."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import pytest
import torch
from cli_fixtures import QUESTION, SHORT
from PIL import Image

pytest.importorskip("lancedb")

from llava_fwd2bot.cache.entries import Entry  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.sources import paths  # noqa: E402
from llava_fwd2bot.cache.watch import watch  # noqa: E402


@pytest.fixture
def fill(run, checkpoint, photos, tmp_path):
    """`fwd2bot compress --cache` of the photos, → its JSON."""

    def fill(*more, images=photos) -> dict:
        command = ("compress", "--model", checkpoint, "--images", images, "--cache", tmp_path / "p.cache", "--json")
        codec = () if "--codec" in more or fill.cache.exists() else ("--codec", "float16")
        code, out, err = run(*command, "--device", "cpu", "--batch-size", 1, *codec, *more)
        assert code == 0, err
        return json.loads(out)

    fill.cache = tmp_path / "p.cache"
    return fill


def figures(done: dict) -> tuple[int, int, int, int]:
    return done["compressed"], done["known"], done["renamed"], len(done["skipped"])


def test_a_second_run_reads_nothing_and_a_changed_folder_is_followed(fill, photos, monkeypatch):
    """By content: touched and moved files are not compressed again, copies are not either, changed ones are."""
    assert figures(fill()) == (5, 0, 0, 2)
    cache = SummaryCache.open(fill.cache)
    before = cache.get(["a.png", "b.png"])
    assert sorted(row["id"] for row in cache.skipped()) == ["beach/truncated.jpg", "text.jpg"]
    monkeypatch.setattr("llava_fwd2bot.cache.feeder.read_content", None)  # not one file is opened
    assert figures(fill()) == (0, 5, 0, 2)
    monkeypatch.undo()
    os.utime(photos / "a.png", ns=(1, 1))
    (photos / "b.png").rename(photos / "moved.png")
    shutil.copy(photos / "pixel.png", photos / "copy.png")
    Image.new("RGB", (30, 30), (200, 10, 10)).save(photos / "beach/a.png")
    assert figures(fill()) == (1, 2, 3, 2)
    ids = {row["id"] for row in cache.about()}
    assert ids == {"a.png", "moved.png", "pixel.png", "copy.png", "beach/a.png", "beach/z.jpg"}
    assert (cache.get(["a.png", "moved.png"]) == before).all() and len(cache) == 6
    assert (cache.get(["copy.png"]) == cache.get(["pixel.png"])).all()


def test_two_folders_with_the_same_names(fill, photos, tmp_path):
    """Given one after the other: every file has a row of its own, and keeps it whatever is given with it."""
    other = tmp_path / "other"
    other.mkdir()
    for name, colour in (("a.png", (1, 1, 1)), ("b.png", (200, 200, 200))):
        Image.new("RGB", (30, 30), colour).save(other / name)
    assert fill()["images"] == 5
    assert figures(fill(images=other)) == (2, 0, 0, 0)
    ids = {row["source"] for row in SummaryCache.open(fill.cache).about()}
    assert {str(folder / name) for folder in (photos, other) for name in ("a.png", "b.png")} <= ids and len(ids) == 7
    assert figures(fill(images=other)) == (0, 2, 0, 0) and figures(fill()) == (0, 5, 0, 2)
    assert figures(fill(images=str(other / "*.png"))) == (0, 2, 0, 0)
    assert figures(fill(images=photos / ".." / other.name)) == (0, 2, 0, 0)
    assert {row["source"] for row in SummaryCache.open(fill.cache).about()} == ids
    with pytest.raises(ValueError, match=rf"a.png stands for 2 images .*{other}/a.png"):
        SummaryCache.open(fill.cache).get(["a.png"])
    SummaryCache.open(fill.cache).get([str(other / "a.png"), str(photos / "a.png"), "pixel.png"])


def test_a_folder_that_moved_is_the_same_images(fill, photos, tmp_path):
    fill()
    moved = photos.rename(tmp_path / "elsewhere")
    shutil.copy(moved / "a.png", moved / "copy.png")
    assert figures(fill(images=moved)) == (0, 5, 1, 2)
    rows = {row["id"]: row["source"] for row in SummaryCache.open(fill.cache).about()}
    assert len(rows) == 6 and all(source.startswith(str(moved)) for source in rows.values())


def test_a_drive_that_is_away_takes_nothing_with_it(fill, photos, tmp_path):
    """Images of a list that are not there are told, and their summaries stay; the next run writes nothing."""
    (photos / "list.txt").write_text("a.png\nb.png\n")
    fill(images=photos / "list.txt")
    away = photos.rename(tmp_path / "away")
    photos.mkdir()
    shutil.copy(away / "list.txt", photos)
    shutil.copy(away / "pixel.png", photos / "b.png")
    done = fill(images=photos / "list.txt")
    assert figures(done) == (1, 0, 0, 1) and done["images"] == 2
    versions = len(list(fill.cache.glob("*.lance/_versions/*")))
    assert figures(fill(images=photos / "list.txt")) == (0, 1, 0, 1)
    assert len(list(fill.cache.glob("*.lance/_versions/*"))) == versions


def test_one_bad_name_or_number_does_not_stop_the_others(fill, photos, monkeypatch):
    """A name that is not UTF-8, and a summary that float16 cannot hold, are skips with a reason."""
    shutil.copy(photos / "a.png", os.fsencode(photos) + b"/caf\xe9.png")
    done = fill()
    assert figures(done) == (5, 0, 0, 3) and any("not UTF-8" in entry["reason"] for entry in done["skipped"])
    from llava_fwd2bot.cache.compressor import Compressor

    plain, calls = Compressor.__call__, []

    def huge(self, prepared):
        summary, vector = plain(self, prepared)
        calls.append(1)
        return (summary + 1e6 if len(calls) == 1 else summary), vector

    monkeypatch.setattr(Compressor, "__call__", huge)
    for n in range(3):
        Image.new("RGB", (30, 30), (n, 77, 7)).save(photos / f"new-{n}.png")
    done = fill()
    assert figures(done) == (2, 5, 0, 4) and any("overflows" in entry["reason"] for entry in done["skipped"])


def test_a_broken_image_is_told_once_and_taken_when_mended(fill, photos):
    """Skipped files are in the cache with the reason; one that changed, or --retry, is read again."""
    fill()
    Image.new("RGB", (30, 30), (1, 2, 3)).save(photos / "text.jpg")
    assert figures(fill()) == (1, 5, 0, 1)
    assert [row["id"] for row in SummaryCache.open(fill.cache).skipped()] == ["beach/truncated.jpg"]
    assert figures(fill("--retry")) == (0, 6, 0, 1)
    (photos / "a.png").write_text("not a picture any more")
    done = fill()
    assert "a.png" in [entry["id"] for entry in done["skipped"]] and done["images"] == 5


def test_lists_patterns_and_nothing_at_all(fill, run, photos, tmp_path, checkpoint):
    (photos / "list.txt").write_text("a.png\n\nbeach/z.jpg\n")
    assert figures(fill(images=photos / "list.txt")) == (2, 0, 0, 0)
    assert figures(fill(images=photos / "*.png")) == (2, 1, 0, 0)
    (tmp_path / "empty").mkdir()
    code, _, err = run(
        "compress", "--model", checkpoint, "--images", "/no/such.jpg", "--cache", tmp_path / "typo.cache"
    )
    assert code == 1 and "None of the 1 image" in err
    for nothing in (tmp_path / "empty", photos / "*.tiff"):
        command = ("compress", "--model", checkpoint, "--images", nothing, "--cache", tmp_path / "none.cache")
        code, _, err = run(*command)
        assert code == 1 and "no image file" in err
    assert not (tmp_path / "none.cache").exists()


def test_animations_and_giants(fill, photos):
    """The first frame of an animation counts; too many pixels are a listed skip, with an option."""
    frames = [Image.new("RGB", (20, 20), (c, 0, 0)) for c in (10, 250)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    done = fill("--max-pixels", "1500")
    cache = SummaryCache.open(fill.cache)
    Image.new("RGB", (20, 20), (10, 0, 0)).save(photos / "still.gif")
    assert done["images"] == 2 and sum("over the limit" in e["reason"] for e in done["skipped"]) == 5
    assert fill("--retry")["images"] == 7
    assert torch.equal(*cache.get(["moving.gif", "still.gif"]))


def test_answers_from_the_cache_are_those_from_the_image(fill, run, checkpoint, photos):
    """A float16 cache: word for word, for the whole summary and for a part of it."""
    fill()
    for k in ((), ("--k", 2)):
        ask = ("ask", "--model", checkpoint, *SHORT, *k, "--json", QUESTION)
        from_image = json.loads(run(*ask, "--image", photos / "beach/z.jpg")[1])
        from_cache = json.loads(run(*ask, "--cache", fill.cache, "--id", "beach/z.jpg")[1])
        assert from_cache["answer"] == from_image["answer"] != "" and from_cache["k"] == from_image["k"]
        # the cache knows which model filled it
        told = run("ask", *SHORT, *k, "--json", QUESTION, "--cache", fill.cache, "--id", "beach/z.jpg")
        assert json.loads(told[1])["answer"] == from_cache["answer"]
    assert run("search", "--cache", fill.cache, "dogs", "--device", "cpu")[0] == 0
    code, _, err = run("ask", "--model", checkpoint, "--cache", fill.cache, "--id", "z.jpg", QUESTION)
    assert code == 1 and "Close ones: beach/z.jpg" in err
    code, _, err = run("ask", "--model", checkpoint, "--cache", fill.cache, "--id", "text.jpg", QUESTION)
    assert code == 1 and "skipped" in err


def test_search_by_words_by_image_and_by_id(fill, run, checkpoint, photos, tmp_path):
    fill()
    search = ("search", "--model", checkpoint, "--cache", fill.cache, "--json", "--device", "cpu")
    by_image = json.loads(run(*search, "--image", photos / "beach/z.jpg", "--top", 3)[1])["hits"]
    by_id = json.loads(run(*search, "--id", "beach/z.jpg", "--top", 3)[1])["hits"]
    assert [hit["id"] for hit in by_image] == [hit["id"] for hit in by_id] and by_id[0]["id"] == "beach/z.jpg"
    assert by_id[0]["score"] > 0.999
    sheet = tmp_path / "sheet.html"
    found = json.loads(run(*search, "dogs", "--html", sheet, "--filter", "id LIKE 'beach/%'")[1])
    assert {hit["id"] for hit in found["hits"]} == {"beach/a.png", "beach/z.jpg"}
    page = sheet.read_text()
    assert page.count("data:image/jpeg;base64,") == 2 and "beach/a.png" in page and "http" not in page
    (photos / "beach/a.png").unlink()
    plain = [word for word in search if word != "--json"]
    assert str(sheet) in run(*plain, "dogs", "--html", sheet)[2]  # it did not say where the page is
    assert "not there any more" in sheet.read_text()  # the search itself needs no image
    assert run("search", "--model", checkpoint, "--cache", fill.cache)[0] == 2
    code, _, err = run(*search, "dogs", "--filter", "colour = 3")
    assert code == 1 and ". Columns: id" in err and ".." not in err
    code, _, err = run(*search, "  ")
    assert code == 1 and "empty" in err


def test_ask_about_what_is_found(fill, run, checkpoint):
    """Search, then one answer from the summaries of the best hits: the same as by their ids."""
    fill()
    ask = ("ask", "--model", checkpoint, "--cache", fill.cache, *SHORT, "--json", QUESTION)
    found = json.loads(run(*ask, "--search", "dogs", "--top", 2)[1])
    assert len(found["images"]) == 2
    ids = [word for name in found["images"] for word in ("--id", name)]
    assert json.loads(run(*ask, *ids)[1])["answer"] == found["answer"] != ""
    code, _, err = run(*ask, "--search", "dogs", "--filter", "width > 9999")
    assert code == 1 and "nothing was found" in err


def test_cache_commands(fill, run, checkpoint, photos, tmp_path):
    """verify, stats, export and its file's answers; each with --json; a fault is exit code 1."""
    fill()
    code, out, _ = run("cache", "verify", fill.cache, "--json")
    assert code == 0 and json.loads(out)["ok"]
    stats = json.loads(run("cache", "stats", fill.cache, "--json")[1])
    assert stats["rows"] == 5 and stats["skipped"] == 2 and stats["bytes_per_image"] == 4 * stats["dim"] * 2
    assert "bytes per image" in run("cache", "stats", fill.cache)[1]
    file = tmp_path / "out.safetensors"
    assert run("cache", "export", fill.cache, "--output", file)[0] == 0
    ask = ("ask", "--model", checkpoint, *SHORT, "--json", QUESTION, "--id", "beach/z.jpg")
    told = [json.loads(run(*ask, *where)[1])["answer"] for where in (("--summaries", file), ("--cache", fill.cache))]
    assert told[0] == told[1]
    assert run("cache", "export", fill.cache, "--output", file)[0] == 1  # exists
    (data,) = fill.cache.glob("summaries.lance/data/*")
    whole = bytearray(data.read_bytes())
    at = whole.index(SummaryCache.open(fill.cache).get(["a.png"])[0, 0].half().numpy().tobytes())
    whole[at] ^= 1
    data.write_bytes(whole)
    code, out, _ = run("cache", "verify", fill.cache, "--json")
    assert code == 1 and json.loads(out)["damaged"] == ["a.png"]
    code, _, err = run("cache", "stats", photos)
    assert code == 1 and "not a cache" in err


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
def test_every_codec_serves_the_commands(fill, run, checkpoint, codec):
    done = fill("--codec", codec)
    assert done["images"] == 5 and done["codec"] == codec
    ask = ("ask", "--model", checkpoint, *SHORT, "--json", QUESTION, "--cache", fill.cache, "--id", "a.png")
    assert json.loads(run(*ask)[1])["answer"] != ""
    assert run("cache", "verify", fill.cache)[0] == 0
    code, _, err = run(
        *("compress", "--model", checkpoint, "--images", fill.cache.parent / "photos"),
        *("--cache", fill.cache, "--codec", "float16"),
    )
    assert code == 1 and f"codec = {codec}" in err
    assert fill()["codec"] == codec  # without --codec, the cache's own


def test_usage(run, checkpoint, photos, tmp_path):
    for wrong in (
        ("compress", "--model", checkpoint, "--images", photos),
        ("compress", "--model", checkpoint, "--images", photos, "--cache", "a", "--output", "b"),
        ("compress", "--model", checkpoint, "--images", photos, "--output", "a", "--watch"),
        ("compress", "--model", checkpoint, "--images", photos, "--cache", "a", "--ray", "--watch"),
        ("ask", "--model", checkpoint, "--cache", "a", QUESTION),
        ("ask", "--model", checkpoint, "--cache", "a", "--id", "b", "--filter", "c", QUESTION),
        ("ask", "--image", "a", QUESTION),
        ("ask", "--model", checkpoint, "--image", "a", "--search", "b", QUESTION),
        ("ask", "--model", checkpoint, "--cache", "a", "--id", "b", "--search", "c", QUESTION),
    ):
        assert run(*wrong)[0] == 2
    code, _, err = run("search", "--model", checkpoint, "--cache", tmp_path / "no.cache", "dogs")
    assert code == 1 and "no such cache" in err


def test_watch_takes_new_files_once_they_lie_still(tmp_path):
    """A file that is still being copied, by its time, is left for the next look; a file that changed comes again."""
    calls: list[list[str]] = []
    old, new = tmp_path / "old.jpg", tmp_path / "new.jpg"
    for file in (old, new):
        file.write_text("x")
    os.utime(old, (1, 1))

    def again(fresh: list[Entry]) -> None:
        calls.append(sorted(entry.id.removesuffix(".jpg") for entry in fresh))
        if len(calls) == 1:
            os.utime(new, (2, 2))
        if len(calls) == 2:
            old.write_text("longer")
            os.utime(old, (3, 3))
        if len(calls) == 3:
            raise KeyboardInterrupt

    class Folder:
        def __iter__(self):
            return iter(paths([old, new]))

    with pytest.raises(KeyboardInterrupt):
        watch(Folder(), again, 0.01)
    assert calls == [["old"], ["new"], ["old"]]


def test_two_workers_share_the_work(checkpoint, photos, tmp_path):
    """Chunks of one image, two threads with a lock each, one with a longer list: every image is compressed once."""
    from llava_fwd2bot import load_fwd2bot
    from llava_fwd2bot.cache.compressor import Compressor
    from llava_fwd2bot.cache.format import CacheSettings
    from llava_fwd2bot.cache.pipeline import fill

    for n in range(12):
        Image.new("RGB", (20, 20), (20 * n, 0, 0)).save(photos / f"many-{n:02d}.png")
    images = paths(sorted(photos.glob("many-*.png")))
    loaded = [load_fwd2bot(checkpoint) for _ in range(2)]
    size = loaded[0][0].get_input_embeddings().weight.shape[1]
    settings = CacheSettings("f", 4, size, "float16", "mean")
    results = []

    class Slow(Compressor):
        def __call__(self, prepared):
            time.sleep(0.02)
            return super().__call__(prepared)

    def work(model, processor) -> None:
        cache = SummaryCache.create(tmp_path / "two.cache", settings)
        results.append(fill(cache, images, Slow(model, processor, 4, 1, None), chunk=1))

    threads = [threading.Thread(target=work, args=pair) for pair in loaded]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(r.compressed for r in results) == 12 and all(r.compressed for r in results)
    assert len(SummaryCache.open(tmp_path / "two.cache")) == 12
