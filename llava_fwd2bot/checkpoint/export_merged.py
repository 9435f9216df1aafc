"""The language model as a plain causal LM, with one stage's adapter in its weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .load import load_fwd2bot
from .read import read_checkpoint

BASE = "base"  # in the place of a stage: no adapter
SHARD = "5GB"


def write_merged(
    checkpoint: Path, base: str | os.PathLike | None, folder: Path, stage: str, dtype: str, processor: Any
) -> None:
    """Writes model and tokenizer into `folder`."""
    has_adapters = read_checkpoint(checkpoint)["fwd2bot"].adapters != "none"
    merge = stage if stage != BASE and has_adapters else None
    precision = "auto" if dtype == "auto" else getattr(torch, dtype)
    model, loaded = load_fwd2bot(checkpoint, base, merge=merge, dtype=precision)
    plain = plain_causal_lm(model)
    plain.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer = copy.deepcopy((processor or loaded).tokenizer)
    if processor is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(folder)


def plain_causal_lm(model: nn.Module) -> nn.Module:
    """The model's language model and head, as the class of transformers for text alone; the weights are shared.

    Args:
        model: as `load_fwd2bot` gives it: with one stage merged, or with adapters, which are left out.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text_class = getattr(model, "text_class", None)  # the original LLaVA is a text class with more in it
    if text_class is None:
        config = copy.deepcopy(model.config.get_text_config())
        text_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    else:
        kind = text_class.config_class
        known = kind().to_dict()
        config = kind(**{name: value for name, value in model.config.to_dict().items() if name in known})
        config.model_type = kind.model_type
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    config.tie_word_embeddings = head is words
    config.dtype = words.dtype
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    own = model._language_model().state_dict()
    weights = {
        f"model.{name.replace('.base_layer.', '.')}": tensor for name, tensor in own.items() if ".lora_" not in name
    }
    weights["lm_head.weight"] = head
    with torch.device("meta"):
        plain = text_class(config)
    rotary = copy.deepcopy(model._language_model().rotary_emb)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()}, assign=True)
    plain.model.rotary_emb = rotary  # its numbers are no weights, and were not filled in
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()
