"""`fwd2bot eval answer`: answers to a file of questions, in LLaVA's format, from summaries or from the base.

It is `llava.eval.model_vqa_loader` for models of transformers' layout: its question files in, its answers files out. A
run that was stopped resumes with the same answers: decoding is greedy, in the same batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files.records import read_records
from ..files.resumable import resumable_lines
from ..files.text import json_line
from ..processing.answer import answers_to
from ..processing.conversation import ConversationFormatter
from ..processing.images import open_image, prepared_size
from .encode import Encoder

DENSE = 0  # this k means the base with all its dense tokens


class Answerer:
    """Greedy answers of one model, from k summary tokens of an image, or from all its dense tokens (k = 0)."""

    def __init__(self, encoder: Encoder, max_new_tokens: int = 128, batch_size: int = 16) -> None:
        self.encoder, self.max_new_tokens, self.batch_size = encoder, max_new_tokens, batch_size
        self.formatter = ConversationFormatter(encoder.processor)

    def settings(self, k: int) -> dict[str, Any]:
        """What the answers depend on, besides model, image and question; those of other settings are not mixed."""
        encoder = self.encoder
        found = {"k": k or "dense", "fingerprint": encoder.fingerprint, "max_new_tokens": self.max_new_tokens}
        found |= {"made_by": encoder.made_by, "dtype": str(encoder.model.dtype)[6:]}
        return found | ({"codec": encoder.codec.name} if encoder.codec is not None and k != DENSE else {})

    def __call__(
        self, paths: Sequence[Path], questions: Sequence[str], k: int, done: Collection[int] = ()
    ) -> Iterator[tuple[int, str]]:
        """Yields (index, answer) for each question about its image; questions of similar length share a batch.

        Args:
            done: indices to leave out. The batches are those of a run without `done`, because in low precision an
                answer can depend on its batch; a batch that is partly done is answered again.
        """
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i]), i))
        unique = list(dict.fromkeys(paths))
        at = {path: i for i, path in enumerate(unique)}
        states = self.encoder.images(unique) if k != DENSE and unique else None  # [images, K, D]
        model, processor = self.encoder.model, self.encoder.processor
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            if all(i in done for i in part):
                continue
            prompts = [self.formatter.prompt(questions[i]) for i in part]
            if states is not None:
                rows: list[Any] = [states[at[paths[i]], None, :k] for i in part]  # [1, k, D] of each
            else:
                rows = [[open_image(paths[i], prepared=prepared_size(processor))] for i in part]
            options = {"max_new_tokens": self.max_new_tokens}
            texts = answers_to(model, processor, prompts, rows, states is None, None, options)
            yield from ((i, text) for i, text in zip(part, texts, strict=True) if i not in done)


def read_questions(file: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """LLaVA's question file: lines of question_id, image and text.

    Raises:
        ValueError: a field is missing or of the wrong type, or a question occurs twice. One id may have several
            questions, as in LLaVA's files of TextVQA and MME, where it identifies the image.
    """
    questions = read_records(file, lines=True)[:limit]
    seen = set()
    for number, line in enumerate(questions, 1):
        missing = [name for name in ("question_id", "image", "text") if name not in line]
        if missing:
            raise ValueError(f"{file}, question {number} has no {' and no '.join(missing)}.")
        wrong = [name for name in ("image", "text") if not isinstance(line[name], str)]
        if wrong:
            raise ValueError(f"{file}, question {number}: {wrong[0]} must be a text, not {line[wrong[0]]!r}.")
        if not isinstance(line["question_id"], (str, int)):
            raise ValueError(
                f"{file}, question {number}: question_id must be a text or a number, not {line['question_id']!r}."
            )
        if (key := (line["question_id"], line["text"])) in seen:
            raise ValueError(f"{file} has question_id {key[0]!r} twice with the same text. Remove one of them.")
        seen.add(key)
    return questions


def answer_questions(
    answerer: Answerer,
    questions: Sequence[dict[str, Any]],
    images: Path,
    answers: Path,
    k: int,
    model: str,
    limit: int | None = None,
) -> dict[str, Any]:
    """Answers the questions that the file `answers` lacks; each answer is written at once.

    Args:
        questions: as of `read_questions`. limit: answer only the first questions; `answers` may hold more.

    Returns:
        {"answers": path, "questions": their number, "answered_before": how many the file already held}.

    Raises:
        FileNotFoundError: an image is missing. ValueError: `answers` was made by another model, preparation or k, or an
            image has changed since its question was answered.
    """
    whole, questions = questions, questions[:limit]
    absent = [line["image"] for line in questions if not (images / line["image"]).is_file()]
    if absent:
        problem = f"{len(absent)} of {len(questions)} questions are about images that are missing, the first"
        raise FileNotFoundError(2, problem, str(images / absent[0]))
    about = {"model_id": model, "metadata": answerer.settings(k)}
    paths = [images / line["image"] for line in questions]
    contents = answerer.encoder.digests(paths)
    done = {i for i in _done(answers, about, whole, contents) if i < len(questions)}
    answers.parent.mkdir(parents=True, exist_ok=True)
    with (
        answers.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=len(done), unit="question", desc=f"answer k={k or 'dense'}") as bar,
    ):
        for i, text in answerer(paths, [line["text"] for line in questions], k, done):
            line = {"question_id": questions[i]["question_id"], "image": questions[i]["image"]}
            line |= {"prompt": questions[i]["text"], "text": text, "image_sha256": contents[i], **about}
            file.write(json_line(line))
            file.flush()
            bar.update()
    return {"answers": str(answers), "questions": len(questions), "answered_before": len(done)}


# key of an answer's metadata → its name in messages
_SETTINGS = {name: name for name in ("k", "max_new_tokens", "dtype", "codec")} | {"fingerprint": "checkpoint"}


def _difference(line: dict[str, Any], about: dict[str, Any]) -> str:
    """How the run that wrote `line` differs from the run described by `about`, as the rest of a sentence."""
    there = line.get("metadata")
    if "question_id" not in line or not isinstance(there, dict):
        return "was not written by `fwd2bot eval answer`"
    pairs = [("model", line.get("model_id"), about["model_id"])]
    pairs += [(name, there.get(key), about["metadata"].get(key)) for key, name in _SETTINGS.items()]
    differences = [f"{name} = {before}, not {now}" for name, before, now in pairs if before != now]
    other = "another image processor, tokenizer or model configuration"
    return f"was made with {'; '.join(differences) or other}"


def _done(
    answers: Path, about: dict[str, Any], questions: Sequence[dict[str, Any]], contents: Sequence[str] = ()
) -> set[int]:
    """The indices of the questions that `answers` holds.

    Args:
        contents: SHA-256 digests of the images of the first questions.

    Raises:
        ValueError: `answers` was made with another model, k or precision, or an id in it belongs to another question or
            image, or the image has changed.
    """

    def check(line: dict[str, Any]) -> None:
        if "question_id" not in line or any(line.get(name) != value for name, value in about.items()):
            raise ValueError(f"{answers} {_difference(line, about)}. Choose another file with --answers.")

    done, places = set(), {}
    for i, line in enumerate(questions):
        places.setdefault(line["question_id"], {})[line["text"]] = i
    for line in resumable_lines(answers, '{"question_id": ', check):
        own = places.get(line["question_id"])
        if own is None:  # of a longer file of questions
            continue
        i = own.get(line.get("prompt"))
        wanted = questions[next(iter(own.values())) if i is None else i]
        for name, now in (("image", wanted["image"]), ("prompt", wanted["text"])):
            if line.get(name) != now:
                raise ValueError(
                    f"{answers}: the answer to {line['question_id']!r} is about the {name} {line.get(name)!r}, not "
                    f"about {now!r}. Choose another file with --answers, or another --work."
                )
        if i < len(contents) and line.get("image_sha256") != contents[i]:
            raise ValueError(
                f"{answers}: {wanted['image']} has changed since question {line['question_id']!r} was answered. Choose "
                "another file with --answers, or remove that line."
            )
        done.add(i)
    return done
