"""The losses on plain tensors, and chunks and ranks, which must change nothing."""

import math

import pytest
import torch
from conftest import captions, settings, shake, standard_batch, toy_base
from torch.nn.functional import normalize

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.losses import MAX_LOGIT_SCALE, contrastive_loss, distillation_loss
from llava_fwd2bot.modeling import summaries


def unit(n, seed):
    return normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_contrastive_loss_of_known_pairs():
    """Orthogonal pairs at temperature 1: -log(e / (e + C - 1)), by hand."""
    eye = torch.eye(3, dtype=torch.float64)
    loss, accuracy = contrastive_loss(eye, eye, torch.tensor(0.0))
    assert loss == pytest.approx(-math.log(math.e / (math.e + 2)))
    assert accuracy == 1


def test_contrastive_loss_is_symmetric():
    a, b = unit(5, 0), unit(5, 1)
    scale = torch.tensor(2.0)
    torch.testing.assert_close(contrastive_loss(a, b, scale), contrastive_loss(b, a, scale))


def test_contrastive_logits_are_float32_under_autocast():
    """At a temperature of 0.01 a product in bfloat16 moves logits by a quarter, and the gradient with them."""
    a, b = (normalize(torch.randn(64, 512, generator=torch.Generator().manual_seed(i)), dim=-1) for i in range(2))
    found = []
    for enabled in (False, True):
        leaf = a.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = contrastive_loss(leaf, leaf.detach() * 0.3 + b, torch.tensor(MAX_LOGIT_SCALE))
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_distillation_is_zero_for_the_teacher_itself_and_gives_it_no_gradient():
    student = torch.randn(4, 9, requires_grad=True)
    teacher = student.detach().clone().requires_grad_(True)
    loss = distillation_loss(student, teacher)
    assert loss.abs() < 1e-6
    distillation_loss(student, teacher + 1 * torch.arange(9.0)).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunked_gradients_are_those_of_the_whole(processor, chunk, checkpointing):
    """GradCache must not change the loss, with per-layer checkpointing inside it or not."""
    grads = []
    for size in (None, chunk):
        torch.manual_seed(0)
        base = toy_base(processor, torch.float64)
        model = shake(add_fwd2bot(base, settings(contrastive_chunk=size), processor)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(**standard_batch(model), **captions())
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": out.loss})
    assert grads[0].keys() == grads[1].keys()
    assert max((grads[0][n] - grads[1][n]).abs().max() for n in grads[0]) <= 1e-10


def test_the_temperature_is_clamped(processor):
    model = add_fwd2bot(toy_base(processor), settings(temperature_init=0.001), processor).train()
    out = model(**standard_batch(model), **captions())
    assert out.temperature == pytest.approx(0.01, rel=1e-3)
    assert model.fwd2bot.logit_scale <= MAX_LOGIT_SCALE


def test_distillation_compares_with_the_base_on_dense_tokens(processor):
    """The teacher is the model itself with Fwd2Bot off, at the same places."""
    torch.manual_seed(0)
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(distill_weight=0.5), processor))
    batch = standard_batch(model, "right")
    out = model(**batch)
    labelled = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    with torch.no_grad(), model.fwd2bot_disabled():
        teacher = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[labelled]
    student = out.logits[labelled]
    torch.testing.assert_close(out.distill_loss, distillation_loss(student, teacher), rtol=0, atol=1e-8)
    torch.testing.assert_close(out.loss, out.answer_loss + 0.5 * out.distill_loss)


def test_rows_feed_what_they_can(model64):
    """A row with a caption alone costs no answer pass; a row with an answer alone is no pair."""
    batch, pairs = standard_batch(model64), captions()
    batch["labels"][0] = -100
    out = model64(**batch, **pairs)
    whole = model64(**batch)
    torch.testing.assert_close(out.answer_loss, whole.answer_loss)
    only_pairs = model64(**{**batch, "labels": torch.full_like(batch["labels"], -100)}, **pairs)
    assert only_pairs.answer_loss is None
    torch.testing.assert_close(only_pairs.contrastive_loss, out.contrastive_loss)


