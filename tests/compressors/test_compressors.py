"""Every compressor of the registry is held to what it declares; a new one is tested by being listed."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest
import torch
from conftest import DENSE, SIZE, settings, toy_base

from llava_fwd2bot import add_fwd2bot, load_fwd2bot
from llava_fwd2bot.cli.main import main
from llava_fwd2bot.cli.options import checked
from llava_fwd2bot.compressors import Compressor, compressor_of, compressors, has_prefixes
from llava_fwd2bot.compressors.linear import Linear
from llava_fwd2bot.config import RESIDUALS
from llava_fwd2bot.training.optimizer import split_groups

NAMES = [name for name in compressors() if name != "fwd2bot"]  # which all other tests are about
K = 4


def compressor_settings(name: str, **changes):
    compressor = compressor_of(name)
    k = min(K, compressor.max_tokens or K)
    weight = 1.0 if compressor.compares_texts else 0.0
    return settings(**{"num_summary_tokens": k, "compressor": name, "contrastive_weight": weight, **changes})


def made(name: str, processor, dtype: torch.dtype = torch.float64, **changes):
    torch.manual_seed(0)
    return add_fwd2bot(toy_base(processor, dtype), compressor_settings(name, **changes), processor)


def pixels(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_is_of_one_image_and_of_k_tokens(name, processor):
    """The other images of a batch, and their order, change nothing; k is what was asked for."""
    model, images = made(name, processor), pixels()
    summary = model.compress(images)
    assert summary.shape == (3, model.fwd2bot_config.num_summary_tokens, 64)
    for i in range(3):
        torch.testing.assert_close(model.compress(images[i : i + 1])[0], summary[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "residual"), [*((name, "none") for name in NAMES), *(("fwd2bot", name) for name in RESIDUALS)]
)
def test_prefixes_are_as_declared(name, residual, processor):
    """One stored summary serves every budget only where the first j tokens are the summary of j tokens."""
    model, images = made(name, processor, residual=residual), pixels()
    k = model.fwd2bot_config.num_summary_tokens
    same = [
        torch.allclose(model.compress(images, num_tokens=j), model.compress(images)[:, :j], rtol=1e-12, atol=1e-12)
        for j in range(1, k + 1)
    ]
    assert all(same) == has_prefixes(model.fwd2bot_config) == (compressor_of(name).prefix and residual != "pool")


@pytest.mark.parametrize("name", RESIDUALS[1:])
def test_a_residual_is_the_compressor_of_its_name(name, processor):
    """With no part of the language model left, the summary is that compressor's, bit for bit."""
    model, images = made("fwd2bot", processor, residual=name), pixels()
    model.fwd2bot.log_gain.data.fill_(-torch.inf)
    expected = made(name, processor).compress(images)
    assert torch.equal(model.compress(images), expected) and torch.equal(
        model.compress(images, num_tokens=2), made(name, processor, num_summary_tokens=2).compress(images)
    )


@pytest.mark.parametrize("settings_of", [{"residual": "pool"}, {"compressor": "pool", "contrastive_weight": 0.0}])
def test_a_summary_without_prefixes_serves_its_own_k_alone(settings_of, processor, tmp_path):
    """Fewer of its tokens are no summary: evaluators and answers would read another thing than was trained."""
    name = next(iter(settings_of))
    model = add_fwd2bot(toy_base(processor), settings(num_summary_tokens=K, **settings_of), processor)
    model.save_pretrained(tmp_path / "m", processor=processor)
    folder = str(tmp_path / "m")
    assert checked(folder, None, K)[1] == K
    with pytest.raises(ValueError, match=f"{name}='pool' the first 2 of {K} tokens are not"):
        checked(folder, 2)


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_what_trains_and_nothing_else(name, processor):
    """The answer adapter learns through the summary; a compressor's own parameters get a gradient, the base none."""
    model = made(name, processor).train()
    inputs = batch(processor)
    model(**inputs).loss.backward()
    trained = {n: p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B.answer" in n for n in trained)
    if compressor_of(name).build(64, K) is not None:
        assert all(got for n, got in trained.items() if "fwd2bot.compressor" in n and "queries" in n)
    if not compressor_of(name).runs_language_model:
        assert not any("compress." in n and "lora" in n or n == "fwd2bot.tokens" for n in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def batch(processor) -> dict[str, torch.Tensor]:
    tokenizer = processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[1, *[image] * DENSE, 7, 8, 9, 10]] * 2)
    labels = ids.masked_fill(ids == image, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels(2)}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_same_summaries(name, processor, base_dir, tmp_path):
    """The compressor's name and parameters are saved; the base is found again."""
    model = add_fwd2bot(_opened(base_dir), compressor_settings(name), processor)
    model.save_pretrained(tmp_path / "c", processor=processor)
    again, _ = load_fwd2bot(tmp_path / "c", dtype=torch.float32)
    images = pixels(dtype=torch.float32)
    assert torch.equal(again.compress(images), model.eval().compress(images))
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.is_dir()) == sorted(model._stages.names)


