"""The original LLaVA's own evaluation programs, unchanged, with a Fwd2Bot model.

    fwd2bot llava eval model_vqa_loader --model-path my-fwd2bot --question-file … --answers-file … [--k 8]

The module runs as by `python -m llava.eval.MODULE`, with `load_pretrained_model` replaced by ours. LLaVA's scorers read
its answer files.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ..checkpoint.original import load_pretrained_model
from ..hosts.original import shims
from .original_options import eval_options
from .original_summaries import from_cache


def evaluate(argv: Sequence[str]) -> None:
    """Runs `llava.eval.MODULE` on the rest of `argv`.

    Raises:
        ImportError: the module does not exist, or LLaVA is not installed.
    """
    own, theirs = eval_options().parse_known_args(list(argv))
    from llava.model import builder

    load = partial(load_pretrained_model, num_tokens=own.k)
    load.without_fwd2bot = builder.load_pretrained_model
    before, sys.argv = sys.argv, [f"llava/eval/{own.module}.py", *theirs]
    try:
        with ExitStack() as stack:
            for block in (_without_cuda(), _initialisation_kept()):
                stack.enter_context(block)
            if own.from_cache:
                load = stack.enter_context(from_cache(own.from_cache, theirs, load))
            stack.enter_context(shims.rebound(builder, load_pretrained_model=load))
            runpy.run_module(f"llava.eval.{own.module}", run_name="__main__")
    finally:
        sys.argv = before


@contextmanager
def _initialisation_kept() -> Iterator[None]:
    """Restores the initialisation of layers, which LLaVA's programs turn off in order to load faster."""
    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    with (
        shims.rebound(linear, reset_parameters=linear.reset_parameters),
        shims.rebound(norm, reset_parameters=norm.reset_parameters),
    ):
        yield


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Without a GPU, makes `.cuda()`, `device="cuda"` and `.half()` stay on the CPU in float32.

    LLaVA's programs call these without an option for the CPU, so the methods of Tensor are replaced while they run.
    """
    if torch.cuda.is_available():
        yield
        return
    to = torch.Tensor.to

    def stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        def here(value: Any) -> Any:
            if isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda":
                return "cpu"
            return torch.float32 if value is torch.float16 else value

        return to(tensor, *map(here, args), **{name: here(value) for name, value in kwargs.items()})

    here = {"cuda": lambda tensor, *args, **kwargs: tensor, "half": torch.Tensor.float, "to": stay}
    with shims.rebound(torch.Tensor, **here):
        yield
