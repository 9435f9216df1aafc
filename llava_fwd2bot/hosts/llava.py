"""transformers' LLaVA (llava-hf/llava-1.5-*): LlavaForConditionalGeneration."""

from __future__ import annotations

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from .transformers_llava import TransformersHost, register_host


class Fwd2BotLlavaConfig(LlavaConfig):
    model_type = "fwd2bot_llava"


class Fwd2BotLlava(TransformersHost, LlavaForConditionalGeneration):
    config_class = Fwd2BotLlavaConfig  # how Auto classes find us; a live model keeps its base's LlavaConfig
    base_class = LlavaForConditionalGeneration
    image_input_names = ("pixel_values", "image_sizes")


def register() -> None:
    register_host(Fwd2BotLlava, LlavaProcessor)
