"""The study's rows and features on the device, and the batches of training: the same for every recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.studies.smol196.recipes import BATCH, KS, SINGLES, Recipe
from eval.studies.smol196.rows import Rows, offsets


@dataclass
class Prompts:
    prefix: Tensor  # [P] what stands before the image
    image: list[int]
    text: list[int]
    end: int


@dataclass
class Batch:
    """Of B pictures; the first of them are captioned photographs."""

    features: Tensor  # [B, 227, 1280] uint8
    rows: Rows
    k: Tensor  # [B]
    j: int  # how many outputs the vectors are made of
    captions: Tensor  # [C, T]
    caption_lengths: list[int]


class Data:
    """rows.npz, and features.npy on the device.

    Args:
        device: where the features go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        with np.load(folder / "rows.npz", allow_pickle=False) as stored:
            self.arrays = {name: stored[name] for name in stored.files}
        self.features = self._features(folder, device)  # [pictures, 227, 1280] uint8
        self.train, self.tune, self.report = (int(n) for n in self.arrays["counts"])
        a = self.arrays
        prefix = torch.from_numpy(a["prefix"].astype(np.int64)).to(device)
        self.prompts = Prompts(prefix, a["image_prompt"].tolist(), a["text_prompt"].tolist(), int(a["end"][0]))
        self.singles = a["train_captioned"]
        self.others = np.setdiff1d(np.arange(self.train), self.singles)
        self._orders: dict[tuple[int, int, int], np.ndarray] = {}

    def _features(self, folder: Path, device: torch.device) -> Tensor:
        mapped = np.load(folder / "features.npy", mmap_mode="r")
        features = torch.empty(mapped.shape, dtype=torch.uint8, device=device)
        for at in range(0, len(mapped), 1024):
            features[at : at + 1024] = torch.from_numpy(np.array(mapped[at : at + 1024]))
        return features

    def _pictures(self, pool: np.ndarray, number: int, step: int, seed: int) -> tuple[np.ndarray, int]:
        """`number` pictures of a pool at a step, each once an epoch, and the epoch."""
        number = min(number, len(pool))
        per_epoch = len(pool) // number
        epoch, at = divmod(step, per_epoch)
        key = (seed, len(pool), epoch)
        if key not in self._orders:
            self._orders[key] = np.random.default_rng(key).permutation(pool)
        return self._orders[key][at * number : (at + 1) * number], epoch

    def batch(self, step: int, recipe: Recipe, batch: int = BATCH, singles: int = SINGLES) -> Batch:
        """The batch of a step; the same pictures, texts and k for every recipe of that seed."""
        alone, epoch = self._pictures(self.singles, singles, step, recipe.seed)
        mixed, other_epoch = self._pictures(self.others, batch - singles, step, recipe.seed)
        if recipe.kind == "last":  # the vectors alone
            mixed = mixed[:0]
        rng = np.random.default_rng((recipe.seed, step))
        packs = self.arrays["train_packs"]
        packed = np.concatenate(
            [packs[alone, epoch % packs.shape[1]], packs[mixed, other_epoch % packs.shape[1]]]
        )  # [B, 3, T]
        which, said = np.searchsorted(self.singles, alone), rng.integers(0, 5, len(alone))
        lengths = self.arrays["train_caption_lengths"][which, said].tolist()
        captions = self.arrays["train_captions"][which, said][:, : max(lengths)]
        k = rng.choice(KS, len(packed))
        at = torch.from_numpy(np.concatenate([alone, mixed]))
        return Batch(
            self.features[self._there(at)],
            self.rows(packed),
            self._there(torch.from_numpy(k)),
            int(rng.choice(KS)),
            self._ids(captions),
            lengths,
        )

    def rows(self, packed: np.ndarray) -> Rows:
        """Packs [B, 3, T] → rows on the device"""
        tokens, segment, label = (torch.from_numpy(packed[:, i].astype(np.int64)) for i in range(3))
        labelled = label.flatten().nonzero().flatten()
        targets = tokens.flatten()[labelled]
        return Rows(*(self._there(x) for x in (tokens, segment, offsets(segment), labelled - 1, targets)))

    def _there(self, x: Tensor) -> Tensor:
        # from pinned memory, so that the next step can be prepared while the device is at work
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _ids(self, ids: np.ndarray) -> Tensor:
        return self._there(torch.from_numpy(ids.astype(np.int64)))

    def tuning(self) -> tuple[Tensor, np.ndarray]:
        """Places of the tuning pictures among the features, and their packs [N, 3, T]."""
        return torch.arange(self.train, self.train + self.tune, device=self.device), self.arrays["tune_packs"][:, 0]

    @property
    def reported(self) -> int:
        """Where the features of the reported pictures begin."""
        return self.train + self.tune
