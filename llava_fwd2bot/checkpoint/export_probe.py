"""What the right engine answers to a few questions, for `fwd2bot export --to vllm --probe`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..processing.conversation import ConversationFormatter, prompt_ids
from .export_manifest import PROBES
from .load import load_fwd2bot

_TOKENS = 5  # the most probable first tokens of an answer


@torch.inference_mode()
def probes_of(checkpoint: Path, base: str | os.PathLike | None) -> list[dict[str, Any]]:
    """Loads the model; for each question, the most probable first tokens of the base and of the answer stage.

    Each token with its log-probability. In the place of a summary the model reads R, which every client has.
    """
    model, processor = load_fwd2bot(checkpoint, base, dtype="auto")
    formatter, picture = ConversationFormatter(processor), model.fwd2bot.tokens[None]  # [1, k, D]
    found = []
    for question in PROBES:
        ids = prompt_ids(processor, formatter.prompt(question, 1))["input_ids"]
        plan = model._collapse(ids, None, picture, None)
        words = model.get_input_embeddings()(ids.flatten()[plan.origin].masked_fill(plan.is_summary, 0))
        rows, _ = plan.pad(plan.embeds(words, picture.to(words.dtype)))  # [1, L, D], without the bridge
        entry: dict[str, Any] = {"question": question}
        for name, stage in (("base", None), ("answer", "answer")):
            with model._stages.use(stage):
                hidden = model._language_model()(inputs_embeds=rows, use_cache=False).last_hidden_state[:, -1]
            best = model.get_output_embeddings()(hidden)[0].float().log_softmax(-1).topk(_TOKENS)
            entry[name] = [[int(i), round(float(x), 4)] for x, i in zip(*best, strict=True)]
        found.append(entry)
    return found
