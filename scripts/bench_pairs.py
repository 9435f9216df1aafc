"""Peak memory of a training step by the size of its contrastive batch, with chunks and gradient checkpointing.

    python scripts/bench_pairs.py --json

The model is small. Relative to its width, its frozen weights take the memory of LLaVA-1.5-7B's weights, gradients and
optimizer state (LoRA, AdamW, one GPU). Its vocabulary is enlarged for that, which costs memory and no time. Each batch
runs in a process of its own. Images and ids are the caller's and grow with the batch. They are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from bench_common import (
    MALLOC,
    SHAPES,
    PeakMemory,
    Shape,
    batch_of,
    build,
    finish,
    parser,
    peak_of,
    prepare,
    table,
    trained,
    with_fwd2bot,
)
from memory_plan import state_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_fwd2bot.modeling import blocks


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(argv)
    shape, dtype = prepare(options)
    if options.alone:
        return _measure(options, shape, dtype)
    result: dict[str, Any] = {"bench": "pairs", "shape": options.shape, "k": options.k, "chunk": options.chunk}
    result["by_pairs"] = {str(pairs): _in_own_process(pairs, options) for pairs in options.pairs}
    first = next(iter(result["by_pairs"].values()))
    rows = []
    for pairs, found in result["by_pairs"].items():
        sizes = {name: (size(found), size(first)) for name, size in SIZES.items()}
        found["ratios"] = {name: own / least for name, (own, least) in sizes.items()}
        mib = [round(size / 2**20, 1) for size in (found["state"], found["tensors"], found["batch"])]
        rows.append([pairs, *mib, *found["ratios"].values(), found["passes"]])
    table(["pairs", "state MiB", "step MiB", "batch MiB", *(f"ratio, {name}" for name in SIZES), "passes"], rows)
    if options.gradients:
        result["gradients"] = _gradient_difference(options.gradients, options, shape)
        print(f"gradients of {options.gradients} pairs, chunked against whole: {result['gradients']}")
    return finish(result, options)


# what is compared: tensors alone are what a GPU would hold; the process also holds Python's and autograd's own objects
SIZES: dict[str, Callable[[dict[str, Any]], int]] = {
    "tensors": lambda found: found["state"] + found["tensors"],
    "process": lambda found: found["peak"] - found["libraries"] - found["batch"],
    "process and batch": lambda found: found["peak"] - found["libraries"],
}


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__.splitlines()[0], shape="tiny")
    options.add_argument("--pairs", type=int, nargs="+", default=[64, 8192], help="the first is what others compare to")
    options.add_argument("--chunk", type=int, default=16)
    options.add_argument("--k", type=int, default=16)
    options.add_argument("--gradients", type=int, help="also compare gradients with those of a whole batch of so many")
    options.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # how it calls itself
    return options


def proportioned(shape: Shape, size: int) -> Shape:
    """The shape with a vocabulary by which its frozen weights weigh what a training 7B's state does for its width.

    Args:
        size: bytes of a number; 7B's activations, which the state is compared with, have 2.
    """
    full = SHAPES["7b"]
    wanted = state_bytes("DDP", full, 1) / full.hidden / 2 * size * shape.hidden
    return replace(shape, vocab=round(wanted / size / 2 / shape.hidden))


class TensorBytes(TorchDispatchMode):
    """The most bytes of tensors at one time that operations made since it began; views of `given` ones do not count.

    What an operation takes and frees within itself is not seen.
    """

    now = peak = 0

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._given = [value.untyped_storage() for value in given]  # kept, so that no other one gets its id
        self._alive = {id(storage) for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


# ---------------------------------------------------------------------- one batch
def _model(options: argparse.Namespace, shape: Shape, dtype: torch.dtype, chunk: int | None) -> nn.Module:
    model = with_fwd2bot(build(shape, options.device, dtype), options.k, options.lora_r).train()
    model.fwd2bot_config.contrastive_chunk = chunk
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _batch(model: nn.Module, pairs: int, options: argparse.Namespace, shape: Shape, dtype: torch.dtype) -> dict:
    """Images and captions, with the collator's plan."""
    batch = batch_of(shape, pairs, shape.text_tokens, options.device, dtype, captions=True)
    batch = {name: v for name, v in batch.items() if name.startswith(("pixel", "caption"))}
    batch["plan"] = model.planner()(batch, pairs, [shape.dense_tokens] * pairs).to(options.device)
    return batch


def _measure(options: argparse.Namespace, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """One size, in this process."""
    libraries, pairs = PeakMemory(options.device).now(), options.pairs[0]
    shape = proportioned(shape, dtype.itemsize)
    model = _model(options, shape, dtype, options.chunk)
    batch = _batch(model, pairs, options, shape, dtype)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rows: list[int] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    step()  # the optimizer's state is part of "before"
    hook.remove()
    found = peak_of(step, options.device)
    state = [*model.parameters(), *model.buffers(), *(v for s in optimizer.state.values() for v in s.values())]
    given = [v for v in (*batch.values(), *vars(batch["plan"].captions).values()) if isinstance(v, Tensor)]
    with TensorBytes([*state, *given]) as tensors:
        step()
    found.update(libraries=libraries, passes=sum(rows) / (2 * pairs), tensors=tensors.peak)
    found.update(state=sum(v.nbytes for v in state), batch=sum(v.nbytes for v in given))
    print(json.dumps(found))
    return found


def _in_own_process(pairs: int, options: argparse.Namespace) -> dict[str, Any]:
    names = ("shape", "lora_r", "device", "dtype", "threads", "k", "chunk")
    given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    run = subprocess.run(
        [sys.executable, __file__, *given, "--pairs", str(pairs), "--alone"],
        env={**os.environ, **MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def _gradient_difference(pairs: int, options: argparse.Namespace, shape: Shape) -> dict[str, float]:
    """The largest difference of gradients with chunks and blocks from the plain ones, in float32, and their largest."""
    found, by_blocks = [], blocks.block_rows
    for chunk, rows in ((None, lambda pairs: pairs), (options.chunk, by_blocks)):
        model = _model(options, shape, torch.float32, chunk)
        for number, parameter in enumerate(model._stages.parameters()):  # adapters that start at 0 hide each other
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
        blocks.block_rows = rows
        model(**_batch(model, pairs, options, shape, torch.float32)).loss.backward()
        found.append([p.grad for p in trained(model) if p.grad is not None])
    blocks.block_rows = by_blocks
    difference = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    return {"difference": difference, "largest": max(float(g.abs().max()) for g in found[0])}


if __name__ == "__main__":
    main()
