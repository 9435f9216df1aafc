"""POPE and MME have intervals in the report: their figures are no means, so counts are drawn, by image."""

from __future__ import annotations

import json

import numpy as np
import pytest
from score_toys import TOYS, toy_score

from llava_fwd2bot.cli.main import main
from llava_fwd2bot.evaluation.report import compare
from llava_fwd2bot.evaluation.resample import counts, interval
from llava_fwd2bot.evaluation.results import read_results


def pope_items(rate, images=60, seed=0):
    """Three categories, two questions each about every image; `rate` of the answers are right."""
    generator = np.random.default_rng(seed)
    found = []
    for image in range(images):
        for category in ("adversarial", "popular", "random"):
            for right in (1, 0):
                hit = generator.random() < rate
                found.append([f"{image}.jpg", category, int(right if hit else not right), right])
    return {"kind": "pope", "items": found}


def f1_by_hand(items):
    found = []
    for category in sorted({item[1] for item in items}):
        own = [(said, right) for _, c, said, right in items if c == category]
        both = sum(s and r for s, r in own)
        precision, recall = both / sum(s for s, _ in own), both / sum(r for _, r in own)
        found.append(2 * precision * recall / (precision + recall))
    return sum(found) / len(found)


def test_counts_give_the_figures_of_the_scorers(tmp_path):
    """An interval around another figure than the one beside it would be worse than none."""
    parts = pope_items(0.8)
    assert counts(parts).value == pytest.approx(f1_by_hand(parts["items"]))
    for name in ("pope", "mme"):
        (tmp_path / name).mkdir()
        for texts in (TOYS[name][1], dict.fromkeys(TOYS[name][1], "Yes")):
            score = toy_score(tmp_path / name, name, texts)
            assert counts(score.parts).value == pytest.approx(next(iter(score.figures.values())))


def test_interval_is_that_of_a_plain_bootstrap():
    """The same draws by hand, each figure from its items: of POPE over images, of MME within a task."""
    parts = pope_items(0.8, images=12)
    own = counts(parts)
    generator, drawn = np.random.default_rng(0), []
    for _ in range(200):
        picked = [own.images[i] for i in generator.choice(np.arange(12), 12)]
        drawn.append(f1_by_hand([item for image in picked for item in parts["items"] if item[0] == image]))
    assert interval(own, rounds=200) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    tasks = [[f"{t}/{i}", t, int((i + q) % (3 + q) > 0)] for t in ("color", "count") for i in range(9) for q in (0, 1)]
    low, high = interval(counts({"kind": "mme", "items": tasks}))
    assert low < counts({"kind": "mme", "items": tasks}).value < high and 0 <= low and high <= 400


def test_a_pair_is_drawn_together_and_equal_sides_have_a_ratio_of_one():
    """Unpaired, the interval of a model against itself would not be one point."""
    own = counts(pope_items(0.7))
    assert interval(own, own) == (1.0, 1.0)
    low, high = interval(counts(pope_items(0.95, seed=1)), own)
    assert 1.1 < low < high < 1.8
    with pytest.raises(ValueError, match="the same images: 60 and 59"):
        interval(own, counts(pope_items(0.7, images=59)))


def test_report_has_the_intervals(tmp_path):
    """Beside a figure without one a difference of any size looks as good as another."""
    for name, k, parts in (("base", "dense", pope_items(0.9)), ("m", 4, pope_items(0.8, seed=1))):
        figure = counts(parts).value
        items = {str(i): float(said == right) for i, (*_, said, right) in enumerate(parts["items"])}
        result = {"benchmark": "pope", "figures": {"f1": figure}, "model": name, "k": k, "per_item": items}
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, "parts": parts}))
    base, own = compare(read_results([tmp_path]).results)
    for row in (base, own):
        assert row["interval"][0] < row["value"] < row["interval"][1]
    assert own["retention_interval"][0] < own["retention"] < own["retention_interval"][1] < 1


def test_score_writes_what_the_report_draws(tmp_path, capsys):
    """By the command, from answers to the report."""
    for path, content in TOYS["pope"][0].items():
        (tmp_path / path).write_text(content)
    answers = [{"question_id": i, "text": text, "model_id": "m"} for i, text in TOYS["pope"][1].items()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    argv = ["eval", "score", "pope", "--answers", tmp_path / "a.jsonl", "--ground-truth", tmp_path]
    argv += ["--questions", tmp_path / "q.jsonl", "--k", "4", "--output", tmp_path / "out" / "r.json"]
    (tmp_path / "out").mkdir()
    assert main(list(map(str, argv))) == 0
    (row,) = compare(read_results([tmp_path / "out"]).results)
    assert row["value"] == 1.0 and row["interval"][1] == 1.0
