"""`fwd2bot train`'s short help and its check of names, which need neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import HfArgumentParser

from llava_fwd2bot.cli import train as command
from llava_fwd2bot.cli.train import COMMON, METHOD, known_arguments, short_help
from llava_fwd2bot.training.arguments import DataArguments, Fwd2BotArguments, LlavaTrainingArguments, ModelArguments


def test_the_names_are_those_of_the_parser():
    """They are read from sources; one that the parser knows must never be refused."""
    classes = (ModelArguments, DataArguments, LlavaTrainingArguments, Fwd2BotArguments)
    options = HfArgumentParser(classes)._option_string_actions
    names = {name[2:].replace("-", "_") for name in options if name.startswith("--")}
    assert names <= known_arguments()
    assert {*COMMON, *METHOD} <= names


def test_the_help_is_short(run):
    """All arguments are 793 lines, among which nobody finds the few that matter."""
    code, out, _ = run("train", "--help")
    assert code == 0 and len(out.splitlines()) <= 45 and "--help-all" in out
    assert max(map(len, short_help().splitlines())) <= 120


def test_a_misspelt_argument_is_told_without_imports():
    """It took seconds to import what has no part in it."""
    program = "import sys; from llava_fwd2bot.cli.main import main; code = main(sys.argv[1:]); "
    program += "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    argv = ["train", "--model_name_or_path", "x", "--lerning_rate", "1"]
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False", "False"]
    assert "--lerning_rate: did you mean --learning_rate?" in done.stderr


@pytest.mark.parametrize("argv", [["--learning-rate=1e-3"], ["--no_double_quant"], ["--warmup_ratio", "0.03"]])
def test_other_spellings_of_the_parser_pass(argv):
    """The parser takes dashes, negations, and names of LLaVA's time."""
    command._refuse_unknown(argv)
