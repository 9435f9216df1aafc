"""200 asks at once against one at a time, from a cache, through the real server: throughput, latency, and whether each
answer is the one that it is alone.

    python scripts/bench_serve.py --asks 200 --rounds 3 --threads 2

Photographs of scikit-image, cut into many; smol-llava in float32, as bfloat16 rounds differently by the batch and is
slow on most processors. Each round sends its share of the asks one after the other, then all of them at once: on a
machine that others use as well, only the ratio within a round says something.
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

import httpx
from PIL import Image
from serve_results import keep
from toy_server import Server

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
    folder.mkdir()
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = rng.randint(200, min(picture.size))
        left, top = (rng.randint(0, most - side) for most in picture.size)
        picture.crop((left, top, left + side, top + side)).resize((224, 224)).save(folder / f"{i}.jpg")
    return [f"{i}.jpg" for i in range(count)]


def body(ask: tuple[str, str, int]) -> dict:
    name, question, tokens = ask
    content = [{"type": "image_url", "image_url": {"url": f"cache://{name}"}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": tokens}


async def send(http: httpx.AsyncClient, ask: tuple[str, str, int]) -> tuple[str | None, int, float]:
    """The answer, its tokens, and its seconds; None where there was none."""
    started = time.perf_counter()
    found = await http.post("/v1/chat/completions", json=body(ask))
    seconds = time.perf_counter() - started
    if found.status_code != 200:
        print(found.text, file=sys.stderr)
        return None, 0, seconds
    told = found.json()
    return told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"], seconds


async def rounds(url: str, asks: Sequence[tuple[str, str, int]], count: int) -> tuple[list, dict, list]:
    """Figures of each round; the answers alone by their number; (number, answer) of all that were sent at once."""
    limits = httpx.Limits(max_connections=len(asks), max_keepalive_connections=len(asks))
    figures, alone, together = [], {}, []
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as http:
        for ask in asks[:3]:
            await send(http, ask)
        for turn in range(count):
            share = range(turn * len(asks) // count, (turn + 1) * len(asks) // count)
            started = time.perf_counter()
            for i in share:
                alone[i] = await send(http, asks[i])
            one_by_one = len(share) / (time.perf_counter() - started)
            started = time.perf_counter()
            found = await asyncio.gather(*(send(http, ask) for ask in asks))
            at_once = len(asks) / (time.perf_counter() - started)
            cut = quantiles([seconds for *_, seconds in found], n=20)
            together += list(enumerate(found))
            figures.append(
                {
                    "alone_per_second": one_by_one,
                    "alone_p50": median(alone[i][2] for i in share),
                    "together_per_second": at_once,
                    "ratio": at_once / one_by_one,
                    "p50": cut[9],
                    "p95": cut[18],
                }
            )
            print(figures[-1], flush=True)
    return figures, alone, together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol-llava")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--asks", type=int, default=200)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--note", default="", help="a sentence for the page")
    parser.add_argument("--keep", action="store_true", help="write the figures to eval/results/serve.json")
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        names = photographs(Path(folder) / "photos", args.images)
        path = Path(folder) / "photos.cache"
        filling = ["compress", "--model", args.model, "--images", str(Path(folder) / "photos"), "--cache", str(path)]
        assert fwd2bot([*filling, "--dtype", args.dtype, "--device", "cpu"]) == 0
        asks = [(rng.choice(names), rng.choice(QUESTIONS), args.max_tokens) for _ in range(args.asks)]
        options = ["--dtype", args.dtype, "--port", 0, "--cache", path, "--batch-size", args.batch_size]
        server = Server(args.model, *options, "--timeout", 3600, threads=args.threads)
        try:
            figures, alone, together = asyncio.run(rounds(server.url, asks, args.rounds))
            metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
        finally:
            server.stop()
    wrong = [(asks[i], alone[i][0], found[0]) for i, found in together if found[0] not in (None, alone[i][0])]
    for case in wrong[:5]:
        print("other than alone:", case)
    result = {
        "command": f"python {shlex.join(sys.argv)}",
        "asks": args.asks,
        "images": args.images,
        "model": args.model,
        "dtype": args.dtype,
        "threads": args.threads,
        "batch": args.batch_size,
        "mean_tokens": mean(tokens for _, tokens, _ in alone.values()),
        "rounds": figures,
        "ratio": median(one["ratio"] for one in figures),
        "sent": len(together),
        "lost": sum(found[0] is None for _, found in together),
        "wrong": len(wrong),
        "distinct_answers": len({text for text, *_ in alone.values()}),
        "batches": {
            name: float(next(line.split()[-1] for line in metrics.splitlines() if line.startswith(key)))
            for name, key in (
                ("count", 'fwd2bot_batch_size_count{kind="answer"}'),
                ("jobs", 'fwd2bot_batch_size_sum{kind="answer"}'),
            )
        },
        "note": args.note,
    }
    print(result)
    if args.keep:
        keep("load", result)


if __name__ == "__main__":
    main()