def _opened(base_dir):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(base_dir, dtype=torch.float32)


@pytest.mark.parametrize("name", [n for n in NAMES if not compressor_of(n).compares_texts])
def test_what_knows_no_texts_says_so(name, processor):
    """A search in words would compare with vectors of nothing; images still compare with images."""
    with pytest.raises(ValueError, match="contrastive_weight=0"):
        made(name, processor, contrastive_weight=1.0)
    model = made(name, processor)
    with pytest.raises(ValueError, match="images alone"):
        model.embed_text(torch.tensor([[5, 6, 7]]))
    assert model.embed_image(pixels()).norm(dim=1).allclose(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", [n for n, c in compressors().items() if isinstance(c, Linear)])
@pytest.mark.parametrize("count", [DENSE, 49, 50])
def test_weights_are_averages(name, count):
    """Each token is a weighted mean of dense tokens, on a grid and on a line (crops, separators)."""
    weights = compressors()[name].weights(count, K)
    assert weights.shape == (K, count) and bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(K))
    assert len({tuple(row.tolist()) for row in weights}) == K


@pytest.mark.parametrize(("name", "residual"), [("pool", "none"), ("fwd2bot", "pool")])
def test_more_tokens_than_there_are_is_an_error(name, residual, processor):
    """A grid of empty cells, or a place twice, would pass for a summary."""
    model = made(name, processor, residual=residual, num_summary_tokens=DENSE + 1)
    with pytest.raises(ValueError, match=f"cannot make {DENSE + 1} tokens of {DENSE}"):
        model.compress(pixels())


def test_pooling_to_all_tokens_is_the_image():
    """With k = n the grid's cells are the dense tokens themselves."""
    assert torch.equal(compressors()["pool"].weights(16, 16), torch.eye(16))
    assert torch.equal(compressors()["uniform"].weights(16, 16), torch.eye(16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressor": "averge"}, "compressor must be one of fwd2bot, average"),
        ({"compressor": "pool", "residual": "average"}, "residual='average' is for compressor='fwd2bot' alone"),
        ({"compressor": "last", "num_summary_tokens": 4}, "at most 1 token"),
        ({"compressor": "pool", "nested_k": [1, 2, 4]}, "the compressor 'pool' the first j .* leave nested_k out"),
        ({"residual": "pool", "nested_k": [1, 2, 4]}, "'fwd2bot' and the residual 'pool' the .* leave nested_k out"),
        ({"residual": "pol"}, "residual must be one of none, average, pool"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, processor):
    """In a sentence, and before anything is put on the model."""
    base = toy_base(processor)
    with pytest.raises(ValueError, match=message):
        add_fwd2bot(base, settings(**{"contrastive_weight": 0.0, **changes}), processor)
    assert not hasattr(base, "fwd2bot")


def test_own_parameters_train_at_the_ordinary_rate(processor):
    """At the rate of summary tokens, a hundred times higher, a query transformer gives all images one summary."""
    model = made("query", processor, torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    class Args:
        learning_rate, summary_lr, weight_decay = 1e-4, 1e-2, 0.1

    split_groups(optimizer, model, Args)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model.fwd2bot.compressor.parameters()} == {1e-4}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())


def test_another_package_adds_its_own(monkeypatch):
    """By an entry point, as lmms-eval's models; what is no compressor, or has a name that is taken, is refused."""

    def listed(value: str) -> dict[str, Compressor]:
        point = EntryPoint("x", value, "llava_fwd2bot.compressors")
        monkeypatch.setattr("llava_fwd2bot.compressors.entry_points", lambda group: [point])
        compressors.cache_clear()
        return compressors()

    try:
        assert type(listed(f"{__name__}:First")["first"]) is First
        with pytest.raises(ValueError, match="no Compressor class"):
            listed("pathlib:Path")
        with pytest.raises(ValueError, match="there is already"):
            listed("llava_fwd2bot.compressors.linear:Pool")
    finally:
        monkeypatch.undo()
        compressors.cache_clear()


class First(Linear):
    name, about, source = "first", "the first k dense tokens", "this test"

    def weights(self, count: int, j: int) -> torch.Tensor:
        return torch.eye(count)[:j]


def test_the_command_lists_them(capsys):
    """Names that `--fwd2bot_compressor` takes, for people and for programs."""
    assert main(["compressors"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in compressors())
    assert main(["compressors", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(compressors())
