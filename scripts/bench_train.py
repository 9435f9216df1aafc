"""One training step with Fwd2Bot over one without: time and peak memory.

    python scripts/bench_train.py --shape toy --json

Without Fwd2Bot: a plain LoRA fine-tune of the same base with PEFT, of the same rank on the same layers, through the
stock `LlavaForConditionalGeneration.forward` with labels. Same weights (shared, in fact), same batch, AdamW on what
trains. The sides step in turn; for memory each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_common import (
    CAPTION_TOKENS,
    LABELLED,
    MALLOC,
    PROMPT_TOKENS,
    SHAPES,
    Clock,
    PeakMemory,
    Shape,
    achieved,
    autocast,
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
    trained,
    twin,
    with_fwd2bot,
    with_lora,
    write,
)
from torch import nn

SIDES = ("host", "fwd2bot", "fwd2bot_contrastive")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    shape, dtype = prepare(options)
    options.text_tokens = options.text_tokens or shape.text_tokens
    if options.memory_of:
        return _measure_memory(options, shape, dtype)
    cuda = options.device.type == "cuda"
    options.memory = options.memory or ("beside" if cuda else "own-process")
    n, k, text, clock = shape.dense_tokens, options.k, options.text_tokens, Clock(options.seconds)
    names = SIDES if options.contrastive else SIDES[:2]
    print(f"shape {options.shape}: n = {n}, k = {k}, text {text}, batch {options.batch}, LoRA r = {options.lora_r}")

    memory: dict[int, dict[str, Any]] = {}
    if options.memory == "own-process":  # before this process takes its own
        memory = {b: {name: _memory_in_own_process(name, b, options) for name in names} for b in options.batch}
    host = build(shape, options.device, dtype)
    models = {"host": with_lora(twin(host), options.lora_r), "fwd2bot": with_fwd2bot(host, k, options.lora_r)}
    if options.contrastive:
        models["fwd2bot_contrastive"] = models["fwd2bot"]

    result: dict[str, Any] = {"bench": "train", "shape": options.shape, "k": k, "n": n}
    result.update(shape_facts(shape, text), lora_r=options.lora_r, dtype=options.dtype, steps=options.steps)
    result["records_per_image"] = options.records_per_image
    result["trainable"] = {name: sum(p.numel() for p in trained(m)) for name, m in models.items()}
    result["tokens"] = {
        "text": text,
        "labelled": int(LABELLED * text),
        "host": n + text,
        "compress_pass": n + PROMPT_TOKENS + k,
        "answer_pass": k + text,
        "caption": CAPTION_TOKENS if options.contrastive else 0,
    }
    result["peak_memory_is"] = "bytes allocated on the GPU" if cuda else "resident bytes, the process and its libraries"
    result["by_batch"], result["left_out"] = {}, []
    for i, batch in enumerate(options.batch):
        if clock.over():
            result["left_out"].append(f"batch {batch}: out of time")
            continue
        share = 1 / (len(options.batch) - i)  # of the time that is left, for this batch
        ways = [options.gradient_checkpointing] if options.gradient_checkpointing or not options.fit else [False, True]
        for options.gradient_checkpointing in ways:
            try:
                found = _of_batch(batch, models, memory.get(batch), options, shape, dtype, clock, share)
            except torch.cuda.OutOfMemoryError:
                found = None
            free(options.device)
            if found is not None:
                break
        options.gradient_checkpointing = ways[0]
        if found is None:
            result["left_out"] += [f"batch {b}: out of memory" for b in options.batch[i:]]
            break
        result["by_batch"][str(batch)] = found
        write({**result, **next(iter(result["by_batch"].values()))}, options)
    if not result["by_batch"]:
        raise SystemExit("Nothing was measured: " + "; ".join(result["left_out"]))
    result.update(next(iter(result["by_batch"].values())))  # those of the first batch once more, under their old names
    shares, full = result["shares"], result["shares_7b"]
    print("shares of the base's forward: " + ", ".join(f"{n} {shares[n]:.1%} (7B {full[n]:.1%})" for n in shares))
    for found in result["by_batch"].values():
        _report(found)
    for why in result["left_out"]:
        print(why)
    return finish(result, options)


def _of_batch(
    batch: int,
    models: dict[str, nn.Module],
    memory: dict[str, dict[str, int]] | None,
    options: argparse.Namespace,
    shape: Shape,
    dtype: torch.dtype,
    clock: Clock,
    share: float,
) -> dict[str, Any]:
    """Memory, then time, of one step of each side on `batch` rows. `memory`: where it was measured before."""
    text, k, checkpointing, names = options.text_tokens, options.k, options.gradient_checkpointing, list(models)
    if memory is None:
        memory = {name: _memory_beside(name, batch, models, options, shape, dtype) for name in names}
    steps = {name: _step(name, model, batch, options, shape, dtype) for name, model in models.items()}
    work: dict[str, list[float]] = {name: [] for name in steps}  # processor time, which neighbours touch less
    sides = {name: clocked(step, work[name]) for name, step in steps.items()}
    seconds = in_turn(sides, options.steps, options.device, limit=clock.share(share))
    work = {name: values[-len(seconds[name]) :] for name, values in work.items()}

    times = {name: ratio(seconds[name], seconds["host"]) for name in names[1:]}
    found: dict[str, Any] = {"batch": batch, "gradient_checkpointing": checkpointing}
    found["step_time_ratio"] = times["fwd2bot"]["ratio"]
    found["step_time_ratios"] = times
    if options.device.type == "cpu":
        found["processor_time_ratios"] = {name: ratio(work[name], work["host"]) for name in names[1:]}
    found["operations_ratio"] = {
        name: s.step_operations_ratio(t, k, checkpointing)
        for name, s, t in ((options.shape, shape, text), ("7b", SHAPES["7b"], SHAPES["7b"].text_tokens))
    }
    found["peak_memory_ratio"] = memory["fwd2bot"]["peak"] / memory["host"]["peak"]
    found["peak_memory_ratios"] = {
        name: {
            "process": memory[name]["peak"] / memory["host"]["peak"],
            "without_libraries": _above(memory[name], "libraries") / _above(memory["host"], "libraries"),
            "step_alone": _above(memory[name], "before") / _above(memory["host"], "before"),
        }
        for name in names[1:]
    }
    found["memory"] = memory
    found["times"] = {name: summarize(values) for name, values in seconds.items()}
    found["operations"] = {name: batch * shape.step_operations(name, text, k, checkpointing) for name in names}
    size = torch.finfo(dtype).bits // 8
    found["least_bytes"] = {name: shape.step_bytes(name, checkpointing, size, options.lora_r) for name in names}
    found["achieved"] = {
        name: achieved(found["operations"][name], found["least_bytes"][name], found["times"][name]["median"])
        for name in names
    }
    return found


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, nargs="+", default=[1], help="one after another; small ones first")
    options.add_argument("--steps", type=int, default=15, help="rounds, each one step of every side")
    options.add_argument("--k", type=int, default=16)
    options.add_argument("--text-tokens", type=int, help="text of a row, the image left out; default: the shape's")
    options.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    options.add_argument("--fit", action="store_true", help="gradient checkpointing for batches that fit only with it")
    options.add_argument(
        "--records-per-image", type=int, default=1, help="rows of a batch that show one image, as --group_by_image"
    )
    options.add_argument("--contrastive", action="store_true", help="a third side, with captions: a loss no host has")
    options.add_argument(
        "--memory",
        choices=("own-process", "beside"),
        help="where it is measured; default: own-process, on a GPU beside",
    )
    options.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # how it calls itself
    return options


# ---------------------------------------------------------------------- the sides
def _step(
    side: str, model: nn.Module, rows: int, options: argparse.Namespace, shape: Shape, dtype: torch.dtype
) -> Callable[[], None]:
    """One training step of a side, as the host's or our trainer does it."""
    batch = batch_of(shape, rows, options.text_tokens, options.device, dtype, side == "fwd2bot_contrastive")
    shown = [row // options.records_per_image for row in range(rows)]  # the image of each row
    if side == "host":
        batch["pixel_values"] = batch["pixel_values"][shown]
    else:  # as our collator gives it
        batch["pixel_values"] = batch["pixel_values"][: shown[-1] + 1]
        batch["plan"] = model.planner()(batch, rows, [shape.dense_tokens] * rows, shown).to(options.device)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    # without the cache, which the host would build and drop; our trainer asks for the loss alone
    batch.update({"use_cache": False} if side == "host" else {"return_logits": False})
    model.train()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-5, fused=options.device.type == "cuda")

    def step() -> None:
        with autocast(options.device, dtype):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---------------------------------------------------------------------- memory
