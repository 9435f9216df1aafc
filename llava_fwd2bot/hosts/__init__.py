"""The only modules that import a host. `add_fwd2bot` finds the one that fits a model."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import Fwd2BotConfig

if TYPE_CHECKING:
    from ..mixin import Fwd2BotMixin


# class name of the base → module here, class there; imported only when such a model turns up
HOSTS = {
    "LlavaForConditionalGeneration": ("llava", "Fwd2BotLlava"),
    "LlavaNextForConditionalGeneration": ("llava_next", "Fwd2BotLlavaNext"),
    "LlavaOnevisionForConditionalGeneration": ("llava_onevision", "Fwd2BotLlavaOnevision"),
    "LlavaLlamaForCausalLM": ("original.model", "Fwd2BotLlavaLlama"),
    "LlavaMistralForCausalLM": ("original.model", "Fwd2BotLlavaMistral"),
    "LlavaQwenForCausalLM": ("original.model", "Fwd2BotLlavaQwen"),
}


def host_class(base_class_name: str) -> type:
    """The Fwd2Bot class for a base class.

    Raises:
        ValueError: there is no host for that class; the message lists those there are.
    """
    if base_class_name not in HOSTS:
        raise ValueError(f"No Fwd2Bot host for {base_class_name}. There is one for: {', '.join(HOSTS)}.")
    module, name = HOSTS[base_class_name]
    return getattr(import_module(f"{__name__}.{module}"), name)


def add_fwd2bot(
    model: nn.Module,
    config: Fwd2BotConfig | None = None,
    processor: Any = None,
    *,
    train_projector: bool = False,
    host: type | None = None,
) -> Fwd2BotMixin:
    """Puts Fwd2Bot on a loaded model, in place: summary tokens and stage adapters, trainable; all else frozen.

    Args:
        model: a base as `from_pretrained` gives it, float or quantised, e.g. LlavaForConditionalGeneration.
        config: the settings; None takes the defaults.
        processor: the base's processor or tokenizer, which turns the prompts into ids. None looks for the tokenizer
            where the model was loaded from; a model that came from nowhere gets no prompts, with a warning.
        train_projector: train a copy of the projector as well; the base keeps its own.
        host: a class of your own in the place of the one for this base, derived from it.

    Returns:
        The same model.

    Raises:
        ValueError: no host for this class, or Fwd2Bot is on it already.
    """
    config = config or Fwd2BotConfig()
    if hasattr(model, "fwd2bot"):
        raise ValueError("This model has Fwd2Bot already.")
    if hasattr(model, "peft_config"):
        raise ValueError("This model carries PEFT adapters: merge them (merge_and_unload) before adding Fwd2Bot.")
    host = host or host_class(type(model).__name__)
    image_prompt_ids, text_prompt_ids = _prompt_ids(model, config, processor)
    return install(model, host, config, image_prompt_ids, text_prompt_ids, train_projector)


def install(
    model: Any,
    host: type,
    config: Fwd2BotConfig,
    image_prompt_ids: list[int],
    text_prompt_ids: list[int],
    train_projector: bool = False,
) -> Fwd2BotMixin:
    """`add_fwd2bot` with the class and the prompts' ids known; a failure leaves the model as it was."""
    base = type(model)
    before, trained = set(vars(model)), [(p, p.requires_grad) for p in model.parameters()]
    model.__class__ = host
    try:
        model._init_fwd2bot(config, image_prompt_ids, text_prompt_ids, train_projector)
    except BaseException:
        model.__class__ = base
        model._modules.pop("fwd2bot", None)
        for name in set(vars(model)) - before:
            delattr(model, name)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise
    return model


def _prompt_ids(model: nn.Module, config: Fwd2BotConfig, processor: Any) -> tuple[list[int], list[int]]:
    prompts = (config.image_prompt, config.text_prompt)
    if not any(prompts):
        return [], []
    if processor is None:
        from transformers import AutoTokenizer

        source = getattr(model, "name_or_path", "")
        try:
            processor = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"No tokenizer was found at {source!r} ({type(error).__name__}), so the compress pass runs without its "
                "prompts. Pass the base's processor: add_fwd2bot(model, config, processor).",
                stacklevel=3,
            )
            return [], []
    tokenizer = getattr(processor, "tokenizer", processor)
    image_prompt_ids, text_prompt_ids = (tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts)
    return image_prompt_ids, text_prompt_ids
