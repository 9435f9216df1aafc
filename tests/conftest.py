"""Toy hosts: transformers' own classes, tiny, random, made offline in milliseconds.

Widths are multiples of 64, which 4-bit quantisation on CPU needs. The toy image gives n = 16 dense tokens.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_fixtures import checkpoint, own_base, photos, run, stored  # noqa: F401
from data_fixtures import folder, make  # noqa: F401
from data_toys import TEMPLATE_WITHOUT_EOS, llama_tokenizer
from eval_fixtures import captioned, import_script  # noqa: F401
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot

# the tests may run in a shell's background, where these are ignored; children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SIZE, PATCH = 32, 8
DENSE = (SIZE // PATCH) ** 2


def toy_processor() -> LlavaProcessor:
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        pixels,
        llama_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE_WITHOUT_EOS,
        num_additional_image_tokens=1,
    )


def toy_base(processor: LlavaProcessor, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=-(-len(tokenizer) // 64) * 64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=DENSE,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # at the default scale a frozen head cannot tell tokens apart, whatever trains
    return model.to(dtype).eval()


def shake(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """LoRA starts as a no-op; with random weights the stages differ, so that a mix-up of stages shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in model._stages.names:
            for key, parameter in model._stages.tensors(name).items():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
    return model


def settings(**changes) -> Fwd2BotConfig:
    return Fwd2BotConfig(**{"num_summary_tokens": 4, "lora_r": 4, "lora_alpha": 8, **changes})


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return toy_processor()


@pytest.fixture
def base(processor):
    return toy_base(processor)


@pytest.fixture
def model(processor):
    return shake(add_fwd2bot(toy_base(processor), settings(), processor))


@pytest.fixture
def model64(processor):
    """In float64, where what is exact must be exact."""
    return shake(add_fwd2bot(toy_base(processor, torch.float64), settings(), processor))


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, processor) -> Path:
    path = tmp_path_factory.mktemp("toy") / "llava-toy"
    toy_base(processor).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def on_disk(base_dir, processor):
    """A model whose base is on disk, as a user's is."""
    loaded = LlavaForConditionalGeneration.from_pretrained(base_dir)
    return shake(add_fwd2bot(loaded, settings(), processor))


def standard_batch(model: torch.nn.Module, padding: str = "mixed") -> dict[str, torch.Tensor]:
    """Three rows as processors make them: one image, two images that touch, none; in one batch, `padding` as named."""
    image, dtype = model.config.image_token_id, model.fwd2bot.tokens.dtype
    rows = [
        [1, 300, *[image] * DENSE, 301, 302, 303, 304],
        [1, *[image] * (2 * DENSE), 305, 306, 307],
        [1, 308, 309, 310, 311, 312],
    ]
    length = max(map(len, rows)) + 2
    ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    for i, row in enumerate(rows):
        left = {"left": True, "right": False, "mixed": i % 2 == 0}[padding]
        at = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    labels = torch.where((ids > 301) & (mask == 1) & (ids != image), ids, -100)
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def captions() -> dict[str, torch.Tensor]:
    """One for each of the first two rows, padded on either side; none for the row without an image."""
    ids = torch.tensor([[0, 0, 1, 320], [1, 321, 322, 0], [0, 0, 0, 0]])
    return {"caption_input_ids": ids, "caption_attention_mask": (ids > 0).long()}


@pytest.fixture
def llava_data(tmp_path) -> dict[str, Path]:
    """A dozen records in LLaVA's format with real image files, captions included."""
    pictures = tmp_path / "images"
    pictures.mkdir()
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}
    records = []
    for i in range(12):
        name = list(colours)[i % 3]
        noise = np.random.default_rng(i).integers(0, 30, (40, 48, 3))
        pixels = np.clip(np.array(colours[name]) + noise, 0, 255).astype("uint8")
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        records.append(
            {
                "id": str(i),
                "image": f"{i}.png",
                "caption": f"a {name} picture",
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat colour is the picture?"},
                    {"from": "gpt", "value": name},
                ],
            }
        )
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return {"data": path, "images": pictures}
