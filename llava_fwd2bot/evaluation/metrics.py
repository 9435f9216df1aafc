"""Scores: captions, questions, yes/no, retrieval; and bootstrap intervals. The same code for the base and for Fwd2Bot.

Every score comes as one number per item, so that intervals and paired comparisons can be made of it later.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..extras import require
from ..files.text import one_line
from .scorers.pope import figures_of, says_no

_LAST = "thelastofthecaptions"  # one word, which no caption is


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]], spice: bool = False) -> dict[str, Any]:
    """CIDEr per image, and the corpus' CIDEr, BLEU-4 and, if asked for, SPICE, by pycocoevalcap.

    Tokenised by its PTB tokenizer, as the official figures are; that and SPICE need Java. An empty caption is scored
    as one without words.

    Args:
        said: one caption per image. references: the human captions of each image.

    Returns:
        `{"cider": float, "bleu4": float, "spice": float | None, "per_image": [CIDEr of each], "tokenizer": "ptb"}`.
        Without Java the captions are split at what is no letter or digit, and `tokenizer` says "simple".

    Raises:
        ImportError, ValueError, OSError: as of `check_caption_scores`; ValueError as well where the tokenizer fails.
    """
    check_caption_scores(spice)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    java = shutil.which("java") is not None
    given = {i: [one_line(text)] for i, text in enumerate(said)}
    truth = {i: [one_line(text) for text in texts] for i, texts in enumerate(references)}
    words = _ptb if java else _simple
    given, truth = words(given), words(truth)
    cider, each = Cider().compute_score(truth, given)
    bleu, _ = Bleu(4).compute_score(truth, given, verbose=0)
    found: dict[str, Any] = {"cider": float(cider), "bleu4": float(bleu[3]), "spice": None}
    if spice:
        from pycocoevalcap.spice.spice import Spice

        found["spice"] = float(Spice().compute_score(truth, given)[0])
    return {**found, "per_image": [float(x) for x in each], "tokenizer": "ptb" if java else "simple"}


def check_caption_scores(spice: bool = False) -> None:
    """Whether `caption_scores` can run: asked before hours of captioning, not after them.

    Raises:
        ImportError: pycocoevalcap is missing; the message names the extra. ValueError: SPICE without Java.
        OSError: SPICE's parser, which pycocoevalcap fetches once, cannot be had.
    """
    for module in ("pycocoevalcap.bleu.bleu", "pycocoevalcap.cider.cider"):
        require(module, "eval", "Scoring captions")
    if spice and shutil.which("java") is None:
        raise ValueError("SPICE needs Java, which is not installed: leave out --spice.")
    if spice:
        from pycocoevalcap.spice.spice import Spice

        try:
            Spice()
        except OSError as error:
            told = f"SPICE needs Stanford CoreNLP, which pycocoevalcap could not fetch ({error})"
            raise OSError(f"{told}: go online once, or leave out --spice.") from error


def _simple(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    return {i: [" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in own] for i, own in texts.items()}


def _ptb(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    """The words of each text, by pycocoevalcap's PTB tokenizer, a Java program that reads a text in each line.

    Raises:
        ValueError: what it gave back are not the same texts; then every score would be of another image's caption.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # An empty line at the end would be lost, and one that is split moves all later ones: the last one shows either.
    last = max(texts, default=-1) + 1
    given = {i: [{"caption": text if text.strip() else "."} for text in own] for i, own in texts.items()}
    found = PTBTokenizer().tokenize({**given, last: [{"caption": _LAST}]})
    same = found.pop(last, None) == [_LAST] and all(len(found.get(i, ())) == len(own) for i, own in texts.items())
    if not same:
        raise ValueError(
            f"The tokenizer gave back other texts than the {sum(map(len, texts.values()))} captions that it was given: "
            "one of them holds a character that it takes for the end of a line, or Java failed."
        )
    return found


