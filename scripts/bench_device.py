"""What the device can do at most: a large bfloat16 product of random matrices, and a large copy within its memory.

    python scripts/bench_device.py --json

Figures of the other benchmarks stand beside these. The matrices are random: some devices multiply zeros faster.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from bench_common import finish, in_turn, parser, prepare


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    prepare(options)
    device, size = options.device, options.matrix
    with device:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator, dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(a)
        source = torch.randn(options.copy_mib * 2**18, generator=generator)  # float32
        target = torch.empty_like(source)
    sides = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    seconds = in_turn(sides, options.rounds, device, warmup=3)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {
        "bench": "device",
        "matrix": size,
        "copy_mib": options.copy_mib,
        "tflops": 2 * size**3 / median["product"] / 1e12,
        "gb_per_s": 2 * source.nbytes / median["copy"] / 1e9,  # read and written
        "seconds": seconds,
    }
    if device.type == "cuda":
        result["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    print(f"bfloat16 product {result['tflops']:.4g} TFLOP/s, copy {result['gb_per_s']:.4g} GB/s")
    return finish(result, options)


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--matrix", type=int, default=8192, help="rows and columns")
    options.add_argument("--copy-mib", type=int, default=4096)
    options.add_argument("--rounds", type=int, default=10)
    return options


if __name__ == "__main__":
    main()
