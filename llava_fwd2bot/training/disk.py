"""The trainer's checkpoints: the same files from one process and from many, and resuming from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers.trainer
from torch import Tensor, nn
from transformers import Trainer

from ..checkpoint.fingerprint import check_base
from ..checkpoint.gathering import whole_weights
from ..checkpoint.read import read_checkpoint, reload
from ..hosts.rebinding import rebound
from . import sharded

_SCHEDULER_NAME = "scheduler.pt"

if TYPE_CHECKING:
    _Trainer = Trainer  # any trainer of transformers stands behind the mixin
else:
    _Trainer = object


class Fwd2BotDiskMixin(_Trainer):
    _own_groups: sharded.Groups | None = None  # the optimizer's groups, before DeepSpeed takes them over

    @property
    def _saves_whole(self) -> bool:
        """Whether what is in parts is gathered for a checkpoint here, instead of by transformers."""
        return self._has_fwd2bot and bool(self.is_deepspeed_enabled or getattr(self, "is_fsdp_enabled", False))

    # ------------------------------------------------------------------ saving
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of Trainer. Every rank must call it; what is in parts is gathered, and one rank writes."""
        if not self._saves_whole:
            return super().save_model(output_dir, _internal_call)
        model = self._fwd2bot_model
        everything = model.fwd2bot_config.adapters == "none"
        weights = whole_weights(model, keep=self.args.should_save, frozen=everything)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._saves_whole:
            return super()._save_optimizer_and_scheduler(output_dir)
        sharded.save_optimizer(self.optimizer, output_dir, self.args.should_save, self._own_groups)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULER_NAME))
        return None

    # ------------------------------------------------------------------ resuming
    @contextmanager
    def _own_loading(self) -> Iterator[None]:
        """Within it transformers, which would load DeepSpeed's own files, loads ours where a checkpoint has them."""
        stock = transformers.trainer.deepspeed_load_checkpoint

        def load(engine: Any, checkpoint: str, *more: Any, **options: Any) -> None:
            if self._saves_whole and Path(checkpoint, sharded.OPTIMIZER_NAME).is_file():
                self._load_from_checkpoint(checkpoint)
            else:
                stock(engine, checkpoint, *more, **options)

        with rebound(transformers.trainer, deepspeed_load_checkpoint=load):
            yield

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._own_loading():
            return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._has_fwd2bot:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        settings = read_checkpoint(resume_from_checkpoint)
        own = self._fwd2bot_model.fwd2bot_config
        if settings["fwd2bot"] != own:
            theirs, ours = settings["fwd2bot"].to_dict(), own.to_dict()
            changed = [f"{name} {theirs[name]} → {ours[name]}" for name in ours if ours[name] != theirs[name]]
            raise ValueError(f"{resume_from_checkpoint} was trained with other settings: {'; '.join(changed)}.")
        if not settings["base"].get("trained"):
            check_base(settings["base"]["fingerprint"], self._fwd2bot_model._base_fingerprint, "the model in training")
        reload(self._fwd2bot_model, resume_from_checkpoint)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._saves_whole and checkpoint and Path(checkpoint, sharded.OPTIMIZER_NAME).is_file():
            sharded.load_optimizer_state(self.optimizer, sharded.read_optimizer(checkpoint), self._own_groups)
            if self._own_groups is not None:
                sharded.refresh_master_weights(self.optimizer, self._own_groups)
            saved = torch.load(Path(checkpoint, _SCHEDULER_NAME), map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(saved)
            return
        super()._load_optimizer_and_scheduler(checkpoint)
        for parameter, state in self.optimizer.state.items() if checkpoint else ():
            for name, value in state.items():  # temperature and gain of a run that was begun when they were scalars
                if name != "step" and isinstance(value, Tensor) and value.dim() == 0 and parameter.shape == (1,):
                    state[name] = value[None]

    def _load_best_model(self) -> None:
        if not self._has_fwd2bot:
            return super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is None:
            return None
        reload(self._fwd2bot_model, best)
        if self._saves_whole and self._own_groups is not None:
            sharded.refresh_master_weights(self.optimizer, self._own_groups)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        return None
