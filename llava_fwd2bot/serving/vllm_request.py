"""A model at an engine, and requests whose prompts are what `generate` reads.

Shapes: M images, k summary tokens, D hidden size.
"""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoint.export_template import PROMPT_FLAG, pieces_of
from ..processing.conversation import ConversationFormatter, needs_bos
from .vllm_files import ClientFiles
from .vllm_http import Engine

CHAT = "/v1/chat/completions"


class EngineModel:
    """The engine, the client's files of the model, and the name that the engine has for the adapter."""

    def __init__(self, engine: Engine, files: ClientFiles, adapter: str) -> None:
        self.engine, self.files, self.adapter = engine, files, adapter
        self.formatter = ConversationFormatter(files.processor)

    def request(self, prompt: str, summary: Tensor) -> dict[str, Any]:
        """The part of a request that is the prompt: a text with image tokens, and what stands for them, [M, k, D]."""
        processor = self.files.processor
        return {
            "messages": [
                {
                    "role": "user",
                    "content": pieces_of(prompt, processor.image_token, [_image(one) for one in summary]),
                }
            ],
            "chat_template_kwargs": {PROMPT_FLAG: True},
            "add_special_tokens": needs_bos(processor.tokenizer, prompt),
        }


def _image(summary: Tensor) -> dict[str, Any]:
    """One image of a request, from [k, D]; as .npy, which is read without unpickling."""
    file = io.BytesIO()
    np.save(file, summary.float().numpy(), allow_pickle=False)
    content = file.getvalue()
    name = hashlib.sha256(content).hexdigest()  # by which the engine knows it again
    return {"type": "image_embeds", "image_embeds": base64.b64encode(content).decode(), "uuid": name}
