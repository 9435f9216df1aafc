"""`fwd2bot eval captioning`: one sentence per image, scored against human captions by CIDEr, BLEU-4 and SPICE."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.records import read_records
from .answers import DENSE, Answerer, answer_questions
from .datasets import Captioned
from .likelihood import DESCRIBE
from .metrics import caption_scores, check_caption_scores


def captioning(
    answerer: Answerer,
    data: Captioned,
    ks: Sequence[int],
    work: Path,
    model: str,
    with_base: bool = False,
    spice: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """The scores for each k (with `with_base` the base's first), and the CIDEr of each image.

    Captions are kept in `work`, a file per k, from which a stopped run resumes. Empty captions are scored as they are;
    a row counts them as `empty`, and a warning names them.

    Raises:
        ImportError, ValueError, OSError: a requirement of the scores is missing; raised before captioning begins.
    """
    check_caption_scores(spice)
    rows, per_item = [], {}
    paths = [path.resolve() for path in data.paths]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = [str(path.relative_to(root)) for path in paths]
    model_hash, *width = answerer.encoder.fingerprint.split()  # a quantised model counts as another one
    fingerprint = "-".join([model_hash[:12], *width])
    # by content: an image that was replaced under the same name is captioned again
    encoder = answerer.encoder
    how = [str(root), str(answerer.max_new_tokens), str(encoder.model.dtype), encoder.made_by]
    identity = "\n".join([*how, *names, *encoder.digests(paths)])
    items = hashlib.sha256(identity.encode()).hexdigest()[:8]
    questions = [{"question_id": n, "image": name, "text": DESCRIBE} for n, name in enumerate(names)]
    for k in [*([DENSE] if with_base else []), *ks]:
        answers = work / f"captions-{data.name}-{items}-{fingerprint}-k{k}.jsonl"
        answer_questions(answerer, questions, root, answers, k, model)
        captions = {line["question_id"]: line["text"] for line in read_records(answers, lines=True)}
        found = caption_scores([captions[n] for n in range(len(data))], data.captions, spice)
        per_item[f"k={k or 'dense'}"] = found.pop("per_image")
        row = {"k": k or "dense", "by": "greedy", **{name: x for name, x in found.items() if x is not None}}
        empty = [name for n, name in enumerate(names) if not captions[n].strip()]
        if empty:
            row["empty"] = len(empty)
            shown = ", ".join(empty[:3])
            problem = f"{len(empty)} of {len(names)} captions are empty and are scored as such; the first: {shown}"
            print(f"fwd2bot: k={k or 'dense'}: {problem}", file=sys.stderr)
        rows.append(row)
    return rows, per_item
