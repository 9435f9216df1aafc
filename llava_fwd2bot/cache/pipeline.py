"""The one pipeline of `fwd2bot compress`: source → plan → read and decode → compress → sink, each a file of its own.

A thread walks the source, joins it with what is known, claims chunks, and has a pool of threads read and decode files;
the calling thread compresses batches and hands them to the sink. What is between them is bounded, in files and bytes.
The model is loaded once the first file is there that needs it.

`compress --output` runs it with a sink that writes one file; Ray (ray_fill.py) runs the same stages in processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .claims import Claims
from .entries import Entry
from .feeder import Feeder, Item
from .plan import Filled, Plan, blocks_of
from .pool import Pool, Stopped
from .reader import SummaryCache
from .signals import Stop, stopping
from .sink import CacheSink

if TYPE_CHECKING:
    from .compressor import Compressor

CHUNK = 64  # files of a claim, about
PATIENCE = 60.0  # seconds that a file may take to be read, or to be decoded
IDLE = 1.0  # seconds without a new image after which a batch that is not full is compressed


@dataclass
class Later:
    """A Compressor that is loaded when the first image needs it, and stays."""

    load: Callable[[], Compressor]
    batch_size: int = 8
    loaded: Compressor | None = None

    def __call__(self) -> Compressor:
        if self.loaded is None:
            self.loaded = self.load()
        return self.loaded


def fill(
    cache: SummaryCache,
    source: Iterable[Entry],
    compressor: Compressor | Later,
    *,
    retry: bool = False,
    chunk: int = CHUNK,
    workers: int | None = None,
    patience: float = PATIENCE,
    result: Filled | None = None,
) -> Filled:
    """Brings `cache` up to date with `source`; what is there and unchanged is not read.

    Args:
        compressor: loaded, or to be loaded once the first file is there that is new.
        retry: read files again that could not be used before and have not changed.
        chunk: entries of a claim, about.
        result: counts of earlier calls, to add to.
        workers: threads that read and decode; default: one per processor, without the one that runs the model.

    Raises:
        OSError: the cache cannot be written; what is committed stays.
        ValueError: the compressor reads files otherwise than the cache's were read.
        Interrupted: a signal came; what was finished is stored.
    """
    if not isinstance(compressor, Later) and compressor.prepare.reading != cache.settings.reading:
        raise ValueError(
            f"{cache.path} was made with {cache.settings.reading}, and the compressor reads with "
            f"{compressor.prepare.reading}: make it with reading=cache.settings.reading."
        )
    started, result = time.perf_counter(), Filled() if result is None else result
    claims = Claims(cache, chunk)
    with stopping() as stop, _bar(source) as bar:
        sink = CacheSink(cache, result, bar)
        try:
            run_stages(
                _chunks(cache, source, claims, retry, result, bar),
                sink,
                compressor,
                known=cache.has,
                stop=stop,
                workers=workers,
                patience=patience,
                done=lambda item: claims.give(item.claim),
            )
        finally:
            claims.close()
            result.seconds += time.perf_counter() - started
        stop.raise_if_set()
        if sink.commits > 1:
            sink.tidy.finish()
    return result


def _bar(source: Iterable[Entry]) -> tqdm:
    """It counts what is stored, and has an end where the source knows how many there are."""
    total = len(source) if hasattr(source, "__len__") else None
    return tqdm(total=total, unit="image", desc="compress", file=sys.stderr)


def _chunks(
    cache: SummaryCache, source: Iterable[Entry], claims: Claims, retry: bool, result: Filled, bar: tqdm
) -> Iterator[tuple[int | None, list[Entry]] | None]:
    """What must be read, chunk by chunk, each with a claim for every entry; None while others have all that is left."""
    plan = Plan(cache, retry, result)
    first, busy = "", []

    def counted(entries: Sequence[Entry]) -> list[Entry]:
        before = result.known + len(result.skipped)
        todo = plan.todo(entries)
        bar.update(result.known + len(result.skipped) - before)
        return todo

    def claimed(name: str, entries: list[Entry]) -> Iterator[tuple[int | None, list[Entry]]]:
        number = claims.take(name)
        if number is None:
            busy.append((name, entries))
            return
        todo = counted(entries)  # what others have done since is left alone
        for _ in todo[1:]:  # each entry has one, and gives it back when it is stored
            claims.take(name)
        if not todo:
            claims.give(number)
        else:
            yield number, todo

    for block in blocks_of(source):
        todo = {entry.source: entry for entry in counted(block)}
        part: list[Entry] = []
        for entry in block:
            if claims.starts(entry) or not first:
                if part:
                    yield from claimed(first, part)
                first, part = entry.source, []
            if entry.source in todo:
                part.append(entry)
        if part:
            yield from claimed(first, part)
    while busy:
        waiting, busy = busy, []
        for name, entries in waiting:
            yield from claimed(name, entries)
        if len(busy) == len(waiting):  # all are being done by others: wait for what they leave undone
            yield None
            time.sleep(0.2)


def run_stages(
    chunks: Iterable[tuple[int | None, Sequence[Entry]] | None],
    sink: Any,
    compressor: Compressor | Later,
    *,
    known: Callable[[Sequence[str]], dict[str, tuple[int, int]]],
    stop: Stop,
    workers: int | None = None,
    patience: float = PATIENCE,
    done: Callable[[Item], None] = lambda item: None,
) -> None:
    """The stages after the plan."""
    # a reader per processor, beside the model's own thread, made the model's calls 8 % slower on two processors
    workers = workers or max(1, (os.cpu_count() or 1) - 1)
    pool = Pool(workers, patience)
    loaded = compressor.loaded if isinstance(compressor, Later) else compressor
    model: list[Compressor] = [loaded] if loaded else []
    size = compressor.batch_size
    feeder = Feeder(pool, stop, known, lambda data, name: model[0].prepare(data, name), 2 * size + workers)
    if model:
        feeder.ready.set()
    batch: list[tuple[Item, Any]] = []
    twins: dict[str, list[Item]] = {}  # contents of the batch, with more entries of the same
    failed: dict[str, tuple[str, str]] = {}  # contents that cannot be used → (the first file that has it, why)

    def finish(item: Item) -> None:
        if item.claim is not None:
            sink.after(lambda: done(item))

    def refuse(item: Item, reason: str) -> None:
        failed.setdefault(item.key, (item.entry.display_name, reason))
        first, why = failed[item.key]
        sink.skip(item.entry, why.replace(first, item.entry.display_name), True)

    def flush() -> None:
        stored = sink.keys
        sink.flush()
        feeder.flying.difference_update(stored)  # from now on they are found by looking

    def compress() -> None:
        if not batch:
            return
        summary, vectors = model[0]([prepared.pixels for _, prepared in batch])
        tokens, vectors, good = sink.encode(summary, vectors)
        for i, (item, prepared) in enumerate(batch):
            also = twins.pop(item.key)
            if good[i]:
                sink.made(item.entry, item.key, prepared.size, prepared.exif, tokens[i], vectors[i])
                for twin in also:
                    sink.link(twin.entry, item.key, prepared.size, prepared.exif)
            else:
                for one in (item, *also):
                    refuse(one, f"{item.entry.display_name}: {sink.overflow}")
            for one in (item, *also):
                finish(one)
        batch.clear()

    def take(item: Item) -> None:
        if item.problem is not None:
            sink.skip(item.entry, item.problem, item.broken)
        elif item.task is not None:
            try:
                prepared = pool.result(item.task, stop)
            except (ValueError, OSError, TimeoutError) as error:
                late = isinstance(error, TimeoutError)
                refuse(item, f"{item.entry.display_name}: {error}" if late else str(error))
            else:
                batch.append((item, prepared))
                twins[item.key] = []
                return
        elif item.size is not None:
            sink.link(item.entry, item.key, item.size, {})
        elif item.key in twins:
            twins[item.key].append(item)
            return
        elif item.key in failed:
            refuse(item, "")
        else:
            sink.link(item.entry, item.key, sink.size_of(item.key), {})
        finish(item)

    try:
        feeder.start(chunks)
        last = time.monotonic()
        while not stop.is_set():
            item = feeder.get(0.1)
            if isinstance(item, Item):
                last = time.monotonic()
                take(item)
            elif item == "end":
                break
            if feeder.needed.is_set() and not model:
                model.append(compressor())
                feeder.ready.set()
            waiting = item == "wait"
            if len(batch) >= size or waiting or time.monotonic() - last > IDLE:
                compress()
                size = model[0].batch_size if model else size
            if waiting or sink.due:
                flush()
        if not stop.is_set():
            compress()
    except Stopped:
        pass
    finally:
        pool.close()
        sink.flush()
