"""What is compared: each recipe is a way to make k tokens of an image, how it is trained, and for how long.

All compressors start from the same base with the same frozen projector, see the same pictures in the same order, draw k
for each picture from `KS`, and train about as many parameters: two adapters of rank 16, or one of 32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

KS = (1, 2, 4, 8, 16)
MOST = KS[-1]
BATCH, SINGLES = 128, 64  # pictures a step, and how many of them are captioned photographs
LINEAR = ("pool", "average", "uniform", "random")  # k rows of weights over the dense tokens
LANGUAGE = ("fwd2bot", "kv", "last")  # those with a compress pass of the language model


@dataclass(frozen=True)
class Recipe:
    """`kind` is the compressor; weights are those of the losses, 0 leaves one out.

    Attributes:
        kind: base (projector and language model, from dense tokens), dense (the bound), pool, average (nested
            averages), uniform, random (dense tokens picked), downsample (the picture shrunk), query, kv, fwd2bot, or
            last (VladVA's last token, retrieval alone).
        residual: averages added to R going in and to S coming out. seeded: going in alone.
        vector: what retrieval reads: mean (of the first j of S), first, or token (one of its own after R).
        apart: penalty on outputs of one picture that say the same. rebuild: dense tokens from each prefix of S.
        rate, own_rate: learning rates of the adapters, and of what else is trained (R, temperature, resampler).
    """

    name: str
    kind: str
    steps: int = 400
    rate: float = 1e-3
    own_rate: float = 1e-2
    rank: int = 16
    shared: bool = False
    residual: bool = False
    seeded: bool = False
    vector: str = "mean"
    answer: float = 1.0
    contrastive: float = 0.0
    distill: float = 0.0
    apart: float = 0.0
    rebuild: float = 0.0
    seed: int = 0
    ks: tuple[int, ...] = KS
    keep: bool = False  # whether its adapters are brought back

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _fwd2bot(name: str, **more: Any) -> Recipe:
    return Recipe(name, "fwd2bot", **more)


_PAPER = _fwd2bot("fwd2bot", contrastive=1.0)  # both losses, mean of S
_TODAY = _fwd2bot("residual", contrastive=1.0, answer=0.5, distill=2.0, residual=True, vector="first")
_TOKEN = _fwd2bot("token", contrastive=1.0, answer=0.5, distill=2.0, vector="token")
_ANSWER = _fwd2bot("answer")

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("base", "base", steps=1000, rank=64, rate=5e-4, own_rate=2e-3),
        Recipe("dense", "dense", rank=32),
        Recipe("pool", "pool", rank=32),
        Recipe("average", "average", rank=32),
        Recipe("uniform", "uniform", rank=32),
        Recipe("random", "random", rank=32),
        Recipe("downsample", "downsample", rank=32),
        Recipe("query", "query", rank=32, own_rate=1e-3),
        Recipe("kv", "kv"),
        Recipe("last", "last", answer=0.0, contrastive=1.0),
        _PAPER,
        _ANSWER,
        replace(_PAPER, name="shared", shared=True, rank=32),
        _TODAY,
        replace(_TODAY, name="residual-answer", contrastive=0.0, answer=1.0, distill=0.0),
        replace(_TODAY, name="residual-token", vector="token"),
        # against outputs that fall together
        replace(_ANSWER, name="distill", answer=0.5, distill=2.0),
        _TOKEN,
        replace(_ANSWER, name="apart", apart=1.0),
        replace(_ANSWER, name="seeded", seeded=True),
        replace(_ANSWER, name="rebuild", rebuild=1.0),
        replace(_TOKEN, name="token-answer", answer=1.0, distill=0.0),
        replace(_TOKEN, name="token-all", answer=1.0, distill=1.0, seeded=True, apart=0.3, rebuild=1.0),
        replace(_TOKEN, name="token-seeded", seeded=True),
        replace(_TOKEN, name="token-rebuild", rebuild=1.0),
        Recipe("pool-distill", "pool", rank=32, answer=0.5, distill=2.0),
    )
}


def recipe(spec: str) -> Recipe:
    """NAME or NAME:setting=value,… such as `pool:rate=2e-3,steps=100`; the result is named by all of it.

    Raises:
        ValueError: no such recipe or setting.
    """
    name, _, settings = spec.partition(":")
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}: {', '.join(RECIPES)}")
    found, changed = RECIPES[name], {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in Recipe.__dataclass_fields__ or key in ("name", "kind", "ks"):
            raise ValueError(f"{spec}: a recipe has no setting {key!r} that can be changed")
        before = getattr(found, key)
        changed[key] = (
            value == "true"
            if isinstance(before, bool)
            else type(before)(float(value) if not isinstance(before, str) else value)
        )
    label = name + "".join(
        f"_{s.replace('=', '-')}" for s in filter(None, settings.split(",")) if not s.startswith("keep")
    )
    return replace(found, **changed, name=label)
