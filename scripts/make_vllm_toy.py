"""A random LLaVA of two layers under the names of the hub's checkpoints, and a Fwd2Bot checkpoint on it.

For scripts/test_vllm.sh: transformers 5 saves a CLIP tower as `vision_tower.embeddings…`; vLLM 0.32 wants
`vision_tower.vision_model.embeddings…`, as llava-hf's checkpoints have it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import settings, shake, toy_base, toy_processor  # noqa: E402

from llava_fwd2bot import add_fwd2bot  # noqa: E402


def make(folder: Path) -> None:
    """Writes `folder`/base and `folder`/fwd2bot, whose bridge is no identity."""
    processor = toy_processor()
    base, file = folder / "base", folder / "base" / "model.safetensors"
    toy_base(processor).save_pretrained(base)
    processor.save_pretrained(base)
    names = load_file(file)
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor for name, tensor in names.items()},
        file,
        metadata={"format": "pt"},
    )
    loaded = LlavaForConditionalGeneration.from_pretrained(base)  # which reads those names as well
    model = shake(add_fwd2bot(loaded, settings(bridge="linear"), processor)).eval()
    with torch.no_grad():
        for parameter in model.fwd2bot.bridge.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(folder / "fwd2bot", processor=processor)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
