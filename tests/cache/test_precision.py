"""Summaries of one precision are read in another only when that is asked for."""

from __future__ import annotations

import argparse
import json

import pytest
from cli_fixtures import QUESTION, SHORT

from llava_fwd2bot.cli.cache import _compress_again

pytest.importorskip("lancedb")
pytest.importorskip("bitsandbytes")


@pytest.fixture
def filled(run, checkpoint, photos, tmp_path):
    def fill(*width):
        path = tmp_path / f"p{''.join(width)}.cache"
        command = ("compress", "--model", checkpoint, "--images", photos, "--cache", path, "--json", "--device", "cpu")
        code, _, err = run(*command, *width)
        assert code == 0, err
        return path

    return fill


def test_a_float_cache_is_answered_in_4_bits_when_asked_for(run, filled):
    """The fingerprint is the checkpoint's, whatever its precision: it was read in silence."""
    cache = filled()
    ask = ("ask", "--cache", cache, "--id", "a.png", QUESTION, "--json", *SHORT)
    code, _, err = run(*ask, "--load-4bit")
    assert code == 1 and "filled by a float model, and a 4bit one would read it" in err
    assert "pass no --load-4bit, or allow it with --mixed-precision" in err
    code, _, err = run("ask", "--interactive", "--cache", cache, "--load-4bit", "--device", "cpu")
    assert code == 1 and "with --mixed-precision" in err
    code, out, err = run(*ask, "--load-4bit", "--mixed-precision")
    assert code == 0 and json.loads(out)["answer"], err
    search = ("search", "--cache", cache, "a dog", "--json", "--device", "cpu", "--load-8bit")
    assert run(*search)[0] == 1
    assert json.loads(run(*search, "--mixed-precision")[1])["hits"]
    assert run("search", "--cache", cache, "--id", "a.png", "--json")[0] == 0  # no model reads anything


def test_a_quantised_cache_is_answered_as_it_was_filled(run, filled):
    """And the reverse: the model that filled it reads it, a float one when asked for."""
    cache = filled("--load-4bit")
    ask = ("ask", "--cache", cache, "--id", "a.png", QUESTION, "--json", *SHORT)
    code, _, err = run(*ask)
    assert code == 1 and "filled by a 4bit model, and a float one would read it: pass --load-4bit, or" in err
    assert run(*ask, "--load-8bit")[0] == 1
    for width in (("--load-4bit",), ("--mixed-precision",)):
        code, out, err = run(*ask, *width)
        assert code == 0 and json.loads(out)["answer"], err


def test_the_server_reads_no_other_precision_either(run, filled):
    """It only refused to add to such a cache, and answered from it without a word."""
    pytest.importorskip("fastapi")
    code, _, err = run("serve", "--cache", filled(), "--load-4bit", "--port", "0", "--device", "cpu")
    assert code == 1 and "filled by a float model" in err and "with --mixed-precision" in err


def test_repair_puts_no_other_precision_into_a_cache(run, filled):
    """Images that are compressed again would stand among summaries of the other precision, and nothing would tell."""
    cache = filled()
    args = argparse.Namespace(cache=str(cache), model=None, load_4bit=True, load_8bit=False)
    with pytest.raises(ValueError, match="pass no --load-4bit, so that both are the same"):
        _compress_again(args)
