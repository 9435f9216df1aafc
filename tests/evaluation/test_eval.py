"""Metrics: answers are compared as people read them, and captions with their own image's."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from eval.metrics import exact, yes_no
from llava_fwd2bot.evaluation import metrics
from llava_fwd2bot.evaluation.resample import bootstrap


def test_answers_are_compared_as_people_read_them():
    assert exact(["A night stand.", "lamp, bed", "two"], ["night stand", "bed, lamp", "three"]) == [1, 1, 0]
    found = yes_no(["Yes", "No.", "there is no dog", "yes"], ["yes", "no", "yes", "no"])
    assert (found["accuracy"], found["precision"], found["recall"], found["yes"]) == (0.5, 0.5, 0.5, 0.5)


def test_an_empty_answer_is_not_the_option_a():
    """Articles and end marks are dropped, and "A" without its article is as empty as no answer: that was right."""
    assert exact(["", "The", ".", "B", "a.", "A cat"], ["A", "A", "A", "A", "A", "cat"]) == [0, 0, 0, 0, 1, 1]
    assert exact(["", "", " "], [".", "?", ""]) == [0, 0, 1]


def test_paired_intervals_are_narrower_than_their_parts():
    """Retention's interval must use that both answered the same items."""
    items = np.random.default_rng(0).integers(0, 2, 400)
    low, high = bootstrap(items, items)
    assert low == high == 1.0
    low, high = bootstrap(items)
    assert low < items.mean() < high and high - low == pytest.approx(4 * (0.25 / 400) ** 0.5, rel=0.15)
    # a draw without any of the base's right answers has no ratio
    assert bootstrap([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])[1] == 3.0
    with pytest.raises(ValueError, match="same items: 3 and 2"):
        bootstrap([1, 0, 1], [1, 0])


ENDS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\0", "\ud800"]


@pytest.mark.parametrize("java", [True, False])
def test_no_character_moves_the_captions(monkeypatch, java):
    """Java's tokenizer reads a caption in each line: one line end more, and all later ones were other images'."""
    pytest.importorskip("pycocoevalcap")
    if java and shutil.which("java") is None:
        pytest.skip("no Java here")
    if not java:
        monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    references = [[f"a cat on mat {i} here", f"the cat sits on the mat {i}"] for i in range(len(ENDS))]
    said = [own[0] for own in references]
    good = metrics.caption_scores(said, references)["per_image"]
    broken = [text.replace(" on ", f"{end}on ") for text, end in zip(said, ENDS, strict=True)]
    split = [[one.replace(" mat", f" {end} mat") for one in own] for own, end in zip(references, ENDS, strict=True)]
    # a blank one at the end was lost, and the last image with it
    for given, truth in ((broken, references), (said, split)):
        found = metrics.caption_scores([*given, " "], [*truth, ["\u2028"]])["per_image"]
        assert len(found) == len(ENDS) + 1
        assert metrics.caption_scores(given, truth)["per_image"] == pytest.approx(good)


def test_captions_that_came_back_moved_are_no_scores(monkeypatch):
    """Whatever a tokenizer takes for a line end next: an error, not a table of zeros."""
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")

    def moved(self, given):
        texts = [c["caption"] for own in given.values() for c in own]
        lines = iter(["one more", *texts])
        return {i: [next(lines) for _ in own] for i, own in given.items()}

    monkeypatch.setattr(metrics.shutil, "which", lambda name: "/usr/bin/java")
    for broken in (moved, lambda self, given: {}):
        monkeypatch.setattr(ptb.PTBTokenizer, "tokenize", broken)
        with pytest.raises(ValueError, match="The tokenizer returned other texts than the 2 captions"):
            metrics.caption_scores(["a cat", "a dog"], [["a cat"], ["a dog"]])
