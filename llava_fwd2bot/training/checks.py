"""Training arguments that cannot work here: refused in a sentence, before anything is loaded.

Each of TrainingArguments that is not named here was run with the toy model, with Fwd2Bot and without.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..files.text import read_json

# optimizers that update in backward, at one rate for all: they pass over --summary_lr, --mm_projector_lr, the gradient
# norm and accumulation
_IN_BACKWARD = ("lomo", "adalomo")
KEPT_METRICS = ("kept_answers", "answers_right", "base_answers_right")  # of kept_answers.py


def check_arguments(args: Any, fwd2bot: bool) -> None:
    """Refuses what would train something else than it says.

    Args:
        args: TrainingArguments, of ours or of a host.
        fwd2bot: whether the model has Fwd2Bot.

    Raises:
        ValueError: an argument cannot work; the message names it, the reason and the way out.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel would copy the model without its "
            f"stages: start one process for each, by `torchrun --nproc_per_node {args.n_gpu} -m llava_fwd2bot train …` "
            "with the same arguments (your own script in its place), or show it one by CUDA_VISIBLE_DEVICES=0."
        )
    accelerator = getattr(args, "accelerator_config", None)
    if getattr(accelerator, "dispatch_batches", None) and args.world_size > 1:
        raise ValueError(
            "accelerator_config dispatch_batches cuts a batch by rows, and a row may have several images or none: "
            "leave it out; each process then reads its own rows."
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    for name in ("group_by_modality_length", "group_by_image"):
        if getattr(args, name, False) and strategy != "random":
            raise ValueError(f"--{name} and --train_sampling_strategy {strategy} both order the data: drop one.")
    _check_kept_answers(args, fwd2bot)
    if fwd2bot:
        _check_with_fwd2bot(args)


def _check_kept_answers(args: Any, fwd2bot: bool) -> None:
    count = getattr(args, "eval_kept_answers", 0)  # of another class of arguments
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if best in KEPT_METRICS and not count:
        raise ValueError(
            f"--metric_for_best_model {args.metric_for_best_model} needs --eval_kept_answers N, the number of "
            "questions that an evaluation asks."
        )
    if not count:
        return
    if count < 0:
        raise ValueError(f"--eval_kept_answers is a number of questions, or 0 for none, got {count}.")
    if args.eval_kept_answers_tokens < 1:
        raise ValueError(f"--eval_kept_answers_tokens must be at least 1, got {args.eval_kept_answers_tokens}.")
    if not fwd2bot:
        raise ValueError("--eval_kept_answers compares Fwd2Bot with the base: give --fwd2bot K, or leave it out.")
    fsdp = bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if fsdp or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"--eval_kept_answers does not run under {'FSDP' if fsdp else 'ZeRO-3'}: the ranks generate answers of "
            "different lengths, and each layer is a call on all of them. Leave it out and compare checkpoints by "
            "`fwd2bot eval answer`, or use DDP or ZeRO-2."
        )


def _check_with_fwd2bot(args: Any) -> None:
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not supported with Fwd2Bot: the model computes its losses.")
    if getattr(args, "neftune_noise_alpha", None):
        raise ValueError(
            "neftune_noise_alpha is not supported with Fwd2Bot: its noise is for the embeddings of one pass, and would "
            "fall on prompts and captions too. Leave it out."
        )
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel is not supported with Fwd2Bot: Liger puts a forward of its own in the place of the two "
            "passes. Leave it out; the head runs only where a label is, which saves what its fused loss saves."
        )
    name = str(getattr(args.optim, "value", args.optim))
    if name in _IN_BACKWARD or name.endswith("_layerwise"):
        raise ValueError(
            f"optim {name} is not supported with Fwd2Bot: it updates weights within backward, at one learning rate and "
            "without accumulation. Use adamw_torch, or adamw_bnb_8bit for less memory."
        )
    for kind in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, kind, None) or {}).get("use_reentrant"):
            raise ValueError(
                f"Fwd2Bot needs non-reentrant gradient checkpointing: pass {kind} with use_reentrant false, or leave "
                "it out."
            )


def zero_stage(deepspeed: Any) -> int | None:
    """The stage of a DeepSpeed configuration, given as a dict or a file of JSON; None without one."""
    if not deepspeed:
        return None
    settings = deepspeed if isinstance(deepspeed, dict) else read_json(deepspeed)
    return settings.get("zero_optimization", {}).get("stage")


