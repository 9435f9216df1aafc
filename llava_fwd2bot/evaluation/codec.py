"""`fwd2bot eval codec`: retrieval and answers from summaries that went through each codec of a cache.

Images are compressed once. Captions are queries, which are not stored, and go through no codec. The other codecs are
compared with float16 item by item, which is less noisy than a comparison of accuracies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..bottleneck import embed
from ..cache.codecs import CODECS, Codec, get_codec
from .answers import DENSE, Answerer, read_questions
from .datasets import Captioned
from .encode import Encoder
from .metrics import exact
from .search import ranks, recalls
from .tables import markdown, percent, title

REFERENCE = "float16"
CHUNK = 64  # images decoded at once


class Decoded:
    """An encoder whose summaries were encoded and decoded by a codec."""

    def __init__(self, encoder: Encoder, paths: Sequence[Path], states: Tensor, codec: Codec) -> None:
        self.model, self.processor, self.fingerprint = encoder.model, encoder.processor, encoder.fingerprint
        self.place, self.states, self.codec = {path: i for i, path in enumerate(paths)}, states, codec

    def images(self, paths: Sequence[Path]) -> Tensor:
        return through(self.codec, self.states[[self.place[path] for path in paths]])


def through(codec: Codec, states: Tensor) -> Tensor:
    """[N, k, D] → [N, k, D] float32, encoded and decoded."""
    return torch.cat([codec.decode(codec.encode(part), states.shape[2]) for part in states.split(CHUNK)])


def codecs(
    answerer: Answerer,
    data: Captioned | None,
    ks: Sequence[int],
    names: Sequence[str] = tuple(CODECS),
    questions: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Errors, retrieval and accuracy for each codec and k.

    Args:
        data: images and captions, for retrieval and the error; None: answers only.
        questions: lines of question_id, image, text and answer; None: retrieval only.
        images: the folder of the questions' images; default: that of `questions`.
        limit: use only the first questions.

    Returns:
        (rows, {name: value of each item}): for each codec and k the rank of each caption's image (from 0), whether each
        answer is correct, and whether it equals float16's.

    Raises:
        ValueError, FileNotFoundError: as of `checked`; k is 0.
    """
    if DENSE in ks:
        raise ValueError("Codecs encode summaries, so k must be at least 1.")
    chosen, lines = checked(data, names, questions, images, limit)
    size = answerer.encoder.like.shape[1]
    rows: dict[tuple[str, int], dict[str, Any]] = {
        (c.name, k): {"k": k, "by": c.name, "bytes_per_image": k * c.bytes_per_token(size)} for c in chosen for k in ks
    }
    per_item: dict[str, list[float]] = {}
    if data is not None:
        _retrieve(answerer.encoder, data, ks, chosen, rows, per_item)
    if questions is not None:
        _answer(answerer, lines, ks, chosen, rows, per_item)
    return [rows[name, k] for k in ks for name in names], per_item


def checked(
    data: Captioned | None,
    names: Sequence[str] = tuple(CODECS),
    questions: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
) -> tuple[list[Codec], list[dict[str, Any]]]:
    """The codecs, float16 first, and the questions with their answers, `image` being a path: before a model is loaded.

    Raises:
        ValueError: neither captions nor questions are given, a codec is unknown, or a question has no answer.
        FileNotFoundError: the question file or an image is missing.
    """
    if data is None and questions is None:
        raise ValueError(
            "Codecs are compared on captions, on questions or on both: give --dataset, --questions or both."
        )
    chosen = [get_codec(name) for name in dict.fromkeys([REFERENCE, *names])]
    return chosen, _read_asked(questions, images, limit) if questions is not None else []


def _read_asked(questions: Path, images: Path | None, limit: int | None = None) -> list[dict[str, Any]]:
    lines = read_questions(questions, limit)
    unanswered = [
        line["question_id"]  # which may have several questions
        for line in lines
        if not isinstance(line.get("answer"), str) or not line["answer"].strip()
    ]
    if unanswered or not lines:
        reason = f"question {unanswered[0]!r} has no answer" if unanswered else "there is no question"
        raise ValueError(f"{questions}: {reason}. Each line needs question_id, image, text and answer.")
    folder = questions.parent if images is None else images
    lines = [{**line, "image": folder / line["image"]} for line in lines]
    absent = [line["image"] for line in lines if not line["image"].is_file()]
    if absent:
        problem = f"{len(absent)} of {len(lines)} questions are about images that are missing, the first"
        raise FileNotFoundError(2, problem, str(absent[0]))
    return lines


