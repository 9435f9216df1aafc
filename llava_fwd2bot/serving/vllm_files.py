"""What a client of vLLM needs of a model: processor, bridge, k; from an export, or from a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ..bottleneck import make_bridge
from ..checkpoint.export_manifest import CLIENT, is_export, read_manifest
from ..checkpoint.load import processor_source, register
from ..checkpoint.read import TENSORS_NAME, file_hash, read_checkpoint
from ..config import CONFIG_NAME
from ..hosts.opening import local_folder


@dataclass
class ClientFiles:
    """The model as its client knows it; the language model's weights are the engine's alone."""

    name: str
    processor: Any
    bridge: nn.Module
    tokens: Any  # R, [k, D]
    fingerprint: str  # of the checkpoint, by which caches know it
    base: str
    config: Any  # what _Trained has, as Fwd2BotConfig has it
    probes: list[dict[str, Any]]  # what the right engine says, where the export has it
    command: list[str] | None
    merged: bool  # the engine's model is a plain language model with the adapter in its weights


@dataclass
class _Trained:
    num_summary_tokens: int
    nested_k: list[int] | None
    pooling: str
    compressor: str
    residual: str


def client_files(path: str | os.PathLike, stage: str = "answer") -> ClientFiles:
    """Reads an export that vLLM serves for `stage`, or a checkpoint, whose base's processor must then be at hand.

    Raises:
        FileNotFoundError, ValueError: there is neither, it is damaged, or an export for something else.
    """
    from transformers import AutoProcessor

    register()
    if is_export(path):
        about, folder = read_manifest(path), Path(path) / CLIENT
        if stage not in about.get("commands", {}):
            raise ValueError(
                f"{path} is an export for {about['to']} of {' and '.join(about['stages'])}, and nothing that vLLM "
                f"serves for the {stage} stage: write one by `fwd2bot export --to vllm`."
            )
        kind, source, base = about["bridge"], str(folder), about["base"]["name_or_path"]
        own = (about[name] for name in ("k", "nested_k", "pooling", "compressor", "residual"))
        config, fingerprint = _Trained(*own), about["checkpoint"]
        probes, command, merged = about.get("probes", []), about["commands"][stage], about["to"] == "merged"
    else:
        folder = local_folder(path, {})
        settings = read_checkpoint(folder)
        config, fingerprint = settings["fwd2bot"], file_hash(folder / CONFIG_NAME)
        kind, source, base = config.bridge, processor_source(folder), settings["base"]["name_or_path"]
        probes, command, merged = [], None, False
    tensors = load_file(folder / TENSORS_NAME)
    bridge = make_bridge(kind, tensors["tokens"].shape[1])
    bridge.load_state_dict({n.removeprefix("bridge."): t for n, t in tensors.items() if n.startswith("bridge.")})
    processor = AutoProcessor.from_pretrained(source)
    return ClientFiles(
        str(path), processor, bridge.eval(), tensors["tokens"], fingerprint, base, config, probes, command, merged
    )
