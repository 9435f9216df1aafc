"""Cost against the number of questions per image, with the break-even: smol-llava measured, LLaVA-1.5-7B computed.

    python scripts/bench_cost.py --model smol-llava --k 16 --rounds 15 --output eval/results/cost_smol.json
    python -m eval.studies.cost_plot eval/results/cost_smol.json --output docs/images/cost.png

Prints the numbers of both panels as Markdown. Operations of 7B are those of matrix products and attention, counted as
by `scripts/bench_cost.py` (a multiply-add is two). Memory traffic is not included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import shapes
from eval.measure import break_even
from eval.shapes import Sizes
from llava_fwd2bot.evaluation.drawing import plain, png, powers, pyplot
from llava_fwd2bot.evaluation.tables import markdown
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_bytes

QUESTIONS = range(1, 33)
PROMPT, TEXT = 10, 60  # "Summarize the image in a few words.", and a question in LLaVA's conversation format


@dataclass(frozen=True)
class Shape(Sizes):
    """Sizes of a LLaVA-1.5, and the operations that follow from them."""

    def tower(self) -> int:
        """Operations of the vision tower and the projector on one image; CLIP has one token more than patches."""
        tokens, width = self.dense_tokens + 1, self.vision_hidden
        patches = 2 * self.dense_tokens * 3 * self.patch**2 * width
        projector = 2 * self.dense_tokens * (width * self.hidden + self.hidden**2)
        return patches + 2 * tokens * self.tower_weights + self.vision_layers * 4 * tokens**2 * width + projector

    def decoder(self, new: int, before: int = 0, lora_r: int = 0) -> int:
        """Operations of the language model's blocks on `new` tokens after `before` cached tokens."""
        weights = self.layer_weights + self.adapter_weights(lora_r)
        return 2 * new * weights + self.layers * 4 * new * (before + new) * self.hidden

    def generate(self, prompt: int, answer: int, before: int = 0, lora_r: int = 0) -> int:
        """Operations of a prompt and an answer of `answer` tokens, the head included."""
        steps = sum(self.decoder(1, before + prompt + i, lora_r) for i in range(answer - 1))
        return self.decoder(prompt, before, lora_r) + steps + 2 * answer * self.head_weights


LLAVA_7B = Shape(**vars(shapes.LLAVA_7B))


def computed(shape: Shape, k: int = 16, answer: int = 16, lora_r: int = 64) -> dict[str, float]:
    """Operations of compressing once and of one question to each side; `kept`: with the image's tokens cached."""
    n = shape.dense_tokens
    return {
        "compress": shape.tower() + shape.decoder(n + PROMPT + k, lora_r=lora_r),
        "answer": shape.generate(k + TEXT, answer, lora_r=lora_r),
        "base": shape.tower() + shape.generate(n + TEXT, answer),
        "kept once": shape.tower() + shape.decoder(n),
        "kept": shape.generate(TEXT, answer, before=n),
    }


def counted(found: dict[str, Any], k: int) -> dict[str, float]:
    """Operations of compressing once and of one question to each side, from a result of `scripts/bench_cost.py`."""
    names = {"compress": f"compress, k={k}, 1 at once", "answer": f"answer, k={k}", "base": "base"}
    return {name: found["flops"][source] for name, source in names.items()}


def timed(found: dict[str, Any], k: int) -> dict[int, float]:
    """Number of questions → time over the base's (median ratio of runs that took turns)."""
    row = next(row for row in found["rows"] if row["k"] == k)
    ending = " questions, over base"
    return {int(name.removesuffix(ending)): value for name, value in row.items() if name.endswith(ending)}


def relative(costs: dict[str, float], once: str = "compress", each: str = "answer") -> list[float]:
    """The cost of 1, 2, … questions about one image, over the base's cost of answering each from the image."""
    return [(costs[once] + q * costs[each]) / (q * costs["base"]) for q in QUESTIONS]


def curves(found: dict[str, Any], k: int) -> dict[str, dict[str, dict[str, float]]]:
    """Panel title → label → operations."""
    return {
        f"smol-llava, 49 tokens against {k}": {
            f"operations, answers of {found['new_tokens']} tokens": counted(found, k)
        },
        f"LLaVA-1.5-7B, 576 tokens against {k}": {
            f"operations, answers of {answer} tokens": computed(LLAVA_7B, k, answer) for answer in (16, 128)
        },
    }


def _from(costs: dict[str, float]) -> str:
    at = break_even(costs["compress"], costs["answer"], costs["base"])
    return f"cheaper from {at} questions" if at else "never cheaper"


def picture(found: dict[str, Any], k: int) -> bytes:
    """A PNG of smol-llava and 7B side by side, with the base at 1 and a dot at each break-even."""
    plt = pyplot()
    panels = curves(found, k)
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4), sharey=True)
    for axis, (title, own) in zip(axes, panels.items(), strict=True):
        axis.axhline(1, color="black", linewidth=1, label="base, from the image each time")
        for (label, costs), colour in zip(own.items(), ("#1f5fa8", "#7bc47f"), strict=False):
            values = relative(costs)
            axis.plot(QUESTIONS, values, color=colour, label=f"{label}: {_from(costs)}")
            if at := break_even(costs["compress"], costs["answer"], costs["base"]):
                axis.plot([at], [values[at - 1]], "o", color=colour)
        powers(axis, [1, 2, 4, 8, 16, 32])
        axis.set(xlabel="questions about one image", ylim=(0, 2.4))
        axis.set_title(title, fontsize=10)
        plain(axis)
    times, at = timed(found, k), next(row["break_even"] for row in found["rows"] if row["k"] == k)
    from_where = f"cheaper from {at} questions" if at else "never cheaper"
    label = f"time on {found['environment']['threads']} CPU thread: {from_where}"
    axes[0].plot(list(times), list(times.values()), "s--", color="#d9534f", label=label)
    kept = computed(LLAVA_7B, k)
    style = {"color": "0.5", "linestyle": ":", "label": "base, keys and values kept (288 MiB an image)"}
    axes[1].plot(QUESTIONS, relative(kept, "kept once", "kept"), **style)
    for axis in axes:
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    axes[0].set_ylabel("cost, over the base's")
    figure.tight_layout()
    return png(figure)


def table(found: dict[str, Any], k: int) -> str:
    """The numbers of every curve as Markdown; the cost of one question to the base is 1."""
    shown = (1, 2, 4, 8, 32)
    heads = ["what", "compress once", "each question", *(f"{q} questions" for q in shown), ""]
    times = timed(found, k)
    cells = [f"{times[q]:.2f}" if q in times else "" for q in shown]
    rows = [[f"smol-llava, time, answers of {found['new_tokens']} tokens", "", "", *cells, ""]]
    for title, own in curves(found, k).items():
        for label, costs in own.items():
            parts = [f"{costs[name] / costs['base']:.2f}" for name in ("compress", "answer")]
            cells = [f"{relative(costs)[q - 1]:.2f}" for q in shown]
            rows.append([f"{title}, {label}", *parts, *cells, _from(costs)])
    return markdown(heads, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a result of `scripts/bench_cost.py --output`")
    parser.add_argument("--k", type=int, default=16, help="number of summary tokens; default: 16")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the picture to write, a PNG")
    args = parser.parse_args(argv)
    found = read_json(args.result)
    write_bytes(args.output, picture(found, args.k))
    print(table(found, args.k))


if __name__ == "__main__":
    main()
