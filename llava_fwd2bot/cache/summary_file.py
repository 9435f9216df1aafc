"""Summaries of many images in one safetensors file, and back.

Tensors: "summary" [N, k, D] in the dtype asked for, "embedding" [N, D] float32 of unit length. Metadata: ids and
skipped images as JSON lists, k, the fingerprint of the checkpoint, the version. All is held in memory until written.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files.folders import find_images as find_images  # where others know it
from ..files.pixels import OWN, Reading
from ..files.writing import as_other_files, temporary_path
from ..version import __version__
from .compressor import Compressor
from .decode import read_file
from .naming import fingerprint_of as fingerprint_of  # where others know it
from .naming import unknown_id


def check_output(output: str | os.PathLike, overwrite: bool) -> Path:
    """`output`, once it is known that it can be written; its folder is made.

    Raises:
        OSError: it exists (and `overwrite` is False), is a folder, or its folder cannot be written.
    """
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, "--output is a folder: name a file", str(output))
    if output.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, "--output exists: choose another name, or pass --overwrite", str(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary_path(output).touch()
        temporary_path(output).unlink()
    except OSError as error:
        reason = f"--output cannot be written ({error.strerror}): choose another place"
        raise OSError(error.errno, reason, str(output)) from error
    return output


def compress_images(
    model: nn.Module,
    processor: Any,
    images: dict[str, Path],
    output: Path,
    *,
    fingerprint: str,
    skipped: Sequence[dict[str, str]] = (),
    num_tokens: int | None = None,
    batch_size: int = 8,
    max_pixels: int | None = None,
    store_dtype: str = "float16",
    reading: Reading = OWN,
) -> dict[str, Any]:
    """Compresses `images` and writes `output`; images that cannot be read are named on stderr, recorded, and left out.

    Args:
        reading: how the files become pictures; the file says it.

    Raises:
        ValueError: not one image could be read; nothing is written.
        OSError: the file could not be written; what was there before is unchanged.
    """
    from .entries import Entry
    from .pipeline import run_stages
    from .signals import stopping

    started = time.perf_counter()
    compressor = Compressor(model, processor, num_tokens, batch_size, max_pixels, reading)
    k, size = compressor.k, compressor.words.shape[1]
    entries = [Entry("", name, read=partial(_read, path), label=str(path)) for name, path in images.items()]
    with stopping() as stop, tqdm(total=len(images), unit="image", desc="compress", file=sys.stderr) as bar:
        sink = FileSink(len(images), k, size, getattr(torch, store_dtype), list(skipped), bar)
        run_stages([(None, entries)], sink, compressor, known=lambda keys: {}, stop=stop)
        stop.raise_if_set()
    ids, skipped, summaries, embeddings = sink.ids, sink.skipped, sink.summaries, sink.embeddings
    place = {name: at for at, name in enumerate(images)}
    order = sorted(range(len(ids)), key=lambda i: place[ids[i]])
    if order != list(range(len(ids))):  # copies of an image come when it does
        ids = [ids[i] for i in order]
        summaries, embeddings = summaries[order], embeddings[order]
    if not ids:
        raise ValueError(f"None of the {len(images)} image(s) could be used. The first: {skipped[0]['reason']}")
    write_summaries(summaries[: len(ids)], embeddings[: len(ids)], output, ids, skipped, fingerprint, reading)
    return {
        "output": str(output),
        "images": len(ids),
        "skipped": skipped,
        "k": k,
        "dim": size,
        "dtype": store_dtype,
        **reading.as_settings(),
        "bytes": output.stat().st_size,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _read(path: Path) -> bytes:
    try:
        return read_file(str(path))
    except FileNotFoundError as error:
        message = f"{path}: no such file; check the name and the folder it is looked for in"
        raise ValueError(message) from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: is a folder, not a picture; name a file in it") from error


class FileSink:
    """Finished images in memory, in their order, for one file; see sink.CacheSink."""

    keys: frozenset[str] = frozenset()
    due = False
    overflow = "its summary overflows; try --dtype or --store-dtype bfloat16"

    def __init__(self, count: int, k: int, size: int, dtype: torch.dtype, skipped: list[dict[str, str]], bar: tqdm):
        self.summaries = torch.empty(count, k, size, dtype=dtype)  # [N, k, D]
        self.embeddings = torch.empty(count, size)  # [N, D]
        self.ids: list[str] = []
        self.skipped, self.bar, self._place = skipped, bar, dict[str, int]()
        for entry in skipped:
            bar.write(f"fwd2bot: skipped {entry['reason']}", file=sys.stderr)

    def encode(self, summary: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
        kept = summary.to("cpu", self.summaries.dtype)
        return kept, vectors.float().cpu(), torch.isfinite(kept).flatten(1).all(1).tolist()

    def made(self, entry: Any, key: str, size: tuple[int, int], exif: dict[str, Any], tokens: Tensor, vector: Tensor):
        self._place[key] = len(self.ids)
        self._add(entry, tokens, vector)

    def link(self, entry: Any, key: str, size: tuple[int, int], exif: dict[str, Any]) -> None:
        """The same content under another name."""
        place = self._place[key]
        self._add(entry, self.summaries[place], self.embeddings[place])

    def _add(self, entry: Any, tokens: Tensor, vector: Tensor) -> None:
        self.summaries[len(self.ids)], self.embeddings[len(self.ids)] = tokens, vector
        self.ids.append(entry.id)
        self.bar.update()

    def size_of(self, key: str) -> tuple[int, int]:
        return 0, 0

    def skip(self, entry: Any, reason: str, broken: bool) -> None:
        self.skipped.append({"id": entry.id, "reason": reason})
        self.bar.write(f"fwd2bot: skipped {reason}", file=sys.stderr)
        self.bar.update()

    def flush(self) -> None:
        """Nothing is stored before the end."""


def write_summaries(
    summary: Tensor,
    embedding: Tensor,
    output: Path,
    ids: list[str],
    skipped: list[dict[str, str]],
    fingerprint: str,
    reading: Reading,
) -> None:
    """The file that SummaryFile reads: `summary` [N, k, D], `embedding` [N, D]."""
    metadata = {
        "ids": json.dumps(ids),
        "skipped": json.dumps(skipped),
        "k": str(summary.shape[1]),
        "fingerprint": fingerprint,
        "version": __version__,
        **reading.as_settings(),
    }
    write_tensors({"summary": summary, "embedding": embedding}, output, metadata)


def write_tensors(tensors: dict[str, Tensor], output: Path, metadata: dict[str, str] | None = None) -> None:
    """Beside `output`, then renamed: a full disk leaves what was there before."""
    try:
        save_file(tensors, temporary_path(output), metadata=metadata)
        as_other_files(temporary_path(output))
        os.replace(temporary_path(output), output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        code = getattr(error, "errno", None) or errno.EIO
        raise OSError(code, f"The summaries could not be written ({reason})", str(output)) from error
    finally:
        temporary_path(output).unlink(missing_ok=True)


class SummaryFile:
    """A file of `fwd2bot compress`; only the rows that are asked for are read.

    Raises:
        FileNotFoundError, ValueError: no such file, not one of `fwd2bot compress`, or of another model.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "--summaries names a folder (a cache is named by --cache)", str(path))
        if not self.path.is_file():
            raise FileNotFoundError(errno.ENOENT, "There is no such file of summaries", str(path))
        with self._open() as file:
            meta = file.metadata() or {}
        if not {"ids", "skipped", "k", "fingerprint"} <= meta.keys():
            raise ValueError(f"{path} holds no summaries: it was not written by `fwd2bot compress`.")
        if meta["fingerprint"] != fingerprint:
            raise ValueError(
                f"{path} was written with another model: summaries are read only by the model that made them. "
                "Name that one by --model, or compress the images again."
            )
        self.k, self.skipped = int(meta["k"]), json.loads(meta["skipped"])
        self.exif_orientation = meta.get("exif_orientation", "off")  # files that do not say it were made without
        self.place = {name: at for at, name in enumerate(json.loads(meta["ids"]))}

    def row(self, name: str) -> int:
        """Where the summary of image `name` is; ValueError if it is not."""
        if name not in self.place:
            raise ValueError(unknown_id(self.path, name, list(self.place), self.skipped))
        return self.place[name]

    def read(self, rows: Sequence[int], k: int | None = None) -> Tensor:
        """The first k tokens of those rows, [M, k, D]; all stored tokens where k is None."""
        if k is not None and not 1 <= k <= self.k:
            raise ValueError(f"{self.path} holds {self.k} tokens per image, but --k asks for {k}.")
        with self._open() as file:
            stored = file.get_slice("summary")
            return torch.cat([stored[row : row + 1] for row in rows])[:, :k]

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except SafetensorError as error:
            reason = f"{self.path} cannot be read as safetensors ({error}): compress the images again."
            raise ValueError(reason) from error


def read_summaries(path: str | os.PathLike, ids: Sequence[str], fingerprint: str, k: int | None = None) -> Tensor:
    """The stored summaries of `ids`, [M, k, D]; errors as of SummaryFile."""
    file = SummaryFile(path, fingerprint)
    rows = [file.row(name) for name in ids]
    return file.read(rows, k)
