"""The public methods on one model: compress, embed, forward, generate, disabled."""

import copy

import pytest
import torch
from conftest import DENSE, SIZE, captions, settings, standard_batch, toy_base
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer

from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot
from llava_fwd2bot.modeling.objective import Fwd2BotOutput

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def prompt(model, side="mixed"):
    batch = standard_batch(model, side)
    batch.pop("labels")
    return batch


def test_generate_from_pixels_is_generate_from_the_summary(model):
    """What a cache promises: identical ids."""
    batch = prompt(model)
    pixels = batch.pop("pixel_values")
    from_pixels = model.generate(**batch, pixel_values=pixels, **GREEDY)
    from_summary = model.generate(**batch, summary=model.compress(pixels), **GREEDY)
    assert torch.equal(from_pixels, from_summary)
    assert torch.equal(from_pixels[:, : batch["input_ids"].shape[1]], batch["input_ids"])


def test_generate_is_greedy_by_forward(model):
    """Step by step with forward on the growing standard batch, without a cache: the same ids."""
    batch = prompt(model, "left")
    out = model.generate(**batch, **GREEDY)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(6):
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"]).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    new = out[:, batch["input_ids"].shape[1] :]
    for mine, expected in zip(new, ids[:, -6:], strict=True):
        ended = (mine == 2).nonzero()  # after the end of a row generate writes padding
        n = int(ended[0]) + 1 if len(ended) else 6
        assert torch.equal(mine[:n], expected[:n])


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_generate_in_a_batch_is_generate_alone(model64, side):
    batch = prompt(model64, side)
    together = model64.generate(**batch, **GREEDY)[:, -6:]
    images = [slice(0, 1), slice(1, 3), None]
    for i, at in enumerate(images):
        real = batch["attention_mask"][i].bool()
        pixels = {} if at is None else {"pixel_values": batch["pixel_values"][at]}
        alone = model64.generate(input_ids=batch["input_ids"][i : i + 1, real], **pixels, **GREEDY)
        alone = alone[0, int(real.sum()) :]
        assert torch.equal(together[i, : len(alone)], alone)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "max_new_tokens": 4, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 4, "num_return_sequences": 2},
        {"max_new_tokens": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"generation_config": GenerationConfig(max_new_tokens=3, do_sample=False)},
        {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True},
    ],
)
def test_generate_takes_what_the_base_takes(model, options):
    """Code written for the base passes these; the shape and the prompt must be the base's."""
    batch = prompt(model, "left")
    out = model.generate(**batch, **options, min_new_tokens=3)
    with model.fwd2bot_disabled():
        base = model.generate(**batch, **options, min_new_tokens=3)
    if not isinstance(out, torch.Tensor):
        assert out.keys() >= {"sequences", "scores"}
        out, base = out.sequences, base.sequences
    length = batch["input_ids"].shape[1]
    assert len(out) == len(base) and torch.equal(out[:, :length], base[:, :length])
    assert out.shape[1] > length


def test_max_length_counts_the_prompt_as_the_base_does(model):
    batch = prompt(model, "left")
    length = batch["input_ids"].shape[1] + 5
    for options in ({"max_length": length}, {"generation_config": GenerationConfig(max_length=length)}):
        assert model.generate(**batch, **options, min_length=length, do_sample=False).shape[1] == length


def test_streamer_sees_the_prompt_then_the_new_tokens(model, processor):
    batch = {k: v[:1] for k, v in prompt(model, "left").items()}
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=10)
    out = model.generate(**batch, **GREEDY, streamer=streamer)
    text = "".join(streamer)
    assert text == processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :])


def test_what_watches_the_generation_sees_the_callers_prompt(model):
    """Criteria and processors written for LLaVA look behind the prompt's length."""
    seen = []
    batch = {k: v[:1] for k, v in prompt(model, "left").items()}
    length = batch["input_ids"].shape[1]

    def watch(ids, scores):
        seen.append(ids.shape[1])
        assert torch.equal(ids[:, :length], batch["input_ids"])
        return scores

    def stop(ids, scores):
        return torch.tensor([ids.shape[1] == length + 3])

    def allowed(row, ids):
        assert torch.equal(ids[:length], batch["input_ids"][row])
        return [5, 6]

    out = model.generate(
        **batch,
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([watch]),
        stopping_criteria=StoppingCriteriaList([stop]),
        prefix_allowed_tokens_fn=allowed,
    )
    assert seen == [length, length + 1, length + 2] and set(out[0, length:].tolist()) <= {5, 6}


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_disabled_is_the_base_for_beams_over_several_images(processor, options):
    """generate decides by the names of forward's arguments how it spreads images over beams."""
    base = toy_base(processor)
    model = add_fwd2bot(copy.deepcopy(base), settings(), processor)
    batch = prompt(model, "left")
    with model.fwd2bot_disabled():
        ours = model.generate(**batch, **options, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, base.generate(**batch, **options, max_new_tokens=4, do_sample=False))


