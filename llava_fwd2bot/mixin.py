"""Fwd2BotMixin: a host's four hooks, and both passes over them; the compress pass is in summaries.py.

    class Fwd2BotLlava(Fwd2BotMixin, LlavaForConditionalGeneration): …

The mixin is put on a loaded model by changing the class of that one model (`add_fwd2bot`). Shapes as in bottleneck.py;
C rows with a caption, V vocabulary, j ≤ k summary tokens in use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .bottleneck import Collapsed, collapse
from .modeling.attach import Fwd2BotAttachMixin
from .modeling.generation import Fwd2BotGenerationMixin
from .modeling.objective import Batch, Fwd2BotLossMixin, Step
from .modeling.plan import BatchPlan
from .modeling.saving import Fwd2BotSavingMixin
from .modeling.summaries import Fwd2BotSummaryMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Host  # a host's model class follows the mixin
else:
    _Host = object


class Fwd2BotMixin(
    Fwd2BotAttachMixin, Fwd2BotSummaryMixin, Fwd2BotLossMixin, Fwd2BotGenerationMixin, Fwd2BotSavingMixin, _Host
):
    base_class: type  # the host's model class
    _host_backbone: Callable[..., Any]  # the base's own forward up to the last hidden states
    accepts_loss_kwargs = True  # forward takes num_items_in_batch, so that trainers need not divide by their steps
    image_input_names: tuple[str, ...] = ("pixel_values",)
    past_name = "past_key_values"  # the argument of the backbone that holds the keys and values of earlier tokens

    # ------------------------------------------------------------------ what a host gives
    def _language_model(self) -> nn.Module:
        """The bare decoder: takes `inputs_embeds`, answers `.last_hidden_state`."""
        raise NotImplementedError

    def _dense_tokens(self, **image_inputs: Any) -> list[Tensor]:
        """V: the projected tokens of each image, M × [n_i, D]."""
        raise NotImplementedError

    def _image_token_id(self) -> int:
        raise NotImplementedError

    def _blank_image(self) -> dict[str, Tensor]:
        """The image inputs of one blank image, for ranks without any where weights are split over ranks."""
        raise NotImplementedError

    def _projector_slot(self) -> tuple[nn.Module, str]:
        """Where the projector hangs: its parent module and its name there."""
        raise NotImplementedError

    @classmethod
    def load_base(cls, source: str, **loading: Any) -> nn.Module:
        """The base at `source`, ready for images."""
        return cls.base_class.from_pretrained(source, **loading)

    def adopt_settings(self, checkpoint: Path) -> None:
        """Settings of the base that training changed; transformers' hosts have them in the processor."""

    def load_processor(self, source: str) -> Any:
        """The processor at `source`, for images and text."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(source)

    # ------------------------------------------------------------------ both passes
    def _take_image_inputs(self, kwargs: dict[str, Any], pixel_values: Tensor | None = None) -> dict[str, Any]:
        """Takes what the host's processor gives for images out of `kwargs`."""
        taken = {name: kwargs.pop(name) for name in self.image_input_names if kwargs.get(name) is not None}
        return taken if pixel_values is None else {**taken, "pixel_values": pixel_values}

    def _collapse(
        self, input_ids: Tensor, attention_mask: Tensor | None, summary: Tensor | None, lengths: list[int] | None
    ) -> Collapsed:
        images, k = (0, 1) if summary is None else summary.shape[:2]
        return collapse(input_ids, attention_mask, self._image_token_id(), images, k, lengths)

    def _answer_rows(
        self, plan: Collapsed, input_ids: Tensor, summary: Tensor | None, side: str = "right"
    ) -> tuple[Tensor, Tensor]:
        """The rows that the answer pass reads [B, L, D], and their mask [B, L]."""
        words = self.get_input_embeddings()(input_ids.flatten()[plan.origin].masked_fill(plan.is_summary, 0))
        if summary is not None:
            summary = self.fwd2bot.bridge(summary.to(self.fwd2bot.tokens.dtype)).to(words.device)
        return plan.pad(plan.embeds(words, summary), side)

    def _backbone_forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        summary: Tensor | None = None,
        num_tokens: int | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The answer pass in the place of the host's own backbone, in and out at the caller's positions.

        Trainers that run the backbone themselves and apply the head to what they need (TRL) come through here.
        """
        image_inputs = self._take_image_inputs(kwargs, pixel_values)
        num_tokens = self._draw_num_tokens(num_tokens)
        past = past_key_values if cache is None else cache
        if past is not None:
            kwargs[self.past_name] = past
        if not self._fwd2bot_enabled or (summary is None and not image_inputs):
            # with a cache the images may be in it; generate has looked at its prompt before. How much a cache holds is
            # not read: a static one knows it on the device alone
            if self._fwd2bot_enabled and input_ids is not None and past is None:
                self._collapse(input_ids, attention_mask, None, None)  # placeholders without an image are an error
            return self._host_backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **image_inputs,
                **kwargs,
            )
        if (past is not None and past.get_seq_length() > 0) or position_ids is not None or input_ids is None:
            raise ValueError(
                "A batch with images needs input_ids, and neither past_key_values nor position_ids: collapsing the "
                "image placeholders changes the positions. Use generate() to continue a text."
            )
        summary, lengths = self._summaries(summary, image_inputs, num_tokens)
        plan = self._collapse(input_ids, attention_mask, summary, lengths)
        rows, _ = self._answer_rows(plan, input_ids, summary)
        kwargs["return_dict"] = True
        out = self._host_backbone(inputs_embeds=rows, **kwargs)
        out.last_hidden_state = plan.spread(plan.pack(out.last_hidden_state), input_ids.shape)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        caption_input_ids: Tensor | None = None,
        caption_attention_mask: Tensor | None = None,
        summary: Tensor | None = None,
        num_tokens: int | None = None,
        return_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        micro_batches: int | None = None,
        plan: BatchPlan | None = None,
        **kwargs: Any,
    ) -> Any:
        """Both passes and both losses on the standard batch, in which each image stands as n placeholders.

        Args:
            input_ids, attention_mask, labels: [B, T], padded on either side; rows may hold several images, or none.
            pixel_values (and the host's other image inputs): images in the order of their placeholders.
            summary: [M, k, D] from `compress`, instead of pixel_values.
            caption_input_ids, caption_attention_mask: [B, L]; row i captions the first image of row i, a row of zeros
                in the mask has no caption. Without input_ids, row i captions image i.
            num_tokens: j ≤ k. While training with `nested_k`, drawn at random where not given.
            num_items_in_batch: labelled tokens of the whole optimizer step, over accumulation and ranks, as the Trainer
                of transformers gives it; then the losses of the step's micro-batches add up to the step's loss.
            micro_batches: how many of them there are; the contrastive loss is their mean. Where it is not given, it is
                weighted by the share of the labelled tokens.
            plan: of the batch, by a `planner` in the collator; without it the batch is planned here, which waits for
                the device. With it images that stand in several rows may come once.

        Returns:
            Fwd2BotOutput with labels or captions, otherwise the host's own output; logits at the caller's positions.

        Raises:
            ValueError: images and placeholders do not match; a caption without an image; nothing to learn from.
        """
        if not self._fwd2bot_enabled or (labels is None and caption_input_ids is None):
            given = {
                "pixel_values": pixel_values,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "inputs_embeds": inputs_embeds,
                "labels": labels,
                "summary": summary,
                "num_tokens": num_tokens,
                "num_items_in_batch": num_items_in_batch if labels is not None else None,
                "logits_to_keep": None if isinstance(logits_to_keep, int) and logits_to_keep == 0 else logits_to_keep,
            }
            if not self._fwd2bot_enabled and (summary is not None or caption_input_ids is not None):
                raise ValueError("Fwd2Bot is disabled here: the base knows neither summaries nor captions.")
            given = {name: value for name, value in given.items() if value is not None}
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **given,
                **kwargs,
            )
        for name, value in (("position_ids", position_ids), ("inputs_embeds", inputs_embeds)):
            if value is not None:
                raise ValueError(f"A batch with labels or captions takes no {name}: its rows are put together here.")
        if labels is not None and input_ids is None:
            raise ValueError("labels need input_ids.")
        image_inputs = self._take_image_inputs(kwargs, pixel_values)
        step = None if num_items_in_batch is None else Step(num_items_in_batch, micro_batches)
        batch = Batch(
            input_ids, attention_mask, labels, caption_input_ids, caption_attention_mask, image_inputs, step, plan
        )
        out = self._losses(batch, summary, num_tokens, return_logits)
        return out.to_tuple() if kwargs.get("return_dict") is False else out
