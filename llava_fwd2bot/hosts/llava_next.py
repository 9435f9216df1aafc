"""transformers' LLaVA-NeXT (llava-hf/llava-v1.6-*): an image is several crops, and n differs from image to image."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from .transformers_llava import TransformersHost, one_crop_each, register_host


class Fwd2BotLlavaNextConfig(LlavaNextConfig):
    model_type = "fwd2bot_llava_next"


class Fwd2BotLlavaNext(TransformersHost, LlavaNextForConditionalGeneration):
    config_class = Fwd2BotLlavaNextConfig
    base_class = LlavaNextForConditionalGeneration
    image_input_names = ("pixel_values", "image_sizes")

    def _blank_image(self) -> dict[str, Any]:
        return one_crop_each(self, super()._blank_image())


def register() -> None:
    register_host(Fwd2BotLlavaNext, LlavaNextProcessor)
