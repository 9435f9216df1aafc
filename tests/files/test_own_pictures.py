"""People's own pictures: `ask`, `compress` and `search` turn them upright; a cache never mixes two ways of reading."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from cli_fixtures import SHORT, metadata
from PIL import Image
from safetensors.torch import load_file

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.cache.compressor import Compressor


@pytest.fixture
def turned(tmp_path):
    """The same scene as a telephone writes it and as it looks; and one on nothing, and on white."""
    folder = tmp_path / "own"
    folder.mkdir()
    scene = Image.effect_noise((48, 32), 90).convert("RGB")
    scene.paste((255, 0, 0), (0, 0, 24, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.transpose(Image.Transpose.ROTATE_90).save(folder / "phone.png", exif=exif)
    scene.save(folder / "upright.png")
    scene.transpose(Image.Transpose.ROTATE_90).save(folder / "fallen.png")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(folder / "logo.png")
    Image.new("RGB", (32, 32), (255, 255, 255)).save(folder / "white.png")
    return folder


def summaries(path) -> dict[str, torch.Tensor]:
    return dict(zip(json.loads(metadata(path)["ids"]), load_file(path)["summary"], strict=True))


def test_compress_turns_and_flattens(run, checkpoint, turned, tmp_path):
    command = ("compress", "--model", checkpoint, "--images", turned, "--device", "cpu", "--batch-size", 1)
    assert run(*command, "--output", tmp_path / "on.st")[0] == 0
    on, told = summaries(tmp_path / "on.st"), metadata(tmp_path / "on.st")
    assert torch.equal(on["phone.png"], on["upright.png"]) and not torch.equal(on["phone.png"], on["fallen.png"])
    assert torch.equal(on["logo.png"], on["white.png"])
    assert (told["exif_orientation"], told["transparency"]) == ("on", "white")
    assert run(*command, "--output", tmp_path / "off.st", "--exif-orientation", "off")[0] == 0
    off = summaries(tmp_path / "off.st")
    assert torch.equal(off["phone.png"], off["fallen.png"]) and torch.equal(off["logo.png"], off["white.png"])
    assert metadata(tmp_path / "off.st")["exif_orientation"] == "off"


def test_ask_turns_and_flattens(run, checkpoint, turned, monkeypatch):
    """Seen by what the model is given: answers of a toy may agree by chance."""
    import llava_fwd2bot.processing.generate

    given, prepare = [], llava_fwd2bot.processing.generate.prepare_pixels
    monkeypatch.setattr(
        llava_fwd2bot.processing.generate,
        "prepare_pixels",
        lambda p, m, images: given.extend(images) or prepare(p, m, images),
    )
    for name in ("phone", "upright", "logo", "white"):
        assert run("ask", "--model", checkpoint, "--image", turned / f"{name}.png", "what?", *SHORT)[0] == 0
    assert given[0].tobytes() == given[1].tobytes() and given[2].tobytes() == given[3].tobytes()
    off = ("--exif-orientation", "off")
    assert run("ask", "--model", checkpoint, "--image", turned / "phone.png", "what?", *SHORT, *off)[0] == 0
    assert given[-1].tobytes() == Image.open(turned / "fallen.png").tobytes()
    code, _, err = run("ask", "--model", checkpoint, "--summaries", "x.st", "--id", "a", "what?", *off)
    assert code == 2 and "--exif-orientation goes with --image" in err


def test_eval_and_training_read_as_llava_does(checkpoint, turned):
    """Benchmarks' figures are of pictures as they lie in the file."""
    from llava_fwd2bot.evaluation.encode import Encoder
    from llava_fwd2bot.processing.images import ImageReader

    model, processor = load_fwd2bot(checkpoint)
    found = Encoder(model, processor, "x").images([turned / "phone.png", turned / "fallen.png"])
    assert torch.equal(found[0], found[1])
    pixels, _ = ImageReader(processor, turned)(["phone.png", "fallen.png"])
    assert torch.equal(pixels["pixel_values"][0], pixels["pixel_values"][1])


def test_pictures_of_a_benchmark_are_bounded_too(checkpoint):
    """lmms-eval hands over pictures, not files; the base's own preparation would take gigabytes of a thin one."""
    from llava_fwd2bot.processing.generate import from_base
    from llava_fwd2bot.processing.images import ImageError

    model, processor = load_fwd2bot(checkpoint)
    with pytest.raises(ImageError, match="an image: 1x60000 becomes"):
        from_base(model, processor, "<image>what?", [Image.new("RGB", (1, 60_000))], max_new_tokens=1)


