"""Repairs for the original LLaVA 1.2.2 on transformers 5: each with its versions, a probe, and a way back.

LLaVA pins transformers 4.37.2, where none of these is needed. Names are bound anew in LLaVA's own modules while one of
its functions runs, and put back after; the one attribute that is added to transformers (`ALL_LAYERNORM_LAYERS`, because
LLaVA imports it) is taken away again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from typing import Any

import transformers
import transformers.trainer
from torch import Tensor, nn

from ..rebinding import rebound
from .model import OriginalHost


@dataclass(frozen=True)
class Shim:
    """One repair. `needed` is evaluated where it would be applied; `versions` are those that it is for."""

    name: str
    versions: str
    reason: str
    needed: Callable[[], bool]


def _lacks_layer_list() -> bool:
    return not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS")


def _trainer_takes_no_tokenizer() -> bool:
    return "tokenizer" not in inspect.signature(transformers.Trainer.__init__).parameters


def _no_width_arguments() -> bool:
    return "load_in_4bit" not in inspect.getsource(transformers.PreTrainedModel.from_pretrained)


def _renamed_evaluation() -> bool:
    return "evaluation_strategy" not in inspect.signature(transformers.TrainingArguments).parameters


def _past_is_cache() -> bool:
    return "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters


SHIMS = (
    Shim("layer-list", "transformers >= 4.54", "llava_trainer.py imports ALL_LAYERNORM_LAYERS", _lacks_layer_list),
    Shim("trainer", "transformers >= 5", "LLaVATrainer's signatures are 4.37's", _trainer_takes_no_tokenizer),
    Shim("quantised", "transformers >= 5", "load_in_4bit is no argument any more", _no_width_arguments),
    Shim(
        "arguments",
        "transformers >= 4.46",
        "--evaluation_strategy and --warmup_ratio have other names",
        _renamed_evaluation,
    ),
    Shim("past", "transformers >= 5.24", "generate gives forward its past_key_values as `cache`", _past_is_cache),
    Shim("deepspeed", "any", "LoRA is saved through deepspeed, installed or not", lambda: not find_spec("deepspeed")),
)


def needed(name: str) -> bool:
    return next(shim for shim in SHIMS if shim.name == name).needed()


@contextmanager
def importable() -> Iterator[None]:
    """Within it `llava.train` can be imported."""
    if not needed("layer-list"):
        yield
        return
    transformers.trainer.ALL_LAYERNORM_LAYERS = [nn.LayerNorm]
    try:
        yield
    finally:
        del transformers.trainer.ALL_LAYERNORM_LAYERS


def repaired_trainer(base: type) -> type:
    """LLaVATrainer with the signatures of today's Trainer; on 4.37.2 the class itself."""
    if not needed("trainer"):
        return base

    class LLaVATrainer(base):
        def __init__(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
            if tokenizer is not None:
                kwargs["processing_class"] = tokenizer
            super().__init__(*args, **kwargs)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if self.args.group_by_modality_length:
                return base._get_train_sampler(self)
            return transformers.Trainer._get_train_sampler(self, train_dataset)

        def create_optimizer(self, model: Any = None) -> Any:
            return base.create_optimizer(self)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if getattr(self.args, "tune_mm_mlp_adapter", False):
                base._save_checkpoint(self, model, trial)
            else:
                transformers.Trainer._save_checkpoint(self, model, trial)

    return LLaVATrainer


def repaired_loading(base: type) -> type:
    """The model class with a `from_pretrained` that takes LLaVA's 4 and 8 bit arguments."""
    if not needed("quantised"):
        return base

    class Loader(base):
        @classmethod
        def from_pretrained(cls, *args: Any, load_in_4bit: bool = False, load_in_8bit: bool = False, **kwargs: Any):
            config = kwargs.get("quantization_config")
            if config is None and (load_in_4bit or load_in_8bit):
                config = transformers.BitsAndBytesConfig(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
            if config is not None:
                # since 5.0 whole names are meant, and "mm_projector" would be quantised without a word
                config.llm_int8_skip_modules = list(OriginalHost.quantization_skip)
                kwargs["quantization_config"] = config
            return base.from_pretrained(*args, **kwargs)

    return Loader


def repaired_forward(model: nn.Module) -> None:
    """Lets the forward of one plain LLaVA take `cache` for what it calls `past_key_values`."""
    if not needed("past"):
        return
    own = model.forward

    @wraps(own)
    def forward(*args: Any, **given: Any) -> Any:
        if "cache" in given:
            given["past_key_values"] = given.pop("cache")
        return own(*args, **given)

    model.forward = forward


def plain_copy(parameter: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """What LLaVA's `maybe_zero_3` does with a parameter that no ZeRO has split."""
    return parameter.detach().cpu().clone()


@contextmanager
def applied(train: Any, trainer: Any) -> Iterator[None]:
    """LLaVA's `llava.train.train` and `llava.train.llava_trainer`, repaired where this installation needs it."""
    with ExitStack() as stack:
        names = {"LLaVATrainer": repaired_trainer(trainer.LLaVATrainer)}
        names["LlavaLlamaForCausalLM"] = repaired_loading(train.LlavaLlamaForCausalLM)
        if needed("deepspeed"):
            names["maybe_zero_3"] = plain_copy
            stack.enter_context(rebound(trainer, maybe_zero_3=plain_copy))
        stack.enter_context(rebound(train, **names))
        yield
