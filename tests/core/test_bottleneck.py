"""The two passes on plain tensors: against a hand-written reference, and placeholder by placeholder."""

import pytest
import torch
from conftest import DENSE, SIZE, captions, settings, shake, standard_batch, toy_base
from torch.nn.functional import cross_entropy, normalize

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.bottleneck import collapse, compress_pass, embed
from llava_fwd2bot.compressors.averages import nested_averages
from llava_fwd2bot.compressors.linear import cached

IMAGE = 9


def ids(*rows):
    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


def test_compress_pass_is_equation_1(model64):
    """[V ; prompt ; R] through the decoder with the compress adapter, last hidden states at R: by hand, one image."""
    model = model64
    pixels = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64)
    dense = model.model.get_image_features(pixels).pooler_output[0]
    prompt = model.get_input_embeddings()(model.fwd2bot.image_prompt_ids)
    assert len(dense) == DENSE and len(prompt) > 0
    with model._stages.use("compress"):
        row = torch.cat([dense, prompt, model.fwd2bot.tokens])[None]
        expected = model.model.language_model(inputs_embeds=row).last_hidden_state[:, -4:]
    torch.testing.assert_close(model.compress(pixels), expected, rtol=0, atol=1e-12)


def test_losses_are_those_of_a_hand_written_double_pass(model64):
    """The whole of forward against the method written out for one row: both losses, one compress pass."""
    model = model64
    image, words = model.config.image_token_id, model.get_input_embeddings()
    row = [1, 300, *[image] * DENSE, 301, 302, 303]
    labels = torch.tensor([[-100] * (len(row) - 2) + row[-2:]])
    pixels = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    caption = torch.tensor([[1, 320], [1, 321]])
    out = model(
        input_ids=torch.tensor([row, row]),
        pixel_values=pixels,
        labels=labels.repeat(2, 1),
        caption_input_ids=caption,
    )
    summary = model.compress(pixels)
    nll = []
    for s in summary:
        inputs = torch.cat([words(torch.tensor(row[:2])), s, words(torch.tensor(row[-3:]))])[None]
        hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state[0]
        nll.append(cross_entropy(model.lm_head(hidden[-3:-1]), torch.tensor(row[-2:])))
    torch.testing.assert_close(out.answer_loss, torch.stack(nll).mean(), rtol=0, atol=1e-12)
    images, texts = normalize(summary.mean(1), dim=-1), normalize(model.compress_text(caption).mean(1), dim=-1)
    logits = images @ texts.T / 0.07
    expected = (cross_entropy(logits, torch.arange(2)) + cross_entropy(logits.T, torch.arange(2))) / 2
    torch.testing.assert_close(out.contrastive_loss, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.loss, out.answer_loss + out.contrastive_loss)


def test_prefix_of_the_summary_is_the_summary_of_the_prefix(model):
    """Design, fact 3: what lets one cache serve every budget."""
    pixels = torch.randn(2, 3, SIZE, SIZE)
    whole = model.compress(pixels)
    for j in (1, 2, 3):
        torch.testing.assert_close(model.compress(pixels, num_tokens=j), whole[:, :j], rtol=0, atol=1e-6)


