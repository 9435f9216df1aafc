"""By what a checkpoint knows the base that it was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .gathering import full_shape, whole


def fingerprint(model: nn.Module, gathered: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Sizes of the base, and a few of its numbers, by which a checkpoint knows the base it was trained on.

    The numbers hold through a change of dtype; those of layers that may be quantised are compared where they are not.

    Args:
        gathered: the model's weights from all ranks, by their names in it; without them every rank must call.
    """
    language_model, embeddings = model._language_model(), model.get_input_embeddings().weight
    vocabulary, size = full_shape(embeddings)
    parent, name = model._projector_slot()
    probes = {"embeddings": embeddings}
    if model.get_output_embeddings() is not None:
        probes["head"] = model.get_output_embeddings().weight
    # without what hangs in it (the original's tower and projector), so that it is the same list in every layout
    blocks = [(n, p) for n, p in language_model.named_parameters() if n.startswith(("layers.", "norm."))]
    own = {id(p) for _, p in blocks} | {id(p) for p in getattr(parent, name).parameters()}
    rest = [(n, p) for n, p in model.named_parameters() if id(p) not in own and len(full_shape(p)) > 1]
    for prefix, weights in (
        ("language_model", [(n, p) for n, p in blocks if "norm" not in n]),
        ("language_model", [(n, p) for n, p in blocks if "norm" in n]),  # these are never quantised
        ("projector", list(getattr(parent, name).named_parameters())),
        ("rest", rest),
    ):
        step = max(1, len(weights) // 16)  # about sixteen tensors of each part, spread over its depth
        probes.update({f"{prefix}.{n}": p for n, p in [*weights[::step], *weights[-1:]]})
    names = {id(p): n for n, p in model.named_parameters()} if gathered else {}

    def sample(weight: Tensor) -> list[float]:
        name = names.get(id(weight))
        return _numbers(gathered[name]) if gathered and name in gathered else _sample(weight)

    return {
        "class": type(model).base_class.__name__,
        "hidden_size": size,
        "vocabulary": vocabulary,
        "layers": language_model.config.num_hidden_layers,
        "probes": {n: sample(p) for n, p in probes.items() if _is_plain(p)},
    }


def _is_plain(weight: Tensor) -> bool:
    """Whether the numbers are the base's: bitsandbytes keeps integers, torchao a subclass that calls itself float."""
    packed = type(weight.data).__module__.startswith("torchao.")
    return weight.is_floating_point() and weight.device.type != "meta" and not packed


def _sample(weight: Tensor) -> list[float]:
    with whole(weight) as (weight,):
        return _numbers(weight)


def _numbers(weight: Tensor) -> list[float]:
    weight = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach()[:, None]
    rows = torch.linspace(0, weight.shape[0] - 1, 8).long()
    columns = torch.linspace(0, weight.shape[1] - 1, 4).long()
    rows, columns = rows.unique(), columns.unique()
    return [float(f"{x:.4g}") for x in weight[rows][:, columns].flatten().float().tolist()]


def check_base(expected: dict[str, Any], found: dict[str, Any], name: str) -> None:
    """Raises ValueError when `found` is not the base that `expected` tells of."""
    for key in ("class", "hidden_size", "vocabulary", "layers"):
        if expected[key] != found[key]:
            raise ValueError(
                f"{name} is not the base of this checkpoint: its {key} is {found[key]}, but the checkpoint was trained "
                f"on one with {expected[key]}. Pass the right one: base=…"
            )
    for probe in expected["probes"].keys() & found["probes"].keys():
        want, have = torch.tensor(expected["probes"][probe]), torch.tensor(found["probes"][probe])
        rounding = 0.008 * want.abs() + 1e-3 * want.abs().max()  # twice bfloat16's, and float16's small numbers
        if want.shape != have.shape or bool(((want - have).abs() > rounding).any()):
            raise ValueError(
                f"{name} is not the base of this checkpoint: the sizes agree, but the weights ({probe}) differ. "
                "Pass the right one: base=…"
            )
