"""mteb's image and text tasks on a checkpoint, by name; a figure that is there is not measured again.

    python -m eval.mteb_tasks --model CKPT --k 16 4 1 --output DIR [--tasks Flickr30kT2IRetrieval …]

mteb brings the data of each task from the hub. DIR gets mteb's own result files, and `table.md` with a line for each
task and a column for each k.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_fwd2bot.evaluation.tables import markdown
from llava_fwd2bot.extras import require
from llava_fwd2bot.files.writing import write_text

SETS: dict[str, tuple[str, ...]] = {
    "retrieval": (
        "Flickr30kT2IRetrieval",
        "Flickr30kI2TRetrieval",
        "MSCOCOT2IRetrieval",
        "MSCOCOI2TRetrieval",
    ),
    "compositionality": (
        "SugarCrepe",
        "Winoground",
        "AROCocoOrder",
        "AROFlickrOrder",
        "AROVisualAttribution",
        "AROVisualRelation",
    ),
    "composed": ("CIRRIT2IRetrieval", "FashionIQIT2IRetrieval", "InfoSeekIT2TRetrieval", "OVENIT2TRetrieval"),
    "documents": (
        "VisRAGRetArxivQA",
        "VisRAGRetChartQA",
        "VisRAGRetInfoVQA",
        "VisRAGRetMPDocVQA",
        "VisRAGRetPlotQA",
        "VisRAGRetSlideVQA",
    ),
}


def run(checkpoint: str, names: Sequence[str], ks: Sequence[int | None], output: Path, **loading: Any) -> str:
    """Measures and gives the table as Markdown.

    Raises:
        ImportError: mteb is missing. KeyError: it knows no such task.
    """
    mteb = require("mteb", "mteb", "Tasks of mteb")
    from mteb.cache import ResultCache

    from llava_fwd2bot.integrations.mteb import Fwd2BotEncoder

    tasks = mteb.get_tasks(tasks=list(names))
    found: dict[str, dict[str, float]] = {}
    columns = []
    for k in ks:
        encoder = Fwd2BotEncoder(checkpoint, k, **loading)
        columns.append(f"k = {encoder.k}")
        done = mteb.evaluate(encoder, tasks, cache=ResultCache(output))
        for result in done.task_results:
            found.setdefault(result.task_name, {})[columns[-1]] = result.get_score()
        write_text(output / "table.md", table(found, columns))
    return table(found, columns)


def table(found: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    rows = [
        [name, *(f"{100 * scores[column]:.1f}" if column in scores else "" for column in columns)]
        for name, scores in found.items()
    ]
    return markdown(["task", *columns], rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the checkpoint: a folder, a hub name or smol-llava")
    parser.add_argument("--k", type=int, nargs="+", help="numbers of summary tokens; default: all")
    parser.add_argument("--tasks", nargs="+", help=f"names of mteb's tasks, or sets: {', '.join(SETS)}; default: all")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args(argv)
    names = [name for given in arguments.tasks or SETS for name in SETS.get(given, (given,))]
    print(
        run(
            arguments.model,
            names,
            arguments.k or [None],
            arguments.output,
            device=arguments.device,
            dtype=arguments.dtype,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
