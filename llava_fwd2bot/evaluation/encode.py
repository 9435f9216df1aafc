"""Summaries of many images and texts, written to files as they are made, so that a stopped run resumes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..cache.compressor import READERS
from ..cache.summary_file import write_tensors
from ..files.images import read_image
from ..files.records import parse_records
from ..files.regular import file_digest
from ..processing.images import join_pixels, prepare_pixels, prepared_size, processor_digest

CHUNK = 256  # items in one file


def resumable_lines(
    file: Path, begins: str = "{", check: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """The records of a file of JSON lines that is to be continued; an incomplete last line is removed from it.

    Args:
        begins: the first characters of every line that this package writes. check: raises ValueError for a record of
            another run.

    Raises:
        ValueError: the file was not written by this package; it is not changed.
    """
    there = file.read_bytes() if file.is_file() else b""
    content = there.rstrip(b"\0")  # after a power cut a file may end in NUL bytes
    end = content.rfind(b"\n") + 1
    tail, start = content[end:], begins.encode()
    records = parse_records(content[:end], file, lines=True) if end else []
    whole = True
    if tail:
        try:
            records += parse_records(tail, file, lines=True)
        except ValueError:
            whole = False
    if not whole and tail[: len(start)] != start[: len(tail)]:
        raise ValueError(f"{file} holds something else and was not changed: choose another file.")
    for record in records if check is not None else ():
        check(record)
    if tail or len(content) < len(there):
        with file.open("r+b") as kept:
            kept.truncate(len(content) if whole else end)
            kept.seek(0, os.SEEK_END)
            kept.write(b"\n" if tail and whole else b"")
            os.fsync(kept.fileno())
    return records


def _read(file: Path) -> Tensor:
    try:
        return load_file(file)["summary"]
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and it will be made again.") from error


def _finite(summaries: Tensor, kind: str, at: int, items: Sequence[Any]) -> Tensor:
    """`summaries` [C, k, D] of the items from `at` on; every comparison with NaN is false, and would count as a miss.

    Raises:
        ValueError: one is not finite in float16, as it is kept.
    """
    wrong = (~summaries.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if wrong:
        first = str(items[at + wrong[0]])
        raise ValueError(
            f"{len(wrong)} of {len(summaries)} summaries of {kind} hold NaN or overflow float16, the first that of "
            f"{first[:200]!r}: the checkpoint is damaged or its training diverged. Try --dtype float32."
        )
    return summaries


def _settings(config: Any) -> Any:
    """A model's configuration without its source, library versions and dtype."""
    if not isinstance(config, dict):
        return config
    other = ("transformers_version", "dtype", "torch_dtype")
    kept = {str(k): _settings(v) for k, v in config.items() if str(k)[:1] != "_" and k not in other}
    return dict(sorted(kept.items()))


class Encoder:
    """Summaries [N, k, D] of a Fwd2Bot model in float16, cached below `work` in files named by their inputs' hash.

    Args:
        fingerprint: of the checkpoint. Files of another checkpoint, image processor, tokenizer or configuration are not
            used.
    """

    def __init__(
        self, model: nn.Module, processor: Any, fingerprint: str, work: Path | None = None, batch_size: int = 16
    ) -> None:
        self.model, self.processor, self.work, self.batch_size = model.eval(), processor, work, batch_size
        self.fingerprint = fingerprint
        self.like = model.get_input_embeddings().weight
        self.made_by = hashlib.sha256(f"{_settings(model.config.to_dict())} {processor_digest(processor)}".encode())
        self.made_by = self.made_by.hexdigest()[:16]
        self._prepared = prepared_size(processor)
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}

    def images(self, paths: Sequence[Path]) -> Tensor:
        """[N, k, D]; the images of a batch are read while the previous batch is compressed."""

        def prepare(part: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
            read = [read_image(path, prepared=self._prepared, digest=True) for path in part]
            pixels = [prepare_pixels(self.processor, self.model, [image]) for image, _ in read]
            return join_pixels(pixels, self.like), [digest for _, digest in read]

        return self._cached("images", paths, self.digests, prepare, lambda pixels: self.model.compress(**pixels))

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """The SHA-256 of each file; a file that has not changed since the last call is not read again."""

        def one(path: Path) -> str:
            about = path.stat()
            state = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev)
            if self._digests.get(path, (None,))[0] != state:
                self._digests[path] = (state, file_digest(path))
            return self._digests[path][1]

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(one, paths))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, k, D]; texts of similar length share a batch."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        tokenizer = self.processor.tokenizer

        def prepare(part: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
            options = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
            rows = tokenizer(list(part), **options)  # on either side: the compress pass follows the mask
            return {name: rows[name].to(self.like.device) for name in ("input_ids", "attention_mask")}, list(part)

        sorted_texts = [texts[i] for i in order]
        found = self._cached("texts", sorted_texts, list, prepare, lambda ids: self.model.compress_text(**ids))
        return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)

    @torch.inference_mode()
    def _cached(self, kind: str, items: Sequence[Any], names_of: Callable, prepare: Callable, run: Callable) -> Tensor:
        """`run`'s output for the items, from files where they exist.

        Args:
            names_of: the items' content hashes, which name the files. prepare: gives a batch and the hashes of what was
                read, so that a file replaced during the run is stored under its old content.
        """
        parts = []
        with tqdm(total=len(items), unit=kind[:-1], desc=f"compress {kind}") as bar, ThreadPoolExecutor(1) as prefetch:
            for at in range(0, len(items), CHUNK):
                chunk = items[at : at + CHUNK]
                file = self.file(kind, names_of(chunk)) if self.work is not None else None
                if file is not None and file.is_file():
                    parts.append(_finite(_read(file), kind, at, items))
                else:
                    batches = [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
                    found, names, waiting = [], [], prefetch.submit(prepare, batches[0])
                    for following in [*batches[1:], None]:
                        ready, read = waiting.result()
                        names += read
                        waiting = prefetch.submit(prepare, following) if following is not None else None
                        found.append(run(ready).to("cpu", torch.float16))
                    parts.append(_finite(torch.cat(found), kind, at, items))
                    if (file := self.file(kind, names)) is not None:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_tensors({"summary": parts[-1]}, file)
                bar.update(len(chunk))
        return torch.cat(parts)

    def file(self, kind: str, names: Sequence[str], ending: str = "safetensors") -> Path | None:
        """The file for these items in this order, by this model."""
        if self.work is None:
            return None
        identity = "\n".join([self.fingerprint, self.made_by, kind, str(self.like.dtype), *names])
        return self.work / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.{ending}"
