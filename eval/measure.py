"""Time and memory, measured side by side.

A single timing means little on a shared machine, so results are ratios of runs that took turns in one process, round by
round.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm.auto import tqdm

from llava_fwd2bot.version import __version__


def in_turn(
    sides: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warmup: int = 1, limit: float | None = None
) -> dict[str, list[float]]:
    """Seconds of each side in each round. The order of the sides is reversed from one round to the next.

    No round starts after `limit` seconds, but one is always measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.monotonic()
    for turn in tqdm(range(-warmup, rounds), desc="rounds", unit="round"):  # updated outside the timed calls
        if limit is not None and turn > 0 and time.monotonic() - begin > limit:
            break
        names = list(sides) if turn % 2 else list(reversed(sides))
        for name in names:
            _synchronize(device)
            start = time.perf_counter()
            sides[name]()
            _synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(values: list[float]) -> dict[str, float]:
    low, middle, high = quartiles(values)
    return {"median": middle, "min": min(values), "max": max(values), "lower_quartile": low, "upper_quartile": high}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios, the ratio of the medians, and that of the fastest rounds."""
    low, middle, high = quartiles([a / b for a, b in zip(over, under, strict=True)])
    return {
        "ratio": middle,
        "lower_quartile": low,
        "upper_quartile": high,
        "of_medians": statistics.median(over) / statistics.median(under),
        "of_minima": min(over) / min(under),
    }


def break_even(compress: float, answer: float, base: float) -> int | None:
    """The number of questions from which compressing once is cheaper than the base each time; None: never."""
    if answer >= base:
        return None
    return max(1, math.floor(compress / (base - answer)) + 1)


class PeakMemory:
    """Peak memory of this process: allocated bytes on CUDA, otherwise resident bytes, by the kernel's high-water mark.

    If the mark cannot be reset (`exact` is False), the peak includes everything before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.exact = device, True

    def now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        # freed memory that the process still holds would be reused by the next step, and not be counted
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = _status("VmHWM") <= _status("VmRSS") + 2**24
        except OSError:
            self.exact = False

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


# makes glibc return freed memory to the system, so that the peak is what the step needs
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def _status(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: only the peak since the start is known
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return int(re.search(rf"{name}:\s+(\d+) kB", text).group(1)) * 1024


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "instructions": _instructions(),
        "threads": torch.get_num_threads(),
        "llava_fwd2bot": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _instructions() -> str:
    """The processor's widest vector and matrix instructions."""
    try:
        flags = set(re.search(r"flags\s*:(.+)", Path("/proc/cpuinfo").read_text()).group(1).split())
    except (OSError, AttributeError):
        return platform.machine()
    return " ".join(name for name in ("avx2", "avx512f", "amx_tile") if name in flags) or platform.machine()
