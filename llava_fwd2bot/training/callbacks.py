"""What the trainer does at the start of an epoch, after a step and with each checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .resume import write_run


class EpochCallback(TrainerCallback):
    """Sets the data set's epoch: which of several captions a row gets depends on it, also after a resume.

    Before a step it gives a gradient of zero to what no row of the step has touched, as it has on several ranks: the
    optimizer's averages then go on alike on any number of them. After a step it bounds the temperature: only then all
    ranks hold the parameter itself.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not hasattr(getattr(model, "module", model), "fwd2bot"):
            return
        for parameter in model.parameters():
            of_deepspeed = hasattr(parameter, "_hp_mapping") or hasattr(
                parameter, "ds_id"
            )  # its gradients are elsewhere
            if parameter.requires_grad and parameter.grad is None and not of_deepspeed:
                parameter.grad = torch.zeros_like(parameter)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        added = getattr(getattr(model, "module", model), "fwd2bot", None)
        if added is not None:
            added.bound_temperature()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        set_epoch = getattr(getattr(train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int((state.epoch or 0) + 1e-6))


class RunCallback(TrainerCallback):
    """Writes into each checkpoint what it was trained on and how: see resume.py."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            write_run(folder, {**self.trainer.run, "layout": self.trainer.run_layout, "steps": state.global_step})
