"""Summaries in fewer bytes: float16, int8, int4 and int2, exactly specified, each summary token by itself.

    [N, k, D] numbers  ⇄  [N, k, B] uint8, the first j·B bytes of an image being the summary of j tokens

    codec     bytes of a token       bits per number   relative error of what is Gaussian
    float16   2·D                    16                0.0002
    int8      D + 2                  8 + 16 / D        0.01
    int4      32·⌈D / 64⌉            4                 0.10
    int2      16·⌈D / 64⌉            2                 0.35

Numbers of several bytes are little-endian. The bits are those where 64 divides D, scale and all: int4 is a quarter of
float16, int2 an eighth. Every sum is one of integers below 2²⁴ (for D up to 16,384), which has no rounding and hence no
order: codes and decoded numbers are the same on every machine and in every batch, at torch's default precision of
products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .sizes import BLOCK, bytes_per_token

CHUNK = 2**17  # numbers worked on at once: they stay in the processor's cache, and bound the memory
LARGEST = 65504.0  # of float16
SCALE_BITS = 16
# The best levels for a Gaussian (Lloyd, Max), in 1 / 46.47 of its deviation, where the uppermost of 16 is 127; positive
# halves. 46.47 is the best for 16 levels, and it is the same for all, so that one token has levels of two kinds.
LEVELS = {1: (37,), 2: (21, 70), 3: (11, 35, 62, 100), 4: (6, 18, 31, 44, 58, 75, 96, 127)}
GAIN = 32 / 46.47  # the scale over the deviation


class Codec(ABC):
    """One way to keep summaries; results are on the device of what is given.

    int4 and int2 know tokens by their place: what is decoded begins with an image's first token, not with a later one.
    """

    name: str
    largest: float  # magnitude that can be kept

    def bytes_per_token(self, size: int) -> int:
        """B, where the model's width is `size`."""
        return bytes_per_token(self.name, size)

    @torch.no_grad()
    def encode(self, summary: Tensor) -> Tensor:
        """[N, k, D] → uint8 [N, k, B]

        Raises:
            TypeError: no tensor of floats.
            ValueError: not of three dimensions, D = 0, or a number is not finite or larger than can be kept.
        """
        if not isinstance(summary, Tensor) or not summary.is_floating_point():
            raise TypeError(f"{self.name} keeps a tensor of floats, not {_told(summary)}.")
        if summary.dim() != 3 or not summary.shape[2]:
            raise ValueError(f"{self.name} keeps summaries [N, k, D], not {_told(summary)}.")
        out = summary.new_empty(*summary.shape[:2], self.bytes_per_token(summary.shape[2]), dtype=torch.uint8)
        for rows in _parts(summary):
            part = summary[rows].float().contiguous()  # [n, k, D]
            most = part.abs().amax(-1, keepdim=True)  # [n, k, 1]
            if not bool((most <= self.largest).all()):  # nor is NaN
                row, token = (~(most <= self.largest)).nonzero()[0, :2].tolist()
                value = most[row, token].item()
                short = f"is larger than {self.largest:g}" if abs(value) < float("inf") else "is not finite"
                raise ValueError(f"{self.name} cannot keep row {rows.start + row}, token {token}: {value:g} {short}.")
            self._encode(part, most, out[rows])
        return out

    @torch.no_grad()
    def decode(self, data: Tensor, size: int) -> Tensor:
        """uint8 [N, k, B] → float32 [N, k, D], D being `size`; TypeError or ValueError where `data` is not of that."""
        if not isinstance(data, Tensor) or data.dtype != torch.uint8:
            raise TypeError(f"{self.name} decodes a tensor of uint8, not {_told(data)}.")
        if size < 1 or data.dim() != 3 or data.shape[2] != self.bytes_per_token(size):
            raise ValueError(f"{self.name} decodes [N, k, {self.bytes_per_token(size)}] to {size}, not {_told(data)}.")
        out = torch.empty(*data.shape[:2], size, dtype=torch.float32, device=data.device)
        for rows in _parts(out):
            self._decode(data[rows], out[rows])
        return out

    @abstractmethod
    def _encode(self, part: Tensor, most: Tensor, out: Tensor) -> None: ...  # [n, k, D], [n, k, 1] → [n, k, B]

    @abstractmethod
    def _decode(self, data: Tensor, out: Tensor) -> None: ...  # [n, k, B] → [n, k, D]


