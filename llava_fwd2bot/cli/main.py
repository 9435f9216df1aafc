"""The command line: which module runs a command, and what becomes of its errors.

A command is a module of this package with `main(argv)`. Only the module that is called is imported, and torch and
transformers only inside its functions, so that help and wrong usage answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ..version import __version__
from . import console
from .parser import Parser

# command → what it is for; the module has its name
COMMANDS = {
    "train": "train, with LLaVA's own arguments and --fwd2bot K",
    "ask": "ask about images, or about stored summaries",
    "compress": "store the summaries of many images",
    "search": "find images of a cache by words or by an image",
    "cache": "ls, stats, verify, repair, optimize, prune, rm, restore, export, merge, index, …",
    "compressors": "the ways to make a summary that `train --fwd2bot_compressor` takes",
    "info": "what a checkpoint or a cache is, without loading the model",
    "eval": "answer, score, retrieval, captioning, cost, report, …",
    "convert": "to the other layout: original LLaVA's or transformers'",
    "llava": "the original LLaVA's own programs: llava train …, llava eval …",
}
MODULES = {"eval": "evaluate"}
TRAINS = ("train", "llava")  # libraries' logs are of use there


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        the exit code: 0; 1 for an error; 2 for wrong usage; 130 for Ctrl-C; 141 where the reader of the output has
        gone, as after `| head`.

    With FWD2BOT_TRACEBACK=1 an error is raised as it is, with its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank"):  # the deepspeed launcher puts it first
        argv.append(argv.pop(0))
    with console.plain_output(quiet=argv[:1] not in [[name] for name in TRAINS]):
        try:
            try:
                code = _run(argv) or 0
            except SystemExit as stop:  # argparse's after --help or wrong usage, or a program's of LLaVA
                code = _exit_code(stop)
            console.flush()
            return code
        except KeyboardInterrupt:
            console.tell("interrupted")
            return 130
        except BaseException as error:  # also panics of libraries in Rust, which are no Exception
            if isinstance(error, BrokenPipeError) and console.reader_is_gone():
                console.discard_output()
                return 141
            if console.wants_traceback():
                raise
            console.tell(f"error: {console.message_of(error)}")
            if isinstance(error, OSError):  # stdout may be what cannot be written
                console.discard_output()
            return 1


def _run(argv: list[str]) -> int | None:
    if argv and argv[0] in COMMANDS:
        return import_module(f".{MODULES.get(argv[0], argv[0])}", __package__).main(argv[1:])
    parser = Parser(prog="fwd2bot", description="LLaVA with images condensed into a few summary tokens.")
    parser.add_argument("--version", action="version", version=f"fwd2bot {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command", parser_class=Parser)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    parser.parse_args(argv)
    parser.error("the command comes first")  # only what stands before a command gets here


def _exit_code(stop: SystemExit) -> int:
    if isinstance(stop.code, str):
        console.tell(f"error: {stop.code}")
        return 1
    return stop.code or 0


if __name__ == "__main__":
    sys.exit(main())
