"""Stage-specific LoRA: add, switch, save, load.

PEFT's own `set_adapter` sets `requires_grad=False` on the adapter that it leaves, so the compress adapter would get no
gradient once the answer pass has begun. Here a switch touches only which adapter is active, and the switch is undone
and redone where gradient checkpointing recomputes a layer during backward.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..checkpoint.adapter_names import PEFT_PREFIX
from ..config import STAGES, Fwd2BotConfig

OUTSIDE = r".*\bvision_tower\..*"  # modules that have the targets' names, but get no LoRA
# before transformers 5 it is set without being requested
_REENTRANT_IS_OPTIONAL = int(transformers.__version__.split(".")[0]) >= 5


def lora_target(names: Sequence[str]) -> str:
    """A pattern, for PEFT to match against whole names, of the layers called so inside numbered blocks."""
    return rf"layers\.\d+\.(.*\.)?({'|'.join(map(re.escape, names))})"


def cast_input(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """In the place of PEFT's `_cast_input_dtype`: an adapter's input in the dtype of its weights.

    Under autocast a half-precision input stays as it is. PEFT makes it float32, autocast rounds that back, to the same
    numbers, and each of q, k and v, gate and up would keep such a copy of one input for backward.
    """
    if x is None or x.dtype == dtype:
        return x
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half and dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


class StageAdapters:
    """The LoRA adapters of both stages in one language model.

    Args:
        language_model: the bare decoder; LoRA goes into its blocks (`layers.N.…`) and nowhere else, so that a vision
            tower with layers of the same names stays as it is.
        config: rank, alpha, dropout, targets, and which adapters there are.
        inside: the name of the language model in its host, for the adapters' files.
        stages: those that run the language model; ("answer",) for a compressor that does not.

    Raises:
        ValueError: no linear layer of the language model has one of the names in `config.lora_targets`.
    """

    def __init__(
        self, language_model: nn.Module, config: Fwd2BotConfig, stages: Sequence[str] = STAGES, inside: str = ""
    ) -> None:
        self.adapter_of = {
            "stage": {stage: stage for stage in stages},
            "shared": dict.fromkeys(stages, "shared"),
            "none": {},
        }[config.adapters]
        self.names = sorted(set(self.adapter_of.values()), reverse=True)
        self.language_model, self.inside = language_model, inside
        self.merged: str | None = None  # the stage whose adapter is part of the weights
        self.stage: str | None = "answer"  # the stage at rest; None is the base
        self.recomputes = False  # within a pass that is checkpointed as a whole
        # the original LLaVA hangs its vision tower, with layers of the same names, into its language model
        target = r"(?!.*vision_tower)(.*\.)?" + lora_target(config.lora_targets)
        if self.names and not any(re.fullmatch(target, name) for name, _ in language_model.named_modules()):
            raise ValueError(
                f"No layer of {type(language_model).__name__} is called {', '.join(config.lora_targets)}: "
                "set lora_targets to names of its linear layers."
            )
        self.targets = list(config.lora_targets)
        self.lora_config = LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=target
        )
        with warnings.catch_warnings():  # a second adapter beside the first is what is wanted here
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name in self.names:
                inject_adapter_in_model(self.lora_config, language_model, adapter_name=name)
        self.layers = {n: m for n, m in language_model.named_modules() if isinstance(m, BaseTunerLayer)}
        if config.lora_dropout == 0:  # dropout would round its scale to half precision; and it keeps copies anyway
            for layer in self.layers.values():
                layer._cast_input_dtype = cast_input
        for parameter in self.parameters():
            parameter.requires_grad_(True)
            # an update of 1e-5 is lost on a bfloat16 weight; autocast and PEFT cast at the matrix product
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        self._activate("answer")

    def cast(self, dtype: torch.dtype) -> None:
        """The adapters in the dtype of what they are added to, so that nothing is cast while it runs: to answer with.

        Not to train with: small updates are lost on half precision.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def merge(self, stage: str) -> None:
        """Adds a stage's adapter to the weights, and takes all adapters away; the other stage and the base are gone.

        The sum is made in float32 at least, and rounded once to the weight's dtype.

        Raises:
            ValueError: there are no adapters; or the weights are quantised, and would be rounded anew.
        """
        if stage not in STAGES:
            raise ValueError(f"merge must be one of {', '.join(STAGES)}, got {stage!r}.")
        if not self.names:
            raise ValueError('With adapters="none" there is no adapter to merge: leave merge out.')
        if stage not in self.adapter_of:
            raise ValueError(f'This compressor runs no language model, so there is no adapter "{stage}" to merge.')
        adapter = self.adapter_of[stage]
        weights = {name: layer.get_base_layer().weight for name, layer in self.layers.items()}
        whole = next((name for name, weight in weights.items() if not weight.is_floating_point()), None)
        if whole is not None:
            raise ValueError(
                f"The base is quantised ({whole} is {weights[whole].dtype}), and merging would round its weights a "
                "second time: leave merge out, or merge into the float base."
            )
        away = next((name for name, weight in weights.items() if weight.device.type == "meta"), None)
        if away is not None:
            raise ValueError(
                f"{away} is offloaded, so that nothing can be added to it: leave merge out, or offload less."
            )
        for name, layer in self.layers.items():
            delta, weight = layer.get_delta_weight(adapter), weights[name]
            wide = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
            weight.copy_(weight.to(wide) + delta.to(wide))
            parent, _, leaf = name.rpartition(".")
            setattr(self.language_model.get_submodule(parent), leaf, layer.get_base_layer())
        if hasattr(self.language_model, "peft_config"):  # PEFT leaves it there
            del self.language_model.peft_config
        self.layers, self.names, self.merged, self.stage = {}, [], stage, stage

    def refuse_other_than_merged(self, stage: str | None) -> None:
        """Raises ValueError where a stage, or the base (None), is asked for that merging has taken away."""
        if self.merged is None or (stage and self.adapter_of.get(stage) == self.adapter_of[self.merged]):
            return
        wanted = "the base's own weights" if stage is None else f'the "{stage}" stage'
        raise ValueError(
            f'This model was opened with merge="{self.merged}", which leaves that stage alone; this needs {wanted}: '
            "open the checkpoint without merge."
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        for name in self.names:
            yield from self.tensors(name).values()

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """One adapter's parameters under the names of a PEFT adapter of the language model."""
        return {
            f"{PEFT_PREFIX}{layer_name}.{side}.weight": getattr(layer, side)[name].weight
            for layer_name, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        }

    def peft_config(self, base: str | None) -> dict[str, Any]:
        """What `adapter_config.json` beside the tensors says.

        vLLM takes a list of names, not a pattern. The vision tower, whose layers have the same names, is left out by a
        setting of its own, which vLLM passes over.
        """
        values = self.lora_config.to_dict()
        values.update(base_model_name_or_path=base, inference_mode=True)
        values["target_modules"] = self.targets
        if "exclude_modules" in values:  # an early PEFT does not know it
            values["exclude_modules"] = OUTSIDE
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    @contextmanager
    def use(self, stage: str | None) -> Iterator[None]:
        """Makes `stage` ("compress", "answer", or None: the base) active, and puts back what was, whatever happens."""
        before = self.stage
        self._activate(stage)
        try:
            yield
        finally:
            self._activate(before)

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """Within it layers are not checkpointed: the whole is, and would be run three times."""
        before, self.recomputes = self.recomputes, True
        try:
            yield
        finally:
            self.recomputes = before

    def _activate(self, stage: str | None) -> None:
        if stage is not None and stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)} or None, got {stage!r}.")
        self.refuse_other_than_merged(stage)
        self.stage = stage
        # private attributes of PEFT, held by tests/test_adapters.py: the public setters also change requires_grad
        for layer in self.layers.values():
            layer._disable_adapters = stage is None
            if stage is not None:
                layer._active_adapter = [self.adapter_of[stage]]

    def checkpoint_safe(self, function: Callable) -> Callable:
        """Wraps a gradient checkpointing function so that a layer is recomputed in the stage it first ran in.

        Raises:
            ValueError: it asks for re-entrant checkpointing, which gives a frozen first layer no gradient.
        """
        keywords = getattr(function, "keywords", {})
        if keywords.get("use_reentrant") and _REENTRANT_IS_OPTIONAL:
            raise ValueError(
                "Fwd2Bot needs non-reentrant gradient checkpointing: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        if isinstance(function, _CheckpointInStage):
            return function
        return _CheckpointInStage(self, partial(function, use_reentrant=False))


class _CheckpointInStage:
    # a class, not a closure, so that a deep copy of the model refers to the copy's own adapters

    def __init__(self, adapters: StageAdapters, checkpoint: Callable) -> None:
        self.adapters, self.checkpoint = adapters, checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.adapters.recomputes:
            return function(*args, **kwargs)
        return self.checkpoint(partial(self._in_stage, self.adapters.stage, function), *args, **kwargs)

    def _in_stage(self, stage: str | None, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.adapters.stage == stage:
            return function(*args, **kwargs)
        with self.adapters.use(stage):
            return function(*args, **kwargs)


class SafeSwitch:
    """A submodule's `_set_gradient_checkpointing` by `checkpoint_safe`: checkpointing may be turned on there too."""

    def __init__(self, adapters: StageAdapters, switch: Callable) -> None:
        self.adapters, self.switch = adapters, switch

    def __call__(self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any) -> None:
        safe = self.adapters.checkpoint_safe(gradient_checkpointing_func)
        self.switch(enable=enable, gradient_checkpointing_func=safe, **kwargs)


class TrainedCopy(nn.Module):
    """A module and a copy of it that trains; the original stays for the base.

    The copy runs in float32 and answers in the dtype of its input, as autocast would have it.
    """

    def __init__(self, original: nn.Module, copy: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copy = copy
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.original(x)
        return self.copy(x.to(next(self.copy.parameters()).dtype)).to(x.dtype)
