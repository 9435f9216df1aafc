"""transformers' own LLaVA (llava-hf/llava-1.5-*): LlavaForConditionalGeneration, transformers 5.4 to < 6."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaProcessor
from transformers import LlavaForConditionalGeneration as Llava

from ..mixin import Fwd2BotMixin


class TransformersHost(Fwd2BotMixin):
    """What transformers' LLaVA classes share: `.model.language_model`, `.model.multi_modal_projector`, `lm_head`."""

    quantization_skip = ("model.vision_tower", "model.multi_modal_projector", "lm_head")  # full names, hosts of 5.x

    def _init_fwd2bot(self, *args: Any, **kwargs: Any) -> None:
        super()._init_fwd2bot(*args, **kwargs)
        self._host_backbone = self.model.forward
        # on the instance: some trainers (TRL) run the backbone without our forward
        self.model.forward = self._backbone_forward
        if getattr(self, "is_quantized", False):
            self._hf_peft_config_loaded = True  # transformers' Trainer refuses a quantised model without adapters

    def _language_model(self) -> nn.Module:
        return self.model.language_model

    def _image_token_id(self) -> int:
        return self.config.image_token_id

    def _projector_slot(self) -> tuple[nn.Module, str]:
        return self.model, "multi_modal_projector"

    def _dense_tokens(self, **image_inputs: Any) -> list[Tensor]:
        return list(self.model.get_image_features(**image_inputs, return_dict=True).pooler_output)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`Fwd2BotMixin.forward` with the arguments of the base in the base's order; generate reads the names here."""
        host = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        host = {name: value for name, value in host.items() if value is not None}
        return super().forward(
            input_ids,
            pixel_values,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            logits_to_keep,
            **host,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, config: Any = None, **loading: Any) -> nn.Module:
        """Opens a Fwd2Bot checkpoint: its base (or `base=`), then what was trained. Other arguments load the base."""
        from ..load import open_checkpoint

        attention = getattr(config, "_attn_implementation_internal", None)  # where AutoConfig puts the argument
        if attention is not None:
            loading.setdefault("attn_implementation", attention)
        return open_checkpoint(path, **loading)


class Fwd2BotLlavaConfig(LlavaConfig):
    model_type = "fwd2bot_llava"


class Fwd2BotLlava(TransformersHost, Llava):
    config_class = Fwd2BotLlavaConfig  # how Auto classes find us; a live model keeps its base's LlavaConfig
    base_class = Llava


class Fwd2BotLlavaProcessor(LlavaProcessor):
    """Found by AutoProcessor for a checkpoint that was saved without a processor: gives the base's."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> Any:
        from ..load import base_of

        return AutoProcessor.from_pretrained(base_of(path), **kwargs)


def register() -> None:
    AutoConfig.register(Fwd2BotLlavaConfig.model_type, Fwd2BotLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(Fwd2BotLlavaConfig, Fwd2BotLlava, exist_ok=True)
    AutoProcessor.register(Fwd2BotLlavaConfig, Fwd2BotLlavaProcessor, exist_ok=True)
