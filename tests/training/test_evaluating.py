"""Evaluation while training: losses and R@1 of fixed data, the best checkpoint, early stopping, curves of collapse."""

import json
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize
from train_toys import command, history

from llava_fwd2bot.bottleneck import summary_cosine
from llava_fwd2bot.training.command import train
from llava_fwd2bot.training.evaluating import pool_metrics

EVALUATION = ("eval_loss", "eval_answer_loss", "eval_contrastive_loss", "eval_summary_cosine")
R_AT_1 = ("eval_image_to_text_R@1", "eval_text_to_image_R@1")


def evaluations(output):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_loss" in entry]


def evaluating(base_dir, llava_data, output, *more):
    own = ("--eval_data_path", str(llava_data["data"]), "--eval_strategy", "steps", "--eval_steps", "2")
    return command(base_dir, llava_data, output, *own, "--max_steps", "4", *more)


@pytest.mark.parametrize("size", ["1", "5"])
def test_evaluation_is_logged_and_does_not_depend_on_its_batches(base_dir, llava_data, tmp_path, size):
    """An answer loss that is a mean of batches' means, or negatives of one batch, would change with the batch size."""
    train(evaluating(base_dir, llava_data, tmp_path / size, "--per_device_eval_batch_size", size))
    train(evaluating(base_dir, llava_data, tmp_path / "other", "--per_device_eval_batch_size", "12"))
    found, other = evaluations(tmp_path / size), evaluations(tmp_path / "other")
    assert [entry["step"] for entry in found] == [2, 4]
    for one, two in zip(found, other, strict=True):
        for name in (*EVALUATION[:3], *R_AT_1):
            assert math.isclose(one[name], two[name], rel_tol=1e-4), name
        assert one["eval_loss"] == pytest.approx(one["eval_answer_loss"] + one["eval_contrastive_loss"])
        assert 0 <= one[R_AT_1[0]] <= 1 and -1 <= one["eval_summary_cosine"] <= 1


def test_best_checkpoint_and_early_stopping(base_dir, llava_data, tmp_path):
    """At a rate that breaks the model the first evaluation is the best: training ends, and that one is the result."""
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss", "--eval_on_start", "True")
    saving = ("--save_strategy", "steps", "--save_steps", "1", "--eval_steps", "1", "--early_stopping_patience", "2")
    more = (*best, *saving, "--learning_rate", "30.0", "--max_steps", "12", "--save_total_limit", "20")
    output = train(evaluating(base_dir, llava_data, tmp_path / "m", *more))
    state = json.loads((output / "trainer_state.json").read_text())
    scored = {entry["step"]: entry["eval_loss"] for entry in evaluations(output) if entry["step"]}
    assert state["global_step"] < 12
    kept = min(scored, key=scored.get)
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{kept}") and kept < state["global_step"]
    saved = (output / f"checkpoint-{kept}" / "fwd2bot.safetensors").read_bytes()
    assert (output / "fwd2bot.safetensors").read_bytes() == saved


def test_captions_alone_can_be_evaluated(base_dir, llava_data, tmp_path):
    records = json.loads(llava_data["data"].read_text())
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([{"image": r["image"], "caption": f"{r['id']} dogs"} for r in records]))
    own = ("--eval_caption_data", str(captions), "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "2")
    train(command(base_dir, llava_data, tmp_path / "m", *own))
    (found,) = evaluations(tmp_path / "m")
    assert "eval_answer_loss" not in found and found["eval_loss"] == pytest.approx(found["eval_contrastive_loss"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_data_path", "DATA"), "--eval_strategy is no"),
        (("--eval_data_path", "DATA", "--eval_strategy", "steps", "--early_stopping_patience", "3"), "early_stopping"),
        (
            ("--eval_data_path", "DATA", "--eval_strategy", "steps", "--eval_pool", "1"),
            "--eval_pool must be",
        ),
    ],
)
def test_what_an_evaluation_lacks_is_told(base_dir, llava_data, tmp_path, more, message):
    more = [str(llava_data["data"]) if word == "DATA" else word for word in more]
    with pytest.raises(ValueError, match=message):
        train(command(base_dir, llava_data, tmp_path / "m", *more))


def test_curves_of_collapse_and_of_each_stage(base_dir, llava_data, tmp_path):
    """A stage that gets no gradient, or summaries whose tokens all say the same, show in the log of every step."""
    train(command(base_dir, llava_data, tmp_path / "m", "--max_steps", "2"))
    for entry in history(tmp_path / "m"):
        assert -1 <= entry["summary_cosine"] <= 1
        assert entry["grad_norm_compress"] > 0 and entry["grad_norm_answer"] > 0
        assert entry["grad_norm_summary_tokens"] > 0
        parts = [entry[f"grad_norm_{name}"] for name in ("compress", "answer", "summary_tokens")]
        assert math.hypot(*parts) <= entry["grad_norm"] * 1.001  # the temperature's is in the whole alone


def test_summary_cosine_is_the_mean_over_pairs():
    summary = torch.randn(3, 4, 8, dtype=torch.float64)
    pairs = [cosine_similarity(s[a], s[b], dim=0) for s in summary for a in range(4) for b in range(4) if a != b]
    torch.testing.assert_close(summary_cosine(summary), torch.stack(pairs).mean())
    torch.testing.assert_close(summary_cosine(torch.ones(2, 4, 8)), torch.tensor(1.0))


def test_the_pool_counts_each_pair_once_and_all_that_belong():
    """Two captions of one image are both right for it; a row that fills up the last batch changes nothing."""
    vectors = normalize(torch.eye(4)[[0, 0, 1, 2]] + 0.1, dim=-1)
    texts = normalize(torch.eye(4)[[0, 0, 1, 1]] + 0.1, dim=-1)  # the last is nearest to the third image
    keys = torch.tensor([[1, 11], [1, 12], [2, 13], [3, 14]])
    found = pool_metrics(vectors, texts, keys, torch.tensor([1.0]))
    assert found["image_to_text_R@1"] == pytest.approx(2 / 3)  # of three images
    assert found["text_to_image_R@1"] == pytest.approx(3 / 4)  # of four texts
    again = [0, 1, 2, 3, 0, 2]
    assert pool_metrics(vectors[again], texts[again], keys[again], torch.tensor([1.0])) == found
    assert pool_metrics(vectors[:1], texts[:1], keys[:1], torch.tensor([1.0])) == {}
