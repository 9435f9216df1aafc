"""Scores of captions and answers; the same code for the base and for Fwd2Bot.

Every score has one number per item, so that resample.py can make intervals and paired comparisons.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..extras import require
from ..files.text import one_line
from ..processing.normal import normal
from .scorers.pope import figures_of, says_no

_LAST = "thelastofthecaptions"  # a word that no caption consists of


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]], spice: bool = False) -> dict[str, Any]:
    """CIDEr per image, and the corpus' CIDEr, BLEU-4 and, if asked for, SPICE, by pycocoevalcap.

    Captions are tokenised by its PTB tokenizer, as official figures are; the tokenizer and SPICE need Java. An empty
    caption is scored as one without words.

    Args:
        captions: one per image. references: the human captions of each image.

    Returns:
        `{"cider": float, "bleu4": float, "spice": float | None, "per_image": [CIDEr of each], "tokenizer": "ptb"}`.
        Without Java, words are runs of letters and digits, and `tokenizer` is "simple".

    Raises:
        ImportError, ValueError, OSError: as of `check_caption_scores`; ValueError also if the tokenizer fails.
    """
    check_caption_scores(spice)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    java = shutil.which("java") is not None
    given = {i: [one_line(text)] for i, text in enumerate(captions)}
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
    """Checks that `caption_scores` can run, to be called before hours of captioning.

    Raises:
        ImportError: pycocoevalcap is missing; the message names the extra. ValueError: SPICE without Java.
        OSError: SPICE's parser, which pycocoevalcap downloads once, cannot be downloaded.
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
            problem = f"SPICE needs Stanford CoreNLP, which pycocoevalcap could not fetch ({error})"
            raise OSError(f"{problem}: go online once, or leave out --spice.") from error


def _simple(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    return {i: [" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in own] for i, own in texts.items()}


def _ptb(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    """The words of each text, by pycocoevalcap's PTB tokenizer, a Java program that reads one text per line.

    Raises:
        ValueError: the tokenizer returned another number of texts, so that scores would be of other images' captions.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # An empty last line would be lost, and a split line shifts all later ones: the sentinel at the end shows both.
    last = max(texts, default=-1) + 1
    given = {i: [{"caption": text if text.strip() else "."} for text in own] for i, own in texts.items()}
    found = PTBTokenizer().tokenize({**given, last: [{"caption": _LAST}]})
    same = found.pop(last, None) == [_LAST] and all(len(found.get(i, ())) == len(own) for i, own in texts.items())
    if not same:
        raise ValueError(
            f"The tokenizer returned other texts than the {sum(map(len, texts.values()))} captions it was given: one "
            "of them contains a character that it treats as the end of a line, or Java failed."
        )
    return found


def exact(answers: Sequence[str], truth: Sequence[str]) -> list[float]:
    """1.0 for each answer that equals the truth; lists with commas (DAQUAR) compare as sets; empty ones are wrong."""

    def parts(text: str) -> frozenset[str]:
        return frozenset(normal(part) for part in text.split(","))

    return [float(parts(a) == parts(b)) for a, b in zip(answers, truth, strict=True)]


def wups(answers: Sequence[str], truth: Sequence[str], threshold: float = 0.9) -> list[float] | None:
    """WUPS of each answer (Malinowski and Fritz, 2014): Wu-Palmer similarity of the words, matched both ways.

    A similarity below `threshold` is multiplied by 0.1. None if NLTK's WordNet is not installed
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

    return [one(a, b) for a, b in zip(answers, truth, strict=True)]


def yes_no(answers: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """POPE's figures, with "yes" as the positive class and answers read as by its script; and `per_item`.

    An empty answer is wrong whatever the label, as in `eval score`; the script reads it as yes.
    """
    wanted = [label == "yes" for label in truth]
    pairs = zip(answers, wanted, strict=True)
    predicted = [not says_no(text) if text.strip() else not right for text, right in pairs]
    hits = [float(a == b) for a, b in zip(predicted, wanted, strict=True)]
    return {**figures_of(predicted, wanted), "per_item": hits}
