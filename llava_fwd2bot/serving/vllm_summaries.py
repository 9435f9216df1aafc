"""The compress pass inside vLLM: LLaVA that gives the summary of an image, by vLLM's pooling requests.

An image becomes the rows of the compress pass: dense tokens, prompt, R. With a residual its averages follow, which
come after R and so change nothing before them; they ride along to the pooler, which adds them to R's states.
Only vLLM imports this module. Shapes: n dense tokens, p tokens of the prompt, k summary tokens, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler.tokwise.heads import TokenPoolerHead
from vllm.model_executor.layers.pooler.tokwise.methods import get_tok_pooling_method
from vllm.model_executor.layers.pooler.tokwise.poolers import TokenPooler
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..checkpoint.export_manifest import CLIENT, read_manifest
from ..checkpoint.read import TENSORS_NAME
from ..compressors import compressor_of


@functools.cache
def _settings(export: str) -> tuple[list[int], int, Any]:
    """Ids of the prompt, k, and the compressor whose averages are added, or None."""
    about = read_manifest(export)
    residual = None if about["residual"] == "none" else compressor_of(about["residual"])
    return about["image_prompt_ids"], about["k"], residual


class _Info(LlavaProcessingInfo):
    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        prompt, k, residual = _settings(self.get_hf_config().fwd2bot)
        dense = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return dense + len(prompt) + (k if residual is None else 2 * k)


class _SummaryHead(TokenPoolerHead):
    """[n + p + k, D] or, with the rows that went in beside the states, [n + p + 2k, 2D] → [k, D]."""

    def __init__(self, k: int, log_gain: Tensor | None) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("log_gain", log_gain, persistent=False)

    def get_supported_tasks(self) -> set[str]:
        return {"token_embed"}

    def forward_chunk(self, pooled_data: Tensor | None, pooling_param: Any) -> Tensor | None:
        if pooled_data is None:  # more of the sequence is to come
            return None
        if self.log_gain is None:
            return pooled_data[-self.k :].float()
        states, rows = pooled_data.chunk(2, dim=-1)
        if len(states) < 2 * self.k:  # vLLM's own trial runs
            return states.float()
        states, averages = states[-2 * self.k : -self.k], rows[-self.k :]
        return (averages + self.log_gain.exp().to(states) * states).float()


@default_pooling_type(seq_pooling_type="CLS", tok_pooling_type="ALL")
@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=_Info, dummy_inputs=LlavaDummyInputsBuilder)
class LlavaSummaries(LlavaForConditionalGeneration):
    """`--hf-overrides '{"architectures": ["Fwd2BotLlavaSummaries"], "fwd2bot": "EXPORT"}'` on the base."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        export = vllm_config.model_config.hf_config.fwd2bot
        prompt, self.k, self.residual = _settings(export)
        device, dtype = torch.get_default_device(), vllm_config.model_config.dtype
        tensors = load_file(Path(export) / CLIENT / TENSORS_NAME)
        self.projector = {n.removeprefix("projector."): t for n, t in tensors.items() if n.startswith("projector.")}
        self.register_buffer("tokens", tensors["tokens"].to(device, dtype), persistent=False)
        self.register_buffer("prompt", torch.tensor(prompt, dtype=torch.long, device=device), persistent=False)
        gain = tensors["log_gain"].to(device) if self.residual is not None else None
        # vLLM puts a LoRA layer in its place later, which takes no rows but those of the step
        self.words = (self.language_model.model.embed_tokens,)
        pooling = get_tok_pooling_method(vllm_config.model_config.pooler_config.get_tok_pooling_type())
        self.pooler = TokenPooler(pooling=pooling, head=_SummaryHead(self.k, gain))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The base's, with the projector that was trained in the place of its own."""

        def ours() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                own = name.rpartition("multi_modal_projector.")
                yield name, self.projector.get(own[2], tensor) if own[1] else tensor

        return super().load_weights(ours())

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """The rows of the compress pass of each image, M × [n + p + k (+ k), D]."""
        found = []
        for dense in super().embed_multimodal(**kwargs):
            prompt, tokens = self.words[0](self.prompt).to(dense), self.tokens.to(dense)
            rows = [dense, prompt, tokens]
            if self.residual is not None:
                (averages,) = self.residual.averages([dense], self.k)
                rows = [dense, prompt, tokens + averages, averages]
            found.append(torch.cat(rows))
        return found

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """The last hidden states [T, D]; with averages, beside the rows that went in, [T, 2D]."""
        states = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if self.residual is None or not isinstance(states, Tensor):
            return states
        rows = self.words[0](input_ids) if inputs_embeds is None else inputs_embeds
        return torch.cat([states, rows.to(states)], dim=-1)
