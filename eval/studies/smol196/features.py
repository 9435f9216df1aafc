"""Draws every picture and runs the frozen tower over it, once; what comes out is kept as bytes.

    python -m eval.studies.smol196.features --folder DIR [--processes 16]

features.npy   [pictures, 196 + 31, 1280] uint8: the 14 × 14 grid, then those of the picture shrunk to 1, 2, 4, 8 and 16
               tokens. The tower ends in ReLU6, so that a byte is 6 / 255.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from eval.studies.smol196.pictures import SIDE, Picture, render
from llava_fwd2bot.smol.tower import EfficientNetLite, EfficientNetLiteConfig

PLACES = 196
SHRUNK = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4)}  # rows and columns of the grid
SLOTS = PLACES + sum(SHRUNK)
STEP = 6 / 255


class Album:
    """The photographs in photos-N.bin."""

    def __init__(self, folder: Path) -> None:
        self.index = json.loads((folder / "photos.json").read_text())
        self.shards = {s: (folder / f"photos-{s:02d}.bin").read_bytes() for s in {at[0] for at in self.index.values()}}

    @lru_cache(maxsize=4096)  # noqa: B019 (one album in a process)
    def __call__(self, name: str) -> Image.Image:
        shard, start, size = self.index[name]
        return Image.open(io.BytesIO(self.shards[shard][start : start + size])).convert("RGB")


_worker: dict[str, Any] = {}


def _begin(folder: Path, canvas: Path) -> None:
    _worker["album"] = Album(folder)
    _worker["specs"] = json.loads((folder / "pictures.json").read_text())
    _worker["canvas"] = np.load(canvas, mmap_mode="r+")


def _draw(span: tuple[int, int]) -> tuple[int, int]:
    for i in range(*span):
        _worker["canvas"][i] = np.asarray(render(Picture.of(_worker["specs"][i]), _worker["album"]))
    return span


def load_tower(folder: Path, device: torch.device) -> EfficientNetLite:
    tower = EfficientNetLite(EfficientNetLiteConfig(image_size=SIDE)).eval().requires_grad_(False)
    tower.load_state_dict({n: w.float() for n, w in load_file(folder / "tower.safetensors").items()})
    return tower.to(device, torch.float16 if device.type == "cuda" else torch.float32)


@torch.inference_mode()
def encode(tower: EfficientNetLite, drawn: Tensor) -> Tensor:
    """uint8 pictures [M, 448, 448, 3] → uint8 features [M, SLOTS, 1280]"""
    pixels = drawn.permute(0, 3, 1, 2).float()
    parts = [pixels]
    for rows, columns in SHRUNK.values():
        size = (32 * rows, 32 * columns)
        parts.append(F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 255))
    dtype = next(tower.parameters()).dtype
    found = [tower(((p - 127) / 128).to(dtype).contiguous(memory_format=torch.channels_last)) for p in parts]
    tokens = torch.cat([out.last_hidden_state for out in found], dim=1)
    return (tokens.float() / STEP).round().clamp(0, 255).to(torch.uint8)


def write_features(folder: Path, device: torch.device, processes: int, chunk: int = 64) -> None:
    count = len(json.loads((folder / "pictures.json").read_text()))
    # pixels are read once and need no disk, where memory holds them
    memory = Path("/dev/shm")
    room = shutil.disk_usage(memory).free if memory.is_dir() else 0
    canvas = (memory if room > 1.5 * count * SIDE * SIDE * 3 else folder) / f"canvas-{os.getpid()}.npy"
    np.lib.format.open_memmap(canvas, "w+", np.uint8, (count, SIDE, SIDE, 3)).flush()
    drawn = np.load(canvas, mmap_mode="r")
    beside = folder / "features.tmp.npy"
    out = np.lib.format.open_memmap(beside, "w+", np.uint8, (count, SLOTS, 1280))
    spans = [(at, min(at + chunk, count)) for at in range(0, count, chunk)]
    start = time.perf_counter()
    # forked before the tower is on a GPU, which a forked process cannot use: a fresh one would take long to begin
    with multiprocessing.get_context("fork").Pool(processes, _begin, (folder, canvas)) as pool:
        tower = load_tower(folder, device)
        for done, (first, last) in enumerate(pool.imap_unordered(_draw, spans)):
            out[first:last] = encode(tower, torch.from_numpy(np.array(drawn[first:last])).to(device)).cpu().numpy()
            if done % 50 == 0:
                print(f"features {done}/{len(spans)} {time.perf_counter() - start:.1f} s", flush=True)
    os.replace(beside, folder / "features.npy")
    canvas.unlink()
    print(f"features of {count} pictures: {time.perf_counter() - start:.1f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    write_features(a.folder, torch.device(a.device), a.processes)


if __name__ == "__main__":
    main()
