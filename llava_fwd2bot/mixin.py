"""Fwd2BotMixin: compress, embed, forward, generate, over a host's four hooks.

    class Fwd2BotLlava(Fwd2BotMixin, LlavaForConditionalGeneration): …

The mixin is put on a loaded model by changing the class of that one model (`add_fwd2bot`). Shapes as in bottleneck.py;
C rows with a caption, V vocabulary, j ≤ k summary tokens in use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bottleneck import Collapsed, collapse, compress_pass, embed, nested_averages
from .checkpoint.files import save_checkpoint
from .modeling.attach import Fwd2BotAttachMixin
from .modeling.generation import Fwd2BotGenerationMixin
from .modeling.objective import Batch, Fwd2BotLossMixin


class Fwd2BotMixin(Fwd2BotAttachMixin, Fwd2BotLossMixin, Fwd2BotGenerationMixin):
    # both losses are means of a micro-batch, so a trainer divides them by the accumulation steps, and only once
    accepts_loss_kwargs = False
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

    # ------------------------------------------------------------------ compress pass
    def compress(
        self, pixel_values: Tensor | None = None, *, num_tokens: int | None = None, **image_inputs: Any
    ) -> Tensor:
        """The summaries S of images, [M, k, D].

        Args:
            pixel_values: as the host's processor gives them, with its other image inputs by keyword.
            num_tokens: j ≤ k: the first j summary tokens alone, [M, j, D], at less cost; the first j rows of S.
        """
        if pixel_values is not None:
            image_inputs["pixel_values"] = pixel_values
        if not any(image_inputs.get(name) is not None for name in ("pixel_values", *self.image_input_names)):
            raise ValueError(f"compress needs {self.image_input_names[0]}, as the processor gives them.")
        return self._compress_images(image_inputs, num_tokens)[0]

    def _compress_images(self, image_inputs: dict[str, Any], num_tokens: int | None = None) -> tuple[Tensor, list[int]]:
        dense = self._dense_tokens(**image_inputs)
        return self._compress(dense, self.fwd2bot.image_prompt_ids, num_tokens), [len(v) for v in dense]

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

    def _compress(self, contexts: list[Tensor], prompt_ids: Tensor, num_tokens: int | None) -> Tensor:
        k = self.fwd2bot_config.num_summary_tokens
        j = k if num_tokens is None else num_tokens
        if not 1 <= j <= k:
            raise ValueError(f"num_tokens must be from 1 to this model's k = {k}, got {j}.")
        if not self._fwd2bot_enabled:
            raise ValueError("Fwd2Bot is disabled here: there are no summaries inside fwd2bot_disabled().")

        images = prompt_ids is not self.fwd2bot.text_prompt_ids

        def run(*contexts: Tensor) -> Tensor:
            with self._stages.use("compress"):
                prompt = self.get_input_embeddings()(prompt_ids)
                tokens = self.fwd2bot.tokens[:j]
                if self.fwd2bot_config.residual == "none":
                    return compress_pass(self._language_model(), contexts, prompt, tokens)
                # a text's summary is for retrieval alone, and there is nothing coarse in it to start from
                averages = [nested_averages(len(c), j).to(c) @ c for c in contexts] if images else None  # M × [j, D]
                out = compress_pass(self._language_model(), contexts, prompt, tokens, averages)
                if averages is None:
                    return out
                return torch.stack(averages).to(out) + self.fwd2bot.log_gain.exp().to(out) * out

        chunk = self.fwd2bot_config.contrastive_chunk
        if chunk is None or len(contexts) <= chunk or not (self.training and torch.is_grad_enabled()):
            return run(*contexts)
        # a checkpointed chunk is GradCache: forward keeps the summaries alone, backward recomputes chunk by chunk
        chunks = [contexts[at : at + chunk] for at in range(0, len(contexts), chunk)]
        return torch.cat([checkpoint(run, *part, use_reentrant=False) for part in chunks])

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

    # ------------------------------------------------------------------ both passes
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
        nested = self.fwd2bot_config.nested_k
        if num_tokens is None and nested and self.training and torch.is_grad_enabled():
            num_tokens = nested[int(torch.randint(len(nested), ()))]
        return self._compress_images(image_inputs, num_tokens)

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
        past = past_key_values if cache is None else cache
        has_past = past is not None and past.get_seq_length() > 0
        if past is not None:
            kwargs[self.past_name] = past
        if not self._fwd2bot_enabled or (summary is None and not image_inputs):
            if self._fwd2bot_enabled and input_ids is not None and not has_past:
                self._collapse(input_ids, attention_mask, None, None)  # placeholders without an image are an error
            return self._host_backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **image_inputs,
                **kwargs,
            )
        if has_past or position_ids is not None or input_ids is None:
            raise ValueError(
                "A batch with images needs input_ids, and neither past_key_values nor position_ids: collapsing the "
                "image placeholders changes the positions. Use generate() to continue a text."
            )
        summary, lengths = self._summaries(summary, image_inputs, num_tokens)
        plan = self._collapse(input_ids, attention_mask, summary, lengths)
        rows, mask = self._answer_rows(plan, input_ids, summary)
        kwargs["return_dict"] = True
        out = self._host_backbone(inputs_embeds=rows, **kwargs)
        out.last_hidden_state = plan.spread(out.last_hidden_state[mask], input_ids.shape)
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
        batch = Batch(input_ids, attention_mask, labels, caption_input_ids, caption_attention_mask, image_inputs)
        out = self._losses(batch, summary, num_tokens, return_logits)
        return out.to_tuple() if kwargs.get("return_dict") is False else out

    # ------------------------------------------------------------------ disk
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the Fwd2Bot checkpoint: settings, R, and one PEFT adapter per stage. The base is not copied.

        Args:
            processor: the processor to save beside it, so that AutoProcessor opens the checkpoint.
            is_main_process: False on the ranks that do not write.
            state_dict: weights gathered by a trainer from several ranks, used instead of the live ones.
        """
        if not kwargs.get("is_main_process", True):
            return
        save_checkpoint(self, save_directory, processor=kwargs.get("processor"), state_dict=kwargs.get("state_dict"))