class Float16(Codec):
    """`float16`: the numbers themselves, two bytes each, rounded to nearest, ties to even."""

    name, largest = "float16", LARGEST

    def _encode(self, part: Tensor, most: Tensor, out: Tensor) -> None:
        out.copy_(part.half().view(torch.uint8))

    def _decode(self, data: Tensor, out: Tensor) -> None:
        out.copy_(data.contiguous().view(torch.float16))


class Int8(Codec):
    """`int8`: a float16 scale s, two bytes, then D codes c, int8 (two's complement).

    Decoder: x = s · c, in float32.
    Encoder: s = (largest magnitude) / 127 as the next float16 that is not smaller; c = x / s in float32, rounded to
    nearest, ties to even: −127 to 127, and s = 0 with all c = 0 where all x are 0. The error is at most s / 2; s is
    1.001 / 127 of the largest magnitude at most, but below a magnitude of 0.008 it is rounded up by as much as 2⁻²⁴.
    """

    name, largest = "int8", 127 * LARGEST

    def _encode(self, part: Tensor, most: Tensor, out: Tensor) -> None:
        exact = most / 127
        scale = exact.half()
        scale = (scale.view(torch.int16) + (scale.float() < exact)).view(torch.float16)  # the next float16
        out[..., :2] = scale.view(torch.uint8)
        step = scale.float()
        out[..., 2:].view(torch.int8).copy_((part / step.masked_fill(step == 0, 1)).round_())

    def _decode(self, data: Tensor, out: Tensor) -> None:
        scale = data[..., :2].contiguous().view(torch.float16).float()  # [n, k, 1]
        torch.mul(data[..., 2:].view(torch.int8), scale, out=out)


class Rotated(Codec):
    """`int4` and `int2`: b = 4 or 2 bits per number after a rotation, which makes tokens look Gaussian.

    P is D rounded up to a multiple of 64; what is beyond D is 0. H is the 64 × 64 matrix of (−1)^popcount(i AND j).
    Token t (0, 1, …) has P signs g, by the hash of n = t·P + i, all modulo 2³²:
        h = n;  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16;  g[i] = 1 − 2·(h AND 1)
    They differ from token to token, so that the errors of tokens that are alike are not, and cancel in their mean.

    Codes: P codes of b bits, code i in bits b·(i mod 8/b) and above of byte ⌊i / (8/b)⌋. Codes 0 to 15 are a level's
    number times 2, plus a bit of the scale: bit i of the float16 scale s is the lowest bit of code i. Codes 16 to P − 1
    are a level's number. Levels are numbered from the lowest, these and their negatives:
        b = 4:  6 18 31 44 58 75 96 127;  in codes 0 to 15:  11 35 62 100
        b = 2:  21 70;                    in codes 0 to 15:  37

    Decoder: z = the levels [P]. Each 64 in a row, as a row vector, times H; then z[i] times g[i]; then transposed:
    z as 64 rows of P/64 is read column by column, y[r·64 + c] = z[c·P/64 + r]. Each 64 in a row times H again; times
    g again. All are integers. x[i] = (s / 2048) · y[i], in float32, for i < D.

    Encoder: q = x / m · 2047 in float32, rounded (to nearest, ties to even, as all below), m the largest magnitude.
    q times g; each 64 times H; transposed the other way, z[c·P/64 + r] = q[r·64 + c]; times g; each 64 times H.
    s = m / 2047 · √(Σ q² / P) · (32 / 46.47) in float64, rounded to float32, then to float16. f = m / s / 4094 in
    float64, rounded to float32 (0 where s is 0). u = z · f, rounded and held in −127 to 127; the code is the level
    nearest to u, of two the upper. Below a deviation of 1e-4 the rounding of s adds to the error.
    """

    largest = LARGEST

    def __init__(self, name: str, bits: int) -> None:
        self.name, self.bits, self.per_byte = name, bits, 8 // bits
        self.scale_bytes = SCALE_BITS // self.per_byte  # which hold the bits of the scale

    def _encode(self, part: Tensor, most: Tensor, out: Tensor) -> None:
        width, device = out.shape[-1] * self.per_byte, out.device
        most = most.double()
        # integers, so that sums do not depend on their order, and neither do codes on the machine or the batch
        q = (part / most.float().masked_fill(most == 0, 1)).mul_(2047).round_()
        mean = (q * q).sum(-1, keepdim=True, dtype=torch.float64) / width
        scale = (most / 2047 * mean.sqrt() * GAIN).float().half()  # [n, k, 1]
        factor = most / scale.double() / 4094
        factor = factor.masked_fill(scale == 0, 0).float()
        signs = _signs(part.shape[1], width).to(device)
        z = _blocks(F.pad(q, (0, width - q.shape[-1])) * signs)
        z = z.unflatten(-1, (-1, BLOCK)).transpose(-1, -2).reshape(z.shape) * signs
        u = (_blocks(z) * factor).round_().clamp_(-127, 127).add_(127).int()  # [n, k, P]
        codes = _numbers(self.bits).to(device).index_select(0, u.flatten()).view(u.shape)
        codes[..., :SCALE_BITS] = _numbers(self.bits - 1).to(device)[u[..., :SCALE_BITS]] * 2
        bits = scale.view(torch.int16) >> torch.arange(SCALE_BITS, device=device) & 1  # [n, k, 16]
        codes[..., :SCALE_BITS] |= bits.to(torch.uint8)
        out.copy_(codes[..., :: self.per_byte])
        for i in range(1, self.per_byte):
            out |= codes[..., i :: self.per_byte] << self.bits * i

    def _decode(self, data: Tensor, out: Tensor) -> None:
        width, device = data.shape[-1] * self.per_byte, out.device
        low, rest = data[..., : self.scale_bytes], data[..., self.scale_bytes :]
        bits = (low[..., None] >> self.bits * torch.arange(self.per_byte, device=device) & 1).flatten(-2)  # [n, k, 16]
        scale = (bits.int() << torch.arange(SCALE_BITS, device=device)).sum(-1, keepdim=True).to(torch.int16)
        parts = ((low, _of_bytes(self.bits, 1)), (rest, _of_bytes(self.bits, 0)))
        z = torch.cat([F.embedding(part.int(), table.to(device)).flatten(-2) for part, table in parts], -1)  # [n, k, P]
        signs = _signs(data.shape[1], width).to(device)
        z = _blocks(z) * signs
        y = _blocks(z.unflatten(-1, (BLOCK, -1)).transpose(-1, -2).reshape(z.shape)) * signs
        torch.mul(y[..., : out.shape[-1]], scale.view(torch.float16).float() / 2048, out=out)