def normal(answer: str) -> str:
    """An answer as it is compared: lower case, without an end mark, articles or doubled spaces.

    What is nothing else stays, or an empty answer would be the option "A".
    """
    text = answer.strip().lower()
    words = re.sub(r"[.!?]+$", "", text).replace("_", " ").split() or text.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def exact(said: Sequence[str], truth: Sequence[str]) -> list[float]:
    """1 where the answers agree; a list of several words (DAQUAR) must agree as a set. An empty answer is wrong."""

    def parts(text: str) -> frozenset[str]:
        return frozenset(normal(part) for part in text.split(","))

    return [float(parts(a) == parts(b)) for a, b in zip(said, truth, strict=True)]


def wups(said: Sequence[str], truth: Sequence[str], threshold: float = 0.9) -> list[float] | None:
    """WUPS of each answer (Malinowski and Fritz, 2014): Wu-Palmer similarity of the words, matched both ways.

    Below `threshold` a similarity counts a tenth. None where NLTK's WordNet is not installed
    (`python -m nltk.downloader wordnet`).
    """
    try:
        from nltk.corpus import wordnet

        wordnet.synsets("chair")
    except (ImportError, LookupError, OSError):
        return None
    known: dict[tuple[str, str], float] = {}

    def alike(a: str, b: str) -> float:
        if a == b:
            return 1.0
        if (a, b) not in known:
            first, second = (wordnet.synsets(word.replace(" ", "_"), pos="n") for word in (a, b))
            best = max((x.wup_similarity(y) or 0.0 for x in first for y in second), default=0.0)
            known[a, b] = best if best >= threshold else 0.1 * best
        return known[a, b]

    def one(answer: str, wanted: str) -> float:
        a, b = ([normal(part) for part in text.split(",")] for text in (answer, wanted))
        forth = np.prod([max(alike(x, y) for y in b) for x in a])
        back = np.prod([max(alike(x, y) for x in a) for y in b])
        return float(min(forth, back))

    return [one(a, b) for a, b in zip(said, truth, strict=True)]


def yes_no(said: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """POPE's figures, "yes" being the positive, answers read as by its script; and `per_item`.

    An empty answer is wrong, whatever is right, as in `eval score`: the script reads it as yes.
    """
    wanted = [label == "yes" for label in truth]
    pairs = zip(said, wanted, strict=True)
    answers = [not says_no(text) if text.strip() else not right for text, right in pairs]
    hits = [float(a == b) for a, b in zip(answers, wanted, strict=True)]
    return {**figures_of(answers, wanted), "per_item": hits}


def bootstrap(
    values: Sequence[float],
    against: Sequence[float] | None = None,
    rounds: int = 2000,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, or of its ratio to the mean of `against`, item by item (paired).

    Draws in which `against` sums to 0 have no ratio, and are left out.

    Args:
        groups: of each item, what it is drawn together with: questions about one image are not independent.
    """
    columns = [np.asarray(values, dtype=float)]
    if against is not None:
        columns.append(np.asarray(against, dtype=float))
        if columns[1].shape != columns[0].shape:
            raise ValueError(f"a paired comparison needs the same items: {len(columns[0])} and {len(columns[1])}")
    if groups is not None:
        if len(groups) != len(columns[0]):
            raise ValueError(f"{len(columns[0])} items, but groups of {len(groups)}")
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        columns = [np.bincount(group, weights=column) for column in columns] + [np.bincount(group).astype(float)]
    generator, drawn = np.random.default_rng(seed), []
    for _ in range(rounds):  # one at a time: a benchmark may have 200,000 items
        picked = generator.integers(0, len(columns[0]), len(columns[0]))
        sums = [column[picked].sum() for column in columns]
        under = sums[1] if against is not None else sums[-1] if groups is not None else len(picked)
        if under > 0:
            drawn.append(sums[0] / under)
    if not drawn:
        raise ValueError("there is no ratio to what is 0 in every item")
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
