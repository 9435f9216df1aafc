"""How long the exact search of an evaluation takes, vectors given, beside the matrix products in it.

    python scripts/bench_search.py --images 100000 --captions 5 --size 576 --output eval/results/exact_search.json

Vectors are those of bench_cache.py: an image's captions are its vector with noise. The products are a part of the
search, and timed where they are made. `--screen no` compares all pairs in float32, `yes` in bfloat16 first. These
captions find their image (R@1 = 1), so that bfloat16 leaves few pairs open; those of a weak model do not, and all of
theirs are compared in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_cache import Source, peak_bytes

from llava_fwd2bot.evaluation import search
from llava_fwd2bot.files.writing import write_json

SCREEN = {"yes": True, "no": False, "auto": None}


def measure(images: int, captions: int, size: int, screen: str = "auto") -> dict[str, Any]:
    source = Source(size)
    left = source(images)  # [N, D]
    owner = torch.arange(images).repeat_interleave(captions)
    right = torch.empty(len(owner), size)  # [C, D]
    for at in range(0, len(owner), 20_000):
        right[at : at + 20_000] = source.near(left[owner[at : at + 20_000]])
    bare: list[float] = []
    types: dict[str, int] = {}

    def scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        found = search.cosine(a, b)
        bare.append(time.perf_counter() - start)
        types[str(a.dtype)[6:]] = types.get(str(a.dtype)[6:], 0) + 1
        return found

    start = time.perf_counter()
    t2i, i2t = search.ranks(left, right, owner, scores, screen=SCREEN[screen])
    seconds, products = time.perf_counter() - start, sum(bare)
    found = {"images": images, "captions": len(owner), "size": size, "seconds": round(seconds, 1)}
    found |= {"products_s": round(products, 1), "over_products": round(seconds / products, 3)}
    found |= {"peak_bytes_of_the_process": peak_bytes(), "threads": torch.get_num_threads()}
    found["products"] = types
    return found | {name: value for name, value in search.recalls(t2i, i2t).items() if name.endswith("_r1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--size", type=int, default=576, help="of a vector")
    parser.add_argument("--screen", choices=SCREEN, default="auto", help="default: what is faster here")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = measure(args.images, args.captions, args.size, args.screen)
    told = f"--images {args.images} --captions {args.captions} --size {args.size} --screen {args.screen}"
    found |= {"date": str(date.today()), "command": f"python scripts/bench_search.py {told}"}
    print(json.dumps(found))
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
