"""scripts/bench_cost.py: the cost of a checkpoint against its base."""

from __future__ import annotations

import json

import pytest


def test_cost_against_the_base(import_script, checkpoint, tmp_path, capsys):
    """Operations are exact: an answer from fewer tokens is less work, and break-even is where the sums cross."""
    bench = import_script("bench_cost")
    for wrong in ({"rounds": 0}, {"new_tokens": 0}):  # said by what is wrong, not by what failed of it
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1, got 0"):
            bench.cost(None, None, [1], **wrong)
    argv = ["--model", str(checkpoint), "--k", "1", "4", "--rounds", "2", "--new-tokens", "3", "--device", "cpu"]
    bench.main([*argv, "--batch-size", "2", "--output", str(tmp_path / "cost.json")])
    out = capsys.readouterr().out
    assert "parameters are Fwd2Bot's" in out and "time to first token, base / Fwd2Bot" in out
    found = json.loads((tmp_path / "cost.json").read_text())
    work = found["flops"]
    assert work["answer, k=1"] < work["answer, k=4"] < work["base"]
    # but for what is computed once for a batch, such as the angles of the positions
    assert work["compress, k=4, 2 at once"] == pytest.approx(2 * work["compress, k=4, 1 at once"], rel=1e-3)
    assert found["dense_tokens"] == 16 and found["bytes_per_image"]["summary k=4"] == 4 * 64 * 2
    expected = work["compress, k=4, 1 at once"] // (work["base"] - work["answer, k=4"]) + 1
    assert found["rows"][1]["break_even_flops"] == expected
    assert bench.break_even(10, 1, 3) == 6 and bench.break_even(10, 3, 3) is None and bench.break_even(0.1, 1, 3) == 1


COST = {
    "evaluator": "cost",
    "model": "m",
    "parameters": {"all": 1000, "fwd2bot": 10},
    "bytes_per_image": {"dense": 64},
    "flops": {"base": 4e9, "answer, k=8": 5e9, "compress, k=8, 4 at once": 9e9},
    "milliseconds": {name: {"median": t} for name, t in (("base", 20.0), ("answer, k=8", 30.0))},
    "rows": [{"k": 8, "by": "time", "2 questions, over base": 1.5, "break_even": None, "break_even_flops": None}],
}
COST["milliseconds"]["compress, k=8, 4 at once"] = {"median": 40.0}
COST["peak_memory"] = {"bytes": dict.fromkeys(COST["flops"], 1e6)}


def test_a_break_even_that_is_never_reached_is_explained(import_script):
    """The word alone leaves open whether it was measured; both costs stand below the table."""
    out = import_script("bench_cost").table(COST)
    assert "| 8 | 1.50 | never | never |" in out and "| compress, k=8, batch of 4 | 9.00 |" in out
    assert "time of 2 questions, Fwd2Bot / base" in out and "5.00 GFLOP" in out
    assert out.count("Never, by ") == 2 and "one answer from the summary takes 30.0 ms, one by the base" in out
