"""Puts smol-llava together from its published parts and what was trained here, and checks the result.

python scripts/build_smol_llava.py                                      # where `smol-llava` is looked for
python scripts/build_smol_llava.py --untrained --image-size 448 --output DIR     # for training; 196 tokens
python scripts/build_smol_llava.py --adapter ADAPTER --output DIR       # with a projector and LoRA of your own
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_fwd2bot import register
from llava_fwd2bot.smol import WEIGHTS, base_folder
from llava_fwd2bot.smol.build import build


@torch.inference_mode()
def verify(folder: Path) -> str:
    """What the Auto classes make of the folder: a grey picture's tokens, and an answer of the language model.

    Raises:
        ValueError: it is not the model that it should be.
    """
    register()
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    side = model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, dtype=model.dtype)
    tokens = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    if len(tokens) != model.config.image_seq_length or not torch.isfinite(tokens.float()).all():
        raise ValueError(
            f"{folder}: an image gives {len(tokens)} tokens, not {model.config.image_seq_length} finite ones"
        )
    asked = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor(text=processor.apply_chat_template(asked, add_generation_prompt=True), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in said:
        raise ValueError(f"{folder}: asked for the capital of France, the language model says {said!r}")
    return f"{len(tokens)} tokens of an image; the language model answers: {said.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: the place in the cache")
    parser.add_argument("--image-size", type=int, default=224, choices=(224, 448), help="49 or 196 tokens")
    parser.add_argument("--adapter", type=Path, default=WEIGHTS / "base", help="PEFT adapter with the projector")
    parser.add_argument("--untrained", action="store_true", help="no adapter, a fresh projector")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.output is None:
        if arguments.untrained or arguments.image_size != 224:
            parser.error("--untrained and --image-size need --output")
        folder = base_folder()
    else:
        adapter = None if arguments.untrained else arguments.adapter
        folder = build(arguments.output, arguments.image_size, adapter)
    print(f"{folder}: {verify(folder)} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
