"""The arguments of the training command: LLaVA's own names, and `--fwd2bot`."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from ..config import Fwd2BotConfig
from ..extras import install_command
from .checks import check_arguments, check_command
from .trainer import Fwd2BotTrainingArguments


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = _help("The base, e.g. llava-hf/llava-1.5-7b-hf, or a checkpoint to train further.")
    version: str = _help("Conversation format: auto (the processor's chat template), v1, plain.", "auto")
    tune_mm_mlp_adapter: bool = _help("LLaVA's first stage: trains the projector alone.", False)
    # what LLaVA's scripts say about the architecture; a base of transformers' layout brings it along
    freeze_backbone: bool = _help("Ignored: LoRA keeps the backbone frozen.", False)
    vision_tower: str | None = _help("Ignored: the base has its vision tower.")
    mm_vision_select_layer: int | None = _help("Ignored: the base's own is used.")
    mm_vision_select_feature: str | None = _help("Ignored: the base's own is used.")
    pretrain_mm_mlp_adapter: str | None = _help("Ignored: the base has its projector.")
    mm_projector_type: str | None = _help("Ignored: the base has its projector.")
    mm_patch_merge_type: str | None = _help("Ignored: the base's own is used.")
    mm_use_im_start_end: bool = _help("Must be false, as in LLaVA-1.5.", False)
    mm_use_im_patch_token: bool = _help("Must be false, as in LLaVA-1.5.", False)


@dataclass
class DataArguments:
    data_path: str | None = _help(
        "Conversations, as LLaVA's or as messages: a .json list, .jsonl or .parquet, a folder of datasets, or "
        "WebDataset's shards: a .tar, a folder of them, or a pattern such as shards/{000..009}.tar."
    )
    image_folder: str | None = _help("Where the images of the records are.")
    eval_data_path: str | None = _help("Conversations to evaluate on while training, in any layout of --data_path.")
    eval_caption_data: str | None = _help("Captions of the evaluation's images, as --fwd2bot_caption_data.")
    eval_image_folder: str | None = _help("Where the evaluation's images are; default: --image_folder.")
    early_stopping_patience: int | None = _help(
        "Ends the run after so many evaluations in which --metric_for_best_model was no better."
    )
    on_bad_image: Literal["raise", "skip"] = _help(
        "Images that are missing or damaged. raise: an error, for missing files before anything is loaded; skip: their "
        "records are left out, each image is named once, and the model card counts them.",
        "raise",
    )
    image_aspect_ratio: str | None = _help("pad: to a square, as LLaVA-1.5 does; default: as the processor does.")
    lazy_preprocess: bool = _help("Ignored: preprocessing is lazy.", True)
    is_multimodal: bool = _help("Ignored: the data tell.", True)


@dataclass
class LlavaTrainingArguments(Fwd2BotTrainingArguments):
    logging_steps: float = _help("Losses are logged every so many steps; below 1: a share of all.", 10)
    cache_dir: str | None = _help("Where a base from the hub is kept.")
    model_max_length: int = _help("Rows are cut to this many ids, image placeholders included.", 2048)
    bits: int = _help("16, or 8 or 4: the base is quantised and LoRA trains on it (extra [quantized]).", 16)
    double_quant: bool = _help("4 bits: quantise the scales too.", True)
    quant_type: str = _help("4 bits: nf4 or fp4.", "nf4")
    lora_enable: bool = _help("LoRA; false trains the whole language model.", True)
    lora_r: int | None = _help("LoRA rank (of each adapter).")
    lora_alpha: int | None = _help("LoRA alpha.")
    lora_dropout: float | None = _help("LoRA dropout.")
    lora_bias: str = _help("Must be none.", "none")
    lora_weight_path: str = _help("Without --fwd2bot: a PEFT adapter to train further, as it is.", "")
    freeze_mm_mlp_adapter: bool = _help("The projector trains only with --mm_projector_lr; this forbids it.", False)
    mpt_attn_impl: str | None = _help("Ignored.")
    attn_implementation: str | None = _help("sdpa (default), flash_attention_2, eager.")


# renamed in transformers since LLaVA's scripts were written; a warm-up below 1 is a ratio
_RENAMED = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}
_LORA = ("lora_r", "lora_alpha", "lora_dropout")  # LLaVA has these


def _fwd2bot_arguments() -> type:
    fields: list[Any] = [
        ("fwd2bot", int | None, _help("k: train Fwd2Bot with k summary tokens. Without it, a plain LoRA fine-tune.")),
        (
            "fwd2bot_caption_data",
            str | None,
            _help(
                "Captions for the contrastive loss: .json or .jsonl of image, caption; `fwd2bot train` also takes "
                ".parquet and .tar shards."
            ),
        ),
    ]
    for f in dataclasses.fields(Fwd2BotConfig):
        if f.name == "num_summary_tokens" or f.name in _LORA:
            continue
        kind = {"float": float | None, "str": str | None, "int | None": int | None}.get(str(f.type), str | None)
        fields.append((f"fwd2bot_{f.name}", kind, _help(f.metadata["help"].replace("%", "%%"))))
    return make_dataclass("Fwd2BotArguments", fields)


Fwd2BotArguments = _fwd2bot_arguments()


def given_settings(arguments: Any, training: LlavaTrainingArguments) -> dict[str, Any] | None:
    """The settings of Fwd2BotConfig that the command line names, or None without `--fwd2bot`.

    Raises:
        ValueError: `--fwd2bot_…` without `--fwd2bot`, or a value out of range.
    """
    given = {
        f.name.removeprefix("fwd2bot_"): getattr(arguments, f.name)
        for f in dataclasses.fields(arguments)
        if f.name not in ("fwd2bot", "fwd2bot_caption_data") and getattr(arguments, f.name) is not None
    }
    if arguments.fwd2bot is None:
        if given or arguments.fwd2bot_caption_data:
            first = sorted(given)[0] if given else "caption_data"
            raise ValueError(f"--fwd2bot_{first} needs --fwd2bot K, the number of summary tokens.")
        return None
    for name, convert in (("nested_k", int), ("lora_targets", str)):
        if name in given:
            try:
                given[name] = [convert(part) for part in given[name].replace(",", " ").split()]
            except ValueError:
                raise ValueError(f"--fwd2bot_{name} is a list such as 1,2,4, got {given[name]!r}.") from None
    given.update({name: getattr(training, name) for name in _LORA if getattr(training, name) is not None})
    if not training.lora_enable:
        given["adapters"] = "none"
    return {"num_summary_tokens": arguments.fwd2bot, **given}


def renamed(argv: Sequence[str]) -> list[str]:
    """The command line with today's names of what was called otherwise in LLaVA's time."""
    names = [(word.split("=")[0], word) for word in argv]
    return [_RENAMED.get(name, name) + word[len(name) :] for name, word in names]


def _unknown(words: Sequence[str], parser: Any) -> str:
    """What to tell of arguments that the parser does not know: the nearest that it does."""
    text = f"unrecognized arguments: {' '.join(words)}"
    for word in words:
        near = difflib.get_close_matches(word.split("=")[0], list(parser._option_string_actions), n=1)
        if word.startswith("--") and near:
            text += f"; {word.split('=')[0]}: did you mean {near[0]}?"
    return text


def parse(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, LlavaTrainingArguments, Any]:
    """The four groups of arguments.

    Raises:
        ValueError: something is missing, or of LLaVA's arguments one that cannot be followed here.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = renamed(argv)
    for i, word in enumerate(argv):
        if word.startswith("--load-") and word in ("--load-4bit", "--load-8bit"):
            argv[i : i + 1] = ["--bits", word[len("--load-")]]
    # bf16 on a machine without an accelerator is refused unless this is said
    if "--use_cpu" not in argv and not getattr(torch, "accelerator", torch.cuda).is_available():
        argv += ["--use_cpu", "True"]
    if "--tf32" in argv and not torch.cuda.is_available():
        warnings.warn("--tf32 is left out: there is no GPU that has it.", stacklevel=2)
        at = argv.index("--tf32")
        del argv[at : at + 2]
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, LlavaTrainingArguments, Fwd2BotArguments),
        prog="fwd2bot train",
        allow_abbrev=False,
    )
    try:
        *found, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except ImportError as error:  # transformers names the version that it looked for, and no remedy
        if "deepspeed" not in str(error):
            raise
        raise ImportError(
            f"--deepspeed needs deepspeed, which is not installed: {install_command('deepspeed')}"
        ) from error
    if unknown:
        raise ValueError(_unknown(unknown, parser))
    model, data, training, fwd2bot = found
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: name the base, e.g. llava-hf/llava-1.5-7b-hf.")
    if not data.data_path and not fwd2bot.fwd2bot_caption_data:
        raise ValueError("--data_path is missing: give LLaVA's conversations.")
    if model.tune_mm_mlp_adapter and (fwd2bot.fwd2bot is not None or training.bits != 16):
        raise ValueError(
            "--tune_mm_mlp_adapter is LLaVA's first stage, the projector alone: do that first, without --fwd2bot and "
            "--bits; then fine-tune what it gives."
        )
    if model.mm_use_im_start_end or model.mm_use_im_patch_token:
        raise ValueError("--mm_use_im_start_end and --mm_use_im_patch_token must be False, as LLaVA-1.5 has them.")
    if data.image_aspect_ratio not in (None, "pad", "square"):
        raise ValueError(f"--image_aspect_ratio must be pad or square here, got {data.image_aspect_ratio!r}.")
    if training.bits not in (4, 8, 16):
        raise ValueError(f"--bits must be 4, 8 or 16, got {training.bits}.")
    if training.lora_bias != "none":
        raise ValueError("--lora_bias must be none: a trained bias would change the base.")
    if training.freeze_mm_mlp_adapter and training.mm_projector_lr is not None:
        raise ValueError("--freeze_mm_mlp_adapter and --mm_projector_lr contradict each other: drop one.")
    if training.bits != 16 and not training.lora_enable:
        raise ValueError("--bits 4 and 8 need LoRA: quantised weights do not train.")
    check_command(training, data)
    check_arguments(training, fwd2bot.fwd2bot is not None)
    return model, data, training, fwd2bot
