"""eval/results/vllm.md, as scripts/check_vllm.py writes it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch
import transformers


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    names = list(next(iter(results.values()), {}))
    rows = [f"| {name} | " + " | ".join(str(r[name]) for r in results.values()) + " |" for name in names]
    return ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results), *rows, ""]


def page(
    results: dict[str, dict[str, Any]], compress: Sequence[str], theirs: dict[str, str], new: int, questions: int
) -> str:
    """The page.

    Args:
        results: of each column. compress: the columns of summaries. theirs: the engine's versions.
        new: tokens of an answer. questions: how many there are.
    """
    answers = {host: result for host, result in results.items() if host not in compress}
    summaries = {host: result for host, result in results.items() if host in compress}
    versions = ", ".join(f"{name} {version}" for name, version in theirs.items())
    lines = [
        "# vLLM against `generate` and `compress`",
        "",
        f"Written by `bash scripts/test_vllm.sh --output eval/results/vllm.md`, float32, CPU ({platform.machine()}),",
        f"with greedy decoding of {new} tokens: {questions} questions about one to four images, with all summary",
        "tokens and with the first half of them. vLLM is started by the command in the export.",
        "",
        f"- Engine: {versions}.",
        f"- Reference: transformers {transformers.__version__}, torch {torch.__version__}.",
        "",
        "## Answers",
        "",
        *table(answers),
        "| column | model | export |",
        "|---|---|---|",
        "| llava | random LLaVA, two layers, k = 4, linear bridge | `--to vllm`: LoRA, summaries as image embeddings |",
        "| llava_next | the same as LLaVA-NeXT | `--to vllm` |",
        "| merged | the first | `--to merged --stage answer`: plain language model, summaries as prompt embeddings |",
        "| smol-llava | the trained smol-llava, k = 16, photographs | `--to merged --stage answer` |",
        "",
        "| row | what is counted |",
        "|---|---|",
        "| identical | prompts whose ids are those of `model.generate(summary=…)`, to the last one |",
        "| identical, all at once | the same prompts, eight at a time, which vLLM batches |",
        "| different without the adapter | prompts answered otherwise by the engine's base; in the last two columns, "
        "by `generate` with the adapter off |",
        "| distinct answers | among the prompts of this column |",
        "| served alike | answers of `fwd2bot serve` with `--engine-url` that equal those without it |",
        "",
        "## Summaries",
        "",
        "Of pictures of four sizes, which the client prepares, against `model.compress`. compress_average and",
        "compress_pool have that `residual` and a trained projector. Without the adapter the engine gives other",
        "summaries; the client checks that when it connects.",
        "",
        *table(summaries),
    ]
    return "\n".join(lines)
