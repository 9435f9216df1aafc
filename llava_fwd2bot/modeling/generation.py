"""`generate` from pixels or from stored summaries, with the ids that the base would return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .prompts import Prompt, PromptCriteria, PromptProcessors, PromptStreamer, SeesPrompt

_GIVEN_INSTEAD = ("past_key_values", "cache", "inputs_embeds")  # may hold images already
_AHEAD = "it continues the prompt by guessed tokens, and knows the prompt by its ids alone"
_FROM_HUB = "transformers runs it by code from the Hub, which is given no image"
# settings of generate that do not go with a collapsed prompt, when they are on, and why
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("assistant_model", lambda v: v is not None, _AHEAD),
    ("prompt_lookup_num_tokens", lambda v: v is not None, _AHEAD),
    ("assistant_early_exit", lambda v: v is not None, _AHEAD),
    ("use_mtp", bool, _AHEAD),
    ("custom_generate", lambda v: v is not None, "it is a decoding loop of its own, which is given no image"),
    ("penalty_alpha", bool, _FROM_HUB),
    ("dola_layers", lambda v: v is not None, _FROM_HUB),
    ("constraints", lambda v: v is not None, _FROM_HUB),
    ("force_words_ids", lambda v: v is not None, _FROM_HUB),
    ("num_beam_groups", lambda v: (v or 1) > 1, _FROM_HUB),
    ("prefill_chunk_size", lambda v: v is not None, "the collapsed prompt is short, and is read at once"),
    ("token_healing", bool, "it takes the end of the prompt's ids away, but not of what is read in their place"),
    ("cache_implementation", lambda v: v == "paged", "continuous batching is given no image"),
    ("position_ids", lambda v: v is not None, "collapsing the image placeholders changes the positions"),
)


class Fwd2BotGenerationMixin:
    prompt_in_output = True  # whether the host's generate gives the prompt's ids before the new ones

    def _host_generate(self, **kwargs: Any) -> Any:
        """generate from embeddings, as the host's language model has it."""
        return super().generate(**kwargs)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The base's `generate`; `summary=` [M, k, D] may stand for `pixel_values=`, and `num_tokens=` is j ≤ k.

        The prompt in the answer is the caller's, placeholders included, so that code which slices it off by its length
        works unchanged. `max_length` and `min_length` count that prompt as well, and all that looks at the prompt
        (penalties, constraints, stop strings, processors and criteria of your own) sees it. Padding may be on either
        side.

        Raises:
            ValueError: placeholders and images do not match; an option does not go with images, with the reason.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        summary, num_tokens = kwargs.pop("summary", None), kwargs.pop("num_tokens", None)
        image_inputs = self._take_image_inputs(kwargs)
        if not self._fwd2bot_enabled or (summary is None and not image_inputs):
            if summary is not None:
                raise ValueError("Fwd2Bot is disabled here: the base knows no summaries.")
            if input_ids is not None:
                kwargs["input_ids"] = input_ids
                if self._fwd2bot_enabled and all(kwargs.get(name) is None for name in _GIVEN_INSTEAD):
                    self._collapse(input_ids, kwargs.get("attention_mask"), None, None)  # no image for a placeholder
            return super().generate(generation_config=generation_config, **image_inputs, **kwargs)
        if input_ids is None:
            raise ValueError("generate needs input_ids that say where the images stand.")
        if any(kwargs.get(name) is not None for name in _GIVEN_INSTEAD):
            raise ValueError("A prompt with images takes neither past_key_values (cache) nor inputs_embeds.")
        self._refuse(generation_config, kwargs)
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = self._mask_from_padding(input_ids, generation_config, kwargs)
        summary, lengths = self._summaries(summary, image_inputs, num_tokens)
        plan = self._collapse(input_ids, attention_mask, summary, lengths)
        rows, mask = self._answer_rows(plan, input_ids, summary, side="left")  # [B, L, D], [B, L]
        short, _ = plan.pad(input_ids.flatten()[plan.origin], side="left")  # [B, L]
        pad = self._generation_setting("pad_token_id", generation_config, kwargs)
        short = short.masked_fill(~mask, 0 if pad is None else pad).clamp(min=0)  # a host's image token may be -200
        if self.prompt_in_output:
            prompt = Prompt(input_ids, attention_mask, short.shape[1])
            self._set_lengths(prompt, generation_config, kwargs)
            kwargs["logits_processor"] = PromptProcessors(kwargs.get("logits_processor"), prompt)
            kwargs["stopping_criteria"] = PromptCriteria(kwargs.get("stopping_criteria"), prompt)
            if kwargs.get("streamer") is not None:
                kwargs["streamer"] = PromptStreamer(kwargs["streamer"], input_ids.cpu())
        out = self._host_generate(
            input_ids=short,
            inputs_embeds=rows,
            attention_mask=mask.long(),
            generation_config=generation_config,
            **kwargs,
        )
        if not self.prompt_in_output:
            return out
        if isinstance(out, Tensor):
            return prompt.restore(out)
        out.sequences = prompt.restore(out.sequences)
        return out

    def _refuse(self, generation_config: Any, kwargs: dict[str, Any]) -> None:
        for name, is_on, reason in _REFUSED:
            if reason is _FROM_HUB and not self.prompt_in_output:
                continue  # the original's base generates from embeddings too, and its transformers has these modes
            if is_on(self._generation_setting(name, generation_config, kwargs)):
                raise ValueError(
                    f"generate does not take {name} with images under Fwd2Bot: {reason}. Leave it out, or ask the base "
                    "inside fwd2bot_disabled()."
                )

    def _set_lengths(self, prompt: Prompt, generation_config: Any, kwargs: dict[str, Any]) -> None:
        """`max_length` and `min_length`, from wherever they come, for the collapsed prompt; into `kwargs`."""
        longest = self._generation_setting("max_length", generation_config, kwargs)
        sets_new = self._generation_setting("max_new_tokens", generation_config, kwargs) is not None
        if longest is not None and not sets_new:
            if longest <= prompt.ids.shape[1]:
                raise ValueError(
                    f"The prompt is {prompt.ids.shape[1]} tokens long, image placeholders included, so max_length="
                    f"{longest} leaves no room for an answer. Raise it, or better, set max_new_tokens."
                )
            kwargs["max_length"] = longest - prompt.shorter_by
        shortest = self._generation_setting("min_length", generation_config, kwargs)
        if shortest and self._generation_setting("min_new_tokens", generation_config, kwargs) is None:
            kwargs["min_length"] = max(shortest - prompt.shorter_by, 0)

    # ------------------------------------------------------------------ where generate makes its helpers
    def _get_logits_processor(self, **given: Any) -> Any:
        # all of them, generate's own as well, are made for the caller's prompt and see it
        prompt = getattr(given.get("logits_processor"), "prompt", None)
        if prompt is None:
            return super()._get_logits_processor(**given)
        config = prompt.as_in_base(given["generation_config"])
        rows_of_each = max(config.num_beams or 1, config.num_return_sequences or 1)
        mask = prompt.mask.repeat_interleave(rows_of_each, dim=0)  # as generate has it by now
        given.update(
            generation_config=config,
            input_ids_seq_length=prompt.ids.shape[1],
            encoder_input_ids=prompt.ids,
            model_kwargs={**(given.get("model_kwargs") or {}), "attention_mask": mask},
        )
        processors = super()._get_logits_processor(**given)
        return type(processors)([SeesPrompt(processors, prompt)] if len(processors) else [])

    def _get_stopping_criteria(self, **given: Any) -> Any:
        prompt = getattr(given.get("stopping_criteria"), "prompt", None)
        criteria = super()._get_stopping_criteria(**given)
        if prompt is None:
            return criteria
        given_by_caller = {id(c) for c in given["stopping_criteria"]}

        def stays(criterion: Any) -> bool:
            # generate looks for the one that knows the ends of text; its own maximal length is the collapsed prompt's
            own_length = hasattr(criterion, "max_length") and id(criterion) not in given_by_caller
            return own_length or hasattr(criterion, "eos_token_id")

        return type(criteria)([c if stays(c) else SeesPrompt(c, prompt) for c in criteria])

    def _mask_from_padding(self, input_ids: Tensor, generation_config: Any, kwargs: dict[str, Any]) -> Tensor:
        # as generate itself does: padding is told from the ids where the pad token cannot also be an end of text
        pad = self._generation_setting("pad_token_id", generation_config, kwargs)
        ends = self._generation_setting("eos_token_id", generation_config, kwargs)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if pad is None or pad in ends:
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    def _generation_setting(self, name: str, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        value = kwargs.get(name, getattr(generation_config, name, None))
        return getattr(self.generation_config, name, None) if value is None else value
