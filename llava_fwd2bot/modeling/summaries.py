"""The mixin's compress pass: images and texts to summaries, summaries to vectors. Shapes as in mixin.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..bottleneck import embed, pool, summary_cosine
from .masks import one_sequence_each
from .plan import CaptionPlan


class Fwd2BotSummaryMixin:
    _draw = (0, 0)  # seed and step of the next draw of a prefix length

    def compress(
        self, pixel_values: Tensor | None = None, *, num_tokens: int | None = None, **image_inputs: Any
    ) -> Tensor:
        """The summaries S of images, [M, k, D].

        Args:
            pixel_values: as the host's processor gives them, with its other image inputs by keyword.
            num_tokens: j ≤ k: the summaries for j tokens, [M, j, D], at less cost; the first j rows of S where
                `has_prefixes`.
        """
        if pixel_values is not None:
            image_inputs["pixel_values"] = pixel_values
        if not any(image_inputs.get(name) is not None for name in ("pixel_values", *self.image_input_names)):
            raise ValueError(f"compress needs {self.image_input_names[0]}, as the processor gives them.")
        return self._compress_images(image_inputs, num_tokens)[0]

    def _compress_images(self, image_inputs: dict[str, Any], num_tokens: int | None = None) -> tuple[Tensor, list[int]]:
        """The summaries of images, [M, j, D], and n of each.

        In chunks the vision tower is part of each: the dense tokens of a large batch would take more than all else.
        """
        parts = self._image_chunks(image_inputs)
        if parts is not None:
            return self._image_chunks_through(parts, image_inputs, num_tokens, lambda summary: summary)
        dense = self._dense_tokens(**image_inputs)
        return self._compress(dense, self.fwd2bot.image_prompt_ids, num_tokens), [len(v) for v in dense]

    def _pool_images(
        self, image_inputs: dict[str, Any], num_tokens: int | None
    ) -> tuple[Tensor, list[int], Tensor | None] | None:
        """What the contrastive loss needs of images: pooled summaries [M, 1, D], n of each, and `summary_cosine`.

        The summaries themselves, k times as large and of no use without an answer pass, go with their chunk. None where
        the images do not come in chunks.
        """
        parts, cosines = self._image_chunks(image_inputs), []
        if parts is None:
            return None

        def pooled(summary: Tensor) -> Tensor:
            if summary.shape[1] > 1 and len(cosines) < own:  # only in forward, and only for this rank's own chunks
                cosines.append(summary_cosine(summary.detach()) * len(summary))
            return pool(summary, self.fwd2bot_config.pooling)[:, None]

        own = self._own_chunks(image_inputs)
        vectors, lengths = self._image_chunks_through(parts, image_inputs, num_tokens, pooled)
        return vectors, lengths, torch.stack(cosines).sum() / len(vectors) if cosines else None

    def _own_chunks(self, image_inputs: dict[str, Any]) -> int:
        return -(-self._count_images(image_inputs) // self.fwd2bot_config.contrastive_chunk)

    def _image_chunks_through(
        self,
        parts: list[dict[str, Any]],
        image_inputs: dict[str, Any],
        num_tokens: int | None,
        take: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, list[int]]:
        """`take` of the summaries of each chunk, put together, and n of each image."""
        lengths: dict[int, list[int]] = {}

        def run(at: int) -> Tensor:
            dense = self._dense_tokens(**parts[at])
            lengths[at] = [len(v) for v in dense]
            return take(self._compress(dense, self.fwd2bot.image_prompt_ids, num_tokens))

        own = self._own_chunks(image_inputs)
        taken = self._recomputed_chunks(run, range(len(parts)), own)
        return taken, [n for at in range(own) for n in lengths[at]]

    def _count_images(self, image_inputs: dict[str, Any]) -> int:
        return len(image_inputs.get(self.image_input_names[0], image_inputs.get("pixel_values", ())))

    def _image_chunks(self, image_inputs: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The image inputs of each chunk; None where all go at once, or do not come image by image.

        Where the ranks must run the same calls, each has as many chunks as the fullest.
        """
        count, chunk = self._count_images(image_inputs), self.fwd2bot_config.contrastive_chunk
        most = count if self._fullest is None else max(count, self._fullest.images)
        if chunk is None or most <= chunk or not (self.training and torch.is_grad_enabled()):
            return None
        if not all(isinstance(v, (Tensor, list, tuple)) and len(v) == count for v in image_inputs.values()):
            return None
        parts = [slice(at, at + chunk) if at < count else slice(0, 1) for at in range(0, most, chunk)]
        return [{name: value[part] for name, value in image_inputs.items()} for part in parts]

    def compress_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, num_tokens: int | None = None
    ) -> Tensor:
        """The summaries of texts by the same pass, text in the place of V: [C, T] → [C, k, D]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        empty = (mask.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"The texts in rows {empty} are empty: there is nothing to compress.")
        words = self.get_input_embeddings()
        contexts = [words(ids[real]) for ids, real in zip(input_ids, mask.bool(), strict=True)]
        return self._compress(contexts, self.fwd2bot.text_prompt_ids, num_tokens)

    def _embed_captions(self, captions: CaptionPlan, num_tokens: int | None) -> Tensor:
        """Unit vectors of a batch's captions, [C, D]; in chunks, of which the vectors alone are kept."""

        def run(part: slice) -> Tensor:
            words = self.get_input_embeddings()(captions.ids[part])  # [c, L, D]
            contexts = [row[:length] for row, length in zip(words, captions.lengths[part], strict=True)]
            summary = self._compress_whole(contexts, self.fwd2bot.text_prompt_ids, num_tokens)
            return embed(summary, self.fwd2bot_config.pooling)

        return self._through_chunks(run, len(captions.lengths), images=False)

    def _compress_whole(self, contexts: list[Tensor], prompt_ids: Tensor, num_tokens: int | None) -> Tensor:
        """The summaries of all contexts at once, M × [n_i, D] → [M, j, D]."""
        k = self.fwd2bot_config.num_summary_tokens
        j = k if num_tokens is None else num_tokens
        if not 1 <= j <= k:
            raise ValueError(f"num_tokens must be from 1 to this model's k = {k}, got {j}.")
        if not self._fwd2bot_enabled:
            raise ValueError("Fwd2Bot is disabled here: there are no summaries inside fwd2bot_disabled().")
        texts = prompt_ids is self.fwd2bot.text_prompt_ids
        with one_sequence_each():
            return (self._compressor.texts if texts else self._compressor.images)(self, contexts, j)

    def _compress(self, contexts: list[Tensor], prompt_ids: Tensor, num_tokens: int | None) -> Tensor:
        """`_compress_whole`, in chunks where there are more contexts than `contrastive_chunk` in training."""

        def run(part: slice) -> Tensor:
            return self._compress_whole(contexts[part], prompt_ids, num_tokens)

        return self._through_chunks(run, len(contexts), images=prompt_ids is not self.fwd2bot.text_prompt_ids)

    def _through_chunks(self, run: Callable[[slice], Tensor], count: int, images: bool) -> Tensor:
        """`run` of all rows at once, or of `contrastive_chunk` at a time in training, put together."""
        chunk, most = self.fwd2bot_config.contrastive_chunk, count
        if self._fullest is not None:  # as many chunks as on the other ranks
            most = max(count, self._fullest.images if images else self._fullest.captions)
        whole = chunk is None or most <= chunk or self._stages.recomputes  # in a chunk already
        if whole or not (self.training and torch.is_grad_enabled()):
            return run(slice(0, count))

        parts = [slice(at, at + chunk) if at < count else slice(0, 1) for at in range(0, most, chunk)]
        return self._recomputed_chunks(run, parts, -(-count // chunk))

    def _recomputed_chunks(self, run: Callable[[Any], Tensor], parts: Sequence[Any], own: int) -> Tensor:
        """`run` of each part, put together; the parts after the first `own` are for the other ranks' sake.

        This is GradCache: forward keeps what `run` returns alone, and backward runs it again, part by part.
        """
        here = self.fwd2bot.tokens.new_empty(0)  # tells which device's random state, for dropout, to keep

        def recomputed(part: Any, here: Tensor) -> Tensor:
            with self._stages.recomputed():
                return run(part)

        found = [checkpoint(recomputed, part, here, use_reentrant=False) for part in parts]
        for idle in found[own:]:
            self._fullest.run_idle(idle)
        return torch.cat(found[:own])

    # ------------------------------------------------------------------ retrieval
    def embed_image(
        self,
        pixel_values: Tensor | None = None,
        *,
        summary: Tensor | None = None,
        num_tokens: int | None = None,
        **image_inputs: Any,
    ) -> Tensor:
        """Unit vectors of images, [M, D], from pixels or from summaries already at hand."""
        if pixel_values is not None:
            image_inputs["pixel_values"] = pixel_values
        if summary is None:
            summary = self.compress(num_tokens=num_tokens, **image_inputs)
        else:
            summary, _ = self._summaries(summary, image_inputs, num_tokens)
        return embed(summary, self.fwd2bot_config.pooling)

    def embed_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, num_tokens: int | None = None
    ) -> Tensor:
        """Unit vectors of texts, [C, D]; the dot product with `embed_image` is the cosine that training compares."""
        return embed(self.compress_text(input_ids, attention_mask, num_tokens=num_tokens), self.fwd2bot_config.pooling)

    # ------------------------------------------------------------------ a batch's
    def _summaries(
        self, summary: Tensor | None, image_inputs: dict[str, Any], num_tokens: int | None
    ) -> tuple[Tensor | None, list[int] | None]:
        """S of the batch's images [M, j, D] (None without images), and n of each image where it is known."""
        if summary is not None:
            if image_inputs:
                raise ValueError("Give either summary or pixel_values, not both.")
            size = self.get_input_embeddings().weight.shape[1]
            if summary.dim() != 3 or summary.shape[-1] != size or summary.shape[1] < 1:
                raise ValueError(f"summary must be [images, tokens, {size}], got {list(summary.shape)}.")
            if num_tokens is not None and not 1 <= num_tokens <= summary.shape[1]:
                raise ValueError(f"num_tokens must be from 1 to the {summary.shape[1]} given, got {num_tokens}.")
            return summary[:, :num_tokens], None
        if not image_inputs:
            return None, None
        return self._compress_images(image_inputs, num_tokens)

    def draw_from(self, seed: int, step: int) -> None:
        """What the next training forward draws its prefix length by (`nested_k`); the one after it by `step` + 1.

        Ranks that run the same forwards draw the same lengths, whatever their batches hold.
        """
        self._draw = (seed, step)

    def _draw_num_tokens(self, num_tokens: int | None) -> int | None:
        """The prefix length of this forward: as given, or drawn while training with `nested_k`; None for all."""
        nested = self.fwd2bot_config.nested_k
        if not nested or not self.training or not torch.is_grad_enabled():
            return num_tokens
        seed, step = self._draw
        self._draw = (seed, step + 1)
        return random.Random(f"{seed}-{step}").choice(nested) if num_tokens is None else num_tokens
