"""Outputs never stand on inputs: one check for every command that writes, made before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .text import is_utf8, spelled

PathLike = str | os.PathLike
# what a whole model leaves in its folder, in the layouts of transformers and of the original LLaVA
_WHOLE_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def refuse_overlap(
    option: str,
    output: PathLike,
    *,
    models: Mapping[str, PathLike | None] | None = None,
    files: Mapping[str, PathLike | None] | None = None,
    images: Mapping[str, PathLike | None] | None = None,
    inside_images: bool = False,
    holding: bool = False,
) -> None:
    """Refuses an output that is one of the inputs, lies in one, or holds one.

    Args:
        option: how the user names the output, e.g. "--output_dir".
        models: folders that belong together as they are: bases, checkpoints, caches. Nothing is written into them.
        files: data files.
        images: folders of images. Nothing is written into them either, unless the working directory lies in the folder,
            as with `--image_folder .`, or `inside_images` is set.
        holding: lets the output be a folder that holds an input.

    Names that are not on this disk, such as those of a hub, and None are passed over.

    Raises:
        ValueError: the output overlaps an input; the message names both. Or its name is not UTF-8.
    """
    if not is_utf8(str(output)):  # tokenizers and LanceDB do not write there, which would be told at the end
        raise ValueError(f"{option} {spelled(str(output))}: its name is not UTF-8; choose another name")
    target = Path(output).resolve()
    for kind, named in (("model", models), ("file", files), ("images", images)):
        for name, given in (named or {}).items():
            if given is None or not str(given) or not Path(given).exists():
                continue
            source = Path(given).resolve()
            if _same(target, source):
                raise ValueError(_message(option, output, "is also", name, given))
            if target in source.parents and not holding:
                raise ValueError(_message(option, output, "holds", name, given))
            if source not in target.parents or kind == "file":
                continue
            if kind == "images" and (inside_images or Path.cwd().is_relative_to(source)):
                continue
            raise ValueError(_message(option, output, "lies in", name, given))


def refuse_whole_model(option: str, directory: PathLike) -> None:
    """Refuses to write a Fwd2Bot checkpoint over the weights of a whole model, whose config.json it would replace.

    Raises:
        ValueError: `directory` holds such weights.
    """
    for name in _WHOLE_MODEL:
        if (Path(directory) / name).is_file():
            raise ValueError(
                f"{option} {directory} holds a whole model ({name}), whose config.json would be overwritten: choose "
                "another folder."
            )


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:  # hard links, and file systems that ignore the case of names
        return one.exists() and os.path.samefile(one, other)
    except OSError:
        return False


def _message(option: str, output: Any, relation: str, name: str, given: Any) -> str:
    where = "" if str(output) == str(given) else f" {given}"
    return (
        f"{option} {output} {relation} {name}{where}: what is written there would overwrite or mix with an input. "
        "Choose another place."
    )