def test_contexts_of_different_lengths_do_not_disturb_each_other(model64):
    """Hosts with a varying number of dense tokens, and texts, are padded on the right inside one pass."""
    lm, tokens = model64.model.language_model, model64.fwd2bot.tokens
    contexts = [torch.randn(n, 64, dtype=torch.float64) for n in (3, 9, 5)]
    prompt = torch.randn(2, 64, dtype=torch.float64)
    together = compress_pass(lm, contexts, prompt, tokens)
    alone = torch.cat([compress_pass(lm, [c], prompt, tokens) for c in contexts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["left", "right", "mixed"])
def test_a_mixed_batch_equals_each_row_alone(model64, padding):
    """One image, two images that touch, none: in one batch, padded on any side."""
    batch = standard_batch(model64, padding)
    labels = batch.pop("labels")
    together = model64(**batch).logits
    images = [slice(0, 1), slice(1, 3), slice(3, 3)]
    for i, at in enumerate(images):
        real = batch["attention_mask"][i].bool()
        pixels = batch["pixel_values"][at]
        alone = model64(
            input_ids=batch["input_ids"][i : i + 1, real], pixel_values=pixels if len(pixels) else None
        ).logits
        is_image = batch["input_ids"][i, real] == model64.config.image_token_id
        torch.testing.assert_close(together[i, real][~is_image], alone[0][~is_image], rtol=0, atol=1e-10)
    with_labels = model64(**batch, labels=labels).logits
    labelled = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    torch.testing.assert_close(with_labels[labelled], together[labelled], rtol=0, atol=1e-10)


def test_padding_side_does_not_change_the_loss(model64):
    losses = [model64(**standard_batch(model64, side), **captions()).loss for side in ("left", "right", "mixed")]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(losses[0], losses[2], rtol=0, atol=1e-10)


def test_one_placeholder_per_image_reads_the_same(model64):
    """Old processors write one <image>; the standard batch and that one mean the same."""
    image = model64.config.image_token_id
    pixels = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    short = torch.tensor([[1, image, image, 301, 302]])
    long = torch.tensor([[1, *[image] * (2 * DENSE), 301, 302]])
    a = model64(input_ids=short, pixel_values=pixels).logits[0, -2:]
    b = model64(input_ids=long, pixel_values=pixels).logits[0, -2:]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_collapse_keeps_text_and_k_places_per_image():
    plan = collapse(ids([1, IMAGE, IMAGE, IMAGE, 2], [3, 4]), None, IMAGE, 1, 2)
    assert plan.origin.tolist()[:5] == [0, 2, 3, 4, 5]  # the last two placeholders stay
    assert plan.is_summary.tolist()[:4] == [False, True, True, False]
    assert plan.lengths.tolist() == [4, 5]
    assert plan.image_row.tolist() == [0]


def test_collapse_repeats_a_placeholder_where_the_image_has_fewer_than_k():
    plan = collapse(torch.tensor([[1, IMAGE, 2]]), None, IMAGE, 1, 3)
    assert plan.origin.tolist() == [0, 1, 1, 1, 2]
    spread = plan.spread(torch.arange(5.0)[:, None], torch.Size((1, 3)))
    assert spread.flatten().tolist() == [0, 3, 4]  # the last summary token predicts what follows the image


@pytest.mark.parametrize("lengths", [[2, 3], None])
def test_collapse_tells_images_that_touch_apart(lengths):
    """With dense tokens at hand by their number, with a stored summary by separate runs or equal shares."""
    row = [1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 2] if lengths else [1, IMAGE, IMAGE, IMAGE, IMAGE, 2]
    plan = collapse(torch.tensor([row]), None, IMAGE, 2, 1, lengths)
    assert plan.is_summary.sum() == 2


@pytest.mark.parametrize(
    ("rows", "images", "lengths"),
    [
        ([[1, IMAGE, IMAGE, 2]], 0, None),  # a placeholder, no image
        ([[1, 2, 3]], 1, [2]),  # an image, no placeholder
        ([[1, IMAGE, IMAGE, IMAGE, 2]], 2, [3, 3]),  # fewer placeholders than images
        ([[IMAGE, IMAGE, 2, IMAGE, IMAGE]], 1, [2]),  # more placeholders than images
    ],
)
def test_placeholders_that_do_not_fit_are_an_error_with_the_counts(rows, images, lengths):
    with pytest.raises(ValueError, match=r"image\(s\) were given, but the rows hold \["):
        collapse(ids(*rows), None, IMAGE, images, 1, lengths)


def test_truncated_placeholders_are_an_error():
    """A length limit that cuts an image in row 0 would otherwise shift the images of row 1."""
    with pytest.raises(ValueError, match="row.s. .1. are cut or interrupted"):
        collapse(ids([1, IMAGE, 2, 0], [IMAGE, IMAGE, IMAGE, 3]), None, IMAGE, 2, 1, [2, 2])


def test_masked_placeholders_and_wrong_mask():
    """Padding that happens to be the image token (a processor's pad token can be anything) holds no image."""
    mask = torch.tensor([[0, 1, 1, 1]])
    assert len(collapse(torch.tensor([[IMAGE, 1, IMAGE, 2]]), mask, IMAGE, 1, 2).origin) == 4
    with pytest.raises(ValueError, match="attention_mask is"):
        collapse(torch.tensor([[1, 2]]), torch.ones(1, 3), IMAGE, 0, 1)


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_embed_pools_and_normalises(pooling):
    summary = torch.randn(2, 3, 8)
    pooled = {"mean": summary.mean(1), "last": summary[:, 2], "first": summary[:, 0]}[pooling]
    torch.testing.assert_close(embed(summary, pooling), normalize(pooled, dim=-1))
    assert embed(summary.bfloat16(), pooling).dtype == torch.float32


@pytest.mark.parametrize("bridge", ["scale", "linear"])
def test_a_bridge_starts_at_identity(processor, bridge):
    """Design, fact 9: a bridge that starts elsewhere would break the base's input space on the first step."""
    plain = shake(add_fwd2bot(toy_base(processor), settings(), processor))
    bridged = add_fwd2bot(toy_base(processor), settings(bridge=bridge), processor)
    bridged.load_state_dict(plain.state_dict(), strict=False)
    batch = standard_batch(plain)
    torch.testing.assert_close(bridged(**batch).loss, plain(**batch).loss)
    bridged(**batch).loss.backward()
    assert bridged.fwd2bot.bridge.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [49, 576, 20])
def test_averages_are_nested_and_cover_the_image(count):
    """A prefix is the same for every k, so that one cache serves all; no two are the same, and later ones see finer."""
    weights = nested_averages(count, 16)
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    assert torch.equal(weights[0], torch.full((count,), 1 / count))
    assert all(torch.equal(nested_averages(count, k), weights[:k]) for k in (1, 2, 4, 8))
    assert torch.equal(nested_averages(count, 40)[:16], weights)
    normal = torch.nn.functional.normalize(weights, dim=1)
    assert (normal @ normal.T - torch.eye(16)).max() < 0.99
    spread = -(weights * weights.clamp_min(1e-12).log()).sum(1)
    assert spread[0] > spread[1:4].max() and spread[1:4].mean() > spread[12:].mean()


def test_averages_of_a_grid_know_rows_and_columns():
    """A window in a grid is as wide as it is high; in a line there is one direction."""
    window = nested_averages(49, 16)[15].view(7, 7)
    across, down = window.sum(0), window.sum(1)
    places = torch.arange(7.0)
    spreads = [float((w * (places - (w * places).sum()) ** 2).sum()) for w in (across, down)]
    assert max(spreads) < 4 and window.max() > 3 / 49


@pytest.mark.parametrize("residual", ["average", "pool"])
def test_averages_made_at_inference_serve_training(residual, base, processor):
    """They are kept between calls; a tensor of inference mode would be refused by backward."""
    from llava_fwd2bot import add_fwd2bot

    nested_averages.cache_clear()
    cached.cache_clear()
    model = add_fwd2bot(base, settings(residual=residual), processor)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        model.compress(pixels)
    model._train_projector()
    model.train().compress(pixels).sum().backward()
