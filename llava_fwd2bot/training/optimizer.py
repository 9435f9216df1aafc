"""Learning rates of their own for the summary tokens and the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, args: Any) -> None:
    """Moves the summary tokens and the projector into parameter groups with their own learning rates.

    Args:
        args: `summary_lr` and `mm_projector_lr`; where one is missing or None, `learning_rate` applies.
    """
    own: dict[str, list[nn.Parameter]] = {"summary": [], "projector": []}
    for name, parameter in model.named_parameters():
        if "fwd2bot.compressor." in name:
            continue  # an ordinary module, which trains at --learning_rate
        if parameter.requires_grad and "fwd2bot." in name:
            own["summary"].append(parameter)
        elif parameter.requires_grad and "mm_projector" in name.replace("multi_modal_projector", "mm_projector"):
            own["projector"].append(parameter)
    moved = {id(p) for group in own.values() for p in group}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    rates = {"summary": getattr(args, "summary_lr", None)}  # plain TrainingArguments have neither
    rates["projector"] = getattr(args, "mm_projector_lr", None)
    for name, parameters in own.items():
        if parameters:
            rate = args.learning_rate if rates[name] is None else rates[name]
            decay = 0.0 if name == "summary" else args.weight_decay  # decay would pull R to no meaning
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": decay})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
