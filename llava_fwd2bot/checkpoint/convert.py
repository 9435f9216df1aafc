"""A Fwd2Bot checkpoint from the original LLaVA's layout to transformers', or back.

Adapters and summary tokens are stored by names relative to the language model, and are the same in both. What differs
is the base that they sit on, the names within a trained projector, and the configuration.
"""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path

import torch

from ..files.outputs import refuse_overlap, refuse_whole_model
from ..hosts import host_class, install
from .load import base_class_name, base_source, register
from .read import load_weights, read_checkpoint

# the projector's layers: transformers' names, the original's
_LAYERS = {"linear_1": "0", "linear_2": "2"}


def convert(checkpoint: str | os.PathLike, base: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Writes the checkpoint anew, for `base`: the same LLaVA in the other layout.

    Args:
        checkpoint: a Fwd2Bot checkpoint. base: e.g. llava-hf/llava-1.5-7b-hf for one of liuhaotian/llava-v1.5-7b.
        output: the folder to write.

    Raises:
        ValueError: `base` is another model than the one that the checkpoint was trained on, or of the same layout;
            `output` overlaps with one of the two.
    """
    refuse_overlap("--output", output, models={"CKPT": checkpoint, "--base": base})
    refuse_whole_model("--output", output)
    register()
    checkpoint, output = Path(checkpoint), Path(output)
    settings = read_checkpoint(checkpoint)
    if settings["base"].get("trained"):
        raise ValueError(f"{checkpoint} holds a fully trained model, whose layout is its own: convert that as a LLaVA.")
    source = base_source(str(base))
    kind = base_class_name(source)
    if kind == settings["base"]["fingerprint"]["class"]:
        raise ValueError(f"{checkpoint} is in the layout of {kind} already.")
    host = host_class(kind)
    model = host.load_base(source)
    model.name_or_path = str(base)  # as it was named, which for smol-llava is no folder
    install(model, host, settings["fwd2bot"], settings["image_prompt_ids"], settings["text_prompt_ids"])
    _same_weights(settings["base"]["fingerprint"], model._base_fingerprint, str(base))
    load_weights(model, checkpoint, _renamed)
    model.save_pretrained(output)
    return output


def _renamed(name: str, known: Container[str]) -> str:
    for one, other in [*_LAYERS.items(), *((b, a) for a, b in _LAYERS.items())]:
        changed = name.replace(f"projector.{one}.", f"projector.{other}.")
        if changed != name and changed in known:
            return changed
    return name


def _same_weights(expected: dict, found: dict, name: str) -> None:
    """The language model's own weights, by the names that both layouts have; vocabularies may be padded differently."""
    both = [p for p in expected["probes"].keys() & found["probes"].keys() if p.startswith("language_model.")]
    alike = all(
        torch.allclose(torch.tensor(expected["probes"][p]), torch.tensor(found["probes"][p]), rtol=0.01, atol=1e-3)
        for p in both
    )
    if not both or not alike or expected["hidden_size"] != found["hidden_size"]:
        raise ValueError(f"{name} is not the model that the checkpoint was trained on: its language model differs.")
