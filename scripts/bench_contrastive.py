"""Peak memory of a step with many pairs, chunked, over that of a small batch.

    python scripts/bench_contrastive.py --pairs 64 8192 --chunk 64

A toy language model on the CPU, each batch in a process of its own: what counts is how memory grows with the pairs. The
gradient of the chunked step is held against the whole one in tests/core/test_losses.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch
from bench_common import MALLOC, PeakMemory, build, peak_of, table, with_fwd2bot
from bench_shapes import SHAPES, Shape

# wide enough that a chunk's activations, and not a few kilobytes of Python, are what is measured
SHAPE = Shape(256, 688, 6, 4, 512, 64, 128, 2, 2, 96, 8, 24, 8)


def step_memory(pairs: int, chunk: int, shape: Shape) -> dict[str, int]:
    device = torch.device("cpu")
    libraries = PeakMemory(device).now()
    model = with_fwd2bot(build(shape, device, torch.float32), 4, shape.lora_r)
    model.fwd2bot_config.contrastive_chunk = chunk
    model.gradient_checkpointing_enable()
    model.train()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, shape.vocab - 1, (pairs, 12), generator=generator)
    pixels = torch.randn(pairs, 3, shape.image_size, shape.image_size, generator=generator)

    def step() -> None:
        model(pixel_values=pixels, caption_input_ids=words).loss.backward()

    found = peak_of(step, device, times=1)
    return {"libraries": libraries, **found, "pixels": pixels.nbytes}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, nargs="+", default=[64, 8192])
    options.add_argument("--chunk", type=int, default=64)
    options.add_argument("--shape", choices=SHAPES, help="instead of this script's own")
    options.add_argument("--of", type=int, help=argparse.SUPPRESS)  # how it calls itself
    given = options.parse_args()
    shape = SHAPES[given.shape] if given.shape else SHAPE
    if given.of:
        print(json.dumps(step_memory(given.of, given.chunk, shape)))
        return
    rows, first = [], None
    for pairs in given.pairs:
        argv = [sys.executable, __file__, "--of", str(pairs), "--chunk", str(given.chunk)]
        argv += ["--shape", given.shape] if given.shape else []
        env = {**os.environ, **MALLOC}
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        rows.append([pairs, *(round(found[n] / 2**20) for n in ("before", "peak")), round(found["pixels"] / 2**20)])
        rows[-1] += [round(found["peak"] / first["peak"], 3), round((found["peak"] - found["before"]) / 2**20)]
    table(["pairs", "before MiB", "peak MiB", "of which pixels", "peak over the first", "step MiB"], rows)


if __name__ == "__main__":
    main()
