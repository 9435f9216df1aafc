"""Readers and rivals on the toy host: what is compared must be computed by the same, right code."""

from __future__ import annotations

import pytest
import torch
from conftest import DENSE, SIZE, settings, shake, toy_base

from eval.studies.readers import (
    BaseReader,
    KeyValueReader,
    PooledReader,
    PrunedReader,
    SummaryReader,
    open_reader,
)
from eval.studies.rivals import RIVALS, KeyValueLlava, MeanPooledLlava, PooledLlava
from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot, load_fwd2bot
from llava_fwd2bot.processing.generate import contiguous_head

HOSTS = (PooledLlava, KeyValueLlava, MeanPooledLlava)
QUESTIONS = ["is there a dog", "what is in the picture and how many dogs are there", "a cat"]
PIXELS = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def rival(processor, host: type, **changes) -> torch.nn.Module:
    config = Fwd2BotConfig(**{**settings().to_dict(), **changes})
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), config, processor, host=host))
    return model.eval()


def answers(reader: BaseReader, k: int, batch_size: int = 2) -> list[str]:
    return reader.answer(reader.encode(PIXELS), [2, 0, 1], QUESTIONS, k, 4, batch_size)


def one_by_one(model: torch.nn.Module, processor, **more) -> list[str]:
    """The same through the processor and `generate`, as a user would, without batches."""
    found = []
    for image, question in zip([2, 0, 1], QUESTIONS, strict=True):
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        text = text.replace("<image>", "<image>" * DENSE)
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, pixel_values=PIXELS[[image]], max_new_tokens=4, do_sample=False, **more)
        found.append(processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def test_base_and_summary_readers_say_what_generate_says(processor, model64):
    """The readers batch, sort and pad; no answer may depend on it, or on which path the images take."""
    base = toy_base(processor, torch.float64)
    assert answers(BaseReader(base, processor), 0) == one_by_one(base, processor)
    for k in (1, 4):
        assert answers(SummaryReader(model64, processor), k) == one_by_one(model64.eval(), processor, num_tokens=k)


def test_pruning_keeps_the_most_attended_in_order(processor):
    """With k = n nothing is pruned, so the answers are the base's; fewer are a selection in the picture's order."""
    reader = PrunedReader(toy_base(processor, torch.float64), processor)
    assert answers(reader, DENSE) == answers(BaseReader(reader.model, processor), 0)
    state = reader.encode(PIXELS)
    with torch.no_grad():
        kept = reader.visual(state, 5, QUESTIONS)
    for row, all_tokens in zip(kept, state, strict=True):
        places = [int((all_tokens == token).all(-1).nonzero()[0]) for token in row]
        assert places == sorted(set(places))
    assert len(reader.model.model.language_model.layers) == 2


def test_pooling_is_a_mean_over_cells(processor):
    model = rival(processor, PooledLlava, num_summary_tokens=DENSE)
    dense = BaseReader(model, processor).encode(PIXELS)
    torch.testing.assert_close(model.compress(PIXELS), dense)
    torch.testing.assert_close(model.compress(PIXELS, num_tokens=1)[:, 0], dense.mean(1))
    left = dense.unflatten(1, (4, 4))[:, :, :2].flatten(1, 2).mean(1)
    torch.testing.assert_close(model.compress(PIXELS, num_tokens=2)[:, 0], left)
    assert answers(PooledReader(model, processor), 4) == one_by_one(model, processor, num_tokens=4)


def test_fewer_tokens_are_a_prefix(processor):
    """One stored state serves every budget, as it does for Fwd2Bot; else the comparison would not be at equal terms."""
    model = rival(processor, KeyValueLlava)
    whole = model.compress(PIXELS)
    for k in (1, 2):
        torch.testing.assert_close(model.compress(PIXELS, num_tokens=k), whole[:, :k])


def test_key_values_are_one_pass_with_a_mask(processor):
    """VoCo-LLaMA's definition: one sequence [V; prompt; R; text], in which the text sees R and itself alone."""
    model = rival(processor, KeyValueLlava, adapters="shared").eval()
    state = model.compress(PIXELS[:1])
    text = torch.tensor([5, 9, 30, 31, 12])
    words = model.get_input_embeddings()
    dense = BaseReader(model, processor).encode(PIXELS[:1])[0]
    tail = torch.cat([words(model.fwd2bot.image_prompt_ids), model.fwd2bot.tokens.double()])
    row = torch.cat([dense, tail, words(text)])[None]
    n, k = len(row[0]) - len(text), state.shape[1]
    mask = torch.ones(len(row[0]), len(row[0])).tril().bool()
    mask[n:, : n - k] = False
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    places = torch.arange(len(row[0]))[None] + k - n
    with torch.no_grad():
        language_model = model._language_model()
        joint = language_model(inputs_embeds=row, attention_mask=bias[None, None], position_ids=places, use_cache=False)
        places = k + torch.arange(len(text))[None]
        past = {model.past_name: model.stored(state)}
        two = language_model(inputs_embeds=words(text)[None], position_ids=places, **past)
    torch.testing.assert_close(two.last_hidden_state[0], joint.last_hidden_state[0, n:], rtol=1e-9, atol=1e-9)


def test_key_value_reader_says_what_training_teaches(processor):
    """Its greedy loop is its own: each token must be the one that the training pass finds most likely there."""
    model = rival(processor, KeyValueLlava)
    reader = KeyValueReader(model, processor)
    state = reader.encode(PIXELS)
    with torch.inference_mode():
        found = reader._generate(state, QUESTIONS, 4, 5)
        for row, (image, question) in enumerate(zip(state, QUESTIONS, strict=True)):
            ids, _ = reader._ids([question], DENSE)
            whole = torch.cat([ids, found[row][None]], 1)
            plan = model._collapse(whole, None, image[None], None)
            hidden = model._answer_hidden(plan, whole, image[None])
            said = model.lm_head(hidden).argmax(-1)[-found.shape[1] - 1 : -1]
            ends = (found[row] == processor.tokenizer.eos_token_id).nonzero()
            until = int(ends[0]) + 1 if len(ends) else found.shape[1]
            assert said[:until].tolist() == found[row][:until].tolist()


@pytest.mark.parametrize(
    ("host", "compressor"), [*((host, "fwd2bot") for host in HOSTS), (None, "query"), (None, "last")]
)
def test_rivals_train_and_come_back_from_disk(base_dir, processor, tmp_path, host, compressor):
    """A rival whose own parts got no gradient, or were not saved, would lose for the wrong reason."""
    from transformers import LlavaForConditionalGeneration

    searches = host is MeanPooledLlava or compressor == "last"
    weights = {"num_summary_tokens": 1 if searches else 4, "contrastive_weight": 1.0 if searches else 0.0}
    config = settings(**weights, compressor=compressor)
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    model = shake(add_fwd2bot(base, config, processor, host=host)).train()
    pixels, image = PIXELS[:2].float(), base.config.image_token_id
    ids = torch.tensor([[1, *[image] * DENSE, 20 + i, 30, 31] for i in range(2)])
    batch = {"input_ids": ids, "pixel_values": pixels}
    if searches:
        batch["caption_input_ids"] = torch.tensor([[20, 21, 22], [33, 34, 35]])
    else:
        batch["labels"] = ids.masked_fill(ids == image, -100)
    model(**batch).loss.backward()
    own = [n for n, p in model.fwd2bot.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    expected = {KeyValueLlava: "tokens", MeanPooledLlava: "text_head.weight"}.get(host, "")
    expected = "compressor.queries" if compressor == "query" else expected
    assert expected in [*own, ""]
    stages = {"compress": host is KeyValueLlava or compressor == "last", "answer": not searches}
    if compressor == "query":  # which has no adapter of that stage
        del stages["compress"]
    for stage, trains in stages.items():
        grads = [p.grad for p in model._stages.tensors(stage).values()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == trains, stage
    model.eval().save_pretrained(tmp_path / "m", processor=processor)
    again, _ = load_fwd2bot(tmp_path / "m", host=host)
    assert torch.equal(model.compress(pixels), again.compress(pixels))
    # as the table opens it, in bfloat16
    reader = open_reader(next(name for name, kind in RIVALS.items() if kind is host), tmp_path / "m")
    assert torch.isfinite(reader.encode(pixels)).all()
    if searches:
        texts = reader.text_states(["a dog", "a cat"])
        assert (reader.embed_images(texts, 1).norm(dim=1) - 1).abs().max() < 0.01
    else:
        assert len(reader.answer(reader.encode(pixels), [1, 0], QUESTIONS[:2], 2, 3)) == 2


def test_the_head_of_a_batch_is_given_rows_that_lie_together(model):
    """A strided slice makes a CPU copy the head for each row in bfloat16; the hook is gone afterwards."""
    head, seen = model.get_output_embeddings(), []
    watch = head.register_forward_hook(lambda _, given, out: seen.append(given[0].is_contiguous()))
    states = torch.randn(3, 5, head.weight.shape[1])[:, -1:]
    with contiguous_head(model):
        inside = head(states)
    outside = head(states)
    watch.remove()
    assert seen == [True, False]
    torch.testing.assert_close(inside, outside)
