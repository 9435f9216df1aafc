"""The training objective: which rows feed which loss, from one compress pass.

Shapes as in bottleneck.py; C rows with a caption, N tokens without padding, V vocabulary.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import ModelOutput

from ..bottleneck import Collapsed, embed, summary_cosine
from ..losses import Candidates, answer_loss, distillation_loss, gather_sizes, gather_with_grad
from .blocks import contrastive_loss_by_blocks
from .masks import one_sequence_each
from .pairs import content_keys, join_keys
from .plan import BatchPlan, BatchPlanner, labelled_tokens
from .sharding import Fwd2BotRanksMixin, is_sharded, touched


@dataclass
class Fwd2BotOutput(ModelOutput):
    """What `forward` gives for a batch with labels or captions; a loss that the batch does not feed is None.

    `logits` [B, T, V] stand at the caller's positions. Only those whose next token is labelled are computed, the rest
    are zeros; None with `return_logits=False`. `retrieval_accuracy` is None for a single pair, and NaN where all pairs
    are of one picture or of one caption: nothing was told apart. `answer_tokens` is how many labelled tokens
    `answer_loss` (and `distill_loss`) is the mean of. `summary_cosine` is the mean cosine between two tokens of one
    summary, None for one token. In evaluation the batch's pairs come too: unit vectors [C, D], and their keys [C, 2].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    answer_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    distill_loss: Tensor | None = None
    temperature: Tensor | None = None
    retrieval_accuracy: Tensor | None = None
    answer_tokens: Tensor | None = None
    summary_cosine: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    pair_keys: Tensor | None = None


@dataclass
class Step:
    """The optimizer step that a micro-batch is part of, over accumulation and ranks.

    With it the losses of all micro-batches of the step ADD UP to the step's loss: the answer loss is the mean over all
    its labelled tokens, the contrastive loss the mean over its micro-batches.
    """

    tokens: Tensor | int  # labelled tokens of the whole step
    micro_batches: int | None  # None: not known; the contrastive loss is then weighted by the share of the tokens

    def shares(self, own: Tensor) -> tuple[Tensor, Tensor | float]:
        """The weights of the answer loss and of the contrastive loss of a micro-batch with `own` labelled tokens.

        `own` comes in the dtype that the weights are to have.
        """
        tokens = torch.as_tensor(self.tokens, device=own.device).to(own.dtype)
        share = own / tokens.clamp(min=1)
        if self.micro_batches is not None:
            return share, 1 / self.micro_batches
        return share, torch.where(tokens > 0, share, 1.0)


@dataclass
class Batch:
    """The standard batch: see `Fwd2BotMixin.forward`."""

    input_ids: Tensor | None  # [B, T]
    attention_mask: Tensor | None  # [B, T]
    labels: Tensor | None  # [B, T]
    caption_input_ids: Tensor | None  # [B, L]
    caption_attention_mask: Tensor | None  # [B, L]
    image_inputs: dict[str, Any]
    step: Step | None = None
    plan: BatchPlan | None = None

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return next(ids.device for ids in (self.input_ids, self.caption_input_ids) if ids is not None)


