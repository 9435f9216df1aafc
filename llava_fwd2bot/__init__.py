"""Fwd2Bot for LLaVA: the language model condenses an image into k summary tokens, and answers from them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.load import load_fwd2bot as load_fwd2bot
    from .checkpoint.load import register as register
    from .config import Fwd2BotConfig as Fwd2BotConfig
    from .hosts import add_fwd2bot as add_fwd2bot
    from .processing.answer import answer as answer
    from .training.trainer import Fwd2BotTrainer as Fwd2BotTrainer
    from .training.trainer import Fwd2BotTrainerMixin as Fwd2BotTrainerMixin
    from .training.trainer import Fwd2BotTrainingArguments as Fwd2BotTrainingArguments

_WHERE = {
    "Fwd2BotConfig": ".config",
    "add_fwd2bot": ".hosts",
    "answer": ".processing.answer",
    "load_fwd2bot": ".checkpoint.load",
    "register": ".checkpoint.load",
    "Fwd2BotTrainer": ".training.trainer",
    "Fwd2BotTrainerMixin": ".training.trainer",
    "Fwd2BotTrainingArguments": ".training.trainer",
}
__all__ = [
    "Fwd2BotConfig",
    "Fwd2BotTrainer",
    "Fwd2BotTrainerMixin",
    "Fwd2BotTrainingArguments",
    "__version__",
    "add_fwd2bot",
    "answer",
    "load_fwd2bot",
    "register",
]


def __getattr__(name: str) -> Any:  # `fwd2bot --help` need not wait for torch
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
