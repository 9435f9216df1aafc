"""What is compared: each recipe is a way to make k tokens of an image, how it is trained, and for how long.

All compressors start from the same base with the same frozen projector, see the same pictures in the same order, draw k
for each picture from `KS`, and train about as many parameters: two adapters of rank 16, or one of 32. The recipes are
the rows of eval/studies/smol196.yaml.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from eval.studies.study import Study

KS = (1, 2, 4, 8, 16)
MOST = KS[-1]
BATCH, SINGLES = 128, 64  # pictures a step, and how many of them are captioned photographs
LINEAR = ("pool", "average", "uniform", "random")  # k rows of weights over the dense tokens
LANGUAGE = ("fwd2bot", "kv", "last")  # those with a compress pass of the language model
KINDS = ("base", "dense", "downsample", "query", *LINEAR, *LANGUAGE)
# rows with a meaning of their own
BASE, DENSE, BLIND, POOLED = "untrained-dense", "dense", "blind lookup", "untrained-pool"
WRONG, PRUNED = f"{BASE}, wrong image", "pruning by attention, untrained"


@dataclass(frozen=True)
class Recipe:
    """`kind` is the compressor; weights are those of the losses, 0 leaves one out.

    Attributes:
        kind: base (projector and language model, from dense tokens), dense, pool, average (nested
            averages), uniform and random (dense tokens picked), downsample (the picture shrunk), query, kv, fwd2bot,
            or last (VladVA's last token, retrieval alone).
        steps: 0 is the base with this compressor, untrained.
        rate, own_rate: learning rates of the adapters, and of what else is trained (R, temperature, resampler).
        residual: averages added to R going in and to S coming out: none, average (nested), or pool (grid cells).
        comes_out: False adds them to R alone.
        shared: one adapter serves both passes.
        vector: what retrieval reads: mean (of the first j of S), first, or token (one of its own after R).
    """

    name: str
    kind: str
    steps: int = 240
    rate: float = 1e-3
    own_rate: float = 1e-2
    rank: int = 16
    residual: str = "none"
    comes_out: bool = True
    shared: bool = False
    vector: str = "mean"
    answer: float = 1.0
    contrastive: float = 0.0
    distill: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"kind": KINDS, "vector": ("mean", "first", "token"), "residual": ("none", "average", "pool")}
        for setting, values in known.items():
            if (given := getattr(self, setting)) not in values:
                raise ValueError(f"recipe {self.name!r}: {setting} is one of {', '.join(values)}, not {given!r}.")

    @property
    def run(self) -> str:
        """The name of its run: a row has one per seed."""
        return self.name if not self.seed else f"{self.name}, seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


BASE_TRAINING = Recipe("base", "base", steps=1000, rank=64, rate=5e-4, own_rate=2e-3)


def recipes(study: Study, steps: int | None = None) -> dict[str, Recipe]:
    """The runs of the study's rows that can be trained or measured here, by name: the untrained first, then by seed.

    Args:
        steps: of those that are trained, instead of their own.

    Raises:
        ValueError: a row has an unknown setting.
    """
    found = {}
    for row in study.rows.values():
        if row.settings:
            try:
                given = {name: float(x) if name.endswith("rate") else x for name, x in row.settings.items()}
                chosen = Recipe(row.name, **given)
            except TypeError as error:
                raise ValueError(f"{study.name}, row {row.name!r}: {error}") from error
            own = chosen.steps if steps is None or not chosen.steps else steps
            for seed in row.seeds:
                one = replace(chosen, steps=own, seed=seed)
                found[one.run] = one
    return dict(sorted(found.items(), key=lambda pair: (pair[1].steps > 0, pair[1].seed)))
