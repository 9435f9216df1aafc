"""transformers' LLaVA-OneVision (llava-hf/llava-onevision-*): crops as LLaVA-NeXT's, where a row has one image.

Videos are not compressed: what a summary of a video should be is another question than that of an image.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from .transformers_llava import TransformersHost, one_crop_each, register_host


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

    def _image_keys(self, image_inputs: dict[str, Any], summary: Any) -> Any:
        # counts of rows, which may be as many as the images
        own = {name: value for name, value in image_inputs.items() if name != "batch_num_images"}
        return super()._image_keys(own, summary)

    def _blank_image(self) -> dict[str, Any]:
        return one_crop_each(self, super()._blank_image())


def register() -> None:
    register_host(Fwd2BotLlavaOnevision, LlavaOnevisionProcessor)
