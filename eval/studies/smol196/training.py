"""Training a recipe, able to stop at a time and to go on from files."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.studies.smol196.compressors import Compressor
from eval.studies.smol196.data import Data
from eval.studies.smol196.recipes import Recipe


def optimiser(model: Compressor, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW without decay; adapters and what else is trained each at their own rate."""
    own = list(model.own.parameters())
    known = {id(p) for p in own}
    adapters = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": g, "lr": r} for g, r in ((adapters, recipe.rate), (own, recipe.own_rate)) if g]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def schedule(step: int, steps: int) -> float:
    """Of the rate: up over the first twentieth, then down along a cosine to a hundredth."""
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def train(model: Compressor, data: Data, state: Path, until: float, **batch: int) -> dict[str, Any] | None:
    """Trains to the recipe's last step, or until the clock says `until`: then all is in `state`, and None returned.

    Args:
        state: a file; where it exists, training goes on from it. until: as of time.time().
        batch: sizes of `Data.batch`.

    Returns:
        The curve of the losses and the seconds it took.
    """
    recipe = model.recipe
    optimizer = optimiser(model, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for p in model.parameters() if p.requires_grad]
    first, curve, seconds = 0, [], 0.0
    if state.exists():
        stored = torch.load(state, map_location=data.device, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        first, curve, seconds = stored["step"], stored["curve"], stored["seconds"]
    start, sums, summed = time.perf_counter(), {}, 0
    for step in range(first, recipe.steps):
        if time.time() > until:
            stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "curve": curve}
            torch.save({**stored, "seconds": seconds + time.perf_counter() - start}, state.with_suffix(".tmp"))
            os.replace(state.with_suffix(".tmp"), state)
            return None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, recipe.steps)
        losses = model.losses(data.batch(step, recipe, **batch))
        losses["loss"].backward()
        losses["norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
        summed += 1
        if (step + 1) % 25 == 0 or step + 1 == recipe.steps:
            means = {name: round(float(value) / summed, 4) for name, value in sums.items()}
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(f"{recipe.run}: the loss is {means['loss']} at step {step + 1}")
            spent = seconds + time.perf_counter() - start
            curve.append({"step": step + 1, "seconds": round(spent, 2), **means})
            print(f"{recipe.run} {curve[-1]}", flush=True)
            sums, summed = {}, 0
    return {"curve": curve, "seconds": round(seconds + time.perf_counter() - start, 2)}
