"""SentenceTransformer opens a checkpoint, and its vectors are the model's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava_fwd2bot import register
from llava_fwd2bot.checkpoint.embedding_files import MODULES_NAME, SETTINGS_NAME, embedding_files
from llava_fwd2bot.checkpoint.read import read_checkpoint
from llava_fwd2bot.integrations.sentence_transformers import write_sentence_transformers

TEXTS = ["a dog runs over the grass", "two people in a boat"]


@pytest.fixture
def checkpoint(on_disk, processor, tmp_path):
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    return tmp_path / "m"


@pytest.fixture
def pictures():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (40, 30 + 9 * i, 3), dtype="uint8")) for i in range(3)]


@pytest.fixture
def opened(checkpoint):
    library = pytest.importorskip("sentence_transformers", minversion="6")
    register()
    return library.SentenceTransformer(str(checkpoint), device="cpu")


def text_vectors(model, processor, texts):
    ids = processor.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        return model.embed_text(ids["input_ids"], ids["attention_mask"])


def test_vectors_are_the_models_own(opened, on_disk, processor, pictures, tmp_path):
    """Another tokenisation, pooling or preparation of pictures would search another space, and nothing would say so."""
    on_disk.eval()
    texts = opened.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(texts, text_vectors(on_disk, processor, TEXTS))
    with torch.inference_mode():
        own = on_disk.embed_image(**processor.image_processor(pictures, return_tensors="pt"))
    images = opened.encode(pictures, convert_to_tensor=True)
    assert torch.equal(images, own)
    pictures[0].save(tmp_path / "a.png")
    assert torch.allclose(opened.encode(str(tmp_path / "a.png"), convert_to_tensor=True), own[0], atol=1e-6)
    assert torch.allclose(opened.similarity(texts, images), texts @ own.T, atol=1e-6)
    assert torch.allclose(images.norm(dim=1), torch.ones(3)) and opened.get_embedding_dimension() == own.shape[1]


def test_prompts_stand_before_the_text(opened, on_disk, processor):
    """A prompt that is given and not used would change no figure, and be believed."""
    found = opened.encode(TEXTS, prompt="find: ", convert_to_tensor=True)
    assert torch.equal(found, text_vectors(on_disk.eval(), processor, [f"find: {text}" for text in TEXTS]))


def test_saved_again_it_is_a_checkpoint_still(opened, tmp_path):
    """What sentence-transformers writes must open here as well, with the vectors that it had."""
    from sentence_transformers import SentenceTransformer

    opened.save(str(tmp_path / "again"))
    assert read_checkpoint(tmp_path / "again")["fwd2bot"] == opened[0].model.fwd2bot_config
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert np.array_equal(again.encode(TEXTS), opened.encode(TEXTS))


def test_a_checkpoint_of_before_gets_the_files(checkpoint, tmp_path):
    """Checkpoints were saved without them; a copy must be whole, and the one that is copied as it was."""
    for name in (MODULES_NAME, SETTINGS_NAME):
        (checkpoint / name).unlink()
    copy = write_sentence_transformers(checkpoint, tmp_path / "copy")
    assert not (checkpoint / MODULES_NAME).exists() and read_checkpoint(copy)["sha256"]
    assert write_sentence_transformers(checkpoint) == checkpoint
    for folder in (copy, checkpoint):
        assert {name: json.loads((folder / name).read_text()) for name in embedding_files()} == embedding_files()
    with pytest.raises(ValueError, match="is there already: name a new folder"):
        write_sentence_transformers(checkpoint, copy)
    with pytest.raises(FileNotFoundError, match="no Fwd2Bot checkpoint"):
        write_sentence_transformers(tmp_path)


def test_the_original_layout_is_refused(checkpoint):
    """transformers' Auto classes cannot open it: told at once, with the way out."""
    settings = json.loads((checkpoint / "fwd2bot_config.json").read_text())
    settings["base"]["fingerprint"]["class"] = "LlavaLlamaForCausalLM"
    (checkpoint / "fwd2bot_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="layout of the original LLaVA.*fwd2bot convert"):
        write_sentence_transformers(checkpoint)


def test_packaged_checkpoint_has_the_files():
    """smol-llava is what people try first."""
    from llava_fwd2bot.smol import checkpoint_folder

    found = {name: json.loads((checkpoint_folder() / name).read_text()) for name in embedding_files()}
    assert found == embedding_files()


def test_image_inputs_of_every_host_are_named():
    """sentence-transformers gives a method what its signature names: without `image_sizes` crops cannot be placed."""
    import inspect

    from llava_fwd2bot.hosts import HOSTS, host_class

    hosts = [host_class(name) for name, (module, _) in HOSTS.items() if not module.startswith("original")]
    assert len(hosts) == 3
    for host in hosts:
        assert set(host.image_input_names) < set(inspect.signature(host.embed_image).parameters)
