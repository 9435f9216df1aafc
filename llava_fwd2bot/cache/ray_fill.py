"""`fwd2bot compress --cache --ray`: the same as a Ray Data pipeline, with one actor per GPU, here or on a cluster.

Actors read and compress; the driver alone commits, so that a batch whose worker died and that Ray ran again is
committed once. Files are named by paths that every node must see.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checkpoint.load import load_for_inference
from .compressor import Compressor
from .reader import SummaryCache
from .sources import CHUNK, Filled, SourceImage, digest_of, fits, found_again, outdated, skip, too_large

# what became of a row: compressed; its content is in the cache already; the file cannot be reached; it is no use
MADE, KNOWN, ABSENT, BAD = "made", "known", "absent", "bad"


class Worker:
    """Loads the model once; reads and compresses batches of {"id", "path"}."""

    def __init__(self, path: str, loading: dict[str, Any], k: int, batch_size: int, max_pixels: int | None, known: Any):
        self.known = known
        self.compressor = Compressor(*load_for_inference(path, **loading), k, batch_size, max_pixels)
        self.shape = (k, self.compressor.words.shape[1])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds sha256, width, height, state, reason (of ABSENT and BAD), summary [M, k, D], embedding [M, D]."""
        count = len(batch["id"])
        sums, sizes, prepared, places = [""] * count, np.zeros((count, 2), np.int32), [], []
        states, reasons = [MADE] * count, [""] * count
        for i, name in enumerate(map(str, batch["path"])):
            found = digest_of(Path(name))
            if isinstance(found, OSError):
                states[i], reasons[i] = ABSENT, f"{name}: {found.strerror}"
                continue
            sums[i] = found
            if found in self.known:
                states[i] = KNOWN
                continue
            try:
                pixels, sizes[i] = self.compressor.prepare(Path(name))
            except (ValueError, OSError) as error:
                states[i], reasons[i] = BAD, str(error)
                continue
            prepared.append(pixels)
            places.append(i)
        summary = np.zeros((count, *self.shape), np.float32)
        vectors = np.zeros((count, self.shape[1]), np.float32)
        if prepared:
            made: tuple[Tensor, Tensor] = self.compressor(prepared)
            summary[places], vectors[places] = (x.float().numpy() for x in made)
        own = {"sha256": np.array(sums), "state": np.array(states), "reason": np.array(reasons)}
        size = {"width": sizes[:, 0], "height": sizes[:, 1]}
        return {**batch, **own, **size, "summary": summary, "embedding": vectors}


def fill_by_ray(
    cache: SummaryCache,
    images: dict[str, Path],
    path: Path,
    loading: dict[str, Any],
    *,
    batch_size: int = 8,
    max_pixels: int | None = None,
    retry: bool = False,
    actors: int | None = None,
    chunk: int = CHUNK,
    worker: type = Worker,
) -> Filled:
    """Brings `cache` up to date with `images` by Ray; see `fill.fill`.

    Args:
        path: the checkpoint. loading: by keyword to `load_for_inference`.
        actors: default: one per GPU of the cluster, or one where there is none.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'llava_fwd2bot[ray]'") from error
    started, result = time.perf_counter(), Filled()
    with tqdm(total=len(images), unit="image", desc="compress", file=sys.stderr) as bar:
        todo = outdated(cache, images, retry, result, bar)
        if todo:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, include_dashboard=False)
            gpus = int(ray.cluster_resources().get("GPU", 0))
            known = {row["sha256"] for row in cache.about(["sha256"])}
            rows = ray.data.from_items([{"id": i.id, "path": str(i.path.absolute())} for i in todo])
            done = rows.map_batches(
                worker,
                fn_constructor_args=(str(path.absolute()), loading, cache.settings.k, batch_size, max_pixels, known),
                batch_size=batch_size,
                concurrency=actors or max(1, gpus),
                num_gpus=1 if gpus else 0,
            )
            ray.data.DataContext.get_current().enable_progress_bars = False
            by_id = {image.id: image for image in todo}
            for batch in done.iter_batches(batch_size=chunk, batch_format="numpy"):
                _commit(cache, batch, by_id, result, bar)
    result.seconds = time.perf_counter() - started
    return result


def _commit(
    cache: SummaryCache, batch: dict[str, np.ndarray], by_id: dict[str, SourceImage], result: Filled, bar: tqdm
) -> None:
    images = [by_id[str(name)] for name in batch["id"]]
    states, reasons = ([str(value) for value in batch[name]] for name in ("state", "reason"))
    digests = {image.id: str(digest) for image, digest in zip(images, batch["sha256"], strict=True)}
    summary, vectors = (torch.from_numpy(np.array(batch[name])) for name in ("summary", "embedding"))
    sizes = list(zip(batch["width"].tolist(), batch["height"].tolist(), strict=True))
    for i, image in enumerate(images):
        if states[i] == MADE and not fits(cache, summary[i]):
            states[i], reasons[i] = BAD, too_large(cache, image.path)

    def those(state: str) -> list[int]:
        return [i for i, own in enumerate(states) if own == state]

    result.renamed += len(found_again(cache, [images[i] for i in those(KNOWN)], digests, set(by_id)))
    good = those(MADE)
    about = [images[i].about(digests[images[i].id], sizes[i]) for i in good]
    cache.add([images[i].id for i in good], summary[good], vectors[good], about)
    result.compressed += len(good)
    absent, bad = ([images[i].skipped(reasons[i]) for i in those(state)] for state in (ABSENT, BAD))
    skip(cache, result, absent, bad, bar)
    bar.update(len(images))
