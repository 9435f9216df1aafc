"""A random LLaVA of two layers that vLLM opens, a Fwd2Bot checkpoint on it, and its export: for scripts/test_vllm.sh.

Weights have the names of the hub's checkpoints: transformers 5 saves a CLIP tower as `vision_tower.embeddings…`, vLLM
0.32 wants `vision_tower.vision_model.embeddings…`. Heads are 32 wide, the least that vLLM's attention takes on a CPU.
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
from llava_fwd2bot.checkpoint.export import export  # noqa: E402


def make(folder: Path) -> None:
    """Writes `folder`/base, `folder`/fwd2bot, whose bridge is no identity, and `folder`/export."""
    processor = toy_processor()
    base, file = folder / "base", folder / "base" / "model.safetensors"
    config = toy_base(processor).config
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 2, 1
    config.text_config.head_dim = 32
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # so that the best word is best by far
        for name, parameter in model.model.language_model.layers.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)  # at the default scale a word is followed by itself for ever
    model.save_pretrained(base)
    processor.save_pretrained(base)
    tensors = load_file(file)
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
    loaded = LlavaForConditionalGeneration.from_pretrained(base)  # which reads those names as well
    model = shake(add_fwd2bot(loaded, settings(bridge="linear"), processor)).eval()
    with torch.no_grad():
        weight = model.fwd2bot.bridge.weight
        weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(folder / "fwd2bot", processor=processor)
    export(folder / "fwd2bot", "vllm", folder / "export", probe=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
