"""Rows -> batches, and their order: every promise of batching.py."""

from __future__ import annotations

import warnings
from collections import Counter

import data_toys
import pytest
import torch
from data_fixtures import PROCESSORS, TWO_ROUNDS, talk
from PIL import Image

from llava_fwd2bot.processing.images import open_image
from llava_fwd2bot.training.collator import IGNORE_INDEX, Fwd2BotCollator
from llava_fwd2bot.training.data import LlavaDataset
from llava_fwd2bot.training.sampler import ModalityLengthSampler


@pytest.fixture
def mixed(make):
    records = [
        {"image": "a.png", "conversations": TWO_ROUNDS, "caption": "a red cat"},
        {"conversations": talk("how many dogs?", "two")},
        {"image": ["b.png", "a.png"], "conversations": talk("<image> and <image>", "yes")},
    ]
    return make(records, [{"image": "b.png", "caption": "a mat"}])


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch(mixed, side):
    items = list(mixed)
    batch = Fwd2BotCollator(pad_token_id=0, padding_side=side)(items)
    for i, item in enumerate(items):
        real = batch["attention_mask"][i].bool()
        assert torch.equal(batch["input_ids"][i][real], item["input_ids"])
        assert torch.equal(batch["labels"][i][real], item["labels"])
        assert bool((batch["labels"][i][~real] == IGNORE_INDEX).all() and (batch["input_ids"][i][~real] == 0).all())
        assert bool(real[-1 if side == "left" else 0])
        caption = batch["caption_input_ids"][i][batch["caption_attention_mask"][i].bool()]
        assert caption.tolist() == (item["caption_ids"].tolist() if "caption_ids" in item else [])
    assert torch.equal(batch["pixel_values"], torch.cat([items[i]["pixel_values"] for i in (0, 2, 3)]))
    assert all(batch[key].dtype == torch.long for key in batch if key != "pixel_values")
    assert "image_sizes" not in batch


def test_batch_leaves_out_what_is_not_there(mixed):
    assert set(Fwd2BotCollator(0)([mixed[1]])) == {"input_ids", "attention_mask", "labels"}


# LLaVA-NeXT's pictures have different numbers of crops; a plain cat of rows fails.
def test_batch_of_next_pads_crops(make, folder):
    Image.new("RGB", (200, 20)).save(folder / "wide.png")
    records = [{"image": name, "conversations": TWO_ROUNDS} for name in ("a.png", "wide.png")]
    first, second = make(records, processor=PROCESSORS["next"])
    assert first["pixel_values"].shape[1] != second["pixel_values"].shape[1]
    batch = Fwd2BotCollator(0)([first, second])
    assert batch["image_sizes"].tolist() == [[60, 40], [20, 200]]
    for i, item in enumerate((first, second)):
        crops = item["pixel_values"].shape[1]
        assert torch.equal(batch["pixel_values"][i, :crops], item["pixel_values"][0])
        assert not bool(batch["pixel_values"][i, crops:].any())


# LLaVA-OneVision crops an image that is alone in its row: without batch_num_images a row of two trained on other
# dense tokens than the processor's own batch gives.
def test_batch_of_onevision_is_the_processors_own(make, folder):
    processor = data_toys.llava_onevision()
    records = [
        {"image": "a.png", "conversations": TWO_ROUNDS},
        {"conversations": talk("how many dogs?", "two")},
        {"image": ["b.png", "a.png"], "conversations": talk("<image> and <image>", "yes")},
    ]
    dataset = make(records, processor=processor)
    items = list(dataset)
    batch = Fwd2BotCollator(0)(items)
    images = [[open_image(folder / name) for name in names] for names in (["a.png"], ["b.png", "a.png"])]
    texts = [dataset.formatter(records[i]["conversations"])[0] for i in (0, 2)]
    expected = processor(text=texts, images=images, return_tensors="pt", padding=True)
    assert batch["batch_num_images"].tolist() == [1, 2] == expected["batch_num_images"].tolist()
    for name in ("pixel_values", "image_sizes"):
        torch.testing.assert_close(batch[name], expected[name])
    for i, row in zip((0, 2), expected["input_ids"], strict=True):
        own = row[row != processor.tokenizer.pad_token_id]
        assert torch.equal(items[i]["input_ids"], own)
    alone, together = ((items[i]["input_ids"] == processor.image_token_id).sum() for i in (0, 2))
    assert together < alone  # two images without crops are fewer tokens than one with
    named = LlavaDataset(folder / "data.json", processor, folder, image_input_names=("pixel_values",))
    assert "image_sizes" not in named[0] and "pixel_values" in named[0]


