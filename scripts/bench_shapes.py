"""Sizes of the models that the speed benchmarks build, and how much each must compute and read, counted by hand.

Operations are those of one row (an image with its text), multiplications and additions apart; a causal mask leaves half
of attention. LoRA, norms and the projector are left out: together about 3 % at 7B's shape. Bytes are the weights, which
a pass over any number of rows reads once; activations are left out, so that bytes are the least that must move.
"""

from __future__ import annotations

from dataclasses import dataclass

import _root  # noqa: F401

from eval.shapes import LLAVA_7B, Sizes

PROMPT_TOKENS = 10  # "Summarize the image in a few words." with Llama's tokenizer, its space in front included
SYSTEM_TOKENS = 35  # LLaVA v1's system prompt and "USER: ", before the image
LABELLED = 0.5  # share of the text that is answers
CAPTION_TOKENS = 30


@dataclass(frozen=True)
class Shape(Sizes):
    """Sizes of a LLaVA, and the text and the LoRA rank that go with them."""

    text_tokens: int
    lora_r: int  # the same share of the width in every shape: 64 of 4096, the package's default on 7B

    # ------------------------------------------------------------------ operations of a forward
    def _tower(self) -> float:
        tokens = self.dense_tokens + 1
        return 2 * tokens * self.tower_weights + self.vision_layers * 4 * tokens**2 * self.vision_hidden

    def _layers(self, tokens: int) -> float:
        return 2 * tokens * self.layer_weights + self._attention(tokens)

    def _attention(self, tokens: int) -> float:
        return self.layers * 2 * tokens**2 * self.hidden  # two products, of which the causal mask leaves half

    def _head(self, tokens: int) -> float:
        return 2 * tokens * self.head_weights

    def compress_operations(self, k: int) -> float:
        """The tower and the compress pass of one image."""
        return self._tower() + self._layers(self.dense_tokens + PROMPT_TOKENS + k)

    def first_token_operations(self, side: str, text_tokens: int, k: int) -> float:
        """Of the side "base", "image" or "cached" (summary), to the first token of an answer."""
        if side == "base":
            return self._tower() + self._layers(self.dense_tokens + text_tokens) + self._head(1)
        answer = self._layers(k + text_tokens) + self._head(1)
        return answer + (self.compress_operations(k) if side == "image" else 0)

    def next_token_operations(self, context: int) -> float:
        """Of one token after `context` others, whose keys and values are kept."""
        return 2 * self.layer_weights + self.layers * 4 * context * self.hidden + self._head(1)

    def shares(self, text_tokens: int) -> dict[str, float]:
        """Of the base's forward operations on n dense tokens and the text, what each part takes."""
        tokens = self.dense_tokens + text_tokens
        layers, head, tower = self._layers(tokens), self._head(tokens), self._tower()
        total = layers + head + tower
        return {
            "head_of_language_model": head / (layers + head),
            "vision_tower": tower / total,
            "attention": self._attention(tokens) / total,
        }

    # ------------------------------------------------------------------ operations of a training step
    def step_operations(self, side: str, text_tokens: int, k: int, checkpointing: bool) -> float:
        """Of the side "host", "fwd2bot" or "fwd2bot_contrastive".

        Backward through frozen weights costs one forward more, checkpointing another one; the tower has no backward.
        """
        n, passes = self.dense_tokens, 3 if checkpointing else 2
        if side == "host":
            return self._tower() + passes * self._layers(n + text_tokens) + 2 * self._head(n + text_tokens)
        layers = self._layers(n + PROMPT_TOKENS + k) + self._layers(k + text_tokens)
        if side == "fwd2bot_contrastive":
            layers += self._layers(CAPTION_TOKENS + PROMPT_TOKENS + k)
        return self._tower() + passes * layers + 2 * self._head(int(LABELLED * text_tokens))

    def step_operations_ratio(self, text_tokens: int, k: int, checkpointing: bool) -> float:
        """What the operations alone make one expect of a training step with Fwd2Bot over one without."""
        ours, host = (self.step_operations(side, text_tokens, k, checkpointing) for side in ("fwd2bot", "host"))
        return ours / host

    # ------------------------------------------------------------------ bytes
    def pass_bytes(self, passes: int, tower: bool, heads: int, size: int, adapters: int = 0) -> int:
        """Weights, of `size` bytes each, that passes over the layers, the head and the tower read.

        adapters: bytes of the adapter that each pass over the layers reads as well.
        """
        weights = passes * self.layer_weights + heads * self.head_weights + tower * self.tower_weights
        return weights * size + passes * adapters

    def step_bytes(self, side: str, checkpointing: bool, size: int, rank: int) -> int:
        """Of a training step; the adapters, in float32, are read by each pass, and moved seven times by AdamW."""
        times = {"host": 1, "fwd2bot": 2, "fwd2bot_contrastive": 3}[side]
        adapter, passes = 4 * self.adapter_weights(rank), times * (3 if checkpointing else 2)
        trained = adapter * min(times, 2)
        return self.pass_bytes(passes, True, 2, size, adapter) + 7 * trained

    def cache_bytes(self, size: int) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.hidden * size


SHAPES = {
    # LLaVA-1.5's proportions at a width a CPU can train: n and the text are the real ones, and the vocabulary and the
    # tower are cut until head and tower take the share they take of 7B, so that logits we save do not flatter us
    "toy": Shape(512, 1376, 8, 8, 1024, 192, 768, 2, 3, 336, 14, 200, 8),
    "7b": Shape(**vars(LLAVA_7B), text_tokens=200, lora_r=64),
    "tiny": Shape(64, 128, 2, 4, 128, 64, 128, 2, 2, 48, 8, 24, 4),  # for the tests, in a second
}