class Fwd2BotLossMixin(Fwd2BotRanksMixin):
    _told_of_single_pairs = False

    def _losses(
        self, batch: Batch, summary: Tensor | None, num_tokens: int | None, return_logits: bool
    ) -> Fwd2BotOutput:
        config = self.fwd2bot_config
        if config.distill_weight > 0 and batch.labels is not None and summary is not None:
            raise ValueError("Distillation compares with the base on dense tokens: give pixel_values, not summary.")
        num_tokens = self._draw_num_tokens(num_tokens)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        distributed = self.training and several  # the ranks' pairs are each other's negatives in training alone
        together = (distributed or (several and batch.plan is not None)) and is_sharded(self._language_model())
        fullest = self._fullest = self._calls(batch, together)
        if fullest is not None and fullest.images and not batch.image_inputs:
            fullest.run_idle(self._idle_image(num_tokens))
        found: dict[str, Tensor] = {}
        # without labels the contrastive loss alone reads the summaries, and pooled ones will do
        unread = batch.labels is None if batch.plan is None else not batch.plan.labelled_rows
        pooled = None
        if unread and summary is None and batch.image_inputs:
            pooled = self._pool_images(batch.image_inputs, num_tokens)
        if pooled is not None:
            summary, lengths, found["summary_cosine"] = pooled  # [U, 1, D]
        else:
            summary, lengths = self._summaries(summary, batch.image_inputs, num_tokens)  # [U, j, D]
            num_tokens = num_tokens if summary is None else summary.shape[1]
        if fullest is not None and batch.image_inputs:
            fullest.run_idle(summary)  # an image whose row has neither label nor caption; backward must pass it too
        plan = self._planned(batch, summary, lengths)
        if summary is not None and summary.shape[1] > 1:
            found["summary_cosine"] = summary_cosine(summary.detach())
        if plan.labelled_rows:
            found.update(self._answer(batch, plan, summary, return_logits))
        if fullest is not None and fullest.labelled_rows and "answer_loss" not in found:
            fullest.run_idle(self._idle_answer())
        if config.contrastive_weight > 0 and (plan.captions is not None or distributed or fullest is not None):
            found.update(self._contrastive(batch, plan, summary, num_tokens, distributed))
        weights = {
            "answer_loss": config.answer_weight,
            "contrastive_loss": config.contrastive_weight,
            "distill_loss": config.distill_weight,
        }
        if batch.step is not None:
            own = found.get("answer_tokens", torch.zeros((), device=self.fwd2bot.tokens.device))
            wide = next((found[name].dtype for name in weights if name in found), torch.float32)
            of_answers, of_pairs = batch.step.shares(own.to(wide))
            weights = {n: w * (of_pairs if n == "contrastive_loss" else of_answers) for n, w in weights.items()}
        terms = [weight * found[name] for name, weight in weights.items() if name in found]
        if not terms and not distributed:  # other ranks may have something
            raise ValueError("This batch has neither a labelled token nor a caption: there is nothing to learn from.")
        found["loss"] = sum(terms)
        if distributed or (self.training and fullest is not None):
            found["loss"] = found["loss"] + sum(fullest.idle if fullest else ())
            if "contrastive_loss" not in found:
                found["loss"] = found["loss"] + touched(self.parameters())
        self._fullest = None
        # in the order of the fields: as a tuple the loss is first and the logits second, as transformers has it
        return Fwd2BotOutput(**{f.name: found.get(f.name) for f in fields(Fwd2BotOutput)})

    def planner(self) -> BatchPlanner:
        """What plans this model's training batches, for a collator."""
        config = self.fwd2bot_config
        lengths = {config.num_summary_tokens, *(config.nested_k or ())}
        return BatchPlanner(self._image_token_id(), tuple(sorted(lengths)), config.contrastive_weight > 0)

    def _planned(self, batch: Batch, summary: Tensor | None, lengths: list[int] | None) -> BatchPlan:
        """The batch's own plan, or one that is made here of ids that are fetched from the device.

        Raises:
            ValueError: the plan is of other images than the batch's.
        """
        plan, count, k = batch.plan, *((0, 1) if summary is None else summary.shape[:2])
        if plan is None:
            tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
            planner = BatchPlanner(self._image_token_id(), (k,), self.fwd2bot_config.contrastive_weight > 0)
            return planner(tensors, count, lengths).to(batch.device, non_blocking=True)
        if plan.distinct_images != count:
            raise ValueError(f"The batch was planned for {plan.distinct_images} image(s), and {count} came with it.")
        own = plan.image_lengths
        if own is not None and lengths is not None and own != plan.list_of_images(lengths) and sum(own) != len(own):
            raise ValueError(
                f"The rows hold {own} placeholders for the images, and the images have {plan.list_of_images(lengths)} "
                "dense tokens: the processor is of another model, or its placeholders were cut."
            )
        return plan

    def _contrastive(
        self, batch: Batch, plan: BatchPlan, summary: Tensor | None, num_tokens: int | None, distributed: bool
    ) -> dict[str, Tensor]:
        """The contrastive loss over the pairs of all ranks; every rank comes here, even with no pair."""
        images, texts, keys = self._pairs(batch, plan, summary, num_tokens)
        vectors = {} if self.training else {"image_embeds": images, "text_embeds": texts, "pair_keys": keys}
        if self._fullest is not None and self._fullest.captions and not len(texts):
            self._fullest.run_idle(self._idle_text(num_tokens))
        if distributed:  # one collective for images and texts
            pairs = torch.cat([images, texts], dim=1)  # [C, 2 D]
            sizes = [c for _, c, _ in plan.ranks] if plan.ranks else gather_sizes(len(pairs), pairs.device)
            # before the gather, so that on no rank a gradient is ready, and DistributedDataParallel sends it, before
            # the gather's backward has run: their order must be the same everywhere
            pairs = pairs + touched(self.parameters())
            pairs, keys = gather_with_grad(pairs, sizes), gather_with_grad(keys, sizes)
            images, texts = pairs.chunk(2, dim=1)
        if not len(images):
            if self._fullest is not None:
                self._fullest.run_idle(self.fwd2bot.bounded_logit_scale())
            return {}
        scale = self.fwd2bot.bounded_logit_scale()
        candidates = Candidates.of(*keys.unbind(1), images.dtype)
        loss, accuracy = contrastive_loss_by_blocks(images, texts, scale, candidates)
        found = {"contrastive_loss": loss, "temperature": (-scale.detach()).exp().squeeze(), **vectors}
        if len(images) > 1:
            found["retrieval_accuracy"] = accuracy
        elif self.training and not self._told_of_single_pairs:
            self._told_of_single_pairs = True
            warnings.warn(
                "This batch has one captioned image over all processes, so the contrastive loss has no negatives and "
                "is 0. Raise the batch size per process: accumulation adds no negatives. (contrastive_chunk bounds "
                "the memory of a large batch.)",
                stacklevel=2,
            )
        return found

    def labelled_tokens(self, labels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Where a label counts in the answer loss, [B, T] bool: on a real token that follows another one of its row."""
        return labelled_tokens(labels, input_ids, attention_mask, self._image_token_id())

    def _answer(self, batch: Batch, plan: BatchPlan, summary: Tensor | None, return_logits: bool) -> dict[str, Tensor]:
        """The answer loss, the distillation loss and the logits of the rows that have labels."""
        own = plan.answer(summary.shape[1] if summary is not None else next(iter(plan.answers)))
        if summary is not None:
            summary = plan.of_images(summary)  # [M, j, D]
            if plan.answer_images is not None:
                # rows for the contrastive loss alone need no answer pass
                summary = summary.index_select(0, plan.answer_images) if len(plan.answer_images) else None
        hidden = self._answer_hidden(own.collapsed, batch.input_ids, summary)  # [N, D]
        origin = own.collapsed.origin[own.labelled]  # [A] places in the whole batch
        # the head runs where a label is, and nowhere else
        logits = self.get_output_embeddings()(hidden.index_select(0, own.labelled))
        found = {"answer_loss": answer_loss(logits, own.targets)}
        found["answer_tokens"] = logits.new_full((), plan.labelled_tokens, dtype=torch.long)
        if self.fwd2bot_config.distill_weight > 0:
            found["distill_loss"] = distillation_loss(logits, self._teacher_logits(batch, plan, origin))
        if return_logits:
            labels = batch.labels
            spread = logits.new_zeros(labels.numel(), logits.shape[-1]).index_copy(0, origin, logits)
            found["logits"] = spread.view(*labels.shape, -1)
        return found

    def _answer_hidden(self, plan: Collapsed, input_ids: Tensor, summary: Tensor | None) -> Tensor:
        """The answer pass: last hidden states of all tokens, [N, D]."""
        rows, _ = self._answer_rows(plan, input_ids, summary)
        if summary is None:
            self._idle_bridge()
        if self._fullest is not None and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # text alone: backward must pass the first layer as on other ranks
        with one_sequence_each():
            return plan.pack(self._language_model()(inputs_embeds=rows, use_cache=False).last_hidden_state)

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch, plan: BatchPlan, at: Tensor) -> Tensor:
        """What the base says, from dense tokens, at places `at` of the flattened batch."""
        images = batch.image_inputs
        if plan.distinct is not None:  # the base wants each as often as it stands in the rows
            images = {name: plan.of_images(value) for name, value in images.items()}
        with self.fwd2bot_disabled():
            hidden = self._host_backbone(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                return_dict=True,
                use_cache=False,
                **images,
            ).last_hidden_state
            return self.get_output_embeddings()(hidden.flatten(0, 1)[at])

    def _pairs(
        self, batch: Batch, plan: BatchPlan, summary: Tensor | None, num_tokens: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of this rank's captioned images and of their captions, both [C, D], and their keys [C, 2]."""
        tokens = self.fwd2bot.tokens
        if plan.captions is None:
            # in the dtype of `embed`, which the other ranks' are in
            wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
            none = tokens.new_zeros(0, tokens.shape[1], dtype=wide)
            return none, none, none.new_zeros(0, 2, dtype=torch.long)
        pooling, captions = self.fwd2bot_config.pooling, plan.captions
        texts = self._embed_captions(captions, num_tokens)  # [C, D]
        of_images = plan.of_images(self._image_keys(batch.image_inputs, summary))[captions.image]
        keys = torch.stack([of_images, captions.keys], dim=1)  # [C, 2]
        return plan.of_images(embed(summary, pooling))[captions.image], texts, keys

    def _image_keys(self, image_inputs: dict[str, Any], summary: Tensor) -> Tensor:
        """A key of each image's content, [M]: equal images have equal keys, also on other ranks.

        A host whose image inputs do not come image by image says here how to tell its images apart.
        """
        per_image = [
            v for v in image_inputs.values() if isinstance(v, (Tensor, list, tuple)) and len(v) == len(summary)
        ]
        pixels = image_inputs.get(self.image_input_names[0], image_inputs.get("pixel_values"))
        if not any(v is pixels for v in per_image):  # stored summaries, or pixels that do not come image by image
            per_image = [summary]
        per_image = [v for v in per_image if not isinstance(v[0], str)]
        tensors = [v if isinstance(v, Tensor) or isinstance(v[0], Tensor) else torch.tensor(v) for v in per_image]
        keys = [content_keys(v) for v in tensors]
        return join_keys([key.to(summary.device) for key in keys])
