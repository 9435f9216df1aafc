"""Going on with a run: from which checkpoint, whether it is the same run, and which data are skipped or repeated.

Each checkpoint of a run, and its result, hold training_run.json: data, settings, and how rows were dealt out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.hf_argparser import string_to_bool

from ..checkpoint.read import file_hash
from ..files.text import read_json
from ..files.writing import write_json

RUN_NAME = "training_run.json"
STATE_NAME = "trainer_state.json"  # of transformers' Trainer, which writes it last
# what decides the result; how often is logged or saved does not
_SETTINGS = (
    *("num_train_epochs", "max_steps", "learning_rate", "summary_lr", "mm_projector_lr", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha"),
    *(
        "seed",
        "data_seed",
        "group_by_modality_length",
        "group_by_image",
        "train_sampling_strategy",
        "dataloader_drop_last",
    ),
    *("bf16", "fp16", "bits", "double_quant", "quant_type", "model_max_length", "lora_enable"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_weight_path"),
)


def settings_of(args: Any, **more: Any) -> dict[str, Any]:
    """Those of TrainingArguments that decide the result, and `more` (which wins), as JSON holds them."""
    found = {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)}
    return {name: _plain(value) for name, value in {**found, **more}.items()}


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # of an enum
    if dataclasses.is_dataclass(value):
        return {name: _plain(x) for name, x in dataclasses.asdict(value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else str(value)


def data_of(known: Mapping[Path, str | None] | None = None, **files: str | os.PathLike | None) -> dict[str, Any]:
    """Name and hash of each data file, or folder of files, that is given; `known`: hashes that are at hand."""
    given = {kind: Path(file) for kind, file in files.items() if file}
    return {kind: {"name": file.name, "sha256": (known or {}).get(file) or _hash(file)} for kind, file in given.items()}


def _hash(path: Path) -> str:
    if not path.is_dir():
        return file_hash(path)
    parts = [f"{p.relative_to(path).as_posix()} {file_hash(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def layout_of(args: Any, rows: int) -> dict[str, int]:
    """How the rows are dealt out to processes and steps."""
    return {
        "rows": rows,
        "processes": args.world_size,
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
    }


# ---------------------------------------------------------------------- from where
def last_checkpoint(output: str | os.PathLike) -> str | None:
    """The newest checkpoint in `output` that was finished; warns of newer ones that were not."""
    for path in _checkpoints(output):
        if (path / STATE_NAME).is_file():
            return str(path)
        warnings.warn(f"{path} was not finished when the process ended, and is passed over.", stacklevel=3)
    return None


def _checkpoints(output: str | os.PathLike) -> list[Path]:
    found = [p for p in Path(output).glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def checkpoint_to_resume(given: str | bool | None, output: str | os.PathLike) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means, or None to start anew.

    Args:
        given: a folder, which wins over all others; a boolean as transformers reads it: true is the newest in `output`,
            false starts anew; None goes on from the newest, if there is one.

    Raises:
        ValueError: no finished checkpoint is there.
    """
    if given is None:
        return last_checkpoint(output)
    if isinstance(given, bool) or not Path(given).is_dir():
        try:
            wanted = string_to_bool(given)
        except Exception as error:  # argparse's own, for what is no boolean
            raise ValueError(
                f"--resume_from_checkpoint {given}: there is no such folder. Name a checkpoint, or say True for the "
                f"newest in {output}, or False to start anew."
            ) from error
        if not wanted:
            return None
        found = last_checkpoint(output)
        if found is None:
            raise ValueError(f"--resume_from_checkpoint {given}: there is no finished checkpoint in {output}.")
        return found
    path = Path(given)
    if not (path / STATE_NAME).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {given}: it is no finished checkpoint of a run ({STATE_NAME} is missing)."
        )
    newer = [p.name for p in _checkpoints(output) if path.resolve().parent == Path(output).resolve()]
    newer = newer[: newer.index(path.name)] if path.name in newer else []
    if newer:
        warnings.warn(
            f"{path} is resumed as requested, though {output} has newer ones ({', '.join(newer)}), which will be "
            "overwritten as training passes them.",
            stacklevel=2,
        )
    return str(path)


