"""Summaries of many images and texts, kept as they are made: a run that is stopped goes on where it was."""

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


def whole_lines(
    file: Path, begins: str = "{", ours: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """The records of a file of JSON lines that is gone on with; a last line that was cut off is taken away.

    Args:
        begins: how each of our lines begins. ours: raises ValueError at a record that was not written here.

    Raises:
        ValueError: it is not such a file, and is left as it is.
    """
    there = file.read_bytes() if file.is_file() else b""
    content = there.rstrip(b"\0")  # a power cut may leave a file its length without what was in it
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
        raise ValueError(f"{file} is a file of something else, and was left as it is: name another one.")
    for record in records if ours is not None else ():
        ours(record)
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
        raise ValueError(f"{file} is damaged ({error}): remove it, and it is made again.") from error


def _settings(config: Any) -> Any:
    """A model's configuration without what says where it came from and how it runs."""
    if not isinstance(config, dict):
        return config
    other = ("transformers_version", "dtype", "torch_dtype")
    kept = {str(k): _settings(v) for k, v in config.items() if str(k)[:1] != "_" and k not in other}
    return dict(sorted(kept.items()))


class Encoder:
    """A Fwd2Bot model's summaries [N, k, D] in float16, in files below `work`, each known by what it was made of.

    Args:
        fingerprint: of the checkpoint; what another one left in `work` is not taken, nor what was made with another
            image processor, tokenizer or configuration.
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
        """[N, k, D]; the images of a batch are read while the one before is compressed."""

        def prepare(part: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
            read = [read_image(path, prepared=self._prepared, digest=True) for path in part]
            pixels = [prepare_pixels(self.processor, self.model, [image]) for image, _ in read]
            return join_pixels(pixels, self.like), [digest for _, digest in read]

        return self._kept("images", paths, self.digests, prepare, lambda pixels: self.model.compress(**pixels))

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """The SHA-256 of each file; one that is unchanged since it was asked for last is not read again."""

        def one(path: Path) -> str:
            about = path.stat()
            state = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev)
            if self._digests.get(path, (None,))[0] != state:
                self._digests[path] = (state, file_digest(path))
            return self._digests[path][1]

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(one, paths))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, k, D]; texts of like length go together."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        tokenizer = self.processor.tokenizer

        def prepare(part: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
            options = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
            rows = tokenizer(list(part), **options)  # on either side: the pass goes by the mask
            return {name: rows[name].to(self.like.device) for name in ("input_ids", "attention_mask")}, list(part)

        sorted_texts = [texts[i] for i in order]
        found = self._kept("texts", sorted_texts, list, prepare, lambda ids: self.model.compress_text(**ids))
        return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)

    @torch.inference_mode()
    def _kept(self, kind: str, items: Sequence[Any], names_of: Callable, prepare: Callable, run: Callable) -> Tensor:
        """What `run` makes of the items, or has made of them before.

        Args:
            names_of: the items' contents, by which what is kept is known. prepare: a batch, and its contents as they
                were read: a file that is replaced meanwhile is kept as what it was.
        """
        parts = []
        with tqdm(total=len(items), unit=kind[:-1], desc=f"compress {kind}") as bar, ThreadPoolExecutor(1) as ahead:
            for at in range(0, len(items), CHUNK):
                chunk = items[at : at + CHUNK]
                file = self.file(kind, names_of(chunk)) if self.work is not None else None
                if file is not None and file.is_file():
                    parts.append(_read(file))
                else:
                    batches = [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
                    found, names, waiting = [], [], ahead.submit(prepare, batches[0])
                    for following in [*batches[1:], None]:
                        ready, read = waiting.result()
                        names += read
                        waiting = ahead.submit(prepare, following) if following is not None else None
                        found.append(run(ready).to("cpu", torch.float16))
                    parts.append(torch.cat(found))
                    if (file := self.file(kind, names)) is not None:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_tensors({"summary": parts[-1]}, file)
                bar.update(len(chunk))
        return torch.cat(parts)

    def file(self, kind: str, names: Sequence[str], ending: str = "safetensors") -> Path | None:
        """Named by what is in it, so that other items, another model or another order are another file."""
        if self.work is None:
            return None
        told = "\n".join([self.fingerprint, self.made_by, kind, str(self.like.dtype), *names])
        return self.work / f"{kind}-{hashlib.sha256(told.encode()).hexdigest()[:24]}.{ending}"
