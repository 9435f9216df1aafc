"""`fwd2bot eval compositionality`: is the true caption preferred to one with a changed or swapped word?

SugarCrepe (arXiv 2306.14610), SugarCrepe++ (arXiv 2406.11171) and Winoground (arXiv 2204.03162). A caption is scored
against an image in two ways: by the cosine of their embeddings, and by how likely the caption is as the answer to a
request to describe the image (its mean log-probability per token, our choice of normalisation).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bottleneck import embed
from ..files.records import read_records
from ..files.text import read_any_json
from .datasets import field_of
from .encode import Encoder, read_tensor, write_tensor
from .likelihood import likelihood
from .results import Score, digest


@dataclass
class Item:
    """One test: its images, its texts (the true ones first), and its kind."""

    images: list[Path]
    texts: list[str]
    kind: str


@dataclass
class Items:
    """A benchmark's tests, and how many were left out for a missing image."""

    kind: str  # sugarcrepe, sugarcrepe++, winoground
    items: list[Item] = field(default_factory=list)
    missing: int = 0


def read_items(source: Path, images: Path, skip_missing: bool = False) -> Items:
    """SugarCrepe's or SugarCrepe++'s folder of JSON files, or Winoground's examples.jsonl, recognised by their fields.

    Raises:
        FileNotFoundError, ValueError: the file is missing or holds no tests; a record has unknown fields, or one
            that is not a text; an image is missing and `skip_missing` is False.
    """
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise FileNotFoundError(2, "There is no JSON file of tests", str(source))
    found = Items("")
    for file in files:
        content = read_records(file) if file.suffix == ".jsonl" else read_any_json(file)
        if not isinstance(content, (dict, list)) or not content:
            raise ValueError(f"{file} must hold a list or an object of tests, not {str(content)[:80]}")
        for place, record in content.items() if isinstance(content, dict) else enumerate(content, 1):
            kind, item = _item(record, file, images, f"{file}, test {place}")
            if found.kind not in ("", kind):
                raise ValueError(f"{source} holds tests of {found.kind} and of {kind}: score each separately.")
            found.kind = kind
            absent = [path for path in item.images if not path.is_file()]
            if absent and not skip_missing:
                problem = f"An image of {file.name} is missing (--skip-missing leaves such tests out)"
                raise FileNotFoundError(2, problem, str(absent[0]))
            if absent:
                found.missing += 1
            else:
                found.items.append(item)
    if not found.items:
        raise ValueError(f"{images} holds none of the images of {source}.")
    return found


def _item(record: Any, file: Path, images: Path, where: str) -> tuple[str, Item]:
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, not {str(record)[:80]}")

    def text(name: str) -> str:
        return field_of(record, name, str, where)

    if "caption_0" in record:
        names = [text("image_0"), text("image_1")]
        paths = [images / (name if Path(name).suffix else f"{name}.png") for name in names]
        kind = text("collapsed_tag") if "collapsed_tag" in record else "all"
        return "winoground", Item(paths, [text("caption_0"), text("caption_1")], kind)
    if "negative_caption" in record:
        path = images / text("filename")
        if not path.is_file():  # COCO's 2017 names have no prefix
            path = images / text("filename").rsplit("_", 1)[-1]
        if "caption2" in record:
            texts = [text("caption"), text("caption2"), text("negative_caption")]
            return "sugarcrepe++", Item([path], texts, file.stem)
        return "sugarcrepe", Item([path], [text("caption"), text("negative_caption")], file.stem)
    raise ValueError(f"{where} belongs to no known benchmark; its fields are {', '.join(sorted(record)) or 'none'}.")


def about(tests: Items) -> dict[str, Any]:
    """Description of the items; `of` is a digest of images and texts, equal for results on the same items."""
    identity = json.dumps([[[path.name for path in item.images], item.texts, item.kind] for item in tests.items])
    return {"benchmark": tests.kind, "tests": len(tests.items), "missing": tests.missing, "of": digest(identity)}


