"""The two files by which sentence-transformers opens a checkpoint: its own Transformer module, no code of ours.

The module opens the folder through AutoModelForMultimodalLM and calls `embed_text` and `embed_image`, which give the
vectors that training compares.
"""

from __future__ import annotations

from typing import Any

MODULES_NAME = "modules.json"
SETTINGS_NAME = "sentence_bert_config.json"
_MODULE = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}


def embedding_files() -> dict[str, Any]:
    """Their names and contents; the same for every checkpoint of transformers' layout."""
    methods = {"text": "embed_text", "image": "embed_image"}
    settings = {
        "transformer_task": "any-to-any",
        "modality_config": {name: {"method": m, "method_output_name": None} for name, m in methods.items()},
        "module_output_name": "sentence_embedding",
        # a text is compressed without the marks that begin a prompt, as in training
        "processing_kwargs": {"text": {"add_special_tokens": False}},
    }
    return {MODULES_NAME: [_MODULE], SETTINGS_NAME: settings}
