"""SmolLM2's published weights: out of a GGUF file as they are, and from their blocks to float32.

Q4_1: 32 weights in 20 bytes, scale and offset in float16, then a nibble each, the first sixteen in the low halves.
Q8_0: 32 weights in 34 bytes, scale in float16, then a signed byte each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.studies.smol196.model import PROJECTIONS, Language, Shape

_NAMES = dict(
    q="attn_q", k="attn_k", v="attn_v", o="attn_output", gate="ffn_gate", up="ffn_up", down="ffn_down",
    norm_in="attn_norm", norm_mlp="ffn_norm",
)  # fmt: skip


def quantised(gguf: Path, vocabulary: Sequence[int]) -> dict[str, Tensor]:
    """`Language`'s tensors: norms in float32, the rest as bytes [(layers,) out, bytes of a row].

    GGUF has the two halves of what is turned by position interleaved; here they are as transformers has them.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    shape = Shape()

    def layers(name: str) -> Tensor:
        found = torch.stack([tensors[f"blk.{i}.{_NAMES[name]}.weight"] for i in range(shape.layers)])
        if name in ("q", "k"):  # [N, out, bytes]
            found = found.unflatten(1, (-1, shape.head // 2, 2)).transpose(2, 3).flatten(1, 3)
        return found.contiguous()

    out = {name: layers(name) for name in _NAMES}
    out["norm_out"] = tensors["output_norm.weight"]
    out["words"] = tensors["token_embd.weight"][torch.tensor(list(vocabulary))].contiguous()
    return out


def dequantise(blocks: Tensor, bits: int) -> Tensor:
    """Rows of Q4_1 (bits 4) or Q8_0 (bits 8) blocks, uint8 [..., bytes] → float32 [..., weights]"""
    blocks = blocks.unflatten(-1, (-1, 20 if bits == 4 else 34))
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    if bits == 8:
        return (scale * blocks[..., 2:].contiguous().view(torch.int8).float()).flatten(-2)
    offset = blocks[..., 2:4].contiguous().view(torch.float16).float()
    nibbles = blocks[..., 4:]
    values = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float()
    return (scale * values + offset).flatten(-2)


def load_language(folder: Path, device: torch.device) -> Language:
    """SmolLM2 with the vocabulary of the study, from lm-N.safetensors; its heads have 64 channels."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("lm-*.safetensors")):
        stored.update(load_file(file, device=str(device)))
    state = {name: stored[name].float() for name in ("norm_in", "norm_mlp", "norm_out")}
    state["words"] = dequantise(stored["words"], 8)
    state.update({name: dequantise(stored[name], 4) for name in PROJECTIONS})
    with torch.device("meta"):
        language = Language(shape_of(state))
    language.load_state_dict(state, assign=True)
    return language.requires_grad_(False)


def shape_of(state: dict[str, Tensor]) -> Shape:
    vocabulary, hidden = state["words"].shape
    layers, wide, _ = state["gate"].shape
    return Shape(vocabulary, hidden, wide, layers, heads=hidden // 64, groups=state["k"].shape[1] // 64)
