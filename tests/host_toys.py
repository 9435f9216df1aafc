"""transformers' LLaVA hosts in small, each with image inputs as its processor gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

SIDE, IMAGE, WORDS = 32, 3, 96
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


@dataclass
class Toy:
    base: nn.Module
    images: dict[str, torch.Tensor]  # three images
    lengths: list[int]  # n of each

    def some(self, *which: int) -> dict[str, torch.Tensor]:
        """The inputs of some of the images."""
        return {name: value[list(which)] for name, value in self.images.items()}

    def rows(self, *rows: list[Any]) -> dict[str, torch.Tensor]:
        """Rows of ids in which ("image", i) stands for the placeholders of image i; padded on the right."""
        flat = []
        for row in rows:
            ids = []
            for entry in row:
                ids += [IMAGE] * self.lengths[entry[1]] if isinstance(entry, tuple) else [entry]
            flat.append(ids)
        longest = max(map(len, flat))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in flat])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in flat])
        return {"input_ids": ids, "attention_mask": mask}


def _finish(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        if hasattr(model.model, "image_newline"):
            model.model.image_newline.normal_()
    return model.to(dtype).eval()


def llava(dtype: torch.dtype) -> Toy:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    base = _finish(LlavaForConditionalGeneration(config), dtype)
    return Toy(base, {"pixel_values": torch.randn(3, 3, SIDE, SIDE, dtype=dtype)}, [16] * 3)


def _crops(base: nn.Module, dtype: torch.dtype) -> Toy:
    sizes = torch.tensor([[60, 60], [20, 60], [60, 25]])  # height, width; 5, 3 and 3 crops
    pixels = torch.randn(3, 5, 3, SIDE, SIDE, dtype=dtype)
    images = {"pixel_values": pixels, "image_sizes": sizes}
    with torch.no_grad():
        found = base.model.get_image_features(**images, return_dict=True).pooler_output
    return Toy(base, images, [len(v) for v in found])


def llava_next(dtype: torch.dtype) -> Toy:
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    return _crops(_finish(LlavaNextForConditionalGeneration(config), dtype), dtype)


def llava_onevision(dtype: torch.dtype) -> Toy:
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=4,
        image_grid_pinpoints=PINPOINTS,
    )
    return _crops(_finish(LlavaOnevisionForConditionalGeneration(config), dtype), dtype)


TOYS = {"llava": llava, "llava_next": llava_next, "llava_onevision": llava_onevision}
