"""Names of an adapter's tensors: within the language model, and in a file for a model that holds it.

    base_model.model.layers.0.self_attn.q_proj.lora_A.weight                       within the language model
    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight  in a file, for LLaVA of transformers
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight                 in a file, for a plain causal LM

PEFT and vLLM look a tensor up by its whole name, and pass over one that they do not find.
"""

from __future__ import annotations

import re

PEFT_PREFIX = "base_model.model."  # of every name in an adapter's file
_BLOCKS = re.compile(r"layers\.\d+\.")


def placed(name: str, inside: str) -> str:
    """A name within the language model as it is in a file.

    Args:
        inside: where the language model is in the model that the file is for, "model.language_model" for example; ""
            where it is that model.
    """
    return f"{PEFT_PREFIX}{inside}.{name.removeprefix(PEFT_PREFIX)}" if inside else name


def unplaced(name: str) -> str:
    """A name in a file as it is within the language model, whatever model the file is for."""
    blocks = _BLOCKS.search(name)
    return f"{PEFT_PREFIX}{name[blocks.start() :]}" if blocks else name
