"""The caches of the server: images by `cache://ID`, search, and what adds and takes out.

Shapes: k summary tokens, D hidden size.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bottleneck import embed
from ..cache import search as finder
from ..cache.compressor import OVERFLOW, encoded
from ..cache.format import FILES, DamagedCache, one_of
from ..cache.legacy import OldCache
from ..cache.reader import SummaryCache
from ..cache.rows import summary_rows
from ..cache.tables import EXIF, OK, SYSTEM
from .errors import APIError, invalid

ROOT = "upload://images"  # the folder, as it were, of images that came over HTTP
SHOWN = (
    "width",
    "height",
    "bytes",
    "added",
    *EXIF,
)  # in responses; the path on the server is not


@dataclass
class Stored:
    """An image of a cache."""

    cache: str
    row: dict[str, Any]

    def about(self) -> dict[str, Any]:
        own = [name for name in self.row if name not in (*SYSTEM, "score", "copies")]  # columns of the user's
        values = {name: self.row.get(name) for name in (*SHOWN, *own)}
        shown = {
            name: value if isinstance(value, (int, float, str)) else str(value)
            for name, value in values.items()
            if value is not None
        }
        return {"id": self.row["id"], "object": "image", "cache": self.cache, "sha256": self.row["sha256"], **shown}


class Caches:
    """Caches by their names, which are those of their folders.

    Args:
        paths: of caches that are there; with `settings` those that are not are made.
        fingerprint: of the model; a cache of another is refused.
        quantised: "4bit", "8bit" or "": the model; to a cache that was filled otherwise nothing is added.

    Raises:
        ValueError, OSError: a cache is not there, damaged or of another model; two have one name.
    """

    def __init__(self, paths: Sequence[str], fingerprint: str, settings: Any = None, quantised: str = "") -> None:
        self.quantised, self._caches = quantised, {}
        for path in paths:
            name = Path(path.rstrip("/")).name
            if name in self._caches:
                raise ValueError(f"Two caches are called {name}: rename one, as requests name caches by it.")
            if settings is not None and not Path(path).exists():
                self._caches[name] = SummaryCache.create(path, settings)
            else:
                self._caches[name] = SummaryCache.open(path, fingerprint)
            if isinstance(self._caches[name], OldCache):
                raise ValueError(f"{path} is of an earlier format: run `fwd2bot cache migrate {path}` first.")
        # a filter is kept in the cache between two steps of a search, so that one search at a time may run in each
        self._searching = {name: threading.Lock() for name in self._caches}
        self._adding = {name: threading.Lock() for name in self._caches}

    def __bool__(self) -> bool:
        return bool(self._caches)

    @property
    def names(self) -> list[str]:
        return list(self._caches)

    def counts(self) -> dict[str, int]:
        """Images of each cache; whatever cannot be read raises."""
        return {name: len(cache) for name, cache in self._caches.items()}

    def named(self, name: str | None) -> tuple[str, SummaryCache]:
        """The cache of a request that names it, or the first."""
        if not self._caches:
            raise APIError(404, "This server has no cache: start it with --cache PATH.", "no_cache", "cache")
        if name is None:
            return next(iter(self._caches.items()))
        if name not in self._caches:
            raise APIError(
                404, f"There is no cache {name!r}; there are {', '.join(self._caches)}.", "cache_not_found", "cache"
            )
        return name, self._caches[name]

    # ------------------------------------------------------------------ reading
    def find(self, wanted: str, param: str, name: str | None = None) -> Stored:
        """The image that `ID`, or `CACHE/ID`, stands for.

        Raises:
            APIError: 404 where there is none; 409 where it stands for several.
        """
        self.named(name)
        places = [(name, wanted)] if name else [(own, wanted) for own in self._caches]
        first, _, rest = wanted.partition("/")
        if not name and first in self._caches and rest:
            places.append((first, rest))
        found = []
        for own, text in places:
            # looked for first: to name the likeliest ids, `named` reads all
            if not self._caches[own].rows(FILES, ["source"], f"{_named(text)} AND status = '{OK}'").num_rows:
                continue
            try:
                found.append(Stored(own, self._caches[own].named([text])[0]))
            except DamagedCache:
                raise
            except ValueError as error:  # several files of one id
                raise APIError(409, f"{text} stands for several images of {own}.", "ambiguous_id", param) from error
        if not found:
            names = ", ".join(dict.fromkeys(own for own, _ in places))
            raise APIError(404, f"There is no image {wanted[:200]!r} in {names}.", "image_not_found", param)
        if len({image.row["sha256"] for image in found}) > 1:
            choices = ", ".join(f"cache://{image.cache}/{image.row['id']}" for image in found)
            raise APIError(409, f"{wanted} is in several caches: say {choices}.", "ambiguous_id", param)
        return found[0]

    def summary(self, image: Stored, k: int | None, param: str) -> Tensor:
        """[k, D] float32, all that is stored where k is None."""
        cache = self._caches[image.cache]
        most = cache.settings.k
        if k is not None and k > most:
            raise invalid(f"{image.cache} holds {most} summary tokens of an image, but k = {k}.", "k", "k_too_large")
        found = cache.read([image.row["sha256"]], k or most)
        if image.row["sha256"] not in found:
            raise cache.damaged([image.row["id"]])
        return found[image.row["sha256"]]

    def k(self, name: str) -> int:
        return self._caches[name].settings.k

    def search(self, name: str, query: Tensor, top: int, where: str | None) -> list[tuple[Stored, float]]:
        """The images nearest to a summary [k, D] of the cache's k, copies once."""
        cache = self._caches[name]
        columns = ["sha256", "source", *SHOWN, *cache.users_columns]
        with self._searching[name]:
            try:
                hits = finder.search(cache, query, top + 20, where, None, columns)
            except DamagedCache:
                raise
            except ValueError as error:
                raise invalid(str(error), "filter", "invalid_filter") from error
        return [(Stored(name, hit), hit["score"]) for hit in finder.distinct(hits)[:top]]

    # ------------------------------------------------------------------ writing
    def writable(self, name: str | None) -> tuple[str, SummaryCache]:
        name, cache = self.named(name)
        if cache.settings.quantised != self.quantised:
            theirs, ours = (value or "not quantised" for value in (cache.settings.quantised, self.quantised))
            reason = f"{name} was filled by a model that was {theirs}, and this one is {ours}"
            raise APIError(409, f"{reason}: its images are not mixed with others.", "cache_read_only", "cache")
        return name, cache

    def known(self, name: str, data: bytes) -> tuple[str, tuple[int, int] | None]:
        """The SHA-256 of an image's bytes, and its size where its summary is stored already."""
        key = hashlib.sha256(data).hexdigest()
        return key, self._caches[name].has([key]).get(key)

    def add(
        self,
        name: str,
        image_id: str,
        data: bytes,
        key: str,
        size: tuple[int, int],
        exif: dict[str, Any],
        summary: Tensor | None,
        pooling: str,
    ) -> tuple[Stored, bool]:
        """Stores an image, in one commit.

        Args:
            summary: [k, D]; None where one of the same content is stored.

        Returns:
            the image, and whether its id is new.

        Raises:
            APIError: the id belongs to a file of the cache's own; the codec cannot keep the summary.
        """
        cache, source = self._caches[name], f"{ROOT}/{image_id}"
        rows = None
        if summary is not None:
            kept = summary[None, : cache.settings.k]
            tokens, vectors, good = encoded(cache.codec, kept, embed(kept, pooling))
            if not good[0]:
                reason = OVERFLOW.format(codec=cache.codec.name)
                raise APIError(422, f"The image cannot be stored: {reason}.", "overflow", "image")
            rows = summary_rows(cache.settings, [key], [size], tokens, vectors)
        about = {"source": source, "id": image_id, "root": ROOT, "sha256": key, "bytes": len(data)}
        about |= {"modified": time.time_ns(), "width": size[0], "height": size[1], **exif}
        with self._adding[name]:
            others = [row for row in self._of_id(cache, image_id) if row["source"] != source]
            if others:
                raise APIError(409, f"{name} has a file of the id {image_id}: choose another id.", "id_taken", "id")
            new = not cache.files_of([source])
            cache.commit(rows, [about], what="serve")
        return Stored(name, cache.files_of([source])[0]), new

    def _of_id(self, cache: SummaryCache, image_id: str) -> list[dict[str, Any]]:
        return cache.rows(FILES, ["source"], one_of("id", [image_id])).to_pylist()

    def delete(self, wanted: str, name: str | None) -> Stored:
        """Takes an image out of its cache; the file, where it has one, stays where it is."""
        image = self.find(wanted, "id", name)
        _, cache = self.writable(image.cache)
        with self._adding[image.cache]:
            cache.forget([image.row["source"]], "serve rm")
        return image


def _named(text: str) -> str:
    return f"({one_of('id', [text])} OR {one_of('source', [text])})"


def pooled(summary: Tensor, pooling: str) -> Tensor:
    """The unit vector [D] of a summary [k, D]."""
    return embed(torch.as_tensor(summary)[None], pooling)[0]
