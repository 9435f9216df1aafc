"""Time to the first token: base from the image, Fwd2Bot from the image, Fwd2Bot from a cached summary; decoding speed.

    python scripts/bench_infer.py --shape toy --k 16 4 --json

The prompt is the same on all sides, one row. The base is the stock class on the same weights, with nothing of ours on
it, and so no slower than Fwd2Bot disabled. A fourth side is the base on words alone, as many as summary and prompt have
tokens: no cached summary is faster than that. Its ratio to the base depends on the machine alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from bench_common import (
    Clock,
    Shape,
    achieved,
    batch_of,
    build,
    clocked,
    finish,
    free,
    in_turn,
    parser,
    peak_of,
    prepare,
    ratio,
    shape_facts,
    summarize,
    table,
    twin,
    with_fwd2bot,
    write,
)
from torch import Tensor, nn

COMPRESS_BATCHES = (1, 8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    shape, dtype = prepare(options)
    text, clock = options.text_tokens or min(40, shape.text_tokens), Clock(options.seconds)
    options.text_tokens = text
    print(f"shape {options.shape}: n = {shape.dense_tokens}, k = {options.k}, prompt {text}, batch {options.batch}")
    base = build(shape, options.device, dtype).eval()
    model = with_fwd2bot(twin(base), max(options.k), options.lora_r).eval()
    if options.adapters == "base":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # the base's own are of that type already, and stay shared
    merged = None
    if options.merged:  # merging changes the weights, so that they cannot be shared
        merged = with_fwd2bot(copy.deepcopy(base), max(options.k), options.lora_r).eval()
        merged._stages.merge("answer")

    result: dict[str, Any] = {"bench": "infer", "shape": options.shape, "k": options.k[0], "n": shape.dense_tokens}
    result.update(shape_facts(shape, text), tokens={"prompt": text, "new": options.new_tokens})
    result.update(lora_r=options.lora_r, dtype=options.dtype, adapters=options.adapters, rounds=options.rounds)
    result["by_batch"], result["left_out"] = {}, []
    parts = len(options.batch) + 1  # compressing is one more

    for i, batch in enumerate(options.batch):
        if clock.over():
            result["left_out"].append(f"answers in batches of {batch}: out of time")
            continue
        try:
            found = _answers(batch, base, model, merged, options, shape, dtype, clock.share(1 / (parts - i)))
        except torch.cuda.OutOfMemoryError:
            result["left_out"].append(f"answers in batches of {batch}: out of memory")
        else:
            result["by_batch"][str(batch)] = found
        free(options.device)
        write(result, options)
    if not result["by_batch"]:
        raise SystemExit("Nothing was measured: " + "; ".join(result["left_out"]))
    compressing = _compressing(model, options, shape, dtype, clock, result["left_out"])

    result.update(next(iter(result["by_batch"].values())))  # those of the first batch once more, under their old names
    size = torch.finfo(dtype).bits // 8
    n, kv = shape.dense_tokens, shape.cache_bytes(size)
    for k in options.k:
        result["by_k"][str(k)]["bytes_per_image"] = {
            "summary": k * shape.hidden * size,
            "dense": n * shape.hidden * size,
            "kv_of_summary": k * kv,
            "kv_of_dense": n * kv,
        }
        per_image = {b: found["ms_per_image"] for b, found in compressing[str(k)].items()}
        result["by_k"][str(k)]["compress_ms_per_image"] = per_image
    result["compress"] = compressing
    for batch, found in result["by_batch"].items():
        _report(batch, found, options)
    for k, of in result["by_k"].items():
        compress = ", ".join(f"{ms['median']:.1f} in batches of {b}" for b, ms in of["compress_ms_per_image"].items())
        sizes = ", ".join(f"{name} {value}" for name, value in of["bytes_per_image"].items())
        print(f"k = {k}: compress, ms per image: {compress}; bytes per image: {sizes}")
    for why in result["left_out"]:
        print(why)
    return finish(result, options)


def _answers(
    batch: int,
    base: nn.Module,
    model: nn.Module,
    merged: nn.Module | None,
    options: argparse.Namespace,
    shape: Shape,
    dtype: torch.dtype,
    limit: float | None,
) -> dict[str, Any]:
    """Time to the first token, time of the tokens after it, and memory, of each side on `batch` prompts at once."""
    text, new = options.text_tokens, options.new_tokens
    prompt = batch_of(shape, batch, text, options.device, dtype)
    prompt.pop("labels")
    pixels = prompt.pop("pixel_values")

    def generate(side: nn.Module, tokens: int, **image: Any) -> None:
        out = side.generate(**prompt, **image, max_new_tokens=tokens, do_sample=False)
        assert out.shape[1] == prompt["input_ids"].shape[1] + tokens

    with torch.no_grad():
        stored = model.compress(pixels)  # a prefix of it is the summary for fewer tokens
    first, decoding = {}, {}
    for new_tokens, into in ((1, first), (new, decoding)):
        into["base"] = lambda t=new_tokens: generate(base, t, pixel_values=pixels)
        for k in options.k:
            into[f"image, k = {k}"] = lambda t=new_tokens, k=k: generate(model, t, pixel_values=pixels, num_tokens=k)
            into[f"cached, k = {k}"] = lambda t=new_tokens, k=k: generate(model, t, summary=stored[:, :k])
            if merged is not None:
                into[f"merged, k = {k}"] = lambda t=new_tokens, k=k: generate(merged, t, summary=stored[:, :k])
    for k in options.k:  # as little as a cached summary can take on this machine: words of the base in its place
        words = prompt["input_ids"][:, -1:].repeat(1, k + text)
        first[f"words, k = {k}"] = lambda words=words: base.generate(words, max_new_tokens=1, do_sample=False)
    work: dict[str, list[float]] = {name: [] for name in first}
    first = {name: clocked(side, work[name]) for name, side in first.items()}
    ttft = in_turn(first, options.rounds, options.device, warmup=2, limit=limit and limit / 3)
    whole = in_turn(decoding, max(options.rounds // 3, 1), options.device, limit=limit and limit / 2)

    found: dict[str, Any] = {"batch": batch}
    found["ttft_ratio"] = ratio(ttft["base"], ttft[f"cached, k = {options.k[0]}"])["ratio"]
    over = ratio(ttft[f"image, k = {options.k[0]}"], ttft[f"cached, k = {options.k[0]}"])
    found["ttft_ratio_image_over_cached"] = over["ratio"]
    found["by_k"] = {
        str(k): {
            "ttft_ratio": ratio(ttft["base"], ttft[f"cached, k = {k}"]),
            "ttft_ratio_image_over_cached": ratio(ttft[f"image, k = {k}"], ttft[f"cached, k = {k}"]),
            "ttft_ratio_image_over_base": ratio(ttft[f"image, k = {k}"], ttft["base"]),
            "ttft_ratio_base_over_words": ratio(ttft["base"], ttft[f"words, k = {k}"]),
            "ttft_ratio_cached_over_words": ratio(ttft[f"cached, k = {k}"], ttft[f"words, k = {k}"]),
        }
        for k in options.k
    }
    if merged is not None:
        for k in options.k:
            found["by_k"][str(k)]["ttft_ratio_merged"] = ratio(ttft["base"], ttft[f"merged, k = {k}"])
    if options.device.type == "cpu":
        work = {name: values[-len(ttft[name]) :] for name, values in work.items()}  # without the warm-up
        for k in options.k:
            found["by_k"][str(k)]["processor_time_ratio"] = ratio(work["base"], work[f"cached, k = {k}"])
    found["ttft_ms"] = {name: summarize([1000 * s for s in values]) for name, values in ttft.items()}
    found["tokens_per_second"] = {name: summarize([batch * new / s for s in values]) for name, values in whole.items()}
    operations = {side: shape.first_token_operations(side, text, options.k[0]) for side in ("base", "cached")}
    found["ttft_operations_ratio"] = operations["base"] / operations["cached"]
    start = {name: statistics.median(values) for name, values in ttft.items()}
    later = {name: [s - start[name] for s in values] for name, values in whole.items()}
    # a toy's rounds may vary more than its few tokens take: no figure is better than one below zero
    found["ms_per_token"] = {
        name: summarize([1000 * s / (new - 1) for s in values])
        for name, values in later.items()
        if new > 1 and min(values) > 0
    }
    found.update(_counted(batch, found, options, shape, dtype))
    if options.device.type == "cuda":
        found["memory"] = {name: peak_of(side, options.device) for name, side in decoding.items()}
    return found


def _counted(
    batch: int, found: dict[str, Any], options: argparse.Namespace, shape: Shape, dtype: torch.dtype
) -> dict[str, Any]:
    """Operations and bytes that the sides need at least, over the times that they took."""
    size, text = torch.finfo(dtype).bits // 8, options.text_tokens
    adapter = shape.adapter_weights(options.lora_r) * (size if options.adapters == "base" else 4)
    first, later = {}, {}
    for name in found["ttft_ms"]:
        side, _, k = name.partition(", k = ")
        k = int(k or 0)
        passes, lora = (2 if side == "image" else 1), (adapter if side in ("image", "cached") else 0)
        seconds = found["ttft_ms"][name]["median"] / 1000
        moved = shape.pass_bytes(passes, side in ("base", "image"), 1, size, lora)
        first[name] = achieved(batch * shape.first_token_operations(side, text, k), moved, seconds)
        if name in found["ms_per_token"]:
            context = (shape.dense_tokens if side == "base" else k) + text + options.new_tokens // 2
            moved = shape.pass_bytes(1, False, 1, size, lora) + batch * context * shape.cache_bytes(size)
            seconds = found["ms_per_token"][name]["median"] / 1000
            later[name] = achieved(batch * shape.next_token_operations(context), moved, seconds)
    return {"achieved_first": first, "achieved_later": later}


def _compressing(
    model: nn.Module,
    options: argparse.Namespace,
    shape: Shape,
    dtype: torch.dtype,
    clock: Clock,
    left_out: list[str],
) -> dict[str, dict[str, Any]]:
    """The compress pass alone, with the vision tower, in batches: {k: {batch: …}}."""
    found: dict[str, dict[str, Any]] = {str(k): {} for k in options.k}
    size = torch.finfo(dtype).bits // 8
    adapter = shape.adapter_weights(options.lora_r) * (size if options.adapters == "base" else 4)
    for i, batch in enumerate(options.compress_batch):
        if clock.over():
            left_out.append(f"compressing in batches of {batch}: out of time")
            continue
        pixels = batch_of(shape, batch, options.text_tokens, options.device, dtype)["pixel_values"]

        @torch.no_grad()
        def compress(k: int, pixels: Tensor) -> None:
            model.compress(pixels, num_tokens=k)

        sides = {str(k): lambda k=k, pixels=pixels: compress(k, pixels) for k in options.k}
        share = clock.share(1 / (len(options.compress_batch) - i))
        try:
            seconds = in_turn(sides, max(options.rounds // 5, 1), options.device, limit=share)
        except torch.cuda.OutOfMemoryError:
            left_out.append(f"compressing in batches of {batch}: out of memory")
            continue
        finally:
            free(options.device)
        for k, values in seconds.items():
            median = statistics.median(values)
            moved = shape.pass_bytes(1, True, 0, size, adapter)
            found[k][str(batch)] = {
                "ms_per_image": summarize([1000 * s / batch for s in values]),
                "images_per_second": batch / median,
                "achieved": achieved(batch * shape.compress_operations(int(k)), moved, median),
            }
            if options.device.type == "cuda":
                found[k][str(batch)]["memory"] = peak_of(sides[k], options.device)
    return found


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--k", type=int, nargs="+", default=[16], help="one model for the largest k of them")
    options.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at once, each with its image")
    options.add_argument("--compress-batch", type=int, nargs="+", default=list(COMPRESS_BATCHES), help="images at once")
    options.add_argument("--rounds", type=int, default=15, help="of the time to the first token; the others run fewer")
    options.add_argument("--text-tokens", type=int, help="of the prompt, the image left out; default: 40")
    options.add_argument("--new-tokens", type=int, default=32)
    options.add_argument("--merged", action="store_true", help="also a model with the answer stage's adapter merged")
    options.add_argument(
        "--adapters",
        choices=("base", "float32"),
        default="float32",
        help="their type: the base's, or float32",
    )
    return options


def _report(batch: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"batch {batch}")
    speed = result["tokens_per_second"]
    rows = []
    for name, times in result["ttft_ms"].items():
        tokens = [speed[name]["median"], speed[name]["max"]] if name in speed else ["", ""]
        rows.append([name, times["median"], times["min"], times["max"], *tokens])
    table(["side", "first token ms", "min", "max", f"tokens/s over {options.new_tokens}", "max"], rows)
    for k, of in result["by_k"].items():
        for name, found in of.items():
            if "ratio" not in name:
                continue
            print(
                f"k = {k}: {name} {found['ratio']:.3g} (quartiles {found['lower_quartile']:.3g} to "
                f"{found['upper_quartile']:.3g}, fastest rounds {found['of_minima']:.3g})"
            )


if __name__ == "__main__":
    main()
