"""Every host of transformers by the same exactness tests. A new host is one more entry in host_toys.TOYS."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import settings, shake
from host_toys import IMAGE, TOYS, Toy
from transformers import AutoModelForImageTextToText

from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot, register
from llava_fwd2bot.hosts import HOSTS, host_class

GREEDY = {"max_new_tokens": 5, "do_sample": False}
# two images in a row, text alone, one image and padding
ROWS = ([1, ("image", 0), 5, 6, ("image", 1), 7, 8], [1, 9, 10, 11], [1, 12, ("image", 2), 13, 14])
CAPTIONS = {"caption_input_ids": torch.tensor([[20, 21, 22], [0, 0, 0], [23, 24, 0]])}
CAPTIONS["caption_attention_mask"] = (CAPTIONS["caption_input_ids"] > 0).long()


@pytest.fixture(params=list(TOYS))
def toy(request) -> Toy:
    return TOYS[request.param](torch.float64)


def fwd2bot(toy: Toy, **changes) -> torch.nn.Module:
    config = Fwd2BotConfig(**{**settings().to_dict(), "image_prompt": "", "text_prompt": "", **changes})
    return shake(add_fwd2bot(copy.deepcopy(toy.base), config, None))


def batch(toy: Toy) -> dict[str, torch.Tensor]:
    rows = toy.rows(*ROWS)
    labels = rows["input_ids"].masked_fill((rows["input_ids"] == IMAGE) | (rows["attention_mask"] == 0), -100)
    return {**rows, "labels": labels, **toy.images}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_every_host_of_transformers_is_here():
    ours = {name for name, (module, _) in HOSTS.items() if not module.startswith("original")}
    assert {toy(torch.float32).base.__class__.__name__ for toy in TOYS.values()} == ours


def test_images_of_one_batch_differ_in_length(toy):
    """What the padding tests below rest on: crops make n differ, where the host has crops."""
    assert len(set(toy.lengths)) > 1 or type(toy.base).__name__ == "LlavaForConditionalGeneration"


def test_disabled_it_is_the_base_bit_for_bit(toy):
    model = fwd2bot(toy)
    one = {**toy.rows(ROWS[2]), **toy.some(2)}
    with model.fwd2bot_disabled():
        ours, said = model(**batch(toy)), model.generate(**one, **GREEDY)
    theirs = toy.base(**batch(toy))
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    assert torch.equal(said, toy.base.generate(**one, **GREEDY))


def test_both_passes_against_a_hand_written_reference(toy):
    """Equations 1 and 2, row by row, with nothing of the plugin but its adapters."""
    model = fwd2bot(toy)
    words, decoder = model.get_input_embeddings(), model.model.language_model
    summaries, total, count = [], 0.0, 0
    with torch.no_grad():
        for i in range(3):
            dense = toy.base.model.get_image_features(**toy.some(i), return_dict=True).pooler_output[0]
            row = torch.cat([dense, model.fwd2bot.tokens.double()])
            with model._stages.use("compress"):
                summaries.append(decoder(inputs_embeds=row[None]).last_hidden_state[0, -4:])
        close(model.compress(**toy.images), torch.stack(summaries))
        for row in ROWS:
            pieces = [summaries[e[1]] if isinstance(e, tuple) else words(torch.tensor([e])) for e in row]
            target = torch.tensor([t for e in row for t in ([-100] * 4 if isinstance(e, tuple) else [e])])[1:]
            logits = model.lm_head(decoder(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state[0])[:-1]
            total += torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
            count += int((target != -100).sum())
        close(model(**batch(toy)).answer_loss, total / count)


def test_rows_alone_are_rows_of_the_batch(toy):
    """Rows of different lengths, images of different n, padding on either side: nothing may leak."""
    model = fwd2bot(toy)
    whole = model.compress(**toy.images)
    for i in range(3):
        close(model.compress(**toy.some(i))[0], whole[i])
        close(model.compress(**toy.some(i), num_tokens=2)[0], whole[i, :2])
    right = model(**batch(toy)).logits
    flipped = batch(toy)
    for name in ("input_ids", "attention_mask", "labels"):
        rows = [row[real.bool()] for row, real in zip(flipped[name], batch(toy)["attention_mask"], strict=True)]
        fill = -100 if name == "labels" else 0
        length = flipped[name].shape[1]
        flipped[name] = torch.stack([torch.cat([row.new_full((length - len(row),), fill), row]) for row in rows])
    left = model(**flipped)
    close(left.answer_loss, model(**batch(toy)).answer_loss)
    mask = batch(toy)["attention_mask"].bool()
    close(left.logits[flipped["attention_mask"].bool()], right[mask])


def test_generate_from_pixels_is_generate_from_summaries(toy):
    model = fwd2bot(toy)
    rows = toy.rows(ROWS[0], ROWS[2])
    said = model.generate(**rows, **toy.images, **GREEDY)
    assert torch.equal(said, model.generate(**rows, summary=model.compress(**toy.images), **GREEDY))
    alone = toy.rows(ROWS[2])
    out = model.generate(**alone, **toy.some(2), **GREEDY)
    assert torch.equal(out[0, alone["input_ids"].shape[1] :], said[1, rows["input_ids"].shape[1] :])
    step = model(**alone, **toy.some(2)).logits[0, -1].argmax()
    assert out[0, alone["input_ids"].shape[1]] == step


def test_gradients_reach_both_adapters_and_checkpointing_changes_nothing(toy):
    found, original = [], fwd2bot(toy)
    for checkpointing in (False, True):
        model = copy.deepcopy(original).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch(toy), **CAPTIONS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) > 2 * 2 * 7
    for name, grad in found[0].items():
        assert grad is not None and grad.abs().sum() > 0, name
        assert torch.equal(grad, found[1][name]), name
        assert "vision_tower" not in name


def test_the_checkpoint_comes_back_by_auto_classes(toy, tmp_path):
    toy.base.float().save_pretrained(tmp_path / "base")
    base = type(toy.base).from_pretrained(tmp_path / "base")
    model = shake(add_fwd2bot(base, settings(image_prompt="", text_prompt="")))
    model.eval().save_pretrained(tmp_path / "m")
    register()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    assert type(again) is host_class(type(toy.base).__name__)
    images = {n: v.float() if v.is_floating_point() else v for n, v in toy.images.items()}
    assert torch.equal(model.compress(**images), again.compress(**images))


def test_distillation_compares_the_same_tokens(toy):
    model = fwd2bot(toy, distill_weight=1.0)
    with torch.no_grad():
        for name in model._stages.names:
            for key, p in model._stages.tensors(name).items():
                p.zero_() if "lora_B" in key else None
    text = toy.rows(ROWS[1])
    mixed = {**text, "labels": text["input_ids"]}
    assert model(**mixed).distill_loss.abs() < 1e-12  # without an image, and with idle adapters, student is teacher
    assert model(**batch(toy)).distill_loss > 0


def test_videos_are_refused_by_name():
    toy = TOYS["llava_onevision"](torch.float64)
    model = fwd2bot(toy)
    with pytest.raises(ValueError, match="images, not videos"):
        model(**toy.rows(ROWS[1]), pixel_values_videos=torch.zeros(1, 1, 3, 32, 32))
