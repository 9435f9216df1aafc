"""docs/scaling.md is what scripts/memory_plan.py computes, and that agrees with models, and with what was measured."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan(import_script):
    return import_script("memory_plan")


def test_the_page_has_the_tables_of_the_script(plan):
    """Figures that were typed once go stale; these are computed."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert plan.filled(page) == page, "run: python scripts/memory_plan.py --write docs/scaling.md"
    with pytest.raises(ValueError, match="0 places for the table 'memory'"):
        plan.filled("")


def test_weights_are_those_of_a_model(plan):
    """Counted from the sizes as they are in a model of the same shape; norms, biases and places are left out."""
    from bench_common import build, with_fwd2bot

    shape = plan.SHAPES["tiny"]
    model = with_fwd2bot(build(shape, torch.device("cpu"), torch.float32), 16, shape.lora_r)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trained_weights(shape) == trained
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dim() == 2)
    assert abs(plan.base_weights(shape) - frozen) < 0.1 * frozen  # the tower's word for each patch and place


def test_memory_of_one_gpu_is_about_what_was_measured(plan):
    """eval/results/gpu.md: 29.7 GiB at batch 32 with gradient checkpointing, without captions."""
    assert "29.7 GiB (step 12.9 GiB)" in (ROOT / "eval" / "results" / "gpu.md").read_text(encoding="utf-8")
    estimate = plan.memory("DDP", plan.SIZES["7B"], 1, 32, captions=False) / 2**30
    assert abs(estimate / 29.7 - 1) < 0.15


def test_splitting_saves_what_it_splits(plan):
    """On one GPU nothing is saved, on many the state goes to a share; DDP sends least and FSDP2 most."""
    shape = plan.SIZES["7B"]
    for setup in plan.SETUPS:
        few, many = (plan.state_bytes(setup, shape, gpus) for gpus in (1, 64))
        assert many <= few and plan.state_bytes(setup, shape, 1) == pytest.approx(plan.state_bytes("DDP", shape, 1))
    assert plan.state_bytes("FSDP2", shape, 64) == pytest.approx(plan.state_bytes("DDP", shape, 1) / 64)
    sent = [plan.sent_bytes(setup, shape, plan.Cluster(8), 16) for setup in plan.SETUPS]
    assert max(sent[:2]) < 0.1 * min(sent[2:])
    assert plan.sent_bytes("FSDP2", shape, plan.Cluster(1), 16) == 0
