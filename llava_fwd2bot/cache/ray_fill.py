"""`fwd2bot compress --cache --ray`: the pipeline's stages as those of Ray Data, on one machine or a cluster.

    plan (one task) → read, hash, decode (CPU tasks) → compress, encode (one actor per GPU) → sink (the driver)

The plan streams: neither it nor the driver holds a list of the files. What comes to the driver are encoded rows, a few
kilobytes each, which it joins into one commit every few seconds. A row whose worker died and that Ray made again is
stored once, as rows are known by content. Files are named by paths that every node must see.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..checkpoint.load import ORIGINAL, load_for_inference, processor_source
from ..checkpoint.read import read_checkpoint
from ..extras import require
from ..hosts import host_class
from .codecs import get_codec
from .compressor import OVERFLOW, Compressor, encoded
from .decode import Preparer, read_content
from .entries import Entry
from .format import CacheSettings
from .plan import BLOCK, Filled, Plan, blocks_of
from .reader import SummaryCache
from .sink import CacheSink

# what became of an entry: to be read; compressed; its content is in the cache; it cannot be reached; it cannot be used
TODO, MADE, KNOWN, ABSENT, BAD = "todo", "made", "known", "absent", "bad"
READ_AT_ONCE = 32  # files of a task


@dataclass
class Row:
    """An entry between two stages; without an entry, counts of the plan."""

    entry: Entry | None
    state: str = TODO
    key: str = ""
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    exif: dict[str, Any] = field(default_factory=dict)
    data: bytes | None = None
    pixels: dict[str, Any] | None = None
    tokens: np.ndarray | None = None  # [k, B]
    vector: np.ndarray | None = None  # [D]
    counts: Filled | None = None


def planned(path: str, source: Iterable[Entry], retry: bool) -> Iterator[Row]:
    """The first stage: what must be read, and after each block what need not."""
    cache = SummaryCache.open(path)
    for block in blocks_of(source, BLOCK):
        counts = Filled()
        yield from map(Row, Plan(cache, retry, counts).todo(block))
        yield Row(None, counts=counts)


@lru_cache(maxsize=1)
def _opened(path: str) -> SummaryCache:
    return SummaryCache.open(path)


class Reader:
    """The second stage, of any number of tasks: files are read, hashed, looked up, and decoded where they are new."""

    def __init__(self, cache: str, path: Path, base: str | None, max_pixels: int | None) -> None:
        self.cache, self.path, self.base, self.max_pixels = cache, path, base, max_pixels
        self._prepare: Preparer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepare": None}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows: list[Row] = list(batch["row"])
        contents = {}
        for i, row in enumerate(rows):
            if row.entry is None:
                continue
            try:
                contents[i] = read_content(row.entry)
                row.key = contents[i].key
            except OSError as error:
                row.state, row.reason = ABSENT, f"{row.entry.source}: {error.strerror or error}"
            except ValueError as error:
                row.state, row.reason = BAD, str(error)
        cache = _opened(self.cache)
        known = cache.has([content.key for content in contents.values()])
        for i, content in contents.items():
            row = rows[i]
            if content.key in known:
                row.state, row.size = KNOWN, known[content.key]
                continue
            if self.original:  # its processor is a part of the model: the worker prepares
                row.data = content.data
            else:
                prepare(self._preparer(cache.settings), content.data, row)
        return {"row": as_column(rows)}

    @property
    def original(self) -> bool:
        return read_checkpoint(self.path)["base"]["fingerprint"]["class"] in ORIGINAL.values()

    def _preparer(self, settings: CacheSettings) -> Preparer:
        if self._prepare is None:
            from transformers import AutoProcessor

            host = host_class(read_checkpoint(self.path)["base"]["fingerprint"]["class"])
            processor = AutoProcessor.from_pretrained(processor_source(self.path, self.base))
            self._prepare = Preparer(processor, host, self.max_pixels, settings.reading, settings.decoding == "fast")
        return self._prepare


def prepare(preparer: Preparer, data: bytes, row: Row) -> None:
    try:
        prepared = preparer(data, row.entry.source)
        row.pixels, row.size, row.exif = prepared.pixels, prepared.size, prepared.exif
    except (ValueError, OSError) as error:
        row.state, row.reason = BAD, str(error)


class Worker:
    """The third stage, an actor: the model compresses, and encodes."""

    def __init__(
        self,
        path: str,
        loading: dict[str, Any],
        settings: CacheSettings,
        batch_size: int,
        max_pixels: int | None = None,
    ) -> None:
        model, fast = load_for_inference(Path(path), **loading), settings.decoding == "fast"
        self.compressor = Compressor(*model, settings.k, batch_size, max_pixels, settings.reading, fast)
        self.codec = get_codec(settings.codec)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows: list[Row] = list(batch["row"])
        for row in rows:
            if row.data is not None:
                prepare(self.compressor.prepare, row.data, row)
                row.data = None
        todo = [row for row in rows if row.state == TODO and row.entry is not None]
        if todo:
            tokens, vectors, good = encoded(self.codec, *self.compressor([row.pixels for row in todo]))
            for i, row in enumerate(todo):
                row.pixels = None
                if good[i]:
                    row.state, row.tokens, row.vector = MADE, tokens[i], vectors[i]
                else:
                    row.state = BAD
                    row.reason = f"{row.entry.source}: {OVERFLOW.format(codec=self.codec.name)}"
        return {"row": as_column(rows)}


def as_column(rows: list[Row]) -> np.ndarray:
    column = np.empty(len(rows), object)
    column[:] = rows
    return column


def fill_by_ray(
    cache: SummaryCache,
    source: Iterable[Entry],
    path: Path,
    loading: dict[str, Any],
    *,
    batch_size: int = 8,
    max_pixels: int | None = None,
    retry: bool = False,
    actors: int | None = None,
    result: Filled | None = None,
    reader: type = Reader,
    worker: type = Worker,
) -> Filled:
    """Brings `cache` up to date with `source` by Ray; see `pipeline.fill`.

    Args:
        path: the checkpoint. loading: by keyword to `load_for_inference`.
        actors: default: one per GPU of the cluster, or one where there is none.
    """
    ray = require("ray", "ray", "--ray")
    require("ray.data", "ray", "--ray")
    started, result = time.perf_counter(), Filled() if result is None else result
    counts = Filled()
    if not any(Plan(cache, retry, counts).todo(block) for block in blocks_of(source, BLOCK)):  # no model is needed
        result.known += counts.known
        result.skipped += counts.skipped
        result.seconds += time.perf_counter() - started
        return result
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    where, settings = str(Path(cache.path).absolute()) if cache.local else cache.path, cache.settings
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.read_datasource(_datasource(lambda: planned(where, source, retry)), override_num_blocks=1)
    rows = rows.map_batches(reader(where, path, loading.get("base"), max_pixels), batch_size=READ_AT_ONCE)
    done = rows.map_batches(
        worker,
        fn_constructor_args=(str(path), loading, settings, batch_size, max_pixels),
        batch_size=batch_size,
        concurrency=actors or max(1, gpus),
        num_gpus=1 if gpus else 0,
    )
    with tqdm(unit="image", desc="compress", file=sys.stderr) as bar:
        sink = CacheSink(cache, result, bar)
        try:
            for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
                for row in batch["row"]:
                    _take(sink, row, result, bar)
                if sink.due:
                    sink.flush()
        finally:
            sink.flush()
    result.seconds += time.perf_counter() - started
    return result


def _take(sink: CacheSink, row: Row, result: Filled, bar: tqdm) -> None:
    if row.entry is None:
        result.known += row.counts.known
        result.skipped += row.counts.skipped
        bar.update(row.counts.known + len(row.counts.skipped))
    elif row.state == MADE:
        sink.made(row.entry, row.key, row.size, row.exif, row.tokens, row.vector)
    elif row.state == KNOWN:
        sink.link(row.entry, row.key, row.size, row.exif)
    else:
        sink.skip(row.entry, row.reason, row.state == BAD)


def _datasource(rows: Callable[[], Iterator[Row]]) -> Any:
    """A source of Ray's with one task, whose rows are taken as they come."""
    from itertools import islice

    import pandas as pd
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Planned(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **more: Any) -> list[ReadTask]:
            def read() -> Iterator[pd.DataFrame]:
                stream = rows()
                while some := list(islice(stream, 4 * READ_AT_ONCE)):
                    yield pd.DataFrame({"row": as_column(some)})

            about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read, about)]

    return Planned()
