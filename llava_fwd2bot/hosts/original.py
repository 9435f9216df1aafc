"""The original LLaVA (haotian-liu/LLaVA, package `llava` 1.2.2): LlavaLlamaForCausalLM and its own batch.

An image stands in `input_ids` as one IMAGE_TOKEN_INDEX (-200); pixels come as `images`. How crops become one row of
dense tokens (anyres) is asked of LLaVA itself, so the crops of an image are compressed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ..mixin import Fwd2BotMixin


class OriginalHost(Fwd2BotMixin):
    """What the original's classes share: `get_model()`, `mm_projector`, images by their placeholder."""

    image_input_names = ("images", "image_sizes")
    has_processor = False
    prompt_in_output = False  # the original's generate gives new ids alone
    default_num_tokens: int | None = None  # j for programs that know nothing of it
    quantization_skip = ("model.mm_projector", "model.vision_tower", "lm_head")

    @classmethod
    def load_base(cls, source: str, **loading: Any) -> nn.Module:
        if "dtype" in loading:  # its name in the versions that the original was written for
            loading["torch_dtype"] = loading.pop("dtype")
        model = super().load_base(source, **loading)
        tower = model.get_vision_tower()
        if not tower.is_loaded:  # it comes by its own name, and after the model
            tower.load_model(device_map=loading.get("device_map"))
        tower.to(dtype=model.dtype)
        return model

    def _language_model(self) -> nn.Module:
        return self.get_model()

    def _image_token_id(self) -> int:
        return IMAGE_TOKEN_INDEX

    def _projector_slot(self) -> tuple[nn.Module, str]:
        return self.get_model(), "mm_projector"

    def _dense_tokens(
        self, images: Any = None, image_sizes: Any = None, pixel_values: Any = None, **unknown: Any
    ) -> list[Tensor]:
        images = pixel_values if images is None else images
        device = self.get_input_embeddings().weight.device
        # rows of nothing but an image each; the second, masked id is there because the host passes over rows of one
        ids = torch.tensor([[IMAGE_TOKEN_INDEX, 0]] * len(images), device=device)
        mask = torch.tensor([[True, False]] * len(images), device=device)
        with _untruncated(self.config):
            _, _, mask, _, rows, _ = self.prepare_inputs_labels_for_multimodal(
                ids, None, mask, None, None, images, image_sizes
            )
        return [row[real.bool()] for row, real in zip(rows, mask, strict=True)]

    def _host_backbone(self, input_ids: Tensor, attention_mask: Tensor | None, **given: Any) -> Any:
        """The base's last hidden states at the caller's positions; at an image's, that of its last dense token."""
        images, sizes = given.pop("images"), given.pop("image_sizes", None)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # labels travel with their tokens, so positions in their place tell where each token came from
        places = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        _, positions, long_mask, _, rows, origin = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, mask, None, places, _with_dummies(input_ids, images), sizes
        )
        out = self.get_model()(inputs_embeds=rows, attention_mask=long_mask, position_ids=positions, **given)
        hidden, at = out.last_hidden_state, origin >= 0
        flat = hidden.new_zeros(input_ids.numel(), hidden.shape[-1]).index_copy(0, origin[at], hidden[at])
        before_text = ~at[:, :-1] & at[:, 1:]  # an image's last token, which predicts the text after it
        flat = flat.index_copy(0, origin[:, 1:][before_text] - 1, hidden[:, :-1][before_text])
        out.last_hidden_state = flat.view(*input_ids.shape, -1)
        return out

    def _own_images(self, input_ids: Tensor, images: Any, sizes: Any) -> dict[str, Any]:
        """The images that have a placeholder: the original's collator adds a blank one for a row of text alone."""
        counts = (input_ids == IMAGE_TOKEN_INDEX).sum(1).tolist()
        if len(images) != sum(counts) and len(images) == sum(max(count, 1) for count in counts):
            kept = [bool(count) for count in counts for _ in range(max(count, 1))]
            images = [image for image, keep in zip(images, kept, strict=True) if keep]
            sizes = None if sizes is None else [size for size, keep in zip(sizes, kept, strict=True) if keep]
            if images and all(image.shape == images[0].shape for image in images):
                images = torch.stack(images)
        taken = {"images": images, "image_sizes": sizes} if len(images) else {}
        return {name: value for name, value in taken.items() if value is not None}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Any = None,
        image_sizes: Any = None,
        return_dict: bool | None = None,
        caption_input_ids: Tensor | None = None,
        caption_attention_mask: Tensor | None = None,
        summary: Tensor | None = None,
        num_tokens: int | None = None,
        return_logits: bool = True,
    ) -> Any:
        """`Fwd2BotMixin.forward` in the original's order of arguments.

        Without labels the logits are of the collapsed row, as the original's are of the expanded one.
        """
        given: dict[str, Any] = {"use_cache": use_cache, "output_attentions": output_attentions}
        given |= {"output_hidden_states": output_hidden_states, "return_dict": return_dict}
        if not self._fwd2bot_enabled or input_ids is None or (images is None and summary is None):
            own = {"images": images, "image_sizes": image_sizes} if images is not None else {}
        else:
            own = {} if images is None else self._own_images(input_ids, images, image_sizes)
        trains = labels is not None or caption_input_ids is not None
        if self._fwd2bot_enabled and not trains and (own or summary is not None):
            summary, lengths = self._summaries(summary, own, num_tokens)
            plan = self._collapse(input_ids, attention_mask, summary, lengths)
            rows, mask = self._answer_rows(plan, input_ids, summary)
            given |= {"inputs_embeds": rows, "attention_mask": mask.long(), "past_key_values": past_key_values}
            return LlamaForCausalLM.forward(self, **given)
        given |= {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        if trains and self._fwd2bot_enabled:  # what the losses do not take
            given = {"return_dict": return_dict, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            caption_input_ids=caption_input_ids,
            caption_attention_mask=caption_attention_mask,
            summary=summary,
            num_tokens=num_tokens,
            return_logits=return_logits,
            **own,
            **{name: value for name, value in given.items() if value is not None},
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, images: Any = None, image_sizes: Any = None, **kwargs: Any) -> Any:
        """The original's `generate`: new ids alone. `summary=` may stand for `images=`, `num_tokens=` is j ≤ k."""
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if not self._fwd2bot_enabled or (images is None and kwargs.get("summary") is None):
            for name in ("summary", "num_tokens"):
                if kwargs.pop(name, None) is not None and name == "summary":
                    raise ValueError("Fwd2Bot is disabled here: the base knows no summaries.")
            return LlavaLlamaForCausalLM.generate(self, inputs, images, image_sizes, **kwargs)
        own = {} if images is None else self._own_images(inputs, images, image_sizes)
        if kwargs.get("num_tokens") is None:
            kwargs["num_tokens"] = self.default_num_tokens
        return super().generate(input_ids=inputs, **own, **kwargs)

    def _host_generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return LlamaForCausalLM.generate(self, **kwargs)  # past the original's own, which refuses embeddings


@contextmanager
def _untruncated(config: Any) -> Iterator[None]:
    """The host cuts its rows to the text's limit, and would cut an image of many crops without a word."""
    before = getattr(config, "tokenizer_model_max_length", None)
    config.tokenizer_model_max_length = None
    try:
        yield
    finally:
        config.tokenizer_model_max_length = before


def _with_dummies(input_ids: Tensor, images: Any) -> list[Tensor]:
    """The inverse of `_own_images`: a blank image again for each row of text alone."""
    own, found = iter(images), []
    for count in (input_ids == IMAGE_TOKEN_INDEX).sum(1).tolist():
        found += [next(own) for _ in range(count)] or [torch.zeros_like(images[0])]
    return found


class Fwd2BotLlavaLlama(OriginalHost, LlavaLlamaForCausalLM):
    base_class = LlavaLlamaForCausalLM
