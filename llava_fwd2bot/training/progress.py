"""What a training run says: a header, where it resumes, a checkpoint when it is interrupted, the next command."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from transformers import TrainerCallback


def header(model: nn.Module, args: Any, rows: int, images: int, captioned: int, checkpoint: str | None) -> str:
    """The run in four lines.

    Args:
        args: the training arguments. rows, images, captioned: of the data; rows that have a caption.
        checkpoint: where the run resumes.
    """
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    whole = sum(_size(p) for p in model.parameters())
    per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else -(-rows // per_step) * args.num_train_epochs
    lines = [
        f"data       {rows:,} rows, {images:,} images, {captioned:,} rows with a caption",
        f"parameters {trained:,} trained of {whole:,} ({100 * trained / whole:.1f} %)",
        f"steps      {int(steps):,} of {per_step} rows, on {args.world_size} × {args.device.type}",
        f"output     {args.output_dir}",
    ]
    if checkpoint is not None:
        lines.append(f"Resuming from {checkpoint}")
    return "\n".join(lines)


def _size(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's ZeRO-3 leaves an empty tensor


def next_command(output: Path, fwd2bot: bool, captions: bool) -> str:
    """What to type after a run."""
    ask = f'fwd2bot ask --model {output} --image FILE "What is in the image?"'
    if not (fwd2bot and captions):
        return f"Next: {ask}"
    return f"Next: {ask}\n      fwd2bot compress --model {output} --images FOLDER --cache photos.cache"


class SaveOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM save a checkpoint after the running step, and end the run; a second Ctrl-C ends it at once.

    Several processes get the signal at different steps, so it is used with one alone.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job is not for Ctrl-C
                    self._before[number] = signal.signal(number, self._take)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print("\nInterrupted: saving a checkpoint after this step. Ctrl-C again ends at once.", file=sys.stderr)
