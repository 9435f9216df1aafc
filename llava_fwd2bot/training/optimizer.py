"""Learning rates of their own for the summary tokens and the projector; gradient norms of each stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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


@torch.no_grad()
def stage_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of the gradients of each adapter and of the summary tokens, before they are clipped.

    They stay on the device. Where weights are split over ranks the gradients are too, and every rank must call it.
    """
    of = {f"grad_norm_{name}": list(model._stages.tensors(name).values()) for name in model._stages.names}
    of["grad_norm_summary_tokens"] = [model.fwd2bot.tokens]
    found = {}
    for name, parameters in of.items():
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            norm = torch.stack([g.float().square().sum() for g in grads]).sum().sqrt()
            found[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return found
