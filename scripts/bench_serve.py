"""200 asks at once against one at a time, from a cache, through the real server: throughput, latency, and whether each
answer is the one that it is alone.

    python scripts/bench_serve.py --asks 200 --rounds 3 --threads 2

Photographs of scikit-image, cut into many; smol-llava in float32, as bfloat16 rounds differently by the batch and is
slow on most processors. Two loads: answers that end by themselves, which are short on this model, and answers of
--max-tokens each, as the gain of a batch is in the tokens of the answers. Each round sends its share of the distinct
asks one after the other, then all asks at once: on a machine that others use as well, only the ratio within a round
says something.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, quantiles

import _root  # noqa: F401
import httpx
import torch
from PIL import Image
from serve_results import keep
from toy_server import Server

from eval.measure import environment
from llava_fwd2bot.cli.main import main as fwd2bot

QUESTIONS = (
    "What is in the picture?",
    "Describe the image in one sentence.",
    "Is there a person in the image? Answer yes or no.",
    "What colour is the largest thing?",
    "Where was this taken, and at what time of day?",
    "How many animals are there?",
    "What is the person doing?",
    "Name three things that you see.",
    "Is it indoors or outdoors?",
    "Write a caption for the photograph.",
)


def photographs(folder: Path, count: int) -> list[str]:
    """Squares cut out of scikit-image's photographs."""
    source = Path(find_spec("skimage").origin).parent / "data"
    names = ("coffee.png", "chelsea.png", "rocket.jpg", "astronaut.png")
    pictures = [Image.open(source / name).convert("RGB") for name in names if (source / name).is_file()]
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = rng.randint(200, min(picture.size))
        left, top = (rng.randint(0, most - side) for most in picture.size)
        if not (folder / f"{i}.jpg").is_file():
            picture.crop((left, top, left + side, top + side)).resize((224, 224)).save(folder / f"{i}.jpg")
    return [f"{i}.jpg" for i in range(count)]


Ask = tuple[str, str, int, int]  # id, question, least and most tokens


def body(ask: Ask) -> dict:
    name, question, least, most = ask
    content = [{"type": "image_url", "image_url": {"url": f"cache://{name}"}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "min_tokens": least, "max_tokens": most}


async def send(http: httpx.AsyncClient, ask: Ask) -> tuple[str | None, int, float]:
    """The answer, its tokens, and its seconds; None where there was none."""
    started = time.perf_counter()
    found = await http.post("/v1/chat/completions", json=body(ask))
    seconds = time.perf_counter() - started
    if found.status_code != 200:
        print(found.text, file=sys.stderr)
        return None, 0, seconds
    told = found.json()
    return told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"], seconds


async def rounds(server: Server, asks: Sequence[Ask], count: int) -> dict:
    """Figures of each round, what was lost, and what was other than alone."""
    url = server.url
    limits = httpx.Limits(max_connections=len(asks), max_keepalive_connections=len(asks))
    distinct, alone, figures, found = sorted(set(asks)), {}, [], []
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as http:
        for ask in distinct[:2]:
            await send(http, ask)
        for turn in range(count):
            share = distinct[turn * len(distinct) // count : (turn + 1) * len(distinct) // count]
            started, work = time.perf_counter(), server.processor_seconds
            for ask in share:
                alone[ask] = await send(http, ask)
            one_by_one = len(share) / (time.perf_counter() - started)
            alone_work = (server.processor_seconds - work) / len(share)
            started, work = time.perf_counter(), server.processor_seconds
            answers = await asyncio.gather(*(send(http, ask) for ask in asks))
            at_once = len(asks) / (time.perf_counter() - started)
            work = (server.processor_seconds - work) / len(asks)
            cut = quantiles([seconds for *_, seconds in answers], n=20)
            found += zip(asks, answers, strict=True)
            figures.append(
                {
                    "alone_per_second": one_by_one,
                    "alone_p50": median(alone[ask][2] for ask in share),
                    "together_per_second": at_once,
                    "ratio": at_once / one_by_one,
                    "alone_processor_seconds": alone_work,
                    "together_processor_seconds": work,
                    "processor_ratio": alone_work / work,
                    "p50": cut[9],
                    "p95": cut[18],
                }
            )
            print(figures[-1], flush=True)
    wrong = [(ask, alone[ask][0], text) for ask, (text, *_) in found if text not in (None, alone[ask][0])]
    for case in wrong[:5]:
        print("other than alone:", case)
    return {
        "rounds": figures,
        "asks": len(asks),
        "ratio": median(one["ratio"] for one in figures),
        "processor_ratio": median(one["processor_ratio"] for one in figures),
        "mean_tokens": mean(tokens for _, tokens, _ in alone.values()),
        "distinct_asks": len(distinct),
        "distinct_answers": len({text for text, *_ in alone.values()}),
        "sent": len(found),
        "lost": sum(text is None for _, (text, *_) in found),
        "wrong": len(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol-llava")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--asks", type=int, default=200)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--distinct", type=int, default=60, help="different asks among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--long-asks", type=int, help="of the second load, where it is less; default: as many")
    parser.add_argument("--folder", help="where pictures and cache stay for the next time; default: nowhere")
    parser.add_argument("--keep", action="store_true", help="write the figures to eval/results/serve.json")
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as empty:
        folder = args.folder or empty
        names = photographs(Path(folder) / "photos", args.images)
        path = Path(folder) / "photos.cache"
        filling = ["compress", "--model", args.model, "--images", str(Path(folder) / "photos"), "--cache", str(path)]
        assert fwd2bot([*filling, "--dtype", args.dtype, "--device", "cpu"]) == 0
        pairs = [(name, question) for name in names for question in QUESTIONS]
        kept = rng.sample(pairs, min(args.distinct, len(pairs)))
        drawn = [rng.choice(kept) for _ in range(args.asks)]
        options = ["--dtype", args.dtype, "--port", 0, "--cache", path, "--batch-size", args.batch_size]
        server = Server(args.model, *options, "--timeout", 3600, threads=args.threads)
        loads = {}
        try:
            both = (
                ("by themselves", 0, args.asks),
                (f"{args.max_tokens} tokens each", args.max_tokens, args.long_asks),
            )
            for name, least, count in both:
                asks = [(image, question, least, args.max_tokens) for image, question in drawn[:count]]
                loads[name] = asyncio.run(rounds(server, asks, args.rounds))
        finally:
            server.stop()
    result = {
        "command": f"python {shlex.join(sys.argv)}",
        "environment": environment(torch.device("cpu")),
        **{name: getattr(args, name) for name in ("asks", "images", "model", "dtype", "threads", "batch_size")},
        "loads": loads,
    }
    print(result)
    if args.keep:
        keep("load", result)


if __name__ == "__main__":
    main()
