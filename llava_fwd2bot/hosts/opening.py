"""Opening a Fwd2Bot checkpoint by its host: the base, Fwd2Bot on it, then what was trained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.fingerprint import check_base
from ..checkpoint.read import load_weights, read_checkpoint
from ..config import CONFIG_NAME, STAGES
from ..smol import base_folder, checkpoint_folder, is_smol
from . import host_class, install

if TYPE_CHECKING:
    from ..mixin import Fwd2BotMixin

# names that belong to the checkpoint's own place on a hub, not to its base
_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
_AUTO = ("_from_auto", "_commit_hash", "trust_remote_code", "code_revision", "adapter_kwargs", "subfolder")


def open_checkpoint(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    host: type | None = None,
    trainable: bool = False,
    merge: str | None = None,
    **loading: Any,
) -> Fwd2BotMixin:
    """`load_fwd2bot` without the processor; a `quantization_config` gets the host's list of what stays unquantised."""
    path = local_folder(path, loading)
    for name in ("revision", *_AUTO):
        loading.pop(name, None)
    settings = read_checkpoint(path)
    trained = settings["base"].get("trained")  # adapters="none": the checkpoint brings the language model along
    source = str(path / trained) if trained else base_of(path, base, settings)
    host = host or host_class(settings["base"]["fingerprint"]["class"])
    quantization = loading.get("quantization_config")
    if merge is not None:
        _check_merge(merge, settings["fwd2bot"].adapters, trainable, quantization)
    if quantization is not None and getattr(quantization, "llm_int8_skip_modules", "") is None:
        quantization.llm_int8_skip_modules = list(host.quantization_skip)
    with naming(source):
        model = host.load_base(source, **loading)
    if base is None and is_smol(settings["base"]["name_or_path"]):
        model.name_or_path = settings["base"]["name_or_path"]  # saved again it must not name a cache's folder
    install(model, host, settings["fwd2bot"], settings["image_prompt_ids"], settings["text_prompt_ids"])
    check_base(settings["base"]["fingerprint"], model._base_fingerprint, str(source))
    load_weights(model, path)
    model.adopt_settings(path)
    if merge is not None:  # of the adapters as they were trained, before they are rounded
        model._merge_adapter(merge)
    elif not trainable:
        model._stages.cast(model.get_input_embeddings().weight.dtype)
    return model.eval()


def _check_merge(merge: str, adapters: str, trainable: bool, quantization: Any) -> None:
    """What merging cannot do is refused before the base is loaded."""
    if merge not in STAGES:
        raise ValueError(f"merge must be one of {', '.join(STAGES)}, got {merge!r}.")
    if adapters == "none":
        raise ValueError('This checkpoint has adapters="none", so there is nothing to merge: leave merge out.')
    if trainable:
        raise ValueError("merge and trainable=True exclude each other: a merged adapter cannot be trained.")
    if quantization is not None:
        raise ValueError(
            "merge needs a float base: merging into quantised weights would round them a second time. Leave out merge, "
            "or load_in_4bit and load_in_8bit."
        )


def local_folder(path: str | os.PathLike, options: dict[str, Any]) -> Path:
    """`path` itself, the folder in this package, or the folder that the hub's copy of it was brought to."""
    if is_smol(path):
        return checkpoint_folder()
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), **{name: options[name] for name in _HUB if name in options}))
    except Exception as error:  # of many kinds: no such repository, no right to it, no network
        raise _missing(path, str(error)) from error


@contextmanager
def naming(model: str | os.PathLike) -> Iterator[None]:
    """FileNotFoundError that names `model`, a folder or hub name, where transformers finds it nowhere.

    Its own error speaks of the network, also of a mistyped folder, and may not say which model it is about.
    """
    try:
        yield
    except OSError as error:
        if Path(model).exists():
            raise
        raise _missing(model, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _missing(model: str | os.PathLike, reason: str) -> FileNotFoundError:
    said = f"There is no such folder here, and the hub did not give it either ({reason})"
    return FileNotFoundError(2, said, str(model))


def base_of(
    path: str | os.PathLike, base: str | os.PathLike | None = None, settings: dict[str, Any] | None = None
) -> str:
    """Where the base of the checkpoint at `path` is: as given, as named, or at the same place beside the checkpoint.

    Raises:
        FileNotFoundError: the checkpoint names a folder that is not there any more, or no base at all.
    """
    if base is not None:
        return str(base)
    named = (settings or read_checkpoint(path))["base"]
    if is_smol(named["name_or_path"]):
        return str(base_folder())
    relative = named.get("relative_path")
    for folder in (relative and Path(path) / relative, relative and Path(named["name_or_path"])):
        if folder and folder.is_dir():
            return str(folder.resolve())
    if relative or not named["name_or_path"]:
        where = named["name_or_path"] or "a model that had no name"
        raise FileNotFoundError(2, f"The base of {path} is missing. Pass where it is now: base=…", where)
    return named["name_or_path"]


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a Fwd2Bot checkpoint, rather than a base, is at `path`."""
    return (Path(path) / CONFIG_NAME).is_file()
