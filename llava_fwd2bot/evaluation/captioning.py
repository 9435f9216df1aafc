"""`fwd2bot eval captioning`: one sentence per image, scored against human captions by CIDEr, BLEU-4 and SPICE."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..files.records import read_records
from .answers import DENSE, Answerer, answer_questions
from .datasets import Captioned
from .likelihood import DESCRIBE
from .metrics import caption_scores, check_caption_scores
from .results import Score, digest


def captioning(
    answerer: Answerer,
    data: Captioned,
    ks: Sequence[int],
    work: Path,
    model: str,
    with_base: bool = False,
    spice: bool = False,
) -> list[Score]:
    """The scores for each k, with `with_base` the base's first; the items are the images, each with its CIDEr.

    Captions are kept in `work`, a file per k, from which a stopped run resumes. Empty captions are scored as they are;
    a warning names them.

    Raises:
        ImportError, ValueError, OSError: a requirement of the scores is missing; raised before captioning begins.
    """
    check_caption_scores(spice)
    encoder, scores = answerer.encoder, []
    paths = [path.resolve() for path in data.paths]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = [str(path.relative_to(root)) for path in paths]
    # by content: an image that was replaced under the same name is captioned again
    contents = [str(root), *names, *encoder.digests(paths)]
    questions = [{"question_id": n, "image": name, "text": DESCRIBE} for n, name in enumerate(names)]
    for k in [*([DENSE] if with_base else []), *ks]:
        answers = (
            work / f"captions-{data.name}-{digest(*contents, *map(str, answerer.settings(k).values()))}-k{k}.jsonl"
        )
        answer_questions(answerer, questions, root, answers, k, model)
        captions = {line["question_id"]: line["text"] for line in read_records(answers, lines=True)}
        found = caption_scores([captions[n] for n in range(len(data))], data.captions, spice)
        each = {str(n): score for n, score in enumerate(found["per_image"])}
        figures = {name: found[name] for name in ("cider", "bleu4", "spice") if found[name] is not None}
        empty = [name for n, name in enumerate(names) if not captions[n].strip()]
        by = "" if found["tokenizer"] == "ptb" else f"{found['tokenizer']} tokenizer"  # not to be compared
        scores.append(Score(figures, each, k=k or "dense", by=by, empty=len(empty)))
        if empty:
            problem = f"{len(empty)} of {len(names)} captions are empty and are scored as such; the first: "
            print(f"fwd2bot: k={k or 'dense'}: {problem}{', '.join(empty[:3])}", file=sys.stderr)
    return scores
