"""A Fwd2Bot checkpoint on disk: small, without the base, refused where the base or a file is another one.

fwd2bot_config.json     settings, ids of the prompts, the base and its fingerprint, a hash of each file
fwd2bot.safetensors     R, temperature, bridge, projector if it was trained
compress/  answer/      two ordinary PEFT adapters of the base ("shared/" alone with adapters="shared")
base/                   only with adapters="none": the language model was trained, so the whole model is here
config.json             lets transformers' Auto classes open the folder
modules.json, sentence_bert_config.json   let sentence-transformers open it
README.md               the model card
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import CONFIG_NAME
from ..files.outputs import refuse_overlap, refuse_whole_model
from ..files.writing import as_other_files, write_json, write_text
from ..version import __version__
from .adapter_names import placed
from .card import front_matter
from .embedding_files import embedding_files
from .fingerprint import fingerprint
from .read import ADAPTER_FOLDERS, ADAPTER_NAME, FORMAT, TENSORS_NAME, file_hash


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
            for file in staging.rglob("*.safetensors"):
                as_other_files(file)
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
        tensors = {placed(name, model._stages.inside): tensor(p) for name, p in model._stages.tensors(adapter).items()}
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
        base.update(trained="base", fingerprint=fingerprint(model, state_dict))
    host = {**model.config.to_dict(), "model_type": type(model).config_class.model_type}
    # FSDP makes a class of its own for the model
    host["architectures"] = [next(c.__name__ for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))]
    for name in ("quantization_config", "_name_or_path"):  # of this loading; the base is named in CONFIG_NAME
        host.pop(name, None)
    write_json(staging / "config.json", host)
    if host["model_type"].startswith("fwd2bot_"):  # the original LLaVA's are for its own code alone
        for name, content in embedding_files().items():
            write_json(staging / name, content)
    write_text(staging / "README.md", _card(model, base))
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


def write_card(model: nn.Module, directory: str | os.PathLike, training: dict[str, Any]) -> None:
    """Writes the model card again, with the figures of a training run, floats to three significant digits."""
    path = Path(directory) / "README.md"
    card = _card(model, _base_entry(model, Path(directory).absolute()))
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in training.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    write_text(path, f"{card}\n## Training\n\n| | |\n|---|---|\n{rows}\n")


def _card(model: nn.Module, base: dict[str, Any]) -> str:
    config = model.fwd2bot_config
    name = Path(base["name_or_path"]).name or "LLaVA"
    trained = f"any of {config.nested_k}" if config.nested_k else str(config.num_summary_tokens)
    return f"""{front_matter(base["name_or_path"], "relative_path" in base)}
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
