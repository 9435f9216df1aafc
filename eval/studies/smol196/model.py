"""SmolLM2 and the projector, written for training speed; it computes transformers' LlamaModel and PEFT's LoRA.

Low-rank adapters are merged into the weights once per pass (W + scale · B A, with gradients to A and B), so that
a layer costs what it costs without them; weights are float32, the passes run in bfloat16 (float32 on a CPU).

Shapes: B rows, L tokens of a row, D hidden size, N layers, V vocabulary, H heads, G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
KeyValues = list[tuple[Tensor, Tensor]]  # of each layer, [B, G, L, d]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; the defaults are SmolLM2-135M's."""

    vocabulary: int = 49152
    hidden: int = 576
    wide: int = 1536
    layers: int = 30
    heads: int = 9
    groups: int = 3
    theta: float = 100_000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def sizes(self, name: str) -> tuple[int, int]:
        """(out, in) of a projection."""
        small = self.groups * self.head
        return {
            "q": (self.hidden, self.hidden),
            "k": (small, self.hidden),
            "v": (small, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate": (self.wide, self.hidden),
            "up": (self.wide, self.hidden),
            "down": (self.hidden, self.wide),
        }[name]

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Lora(nn.Module):
    """One adapter on all projections of all layers; alpha is twice the rank, as elsewhere in this package."""

    def __init__(self, shape: Shape, rank: int) -> None:
        super().__init__()
        self.scale = 2.0
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name in PROJECTIONS:
            out, size = shape.sizes(name)
            first = torch.empty(shape.layers, rank, size)
            nn.init.uniform_(first, -(size**-0.5), size**-0.5)  # PEFT's: kaiming_uniform with a = √5
            self.down[f"_{name}"] = nn.Parameter(first)
            self.up[f"_{name}"] = nn.Parameter(torch.zeros(shape.layers, out, rank))

    def delta(self, name: str) -> Tensor:
        """[N, out, in]"""
        return self.scale * self.up[f"_{name}"] @ self.down[f"_{name}"]


class Language(nn.Module):
    """The decoder. Its weights are frozen; `weights` gives them with an adapter merged in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Parameter(0.02 * torch.randn(shape.vocabulary, shape.hidden))  # tied: the head too
        for name in PROJECTIONS:
            out, size = shape.sizes(name)
            self.register_parameter(name, nn.Parameter(size**-0.5 * torch.randn(shape.layers, out, size)))
        self.norm_in = nn.Parameter(torch.ones(shape.layers, shape.hidden))
        self.norm_mlp = nn.Parameter(torch.ones(shape.layers, shape.hidden))
        self.norm_out = nn.Parameter(torch.ones(shape.hidden))
        self.requires_grad_(False)
        self.block = block

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.words.is_cuda else self.words.dtype

    def weights(self, adapter: Lora | None) -> list[tuple[Tensor, ...]]:
        """Of each layer: norm, qkv, o, norm, gate and up, down."""
        full = {n: getattr(self, n) + (0 if adapter is None else adapter.delta(n)) for n in PROJECTIONS}
        full = {n: w.to(self.dtype) for n, w in full.items()}
        qkv = torch.cat([full["q"], full["k"], full["v"]], dim=1)
        both = torch.cat([full["gate"], full["up"]], dim=1)
        parts = (self.norm_in, qkv, full["o"], self.norm_mlp, both, full["down"])
        return list(zip(*(part.unbind(0) for part in parts), strict=True))

    @torch.no_grad()
    def merge(self, adapter: Lora) -> None:
        for name in PROJECTIONS:
            getattr(self, name).add_(adapter.delta(name))

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[B or 1, L] → cosine and sine, [B or 1, 1, L, d]"""
        half = torch.arange(0, self.shape.head, 2, device=positions.device).float() / self.shape.head
        angles = positions[:, None, :, None].float() / self.shape.theta**half
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def run(
        self,
        weights: Sequence[tuple[Tensor, ...]],
        embeds: Tensor,
        positions: Tensor | None = None,
        bias: Tensor | None = None,
        past: KeyValues | None = None,
        keep: bool = False,
        fast: bool = True,
    ) -> tuple[Tensor, KeyValues]:
        """Embeddings [B, L, D] → last hidden states [B, L, D] and, with `keep`, keys and values of each layer.

        Args:
            positions: [B or 1, L]; 0, 1, … where not given.
            bias: added to the attention scores, [B, 1, L, past + L]; plain causal where not given.
            past: keys and values that stand before.
            fast: through the compiled block, where there is one.
        """
        x = embeds.to(self.dtype)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = self.rotation(positions)
        kept: KeyValues = []
        step = self.block if fast else block
        sizes = (self.shape.heads, self.shape.groups, self.shape.epsilon)
        for i, layer in enumerate(weights):
            before = (None, None) if past is None else past[i]
            x, keys, values = step(x, *layer, cos, sin, bias, *before, *sizes)
            if keep:
                kept.append((keys, values))
        return rms(x, self.norm_out, self.shape.epsilon), kept

    def decoder(self, weights: Sequence[tuple[Tensor, ...]], fast: bool = True) -> nn.Module:
        """As the package's `compress_pass` wants a language model."""
        return _Decoder(self, weights, fast)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.words.to(hidden.dtype))


