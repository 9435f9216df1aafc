"""Puts what scripts/train_smol_llava.sh trained into the package, in bfloat16.

python scripts/pack_smol_llava.py base ADAPTER        # LoRA and projector of the base, as PEFT saved them
python scripts/pack_smol_llava.py fwd2bot CHECKPOINT  # a Fwd2Bot checkpoint that was trained on smol-llava
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.checkpoint.read import read_checkpoint
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_json
from llava_fwd2bot.smol import NAME, WEIGHTS


def pack_base(adapter: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    # the folder that it was trained from is gone
    settings = {**read_json(adapter / "adapter_config.json"), "base_model_name_or_path": None}
    write_json(output / "adapter_config.json", settings)


def pack_fwd2bot(checkpoint: Path, output: Path) -> None:
    named = read_checkpoint(checkpoint)["base"]["name_or_path"]
    if named != NAME:
        raise SystemExit(f"{checkpoint} was trained on {named}, not on {NAME}")
    model, _ = load_fwd2bot(checkpoint, trainable=True)
    for parameter in [*model.fwd2bot.parameters(), *model._stages.parameters()]:
        parameter.data = parameter.data.bfloat16()
    model.name_or_path = NAME
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    (output / "README.md").unlink()  # the card of the whole model is one folder up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("base", "fwd2bot"))
    parser.add_argument("source", type=Path)
    arguments = parser.parse_args()
    pack = {"base": pack_base, "fwd2bot": pack_fwd2bot}[arguments.part]
    pack(arguments.source, WEIGHTS / arguments.part)
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*.safetensors"))
    print(f"{WEIGHTS}: {size / 1e6:.1f} MB in all")
    if size > 24e6:
        raise SystemExit("That is more than the 24 MB that the package allows itself: choose lower ranks.")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
