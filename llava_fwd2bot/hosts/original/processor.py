"""The original LLaVA's tokenizer and image preparation, in the shape of a processor of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from PIL import Image
from transformers import BatchFeature


class OriginalProcessor:
    """What `ask`, `compress` and their like need of a processor; an image is one id of −200, as in LLaVA's programs.

    Args:
        tokenizer: the base's.
        clip_processor: the vision tower's image processor.
        config: the model's, which says how images are cropped or padded.
    """

    image_token = "<image>"
    image_token_id = IMAGE_TOKEN_INDEX

    def __init__(self, tokenizer: Any, clip_processor: Any, config: Any) -> None:
        self.tokenizer, self.clip_processor, self.config = tokenizer, clip_processor, config
        # Vicuna's has none, and gets LLaVA-1.5's own format; Qwen's and Mistral's are those that LLaVA uses for them
        self.chat_template = getattr(tokenizer, "chat_template", None)

    def image_processor(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, list[Any]]:
        """`images`, for each [3, H, W] or its crops [P, 3, H, W], and `image_sizes`, for each (width, height)."""
        pixels = process_images(list(images), self.clip_processor, self.config)
        return {"images": list(pixels), "image_sizes": [image.size for image in images]}

    def tokenize(self, text: str, return_tensors: str = "pt", add_special_tokens: bool = True) -> BatchFeature:
        """One prompt, [1, T], with −200 for each `<image>`."""
        ids = tokenizer_image_token(text, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors=return_tensors)[None]
        if not add_special_tokens and ids[0, 0] == self.tokenizer.bos_token_id == ids[0, 1]:
            ids = ids[:, 1:]  # LLaVA's function adds one whatever the text begins with
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The tokenizer's template; images of a turn stand before its text, each on a line of its own."""
        flat = []
        for message in messages:
            parts = (part.get("text", f"{self.image_token}\n") for part in message["content"])
            flat.append({"role": message["role"], "content": "".join(parts)})
        return self.tokenizer.apply_chat_template(flat, **options)
