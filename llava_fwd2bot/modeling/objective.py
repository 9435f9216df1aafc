"""The training objective: which rows feed which loss, from one compress pass.

Shapes as in bottleneck.py; C rows with a caption, N tokens without padding, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import ModelOutput

from ..bottleneck import Collapsed, embed
from ..losses import MAX_LOGIT_SCALE, answer_loss, contrastive_loss, distillation_loss, gather_with_grad


@dataclass
class Fwd2BotOutput(ModelOutput):
    """What `forward` gives for a batch with labels or captions; a loss that the batch does not feed is None.

    `logits` [B, T, V] stand at the caller's positions. Only those whose next token is labelled are computed, the rest
    are zeros; None with `return_logits=False`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    answer_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    distill_loss: Tensor | None = None
    temperature: Tensor | None = None
    retrieval_accuracy: Tensor | None = None


@dataclass
class Batch:
    """The standard batch: see `Fwd2BotMixin.forward`."""

    input_ids: Tensor | None  # [B, T]
    attention_mask: Tensor | None  # [B, T]
    labels: Tensor | None  # [B, T]
    caption_ids: Tensor | None  # [B, L]
    caption_mask: Tensor | None  # [B, L]
    image_inputs: dict[str, Any]


class Fwd2BotLossMixin:
    def _losses(
        self, batch: Batch, summary: Tensor | None, num_tokens: int | None, return_logits: bool
    ) -> Fwd2BotOutput:
        config = self.fwd2bot_config
        if config.distill_weight > 0 and batch.labels is not None and summary is not None:
            raise ValueError("Distillation compares with the base on dense tokens: give pixel_values, not summary.")
        summary, lengths = self._summaries(summary, batch.image_inputs, num_tokens)
        found: dict[str, Tensor] = {}
        image_row = None
        if batch.input_ids is not None:
            image_row = self._collapse(batch.input_ids, batch.attention_mask, summary, lengths).image_row  # [M]
        if batch.labels is not None:
            found.update(self._answer(batch, summary, lengths, image_row, return_logits))
        distributed = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if config.contrastive_weight > 0 and (batch.caption_ids is not None or distributed):
            pairs = torch.cat(self._pairs(batch, summary, image_row), dim=1)  # [C, 2 D]
            if distributed:  # every rank comes here, even with no pair; one collective for images and texts
                pairs = gather_with_grad(pairs)
            if len(pairs):
                scale = self.fwd2bot.logit_scale
                if self.training:
                    with torch.no_grad():
                        scale.clamp_(max=MAX_LOGIT_SCALE)
                images, texts = pairs.chunk(2, dim=1)
                found["contrastive_loss"], found["retrieval_accuracy"] = contrastive_loss(images, texts, scale)
                found["temperature"] = (-scale.detach()).exp()
        terms = [
            weight * found[name]
            for name, weight in (
                ("answer_loss", config.answer_weight),
                ("contrastive_loss", config.contrastive_weight),
                ("distill_loss", config.distill_weight),
            )
            if name in found
        ]
        if not terms:
            raise ValueError("This batch has neither a labelled token nor a caption: there is nothing to learn from.")
        found["loss"] = sum(terms)
        if distributed:  # DistributedDataParallel waits for every parameter, also those a text-only batch leaves out
            found["loss"] = found["loss"] + sum(0 * p.flatten()[0] for p in self.parameters() if p.requires_grad)
        # in the order of the fields: as a tuple the loss is first and the logits second, as transformers has it
        return Fwd2BotOutput(**{f.name: found.get(f.name) for f in fields(Fwd2BotOutput)})

    def _answer(
        self,
        batch: Batch,
        summary: Tensor | None,
        lengths: list[int] | None,
        image_row: Tensor,
        return_logits: bool,
    ) -> dict[str, Tensor]:
        """The answer loss, the distillation loss and the logits of the rows that have labels."""
        labels, input_ids, row_mask = batch.labels, batch.input_ids, batch.attention_mask
        supervised = (labels[:, 1:] != -100).any(1)  # [B]
        at_rows = supervised.nonzero().flatten()
        if not len(at_rows):
            return {}
        if len(at_rows) < len(labels):  # rows for the contrastive loss alone need no answer pass
            used = supervised[image_row]  # [M]
            summary = summary[used] if bool(used.any()) else None
            lengths = lengths and [n for n, use in zip(lengths, used.tolist(), strict=True) if use]
            row_mask = None if row_mask is None else row_mask[at_rows]
            input_ids = input_ids[at_rows]
        plan = self._collapse(input_ids, row_mask, summary, lengths if summary is not None else None)
        origin = (at_rows[:, None] * labels.shape[1] + torch.arange(labels.shape[1], device=labels.device)).flatten()
        origin = origin[plan.origin]  # [N] places in the whole batch
        hidden = self._answer_hidden(plan, input_ids, summary)  # [N, D]
        targets = labels.flatten()[origin].masked_fill(plan.is_summary, -100)  # [N]
        targets = torch.cat([targets[1:], targets.new_tensor([-100])])
        targets[plan.lengths.cumsum(0) - 1] = -100  # the end of a row does not predict the next row
        labelled = (targets != -100).nonzero().flatten()
        origin, targets = origin[labelled], targets[labelled]
        logits = self.get_output_embeddings()(hidden[labelled])  # the head runs where a label is, and nowhere else
        found = {"answer_loss": answer_loss(logits, targets)}
        if self.fwd2bot_config.distill_weight > 0:
            found["distill_loss"] = distillation_loss(logits, self._teacher_logits(batch, origin))
        if return_logits:
            spread = logits.new_zeros(labels.numel(), logits.shape[-1]).index_copy(0, origin, logits)
            found["logits"] = spread.view(*labels.shape, -1)
        return found

    def _answer_hidden(self, plan: Collapsed, input_ids: Tensor, summary: Tensor | None) -> Tensor:
        """The answer pass: last hidden states of all tokens, [N, D]."""
        rows, mask = self._answer_rows(plan, input_ids, summary)
        return self._language_model()(inputs_embeds=rows, use_cache=False).last_hidden_state[mask]

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch, at: Tensor) -> Tensor:
        """What the base says, from dense tokens, at places `at` of the flattened batch."""
        with self.fwd2bot_disabled():
            hidden = self._host_backbone(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                return_dict=True,
                use_cache=False,
                **batch.image_inputs,
            ).last_hidden_state
            return self.get_output_embeddings()(hidden.flatten(0, 1)[at])

    def _pairs(self, batch: Batch, summary: Tensor | None, image_row: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unit vectors of this rank's captioned images and of their captions, both [C, D]."""
        ids, mask = batch.caption_ids, batch.caption_mask
        tokens = self.fwd2bot.tokens
        none = tokens.new_zeros(0, tokens.shape[1])
        if ids is None:
            return none, none
        mask = torch.ones_like(ids) if mask is None else mask
        images = 0 if summary is None else len(summary)
        rows = images if batch.input_ids is None else len(batch.input_ids)
        if len(ids) != rows:
            raise ValueError(f"{len(ids)} captions for {rows} rows: give every row one, or an all-zero mask.")
        image_row = torch.arange(images, device=ids.device) if image_row is None else image_row
        at = mask.any(1).nonzero().flatten()  # [C] rows with a caption
        first = torch.full((rows,), images, device=ids.device)
        first = first.scatter_reduce(0, image_row, torch.arange(images, device=ids.device), "amin")[at]  # [C]
        if bool((first == images).any()):
            raise ValueError(f"Row(s) {at[first == images].tolist()} have a caption, but no image for it.")
        if not len(at):
            return none, none
        texts = self.compress_text(ids[at], mask[at], num_tokens=summary.shape[1])
        pooling = self.fwd2bot_config.pooling
        return embed(summary[first], pooling), embed(texts, pooling)
