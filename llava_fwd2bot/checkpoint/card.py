"""The header of a checkpoint's model card, by which the hub files it: base, task, licence, data, results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.writing import write_text

TASK = "image-text-to-text"
_FACTS = ("license", "datasets", "results")
_RESULT = ("benchmark", "metric", "value")


def front_matter(base: str, is_local: bool) -> str:
    """The header of a new card, from `---` to `---`.

    Args:
        base: the base's hub name, or its folder if `is_local`, which is not told: it says nothing elsewhere.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=None if is_local or not base else base,
        base_model_relation="adapter",
        library_name="llava_fwd2bot",
        pipeline_tag=TASK,
        tags=["llava", "fwd2bot", "sentence-similarity"],
        **_license_of(base, is_local),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _license_of(base: str, is_local: bool) -> dict[str, str]:
    """The base's licence, where its card is at hand: a checkpoint is made of the base. Else "other"."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    found = None
    if is_local:
        found = Path(base) / "README.md"
    elif base.count("/") == 1:
        cached = try_to_load_from_cache(base, "README.md")
        found = Path(cached) if isinstance(cached, str) else None
    theirs = metadata_load(found) if found is not None and found.is_file() else None
    kept = {name: theirs[name] for name in ("license", "license_name", "license_link") if name in (theirs or {})}
    return kept if "license" in kept else {"license": "other", "license_name": "of-the-base-model"}


def check_facts(facts: Mapping[str, Any]) -> None:
    """ValueError where `facts` of `add_facts` cannot be written: told before anything is saved."""
    unknown = [name for name in facts if name not in _FACTS]
    if unknown:
        raise ValueError(f"A card takes {', '.join(_FACTS)}, not {', '.join(unknown)}.")
    for name in facts.get("datasets") or ():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise ValueError(f"datasets are names on the hub, such as liuhaotian/LLaVA-Instruct-150K, not {name!r}.")
    for result in facts.get("results") or ():
        missing = [name for name in _RESULT if name not in result]
        if missing:
            raise ValueError(f"A result needs {', '.join(_RESULT)}; {dict(result)} has no {missing[0]}.")


def add_facts(card: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Writes facts into the header of the card in the file `card`; its text stays.

    Args:
        name: of the model, as the results are listed.
        facts: license: an identifier of the hub's. datasets: names on the hub, of the training data. results: each
            with benchmark, metric, value, and k where there is one; as `evaluation.results.Result` has them.
    """
    from huggingface_hub import EvalResult, ModelCard

    check_facts(facts)
    content = ModelCard(card.read_text(encoding="utf-8"))
    if facts.get("license"):
        content.data.license, content.data.license_name = facts["license"], None
    if facts.get("datasets"):
        content.data.datasets = list(facts["datasets"])
    if results := facts.get("results"):
        content.data.model_name = name
        content.data.eval_results = [
            EvalResult(
                task_type=TASK,
                dataset_type=re.sub(r"[^\w.-]+", "-", str(result["benchmark"])).strip("-").lower(),
                dataset_name=str(result["benchmark"]),
                metric_type=str(result["metric"]),
                metric_value=result["value"],
                metric_name=_metric(result),
            )
            for result in results
        ]
    write_text(card, str(content))


def _metric(result: Mapping[str, Any]) -> str:
    k: Any = result.get("k")
    return str(result["metric"]) if k is None else f"{result['metric']}, k = {k}"


def results_of(found: Sequence[Any]) -> list[dict[str, Any]]:
    """What `add_facts` takes, of results that `evaluation.results.read_results` gave."""
    return [{"benchmark": r.benchmark, "metric": r.metric, "value": r.value, "k": r.k} for r in found]
