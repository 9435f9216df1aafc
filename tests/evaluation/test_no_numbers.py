"""Summaries that are no numbers, and answers that are none, are never taken for a figure."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from eval import metrics
from llava_fwd2bot.files.writing import write_json
from llava_fwd2bot.hosts.llava import Fwd2BotLlava


@pytest.fixture
def evaluate(run, checkpoint, captioned):
    record = {"filename": "0.png", "caption": "a red picture", "negative_caption": "a blue picture"}
    write_json(captioned / "tests.json", {"0": record, "1": {**record, "filename": "1.png"}})
    argv = ("--model", checkpoint, "--images", captioned / "images", "--work", captioned / "work", "--device", "cpu")
    return lambda *more: run("eval", "compositionality", "--tests", captioned / "tests.json", *argv, *more)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
@pytest.mark.parametrize("method", ["compress", "compress_text"])
def test_summaries_that_are_not_finite_are_an_error(evaluate, captioned, monkeypatch, method, value):
    """Each comparison with NaN is false: a diverged checkpoint scored 0.0, as if it had been measured."""
    own = getattr(Fwd2BotLlava, method)

    def spoilt(self, *args, **kwargs):
        found = own(self, *args, **kwargs).clone()
        found[-1, 0, 0] = value  # 1e6 overflows float16, in which summaries are kept
        return found

    monkeypatch.setattr(Fwd2BotLlava, method, spoilt)
    code, out, err = evaluate("--no-likelihood")
    kind = "images" if method == "compress" else "texts"
    assert code == 1 and f"summaries of {kind} hold NaN or overflow float16, the first that of" in err
    assert "accuracy" not in out and not list((captioned / "work").glob(f"{kind}-*"))  # nor kept for later runs
    monkeypatch.undo()
    assert evaluate("--no-likelihood")[0] == 0


def test_likelihoods_that_are_not_finite_are_an_error(evaluate, monkeypatch):
    """The same of the generative score."""
    from llava_fwd2bot.evaluation import compositionality

    monkeypatch.setattr(compositionality, "likelihood", lambda *_: torch.tensor([float("nan"), -1.0]))
    code, _, err = evaluate()
    assert code == 1 and "The likelihood of a text about" in err and "--dtype float32" in err


def test_an_empty_answer_is_neither_yes_nor_no():
    """POPE's script takes silence for yes: a model that says nothing had half of the questions right."""
    found = metrics.yes_no(["", " \n", "yes", "No."], ["yes", "no", "yes", "no"])
    assert found["per_item"] == [0.0, 0.0, 1.0, 1.0] and found["accuracy"] == 0.5
    assert metrics.yes_no([""] * 2, ["yes", "no"])["f1"] == 0.0


# ---------------------------------------------------------------------- VLMEvalKit's prompts
@pytest.fixture
def kit(monkeypatch):
    base = ModuleType("vlmeval.vlm.base")
    base.BaseModel = type("BaseModel", (), {"dump_image": lambda self, line, dataset: [line["image"]]})
    data = ModuleType("vlmeval.dataset")
    data.DATASET_TYPE = lambda name: {"MMBench": "MCQ", "POPE": "Y/N", "TextVQA": "VQA", "COCO": "Caption"}[name]
    for module in (ModuleType("vlmeval"), ModuleType("vlmeval.vlm"), base, data):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "llava_fwd2bot.evaluation.vlmevalkit", raising=False)
    from llava_fwd2bot.evaluation.vlmevalkit import Fwd2Bot

    yield Fwd2Bot.__new__(Fwd2Bot)
    sys.modules.pop("llava_fwd2bot.evaluation.vlmevalkit")


def test_vlmevalkit_asks_as_llava_was_trained(kit):
    """With VLMEvalKit's own prompts a LLaVA-1.5 answers in sentences, which its matching counts as wrong."""
    assert [kit.use_custom_prompt(name) for name in ("MMBench", "POPE", "TextVQA", "COCO", None)] == [True] * 3 + [
        False
    ] * 2
    row = {"image": "a.jpg", "hint": "Look up.", "question": "What is it?", "A": "a cat", "B": "a dog"}
    row |= {"C": float("nan"), "D": "", "answer": "A"}
    image, text = kit.build_prompt(row, "MMBench")
    assert image == {"type": "image", "value": "a.jpg"}
    assert text["value"] == (
        "Look up.\nWhat is it?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."
    )
    row = {"image": "a.jpg", "hint": float("nan"), "question": "Is there a cat in the image?"}
    assert kit.build_prompt(row, "POPE")[1]["value"] == (
        "Is there a cat in the image?\nAnswer the question using a single word or phrase."
    )


def test_prompts_are_those_of_llavas_question_files(kit):
    """Their wording is in LLaVA's published files: letter for letter, or it is another benchmark."""
    from llava_fwd2bot.evaluation.scorers.mme import SUFFIXES
    from llava_fwd2bot.evaluation.vlmevalkit import SHORT

    assert SHORT in SUFFIXES
