"""A Fwd2Bot checkpoint read and verified; write.py describes what it holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import CONFIG_NAME, Fwd2BotConfig
from ..files.text import read_json
from ..version import __version__
from .adapter_names import unplaced
from .gathering import fill, full_shape

TENSORS_NAME = "fwd2bot.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_FOLDERS = ("compress", "answer", "shared")
FORMAT = 1


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
        problem = f"There is no Fwd2Bot checkpoint here ({CONFIG_NAME} is missing); name the folder that training wrote"
        raise FileNotFoundError(2, f"{problem}, a hub name, or smol-llava", str(directory))
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
        for part, saved in (
            (model._language_model(), type(model)._language_model(trained)),
            (model.get_output_embeddings(), trained.get_output_embeddings()),
        ):
            weights = dict(saved.named_parameters())
            for name, parameter in part.named_parameters():
                fill(parameter, weights[name])


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
        stored = {unplaced(name): tensor for name, tensor in _read_tensors(path).items()}
        _copy(model._stages.tensors(adapter), stored, path)


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
        if tensors[name].dim() == 0 and full_shape(parameter) == (1,):  # how temperature and gain were written before
            tensors[name] = tensors[name][None]
        if full_shape(parameter) != tensors[name].shape:
            there, here = list(tensors[name].shape), list(full_shape(parameter))
            raise ValueError(f"{path} does not fit this model: {name} is {there} there, {here} here.")
        fill(parameter, tensors[name])
