"""`fwd2bot compress`: what it writes, what it skips, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from cli_fixtures import metadata
from safetensors.torch import load_file

import llava_fwd2bot.checkpoint.load
import llava_fwd2bot.cli.compress as cli
from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.mixin import Fwd2BotMixin
from llava_fwd2bot.processing.images import open_image


def test_compress_writes_what_compress_gives(run, checkpoint, photos, tmp_path):
    """The file is the interface to search and to ask: names, order, numbers and metadata are all promised."""
    output = tmp_path / "new" / "s.safetensors"
    code, out, err = run(
        "compress", "--model", checkpoint, "--images", photos, "--output", output, "--batch-size", 2, "--device", "cpu"
    )
    assert code == 0
    ids = ["a.png", "b.png", "beach/a.png", "beach/z.jpg", "pixel.png"]
    meta, tensors = metadata(output), load_file(output)
    assert json.loads(meta["ids"]) == ids and meta["k"] == "4"
    assert [entry["id"] for entry in json.loads(meta["skipped"])] == ["beach/truncated.jpg", "text.jpg"]
    assert meta["version"] == llava_fwd2bot.__version__ and len(meta["fingerprint"]) == 64
    assert {n: (x.dtype, list(x.shape)) for n, x in tensors.items()} == {
        "summary": (torch.float16, [5, 4, 64]),
        "embedding": (torch.float32, [5, 64]),
    }
    loaded, processor = load_fwd2bot(checkpoint)
    pixels = processor.image_processor(images=[open_image(photos / name) for name in ids], return_tensors="pt")
    with torch.no_grad():
        summary = loaded.compress(**pixels)
        torch.testing.assert_close(tensors["summary"].float(), summary, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(tensors["embedding"], loaded.embed_image(summary=summary), rtol=1e-5, atol=1e-5)
    assert "5 images" in out and "2 skipped" in out
    assert f"{photos / 'text.jpg'}: not a picture" in err and f"{photos / 'beach/truncated.jpg'}: damaged" in err
    assert "image/s" in err  # the progress bar's rate
    assert [p.name for p in output.parent.iterdir()] == [output.name]  # nothing left beside it


def test_compress_k_is_a_prefix(run, checkpoint, photos, stored, tmp_path):
    """Fewer tokens cost less and are the first rows of the same summary."""
    output = tmp_path / "two.safetensors"
    code, out, _ = run(
        *("compress", "--model", checkpoint, "--images", photos, "--output", output, "--k", 2, "--json"),
        *("--store-dtype", "float32", "--device", "cpu"),
    )
    assert code == 0 and json.loads(out)["k"] == 2 and metadata(output)["k"] == "2"
    torch.testing.assert_close(load_file(output)["summary"], load_file(stored)["summary"][:, :2], rtol=1e-4, atol=1e-5)


def test_compress_json(run, checkpoint, photos, tmp_path):
    """One object on stdout, with the skipped images and why."""
    output = tmp_path / "s.safetensors"
    code, out, _ = run("compress", "--model", checkpoint, "--images", photos, "--output", output, "--json")
    done = json.loads(out)
    assert code == 0 and done["images"] == 5 and done["bytes"] == output.stat().st_size
    assert {entry["id"] for entry in done["skipped"]} == {"text.jpg", "beach/truncated.jpg"}
    assert all(entry["reason"] for entry in done["skipped"])


def test_compress_files_with_the_same_name(run, checkpoint, photos, tmp_path):
    """Files are known by name; two of one name by the path as given, a file given twice once, a missing one skipped."""
    a, z, again = photos / "a.png", photos / "beach/z.jpg", photos / "beach/a.png"
    output = tmp_path / "s.safetensors"
    code, out, err = run(
        *("compress", "--model", checkpoint, "--output", output, "--json"),
        *("--images", a, z, again, a, photos / "gone.png"),
    )
    assert code == 0 and json.loads(metadata(output)["ids"]) == [a.as_posix(), "z.jpg", again.as_posix()]
    assert [entry["id"] for entry in json.loads(out)["skipped"]] == ["gone.png"] and "gone.png: no such file" in err


def test_compress_max_pixels(run, checkpoint, photos, tmp_path):
    """A decompression bomb in a crawled folder costs its own summary and nothing else."""
    output = tmp_path / "s.safetensors"
    code, out, err = run(
        "compress", "--model", checkpoint, "--images", photos, "--output", output, "--max-pixels", 100, "--json"
    )
    assert code == 0 and json.loads(metadata(output)["ids"]) == ["pixel.png"]
    assert "40" in err and "over the limit of 100" in err


def test_compress_with_nothing_to_compress(run, checkpoint, photos, tmp_path):
    """No image at all is an error, and leaves no file that looks like a result."""
    output, empty = tmp_path / "s.safetensors", tmp_path / "empty"
    empty.mkdir()
    for images, said in (
        ((photos / "text.jpg",), "None of the 1 image(s) could be used"),
        ((photos / "text.jpg", photos / "missing.png"), "None of the 2"),
        ((empty,), "no image file in"),
    ):
        code, out, err = run("compress", "--model", checkpoint, "--images", *images, "--output", output)
        assert (code, out) == (1, "") and said in err.splitlines()[-1]
        assert not list(tmp_path.glob("*s.safetensors*"))


def test_compress_keeps_what_is_there(run, checkpoint, photos, stored, monkeypatch):
    """Hours of work are not overwritten by a repeated command; with --overwrite they are, and only by a whole file."""
    before = stored.read_bytes()
    command = ("compress", "--model", checkpoint, "--images", photos, "--output", stored)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "load_model", lambda *args: pytest.fail("the model was loaded first"))
        code, out, err = run(*command)
        assert (code, out) == (1, "") and "--overwrite" in err and stored.read_bytes() == before

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llava_fwd2bot.cache.summary_file.save_file", full)
        code, out, err = run(*command, "--overwrite")
        assert (code, out) == (1, "") and "No space left on device" in err and stored.read_bytes() == before
        assert not [p for p in stored.parent.iterdir() if p.name.startswith(".")]
    assert run(*command, "--overwrite")[0] == 0
    assert load_file(stored)["summary"].dtype == torch.float16


def test_compress_checks_the_output_before_the_work(run, checkpoint, photos, tmp_path, monkeypatch):
    """An output that cannot be written is told in a second, not after the last image."""
    monkeypatch.setattr(cli, "load_model", lambda *args: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("a regular file")
    for output in (tmp_path / "file" / "s.safetensors", tmp_path / "file" / "sub" / "s.safetensors", tmp_path):
        code, out, err = run("compress", "--model", checkpoint, "--images", photos, "--output", output)
        assert (code, out) == (1, "") and "--output" in err and str(output) in err


def test_compress_leaves_out_what_overflows(run, checkpoint, photos, tmp_path, monkeypatch):
    """An infinite summary on disk poisons every answer and every search from it, silently."""
    compress = Fwd2BotMixin.compress

    def large(self, pixel_values, **kwargs):
        summary = compress(self, pixel_values, **kwargs)
        summary[0] *= 1e6
        return summary

    monkeypatch.setattr(Fwd2BotMixin, "compress", large)
    output = tmp_path / "s.safetensors"
    command = ("compress", "--model", checkpoint, "--images", photos, "--output", output, "--device", "cpu")
    code, _, err = run(*command)
    assert code == 0 and "a.png: its summary overflows" in err
    assert json.loads(metadata(output)["ids"]) == ["b.png", "beach/a.png", "beach/z.jpg", "pixel.png"]
    assert torch.isfinite(load_file(output)["summary"]).all()
    assert run(*command, "--overwrite", "--store-dtype", "bfloat16")[0] == 0
    assert len(json.loads(metadata(output)["ids"])) == 5
