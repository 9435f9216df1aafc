"""transformers' LLaVA-OneVision (llava-hf/llava-onevision-*): crops as LLaVA-NeXT's, where a row has one image.

Videos are not compressed: what a summary of a video should be is another question than that of an image.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from .transformers_llava import TransformersHost, register_host


class Fwd2BotLlavaOnevisionConfig(LlavaOnevisionConfig):
    model_type = "fwd2bot_llava_onevision"


class Fwd2BotLlavaOnevision(TransformersHost, LlavaOnevisionForConditionalGeneration):
    config_class = Fwd2BotLlavaOnevisionConfig
    base_class = LlavaOnevisionForConditionalGeneration
    image_input_names = ("pixel_values", "image_sizes", "batch_num_images", "vision_aspect_ratio")

    def _take_image_inputs(self, kwargs: dict[str, Any], pixel_values: Any = None) -> dict[str, Any]:
        if self._fwd2bot_enabled and kwargs.get("pixel_values_videos") is not None:
            raise ValueError(
                "Fwd2Bot compresses images, not videos: leave pixel_values_videos out, or ask the base inside "
                "fwd2bot_disabled()."
            )
        taken = super()._take_image_inputs(kwargs, pixel_values)
        # the processor gives the number of images of text-only batches too
        return taken if "pixel_values" in taken else {}


def register() -> None:
    register_host(Fwd2BotLlavaOnevision, LlavaOnevisionProcessor)