# ---------------------------------------------------------------------- the same run?
def read_run(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What `folder` says about its run; None where it says nothing, as folders of older versions do."""
    path = Path(folder) / RUN_NAME
    return read_json(path) if path.is_file() else None


def write_run(folder: str | os.PathLike, run: dict[str, Any]) -> None:
    write_json(Path(folder) / RUN_NAME, run)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs, as "name before → now"; names that one of them does not know are passed over."""
    old, new = before.get("settings", {}), now.get("settings", {})
    found = [f"{name} {old[name]} → {new[name]}" for name in new if name in old and old[name] != new[name]]
    old, new = before.get("data", {}), now.get("data", {})
    for kind in sorted(old.keys() | new.keys()):
        one, other = old.get(kind), new.get(kind)
        if (one or {}).get("sha256") != (other or {}).get("sha256"):
            names = [entry["name"] if entry else "none" for entry in (one, other)]
            same = " (its content changed)" if names[0] == names[1] else ""
            found.append(f"{kind} {names[0]} → {names[1]}{same}")
    return found


def rows_per_step(layout: dict[str, int]) -> int:
    return layout["processes"] * layout["batch"] * layout["accumulation"]


def is_finished(output: Path, now: dict[str, Any]) -> bool:
    """Whether `output` holds the result of this very run already.

    Raises:
        ValueError: it holds the result of another run, or of one that did not say which.
    """
    before = read_run(output)
    way_out = "Choose another --output_dir; to train the result further, name it by --model_name_or_path"
    if before is None:
        state = read_json(output / STATE_NAME) if (output / STATE_NAME).is_file() else {}
        if state.get("global_step", 0) < max(1, state.get("max_steps", 1)):
            return False
        raise ValueError(
            f"{output} holds a finished run of {state['global_step']} steps, without a word of its data and settings "
            f"({RUN_NAME} is missing). {way_out}, or go on from a checkpoint of it by --resume_from_checkpoint."
        )
    if not before.get("finished"):
        return False
    found = changes(before, now)
    if not found and rows_per_step(before["layout"]) != rows_per_step(now["layout"]):
        found = [f"rows in a step {rows_per_step(before['layout'])} → {rows_per_step(now['layout'])}"]
    if found:
        raise ValueError(f"{output} is finished, and was trained with other settings: {'; '.join(found)}. {way_out}.")
    return True


def check_same_run(checkpoint: str, now: dict[str, Any], explicit: bool) -> None:
    """Refuses to resume from a checkpoint of a run with other data or settings; warns where it was named explicitly.

    Raises:
        ValueError: the run changed, and the checkpoint was found, not named.
    """
    before = read_run(checkpoint)
    found = changes(before, now) if before else []
    if not found:
        return
    message = f"{checkpoint} was trained with other settings: {'; '.join(found)}."
    if not explicit:
        raise ValueError(
            f"{message} Say the same again, choose another --output_dir, or go on all the same by "
            f"--resume_from_checkpoint {checkpoint}."
        )
    warnings.warn(f"{message} It is resumed as requested.", stacklevel=2)


# ---------------------------------------------------------------------- which data
def _place(layout: dict[str, int], step: int) -> tuple[int, int]:
    """(epoch, rows of it) that are behind after `step` steps, as the Trainer counts them."""
    batches = -(-layout["rows"] // (layout["batch"] * layout["processes"]))  # of each process
    steps = max(1, -(-batches // layout["accumulation"]))
    return step // steps, min(layout["rows"], step % steps * rows_per_step(layout))


def moved_data(checkpoint: str, before: dict[str, int], now: dict[str, int], fresh_epoch: bool = False) -> str | None:
    """What resuming with other processes, batches or accumulation does to the data; None where they are the same.

    Args:
        before, now: as of `layout_of`. fresh_epoch: with --ignore_data_skip, where the epoch begins again.
    """
    if before == now:
        return None
    step = read_json(Path(checkpoint) / STATE_NAME)["global_step"]
    (epoch, seen), (next_epoch, after) = _place(before, step), _place(now, step)
    after = 0 if fresh_epoch else after
    moved = next_epoch * now["rows"] + after - (epoch * before["rows"] + seen)
    layouts = [
        f"{x['processes']} process(es) x batch {x['batch']} x accumulation {x['accumulation']} = {rows_per_step(x)}"
        for x in (before, now)
    ]
    what = "No row is skipped or repeated."
    if moved:
        fate = f"{moved:,} rows are skipped" if moved > 0 else f"{-moved:,} rows are trained again"
        what = (
            f"{fate}: {seen:,} of the {before['rows']:,} rows of epoch {epoch + 1} were behind, and training goes on "
            f"after {after:,} rows of epoch {next_epoch + 1}. For none, let processes x batch x accumulation be "
            f"{rows_per_step(before)} as before."
        )
    return f"{checkpoint} was trained with {layouts[0]} rows in a step, now it is {layouts[1]}. {what}"
