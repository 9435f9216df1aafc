"""The codecs of summaries: against decoders written from the docstrings alone, and at the edges of what they hold."""

import math
import struct

import numpy as np
import pytest
import torch

from llava_fwd2bot.bottleneck import embed
from llava_fwd2bot.cache.codecs import CODECS, get_codec

NAMES = tuple(CODECS)
SIZES = (1, 7, 64, 100, 128, 576)
# of the error of a token over its length: int8's where the largest of Gaussians is 4 deviations, half a step of it;
# int4's and int2's are those of the best levels, sixteen numbers at a bit less, of 64 where D is small
BOUNDS = {"float16": 6e-4, "int8": 0.02, "int4": 0.12, "int2": 0.40}


def summaries(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(codec, summary: torch.Tensor) -> torch.Tensor:
    """[N, k]"""
    decoded = codec.decode(codec.encode(summary), summary.shape[-1])
    return (decoded - summary).norm(dim=-1) / summary.norm(dim=-1)


def reference(name: str, data: bytes, token: int, size: int) -> list[float]:
    """One token, decoded as the docstrings say, number by number."""
    if name == "float16":
        return list(struct.unpack(f"<{size}e", data))
    if name == "int8":
        scale, *codes = struct.unpack(f"<e{size}b", data)
        return [float(np.float32(scale) * np.float32(code)) for code in codes]
    bits = {"int4": 4, "int2": 2}[name]
    halves = {4: [6, 18, 31, 44, 58, 75, 96, 127], 3: [11, 35, 62, 100], 2: [21, 70], 1: [37]}
    levels = {b: [-x for x in reversed(half)] + half for b, half in halves.items()}
    per, width = 8 // bits, math.ceil(size / 64) * 64
    assert len(data) * per == width
    codes = [data[i // per] >> bits * (i % per) & (2**bits - 1) for i in range(width)]
    scale = struct.unpack("<e", sum((codes[i] & 1) << i for i in range(16)).to_bytes(2, "little"))[0]
    z = [levels[bits - 1][c >> 1] if i < 16 else levels[bits][c] for i, c in enumerate(codes)]
    signs = []
    for i in range(width):
        h = token * width + i
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        signs.append(1 - 2 * ((h ^ h >> 16) & 1))

    def blocks(x: list[int]) -> list[int]:
        found = []
        for at in range(0, width, 64):
            part = x[at : at + 64]
            found += [sum(-v if (i & j).bit_count() % 2 else v for i, v in enumerate(part)) for j in range(64)]
        return [v * g for v, g in zip(found, signs, strict=True)]

    z, count = blocks(z), width // 64
    y = blocks([z[c * count + r] for r in range(count) for c in range(64)])
    return [float(np.float32(scale) / np.float32(2048) * np.float32(v)) for v in y[:size]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_a_decoder_written_from_the_docstring_decodes_the_same(name, size):
    """A file must be readable by other programs, on other machines, in years: to the last bit."""
    codec = get_codec(name)
    data = codec.encode(summaries(2, 3, size) * torch.tensor([1.0, 300.0]).view(2, 1, 1))
    assert data.dtype == torch.uint8 and data.shape == (2, 3, codec.bytes_per_token(size))
    decoded = codec.decode(data, size)
    assert decoded.dtype == torch.float32
    for image in range(2):
        for token in range(3):
            expected = reference(name, bytes(data[image, token].tolist()), token, size)
            assert decoded[image, token].tolist() == expected


@pytest.mark.parametrize("name", NAMES[1:])
def test_any_bytes_decode_as_the_docstring_says(name):
    """Encoders of one's own may choose codes that ours never writes, such as int8's −128."""
    codec, data = get_codec(name), torch.arange(256).to(torch.uint8)
    data = data.repeat(4)[: codec.bytes_per_token(320)].view(1, 1, -1).clone()
    data[..., :16] &= 0x7F  # no scale of infinity
    assert codec.decode(data, 320).flatten().tolist() == reference(name, bytes(data.flatten().tolist()), 0, 320)


def test_the_bytes_are_these():
    """A change of the format would leave every file that was written unreadable, and pass the other tests."""
    summary = torch.linspace(-1, 1, 64).view(1, 1, 64)
    assert bytes(get_codec("float16").encode(summary)[0, 0, :4].tolist()).hex() == "00bcbfbb"
    assert bytes(get_codec("int8").encode(summary)[0, 0, :4].tolist()).hex() == "09208185"
    assert (
        bytes(get_codec("int4").encode(summary)[0, 0].tolist()).hex()
        == "ba0995cd164fdb62da16793b58197c2cb78b595a758d538c15575935a6c566b3"
    )
    assert bytes(get_codec("int2").encode(summary)[0, 0].tolist()).hex() == "3ebd340f1e362637a966b5b45116d9c5"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", (64, 576, 4096))
def test_the_error_is_small(name, size):
    """The bounds that the module's table gives; sixteen of 64 numbers have a bit less, hence more for a width of 64."""
    bound = BOUNDS[name] * (1.35 if size == 64 else 1)
    assert relative(get_codec(name), summaries(3, 4, size)).max() < bound


@pytest.mark.parametrize("name", ("int4", "int2"))
@pytest.mark.parametrize("size", (64, 128, 192, 576, 4096))
@pytest.mark.parametrize("kind", ("outlier", "constant", "wave", "offset"))
def test_the_rotation_makes_tokens_gaussian(name, size, kind):
    """Language models have channels far above the rest; one of them must not take all levels for itself.

    Narrow tokens too: two transforms of a single block, or of two, would undo each other without the signs between.
    """
    summary = summaries(1, 8, size) * 0.01
    if kind == "outlier":
        summary[..., size // 2] = 0.01 * size**0.5  # as much as all others together
    elif kind == "constant":
        summary[:] = 1
    elif kind == "wave":
        summary += (-1.0) ** torch.arange(size)
    else:
        summary += 3
    # few outlines of ±: further from Gaussian than noise is, the more so the fewer numbers
    assert relative(get_codec(name), summary).mean() < BOUNDS[name] * (1.5 if size < 576 else 1.15)


def test_errors_of_tokens_that_are_alike_cancel_in_their_mean():
    """Retrieval compares means over tokens, which are much alike: with one rotation for all, all would err alike."""
    summary = summaries(4, 1, 576) + 0.1 * summaries(4, 16, 576, seed=1)
    for name in ("int4", "int2"):
        codec = get_codec(name)
        found, expected = (embed(s, "mean") for s in (codec.decode(codec.encode(summary), 576), summary))
        assert (found - expected).norm(dim=-1).max() < 0.35 * relative(codec, summary).mean()


def test_int8_errs_by_half_a_step_at_most():
    """Also where the scale was rounded up, and where the largest number is at the end of the codes."""
    for factor in (1e-3, 1.0, 1e3):
        summary = summaries(5, 4, 100) * factor
        codec = get_codec("int8")
        step = summary.abs().amax(-1, keepdim=True) / 127 * 1.001 + 2.0**-24
        assert ((codec.decode(codec.encode(summary), 100) - summary).abs() <= step / 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_encoded_and_decoded_as_the_prefix(name):
    """One stored summary serves every k: its first j · B bytes are that of j tokens, bit by bit, in any batch."""
    codec, summary = get_codec(name), summaries(40, 16, 576)
    data = codec.encode(summary)
    decoded = codec.decode(data, 576)
    for j in (1, 3, 16):
        assert torch.equal(codec.encode(summary[:, :j]), data[:, :j])
        assert torch.equal(codec.decode(data[:, :j], 576), decoded[:, :j])
    assert torch.equal(codec.encode(summary[7:8]), data[7:8])
    assert torch.equal(codec.decode(data[7:9], 576), decoded[7:9])
    flat = data.flatten(1)[:, : 3 * codec.bytes_per_token(576)]
    assert torch.equal(codec.decode(flat.view(40, 3, -1), 576), decoded[:, :3])


@pytest.mark.parametrize("name", NAMES)
def test_what_was_decoded_is_near_when_encoded_again(name):
    """Files are made of files: an error that grew at every step would end in noise."""
    codec, summary = get_codec(name), summaries(2, 4, 576)
    for _ in range(3):
        summary = codec.decode(codec.encode(summary), 576)
    assert (summary - summaries(2, 4, 576)).norm() / summaries(2, 4, 576).norm() < 1.6 * BOUNDS[name]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_encoded_as_its_numbers(name):
    """Stored summaries are float16 or bfloat16, not only float32; all hold the same numbers here."""
    codec, summary = get_codec(name), summaries(2, 3, 70).bfloat16()
    expected = codec.encode(summary.float())
    assert torch.equal(codec.encode(summary), expected)
    assert torch.equal(codec.encode(summary.double()), expected)
    assert torch.equal(codec.encode(summary.half()), expected)  # of these, none is below float16's normal numbers


@pytest.mark.parametrize("name", NAMES)
def test_layout_grad_and_autocast_do_not_matter(name):
    """A transposed or trained summary, and a caller under autocast, whose products would round."""
    codec, summary = get_codec(name), summaries(3, 2, 128)
    expected = codec.encode(summary)
    turned = summary.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(turned), expected)
        decoded = codec.decode(expected.transpose(0, 2).contiguous().transpose(0, 2), 128)
    assert torch.equal(decoded, codec.decode(expected, 128)) and not decoded.requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ((0, 4, 64), (0, 0, 5), (3, 0, 64)))
def test_nothing_is_nothing(name, shape):
    """A folder without images, and k = 0, are no reason to fail."""
    codec = get_codec(name)
    data = codec.encode(torch.zeros(shape))
    assert data.shape == (*shape[:2], codec.bytes_per_token(shape[2])) and data.dtype == torch.uint8
    assert codec.decode(data, shape[2]).shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_zero_tokens_are_exact_and_leave_others_alone(name):
    """Padding is zeros; a scale of 0 must not be divided by."""
    codec, summary = get_codec(name), summaries(2, 3, 100)
    summary[0, 1] = summary[1, 2] = 0
    decoded = codec.decode(codec.encode(summary), 100)
    assert (decoded[0, 1] == 0).all() and (decoded[1, 2] == 0).all()
    other = codec.decode(codec.encode(summaries(2, 3, 100)), 100)
    assert torch.equal(decoded[0, ::2], other[0, ::2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", (1e-3, 1e-2, 30.0, 1e4))
def test_scales_of_any_size(name, factor):
    """Widths and bases differ by orders in how large their hidden states are."""
    assert relative(get_codec(name), summaries(2, 3, 576) * factor).max() < BOUNDS[name] * 1.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", (1e-6, 1e-8, 1e-12, 1e-38, 1e-45))
def test_what_is_too_small_for_the_scale_fades(name, factor):
    """Below float16's smallest scale the error is a small number, never NaN, infinity or a sudden large one."""
    summary = summaries(2, 3, 128) * factor
    decoded = get_codec(name).decode(get_codec(name).encode(summary), 128)
    assert torch.isfinite(decoded).all()
    assert (decoded - summary).norm(dim=-1).max() <= summary.norm(dim=-1).max() + 127 * 2**-24


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_that_can_be_kept_is_and_more_is_refused_with_its_row(name):
    """A float16 that overflows is silent, and infinity in one image spoils every batch that it is in."""
    codec, summary = get_codec(name), summaries(300, 2, 1024)
    summary[260, 1] = codec.largest * summary[260, 1].sign()  # all of them, the worst for the scale
    assert torch.isfinite(codec.decode(codec.encode(summary), 1024)).all()
    assert relative(codec, summary)[260, 1] < BOUNDS[name] * 1.1
    summary[260, 1, 3] *= -1.01
    with pytest.raises(ValueError, match=rf"{name} cannot keep row 260, token 1: .* is larger than"):
        codec.encode(summary)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_numbers_that_are_not_finite_are_refused_with_their_row(name, bad):
    """They have no code; what is written instead would be read as a picture of something else."""
    summary = summaries(300, 2, 1024)  # in several chunks
    summary[270, 1, 5] = bad
    with pytest.raises(ValueError, match="row 270, token 1: .* is not finite"):
        get_codec(name).encode(summary)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_summary_is_refused(name):
    """With what was given in the message: the codec is where a wrong tensor of a file is first looked at."""
    codec = get_codec(name)
    with pytest.raises(TypeError, match=r"a tensor of floats, not torch.int64 \[1, 2, 64\]"):
        codec.encode(torch.zeros(1, 2, 64, dtype=torch.long))
    with pytest.raises(TypeError, match="not ndarray"):
        codec.encode(np.zeros((1, 2, 64)))
    for shape in ((2, 64), (1, 2, 0), (1, 1, 2, 64)):
        with pytest.raises(ValueError, match=r"keeps summaries \[N, k, D\]"):
            codec.encode(torch.zeros(shape))
    data = codec.encode(torch.zeros(1, 2, 64))
    with pytest.raises(TypeError, match="a tensor of uint8, not torch.float32"):
        codec.decode(data.float(), 64)
    for wrong, size in ((data[0], 64), (data[..., :-1], 64), (data, 65 + 64), (data[..., :0], 0), (data, -64)):
        with pytest.raises(ValueError, match=f"{name} decodes"):
            codec.decode(wrong, size)


def test_names():
    """They are in files and on command lines."""
    assert NAMES == ("float16", "int8", "int4", "int2") and all(get_codec(name).name == name for name in NAMES)
    with pytest.raises(ValueError, match="no codec 'int3': there are float16, int8, int4, int2"):
        get_codec("int3")


def test_bytes_are_what_is_promised():
    """At LLaVA-1.5-7B's width and k = 16: 34 KiB for int4, 17 for int2; a quarter and an eighth of float16, scales in.

    float16 has 128 KiB there. Widths of no multiple of 64 are padded.
    """
    size = {name: CODECS[name].bytes_per_token for name in NAMES}
    assert 16 * size["int4"](4096) <= 34 * 1024 and 16 * size["int2"](4096) <= 17 * 1024
    for width in (64, 576, 960, 4096, 5120):
        assert size["float16"](width) == 2 * width and size["int8"](width) == width + 2
        assert 4 * size["int4"](width) == size["float16"](width) == 8 * size["int2"](width)
    assert (size["int4"](65), size["int2"](65), size["int4"](1), size["int2"](1)) == (64, 32, 32, 16)
