"""The argument parser of all commands: no abbreviations, and the nearest name for a misspelt one."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors suggest the nearest name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self._given: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As in argparse, but unknown arguments are an error, with this command's usage."""
        self._given = list(sys.argv[1:] if args is None else args)
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        known = list(self._option_string_actions)
        # a required option may be missing because its name is misspelt
        names = (word.split("=")[0] for word in self._given if word.startswith("--") and len(word) > 2)
        hints = [f"{name}: {hint}" for name in names if name not in known and (hint := did_you_mean(name, known))]
        if self._subparsers is not None and "required" in message:
            hints.append(f"{self.prog} --help lists them")
        super().error("; ".join([message, *dict.fromkeys(hints)]))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = did_you_mean(str(value), map(str, action.choices or ()))
            error.message += f"; {hint}" if hint else ""
            raise


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean …?" with the nearest of the known names; "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""
