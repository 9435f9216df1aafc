"""Log-probability of an answer, given an image's summary and a question: generative scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..processing.conversation import PLACEHOLDER, ConversationFormatter
from ..training.collator import IGNORE_INDEX
from ..training.data import with_labels

DESCRIBE = "Describe the image in one sentence."


def likelihood(
    model: nn.Module, processor: Any, summary: Tensor, answers: Sequence[str], question: str = DESCRIBE
) -> Tensor:
    """Mean log-probability per token of each answer, end token included, given one summary [k, D]: [answers]"""
    state = summary[None].expand(len(answers), -1, -1)
    found = answer_scores(model, processor, state, [f"{PLACEHOLDER}\n{question}"] * len(answers), answers)
    return torch.tensor([total / count for total, count, _ in found])


@torch.inference_mode()
def answer_scores(
    model: nn.Module, processor: Any, summary: Tensor | None, questions: Sequence[str], answers: Sequence[str]
) -> list[tuple[float, int, bool]]:
    """(log-probability, number of tokens, whether greedy decoding gives exactly this answer) of each answer.

    Args:
        summary: [M, k, D], for the `<image>`s of all questions in order. The head runs on the answers' tokens only.
    """
    formatter, device = ConversationFormatter(processor), model.get_input_embeddings().weight.device
    rows, all_labels = [], []
    for question, answer in zip(questions, answers, strict=True):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        ids, labels = with_labels(processor.tokenizer, *formatter(turns))
        rows.append(ids)
        all_labels.append(labels)
    ids = pad_sequence(rows, batch_first=True).to(device)  # [B, T]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    labels = pad_sequence(all_labels, batch_first=True, padding_value=IGNORE_INDEX).to(device)
    state = None if summary is None else summary.to(device)
    plan = model._collapse(ids, mask, state, None)
    hidden = model._answer_hidden(plan, ids, state)  # [N, D], all tokens of all rows
    targets = labels.flatten()[plan.origin].masked_fill(plan.is_summary, IGNORE_INDEX)  # [N]
    lengths, found = plan.lengths.tolist(), []
    for own, target in zip(hidden.split(lengths), targets.split(lengths), strict=True):
        labelled = target[1:] != IGNORE_INDEX
        logits = model.get_output_embeddings()(own[:-1][labelled]).float().log_softmax(-1)
        target = target[1:][labelled]
        total = logits.gather(1, target[:, None]).sum().item()
        found.append((total, len(target), bool((logits.argmax(-1) == target).all())))
    return found
