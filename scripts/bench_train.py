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
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_common import (
    CAPTION_TOKENS,
    LABELLED,
    MALLOC,
    PROMPT_TOKENS,
    SHAPES,
    PeakMemory,
    Shape,
    autocast,
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
from peft import LoraConfig, get_peft_model
from torch import nn

from llava_fwd2bot import Fwd2BotConfig
from llava_fwd2bot.modeling.adapters import lora_target

SIDES = ("host", "fwd2bot", "fwd2bot_contrastive")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    shape, dtype = prepare(options)
    options.text_tokens = options.text_tokens or shape.text_tokens
    if options.memory_of:
        return _measure_memory(options, shape, dtype)
    n, k, text = shape.dense_tokens, options.k, options.text_tokens
    names = SIDES if options.contrastive else SIDES[:2]
    print(f"shape {options.shape}: n = {n}, k = {k}, text {text}, batch {options.batch}, LoRA r = {options.lora_r}")

    memory = {name: _memory_in_own_process(name, options) for name in names}  # before this process takes its own
    host = build(shape, options.device, dtype)
    models = {"host": _with_lora(twin(host), options), "fwd2bot": with_fwd2bot(host, k, options.lora_r)}
    if options.contrastive:
        models["fwd2bot_contrastive"] = models["fwd2bot"]
    steps = {name: _step(name, model, options, shape, dtype) for name, model in models.items()}
    work: dict[str, list[float]] = {name: [] for name in steps}  # processor time, which neighbours touch less
    seconds = in_turn({name: _clocked(step, work[name]) for name, step in steps.items()}, options.steps, options.device)
    work = {name: values[-options.steps :] for name, values in work.items()}

    facts = shape_facts(shape, text)
    result: dict[str, Any] = {"bench": "train", "shape": options.shape, "k": k, "n": n, "batch": options.batch}
    times = {name: ratio(seconds[name], seconds["host"]) for name in names[1:]}
    result["step_time_ratio"] = times["fwd2bot"]["ratio"]
    result["step_time_ratios"] = times
    if options.device.type == "cpu":
        result["processor_time_ratios"] = {name: ratio(work[name], work["host"]) for name in names[1:]}
    result["operations_ratio"] = {
        name: s.step_operations_ratio(t, k, options.gradient_checkpointing)
        for name, s, t in ((options.shape, shape, text), ("7b", SHAPES["7b"], SHAPES["7b"].text_tokens))
    }
    result["peak_memory_ratio"] = memory["fwd2bot"]["peak"] / memory["host"]["peak"]
    cuda = options.device.type == "cuda"
    result["peak_memory_is"] = "bytes allocated on the GPU" if cuda else "resident bytes, the process and its libraries"
    result["peak_memory_ratios"] = {
        name: {
            "process": memory[name]["peak"] / memory["host"]["peak"],
            "without_libraries": _above(memory[name], "libraries") / _above(memory["host"], "libraries"),
            "step_alone": _above(memory[name], "before") / _above(memory["host"], "before"),
        }
        for name in names[1:]
    }
    result["memory"] = memory
    result["times"] = {name: summarize(values) for name, values in seconds.items()}
    result["tokens"] = {
        "text": text,
        "labelled": int(LABELLED * text),
        "host": n + text,
        "compress_pass": n + PROMPT_TOKENS + k,
        "answer_pass": k + text,
        "caption": CAPTION_TOKENS if options.contrastive else 0,
    }
    trains = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    result.update(facts, lora_r=options.lora_r, dtype=options.dtype, steps=options.steps, trainable=trains)
    result["gradient_checkpointing"] = options.gradient_checkpointing
    _report(result)
    return finish(result, options)


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--steps", type=int, default=15, help="rounds, each one step of every side")
    options.add_argument("--k", type=int, default=16)
    options.add_argument("--text-tokens", type=int, help="text of a row, the image left out; default: the shape's")
    options.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    options.add_argument("--contrastive", action="store_true", help="a third side, with captions: a loss no host has")
    options.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # how it calls itself
    return options


# ---------------------------------------------------------------------- the sides
def _with_lora(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    target = r"(.*\.)?language_model\." + lora_target(Fwd2BotConfig().lora_targets)
    lora = LoraConfig(r=options.lora_r, lora_alpha=2 * options.lora_r, lora_dropout=0.0, target_modules=target)
    return get_peft_model(model, lora)


def _step(
    side: str, model: nn.Module, options: argparse.Namespace, shape: Shape, dtype: torch.dtype
) -> Callable[[], None]:
    """One training step of a side, as the host's or our trainer does it."""
    batch = batch_of(shape, options.batch, options.text_tokens, options.device, dtype, side == "fwd2bot_contrastive")
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # without the cache, which the host would build and drop; our trainer asks for the loss alone
    batch.update({"use_cache": False} if side == "host" else {"return_logits": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        with autocast(options.device, dtype):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _clocked(step: Callable[[], None], into: list[float]) -> Callable[[], None]:
    def clocked() -> None:
        start = time.process_time()
        step()
        into.append(time.process_time() - start)

    return clocked


# ---------------------------------------------------------------------- memory
def _memory_in_own_process(side: str, options: argparse.Namespace) -> dict[str, int]:
    names = ("shape", "lora_r", "device", "dtype", "threads", "batch", "k", "text_tokens")
    given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
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
    memory = PeakMemory(options.device)
    libraries = memory.now()
    model = build(shape, options.device, dtype)
    plain = options.memory_of == "host"
    model = _with_lora(model, options) if plain else with_fwd2bot(model, options.k, options.lora_r)
    step = _step(options.memory_of, model, options, shape, dtype)
    step()  # the optimizer's state is part of "before"
    before, peak = 0, 0
    for _ in range(2):
        memory.reset()
        before = max(before, memory.now())
        step()
        peak = max(peak, memory.peak())
    result = {"libraries": libraries, "before": before, "peak": peak, "exact": memory.exact}
    print(json.dumps(result))
    return result


def _above(memory: dict[str, int], start: str) -> int:
    return max(memory["peak"] - memory[start], 4096)  # a toy step may fit into what was free, and a page is the least


# ---------------------------------------------------------------------- printing
def _report(result: dict[str, Any]) -> None:
    shares, full = result["shares"], result["shares_7b"]
    print("shares of the base's forward: " + ", ".join(f"{n} {shares[n]:.1%} (7B {full[n]:.1%})" for n in shares))
    expected = ", ".join(f"{name} {value:.3f}" for name, value in result["operations_ratio"].items())
    print(f"operations of a step over the host's: {expected}")
    rows = []
    for name, times in result["times"].items():
        memory = result["memory"][name]
        mib = [round((memory[to] - start) / 2**20, 1) for to, start in (("peak", 0), ("peak", memory["before"]))]
        rows.append([name, times["median"], times["min"], times["max"], *mib])
    table(["side", "median s", "min s", "max s", "peak MiB", "of which step"], rows)
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
