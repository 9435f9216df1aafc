"""The compress pass by vLLM: a cache filled through a stand-in over HTTP; the real engine is scripts/test_vllm.sh."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import settings, shake
from PIL import Image
from transformers import LlavaForConditionalGeneration
from vllm_toys import StandIn, served

from llava_fwd2bot import add_fwd2bot, load_fwd2bot
from llava_fwd2bot.checkpoint.export import export
from llava_fwd2bot.serving.vllm_compressor import VLLMCompressor
from llava_fwd2bot.serving.vllm_http import EngineError


@pytest.fixture(scope="module")
def place(own_base, processor, tmp_path_factory):
    model = shake(add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(own_base), settings(), processor))
    folder = tmp_path_factory.mktemp("vllm-compress")
    model.save_pretrained(folder / "m", processor=processor)
    export(folder / "m", "vllm", folder / "export")
    return folder


@pytest.fixture(scope="module")
def running(place, own_base):
    engine = StandIn(place / "export", own_base)
    with served(engine) as url:
        yield engine, url


@pytest.fixture
def engine(running):
    running[0].adapters = ["compress"]
    yield running
    running[0].fault = None


@pytest.fixture
def pictures(tmp_path):
    """Of several sizes, so that they are resized and cropped."""
    folder, random = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("a.png", (40, 50)), ("b.png", (32, 32)), ("c.png", (90, 33))):
        Image.fromarray(random.integers(0, 255, (*size, 3)).astype("uint8")).save(folder / name)
    return folder


def test_summaries_are_those_of_the_model(engine, place, pictures):
    """The engine must see the very pixels that this side would: another resampling is another picture."""
    model, _ = load_fwd2bot(place / "m")
    for source in ("export", "m"):
        client = VLLMCompressor(engine[1], place / source)
        prepared = [client.prepare(file.read_bytes(), file.name).pixels for file in sorted(pictures.iterdir())]
        summary, vectors = client(prepared)
        with torch.inference_mode():
            expected = model.compress(torch.cat([one["pixel_values"] for one in prepared]))
        torch.testing.assert_close(summary, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vectors, model.embed_image(summary=expected), rtol=1e-4, atol=1e-5)
    short, _ = VLLMCompressor(engine[1], place / "export", k=2)(prepared)
    assert torch.equal(short, summary[:, :2])


def test_a_cache_filled_by_an_engine_is_the_cache(engine, place, pictures, run, tmp_path):
    """The same command with --engine; no model is loaded here."""
    pytest.importorskip("lancedb")
    from llava_fwd2bot.cache.reader import SummaryCache

    command = ("compress", "--model", place / "m", "--images", pictures, "--codec", "float16")
    assert run(*command, "--cache", tmp_path / "own", "--device", "cpu")[0] == 0
    code, out, _ = run(*command, "--cache", tmp_path / "engine", "--engine", engine[1], "--json")
    assert code == 0 and json.loads(out)["compressed"] == 3
    own, theirs = (SummaryCache.open(tmp_path / name).get(["a.png", "b.png", "c.png"]) for name in ("own", "engine"))
    torch.testing.assert_close(theirs, own, rtol=2e-3, atol=2e-3)  # as float16 has them
    code, out, _ = run(*command, "--cache", tmp_path / "engine", "--engine", engine[1], "--json")  # nothing is new
    assert code == 0 and json.loads(out)["compressed"] == 0
    assert run("compress", "--model", place / "m", "--images", pictures, "--output", "x", "--engine", engine[1])[0] == 2
    assert run(*command, "--cache", tmp_path / "own", "--engine-key", "x")[0] == 2


def test_another_engine_is_refused(engine, place):
    """An adapter that is ignored, none, or an engine that gives something else."""
    engine[0].fault = "ignores"
    with pytest.raises(EngineError, match="exactly as without it.*--runner pooling"):
        VLLMCompressor(engine[1], place / "export")
    engine[0].fault = "short"
    with pytest.raises(EngineError, match="gave 64 numbers for an image, and a summary has 4 x 64"):
        VLLMCompressor(engine[1], place / "export")
    engine[0].fault, engine[0].adapters = None, ["answer"]
    with pytest.raises(EngineError, match="has no adapter 'compress', only llava, answer"):
        VLLMCompressor(engine[1], place / "export")
    with pytest.raises(ValueError, match="nothing that vLLM serves for the compress stage"):
        VLLMCompressor(engine[1], export(place / "m", "vllm", place / "answer", stage="answer"))


def test_fewer_tokens_than_the_engine_makes(own_base, processor, tmp_path):
    """The first cells of a grid of k are no summary; the engine knows one k. It is told before an engine is asked."""
    base = LlavaForConditionalGeneration.from_pretrained(own_base)
    add_fwd2bot(base, settings(residual="pool"), processor).save_pretrained(tmp_path / "m", processor=processor)
    export(tmp_path / "m", "vllm", tmp_path / "export")
    for source in ("export", "m"):
        with pytest.raises(ValueError, match="residual='pool' the first 2 of 4 tokens are not .* leave k out"):
            VLLMCompressor("http://localhost:9", tmp_path / source, k=2)
        with pytest.raises(EngineError):
            VLLMCompressor("http://localhost:9", tmp_path / source)


def test_an_engine_that_dies_leaves_what_was_stored(engine, place, pictures, run, tmp_path):
    """The command ends with the reason, and goes on where it was."""
    pytest.importorskip("lancedb")
    engine[0].fault = "dead"
    command = ("compress", "--model", place / "m", "--images", pictures, "--cache", tmp_path / "c")
    code, _, err = run(*command, "--engine", engine[1])
    assert code == 1 and "EngineCore encountered an issue" in err
    engine[0].fault = None
    assert run(*command, "--engine", engine[1])[0] == 0
    assert run("cache", "verify", tmp_path / "c")[0] == 0


def test_a_processor_that_changes_its_own_images_is_refused(engine, place, monkeypatch):
    """vLLM's would change the picture again."""
    client = VLLMCompressor(engine[1], place / "export")
    monkeypatch.setattr(client.files.processor.image_processor, "image_mean", [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="changes an image that it has prepared"):
        client([{"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}])
