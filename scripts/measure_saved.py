"""Bytes that a training forward saves for backward, and the lines of code that save most.

    python scripts/measure_saved.py --dtype bfloat16 --batch 2

In bfloat16 it runs under autocast, as the Trainer does with --bf16. Weights and buffers are not counted; tensors that
share memory count once. A LoRA step of the host by PEFT is measured beside it, on the same base and batch; PEFT's own
layers keep copies that ours do not (see `modeling.adapters.cast_input`).
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from bench_common import autocast, batch_of, build, finish, parser, prepare, twin, with_fwd2bot, with_lora
from torch import Tensor, nn

_BETWEEN = ("torch/nn/modules/module.py", "torch/nn/modules/container.py", "torch/utils/_contextlib.py")


def saved_for_backward(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype) -> Counter[str]:
    """Bytes by origin: the two innermost lines of Python that saved them, and their dtype."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: Counter[str] = Counter()
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(tensor)
            frames = [f for f in traceback.extract_stack()[:-1] if not f.filename.endswith(_BETWEEN)][: -3 - 1 : -1]
            where = " < ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in frames)
            found[f"{frames[0].line}  [{where}] {str(tensor.dtype)[6:]}"] += storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(device, dtype):
        loss = model(**batch).loss
    loss.backward()
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--k", type=int, default=16)
    options.add_argument("--contrastive", action="store_true", help="with captions")
    options.add_argument("--top", type=int, default=12, help="lines of code to print")
    options = options.parse_args(argv)
    shape, dtype = prepare(options)
    base = build(shape, options.device, dtype)
    result: dict[str, Any] = {"shape": options.shape, "batch": options.batch, "k": options.k, "dtype": options.dtype}
    for side in ("host", "fwd2bot"):
        model = (
            with_lora(twin(base), options.lora_r) if side == "host" else with_fwd2bot(base, options.k, options.lora_r)
        )
        captions = options.contrastive and side == "fwd2bot"
        batch = batch_of(shape, options.batch, shape.text_tokens, options.device, dtype, captions)
        if side == "host":
            batch["use_cache"] = False
        else:
            lengths, shown = [shape.dense_tokens] * options.batch, list(range(options.batch))
            batch["plan"] = model.planner()(batch, options.batch, lengths, shown).to(options.device)
            batch["return_logits"] = False
        found = saved_for_backward(model, batch, dtype)
        result[side] = {"bytes": found.total(), "largest": dict(found.most_common(options.top))}
        print(f"{side}: {found.total():,} bytes saved for backward")
        for origin, size in found.most_common(options.top):
            print(f"  {size:>12,}  {size / found.total():5.1%}  {origin}")
    result["ratio"] = result["fwd2bot"]["bytes"] / result["host"]["bytes"]
    print(f"fwd2bot over host: {result['ratio']:.3f}")
    return finish(result, options)


if __name__ == "__main__":
    main()
