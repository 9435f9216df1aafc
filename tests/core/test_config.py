"""Fwd2BotConfig: every number is explained, and none that makes no sense gets through."""

import dataclasses
import os
import re

import pytest

from llava_fwd2bot import Fwd2BotConfig
from llava_fwd2bot.files.writing import write_folder


def test_every_field_has_help_and_source():
    for field in dataclasses.fields(Fwd2BotConfig):
        assert field.metadata["help"] and field.metadata["source"], field.name


def test_defaults_are_the_papers_where_it_tells():
    config = Fwd2BotConfig()
    assert (config.num_summary_tokens, config.image_prompt) == (16, "Summarize the image in a few words.")
    assert (config.adapters, config.bridge, config.pooling, config.temperature_init) == ("stage", "none", "mean", 0.07)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_summary_tokens": 0}, "at least 1, got 0. To run the base without"),
        ({"num_summary_tokens": -3}, "at least 1, got -3"),
        ({"num_summary_tokens": 2.5}, "whole number"),
        ({"num_summary_tokens": True}, "whole number"),
        ({"num_summary_tokens": 4, "nested_k": [1, 8]}, "from 1 to num_summary_tokens=4"),
        ({"nested_k": []}, "nested_k must hold numbers"),
        ({"pooling": "max"}, "pooling must be one of mean, last, first, got 'max'"),
        ({"bridge": "mlp"}, "bridge must be one of"),
        ({"adapters": "two"}, "adapters must be one of"),
        ({"contrastive_weight": -1}, "finite number of at least 0"),
        ({"distill_weight": float("nan")}, "finite number"),
        ({"temperature_init": 0}, "above 0"),
        ({"lora_r": 0}, "LoRA needs"),
        ({"lora_targets": []}, "lora_targets is empty"),
        ({"contrastive_chunk": 0}, "at least 1, or None"),
    ],
)
def test_values_out_of_range_say_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        Fwd2BotConfig(**changes)


def test_nested_k_is_sorted_and_unique():
    assert Fwd2BotConfig(nested_k=[4, 1, 4]).nested_k == [1, 4]


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
    """A build that fails half way must not cost what was there, nor leave its half."""
    target = tmp_path / "made" / "base"
    with write_folder(target) as beside:
        (beside / "a").write_text("1")
    with pytest.raises(OSError, match="full"), write_folder(target) as beside:
        (beside / "b").write_text("2")
        raise OSError("full")
    assert [p.name for p in target.parent.iterdir()] == ["base"]
    assert (target / "a").read_text() == "1"
    with write_folder(target) as beside:
        (beside / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    link = tmp_path / "link"
    link.symlink_to(target)
    with write_folder(link) as beside:
        (beside / "c").write_text("3")
    assert link.is_symlink() and [p.name for p in target.iterdir()] == ["c"]
    with pytest.raises(NotADirectoryError), write_folder(target / "c"):
        pytest.fail("nothing may be made for a place that cannot be had")


def test_a_folder_that_cannot_be_put_in_place_costs_neither_the_old_nor_the_new(tmp_path, monkeypatch):
    """Half an hour of training may lie in the one, and be what the other is for."""
    target, rename = tmp_path / "base", os.rename
    target.mkdir()
    (target / "a").write_text("1")

    def fails(one, other):
        if ".tmp" in str(one):
            raise OSError(5, "Input/output error")
        rename(one, other)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="what was written for it lies in") as raised, write_folder(target) as beside:
        (beside / "b").write_text("2")
    assert (target / "a").read_text() == "1" and (beside / "b").read_text() == "2"
    assert str(beside) in str(raised.value) and len(list(tmp_path.iterdir())) == 2


def test_the_docstring_has_every_field():
    """It is what an editor shows, and the reference page."""
    described = re.findall(r"^        (\w+) \(", Fwd2BotConfig.__doc__, re.MULTILINE)
    assert described == [field.name for field in dataclasses.fields(Fwd2BotConfig)]
