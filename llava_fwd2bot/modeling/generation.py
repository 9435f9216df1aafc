"""`generate` from pixels or from stored summaries, with the ids that the base would return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WholePrompt:
    """A streamer between generate and the user's: the first ids it gets are the prompt, which must be the caller's."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self.streamer, self.prompt = streamer, prompt

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt, None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


class _SeesWholePrompt:
    """A user's stopping criterion or logits processor, which counts from the caller's prompt."""

    def __init__(self, function: Any, prompt: Tensor, shorter: int) -> None:
        self.function, self.prompt, self.shorter = function, prompt, shorter

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:  # two arguments: generate looks at the signature
        prompt = self.prompt.repeat_interleave(len(input_ids) // len(self.prompt), dim=0).to(input_ids.device)
        return self.function(torch.cat([prompt, input_ids[:, self.shorter :]], dim=1), scores)


class Fwd2BotGenerationMixin:
    prompt_in_output = True  # whether the host's generate gives the prompt's ids before the new ones

    def _host_generate(self, **kwargs: Any) -> Any:
        """generate from embeddings, as the host's language model has it."""
        return super().generate(**kwargs)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The base's `generate`; `summary=` [M, k, D] may stand for `pixel_values=`, and `num_tokens=` is j ≤ k.

        The prompt in the answer is the caller's, placeholders included, so that code which slices it off by its length
        works unchanged. `max_length` and `min_length` count that prompt as well. Padding may be on either side.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        summary, num_tokens = kwargs.pop("summary", None), kwargs.pop("num_tokens", None)
        image_inputs = self._take_image_inputs(kwargs)
        if not self._fwd2bot_enabled or (summary is None and not image_inputs):
            if summary is not None:
                raise ValueError("Fwd2Bot is disabled here: the base knows no summaries.")
            if input_ids is not None:
                kwargs["input_ids"] = input_ids
            return super().generate(generation_config=generation_config, **image_inputs, **kwargs)
        if input_ids is None:
            raise ValueError("generate needs input_ids that say where the images stand.")
        if any(kwargs.get(name) is not None for name in ("past_key_values", "cache", "inputs_embeds")):
            raise ValueError("A prompt with images takes neither past_key_values (cache) nor inputs_embeds.")
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = self._mask_from_padding(input_ids, generation_config, kwargs)
        summary, lengths = self._summaries(summary, image_inputs, num_tokens)
        plan = self._collapse(input_ids, attention_mask, summary, lengths)
        rows, mask = self._answer_rows(plan, input_ids, summary, side="left")  # [B, L, D], [B, L]
        # the ids that go along keep logits processors (repetition penalty, …) and lengths as they are in the base
        short, _ = plan.pad(input_ids.flatten()[plan.origin], side="left")  # [B, L]
        pad = self._generation_setting("pad_token_id", generation_config, kwargs)
        short = short.masked_fill(~mask, 0 if pad is None else pad).clamp(min=0)  # a host's image token may be -200
        shorter_by = input_ids.shape[1] - short.shape[1]
        for name in ("max_length", "min_length") if self.prompt_in_output else ():
            if kwargs.get(name) is not None:
                kwargs[name] = max(kwargs[name] - shorter_by, 0)
            elif generation_config is not None and getattr(generation_config, name, None):
                kwargs[name] = max(getattr(generation_config, name) - shorter_by, 0)
        if kwargs.get("streamer") is not None and self.prompt_in_output:
            kwargs["streamer"] = _WholePrompt(kwargs["streamer"], input_ids.cpu())
        for name in ("stopping_criteria", "logits_processor") if self.prompt_in_output else ():
            if kwargs.get(name) is not None:
                wrapped = [_SeesWholePrompt(f, input_ids, short.shape[1]) for f in kwargs[name]]
                kwargs[name] = type(kwargs[name])(wrapped)
        if kwargs.get("prefix_allowed_tokens_fn") is not None and self.prompt_in_output:
            allowed, after = kwargs["prefix_allowed_tokens_fn"], short.shape[1]
            kwargs["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([input_ids[row].to(ids.device), ids[after:]])
            )
        out = self._host_generate(
            input_ids=short,
            inputs_embeds=rows,
            attention_mask=mask.long(),
            generation_config=generation_config,
            **kwargs,
        )
        if not self.prompt_in_output:
            return out
        sequences = out if isinstance(out, Tensor) else out.sequences
        prompt = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
        sequences = torch.cat([prompt, sequences[:, short.shape[1] :]], dim=1)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        return out

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