def _memory_beside(
    side: str, rows: int, models: dict[str, nn.Module], options: argparse.Namespace, shape: Shape, dtype: torch.dtype
) -> dict[str, int]:
    """For a GPU, whose allocator tells each byte: beside the other sides, whose own bytes are taken off again."""
    for model in models.values():
        model.zero_grad(set_to_none=True)  # of a step that ran out of memory
    free(options.device)
    own = {id(p) for p in models[side].parameters()}
    others = {id(p): p.nbytes for model in models.values() for p in model.parameters() if id(p) not in own}
    found = _peak(side, models[side], rows, options, shape, dtype)
    return {"libraries": 0, **{name: found[name] - sum(others.values()) for name in ("before", "peak")}, "exact": True}


def _memory_in_own_process(side: str, rows: int, options: argparse.Namespace) -> dict[str, int]:
    names = ("shape", "lora_r", "device", "dtype", "threads", "k", "text_tokens", "records_per_image")
    given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    given += ["--batch", str(rows)]
    given += ["--gradient-checkpointing"] * options.gradient_checkpointing
    run = subprocess.run(
        [sys.executable, __file__, *given, "--memory-of", side],
        env={**os.environ, **MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def _measure_memory(options: argparse.Namespace, shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    libraries = PeakMemory(options.device).now()
    model = build(shape, options.device, dtype)
    plain = options.memory_of == "host"
    model = with_lora(model, options.lora_r) if plain else with_fwd2bot(model, options.k, options.lora_r)
    result = {"libraries": libraries, **_peak(options.memory_of, model, options.batch[0], options, shape, dtype)}
    print(json.dumps(result))
    return result


def _peak(
    side: str, model: nn.Module, rows: int, options: argparse.Namespace, shape: Shape, dtype: torch.dtype
) -> dict[str, int]:
    step = _step(side, model, rows, options, shape, dtype)
    step()  # the optimizer's state is part of "before"
    return peak_of(step, options.device, times=2)


def _above(memory: dict[str, int], start: str) -> int:
    return max(memory["peak"] - memory[start], 4096)  # a toy step may fit into what was free, and a page is the least


# ---------------------------------------------------------------------- printing
def _report(result: dict[str, Any]) -> None:
    print(f"batch {result['batch']}" + ", gradient checkpointing" * result["gradient_checkpointing"])
    expected = ", ".join(f"{name} {value:.3f}" for name, value in result["operations_ratio"].items())
    print(f"operations of a step over the host's: {expected}")
    rows = []
    for name, times in result["times"].items():
        memory = result["memory"][name]
        mib = [round((memory[to] - start) / 2**20, 1) for to, start in (("peak", 0), ("peak", memory["before"]))]
        rows.append([name, times["median"], times["min"], times["max"], result["achieved"][name]["tflops"], *mib])
    table(["side", "median s", "min s", "max s", "TFLOP/s", "peak MiB", "of which step"], rows)
    for name, times in result["step_time_ratios"].items():
        memory = result["peak_memory_ratios"][name]
        print(
            f"{name} over host: step time {times['ratio']:.3f} (quartiles {times['lower_quartile']:.3f} to "
            f"{times['upper_quartile']:.3f}, fastest rounds {times['of_minima']:.3f})\n"
            f"{name} over host: peak memory {memory['process']:.3f} (without libraries "
            f"{memory['without_libraries']:.3f}, step alone {memory['step_alone']:.3f})"
        )
    for name, times in result.get("processor_time_ratios", {}).items():
        print(f"{name} over host: processor time {times['ratio']:.3f}, fastest rounds {times['of_minima']:.3f}")


if __name__ == "__main__":
    main()
