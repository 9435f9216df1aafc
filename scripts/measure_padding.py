"""The share of padding in the answer pass, by the order of the rows.

    python scripts/measure_padding.py

Rows are drawn as in LLaVA-1.5's mix of 665,000. How many there are of each kind is published (arXiv 2310.03744,
table 7); how long their texts are is assumed here, a log-normal for each kind. Images take k tokens in the answer pass.
The compress pass has no padding with LLaVA-1.5, whose images all have 576 dense tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from bench_common import table

from llava_fwd2bot.training.sampler import ImageGroupSampler, ModalityLengthSampler

# kind: thousands of rows, median length of the text in tokens (assumed), deviation of its logarithm (assumed), image
MIX = {
    "LLaVA's conversations": (158, 220, 0.6, True),
    "ShareGPT": (40, 700, 0.9, False),
    "VQAv2": (83, 130, 0.4, True),
    "GQA": (72, 160, 0.4, True),
    "OKVQA, A-OKVQA": (75, 60, 0.4, True),
    "OCRVQA": (80, 110, 0.2, True),
    "TextCaps": (22, 70, 0.3, True),
    "RefCOCO": (48, 190, 0.5, True),
    "Visual Genome": (86, 330, 0.4, True),
}


def draw(count: int, seed: int = 0) -> list[int]:
    """Lengths of `count` rows, negative for those without an image, as `LlavaDataset.modality_lengths`."""
    chance = random.Random(seed)
    weights = [kind[0] for kind in MIX.values()]
    found = []
    for _, median, deviation, image in chance.choices(list(MIX.values()), weights, k=count):
        length = max(8, min(2048, round(median * chance.lognormvariate(0, deviation))))
        found.append(length if image else -length)
    return found


def padding(order: Sequence[int], lengths: Sequence[int], batch: int, k: int) -> float:
    """The share of the answer pass's tokens that are padding."""
    real = computed = 0
    for start in range(0, len(order), batch):
        rows = [abs(lengths[i]) + (k if lengths[i] > 0 else 0) for i in order[start : start + batch]]
        real += sum(rows)
        computed += max(rows) * len(rows)
    return 1 - real / computed


def shares(count: int, batch: int, ranks: int, k: int) -> dict[str, float]:
    lengths = draw(count)
    groups = [i // 4 for i in range(count)]  # four records of an image, of any length
    plain = list(range(count))
    random.Random(1).shuffle(plain)
    orders = {
        "random": plain,
        "--group_by_modality_length": list(ModalityLengthSampler(lengths, batch, ranks)),
        "--group_by_image": list(ImageGroupSampler(groups, batch, ranks)),
        "both": list(ImageGroupSampler(groups, batch, ranks, modality_lengths=lengths)),
    }
    return {name: padding(order, lengths, batch, k) for name, order in orders.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=40_000)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--ranks", type=int, default=8)
    options.add_argument("--k", type=int, default=16)
    given = options.parse_args()
    found = shares(given.rows, given.batch, given.ranks, given.k)
    table(["order of the rows", "share of padding"], [[name, f"{share:.1%}"] for name, share in found.items()])


if __name__ == "__main__":
    main()
