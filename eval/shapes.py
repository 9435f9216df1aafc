"""Sizes of a LLaVA, for what is counted from a shape and for models of a shape: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig


@dataclass(frozen=True)
class Sizes:
    """A LLaVA-1.5: a language model with plain multi-head attention, CLIP's tower, a projector of two layers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    patch: int

    @property
    def dense_tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def layer_weights(self) -> int:
        """Of the language model's layers."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def tower_weights(self) -> int:
        return self.vision_layers * (4 * self.vision_hidden**2 + 2 * self.vision_hidden * self.vision_intermediate)

    def adapter_weights(self, rank: int) -> int:
        """Of one adapter, on every linear layer of the language model."""
        return self.layers * rank * (4 * 2 * self.hidden + 3 * (self.hidden + self.intermediate))

    def config(self) -> LlavaConfig:
        return LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=self.vision_hidden,
                intermediate_size=self.vision_intermediate,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_heads,
                image_size=self.image_size,
                patch_size=self.patch,
            ),
            text_config=LlamaConfig(
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                vocab_size=self.vocab,
                max_position_embeddings=4096,
            ),
            image_token_id=self.vocab - 1,
            image_seq_length=self.dense_tokens,
        )


LLAVA_7B = Sizes(4096, 11008, 32, 32, 32064, 1024, 4096, 24, 16, 336, 14)  # llava-hf/llava-1.5-7b-hf