def test_as_a_tuple_the_loss_is_first_and_the_logits_second(model):
    """Trainers and metrics of transformers count on that order."""
    batch = standard_batch(model)
    for pairs in ({}, captions()):
        out = model(**batch, **pairs)
        assert out[0] is out.loss and out[1] is out.logits
        assert torch.equal(model(**batch, **pairs, return_dict=False)[0], out.loss)


def test_a_weight_of_zero_skips_the_contrastive_pass(processor):
    model = add_fwd2bot(toy_base(processor), settings(contrastive_weight=0.0), processor)
    model.compress_text = None  # would raise if it were called
    assert model(**standard_batch(model), **captions()).contrastive_loss is None


def test_generate_without_a_mask_tells_padding_from_the_ids(model):
    batch = prompt(model, "left")
    mask = batch.pop("attention_mask")
    model.generation_config.pad_token_id = 0
    assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, attention_mask=mask, **GREEDY))


def test_disabled_is_the_base_bit_for_bit(processor):
    """Undoing must be total: forward, loss, generation."""
    base = toy_base(processor)
    twin = copy.deepcopy(base)
    from conftest import shake

    model = shake(add_fwd2bot(twin, settings(), processor, train_projector=True))
    with torch.no_grad():
        for p in model.trained_projector().parameters():
            p.add_(1)
    batch = standard_batch(model, "left")
    with model.fwd2bot_disabled():
        ours = model(**batch)
        generated = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, **GREEDY)
    expected = base(**batch)
    assert torch.equal(ours.logits, expected.logits) and torch.equal(ours.loss, expected.loss)
    assert torch.equal(generated, base.generate(**{k: v for k, v in batch.items() if k != "labels"}, **GREEDY))
    assert not torch.equal(model(**batch).loss, expected.loss)
    with model.fwd2bot_disabled(), pytest.raises(ValueError, match="no summaries inside"):
        model.compress(batch["pixel_values"])


def test_a_trained_projector_is_a_copy(processor):
    model = add_fwd2bot(toy_base(processor), settings(), processor, train_projector=True)
    model(**standard_batch(model)).loss.backward()
    slot = model.model.multi_modal_projector
    assert slot.copy.linear_1.weight.grad.abs().sum() > 0 and slot.original.linear_1.weight.grad is None


def test_forward_gives_losses_and_logits_at_the_callers_positions(model):
    batch = standard_batch(model)
    out = model(**batch, **captions())
    assert isinstance(out, Fwd2BotOutput)
    assert out.logits.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)
    assert out.loss == out.answer_loss + out.contrastive_loss
    unlabelled = torch.ones_like(batch["labels"], dtype=torch.bool)
    unlabelled[:, :-1] = batch["labels"][:, 1:] == -100
    assert (out.logits[unlabelled] == 0).all() and (out.logits[~unlabelled] != 0).any(-1).all()
    assert model(**batch, return_logits=False).logits is None


def test_the_head_runs_only_where_a_label_is(model):
    """Design, fact 4: never on the compress pass, and in the answer pass on labelled places alone."""
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    batch = standard_batch(model)
    model(**batch, **captions())
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())]
    model.compress(batch["pixel_values"])
    assert len(rows) == 1


def test_summary_stands_for_pixels_in_training_too(model64):
    batch = standard_batch(model64)
    expected = model64(**batch).loss
    summary = model64.compress(batch.pop("pixel_values"))
    torch.testing.assert_close(model64(**batch, summary=summary).loss, expected)
    torch.testing.assert_close(
        model64(**batch, summary=summary, num_tokens=2).loss, model64(**batch, summary=summary[:, :2]).loss
    )


