"""Summaries of many images and texts, kept in files by content as they are made, so that a stopped run resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..cache.codecs import Codec
from ..cache.compressor import READERS
from ..cache.summary_file import write_tensors
from ..files.images import read_image
from ..files.regular import file_digest
from ..processing.images import join_pixels, prepare_pixels, prepared_size, processor_digest

DECODED = 64  # images that a codec decodes at once


def read_tensor(file: Path | None) -> Tensor | None:
    """The summary or scores in `file`; None where there is no such file. ValueError: the file is damaged."""
    if file is None or not file.is_file():
        return None
    try:
        return load_file(file)["summary"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and it will be made again.") from error


def write_tensor(kept: Tensor, file: Path | None) -> None:
    """Keeps a summary or scores in `file`; with None nothing is kept."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors({"summary": kept}, file)


def _check_finite(summaries: Tensor, kind: str, items: Sequence[Any]) -> None:
    """Of summaries [N, k, D] of `items`; every comparison with NaN is false, and would count as a miss.

    Raises:
        ValueError: one is not finite in float16, as it is kept.
    """
    wrong = (~summaries.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if wrong:
        first = str(items[wrong[0]])
        raise ValueError(
            f"{len(wrong)} of {len(summaries)} summaries of {kind} hold NaN or overflow float16, the first that of "
            f"{first[:200]!r}: the checkpoint is damaged or its training diverged. Try --dtype float32."
        )


def _settings(config: Any) -> Any:
    """A model's configuration without its source, library versions and dtype."""
    if not isinstance(config, dict):
        return config
    other = ("transformers_version", "dtype", "torch_dtype")
    kept = {str(k): _settings(v) for k, v in config.items() if str(k)[:1] != "_" and k not in other}
    return dict(sorted(kept.items()))


def _ahead(function: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
    """`function` of each part; that of the next part is computed in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for part in parts:
            last, waiting = waiting, pool.submit(function, part)
            if last is not None:
                yield last.result()
        if waiting is not None:
            yield waiting.result()


def _pixels_digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


class Encoder:
    """Summaries [N, k, D] of a Fwd2Bot model in float16, each kept below `work` in a file named by its input's hash.

    Args:
        fingerprint: of the checkpoint. Files of another checkpoint, image processor, tokenizer or configuration are not
            used.
        codec: of a cache: summaries of images are those that a cache of this codec gives back, in float32. Texts are
            queries, which a cache does not keep.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        fingerprint: str,
        work: Path | None = None,
        batch_size: int = 16,
        codec: Codec | None = None,
    ) -> None:
        self.model, self.processor, self.work, self.batch_size = model.eval(), processor, work, batch_size
        self.fingerprint, self.codec = fingerprint, codec
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

        found = self._kept("images", paths, self.digests(paths), prepare, lambda pixels: self.model.compress(**pixels))
        if self.codec is None:
            return found
        return torch.cat([self.codec.decode(self.codec.encode(x), x.shape[2]) for x in found.split(DECODED)])

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """[M, k, D] of images that are open already, kept by their pixels; without a progress bar."""
        named = [(image, _pixels_digest(image)) for image in images]

        def prepare(part: Sequence[tuple[Image.Image, str]]) -> tuple[dict[str, Any], list[str]]:
            pixels = [prepare_pixels(self.processor, self.model, [image]) for image, _ in part]
            return join_pixels(pixels, self.like), [name for _, name in part]

        names = [name for _, name in named]
        return self._kept("pixels", named, names, prepare, lambda pixels: self.model.compress(**pixels))

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

        def prepare(part: Sequence[str]) -> tuple[dict[str, Tensor], Sequence[str]]:
            options = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
            rows = tokenizer(list(part), **options)  # on either side: the compress pass follows the mask
            return {name: rows[name].to(self.like.device) for name in ("input_ids", "attention_mask")}, part

        sorted_texts = [texts[i] for i in order]
        found = self._kept("texts", sorted_texts, sorted_texts, prepare, lambda ids: self.model.compress_text(**ids))
        return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)

    @torch.inference_mode()
    def _kept(self, kind: str, items: Sequence[Any], names: Sequence[str], prepare: Callable, run: Callable) -> Tensor:
        """`run`'s output for the items, from files where they exist.

        The batches are those of a run without files, because in low precision a summary can depend on its batch; a
        batch that is partly kept is made again.

        Args:
            names: the items' contents, which name the files. prepare: gives a batch and the contents of what was read,
                so that a file replaced during the run is kept under its old content.
        """
        found = [read_tensor(self.file(kind, [name])) for name in names]
        batches = [range(len(items))[at : at + self.batch_size] for at in range(0, len(items), self.batch_size)]
        batches = [batch for batch in batches if any(found[i] is None for i in batch)]
        prepared = _ahead(prepare, [[items[i] for i in batch] for batch in batches])
        with tqdm(total=len(items), unit=kind[:-1], desc=f"compress {kind}", disable=kind == "pixels") as bar:
            bar.update(len(items) - sum(map(len, batches)))
            for batch, (ready, contents) in zip(batches, prepared, strict=True):
                summaries = run(ready).to("cpu", torch.float16)
                _check_finite(summaries, kind, [items[i] for i in batch])
                for i, content, summary in zip(batch, contents, summaries, strict=True):
                    found[i] = summary
                    write_tensor(summary, self.file(kind, [content]))
                bar.update(len(batch))
        return torch.stack(found)

    def file(self, kind: str, contents: Sequence[str]) -> Path | None:
        """The file for what this model makes of `contents` in this order; None without `work`."""
        if self.work is None:
            return None
        identity = "\n".join([self.fingerprint, self.made_by, kind, str(self.like.dtype), *contents])
        return self.work / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"