def judge(kind: str, scores: Tensor, texts: Tensor | None = None) -> dict[str, bool]:
    """Whether one test is passed, for each of the benchmark's measures.

    Args:
        scores: of images with texts, [images, texts]. texts: of texts with texts, for SugarCrepe++'s text-only measure.
    """
    if kind == "sugarcrepe":
        return {"accuracy": bool(scores[0, 0] > scores[0, 1])}
    if kind == "sugarcrepe++":
        passed = {"itt": bool(scores[0, :2].min() > scores[0, 2])}
        if texts is not None:
            passed["tot"] = bool(texts[0, 1] > max(texts[0, 2], texts[1, 2]))
        return passed
    text = bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0])
    image = bool(scores[0, 0] > scores[1, 0] and scores[1, 1] > scores[0, 1])
    return {"group": text and image, "text": text, "image": image}


def compositionality(encoder: Encoder, tests: Items, ks: Sequence[int], generative: bool = True) -> list[Score]:
    """The scores for each k and way of scoring; the items are the tests, passed or not by the first measure."""
    paths = list(dict.fromkeys(path for item in tests.items for path in item.images))
    texts = list(dict.fromkeys(text for item in tests.items for text in item.texts))
    images, words = encoder.images(paths), encoder.texts(texts)
    at_image = {path: i for i, path in enumerate(paths)}
    at_text = {text: i for i, text in enumerate(texts)}
    own_images = [[at_image[path] for path in item.images] for item in tests.items]
    own_texts = [[at_text[text] for text in item.texts] for item in tests.items]
    pooling, found = encoder.model.fwd2bot_config.pooling, []
    for k in ks:
        left, right = (embed(s[:, :k].float(), pooling) for s in (images, words))
        passed = []
        for i, t in zip(own_images, own_texts, strict=True):
            passed.append(judge(tests.kind, left[i] @ right[t].T, right[t] @ right[t].T))
        found.append(_score(tests, passed, k, "embedding"))
        if generative:
            scores = _likelihoods(encoder, tests.items, [images[i][:, :k] for i in own_images], k)
            found.append(_score(tests, [judge(tests.kind, own) for own in scores], k, "likelihood"))
    return found


def _score(tests: Items, passed: list[dict[str, bool]], k: int, by: str) -> Score:
    """The share of passed tests by each measure and, by the first, of each kind of test."""
    hits = {name: [float(one[name]) for one in passed] for name in passed[0]}
    main = next(iter(hits.values()))
    kinds: dict[str, list[float]] = {}
    for item, hit in sorted(zip(tests.items, main, strict=True), key=lambda pair: pair[0].kind):
        kinds.setdefault(item.kind, []).append(hit)
    hits |= {f"{kind} ({len(own)})": own for kind, own in kinds.items()}
    figures = {name: sum(own) / len(own) for name, own in hits.items()}
    groups = [" ".join(path.name for path in item.images) for item in tests.items]
    counts = {name: len(own) for name, own in hits.items()}
    return Score(figures, {str(i): hit for i, hit in enumerate(main)}, counts, groups, k=k, by=by)


def _likelihoods(encoder: Encoder, items: Sequence[Item], states: Sequence[Tensor], k: int) -> Iterator[Tensor]:
    """[images, texts] of each test; kept in files, so that a stopped run resumes."""
    for item, state in tqdm(zip(items, states, strict=True), f"likelihood k={k}", len(items), unit="test"):
        # by summary, not by path: an image that was replaced under the same name has another summary
        seen = hashlib.sha256(state.contiguous().numpy().tobytes()).hexdigest()
        file = encoder.file(f"likelihood-k{k}", [seen, *item.texts])
        scores = read_tensor(file)
        if scores is None:
            scores = torch.stack([likelihood(encoder.model, encoder.processor, one, item.texts) for one in state])
            if not scores.isfinite().all():
                raise ValueError(
                    f"The likelihood of a text about {item.images[0]} is {scores.flatten().tolist()}: the checkpoint "
                    "is damaged or its training diverged. Try --dtype float32."
                )
            write_tensor(scores, file)
        yield scores
