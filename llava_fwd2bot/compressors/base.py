"""The interface of a compressor: n dense tokens of an image in, k tokens out.

Shapes: M images, n dense tokens of an image, k tokens of a summary, j ≤ k tokens in use, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Compressor:
    """A way to make k tokens of an image's dense tokens.

    A subclass sets the attributes and `images`; the registry lists it by its `name`. What it makes is a summary like
    Fwd2Bot's: it is stored, read by the answer pass and compared for retrieval by the same code.

    Attributes:
        name: what `Fwd2BotConfig.compressor` selects it by.
        about: one line for `fwd2bot compressors`.
        source: the paper that it follows, or "our choice".
        runs_language_model: whether an image costs a pass of the language model, with the adapter of the stage
            "compress".
        compares_texts: whether texts have summaries too, so that the contrastive loss and text search work.
        prefix: whether the first j tokens of k are the j tokens that the compressor makes when asked for j;
            `has_prefixes` says it of a model, whose residual counts as well.
        max_tokens: the largest k, or None.
    """

    name: str = ""
    about: str = ""
    source: str = ""
    runs_language_model: bool = False
    compares_texts: bool = False
    prefix: bool = True
    max_tokens: int | None = None

    def build(self, size: int, k: int) -> nn.Module | None:
        """Parameters of its own, trained and saved with the model; they become `model.fwd2bot.compressor`.

        Args:
            size: D. k: `num_summary_tokens`.
        """
        return None

    def images(self, model: Any, dense: Sequence[Tensor], j: int) -> Tensor:
        """The summaries of images.

        Args:
            model: the model that carries Fwd2Bot; `model.fwd2bot.compressor` is what `build` returned.
            dense: the dense tokens of each image, M × [n_i, D].

        Returns:
            [M, j, D]
        """
        raise NotImplementedError

    def texts(self, model: Any, words: Sequence[Tensor], j: int) -> Tensor:
        """The summaries of texts, from the embeddings of each, C × [n_i, D] → [C, j, D].

        Raises:
            ValueError: this compressor makes summaries of images alone.
        """
        raise ValueError(
            f"The compressor {self.name!r} makes summaries of images alone: texts cannot be searched for, and the "
            "contrastive loss must be off (contrastive_weight=0)."
        )