def _retrieve(
    encoder: Encoder, data: Captioned, ks: Sequence[int], chosen: list[Codec], rows: dict, per_item: dict
) -> None:
    states = encoder.images(data.paths)  # [N, K, D]
    texts = encoder.texts([text for captions in data.captions for text in captions])
    owner = torch.tensor([i for i, captions in enumerate(data.captions) for _ in captions])
    pooling = encoder.model.fwd2bot_config.pooling
    for codec in chosen:
        decoded = through(codec, states)
        for k in ks:
            left, right, exactly = (embed(s[:, :k].float(), pooling) for s in (decoded, texts, states))
            t2i, i2t = ranks(left, right, owner)
            found = {name: value for name, value in recalls(t2i, i2t).items() if "median" not in name}
            cosine = F.cosine_similarity(left, exactly).mean().item()
            rows[codec.name, k] |= {"relative_error": relative_error(states[:, :k], decoded[:, :k]), "cosine": cosine}
            rows[codec.name, k] |= found
            per_item[f"rank {codec.name} k={k}"] = t2i.tolist()


def relative_error(states: Tensor, decoded: Tensor) -> float:
    """Norm of the error over norm of the token, averaged over tokens that are not 0."""
    parts = zip(states.split(CHUNK), decoded.split(CHUNK), strict=True)
    return torch.cat([(a.float() - b).norm(dim=-1) / a.float().norm(dim=-1) for a, b in parts]).nanmean().item()


def _answer(
    answerer: Answerer, lines: list[dict[str, Any]], ks: Sequence[int], chosen: list[Codec], rows: dict, per_item: dict
) -> None:
    paths, truth = [line["image"] for line in lines], [line["answer"] for line in lines]
    unique = list(dict.fromkeys(paths))
    states = answerer.encoder.images(unique)
    first: dict[int, list[str]] = {}
    bar = tqdm(total=len(chosen) * len(ks) * len(lines), desc="answer", unit="question")
    for codec in chosen:  # float16 is the first
        decoded = Decoded(answerer.encoder, unique, states, codec)
        one = Answerer(decoded, answerer.max_new_tokens, answerer.batch_size)
        for k in ks:
            answers = [""] * len(lines)
            for i, text in one(paths, [line["text"] for line in lines], k):
                answers[i] = text
                bar.update()
            empty = [str(line["question_id"]) for line, text in zip(lines, answers, strict=True) if not text.strip()]
            if empty:
                problem = f"{len(empty)} of {len(lines)} answers are empty and count as wrong; the first: "
                bar.write(f"fwd2bot: {codec.name} k={k}: {problem}{', '.join(empty[:3])}", file=sys.stderr)
            hits, reference = exact(answers, truth), first.setdefault(k, answers)
            same = [float(a == b) for a, b in zip(answers, reference, strict=True)]
            per_item[f"accuracy {codec.name} k={k}"], per_item[f"same {codec.name} k={k}"] = hits, same
            rows[codec.name, k] |= {"accuracy": sum(hits) / len(hits), "same_answers": sum(same) / len(same)}
    bar.close()


def table(found: dict[str, Any]) -> str:
    """The result as Markdown: bytes per image, errors, and percentages with the number of items below.

    Args:
        found: the result of `fwd2bot eval codec`. `images`, `captions` and `questions` are missing in older ones, whose
            items are then counted in `per_item`.
    """
    items = {name: found[name] for name in ("images", "captions", "questions") if found.get(name)}
    for kind, name in (("rank", "captions"), ("accuracy", "questions")):
        own = (values for key, values in found.get("per_item", {}).items() if key.startswith(kind))
        if name not in items and (values := next(own, None)):
            items[name] = len(values)
    names = [name for name, value in found["rows"][0].items() if isinstance(value, float)]

    def cell(name: str, value: float) -> str:
        if name in ("relative_error", "cosine"):  # means over tokens and vectors, not shares of items
            return f"{100 * value:.2f}"
        kind = "captions" if name.startswith("t2i") else "images" if name.startswith("i2t") else "questions"
        return percent(value, items.get(kind, 0))

    rows = [
        [str(row["k"]), row["by"], f"{row['bytes_per_image']:,}", *(cell(n, row[n]) for n in names)]
        for row in found["rows"]
    ]
    counts = ", ".join(f"{count:,} {name}" for name, count in items.items())
    below = "Percentages, apart from k and the bytes." + f" n = {counts}." * bool(counts)
    return f"{markdown(['k', 'codec', 'bytes per image', *map(title, names)], rows)}\n\n{below}"
