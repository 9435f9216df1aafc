"""Adapters for vLLM and for PEFT, written from a checkpoint's files without the base; and vLLM's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..files.text import read_json
from ..files.writing import write_json
from ..modeling.adapters import OUTSIDE
from ..smol.tower import EfficientNetLiteConfig
from .adapter_names import placed, unplaced
from .export_manifest import ARCHITECTURE, CLIENT
from .load import ORIGINAL
from .read import ADAPTER_NAME

# what vLLM 0.32 and 0.33 take for --max-lora-rank
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# the classes that take both image embeddings and LoRA there
VLLM_CLASSES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
# the one whose compress pass runs there, by our class
SUMMARIES = "LlavaForConditionalGeneration"
# where the language model is: in transformers' LLaVA, which vLLM renames by itself, and in a plain causal LM
_INSIDE = {"vllm": "model.language_model", "peft": "model"}


def check_vllm(checkpoint: Path, settings: dict[str, Any], host: dict[str, Any], stages: list[str]) -> None:
    """Raises ValueError where vLLM cannot serve the checkpoint; the message says what can be done instead."""
    kind, config = settings["base"]["fingerprint"]["class"], settings["fwd2bot"]
    merged = "use --to merged --stage answer"
    if kind in ORIGINAL.values():
        raise ValueError(
            f"{checkpoint} is in the original LLaVA's layout ({kind}), which vLLM does not open: `fwd2bot convert` it "
            "to transformers' layout first, and export that."
        )
    if kind not in VLLM_CLASSES:
        raise ValueError(f"vLLM has no LoRA for {kind}, only for {' and '.join(VLLM_CLASSES)}: {merged}.")
    if (host.get("vision_config") or {}).get("model_type") == EfficientNetLiteConfig.model_type:
        raise ValueError(f"The base's vision tower is smol-llava's, which vLLM does not know: {merged}.")
    if config.lora_r > VLLM_RANKS[-1]:
        raise ValueError(f"vLLM takes LoRA up to rank {VLLM_RANKS[-1]}, and this one has {config.lora_r}: {merged}.")
    if "compress" in stages and not compresses_in_vllm(settings):
        raise ValueError(
            f"The compress pass runs in vLLM for {SUMMARIES} with the compressor fwd2bot alone, and this is {kind} "
            f"with {config.compressor}: give --stage answer, and compress with `fwd2bot compress`, on several GPUs "
            "with --ray."
        )


def compresses_in_vllm(settings: dict[str, Any]) -> bool:
    """Whether our model class in vLLM can run the compress pass of the checkpoint with these settings."""
    return settings["base"]["fingerprint"]["class"] == SUMMARIES and settings["fwd2bot"].compressor == "fwd2bot"


def write_adapters(
    checkpoint: Path, settings: dict[str, Any], to: str, folder: Path, stages: list[str], base: str
) -> dict[str, Any]:
    """Writes one folder for each stage; gives what the manifest says of them."""
    config, written = settings["fwd2bot"], {}
    for stage in stages:
        source = checkpoint / ("shared" if config.adapters == "shared" else stage)
        tensors = {placed(unplaced(name), _INSIDE[to]): t for name, t in load_file(source / ADAPTER_NAME).items()}
        (folder / stage).mkdir()
        save_file(tensors, folder / stage / ADAPTER_NAME, metadata={"format": "pt"})
        values = read_json(source / "adapter_config.json")
        values.update(target_modules=list(config.lora_targets), base_model_name_or_path=base)
        if to == "peft":  # of a causal LM, which has no vision tower
            values.update(task_type="CAUSAL_LM", exclude_modules=None)
        else:
            values.update(exclude_modules=OUTSIDE)
        write_json(folder / stage / "adapter_config.json", values)
        written[stage] = {"folder": stage, "rank": config.lora_r}
    return written


def vllm_commands(manifest: dict[str, Any], output: Path) -> dict[str, list[str]]:
    """The command that serves each stage of the export at `output`; an engine answers or compresses, not both."""
    template = output / CLIENT / manifest["template"]["file"]
    ending = ["--chat-template", str(template), "--chat-template-content-format", "openai"]
    if manifest["to"] == "merged":
        return {"answer": ["vllm", "serve", str(output), "--enable-prompt-embeds", *ending]}
    commands = {}
    for stage, about in manifest["adapters"].items():
        command = ["vllm", "serve", manifest["base"]["name_or_path"]]
        if stage == "answer":
            # no image is let in as pixels: the base would answer about it from its dense tokens, through the adapter.
            # Then vLLM loads no vision tower either
            command += ["--enable-mm-embeds", "--limit-mm-per-prompt", json.dumps({"image": 0})]
        else:
            own = {"architectures": [ARCHITECTURE], "fwd2bot": str(output)}
            command += ["--runner", "pooling", "--hf-overrides", json.dumps(own)]
            command += ["--limit-mm-per-prompt", json.dumps({"image": 1})]
        command += ["--enable-lora", "--max-lora-rank", str(manifest["max_lora_rank"])]
        commands[stage] = [*command, "--lora-modules", f"{stage}={output / about['folder']}", *ending]
    return commands
