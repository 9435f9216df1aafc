"""The ways to make k tokens of an image's dense tokens, by name; Fwd2Bot is one of them.

A package registers its own by an entry point of the group `llava_fwd2bot.compressors` that names a
`Compressor` class.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from ..config import Fwd2BotConfig
from .base import Compressor
from .fwd2bot import Fwd2Bot, LastToken
from .linear import Averages, Pool, Random, Uniform
from .query import Query

GROUP = "llava_fwd2bot.compressors"
_OWN = (Fwd2Bot, Averages, Pool, Uniform, Random, Query, LastToken)


@cache
def compressors() -> dict[str, Compressor]:
    """All compressors, by name: those of this package, then those of other packages.

    Raises:
        ValueError: an entry point is no `Compressor`, or has the name of another.
    """
    found: dict[str, Compressor] = {kind.name: kind() for kind in _OWN}
    for point in entry_points(group=GROUP):
        kind = point.load()
        if not (isinstance(kind, type) and issubclass(kind, Compressor)):
            raise ValueError(f"The entry point {point.name} of {GROUP} is {point.value}, which is no Compressor class.")
        if kind.name in found:
            raise ValueError(f"{point.value} calls its compressor {kind.name!r}, which there is already.")
        found[kind.name] = kind()
    return found


def compressor_of(name: str) -> Compressor:
    """The compressor called `name`; ValueError that lists those there are."""
    if name not in compressors():
        raise ValueError(f"compressor must be one of {', '.join(compressors())}, got {name!r}.")
    return compressors()[name]


def has_prefixes(config: Any) -> bool:
    """Whether the first j tokens of a summary are the summary of j tokens, by the compressor and the residual."""
    return all(compressor_of(name).prefix for name in (config.compressor, config.residual) if name != "none")


def check_prefix(config: Any, k: int | None) -> None:
    """Whether the first k tokens of a summary are a summary; None stands for all.

    Raises:
        ValueError: they are not; the message names what makes the summary.
    """
    most = config.num_summary_tokens
    if k is not None and k < most and not has_prefixes(config):
        how = f"compressor={config.compressor!r}" if config.residual == "none" else f"residual={config.residual!r}"
        raise ValueError(
            f"With {how} the first {k} of {most} tokens are not the summary for k = {k}: leave k out, or train a model "
            f"with k = {k}."
        )


def check_compressor(compressor: Compressor, config: Fwd2BotConfig) -> None:
    """Whether `config` asks of the compressor what it can do.

    Raises:
        ValueError: k is beyond its most, the contrastive loss is on and it makes no summaries of texts, or there is
            `nested_k` and a summary has no prefixes.
    """
    most = compressor.max_tokens
    if most is not None and config.num_summary_tokens > most:
        raise ValueError(
            f"The compressor {compressor.name!r} makes at most {most} token(s) of an image: set num_summary_tokens "
            f"(--fwd2bot) to {most}, not {config.num_summary_tokens}."
        )
    if config.contrastive_weight > 0 and not compressor.compares_texts:
        raise ValueError(
            f"The compressor {compressor.name!r} makes no summaries of texts, which the contrastive loss compares "
            "with: set contrastive_weight=0 (--fwd2bot_contrastive_weight 0)."
        )
    if config.nested_k and not has_prefixes(config):
        residual = "" if config.residual == "none" else f" and the residual {config.residual!r}"
        raise ValueError(
            f"With the compressor {compressor.name!r}{residual} the first j of k tokens are not the j tokens "
            "of an image, and one stored summary cannot serve several budgets: leave nested_k out (--fwd2bot_nested_k)."
        )
