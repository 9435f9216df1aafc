"""Time to the first token: base from the image, Fwd2Bot from the image, Fwd2Bot from a cached summary; decoding speed.

    python scripts/bench_infer.py --shape toy --k 16 4 --json

The prompt is the same on all sides, one row. The base is the stock class on the same weights, with nothing of ours on
it, and so no slower than Fwd2Bot disabled.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bench_common import (
    batch_of,
    build,
    finish,
    in_turn,
    parser,
    prepare,
    ratio,
    shape_facts,
    summarize,
    table,
    twin,
    with_fwd2bot,
)

COMPRESS_BATCHES = (1, 8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    shape, dtype = prepare(options)
    text = options.text_tokens or min(40, shape.text_tokens)
    n, most = shape.dense_tokens, max(options.k)
    print(f"shape {options.shape}: n = {n}, k = {options.k}, prompt {text}, {options.new_tokens} new tokens")
    base = build(shape, options.device, dtype).eval()
    model = with_fwd2bot(twin(base), most, options.lora_r).eval()
    prompt = batch_of(shape, 1, text, options.device, dtype)
    prompt.pop("labels")
    pixels = prompt.pop("pixel_values")

    def generate(side: torch.nn.Module, tokens: int, **image: Any) -> None:
        out = side.generate(**prompt, **image, max_new_tokens=tokens, do_sample=False)
        assert out.shape[1] == prompt["input_ids"].shape[1] + tokens

    with torch.no_grad():
        stored = model.compress(pixels)  # a prefix of it is the summary for fewer tokens
    first, decoding = {}, {}
    for new_tokens, into in ((1, first), (options.new_tokens, decoding)):
        into["base"] = lambda t=new_tokens: generate(base, t, pixel_values=pixels)
        for k in options.k:
            into[f"image, k = {k}"] = lambda t=new_tokens, k=k: generate(model, t, pixel_values=pixels, num_tokens=k)
            into[f"cached, k = {k}"] = lambda t=new_tokens, k=k: generate(model, t, summary=stored[:, :k])
    ttft = in_turn(first, options.rounds, options.device, warmup=2)
    whole = in_turn(decoding, max(options.rounds // 3, 1), options.device)

    @torch.no_grad()
    def compress(images: torch.Tensor, k: int) -> None:
        model.compress(images, num_tokens=k)

    batches = {(k, b): pixels.repeat(b, 1, 1, 1) for k in options.k for b in COMPRESS_BATCHES}
    sides = {f"{k}, {b}": lambda k=k, b=b: compress(batches[k, b], k) for k, b in batches}
    compressing = in_turn(sides, max(options.rounds // 5, 1), options.device)

    size = torch.finfo(dtype).bits // 8
    kv = 2 * shape.layers * shape.hidden * size  # bytes of keys and values of one token
    by_k = {}
    for k in options.k:
        cached, image = f"cached, k = {k}", f"image, k = {k}"
        by_k[str(k)] = {
            "ttft_ratio": ratio(ttft["base"], ttft[cached]),
            "ttft_ratio_image_over_cached": ratio(ttft[image], ttft[cached]),
            "ttft_ratio_image_over_base": ratio(ttft[image], ttft["base"]),
            "compress_ms_per_image": {
                str(b): summarize([1000 * s / b for s in compressing[f"{k}, {b}"]]) for b in COMPRESS_BATCHES
            },
            "bytes_per_image": {
                "summary": k * shape.hidden * size,
                "dense": n * shape.hidden * size,
                "kv_of_summary": k * kv,
                "kv_of_dense": n * kv,
            },
        }
    headline = by_k[str(options.k[0])]
    result = {
        "bench": "infer",
        "shape": options.shape,
        "k": options.k[0],
        "n": n,
        "ttft_ratio": headline["ttft_ratio"]["ratio"],
        "ttft_ratio_image_over_cached": headline["ttft_ratio_image_over_cached"]["ratio"],
        "by_k": by_k,
        "ttft_ms": {name: summarize([1000 * s for s in values]) for name, values in ttft.items()},
        "tokens_per_second": {
            name: summarize([options.new_tokens / s for s in values]) for name, values in whole.items()
        },
        "tokens": {"prompt": text, "new": options.new_tokens},
        **shape_facts(shape, text),
        "lora_r": options.lora_r,
        "dtype": options.dtype,
        "rounds": options.rounds,
    }
    _report(result)
    return finish(result, options)


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--k", type=int, nargs="+", default=[16], help="one model for the largest k of them")
    options.add_argument("--rounds", type=int, default=15, help="of the time to the first token; the others run fewer")
    options.add_argument("--text-tokens", type=int, help="of the prompt, the image left out; default: 40")
    options.add_argument("--new-tokens", type=int, default=32)
    return options


def _report(result: dict[str, Any]) -> None:
    speed = result["tokens_per_second"]
    rows = [
        [name, times["median"], times["min"], times["max"], speed[name]["median"], speed[name]["max"]]
        for name, times in result["ttft_ms"].items()
    ]
    table(["side", "first token ms", "min", "max", f"tokens/s over {result['tokens']['new']}", "max"], rows)
    for k, of in result["by_k"].items():
        for name in ("ttft_ratio", "ttft_ratio_image_over_cached", "ttft_ratio_image_over_base"):
            found = of[name]
            print(
                f"k = {k}: {name} {found['ratio']:.3g} (quartiles {found['lower_quartile']:.3g} to "
                f"{found['upper_quartile']:.3g}, fastest rounds {found['of_minima']:.3g})"
            )
        compress = ", ".join(f"{ms['median']:.1f} in batches of {b}" for b, ms in of["compress_ms_per_image"].items())
        size = ", ".join(f"{name} {value}" for name, value in of["bytes_per_image"].items())
        print(f"k = {k}: compress, ms per image: {compress}; bytes per image: {size}")


if __name__ == "__main__":
    main()
