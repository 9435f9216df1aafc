"""The constraints for the extra `lmms`: pip took a newer torch, with CUDA, in place of the CPU build that was there."""

from __future__ import annotations

from importlib.metadata import requires, version
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).parents[2]


def test_torch_and_torchvision_are_pinned_within_what_is_asked_for():
    """Without a pin of torchvision pip takes the newest, which replaces torch; a pin outside the bounds fails."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints" / "lmms.txt").read_text().splitlines())
    pins = {r.name: r.specifier for r in map(requirements.Requirement, filter(None, lines))}
    assert set(pins) == {"torch", "torchvision"} and all(str(pin).startswith("==") for pin in pins.values())
    assert "constraints/lmms.txt" in (ROOT / "docs" / "evaluate.md").read_text()
    asked = [requirements.Requirement(text) for text in requires("llava_fwd2bot")]
    try:
        asked += [requirements.Requirement(text) for text in requires("lmms-eval")]
    except ImportError:  # not installed: the bounds of this package alone
        assert version("llava_fwd2bot")
    bounds = [r for r in asked if r.name in pins and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    assert {r.name for r in bounds} >= {"torch"}
    for bound in bounds:
        assert str(pins[bound.name])[2:] in bound.specifier, bound
