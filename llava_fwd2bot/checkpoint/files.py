"""A Fwd2Bot checkpoint on disk: small, without the base, refused where the base or a file is another one.

fwd2bot_config.json     settings, ids of the prompts, the base and its fingerprint, a hash of each file
fwd2bot.safetensors     R, temperature, bridge, projector if it was trained
compress/  answer/      two ordinary PEFT adapters of the language model ("shared/" alone with adapters="shared")
base/                   only with adapters="none": the language model was trained, so the whole model is here
config.json             lets transformers' Auto classes open the folder
README.md               the model card
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import CONFIG_NAME, Fwd2BotConfig
from ..files.outputs import refuse_overlap, refuse_whole_model
from ..files.text import read_json
from ..files.writing import write_json
from ..version import __version__
from .fingerprint import fingerprint

TENSORS_NAME = "fwd2bot.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_FOLDERS = ("compress", "answer", "shared")
FORMAT = 1


def save_checkpoint(
    model: nn.Module, directory: str | os.PathLike, processor: Any = None, state_dict: dict[str, Tensor] | None = None
) -> list[str]:
    """Writes the whole checkpoint beside `directory`, then moves it in; the settings come last and hold every hash.

    Gives the names of its files below `directory`.

    Raises:
        OSError: it cannot be written; what was in `directory` is as it was.
        ValueError: `directory` is the base's own, lies in it, or holds another whole model.
    """
    directory = Path(directory).absolute()
    if not Path(model.name_or_path or ".").resolve().is_relative_to(directory.resolve() / "base"):  # a part of its own
        refuse_overlap("save_pretrained:", directory, models={"the base": model.name_or_path or None}, holding=True)
    refuse_whole_model("save_pretrained:", directory)
    try:
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(20, "a file is in the way")
        fresh = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        # inside the folder, which may be a mount of its own below a parent that cannot be written
        staging = Path(tempfile.mkdtemp(prefix=".saving.", dir=directory))
        try:
            _write(model, staging, directory, state_dict)
            if processor is not None:
                processor.save_pretrained(staging)
            files = [p.relative_to(staging) for p in staging.rglob("*") if p.is_file()]
            for file in files:  # before the first is moved
                if (directory / file).is_dir() or (directory / file.parent).is_file():
                    raise FileExistsError(17, f"{file} is in the way")
            for file in sorted(files, key=lambda f: f.name == CONFIG_NAME):
                if file.name == "README.md" and (directory / file).exists():
                    continue  # a card that someone has written, or the trainer's with its figures
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / file, directory / file)
            for other in {*ADAPTER_FOLDERS} - {*model._stages.names}:  # of a model that was saved here before
                if (directory / other / ADAPTER_NAME).is_file():
                    shutil.rmtree(directory / other)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if fresh and not any(directory.iterdir()):
                directory.rmdir()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            getattr(error, "errno", None) or 5,
            f"The checkpoint could not be saved ({reason}). What was there before is unchanged; choose a directory "
            "that can be written, with enough space",
            str(directory),
        ) from error
    return [file.as_posix() for file in files]


def _write(model: nn.Module, staging: Path, directory: Path, state_dict: dict[str, Tensor] | None) -> None:
    live = {id(p): name for name, p in model.named_parameters()}

    def tensor(parameter: Tensor) -> Tensor:
        source = parameter if state_dict is None else state_dict.get(live.get(id(parameter)), parameter)
        return source.detach().cpu().contiguous()

    projector = model.trained_projector()
    own = {name: tensor(p) for name, p in model.fwd2bot.named_parameters()}
    if projector is not None:
        own.update({f"projector.{name}": tensor(p) for name, p in projector.named_parameters()})
    save_file(own, staging / TENSORS_NAME, metadata={"format": "pt"})
    base = _base_entry(model, directory)
    for adapter in model._stages.names:
        (staging / adapter).mkdir()
        tensors = {name: tensor(p) for name, p in model._stages.tensors(adapter).items()}
        save_file(tensors, staging / adapter / ADAPTER_NAME, metadata={"format": "pt"})
        write_json(staging / adapter / "adapter_config.json", model._stages.peft_config(base["name_or_path"]))
    if model.fwd2bot_config.adapters == "none":
        weights = model.state_dict() if state_dict is None else state_dict
        weights = {
            name.replace(".original.", "."): value
            for name, value in weights.items()
            if not name.startswith("fwd2bot.") and not name.startswith(f"{_projector_name(model)}.copy.")
        }
        type(model).base_class.save_pretrained(model, staging / "base", state_dict=weights)
        base.update(trained="base", fingerprint=fingerprint(model))
    host = {**model.config.to_dict(), "model_type": type(model).config_class.model_type}
    host["architectures"] = [type(model).__name__]
    for name in ("quantization_config", "_name_or_path"):  # of this loading; the base is named in CONFIG_NAME
        host.pop(name, None)
    write_json(staging / "config.json", host)
    (staging / "README.md").write_text(_card(model, base), encoding="utf-8")
    hashes = {str(p.relative_to(staging)): file_hash(p) for p in sorted(staging.rglob("*.safetensors"))}
    write_json(
        staging / CONFIG_NAME,
        {
            "format": FORMAT,
            "version": __version__,
            "fwd2bot": model.fwd2bot_config.to_dict(),
            "image_prompt_ids": model.fwd2bot.image_prompt_ids.tolist(),
            "text_prompt_ids": model.fwd2bot.text_prompt_ids.tolist(),
            "base": base,
            "sha256": hashes,
        },
    )


def _projector_name(model: nn.Module) -> str:
    parent, name = model._projector_slot()
    prefix = next(n for n, m in model.named_modules() if m is parent)
    return f"{prefix}.{name}" if prefix else name


def _base_entry(model: nn.Module, directory: Path) -> dict[str, Any]:
    name = model.name_or_path or ""
    entry = {"name_or_path": name, "fingerprint": model._base_fingerprint}
    if name and Path(name).is_dir():
        entry["name_or_path"] = str(Path(name).absolute())
        entry["relative_path"] = os.path.relpath(Path(name).absolute(), directory)
    return entry


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_checkpoint(directory: str | os.PathLike) -> dict[str, Any]:
    """The settings of the checkpoint in `directory`, with the format and every file checked.

    Raises:
        FileNotFoundError: no Fwd2Bot checkpoint there, or a file of it is missing.
        ValueError: damaged, changed after it was saved, or of a newer format.
    """
    directory = Path(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(2, f"There is no Fwd2Bot checkpoint here: {CONFIG_NAME} is missing", str(directory))
    settings = read_json(directory / CONFIG_NAME)
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{directory / CONFIG_NAME} has format {settings.get('format')!r}; this version ({__version__}) reads "
            f"{FORMAT}. Upgrade llava_fwd2bot, or restore the file."
        )
    try:
        settings["fwd2bot"] = Fwd2BotConfig.from_dict(settings["fwd2bot"])
        hashes = settings["sha256"].items()
        base = settings["base"]
        _expect(all(isinstance(base["fingerprint"][n], int) for n in ("hidden_size", "vocabulary", "layers")), "base")
        _expect(isinstance(base["fingerprint"]["class"], str), "base")
        for probe in base["fingerprint"]["probes"].values():
            _expect(all(isinstance(x, (int, float)) for x in probe), "probes")
        _expect(isinstance(base["name_or_path"], str) and isinstance(base.get("relative_path") or "", str), "base")
        _expect(base.get("trained") in (None, "base"), "trained")
        for name in ("image_prompt_ids", "text_prompt_ids"):
            ids = settings[name]
            known = range(base["fingerprint"]["vocabulary"])
            _expect(isinstance(ids, list) and all(isinstance(i, int) and i in known for i in ids), name)
        _expect(TENSORS_NAME in settings["sha256"], "sha256")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / CONFIG_NAME} is damaged ({error!r}): restore it or save it again.") from error
    for name, expected in hashes:
        file = directory / name
        if not file.is_file():
            raise FileNotFoundError(2, "A file of this Fwd2Bot checkpoint is missing: copy the whole folder", str(file))
        if file_hash(file) != expected:
            raise ValueError(f"{file} is not the file that was saved (its hash differs): restore it from a good copy.")
    return settings


def _expect(fine: bool, name: str) -> None:
    if not fine:
        raise TypeError(f"{name} holds what it cannot")


def reload(model: nn.Module, directory: str | os.PathLike) -> None:
    """`load_weights`, and with adapters="none" the language model too: all that a trainer resumes from."""
    load_weights(model, directory)
    if model.fwd2bot_config.adapters == "none":
        dtype = next(model._language_model().parameters()).dtype  # float32, whatever the rest of the model is
        trained = type(model).base_class.from_pretrained(Path(directory) / "base", dtype=dtype)
        model._language_model().load_state_dict(type(model)._language_model(trained).state_dict())
        model.get_output_embeddings().load_state_dict(trained.get_output_embeddings().state_dict())


def load_weights(
    model: nn.Module, directory: str | os.PathLike, renamed: Callable[[str, Container[str]], str] | None = None
) -> None:
    """Puts the trained tensors of a checkpoint into a model that Fwd2Bot is on, in place.

    Args:
        renamed: gives a stored projector tensor's name in this model, out of the names that it has.

    Raises:
        ValueError: names or shapes do not fit the model.
    """
    directory = Path(directory)
    own = dict(model.fwd2bot.named_parameters())
    tensors = _read_tensors(directory / TENSORS_NAME)
    if any(name.startswith("projector.") for name in tensors):
        model._train_projector()
        own.update({f"projector.{name}": p for name, p in model.trained_projector().named_parameters()})
        if renamed is not None:
            tensors = {renamed(name, own): tensor for name, tensor in tensors.items()}
    _copy(own, tensors, directory / TENSORS_NAME)
    for adapter in model._stages.names:
        path = directory / adapter / ADAPTER_NAME
        _copy(model._stages.tensors(adapter), _read_tensors(path), path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): restore it from a good copy.") from error


@torch.no_grad()
def _copy(own: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"{path} does not fit this model: {len(odd)} names differ, the first is {odd[0]}.")
    for name, parameter in own.items():
        if tensors[name].dim() == 0 and parameter.shape == (1,):  # how temperature and gain were written before
            tensors[name] = tensors[name][None]
        if parameter.shape != tensors[name].shape:
            there, here = list(tensors[name].shape), list(parameter.shape)
            raise ValueError(f"{path} does not fit this model: {name} is {there} there, {here} here.")
        parameter.copy_(tensors[name])


def write_card(model: nn.Module, directory: str | os.PathLike, training: dict[str, Any]) -> None:
    """Writes the model card again, with the figures of a training run."""
    path = Path(directory) / "README.md"
    card = _card(model, _base_entry(model, Path(directory).absolute()))
    rows = "\n".join(f"| {name} | {value} |" for name, value in training.items())
    path.write_text(f"{card}\n## Training\n\n| | |\n|---|---|\n{rows}\n", encoding="utf-8")


def _card(model: nn.Module, base: dict[str, Any]) -> str:
    config = model.fwd2bot_config
    name = Path(base["name_or_path"]).name or "LLaVA"
    tag = (
        f"base_model: {base['name_or_path']}"
        if name and "relative_path" not in base
        else "base_model_relation: adapter"
    )
    trained = f"any of {config.nested_k}" if config.nested_k else str(config.num_summary_tokens)
    return f"""---
library_name: llava_fwd2bot
{tag}
tags: [llava, fwd2bot]
---

# {name} with Fwd2Bot

Condenses an image into {config.num_summary_tokens} summary tokens of {base["fingerprint"]["hidden_size"]} numbers each.
The same language model answers from them, and they are compared for retrieval (arXiv 2503.21757).

```python
from llava_fwd2bot import load_fwd2bot

model, processor = load_fwd2bot("path/of/this/folder")
```

Summary tokens in use: {trained}. Adapters: {config.adapters}, LoRA rank {config.lora_r}. All settings are in
`{CONFIG_NAME}`. The base is not in this folder: it is `{name}`.
"""
