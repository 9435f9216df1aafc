"""What the mixin puts onto a loaded model: summary tokens, adapters, a projector that trains; and switching it off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..bottleneck import SummaryTokens
from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.gathering import whole
from ..compressors import check_compressor, compressor_of
from ..config import STAGES, Fwd2BotConfig
from .adapters import SafeSwitch, StageAdapters, TrainedCopy


class Fwd2BotAttachMixin:
    def _init_fwd2bot(
        self,
        config: Fwd2BotConfig,
        image_prompt_ids: list[int],
        text_prompt_ids: list[int],
        train_projector: bool = False,
    ) -> None:
        self._compressor = compressor_of(config.compressor)
        self._residual = None if config.residual == "none" else compressor_of(config.residual)
        check_compressor(self._compressor, config)
        self._base_fingerprint = fingerprint(self)
        if getattr(self, "_require_grads_hook", None) is not None:  # enabled before
            super().disable_input_require_grads()
        self.requires_grad_(False)
        self.fwd2bot_config = config
        self._fwd2bot_enabled = True
        embeddings = self.get_input_embeddings().weight
        with whole(embeddings) as (words,):
            self.fwd2bot = SummaryTokens(config, words, image_prompt_ids, text_prompt_ids)
        if embeddings.dtype == torch.float64:
            self.fwd2bot.double()
        compressor = self._compressor
        self.fwd2bot.compressor = compressor.build(embeddings.shape[-1], config.num_summary_tokens)
        if self.fwd2bot.compressor is not None:
            self.fwd2bot.compressor.to(self.fwd2bot.tokens)
        if not compressor.runs_language_model:  # neither R nor the temperature is used
            self.fwd2bot.tokens.requires_grad_(False)
            self.fwd2bot.logit_scale.requires_grad_(False)
        stages = STAGES if compressor.runs_language_model else ("answer",)
        language_model = self._language_model()
        inside = next(name for name, module in self.named_modules() if module is language_model)
        self._stages = StageAdapters(language_model, config, stages, inside)
        if config.adapters == "none":
            self._language_model().requires_grad_(True)
            self.get_output_embeddings().requires_grad_(True)
        if train_projector:
            self._train_projector()
        if getattr(self, "is_quantized", False):
            self._hf_peft_config_loaded = True  # transformers' Trainer refuses a quantised model without adapters
        for module in self.modules():
            if module is not self and hasattr(module, "_set_gradient_checkpointing"):
                module._set_gradient_checkpointing = SafeSwitch(self._stages, module._set_gradient_checkpointing)
            # checkpointing that was on before
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = self._stages.checkpoint_safe(module._gradient_checkpointing_func)

    def _merge_adapter(self, stage: str) -> None:
        """Makes one stage's adapter part of the weights, to run that stage at the base's own cost.

        Whatever needs the other stage or the base raises ValueError from then on.
        """
        self._stages.merge(stage)
        stages = self._stages
        if stages.adapter_of["answer"] != stages.adapter_of[stage]:
            # the compress pass never runs the head, and no answer comes without it, whichever way it is asked for
            self.get_output_embeddings().register_forward_pre_hook(lambda *_: stages.refuse_other_than_merged("answer"))

    def train(self, mode: bool = True) -> Any:
        """As of any module. Raises ValueError for a model whose adapter is merged: there is nothing left to train."""
        if mode and getattr(self, "_stages", None) is not None and self._stages.merged is not None:
            raise ValueError(
                f'This model was opened with merge="{self._stages.merged}", and its adapters cannot be trained: open '
                "the checkpoint with trainable=True and without merge."
            )
        return super().train(mode)

    def _train_projector(self) -> None:
        parent, name = self._projector_slot()
        original = getattr(parent, name)
        if not isinstance(original, TrainedCopy):
            with whole(*original.parameters()):
                trained = copy.deepcopy(original)
            trained = trained.requires_grad_(True)
            if next(trained.parameters()).dtype != torch.float64:
                trained = trained.float()
            setattr(parent, name, TrainedCopy(original, trained))

    def trained_projector(self) -> nn.Module | None:
        """The projector that was trained, or None where the base's own is in use."""
        parent, name = self._projector_slot()
        projector = getattr(parent, name)
        return projector.copy if isinstance(projector, TrainedCopy) else None

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        safe = self._stages.checkpoint_safe(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=safe, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Nothing: re-entrant checkpointing would need it, which is not used here.

        transformers' own makes the outputs of all embeddings require gradients, the frozen vision tower's as well,
        which then keeps its activations, or is run again in backward.
        """

    def disable_input_require_grads(self) -> None:
        """Nothing; see `enable_input_require_grads`."""

    @contextmanager
    def fwd2bot_disabled(self) -> Iterator[None]:
        """Within it the model is the base, bit for bit.

        Raises:
            ValueError: the language model itself was trained (`adapters="none"`), so that no base is left in it.
        """
        if self.fwd2bot_config.adapters == "none":
            raise ValueError(
                'With adapters="none" the language model itself is trained: load the base by its own name instead.'
            )
        parent, name = self._projector_slot()
        projector = getattr(parent, name)
        before = self._fwd2bot_enabled
        self._fwd2bot_enabled = False
        if isinstance(projector, TrainedCopy):
            projector.enabled = False
        try:
            with self._stages.use(None):
                yield
        finally:
            self._fwd2bot_enabled = before
            if isinstance(projector, TrainedCopy):
                projector.enabled = before
