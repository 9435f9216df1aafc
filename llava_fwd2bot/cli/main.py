"""The command line: runs the module of a command, and turns its errors into messages and exit codes.

A command is a module of this package with `main(argv)`. Only that module is imported, and torch and transformers only
inside its functions, so that help and usage errors are immediate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ..version import __version__
from . import console
from .parser import Parser

# command → its help; the module has the same name
COMMANDS = {
    "train": "train, with LLaVA's own arguments and --fwd2bot K",
    "ask": "ask about images, or about stored summaries",
    "compress": "store the summaries of many images",
    "search": "find images of a cache by words or by an image",
    "serve": "serve a model and its caches by OpenAI's API, with a page",
    "cache": "manage a cache: ls, stats, verify, repair, optimize, prune, rm, restore, …",
    "compressors": "list the ways to make a summary that `train --fwd2bot_compressor` takes",
    "info": "describe a checkpoint or a cache without loading the model",
    "eval": "evaluate: answer, score, retrieval, captioning, cost, report, …",
    "convert": "convert between the original LLaVA's layout and transformers'",
    "export": "export for vLLM or PEFT, or merged into a plain causal LM",
    "llava": "run the original LLaVA's programs: llava train …, llava eval …",
}
MODULES = {"eval": "evaluate"}
TRAINS = ("train", "llava")  # where logs of libraries are shown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        the exit code: 0; 1 for an error; 2 for wrong usage; 130 for Ctrl-C; 141 if the reader of the output has exited,
        as after `| head`.

    With FWD2BOT_TRACEBACK=1 errors are raised with their traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank"):  # inserted by the deepspeed launcher
        argv.append(argv.pop(0))
    with console.plain_output(quiet=argv[:1] not in [[name] for name in TRAINS]):
        try:
            try:
                code = _run(argv) or 0
            except SystemExit as stop:  # from argparse, or from a program of LLaVA
                code = _exit_code(stop)
            console.flush()
            return code
        except KeyboardInterrupt:
            console.tell("interrupted")
            return 130
        except BaseException as error:  # panics of Rust libraries are not an Exception
            if isinstance(error, BrokenPipeError) and console.reader_has_exited():
                console.discard_output()
                return 141
            if console.wants_traceback():
                raise
            console.tell(f"error: {console.message_of(error)}")
            if isinstance(error, OSError):  # stdout itself may not be writable
                console.discard_output()
            return 1


def _run(argv: list[str]) -> int | None:
    if argv and argv[0] in COMMANDS:
        return import_module(f".{MODULES.get(argv[0], argv[0])}", __package__).main(argv[1:])
    parser = Parser(prog="fwd2bot", description="LLaVA with images compressed into a few summary tokens.")
    parser.add_argument("--version", action="version", version=f"fwd2bot {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command", parser_class=Parser)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    late = next((word for word in argv if word in COMMANDS), None)
    if late is not None and argv[0].startswith("--") and argv[0] not in ("--help", "--version"):
        parser.error(f"the command must come first, and its options after it: fwd2bot {late} …")
    # of a misspelt command the options are none of this parser's, and would be corrected to its own
    parser.parse_args(argv if argv[0].startswith("-") else argv[:1])
    parser.error("the command must come first")  # reached only with arguments before it


def _exit_code(stop: SystemExit) -> int:
    if isinstance(stop.code, str):
        console.tell(f"error: {stop.code}")
        return 1
    return stop.code or 0


if __name__ == "__main__":
    sys.exit(main())
