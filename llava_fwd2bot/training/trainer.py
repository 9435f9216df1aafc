"""Fwd2BotTrainer: transformers' Trainer, plus what two losses, new tokens and two adapters ask for.

The methods are a mixin, so that a host's own trainer can have them too. A model without Fwd2Bot trains as the base.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .callbacks import EpochCallback, RunCallback
from .checks import check_arguments, check_negatives, check_trained_precision
from .collator import IGNORE_INDEX
from .disk import Fwd2BotDiskMixin
from .evaluating import Fwd2BotEvaluationMixin
from .metrics import METRICS, PAIRS, StepMetrics
from .optimizer import split_groups, stage_norms
from .resume import layout_of, moved_data, read_run
from .sampler import ImageGroupSampler, ModalityLengthSampler, RowLengths

# of rows of LlavaDataset, and of batches
_OWN_COLUMNS = ("record", "caption_ids", "caption_input_ids", "caption_attention_mask", "summary", "num_tokens")
_OWN_COLUMNS += ("images", "image_lengths", "plan")


@dataclass
class Fwd2BotTrainingArguments(TrainingArguments):
    """TrainingArguments and LLaVA's own two, and the learning rate of what is new."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "Images are no columns of a table."})
    summary_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of summary tokens, temperature and bridge; default: --learning_rate."},
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Trains the projector (a copy, with --fwd2bot) at this learning rate."}
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of one modality and of similar lengths, as in LLaVA."}
    )
    group_by_image: bool = field(
        default=False,
        metadata={"help": "Rows of one image come in one batch, where it is compressed once. See docs/train.md."},
    )
    eval_pool: int = field(
        default=1000,
        metadata={"help": "R@1 of an evaluation is within the first so many pairs of the evaluation data."},
    )
    eval_kept_answers: int = field(
        default=0,
        metadata={
            "help": "Each evaluation asks so many questions of the evaluation data, and logs to how many Fwd2Bot gives "
            "the base's answer. 0: none."
        },
    )
    eval_kept_answers_tokens: int = field(
        default=16, metadata={"help": "With --eval_kept_answers: answers end after so many tokens."}
    )


def _head_where_labelled(inputs: dict[str, Any]) -> dict[str, Any]:
    """The plain fine-tune's batch, so that the head runs only at places where some row has a label: the same loss.

    Most of a LLaVA row is image placeholders, and with a small language model the head is a quarter of the work.
    """
    labels = inputs.get("labels")
    if labels is None:
        return inputs
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    places = (targets != IGNORE_INDEX).any(0).nonzero().flatten()
    targets = targets[:, places]
    return {**inputs, "labels": targets, "shift_labels": targets, "logits_to_keep": places}