def check_command(args: Any, data: Any) -> None:
    """What the training command has no use for, or could not train with.

    Args:
        data: its DataArguments.

    Raises:
        ValueError: as of `check_arguments`.
    """
    evaluates = args.eval_strategy != "no" or args.eval_on_start or args.load_best_model_at_end
    evaluates = evaluates or args.save_strategy == "best"
    given = data.eval_data_path or data.eval_caption_data
    if args.do_predict or ((evaluates or args.do_eval) and not given):
        raise ValueError(
            "--eval_strategy, --eval_on_start, --do_eval, --load_best_model_at_end and --save_strategy best need "
            "evaluation data: name it by --eval_data_path or --eval_caption_data. --do_predict is not for training: "
            "use `fwd2bot eval`."
        )
    if args.eval_kept_answers and not data.eval_data_path:
        raise ValueError(
            "--eval_kept_answers asks questions of the evaluation data: name conversations by --eval_data_path, and "
            "say when to evaluate, as by --eval_strategy steps --eval_steps 500."
        )
    if given and args.eval_strategy == "no" and not args.eval_on_start:
        raise ValueError(
            "Evaluation data are given, and --eval_strategy is no: say when to evaluate, as by --eval_strategy steps "
            "--eval_steps 500."
        )
    if data.early_stopping_patience is not None and (
        data.early_stopping_patience < 1 or not args.load_best_model_at_end or args.eval_strategy == "no"
    ):
        raise ValueError(
            "--early_stopping_patience is a number of evaluations, at least 1, and needs --eval_strategy and "
            "--load_best_model_at_end True, with --metric_for_best_model such as eval_loss."
        )
    if args.eval_pool < 2:
        raise ValueError(f"--eval_pool must be at least 2 pairs, got {args.eval_pool}.")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"--num_train_epochs must be above 0, got {args.num_train_epochs:g}: nothing would be trained."
        )
    _check_reports(args.report_to)


def _check_reports(names: list[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    found = get_available_reporting_integrations()
    missing = [name for name in names if name not in found and name not in ("none", "all")]
    if missing:
        raise ValueError(
            f"--report_to {' '.join(missing)}: not installed here. Install it, e.g. by pip install {missing[0]}, or "
            "say --report_to none; losses are in trainer_state.json as well."
        )


def check_negatives(captioned: int, rows: int, batch: int, processes: int) -> None:
    """Whether the contrastive loss has something to compare with.

    Args:
        captioned, rows: of the data. batch: rows per process and forward; accumulation adds no negatives.

    Raises:
        ValueError: no two captioned images ever meet, so that the loss would stay 0.
    """
    remedy = (
        "Raise --per_device_train_batch_size (--fwd2bot_contrastive_chunk bounds the memory), use more processes, or "
        "turn the contrastive loss off by --fwd2bot_contrastive_weight 0; accumulation adds no negatives."
    )
    if not captioned:
        return
    per_batch = batch * processes
    if per_batch < 2 or captioned < 2:
        reason = "a batch is one row" if per_batch < 2 else "one row of the data has a caption"
        raise ValueError(
            "The contrastive loss compares a caption with the other images of its batch, and there are none: "
            f"{reason}. {remedy}"
        )
    if captioned * per_batch < 2 * rows:
        warnings.warn(
            f"Of the {per_batch} rows of a batch {captioned * per_batch / rows:.2g} have a caption on average, so that "
            f"most batches have no negatives for the contrastive loss. {remedy}",
            stacklevel=3,
        )


def check_trained_precision(model: nn.Module, deepspeed: bool) -> None:
    """Refuses trained weights in half precision: at 2e-5 most updates are below their last bit, and are lost.

    DeepSpeed keeps float32 weights of its own beside them.

    Raises:
        ValueError: a weight that trains is bfloat16 or float16.
    """
    halves = (torch.bfloat16, torch.float16)
    names = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in halves]
    if names and not deepspeed:
        raise ValueError(
            f"{len(names)} trained weights are in half precision, where small updates are lost (the first is "
            f"{names[0]}): convert them to float32, e.g. by model.float(), or open a Fwd2Bot checkpoint with "
            "trainable=True; bf16=True still computes in bfloat16."
        )


def float32_where_trained(model: nn.Module) -> nn.Module:
    """The model, with what trains in float32: a small update is lost on a weight of half precision."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return model
