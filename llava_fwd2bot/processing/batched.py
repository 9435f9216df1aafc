"""Answers to many questions at once, by one `generate`: each row has its own length, end, sampling and reader.

Shapes: B rows, V vocabulary, k summary tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .generate import contiguous_head

# criteria stop each row by itself; before 4.39 they stop all or none
_ROW_BY_ROW = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 39)
SLICE = 32  # tokens after which a long answer lets others in
# settings of generate that count tokens from the prompt: an answer that goes on would count anew
_COUNTED = ("min_length", "min_new_tokens", "begin_suppress_tokens", "forced_bos_token_id")
_COUNTED += ("forced_eos_token_id", "exponential_decay_length_penalty")


@dataclass
class Answer:
    """A question on its way to its answer.

    Args:
        ids: of the prompt, with one image token for each image, [T].
        summaries: of its images, [k, D] each; k may differ.
        max_new_tokens, stop, temperature, top_p, seed: as of OpenAI's requests; temperature 0 is greedy decoding.
        min_new_tokens: before which the answer does not end by itself.
        emit: called with each piece of the answer; None where only the whole is wanted.
        cancelled: whether nobody waits for it any more.
        begun: called at the first token.

    Attributes:
        tokens: that were generated so far.
        reason: why it ended, "stop" or "length"; None while it goes on.
    """

    ids: Tensor
    summaries: Sequence[Tensor]
    tokenizer: Any
    question: str = ""  # as an engine elsewhere takes it
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    min_new_tokens: int = 0
    emit: Callable[[str], None] | None = None
    cancelled: Callable[[], bool] = lambda: False
    begun: Callable[[], None] = lambda: None
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    text: str = ""  # without what may yet be changed by the next token
    _random: torch.Generator | None = None

    def expanded(self, image_token: int) -> Tensor:
        """The ids so far, with one image token for each summary token."""
        lengths = torch.ones_like(self.ids)
        lengths[self.ids == image_token] = torch.tensor([len(s) for s in self.summaries], dtype=self.ids.dtype)
        return torch.cat([self.ids.repeat_interleave(lengths), torch.tensor(self.tokens, dtype=self.ids.dtype)])

    def take(self, token: int, ends: set[int]) -> None:
        """The next token."""
        if not self.tokens:
            self.begun()
        self.tokens.append(token)
        if token in ends:
            self.reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.reason = "length"
        if self.emit is not None or self.stop or self.reason:
            self._read()

    def _read(self) -> None:
        """Brings `text` up to date, and gives the new piece away."""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip()
        ends = [at for stop in self.stop if (at := whole.find(stop)) >= 0]
        if ends:
            whole, self.reason = whole[: min(ends)].strip(), "stop"
        if self.reason is None:
            whole = self._settled(whole)
        if whole.startswith(self.text) and len(whole) > len(self.text):
            piece, self.text = whole[len(self.text) :], whole
            if self.emit is not None:
                self.emit(piece)

    def _settled(self, text: str) -> str:
        """Without half of a character at the end, and without what may be the beginning of a stop."""
        text = text.rstrip("\ufffd")
        for stop in self.stop:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    text = text[:-size].rstrip()
                    break
        return text

    def draw(self, scores: Tensor) -> Tensor:
        """Scores [V] whose largest is a token drawn at this answer's temperature, from its own random numbers."""
        if not self.temperature:
            return scores
        if self._random is None:
            self._random = torch.Generator()
            if self.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(self.seed)
        scores = scores.float() / self.temperature
        if self.top_p < 1:
            ordered, at = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # [V], of what is likelier
            scores = scores.index_fill(0, at[before >= self.top_p], -torch.inf)
        # the largest of scores with Gumbel noise is a draw from their softmax
        noise = torch.rand(scores.shape, generator=self._random).clamp_min_(1e-20).to(scores.device)
        return scores - (-noise.log()).log()


class Rows:
    """The rows of one `generate`, and the streamer that it gives their tokens to.

    Args:
        leave: (rows that go on, tokens of this run) → whether to stop now and go on later.
        image_token: an answer that holds this id goes on to its end: in a prompt it would stand for an image.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        ends: set[int],
        leave: Callable[[int, int], bool],
        image_token: int | None = None,
    ) -> None:
        self.answers, self.ends, self.leave, self.image_token = answers, ends, leave, image_token
        self.prompt_seen, self.steps = False, 0

    def options(self) -> dict[str, Any]:
        """Of `generate`: greedy, as rows that are drawn at random bring their own noise."""
        return {
            "max_new_tokens": max(answer.max_new_tokens - len(answer.tokens) for answer in self.answers),
            "do_sample": False,
            "num_beams": 1,
            "logits_processor": LogitsProcessorList([_Draw(self)]),
            "stopping_criteria": StoppingCriteriaList([_Stop(self)]),
            "streamer": self,
        }

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # the first ids are the prompt
            self.prompt_seen = True
            return
        self.steps += 1
        for answer, token in zip(self.answers, value.tolist(), strict=True):
            if answer.reason is None and not answer.cancelled():
                answer.take(token, self.ends)

    def end(self) -> None:
        pass


class _Draw(LogitsProcessor):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        short = [len(answer.tokens) < answer.min_new_tokens for answer in self.rows.answers]
        if any(short) and self.rows.ends:
            rows, ends = torch.tensor(short, device=scores.device), sorted(self.rows.ends)
            scores = scores.clone()
            scores[:, ends] = scores[:, ends].masked_fill(rows[:, None], -torch.inf)
        if not any(answer.temperature for answer in self.rows.answers):
            return scores
        return torch.stack([a.draw(row).to(scores.dtype) for a, row in zip(self.rows.answers, scores, strict=True)])


class _Stop(StoppingCriteria):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = [answer.reason is not None or answer.cancelled() for answer in self.rows.answers]
        open_answers = [answer for answer, ended in zip(self.rows.answers, done, strict=True) if not ended]
        fixed = any(self.rows.image_token in answer.tokens for answer in open_answers)
        if open_answers and not fixed and self.rows.leave(len(open_answers), self.rows.steps):
            done = [True] * len(done)
        return torch.tensor(done, device=input_ids.device) if _ROW_BY_ROW else all(done)


@torch.inference_mode()
def run(
    model: Any, answers: Sequence[Answer], leave: Callable[[int, int], bool] = lambda going, steps: False
) -> list[Answer]:
    """Generates the answers, left padded, in one batch.

    Summary tokens stand as images of one token each, so that rows may have different k.

    Returns:
        Those that are not finished because `leave` said so; `run` goes on with them.
    """
    config, image_token = model.generation_config, model._image_token_id()
    if any(getattr(config, name, None) for name in _COUNTED):
        leave = lambda going, steps: False  # noqa: E731
    prompts = [answer.expanded(image_token) for answer in answers]
    longest = max(map(len, prompts))
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(prompts):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    device = model.get_input_embeddings().weight.device
    given: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "pad_token_id": pad}
    like = model.fwd2bot.tokens.dtype
    tokens = [summary.to(device, like) for answer in answers for summary in answer.summaries]
    if tokens:
        given["summary"] = torch.cat(tokens)[:, None]  # [all k, 1, D]
    rows = Rows(answers, ends_of(model), leave, image_token)
    with contiguous_head(model):
        model.generate(**given, **rows.options())
    return [answer for answer in answers if answer.reason is None and not answer.cancelled()]


def ends_of(model: Any) -> set[int]:
    """The ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
