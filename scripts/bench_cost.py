"""The cost of compressing, answering and storing with a checkpoint, compared with its base.

    python scripts/bench_cost.py --model my-fwd2bot --k 4 16 --output cost.json

Parameters, operations (torch's counter), time and peak memory, over k, images at once and questions per image; the
number of questions from which compressing is cheaper; bytes per image. Ratios compare runs measured in turn.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

import _root  # noqa: F401
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from eval.measure import PeakMemory, break_even, environment, in_turn, ratio, summarize
from llava_fwd2bot.checkpoint.load import load_for_inference
from llava_fwd2bot.cli.options import checked, count, model_options
from llava_fwd2bot.evaluation.tables import markdown
from llava_fwd2bot.files.writing import write_json
from llava_fwd2bot.processing.conversation import ConversationFormatter, prompt_ids
from llava_fwd2bot.processing.images import join_pixels, open_image, prepare_pixels

QUESTION = "What is in the picture, and where?"


class Sides:
    """The runs that are measured: the base from an image, compressing, and answers from a summary."""

    def __init__(self, model: nn.Module, processor: Any, image: Image.Image, new_tokens: int) -> None:
        self.model, self.processor, self.new_tokens = model, processor, new_tokens
        self.like = model.get_input_embeddings().weight
        self.pixels = join_pixels([prepare_pixels(processor, model, [image])], self.like)
        prompt = ConversationFormatter(processor).prompt(QUESTION)
        self.prompt = prompt_ids(processor, prompt)["input_ids"].to(self.like.device)
        with torch.no_grad(), model.fwd2bot_disabled():
            self.dense = len(model._dense_tokens(**self.pixels)[0])
        with torch.no_grad():
            self.summary = model.compress(**self.pixels)  # [1, K, D]
        one = (self.prompt[0] == model._image_token_id()).nonzero()[0, 0]
        wide = self.dense if model.prompt_in_output else 1  # the original LLaVA has one id for an image
        middle = self.prompt[:, one : one + 1].expand(1, wide)
        self.wide_prompt = torch.cat([self.prompt[:, :one], middle, self.prompt[:, one + 1 :]], 1)

    @torch.no_grad()
    def compress(self, k: int, count: int = 1) -> None:
        self.model.compress(**self._images(count), num_tokens=k)

    @torch.no_grad()
    def answer(self, k: int, new_tokens: int | None = None) -> None:
        self._generate(new_tokens, input_ids=self.prompt, summary=self.summary[:, :k])

    @torch.no_grad()
    def base(self, new_tokens: int | None = None) -> None:
        with self.model.fwd2bot_disabled():
            self._generate(new_tokens, input_ids=self.wide_prompt, **self.pixels)

    def _generate(self, new_tokens: int | None, **inputs: Any) -> None:
        count = new_tokens or self.new_tokens
        mask = torch.ones_like(inputs["input_ids"])
        self.model.generate(
            **inputs, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True
        )

    def _images(self, count: int) -> dict[str, Any]:
        def repeated(value: Any) -> Any:
            return value.repeat_interleave(count, 0) if isinstance(value, Tensor) else list(value) * count

        return {name: repeated(value) for name, value in self.pixels.items()}


def flops(run: Callable[[], None]) -> int:
    """Floating-point operations of matrix products and attention; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def bytes_per_image(model: nn.Module, image: Image.Image, dense: int, ks: Sequence[int]) -> dict[str, Any]:
    """Bytes of an image in float16: as summary, as dense tokens, as keys and values of both, and as a JPEG."""
    config = model._language_model().config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * 2 * config.num_hidden_layers * heads * head  # of one token, float16
    size = 2 * model.get_input_embeddings().weight.shape[1]
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    found: dict[str, Any] = {"dense": dense * size, "dense_kv": dense * kv, "jpeg_q90": jpeg.tell()}
    return found | {f"summary k={k}": k * size for k in ks} | {f"summary_kv k={k}": k * kv for k in ks}


