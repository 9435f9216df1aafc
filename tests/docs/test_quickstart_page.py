"""The quickstart's page: what a newcomer sees of the base, the summary and the model that the run trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from report_page import Answered, write_html  # noqa: E402
from smol_quickstart import ABOUT, one_sentence  # noqa: E402

REPORT = {
    "base_accuracy": 0.5,
    "accuracy": {"16": 0.5},
    "retention": {"16": 1.0},
    "retrieval": {"image_to_text_r1": 0.5, "text_to_image_r1": 0.6, "images": 7, "captions": 3},
    "bytes_per_image": {"16": 256, "dense": 16384},
    "questions_per_second": {"base": 10.0, "16": 20.0},
    "questions": 2,
    "split": "test",
    "seconds": {"base": 1.0},
    "wall_s": 2.0,
}


def test_differences_are_marked_and_the_trained_model_is_shown(tmp_path):
    """A reader compared each answer with the base's by eye, and nothing showed what the fine-tune had learned."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    lines = [Answered("a dog?", "yes", "yes", "no", "yes"), Answered("a cat?", "no", "No", "no", "no <b>")]
    log = [{"step": 1, "answer_loss": 1.0, "contrastive_loss": 2.0, "retrieval_accuracy": 0.1}]
    write_html(tmp_path / "r.html", REPORT, log, [(tmp_path / "a.png", lines)], ABOUT)
    page = (tmp_path / "r.html").read_text()
    assert "small and often wrong" in page.split("<table>")[0]  # before the first figure
    assert "differs from the base's in 1 of 2 answers" in page and "marked ≠" in page
    first, second = page.split("a cat?")
    assert "<b class='wrong differs'>no</b>" in first and "fine-tuned:</span> <b>yes</b>" in first
    assert "differs'" not in second and "<b class='wrong'>no &lt;b&gt;</b>" in second


def test_a_description_is_one_sentence():
    """A model of 15 steps went on for thirty tokens; what is left out must be seen."""
    assert one_sentence("A dog runs. A dog runs. A") == "A dog runs."
    assert one_sentence("A dog with 1.5 legs runs and runs and") == "A dog with 1.5 legs runs and runs and …"
