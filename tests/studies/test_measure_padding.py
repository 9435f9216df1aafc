"""The shares of padding in docs/train.md are those of the script."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(import_script):
    return import_script("measure_padding")


def test_padding_is_what_rows_lack_of_the_longest(script):
    """Two batches of two: 3 + 5 of 2 × 5, and an image's k beside the text."""
    assert script.padding([0, 1, 2, 3], [-3, -5, -4, 4], 2, 16) == pytest.approx(1 - (8 + 24) / (10 + 40))


def test_the_page_has_the_shares_of_the_script(script):
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    found = script.shares(40_000, 16, 8, 16)
    for name, share in found.items():
        label = " ".join(f"`{part}`" if part.startswith("--") else part for part in [name])
        assert re.search(rf"\| {re.escape(label)} \| {share:.1%} \|", page), (name, f"{share:.1%}")
    assert found["both"] < found["--group_by_image"]