def test_embeddings_are_unit_vectors_of_the_same_space(model):
    pixels = torch.randn(3, 3, SIZE, SIZE)
    images = model.embed_image(pixels)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(model.embed_image(summary=model.compress(pixels)), images)
    torch.testing.assert_close(
        model.embed_image(summary=model.compress(pixels), num_tokens=2), model.embed_image(pixels, num_tokens=2)
    )
    ids = torch.tensor([[0, 1, 320, 321], [1, 320, 321, 0]])
    texts = model.embed_text(ids, (ids > 0).long())
    torch.testing.assert_close(texts[0], texts[1])  # padding side does not matter
    ids[1, 2] = 322  # equal captions would be no negatives of each other
    out = model(pixel_values=pixels[:2], caption_input_ids=ids, caption_attention_mask=(ids > 0).long())
    assert out.contrastive_loss > 0 and out.answer_loss is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m.compress(), "needs pixel_values"),
        (lambda m, b: m.compress(b["pixel_values"], num_tokens=5), "from 1 to this model's k = 4, got 5"),
        (lambda m, b: m.compress(b["pixel_values"], num_tokens=0), "got 0"),
        (lambda m, b: m.embed_image(summary=torch.zeros(1, 4, 64), num_tokens=0), "from 1 to the 4 given, got 0"),
        (lambda m, b: m(labels=b["input_ids"], summary=torch.zeros(3, 4, 64)), "labels need input_ids"),
        (lambda m, b: m(**b, summary=torch.zeros(3, 4, 64)), "not both"),
        (lambda m, b: m(input_ids=b["input_ids"], summary=torch.zeros(3, 4, 32)), r"must be \[images, tokens, 64\]"),
        (lambda m, b: m(input_ids=b["input_ids"], summary=torch.zeros(3, 4, 64), num_tokens=9), "from 1 to the 4"),
        (lambda m, b: m(input_ids=b["input_ids"]), "0 image.s. were given"),
        (lambda m, b: m.generate(input_ids=b["input_ids"]), "0 image.s. were given"),
        (lambda m, b: m.generate(pixel_values=b["pixel_values"]), "needs input_ids"),
        (
            lambda m, b: m(**b, position_ids=torch.zeros_like(b["input_ids"])),
            "neither past_key_values nor position_ids",
        ),
        (lambda m, b: m.compress_text(torch.ones(1, 2).long(), torch.zeros(1, 2)), r"rows \[0\] are empty"),
    ],
)
def test_bad_calls_say_what_to_do(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, prompt(model))


def test_text_only_calls_go_through(model):
    ids = torch.tensor([[1, 300, 301]])
    assert model(input_ids=ids).logits.shape[:2] == (1, 3)
    assert model.generate(input_ids=ids, **GREEDY).shape[1] > 3
    assert model(input_ids=ids, labels=ids).answer_loss > 0


def test_adding_twice_or_to_another_model_is_refused(model, processor):
    with pytest.raises(ValueError, match="has Fwd2Bot already"):
        add_fwd2bot(model, settings(), processor)
    with pytest.raises(ValueError, match="No Fwd2Bot host for Linear.*LlavaForConditionalGeneration"):
        add_fwd2bot(torch.nn.Linear(2, 2))


def test_a_model_from_nowhere_gets_no_prompt_and_a_warning(processor):
    with pytest.warns(UserWarning, match="runs without its prompts"):
        model = add_fwd2bot(toy_base(processor), settings())
    assert len(model.fwd2bot.image_prompt_ids) == 0
    assert model.compress(torch.randn(1, 3, SIZE, SIZE)).shape == (1, 4, 64)


def test_prompts_come_from_the_tokenizer(model, processor):
    ids = processor.tokenizer(Fwd2BotConfig().image_prompt, add_special_tokens=False)["input_ids"]
    assert model.fwd2bot.image_prompt_ids.tolist() == ids


def test_the_vision_tower_never_runs_for_a_summary(model):
    batch = prompt(model)
    summary = model.compress(batch.pop("pixel_values"))

    def fail(*args):
        raise AssertionError("the vision tower ran")

    model.model.vision_tower.register_forward_pre_hook(fail)
    model.generate(**batch, summary=summary, **GREEDY)
    assert DENSE > summary.shape[1]
