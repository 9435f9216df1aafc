"""What a checkpoint is, read from its JSON and from the headers of its tensors; no weight is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config import Fwd2BotConfig
from ..files.text import read_json
from ..smol import cached_base, is_smol
from .load import base_of
from .read import read_checkpoint


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """The settings, the base, the files and the sizes of the checkpoint at `path`, ready for JSON.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, or it is damaged.
    """
    path = Path(path)
    saved = read_checkpoint(path)
    config: Fwd2BotConfig = saved["fwd2bot"]
    size, k = saved["base"]["fingerprint"]["hidden_size"], config.num_summary_tokens
    dense = _dense_tokens(path / "config.json")
    files = {name: _file(path / name) for name in sorted(saved["sha256"])}
    return {
        "checkpoint": str(path),
        "version": saved.get("version"),
        "settings": {
            f.name: {
                "value": getattr(config, f.name),
                "help": f.metadata["help"].removesuffix(f" [{f.metadata['source']}]"),
                "source": f.metadata["source"],
            }
            for f in dataclasses.fields(config)
        },
        "base": _base(path, saved),
        "files": files,
        "trained_parameters": sum(file["trained_parameters"] for file in files.values()),
        "bytes": sum(file["bytes"] for file in files.values()),
        "summary": {"tokens": k, "dim": size, "bytes_float16": k * size * 2},
        "dense": None if dense is None else {"tokens": dense, "dim": size, "bytes_float16": dense * size * 2},
    }


def _base(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    fingerprint = {key: value for key, value in saved["base"]["fingerprint"].items() if key != "probes"}
    base = {"name_or_path": saved["base"]["name_or_path"], "found": None, **fingerprint}
    if is_smol(base["name_or_path"]):
        found = cached_base()  # it is not put together for this
        return {**base, "found": None if found is None else str(found)}
    try:
        found = base_of(path, settings=saved)
    except FileNotFoundError:
        return base
    if not Path(found).is_dir():  # a hub name: is it in the hub's cache?
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(found, "config.json")
        except HFValidationError:
            cached = None
        found = str(Path(cached).parent) if isinstance(cached, str) else None
    return {**base, "found": found}


def _file(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, "pt") as tensors:
            sizes = {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): restore it from a good copy.") from error
    # with adapters="none" the whole model is in base/, of which the language model and its head were trained
    whole = path.parent.name == "base"
    trained = sum(n for name, n in sizes.items() if not whole or "language_model" in name or "lm_head" in name)
    return {"trained_parameters": trained, "bytes": path.stat().st_size}


def _dense_tokens(path: Path) -> int | None:
    host = read_json(path) if path.is_file() else {}
    # image_seq_length is all there is to it where every image gives the same number, and only there
    count = host.get("image_seq_length") if host.get("model_type") == "fwd2bot_llava" else None
    return count if isinstance(count, int) and count > 0 else None
