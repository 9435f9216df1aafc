"""Bytes of an encoded summary token by codec; imports no torch, so that commands that decode nothing start quickly."""

from __future__ import annotations

BLOCK = 64  # numbers of the Hadamard transform of int4 and int2; its square root is a power of two
CODEC_NAMES = ("float16", "int8", "int4", "int2")


def bytes_per_token(codec: str, size: int) -> int:
    """B of a token [D], where D is `size`; ValueError for a codec that does not exist."""
    if codec == "float16":
        return 2 * size
    if codec == "int8":
        return size + 2  # with a float16 scale
    if codec in ("int4", "int2"):
        return -(-size // BLOCK) * BLOCK * int(codec[3:]) // 8
    raise ValueError(f"There is no codec {codec!r}: choose among {', '.join(CODEC_NAMES)}.")
