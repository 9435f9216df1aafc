"""`fwd2bot llava train | eval`: the original LLaVA's programs, with their own arguments and a few of ours."""

from __future__ import annotations

from collections.abc import Sequence

from .parser import Parser

# program → (its option for the model, the equivalent command for smol-llava)
INSTEAD = {
    "train": ("--model_name_or_path", "fwd2bot train --model_name_or_path smol-llava"),
    "eval": ("--model-path", "fwd2bot eval answer --model smol-llava"),
}


def main(argv: Sequence[str]) -> None:
    program, rest = (argv[0], list(argv[1:])) if argv else ("", [])
    if program not in INSTEAD:
        parser = Parser(prog="fwd2bot llava", description="Run the original LLaVA's programs with Fwd2Bot.")
        parser.add_argument("program", choices=tuple(INSTEAD), help="its arguments follow; see `llava train -h`")
        parser.parse_args(argv)
        parser.error("the program must come first")
    if program == "train" and set(rest) & {"-h", "--help"}:
        _help()
        return
    _refuse_smol(program, rest)
    if program == "train":
        from ..training.original import train
        from ..training.processes import ending_process_group

        with ending_process_group():
            train(rest)
    else:
        from ..evaluation.original_options import eval_options

        if set(rest[:1]) & {"-h", "--help"} or not rest:
            eval_options().parse_args(rest)
        from ..evaluation.original import evaluate

        evaluate(rest)


def _help() -> None:
    """Prints our arguments, and LLaVA's own if it is installed."""
    from ..training.original_options import train_options

    train_options().print_help()
    try:
        from ..training.original import train
    except ImportError as error:
        print(f"\nLLaVA's own arguments are listed if it is installed. {error}")
        return
    print("\nLLaVA's own arguments:\n", flush=True)
    train(["--help"])


def _refuse_smol(program: str, argv: Sequence[str]) -> None:
    """Raises ValueError for smol-llava, which LLaVA's programs cannot read and would look up on the hub."""
    from ..smol import is_smol

    option, instead = INSTEAD[program]
    words = [word for given in argv for word in given.split("=", 1)]
    if any(name == option and is_smol(value) for name, value in zip(words, words[1:], strict=False)):
        raise ValueError(
            f"smol-llava is in transformers' layout, which the original LLaVA's programs cannot read: use `{instead}`."
        )
