"""A model at an engine, and requests whose prompts are what `generate` reads.

Shapes: M images, k summary tokens, D hidden size.
"""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.export_template import PROMPT_FLAG, pieces_of, with_bos
from ..processing.conversation import ConversationFormatter
from .vllm_files import ClientFiles
from .vllm_http import Engine

CHAT = "/v1/chat/completions"


class EngineModel:
    """The engine, the client's files of the model, and the engine's name for what answers."""

    def __init__(self, engine: Engine, files: ClientFiles, name: str) -> None:
        self.engine, self.files, self.name = engine, files, name
        self.formatter = ConversationFormatter(files.processor)

    def request(self, prompt: str, summary: Tensor) -> dict[str, Any]:
        """The part of a request that is the prompt: a text with image tokens, and what stands for them, [M, k, D]."""
        processor = self.files.processor
        prompt, special = with_bos(processor.tokenizer, prompt)
        parts = [_embeddings(one) if self.files.merged else _image(one) for one in summary]
        return {
            "messages": [{"role": "user", "content": pieces_of(prompt, processor.image_token, parts)}],
            "chat_template_kwargs": {PROMPT_FLAG: True},
            "add_special_tokens": special,
        }


def _image(summary: Tensor) -> dict[str, Any]:
    """One image of a request, from [k, D]; as .npy, which is read without unpickling."""
    file = io.BytesIO()
    np.save(file, summary.float().numpy(), allow_pickle=False)
    content = file.getvalue()
    name = hashlib.sha256(content).hexdigest()  # by which the engine knows it again
    return {"type": "image_embeds", "image_embeds": base64.b64encode(content).decode(), "uuid": name}


def _embeddings(summary: Tensor) -> dict[str, Any]:
    """Rows of a prompt, from [k, D]; vLLM takes them in torch's own format alone, and reads it without code."""
    file = io.BytesIO()
    torch.save(summary.float().contiguous().clone(), file)
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
