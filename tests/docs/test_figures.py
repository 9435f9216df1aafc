"""The figures in README and docs are those of the result files: a result that is measured again must change both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results"
LONG = ("cells, long", "pool-distill, long")  # of smol196


@pytest.fixture(scope="module")
def smol() -> dict[tuple[str, str, int], dict]:
    rows = json.loads((RESULTS / "smol.json").read_text())["figures"]
    return {(row["figure"], row["row"], row["k"]): row for row in rows}


@pytest.mark.parametrize(("task", "words"), [("caption", "images"), ("exists", "questions")])
def test_retention_in_the_readme(smol, task, words):
    row = smol[task, "fwd2bot", 16]
    low, high = (f"{100 * x:.1f}" for x in row["share_interval"])
    count = row["items"]
    line = f"| {100 * row['share']:.1f} % [{low}, {high}] of the base |"
    found = [text for text in (ROOT / "README.md").read_text().splitlines() if line in text]
    assert len(found) == 1 and f"n = {count:,} {words}" in found[0]


def test_the_table_of_smol_llava(smol):
    page = (ROOT / "docs" / "results" / "index.md").read_text()
    for k in (1, 2, 4, 8, 16):
        cells = [f"{2 * 576 * k:,}"]
        for task, unit in (("caption", ""), ("exists", " %")):
            row = smol[task, "fwd2bot", k]
            cells.append(f"{100 * row['value']:.1f}{unit} ({100 * row['share']:.1f} %)")
        assert f"| {' | '.join(cells)} |" in page


def test_pooling_is_level(smol):
    """The most important negative result: the README's figure is the claim's, at k = 16, with its interval."""
    claims = json.loads((RESULTS / "smol.json").read_text())["claims"]
    rows = [one for one in claims if "same k" in one["claim"]]
    row = next(r for r in rows if (r["figure"], r["against"], r["k"]) == ("caption", "pool", 16))
    value, low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in (row["value"], *row["interval"]))
    assert f"{value} [{low}, {high.lstrip('+')}] points of CIDEr" in (ROOT / "README.md").read_text()


def test_the_cost_page(smol):
    from eval.studies.cost_plot import table

    page = (RESULTS / "cost.md").read_text()
    for line in table(json.loads((RESULTS / "cost_smol.json").read_text()), 16).splitlines()[2:]:
        numbers = [cell.strip() for cell in line.split("|")[2:-2] if cell.strip()]
        assert any(all(f"| {n} " in text for n in numbers) for text in page.splitlines()), line


def test_what_is_said_of_quantised_models():
    """8 bits: no interval excludes the float model; 4 bits: yes/no as well, captions' does; the 7B's bytes."""
    from eval.studies.quantised import shapes

    found = {(f["figure"], f["row"]): f for f in json.loads((RESULTS / "quantised.json").read_text())["figures"]}

    def interval(task: str, precision: str) -> tuple[float, float]:
        return found[task, f"{precision} → {precision}"]["share_interval"]

    for task in ("exists", "caption", "retrieval", "sugarcrepe"):
        low, high = interval(task, "8-bit")
        assert low <= 1 <= high
    for precision in ("nf4", "nf4 double"):
        low, high = interval("exists", precision)
        assert low <= 1 <= high and interval("caption", precision)[1] < 1
    assert found["caption", "float32 → float32"]["items"] == 60
    (row,) = (row for row in shapes() if row["lora_r"] == 64 and not row["tower"])
    assert f"takes {row['ratio']:.2f} of the" in (ROOT / "docs" / "results" / "index.md").read_text()


def test_the_figures_of_196_tokens():
    """README's comparison with pooling is that of the claims, and the tables' shares are those of the figures."""
    found = json.loads((RESULTS / "smol196.json").read_text())
    shares = {(f["row"], f["k"]): f"{100 * f['value']:.1f}" for f in found["figures"] if f["figure"] == "share"}
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    for k in (1, 16):
        (row,) = (c for c in found["claims"] if (c["ours"], c["against"], c["k"], c["at"]) == (*LONG, k, k))
        value, low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in (row["value"], *row["interval"]))
        assert f"({value} [{low.lstrip('+')}, {high.lstrip('+')}])" in readme
        for name in LONG:
            assert shares[name, k] in readme
    assert f"recipe {shares['fwd2bot, long', 16]};" in readme
    page = (ROOT / "docs" / "results" / "index.md").read_text().replace("*", "")
    train = (ROOT / "docs" / "train.md").read_text()
    for name in (
        *LONG,
        "residual, long",
        "fwd2bot, long",
        "kv-distill, long",
        "cells",
        "pool-distill",
        "query-distill",
    ):
        assert f"| {' | '.join(shares[name, k] for k in (1, 2, 4, 8, 16))} |" in page, name
    for name in (LONG[0], "residual, long", "fwd2bot, long"):
        assert f"| {shares[name, 16]} % |" in train, name
