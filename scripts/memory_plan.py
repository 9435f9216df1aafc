"""Training on many GPUs, on paper: memory per GPU, bytes communicated in a step, and where more GPUs stop helping.

    python scripts/memory_plan.py                       # the tables of docs/scaling.md
    python scripts/memory_plan.py --write docs/scaling.md

Nothing here is measured but the rate of one GPU (eval/results/gpu.md). Weights are counted, activations are estimated.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

from bench_shapes import CAPTION_TOKENS, LABELLED, PROMPT_TOKENS, SHAPES, Shape

from llava_fwd2bot.modeling.blocks import block_rows

GB = 1e9
K = 16
SETUPS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
SIZES = {"7B": SHAPES["7b"], "13B": replace(SHAPES["7b"], hidden=5120, intermediate=13824, layers=40, heads=40)}


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what they are assumed to do; the rates are one direction's, per GPU."""

    gpus: int
    compute: float = 326e12  # operations a second of a step; an H200's at batch 32 (eval/results/gpu.md)
    bus: float = 350e9  # bytes a second of a collective within a machine of 8 (NVLink 4 has 450)
    network: float = 45e9  # of a collective between machines (400 Gb/s for each GPU have 50)

    @property
    def rate(self) -> float:
        return self.bus if self.gpus <= 8 else self.network

    @property
    def share(self) -> float:
        """Of a tensor, what a ring sends per GPU in one gather or one reduction."""
        return (self.gpus - 1) / self.gpus


# ---------------------------------------------------------------------- weights
def base_weights(shape: Shape) -> int:
    """The base's: layers, head and word embeddings, tower, projector."""
    projector = shape.vision_hidden * shape.hidden + shape.hidden**2
    return shape.layer_weights + 2 * shape.head_weights + shape.tower_weights + projector


def trained_weights(shape: Shape, k: int = K) -> int:
    """Two adapters, the summary tokens and the temperature."""
    return 2 * shape.adapter_weights(shape.lora_r) + k * shape.hidden + 1


# ---------------------------------------------------------------------- memory per GPU
def state_bytes(setup: str, shape: Shape, gpus: int) -> float:
    """Weights, gradients and AdamW's state: bfloat16 base; of what trains float32 weights, gradients and two moments.

    DeepSpeed casts what trains to bfloat16, and keeps float32 weights beside it.
    """
    base, trained = 2 * base_weights(shape), trained_weights(shape)
    if setup == "DDP":
        return base + 16 * trained
    if setup == "ZeRO-2":
        return base + 2 * trained + (2 + 12) * trained / gpus
    if setup == "ZeRO-3":
        return (base + 2 * trained + (2 + 12) * trained) / gpus
    return (base + 16 * trained) / gpus


def gathered_bytes(setup: str, shape: Shape) -> float:
    """What of the weights is whole at one time: the layer at work and the next one, and the head."""
    if setup in ("DDP", "ZeRO-2"):
        return 0.0
    size = 2 if setup == "ZeRO-3" else 4  # of an adapter's numbers
    layer = 2 * shape.layer_weights + size * 2 * shape.adapter_weights(shape.lora_r)
    return 2 * layer / shape.layers + 2 * shape.head_weights


def activation_bytes(shape: Shape, rows: int, captions: bool = False, k: int = K) -> float:
    """With gradient checkpointing: the input of each layer, and one layer's own while it is computed again.

    A layer keeps about 34 bytes per token and hidden number in bfloat16 with attention that stores no matrix
    (arXiv 2205.05198, without dropout about 24; LoRA's own inputs and outputs bring it there again).
    """
    tokens = rows * (shape.dense_tokens + PROMPT_TOKENS + k + k + shape.text_tokens)
    tokens += rows * (CAPTION_TOKENS + PROMPT_TOKENS + k) * captions
    longest = rows * (shape.dense_tokens + PROMPT_TOKENS + k)
    inputs = 2 * shape.layers * tokens * shape.hidden
    layer = 34 * longest * shape.hidden
    logits = (2 + 4 + 4) * rows * int(LABELLED * shape.text_tokens) * shape.vocab  # float32 for the loss, its gradient
    return inputs + max(layer, logits)


def pair_bytes(shape: Shape, pairs: int, copies: int = 8) -> float:
    """The contrastive loss over all pairs, which each GPU computes whole: vectors, and a block of logits in float32.

    copies: matrices of a block that are held at once; the loss and its backward took 7.6 on a CPU at 4,096 pairs.
    """
    return 4 * (copies * block_rows(pairs) * pairs + 2 * 3 * pairs * shape.hidden)


def memory(setup: str, shape: Shape, gpus: int, rows: int, captions: bool = True) -> float:
    """Bytes per GPU in a step with gradient checkpointing, without what the allocator wastes."""
    whole = state_bytes(setup, shape, gpus) + gathered_bytes(setup, shape) + activation_bytes(shape, rows, captions)
    return whole + (pair_bytes(shape, gpus * rows) if captions else 0)