def test_a_cache_keeps_to_its_own_way(run, checkpoint, turned, tmp_path, monkeypatch):
    """The settings state it; an old cache, which states nothing, goes on as it was made, and says so."""
    lancedb = pytest.importorskip("lancedb")  # noqa: F841
    from llava_fwd2bot.cache import maintenance as cache_tools
    from llava_fwd2bot.cache.format import SETTINGS, CacheSettings
    from llava_fwd2bot.cache.pipeline import fill
    from llava_fwd2bot.cache.reader import SummaryCache

    new, old = tmp_path / "new.cache", tmp_path / "old.cache"
    command = ("compress", "--model", checkpoint, "--images", turned, "--device", "cpu", "--batch-size", 1, "--json")
    code, out, err = run(*command, "--cache", new)
    assert code == 0 and json.loads(out)["exif_orientation"] == "on" and "keeps its settings" not in err
    cache = SummaryCache.open(new)
    assert (cache.settings.exif_orientation, cache.settings.transparency) == ("on", "white")
    phone, upright = cache.get(["phone.png", "upright.png"])
    assert torch.equal(phone, upright)
    code, _, err = run(*command, "--cache", new, "--exif-orientation", "off")
    assert code == 1 and "was made with --exif-orientation on, which cannot be mixed" in err

    def asdict(settings: CacheSettings) -> dict:  # as before there were such settings
        return {n: v for n, v in vars(settings).items() if n not in ("exif_orientation", "transparency")}

    told = {**vars(cache.settings), "exif_orientation": "off", "transparency": "hidden"}
    with monkeypatch.context() as patch:
        patch.setattr("llava_fwd2bot.cache.tables.asdict", asdict)
        SummaryCache.create(old, CacheSettings(**told))
    import lancedb as database

    meta = json.loads(database.connect(str(old)).open_table("summaries").schema.metadata[SETTINGS])
    assert "exif_orientation" not in meta
    code, out, err = run(*command, "--cache", old)
    assert code == 0 and json.loads(out)["exif_orientation"] == "off"
    assert "keeps its settings (exif orientation: off, transparency: hidden)" in err
    phone, fallen, logo, white = SummaryCache.open(old).get(["phone.png", "fallen.png", "logo.png", "white.png"])
    assert torch.equal(phone, fallen) and not torch.equal(logo, white)
    code, _, err = run(*command, "--cache", old, "--exif-orientation", "on")
    assert code == 1 and "was made with --exif-orientation off" in err
    with pytest.raises(ValueError, match="has exif_orientation = on"):
        cache_tools.merge(SummaryCache.open(old), cache)
    with pytest.raises(ValueError, match="and the compressor reads with"):
        fill(cache, [], Compressor(*load_fwd2bot(checkpoint)))
    for path, nearest in ((new, {"phone.png", "upright.png"}), (old, {"phone.png", "fallen.png"})):
        code, out, _ = run("search", "--cache", path, "--image", turned / "phone.png", "--top", 2, "--json")
        assert code == 0 and {hit["id"] for hit in json.loads(out)["hits"]} == nearest


def test_a_pipe_among_the_images_is_skipped(run, checkpoint, turned, tmp_path):
    """`compress` waited for ever; with a cache, before it had even looked at the next."""
    pytest.importorskip("lancedb")
    os.mkfifo(turned / "pipe.jpg")
    command = ("compress", "--model", checkpoint, "--images", turned, "--device", "cpu", "--json")
    targets = [("--output", tmp_path / "s.st"), ("--cache", tmp_path / "s.cache")]
    found = []
    thread = threading.Thread(target=lambda: found.extend(run(*command, *target) for target in targets), daemon=True)
    thread.start()
    thread.join(60)
    assert len(found) == 2
    for code, out, _ in found:
        done = json.loads(out)
        assert code == 0 and done["images"] == 5 and [entry["id"] for entry in done["skipped"]] == ["pipe.jpg"]
        assert "named pipe" in done["skipped"][0]["reason"]


def test_a_thin_picture_is_skipped_by_name(run, checkpoint, turned, tmp_path):
    """One of them ended the run, out of memory; the others are compressed."""
    Image.new("RGB", (1, 60_000)).save(turned / "thin.png")
    command = ("compress", "--model", checkpoint, "--images", turned, "--device", "cpu", "--json")
    code, out, err = run(*command, "--output", tmp_path / "s.st")
    assert code == 0 and [entry["id"] for entry in json.loads(out)["skipped"]] == ["thin.png"]
    assert "thin.png: 1x60000 becomes 61,440,000 pixels when the model's image processor" in err
    code, _, err = run("ask", "--model", checkpoint, "--image", turned / "thin.png", "what?", *SHORT)
    assert code == 1 and "thin.png: 1x60000 becomes" in err