class _Decoder:
    def __init__(self, language: Language, weights: Sequence[tuple[Tensor, ...]], fast: bool) -> None:
        self.language, self.weights, self.fast = language, weights, fast

    def __call__(self, inputs_embeds: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.language.run(self.weights, inputs_embeds, fast=self.fast)[0])


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight.to(x.dtype) * wide.to(x.dtype)


def block(
    x: Tensor,
    norm_in: Tensor,
    qkv: Tensor,
    o: Tensor,
    norm_mlp: Tensor,
    both: Tensor,
    down: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    heads: int,
    groups: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer. Returns its output [B, L, D] and all keys and values, turned, [B, G, past + L, d]."""
    rows, length, size = x.shape
    mixed = F.linear(rms(x, norm_in, epsilon), qkv).view(rows, length, heads + 2 * groups, size // heads)
    q, keys, values = mixed.transpose(1, 2).split((heads, groups, groups), dim=1)  # [B, H or G, L, d]
    q, keys = turn(q, cos, sin), turn(keys, cos, sin)
    if past_keys is not None:
        keys, values = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)
    times = heads // groups
    wide_keys, wide_values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    if bias is not None:
        bias = bias.expand(-1, heads, -1, -1)
    seen = F.scaled_dot_product_attention(q, wide_keys, wide_values, attn_mask=bias, is_causal=bias is None)
    x = x + F.linear(seen.transpose(1, 2).reshape(rows, length, size), o)
    gate, up = F.linear(rms(x, norm_mlp, epsilon), both).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down), keys, values


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Projector(nn.Module):
    """Features of the tower to the language model's input: two layers, and a learned vector for each place.

    LLaVA's projector but for the places, without which a decoder that reads 196 tokens in a row must learn to count.
    """

    def __init__(self, features: int, hidden: int, places: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.places = nn.Parameter(0.02 * torch.randn(places, hidden))

    def forward(self, features: Tensor, places: Tensor | None = None) -> Tensor:
        """[B, n, features] → [B, n, hidden]; `places` [n, hidden] instead of those of the full grid."""
        out = self.second(F.gelu(self.first(self.norm(features))))
        return out + (self.places if places is None else places)


def compile_block(language: Language) -> bool:
    """Compiles a layer; where that fails, it stays as it is. Call it on a GPU.

    Rows and lengths become symbols at the second shape, so that there are two compilations, not one for each shape.
    """
    try:
        torch._dynamo.config.recompile_limit = 64
        language.block = torch.compile(block)
        rows = torch.zeros(4, 24, language.shape.hidden, device=language.words.device, requires_grad=True)
        language.run(language.weights(None)[:1], rows)[0].float().sum().backward()
    except Exception as error:  # whatever the compiler meets, the study can go on without it
        print(f"not compiled: {type(error).__name__}: {str(error)[:400]}", flush=True)
        language.block = block
    return language.block is not block
