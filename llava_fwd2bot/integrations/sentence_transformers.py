"""Checkpoints for sentence-transformers (6 and later).

    from llava_fwd2bot import register
    register()                                     # lets transformers know the model classes
    model = SentenceTransformer("my-fwd2bot")
    model.similarity(model.encode("a dog on a beach"), model.encode(images))

`save_pretrained` writes the two files that this takes. A checkpoint of an earlier version gets them by
`write_sentence_transformers`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoint.embedding_files import embedding_files
from ..checkpoint.load import ORIGINAL
from ..checkpoint.read import read_checkpoint
from ..files.outputs import refuse_overlap
from ..files.writing import write_folder, write_json
from ..hosts.opening import local_folder


def write_sentence_transformers(checkpoint: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Makes a checkpoint one that `SentenceTransformer` opens; gives its folder.

    Args:
        checkpoint: its folder, its name on the hub, or "smol-llava".
        output: a new folder for a copy with the two files; default: they are written into `checkpoint`.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, or it is damaged; it is in the original LLaVA's layout,
            which transformers' Auto classes do not open; `output` is there already or lies in the checkpoint.
    """
    source = local_folder(checkpoint, {})
    kind = read_checkpoint(source)["base"]["fingerprint"]["class"]
    if kind in ORIGINAL.values():
        raise ValueError(
            f"{source} is in the layout of the original LLaVA, which sentence-transformers cannot open. Convert it "
            "first: fwd2bot convert CKPT --base BASE --output DIR."
        )
    if output is None:
        for name, content in embedding_files().items():
            write_json(source / name, content)
        return source
    output = Path(output)
    refuse_overlap("write_sentence_transformers:", output, models={"the checkpoint": str(source)})
    if output.exists():
        raise ValueError(f"{output} is there already: name a new folder.")
    with write_folder(output) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        for name, content in embedding_files().items():
            write_json(temporary / name, content)
    return output