def test_errors_name_the_rows(model):
    batch, pairs = standard_batch(model), captions()
    pairs["caption_input_ids"][2], pairs["caption_attention_mask"][2] = 320, 1
    with pytest.raises(ValueError, match=r"Row\(s\) \[2\] have a caption, but no image"):
        model(**batch, **pairs)
    with pytest.raises(ValueError, match="2 captions for 3 rows"):
        model(**batch, caption_input_ids=pairs["caption_input_ids"][:2])
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="nothing to learn from"):
        model(**batch)


def test_nested_k_draws_a_prefix_in_training_only(processor):
    """One model for every budget: each length must be drawn, and evaluation must use all."""
    model = shake(add_fwd2bot(toy_base(processor), settings(nested_k=[1, 2, 4]), processor))
    seen = []
    compress = model._compress
    model._compress = lambda contexts, prompt, j: seen.append(j) or compress(contexts, prompt, j)
    batch = standard_batch(model)
    model.train()
    for _ in range(20):
        model(**batch)
    assert set(seen) == {1, 2, 4}
    seen.clear()
    model.eval()(**batch)
    assert seen == [None]


def test_prefix_lengths_depend_on_seed_and_step_alone(processor):
    """Drawn from the global generator, and only for images, ranks part for ever after one batch of text."""
    model = shake(add_fwd2bot(toy_base(processor), settings(nested_k=[1, 2, 4]), processor)).train()
    batch = standard_batch(model)
    text = {name: value[2:] for name, value in batch.items() if name != "pixel_values"}

    def lengths(seed, first, *batches):
        model.draw_from(seed, first)
        seen = []
        whole = model._compress
        model._compress = lambda contexts, prompt, j: seen.append(j) or whole(contexts, prompt, j)
        for given in batches:
            torch.rand(3)  # dropout, say
            model(**given)
        del model._compress
        return seen

    drawn = lengths(7, 0, *[batch] * 8)
    assert len(set(drawn)) > 1 and lengths(8, 0, *[batch] * 8) != drawn
    assert lengths(7, 0, text, batch, text, *[batch] * 5) == [drawn[1], *drawn[3:]]
    assert lengths(7, 5, *[batch] * 3) == drawn[5:]  # resumed


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("nested", [None, [1, 2]])
def test_chunks_of_pairs_alone(processor, pooling, nested):
    """Without labels chunks keep pooled vectors, not summaries: loss, gradients and the log are those of the whole."""
    found = []
    for size in (None, 2):
        torch.manual_seed(0)
        own = settings(contrastive_chunk=size, pooling=pooling, nested_k=nested)
        model = shake(add_fwd2bot(toy_base(processor, torch.float64), own, processor)).train()
        batch = {name: value for name, value in standard_batch(model).items() if name != "labels"}
        pooled = model._pool_images({"pixel_values": batch["pixel_values"]}, None)
        assert (pooled and list(pooled[0].shape)) == (size and [3, 1, 64])
        for _ in range(4 if nested else 1):  # several prefix lengths
            out = model(**batch, **captions())
            out.loss.backward()
            found.append({"loss": out.loss, "accuracy": out.retrieval_accuracy, "cosine": out.summary_cosine})
        found[-1].update({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    half = len(found) // 2
    for whole, chunked in zip(found[:half], found[half:], strict=True):
        assert {n for n, v in whole.items() if v is not None} == {n for n, v in chunked.items() if v is not None}
        differences = [(v - chunked[n]).abs().max() for n, v in whole.items() if v is not None]
        assert max(differences) <= 1e-10


def test_chunks_keep_the_random_state_of_their_device(processor, monkeypatch):
    """Checkpoints find the device by their tensors: without one, a GPU's dropout would differ in backward."""
    model = shake(add_fwd2bot(toy_base(processor), settings(contrastive_chunk=1), processor)).train()
    devices, whole = [], summaries.checkpoint

    def seen(run, *given, **options):
        devices.append({value.device for value in given if isinstance(value, torch.Tensor)})
        return whole(run, *given, **options)

    monkeypatch.setattr(summaries, "checkpoint", seen)
    model(**standard_batch(model), **captions()).loss.backward()
    assert devices == [{model.fwd2bot.tokens.device}] * 5  # three images and two captions