CODECS: dict[str, Codec] = {c.name: c for c in (Float16(), Int8(), Rotated("int4", 4), Rotated("int2", 2))}


def get_codec(name: str) -> Codec:
    """The codec of that name; ValueError if there is none."""
    if name not in CODECS:
        raise ValueError(f"There is no codec {name!r}: there are {', '.join(CODECS)}.")
    return CODECS[name]


def _told(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _parts(summary: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, summary.shape[1] * summary.shape[2]))
    for start in range(0, len(summary), step):
        yield slice(start, start + step)


def _blocks(x: Tensor) -> Tensor:
    """Each 64 in a row times H."""
    with torch.autocast(x.device.type, enabled=False):  # whose products are not exact
        return (x.reshape(-1, BLOCK) @ _hadamard().to(x.device)).view(x.shape)


@lru_cache(maxsize=1)
def _hadamard() -> Tensor:
    place = range(BLOCK)
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in place] for i in place])


@lru_cache(maxsize=16)
def _signs(k: int, width: int) -> Tensor:
    """[k, P], ±1"""
    h, low = torch.arange(k * width), 0xFFFFFFFF  # int64, whose products are right in the low 32 bits
    h = ((h ^ h >> 16) * 0x85EBCA6B) & low
    h = ((h ^ h >> 13) * 0xC2B2AE35) & low
    return (1.0 - 2 * ((h ^ h >> 16) & 1)).view(k, width)


def _levels(bits: int) -> Tensor:
    return torch.tensor([*(-level for level in reversed(LEVELS[bits])), *LEVELS[bits]])  # [2^bits]


@lru_cache(maxsize=8)
def _numbers(bits: int) -> Tensor:
    """The number of the level nearest to u, at u + 127; uint8 [255]"""
    levels = _levels(bits)
    middle = (levels[1:] + levels[:-1]) / 2
    return (torch.arange(-127, 128)[:, None] >= middle).sum(1).to(torch.uint8)


@lru_cache(maxsize=8)
def _of_bytes(bits: int, stolen: int) -> Tensor:
    """The levels in each byte, [256, 8 / bits]; `stolen` is how many low bits of a code are not the level's number."""
    codes = torch.arange(256)[:, None] >> bits * torch.arange(8 // bits) & 2**bits - 1
    return _levels(bits - stolen)[codes >> stolen].float()