# LLaVA's most reported fault is a loss of 0 from rows whose labels were all masked: never in silence.
def test_batch_without_labels_is_an_error(make):
    dataset = make([{"id": i, "conversations": talk("how many dogs?", "two")} for i in range(7)], model_max_length=9)
    message = r'whole batch \(record 0 \(id "0"\), .* and 2 more\). Likely reasons: --model_max_length'
    with pytest.raises(ValueError, match=message):
        Fwd2BotCollator(0)(list(dataset))


# The first token is predicted from nothing, so a label there alone trains nothing either.
def test_label_on_first_token_does_not_count():
    item = {"record": "record 0", "input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, IGNORE_INDEX])}
    with pytest.raises(ValueError, match="no token to learn from"):
        Fwd2BotCollator(0)([item])


def test_single_row_without_labels_is_warned_of_once(make):
    records = [
        {"conversations": talk("q", "two")},
        {"id": "abc", "conversations": talk("how many dogs? " * 40, "two")},
    ]
    items = list(make(records, model_max_length=150))
    collator = Fwd2BotCollator(0)
    with pytest.warns(UserWarning, match=r'record 1 \(id "abc"\): no token to learn from'):
        collator(items)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator(items)


# Caption rows have no labels by design: neither error nor warning.
def test_batch_of_captions_alone_is_fine(make):
    items = list(make(captions=[{"image": name, "caption": "a cat"} for name in ("a.png", "b.png")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = Fwd2BotCollator(0)(items)
    assert batch["pixel_values"].shape[0] == 2 and bool(batch["caption_attention_mask"].all())


def test_collator_arguments():
    with pytest.raises(ValueError, match="pad_token_id is None; set tokenizer.pad_token"):
        Fwd2BotCollator(None)
    with pytest.raises(ValueError, match="padding_side should be 'right' or 'left', not 'both'"):
        Fwd2BotCollator(0, "both")


# --- sampler ---------------------------------------------------------------------------------------------------------


LENGTHS = [(1 if i % 3 else -1) * (1 + (i * 7919) % 1000) for i in range(1003)]


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 2), (16, 4), (600, 1), (2000, 1)])
def test_sampler_covers_every_index_once(batch_size, world_size):
    sampler = ModalityLengthSampler(LENGTHS, batch_size, world_size)
    assert len(sampler) == 1003 and Counter(sampler) == Counter(range(1003))


# A step of mixed modality idles the text ranks while others encode pictures; mixed lengths pad. Only the tail may mix.
def test_sampler_steps_have_one_modality_and_similar_lengths():
    order = list(ModalityLengthSampler(LENGTHS, batch_size=4, world_size=2, seed=3))
    steps = [order[i : i + 8] for i in range(0, len(order), 8)]
    whole = sum(count // 8 for count in Counter(length > 0 for length in LENGTHS).values())
    spreads = []
    for step in steps[:whole]:
        assert len({LENGTHS[i] > 0 for i in step}) == 1
        sizes = [abs(LENGTHS[i]) for i in step]
        spreads.append(max(sizes) - min(sizes))
    assert max(spreads) < 150  # unsorted steps of 8 spread over about 780 of the 1000
    firsts = [abs(LENGTHS[step[0]]) for step in steps[:whole]]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)  # no drift in length over the epoch
    assert len({LENGTHS[i] > 0 for step in steps[: whole // 4] for i in step}) == 2  # nor in modality


# Resuming skips batches by replaying the sampler: the order must come from (seed, epoch) and nothing else.
def test_sampler_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ModalityLengthSampler(LENGTHS, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(0, 2)
    torch.manual_seed(1)
    assert order(0, 2) == first
    assert order(0, 3) != first and order(1, 2) != first and order(1, 0) != order(0, 1)


def test_sampler_edges():
    assert list(ModalityLengthSampler([], 4)) == []
    assert sorted(ModalityLengthSampler([5, 6, 7], 2)) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1, not 0 and 1"):
        ModalityLengthSampler([1], 0)