# ---------------------------------------------------------------------- communication and time of a step
def sent_bytes(setup: str, shape: Shape, cluster: Cluster, rows: int, captions: bool = True) -> float:
    """Bytes that each GPU sends in a step.

    DDP reduces the float32 gradients (two rounds of a ring); ZeRO-2 scatters bfloat16 gradients and gathers weights.
    ZeRO-3 and FSDP2 gather the layers for each pass, forward and backward: two passes, three with captions.
    """
    share, trained = cluster.share, trained_weights(shape)
    pairs = rows * cluster.gpus * (2 * shape.hidden * 4 + 16) * share * 2 if captions else 0  # forward and backward
    if setup == "DDP":
        return 2 * share * 4 * trained + pairs
    if setup == "ZeRO-2":
        return share * 2 * trained + share * 2 * trained + pairs
    passes = 3 if captions else 2
    size = 2 if setup == "ZeRO-3" else 4
    layers = 2 * shape.layer_weights + size * trained
    gathered = passes * 2 * layers + 2 * (shape.tower_weights + (2 + passes) * shape.head_weights)
    return share * (gathered + size * trained) + pairs


def seconds(setup: str, shape: Shape, cluster: Cluster, rows: int, captions: bool = True) -> tuple[float, float]:
    """Of a step: computing, and communicating."""
    side = "fwd2bot_contrastive" if captions else "fwd2bot"
    compute = rows * shape.step_operations(side, shape.text_tokens, K, True) / cluster.compute
    return compute, sent_bytes(setup, shape, cluster, rows, captions) / cluster.rate


def scaling(setup: str, shape: Shape, cluster: Cluster, rows: int) -> tuple[float, float]:
    """Of the rate of one GPU times their number: communication not hidden at all, and hidden behind computing."""
    compute, wire = seconds(setup, shape, cluster, rows)
    return compute / (compute + wire), compute / max(compute, wire)


def balance(setup: str, shape: Shape, cluster: Cluster, most: int = 4096) -> int | None:
    """The rows per GPU from which computing takes as long as communicating; None: not with `most`."""
    for rows in range(1, most):
        compute, wire = seconds(setup, shape, cluster, rows)
        if compute >= wire:
            return rows
    return None


def most_pairs(
    setup: str, shape: Shape, gpus: int, device: float = 80 * GB, chunk: int = 8, reserve: float = 0.1
) -> int:
    """The largest contrastive batch over all GPUs, of captions alone: a multiple of 64 pairs per GPU."""
    free = (1 - reserve) * device - state_bytes(setup, shape, gpus) - gathered_bytes(setup, shape)
    free -= activation_bytes(shape, chunk)
    pairs = 0
    while True:
        more = pairs + 64 * gpus
        kept = more / gpus * 2 * 3 * shape.image_size**2  # pixel values of its own rows, in bfloat16
        if pair_bytes(shape, more) + kept > free:
            return pairs
        pairs = more


# ---------------------------------------------------------------------- tables
def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def memory_table(rows: int = 16) -> str:
    found = []
    for name, shape in SIZES.items():
        for setup in SETUPS:
            sizes = [memory(setup, shape, gpus, rows) for gpus in (1, 8, 64)]
            state = [state_bytes(setup, shape, gpus) for gpus in (8, 64)]
            found.append([name, setup, *(f"{x / GB:.1f}" for x in (*state, *sizes))])
    head = ["base", "setup", "state, 8 GPUs", "state, 64", "all, 1 GPU", "all, 8", "all, 64"]
    return table(head, found)


def communication_table(rows: int = 16) -> str:
    found = []
    for name, shape in SIZES.items():
        for setup in SETUPS:
            row = [name, setup]
            for gpus in (8, 64):
                cluster = Cluster(gpus)
                low, high = scaling(setup, shape, cluster, rows)
                meet = balance(setup, shape, cluster)
                row += [f"{sent_bytes(setup, shape, cluster, rows) / GB:.1f}", f"{low:.2f} to {high:.2f}", str(meet)]
            found.append(row)
    head = ["base", "setup", "GB, 8 GPUs", "scaling, 8", "rows, 8", "GB, 64 GPUs", "scaling, 64", "rows, 64"]
    return table(head, found)


def pairs_table() -> str:
    found = []
    for name, shape in SIZES.items():
        for setup in SETUPS:
            found.append([name, setup, *(f"{most_pairs(setup, shape, gpus):,}" for gpus in (1, 8, 64))])
    return table(["base", "setup", "1 GPU", "8 GPUs", "64 GPUs"], found)


TABLES = {"memory": memory_table, "communication": communication_table, "pairs": pairs_table}


def filled(page: str) -> str:
    """The page, with each table between its marks computed anew."""
    for name, make in TABLES.items():
        mark = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        page, count = re.subn(mark, lambda m, make=make: m[1] + make() + m[2], page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"The page has {count} places for the table {name!r}, between <!-- {name} --> and <!-- end -->."
            )
    return page


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--write", type=Path, help="a page whose tables are replaced")
    page = options.parse_args().write
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, make in TABLES.items():
        print(f"{name}\n{make()}\n")


if __name__ == "__main__":
    main()
