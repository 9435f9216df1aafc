"""`fwd2bot train`, with LLaVA's and transformers' own arguments, parsed by transformers' parser.

That parser takes seconds to import. The short help and the check for misspelt arguments need only their names, which
are read from the source files of the argument classes.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from .console import quiet_bars
from .parser import did_you_mean

# LLaVA's and transformers' arguments that most runs set
COMMON = {
    "model_name_or_path": "the base, e.g. llava-hf/llava-1.5-7b-hf, or a Fwd2Bot checkpoint to train further",
    "data_path": "conversations: .json, .jsonl, .parquet, .tar shards, or a folder of datasets",
    "image_folder": "where the images of the records are",
    "output_dir": "the folder to write; the same command resumes in it",
    "on_bad_image": "missing or damaged images: raise (default) or skip",
    "bf16": "True: train in bfloat16",
    "bits": "16 (default), or 8 or 4: the base is quantised and LoRA trains on it",
    "gradient_checkpointing": "True: less memory, about a quarter more time",
    "per_device_train_batch_size": "rows per batch; the contrastive loss compares rows within it",
    "gradient_accumulation_steps": "batches per step; adds no negatives to the contrastive loss",
    "num_train_epochs": "passes over the data; default: 3",
    "learning_rate": "learning rate of the adapters; default: 5e-5",
    "summary_lr": "learning rate of summary tokens, temperature and bridge; default: --learning_rate",
    "mm_projector_lr": "train a copy of the projector with this learning rate",
    "lora_r": "LoRA rank of each adapter",
    "lora_alpha": "LoRA alpha",
    "logging_steps": "steps between two lines of losses; default: 10",
    "save_steps": "steps between two checkpoints; default: 500",
    "eval_data_path": "conversations to evaluate on while training; see --eval_strategy",
    "eval_kept_answers": "ask so many of their questions; share of the base's answers that are kept",
    "group_by_modality_length": "True: batches of one modality and of similar lengths",
    "deepspeed": "a DeepSpeed configuration: ZeRO-2 or ZeRO-3",
}
METHOD = {
    "fwd2bot": "k, the number of summary tokens",
    "fwd2bot_caption_data": "captions for the contrastive loss: .json, .jsonl, .parquet or .tar of image, caption",
    "fwd2bot_nested_k": "prefix lengths to train, e.g. 1,2,4,8,16: one summary then serves every k",
    "fwd2bot_residual": "none (default); average, pool: a summary token starts as an average of dense tokens",
    "fwd2bot_pooling": "how a summary becomes one vector for search: mean (default), last, first",
    "fwd2bot_adapters": "stage (default): one per pass; shared: one for both; none: the language model trains",
    "fwd2bot_contrastive_weight": "weight of the contrastive loss; default: 1",
    "fwd2bot_answer_weight": "weight of the answer loss; default: 1",
    "fwd2bot_distill_weight": "weight of distillation from the base; default: 0",
    "fwd2bot_contrastive_chunk": "images per chunk of the compress pass: more negatives in the same memory",
}


def main(argv: Sequence[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(short_help())
        return
    argv = ["--help" if word == "--help-all" else word for word in argv]
    if "--help" not in argv:
        _refuse_unknown(argv)
    from ..training.command import train
    from ..training.processes import ending_process_group

    quiet_bars()
    with ending_process_group():
        train(argv)


def short_help() -> str:
    """Fwd2Bot's arguments and the common ones, in about forty lines."""
    lines = ["usage: fwd2bot train --model_name_or_path BASE --data_path DATA --output_dir DIR --fwd2bot K [...]", ""]
    lines += ["Train a LLaVA with k summary tokens. Without --fwd2bot it is a plain LoRA fine-tune.", "", "Fwd2Bot:"]
    lines += _rows(METHOD)
    lines += ["", "Common arguments of LLaVA and transformers:", *_rows(COMMON)]
    return "\n".join([*lines, "", "--help-all lists every argument. docs/train.md explains them."])


def _rows(named: dict[str, str]) -> Iterator[str]:
    for name, text in named.items():
        yield f"  --{name:<30} {text}"


def _refuse_unknown(argv: Sequence[str]) -> None:
    """Raises ValueError for unknown arguments; does nothing if the source files cannot be read."""
    known = known_arguments()
    given = [word.split("=")[0] for word in argv if word.startswith("--")]
    unknown = [name for name in given if name[2:].replace("-", "_") not in known]
    if known and unknown:
        hints = (f"{name}: {did_you_mean(name, (f'--{k}' for k in known))}" for name in unknown)
        hints = [hint for hint in hints if not hint.endswith(": ")]
        raise ValueError("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))


def known_arguments() -> set[str]:
    """Names of all arguments; empty if transformers' source files are missing."""
    from ..config import Fwd2BotConfig

    found = {"fwd2bot", "fwd2bot_caption_data", "load_4bit", "load_8bit", "local_rank", "help"}
    found |= {"evaluation_strategy", "warmup_ratio"}  # older names, used by LLaVA's scripts
    found |= {f"fwd2bot_{field.name}" for field in dataclasses.fields(Fwd2BotConfig)}
    package = Path(__file__).parents[1] / "training"
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return set()
    for file in (Path(spec.origin).with_name("training_args.py"), package / "arguments.py", package / "trainer.py"):
        if not file.is_file():
            return set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
                found |= {*names, *(f"no_{name}" for name in names)}
    return found
