"""What a cache costs beside the model itself when images are compressed.

    python scripts/bench_fill.py --model smol-llava --images photos/ --output eval/results/cache_fill.json

Round by round, on the same images in the same process: `fill` into a new cache (reading, hashing, the model, the codec,
commits); reading and preparing alone, in one thread; and the model alone, on images that are prepared already.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import _root  # noqa: F401
import torch

from eval.measure import environment, ratio
from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.cache.codecs import CODECS
from llava_fwd2bot.cache.compressor import Compressor
from llava_fwd2bot.cache.format import CacheSettings
from llava_fwd2bot.cache.pipeline import fill
from llava_fwd2bot.cache.reader import SummaryCache
from llava_fwd2bot.cache.sources import Source
from llava_fwd2bot.files.writing import write_json


def measure(
    model_name: str,
    given: list[str],
    codec: str,
    rounds: int,
    batch_size: int,
    fast: bool = False,
    threads: int | None = None,
) -> dict[str, object]:
    if threads:
        torch.set_num_threads(threads)
    entries = list(Source(given))
    compressor = Compressor(*load_fwd2bot(model_name), batch_size=batch_size, fast=fast)
    prepared = [compressor.prepare(Path(entry.source).read_bytes(), entry.source).pixels for entry in entries]
    pooling = compressor.model.fwd2bot_config.pooling
    settings = CacheSettings("f" * 64, compressor.k, compressor.words.shape[1], codec, pooling)
    seconds: dict[str, list[float]] = {"fill": [], "reading": [], "model": []}

    def lap(name: str, start: float) -> None:
        seconds[name].append(time.perf_counter() - start)

    for at in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            cache = SummaryCache.create(Path(folder) / "a.cache", settings)
            start = time.perf_counter()
            fill(cache, entries, compressor)
            lap("fill", start)
        start = time.perf_counter()
        for entry in entries:
            compressor.prepare(Path(entry.source).read_bytes(), entry.source)
        lap("reading", start)
        start = time.perf_counter()
        for first in range(0, len(prepared), batch_size):
            compressor(prepared[first : first + batch_size])
        lap("model", start)
        if at == 0:  # the first round opens files and fills the allocator
            for values in seconds.values():
                values.clear()

    return {
        "images": len(entries),
        "fill_over_model": ratio(seconds["fill"], seconds["model"]),
        "reading_over_model": ratio(seconds["reading"], seconds["model"]),
        "seconds": {name: [round(x, 3) for x in values] for name, values in seconds.items()},
        **environment(compressor.model.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol-llava")
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--codec", default="int8", choices=list(CODECS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--fast-decode", action="store_true")
    parser.add_argument("--threads", type=int, help="of the model; default: torch's")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = {
        **measure(args.model, args.images, args.codec, args.rounds, args.batch_size, args.fast_decode, args.threads),
        "codec": args.codec,
        "fast_decode": args.fast_decode,
        "batch_size": args.batch_size,
    }
    print(json.dumps(found))
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