def cost(
    model: nn.Module,
    processor: Any,
    ks: Sequence[int],
    image: Image.Image | None = None,
    rounds: int = 7,
    batches: Sequence[int] = (1, 8),
    questions: Sequence[int] = (1, 2, 4, 8),
    new_tokens: int = 16,
) -> dict[str, Any]:
    """Measures a loaded model; see the module. The default `image` is noise of 640 × 480 pixels.

    Raises:
        ValueError: `rounds` or `new_tokens` is below 1.
    """
    for name, value in (("rounds", rounds), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if image is None:
        noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
    model = model.eval()
    sides, device = Sides(model, processor, image, new_tokens), model.get_input_embeddings().weight.device
    own = sum(p.numel() for p in model._stages.parameters()) + sum(p.numel() for p in model.fwd2bot.parameters())
    found: dict[str, Any] = {
        "parameters": {"all": sum(p.numel() for p in model.parameters()), "fwd2bot": own},
        "dense_tokens": sides.dense,
        "new_tokens": new_tokens,
        "prompt_tokens": sides.prompt.shape[1] - 1,
        "bytes_per_image": bytes_per_image(model, image, sides.dense, ks),
    }
    runs: dict[str, Callable[[], Any]] = {"base": sides.base, "base, first token": lambda: sides.base(1)}
    for k in ks:
        runs[f"answer, k={k}"] = lambda k=k: sides.answer(k)
        runs[f"answer, first token, k={k}"] = lambda k=k: sides.answer(k, 1)
        for images in batches:
            runs[f"compress, k={k}, {images} at once"] = lambda k=k, images=images: sides.compress(k, images)
    found["flops"] = {name: flops(run) for name, run in tqdm(runs.items(), desc="operations", unit="side")}
    found["peak_memory"] = _memory(runs, device)
    seconds = in_turn(runs, rounds, device)
    found["milliseconds"] = {name: summarize([1000 * s for s in values]) for name, values in seconds.items()}
    rows = []
    for k in ks:
        answer, base = seconds[f"answer, k={k}"], seconds["base"]
        compress = seconds[f"compress, k={k}, {batches[0]} at once"]
        work = found["flops"]
        by_flops = [work[f"compress, k={k}, {batches[0]} at once"], work[f"answer, k={k}"], work["base"]]
        row: dict[str, Any] = {"k": k, "by": "time"}
        row["first token, base over answer"] = ratio(
            seconds["base, first token"], seconds[f"answer, first token, k={k}"]
        )["ratio"]
        for asked in questions:
            once = [(c / batches[0] + asked * a) / asked for c, a in zip(compress, answer, strict=True)]
            row[f"{asked} questions, over base"] = ratio(once, base)["ratio"]
        row["break_even"] = break_even(median_high(compress) / batches[0], median_high(answer), median_high(base))
        row["break_even_flops"] = break_even(by_flops[0] / batches[0], by_flops[1], by_flops[2])
        rows.append(row)
    return {**found, "rows": rows, "environment": environment(device)}


def _memory(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Any]:
    """Peak bytes of each run, less what was in use before it."""
    memory, found = PeakMemory(device), {}
    for name, run in runs.items():
        memory.reset()
        before = memory.now()
        run()
        found[name] = max(0, memory.peak() - before)
    return {"bytes": found, "exact": memory.exact}


def table(found: dict[str, Any]) -> str:
    """The result as Markdown: costs over the base's, why a break-even is never reached, and each measured run."""
    columns = [name for name in found["rows"][0] if name != "by"]
    rows = [[_cell(row[name]) for name in columns] for row in found["rows"]]
    lines = [markdown([_title(name) for name in columns], rows), *_never(found)]
    measured = [
        [
            re.sub(r"(\d+) at once", r"batch of \1", name),
            f"{operations / 1e9:.2f}",
            f"{found['milliseconds'][name]['median']:.1f}",
            f"{found['peak_memory']['bytes'][name] / 1e6:.0f}",
        ]
        for name, operations in found["flops"].items()
    ]
    lines.append(markdown(["run", "GFLOP", "median time, ms", "peak memory, MB"], measured))
    kept = ", ".join(f"{name} {size:,}" for name, size in found["bytes_per_image"].items())
    own, every = found["parameters"]["fwd2bot"], found["parameters"]["all"]
    lines.append(f"{own:,} of {every:,} parameters are Fwd2Bot's.\nBytes per image, float16: {kept}.")
    return "\n\n".join(lines)


def _cell(value: float | int | None) -> str:
    return "never" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _title(name: str) -> str:
    """The column title of a row's figure; the names in the file are read by programs."""
    if found := re.fullmatch(r"(\d+) questions, over base", name):
        return f"time of {found[1]} question{'s' * (found[1] != '1')}, Fwd2Bot / base"
    titles = {
        "first token, base over answer": "time to first token, base / Fwd2Bot",
        "break_even": "break-even by time, questions per image",
        "break_even_flops": "break-even by operations, questions per image",
    }
    return titles.get(name, name)


def _never(found: dict[str, Any]) -> list[str]:
    """A sentence for each break-even that is not reached."""
    sentences = []
    for row in found["rows"]:
        for name, what, of in (
            ("break_even", "time", lambda run: f"{found['milliseconds'][run]['median']:.1f} ms"),
            ("break_even_flops", "operations", lambda run: f"{found['flops'][run] / 1e9:.2f} GFLOP"),
        ):
            if row[name] is None:
                answer = of(f"answer, k={row['k']}")
                sentences.append(
                    f"Never, by {what}, at k = {row['k']}: one answer from the summary takes {answer}, one by the base "
                    f"from the image {of('base')}. No number of questions makes up for compressing."
                )
    return sentences


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[model_options(k=False)])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--k", type=count, nargs="+", metavar="J", help="numbers of summary tokens; default: all")
    parser.add_argument("--image", type=Path, metavar="FILE", help="default: noise of 640 x 480")
    parser.add_argument("--rounds", type=count, default=7, metavar="N", help="timed runs of each side; default: 7")
    parser.add_argument("--new-tokens", type=count, default=16, metavar="N", help="answer length; default: 16")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="of images; default: 8")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result here, as JSON")
    args = parser.parse_args(argv)
    path, most = checked(args.model, *(args.k or []))
    loaded = load_for_inference(path, args.base, args.device, args.dtype, args.load_4bit, args.load_8bit)
    image = None if args.image is None else open_image(args.image)
    batches = (1, args.batch_size)
    found = cost(*loaded, args.k or [most], image, args.rounds, batches, new_tokens=args.new_tokens)
    found = {"evaluator": "cost", "model": args.model, **found}
    if args.output:
        write_json(args.output, found)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
