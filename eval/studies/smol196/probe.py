"""Whether the study runs on this device, and how fast: a few steps of some recipes on random features and weights.

    python -m eval.studies.smol196.probe --folder DIR [--steps 8] [--batch 128] NAME…

Needs rows.npz alone, so that it can run while the rest is still on its way.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from eval.studies.smol196.data import Data
from eval.studies.smol196.features import PLACES, SLOTS
from eval.studies.smol196.measure import Reader
from eval.studies.smol196.model import Language, Projector, Shape, compile_block
from eval.studies.smol196.recipes import recipe
from eval.studies.smol196.run import build
from eval.studies.smol196.training import optimiser


class RandomData(Data):
    """The study's rows with features of no picture."""

    def _features(self, folder: Path, device: torch.device) -> torch.Tensor:
        count = int(np.load(folder / "rows.npz")["counts"].sum())
        features = torch.zeros(count, SLOTS, 1280, dtype=torch.uint8, device=device)
        features[:2048].random_(0, 255)
        return features


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["base", "fwd2bot", "token", "pool", "kv"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=90, help="after which no further recipe is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    start, device = time.perf_counter(), torch.device(a.device)
    data = RandomData(a.folder, device)
    vocabulary = max(int(data.arrays[name].max()) for name in ("train_packs", "tune_packs", "questions")) + 1000
    language = Language(Shape(vocabulary=vocabulary, layers=a.layers)).to(device)
    projector = Projector(1280, language.shape.hidden, PLACES).to(device).requires_grad_(False)
    compiled = compile_block(language) if device.type == "cuda" and not os.environ.get("EAGER") else False
    print(f"ready after {time.perf_counter() - start:.1f} s, compiled: {compiled}", flush=True)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for name in a.names:
        if time.perf_counter() - start > a.seconds:
            break
        base = projector.requires_grad_(True) if name == "base" else projector.requires_grad_(False)
        model = build(recipe(name), (language, base), data)
        optimizer, times = optimiser(model, model.recipe), []
        for step in range(a.steps):
            begun = clock()
            model.losses(data.batch(step, model.recipe, batch=a.batch, singles=a.batch // 2))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(clock() - begun)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        rest = times[len(times) // 2 :]
        print(
            f"{name}: first step {times[0]:.2f} s, then {sum(rest) / len(rest):.3f} s; peak {peak:.1f} GiB", flush=True
        )
        if name in ("pool", "fwd2bot") and device.type == "cuda":
            begun = clock()
            reader = Reader(model, data)
            made = clock()
            reader.answers(16)
            print(f"{name}: compress {made - begun:.1f} s, answers for one k {clock() - made:.1f} s", flush=True)
            reader.tuning_loss(16)
            if name == "fwd2bot":
                begun = clock()
                reader.ranks(16)
                print(f"{name}: ranks {clock() - begun:.1f} s", flush=True)
        del model, optimizer


if __name__ == "__main__":
    main()
