"""Rivals on the toy host: what is compared must be computed by the same, right code."""

from __future__ import annotations

import pytest
import torch
from conftest import DENSE, SIZE, settings, shake, toy_base

from eval.studies.readers import PrunedLlava, open_method, set_tokens
from eval.studies.rivals import RIVALS, KeyValueLlava, MeanPooledLlava, PooledLlava
from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot, load_fwd2bot
from llava_fwd2bot.bottleneck import embed
from llava_fwd2bot.processing.conversation import ConversationFormatter
from llava_fwd2bot.processing.generate import contiguous_head, from_summaries

HOSTS = (PooledLlava, KeyValueLlava, MeanPooledLlava)
QUESTIONS = ["is there a dog", "what is in the picture and how many dogs are there", "a cat"]
PIXELS = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def rival(processor, host: type, **changes) -> torch.nn.Module:
    config = Fwd2BotConfig(**{**settings().to_dict(), **changes})
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), config, processor, host=host))
    return model.eval()


def answers(model: torch.nn.Module, processor, k: int) -> list[str]:
    """As the study reads a method: stored summaries, questions of different lengths in one batch."""
    prompts = [ConversationFormatter(processor).prompt(question) for question in QUESTIONS]
    used = set_tokens(model, k)
    with torch.no_grad():
        state = model.compress(pixel_values=PIXELS)[[2, 0, 1], :used]
    return from_summaries(model, processor, prompts, state, max_new_tokens=4)


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


def dense_tokens(model: torch.nn.Module, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(list(model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))


def test_summaries_say_what_generate_says(processor, model64):
    """The study batches and pads; no answer may depend on it, or on which path the images take."""
    for k in (1, 4):
        assert answers(model64.eval(), processor, k) == one_by_one(model64, processor, num_tokens=k)


def test_pruning_keeps_the_most_attended_in_order(base_dir, processor):
    """With k = n nothing is pruned, so the answers are the base's; fewer are a selection in the picture's order."""
    model, _ = open_method("prune", base_dir, torch.float64)
    base, _ = open_method("base", base_dir, torch.float64)
    assert isinstance(model, PrunedLlava) and answers(model, processor, DENSE) == one_by_one(base, processor)
    seen, whole = [], model._rows
    model._rows = lambda ids, mask, visual: seen.append(visual) or whole(ids, mask, visual)
    state = model.compress(PIXELS)[[2, 0, 1]]
    answers(model, processor, 5)
    assert len(seen) == 2 and seen[1].shape[1] == 5
    for row, all_tokens in zip(seen[1], state, strict=True):
        places = [int((all_tokens == token).all(-1).nonzero()[0]) for token in row]
        assert places == sorted(set(places))
    assert len(model.model.language_model.layers) == 2  # those before the choice are put back


def test_pooling_is_a_mean_over_cells(processor):
    model = rival(processor, PooledLlava, num_summary_tokens=DENSE)
    dense = dense_tokens(model)
    torch.testing.assert_close(model.compress(PIXELS), dense)
    torch.testing.assert_close(model.compress(PIXELS, num_tokens=1)[:, 0], dense.mean(1))
    left = dense.unflatten(1, (4, 4))[:, :, :2].flatten(1, 2).mean(1)
    torch.testing.assert_close(model.compress(PIXELS, num_tokens=2)[:, 0], left)
    assert answers(model, processor, 4) == one_by_one(model, processor, num_tokens=4)
    assert answers(model, processor, 2) == one_by_one(model, processor, num_tokens=2)


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
    dense = dense_tokens(model, PIXELS[:1])[0]
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


def test_key_values_say_what_training_teaches(processor):
    """Rows of several lengths share a batch: each token must be the one that the training pass finds most likely."""
    model, prompt = rival(processor, KeyValueLlava), ConversationFormatter(processor).prompt
    ids = processor.tokenizer([prompt(q) for q in QUESTIONS], return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        state = model.compress(PIXELS)
        given = {**ids, "summary": state, "max_new_tokens": 5, "do_sample": False}
        found = model.generate(**given)[:, ids["input_ids"].shape[1] :]
        for row, mask, said, image in zip(ids["input_ids"], ids["attention_mask"].bool(), found, state, strict=True):
            whole = torch.cat([row[mask], said])[None]
            plan = model._collapse(whole, None, image[None], None)
            hidden = model._answer_hidden(plan, whole, image[None])
            likely = model.lm_head(hidden).argmax(-1)[-len(said) - 1 : -1]
            ends = (said == processor.tokenizer.eos_token_id).nonzero()
            until = int(ends[0]) + 1 if len(ends) else len(said)
            assert likely[:until].tolist() == said[:until].tolist()


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
    own, _ = open_method(next(name for name, kind in RIVALS.items() if kind is host), tmp_path / "m")
    with torch.no_grad():
        summary = own.compress(pixels.bfloat16())
        assert torch.isfinite(summary).all()
        if searches:
            texts = embed(own.compress_text(batch["caption_input_ids"]), own.fwd2bot_config.pooling)
            assert (texts.norm(dim=1) - 1).abs().max() < 0.01
        else:
            prompts = [ConversationFormatter(processor).prompt(question) for question in QUESTIONS[:2]]
            assert len(from_summaries(own, processor, prompts, summary[[1, 0], :2], max_new_tokens=3)) == 2


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