class Fwd2BotTrainerMixin(Fwd2BotEvaluationMixin, Fwd2BotDiskMixin):
    # of the Trainer, whose types allow for cases that do not arise here
    model: Any
    train_dataset: Any
    optimizer: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(("model", "args"), args, strict=False)) | kwargs
        if isinstance(given.get("args"), TrainingArguments):
            check_arguments(given["args"], hasattr(given.get("model"), "fwd2bot"))
        super().__init__(*args, **kwargs)
        check_trained_precision(self.model, bool(self.is_deepspeed_enabled))
        self.run: dict[str, Any] = {}  # data and settings, where the caller knows them: see resume.py
        self._metrics = StepMetrics()
        self._norms: dict[str, Tensor] = {}  # of the last step's gradients, stage by stage
        self._micro = self._micro_of = -1  # this micro-batch's number in the run, and that of the first of its step
        self._step: tuple[Tensor, int] | None = None  # labelled tokens and micro-batches of the optimizer step
        self.add_callback(EpochCallback())
        self.add_callback(RunCallback(self))
        if not self.is_deepspeed_enabled and int(transformers.__version__.split(".")[0]) >= 5:
            # the Trainer divides by the accumulation steps itself; transformers 5.4 has accelerate divide once more
            self.accelerator.gradient_accumulation_steps = 1
        if self._has_fwd2bot:
            # whatever compute_loss gives the Trainer divides by the accumulation steps, once
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False

    @property
    def _fwd2bot_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _has_fwd2bot(self) -> bool:
        return hasattr(self._fwd2bot_model, "fwd2bot")

    @property
    def run_layout(self) -> dict[str, int]:
        """How rows are dealt out to processes and steps."""
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0
        return {**layout_of(self.args, rows), "batch": self._train_batch_size}  # which auto_find_batch_size may lower

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of Trainer; says which data a resumed run skips or repeats when it has other processes or batches."""
        self._check_negatives()
        if isinstance(resume_from_checkpoint, str) and self.is_world_process_zero():
            before = (read_run(resume_from_checkpoint) or {}).get("layout")
            now = self.run_layout
            if before and now["rows"]:
                fresh = bool(getattr(self.args, "ignore_data_skip", False))
                message = moved_data(resume_from_checkpoint, before, now, fresh)
                if message:
                    warnings.warn(message, stacklevel=2)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_negatives(self) -> None:
        captioned = getattr(self.train_dataset, "num_captioned", 0)  # of data sets that are not ours nothing is known
        if self._has_fwd2bot and self._fwd2bot_model.fwd2bot_config.contrastive_weight > 0 and captioned:
            check_negatives(captioned, len(self.train_dataset), self._train_batch_size, self.args.world_size)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        super()._update_auto_batch_size(batch_size)
        self._check_negatives()  # with fewer rows in a batch

    @cached_property
    def _takes_places(self) -> bool:
        if getattr(self.args, "use_liger_kernel", False):  # its forward is another
            return False
        model = self._fwd2bot_model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        return "logits_to_keep" in inspect.signature(model.forward).parameters

    # ------------------------------------------------------------------ losses and their log
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if not self._has_fwd2bot:
            if not return_outputs and self._takes_places:
                inputs = _head_where_labelled(inputs)
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        inputs = {**inputs, "return_logits": return_outputs}
        if model.training:
            self._say_step()
        step = self._step if model.training else None
        if step is not None:
            inputs.update(num_items_in_batch=step[0], micro_batches=step[1])
        computed: Any = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss, outputs = computed
        if step is not None:
            # a share of the step's loss; the Trainer divides it by its steps, and the ranks take the mean
            steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
            loss = loss * steps * self.accelerator.num_processes
        if model.training:
            self._metrics.add(outputs, self._step)
        return (loss, outputs) if return_outputs else loss

    def _say_step(self) -> None:
        """What the model draws by: the seed and the micro-batch's number in the run, the same after a resume."""
        first = self.state.global_step * self.args.gradient_accumulation_steps
        self._micro = self._micro + 1 if self._micro_of == first else first
        self._micro_of = first
        self._fwd2bot_model.draw_from(self.args.seed, self._micro)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        """The micro-batches of an optimizer step, as the Trainer collects them; their labelled tokens are counted."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, *args)
        self.look_ahead(batches)
        return batches, count

    def look_ahead(self, batches: list[dict[str, Any]], micro_batches: int | None = None) -> None:
        """Counts the labelled tokens of an optimizer step over its micro-batches and ranks. Every rank must call it.

        Args:
            batches: the micro-batches of this rank.
            micro_batches: how many the step has, where `batches` are only a part of it.
        """
        if not self._has_fwd2bot or not batches:
            return
        self._tell_ranks(batches)
        own = sum(self._labelled_tokens(batch) for batch in batches)
        tokens: Any = torch.as_tensor(own, device=self.accelerator.device)
        ranks = self.accelerator.num_processes
        if getattr(self.args, "average_tokens_across_devices", True):
            tokens = self.accelerator.reduce(tokens, reduction="sum")
        else:
            tokens = tokens * ranks
        micro_batches = micro_batches or len(batches)
        self._step = (tokens * micro_batches / len(batches), micro_batches * ranks)

    def _tell_ranks(self, batches: list[dict[str, Any]]) -> None:
        """Leaves in each plan what the other ranks have, so that the forward need not ask them."""
        plans: list[Any] = [batch.get("plan") for batch in batches]
        if self.accelerator.num_processes == 1 or any(plan is None for plan in plans):
            return
        own = torch.tensor([[plan.counts for plan in plans]], device=self.accelerator.device)
        gathered: Any = self.accelerator.gather(own)
        counts = gathered.transpose(0, 1).tolist()  # [micro-batches, ranks, 3]
        for plan, ranks in zip(plans, counts, strict=True):
            plan.ranks = ranks

    def _labelled_tokens(self, batch: dict[str, Any]) -> Tensor | int:
        if batch.get("plan") is not None:
            return batch["plan"].labelled_tokens
        labels, mask = batch.get("labels"), batch.get("attention_mask")
        if labels is None:
            return 0
        return self._fwd2bot_model.labelled_tokens(labels, batch["input_ids"], mask).sum()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if ignore_keys is None and self._has_fwd2bot:
            ignore_keys = [*METRICS, *PAIRS, "answer_tokens"]  # compute_metrics gets the logits, as of the base
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._metrics.take(self.accelerator))
            logs.update({name: round(float(norm), 4) for name, norm in self._norms.items()})
        if "loss" in logs and len(skipped := getattr(self.train_dataset, "skipped_images", ())):
            logs["skipped_images"] = len(skipped)  # of this process
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ optimizer, order of the data
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not fresh:
            return optimizer
        split_groups(optimizer, self.model, self.args)
        if self.is_deepspeed_enabled:  # which puts flat partitions in their place
            self._own_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._has_fwd2bot and not self.is_deepspeed_enabled:  # which holds gradients of its own
            self._norms = stage_norms(self._fwd2bot_model)
        return super()._clip_grad_norm(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        order = {
            "batch_size": self._train_batch_size,  # which auto_find_batch_size may lower
            "world_size": self.args.world_size * self.args.gradient_accumulation_steps,
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
        }
        by_length = getattr(self.args, "group_by_modality_length", False)
        if getattr(self.args, "group_by_image", False):
            if not hasattr(dataset, "image_groups"):
                raise ValueError(
                    f"--group_by_image asks the data which rows share an image, and {type(dataset).__name__} has no "
                    "image_groups: leave it out, or give the data set such a list of numbers."
                )
            lengths = dataset.modality_lengths if by_length else None
            return ImageGroupSampler(dataset.image_groups, **order, modality_lengths=lengths)
        if by_length:
            return ModalityLengthSampler(dataset.modality_lengths, **order)
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy in ("group_by_length", "batch_rebalance") and hasattr(dataset, "lengths"):
            names = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]
            return super()._get_train_sampler(RowLengths(dataset.lengths, names[0]))
        return super()._get_train_sampler(*(() if train_dataset is None else (dataset,)))

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh:  # remove_unused_columns, Trainer's default, would take the captions away
            self._signature_columns += [*_OWN_COLUMNS, *getattr(self._fwd2bot_model, "image_input_names", ())]


class Fwd2BotTrainer(Fwd2BotTrainerMixin, Trainer):
    """Drop-in for transformers' Trainer: logs both losses, temperature and retrieval accuracy; resumes exactly."""
