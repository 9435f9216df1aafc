"""Kills a server while it answers and adds images: does its cache verify, is every image whole, is it right at once?

    python scripts/torture_server.py --kills 20

A toy model; clients ask, with and without streams, and add images. After SIGKILL at a random moment the cache is
verified, every image whose 201 came must be there with its summary, no other may be there in part, and the next
server's first `/health` must count them all.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import random
import shlex
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import torch
from PIL import Image
from serve_results import keep
from toy_server import Server, write_toy

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.cache.reader import SummaryCache
from llava_fwd2bot.cache.verify import verify
from llava_fwd2bot.processing.generate import summaries_of


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 50, 3)).astype("uint8"))


def file_of(number: int) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


class Clients:
    """Threads that ask and add until the server is gone; `sent` and `confirmed` are numbers of pictures."""

    def __init__(self, url: str, first: int) -> None:
        self.url, self.next, self.lock = url, first, threading.Lock()
        self.sent: set[int] = set()
        self.confirmed: set[int] = set()
        self.answers = 0
        self.problems: list[str] = []
        works = [self.add] * 3 + [self.ask] * 2 + [self.read]
        self.threads = [threading.Thread(target=self.run, args=(work,), daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def run(self, work) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            try:
                while True:
                    work(http)
            except httpx.TransportError:  # it was killed
                return

    def add(self, http: httpx.Client) -> None:
        with self.lock:
            number, self.next = self.next, self.next + 1
            self.sent.add(number)
        body = {"id": f"p/{number}", "image": f"data:image/png;base64,{base64.b64encode(file_of(number)).decode()}"}
        found = http.post("/v1/images", json=body)
        if found.status_code == 201:
            self.confirmed.add(number)
        else:
            self.problems.append(found.text)

    def _body(self, stream: bool) -> dict:
        content: list = [{"type": "text", "text": "how many dogs are there"}]
        known = sorted(self.confirmed)
        if known:
            url = f"cache://p/{random.choice(known)}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 20, "stream": stream}

    def ask(self, http: httpx.Client) -> None:
        found = http.post("/v1/chat/completions", json=self._body(False))
        if found.status_code == 200:
            self.answers += 1
        else:
            self.problems.append(found.text)

    def read(self, http: httpx.Client) -> None:
        with http.stream("POST", "/v1/chat/completions", json=self._body(True)) as response:
            self.answers += [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write the figures to eval/results/serve.json")
    args = parser.parse_args()
    random.seed(args.seed)
    figures = {"command": f"python {shlex.join(sys.argv)}", "kills": 0, "verified": 0, "healthy": 0, "answers": 0}
    figures |= {"lost": 0, "half": 0, "unconfirmed_there": 0, "confirmed": 0}
    with tempfile.TemporaryDirectory() as folder:
        toy, path = write_toy(Path(folder)), Path(folder) / "t.cache"
        model, processor = load_fwd2bot(toy)
        seconds, confirmed, sent, count = [], set(), set(), 0
        for kill in range(args.kills + 1):
            server = Server(toy, "--port", 0, "--cache", path, "--create")
            seconds.append(server.seconds_to_start)
            health = httpx.get(f"{server.url}/health", timeout=60).json()
            if kill:
                figures["healthy"] += health["status"] == "ok" and health["images"] == {"t.cache": count}
            if kill == args.kills:
                server.stop()
                break
            clients = Clients(server.url, max(sent, default=-1) + 1)
            while not (clients.confirmed or clients.problems):  # the machine may be busy
                time.sleep(0.05)
            time.sleep(random.uniform(0, 3))
            server.kill()
            for thread in clients.threads:
                thread.join(60)
            assert not clients.problems, clients.problems[:3]
            confirmed, sent = confirmed | clients.confirmed, sent | clients.sent
            figures["kills"] += 1
            figures["confirmed"] = len(confirmed)
            figures["answers"] += clients.answers
            cache = SummaryCache.open(path)
            figures["verified"] += verify(cache)["ok"]
            rows = {row["id"]: row["sha256"] for row in cache.about(["id", "sha256"])}
            count = len(rows)
            there = {int(name[2:]) for name in rows}
            figures["lost"] = len(confirmed - there)
            figures["unconfirmed_there"] = len(there - confirmed)
            for number in sorted(there & clients.sent):
                same = rows[f"p/{number}"] == hashlib.sha256(file_of(number)).hexdigest()
                expected = summaries_of(model, processor, [picture(number)])[0]
                kept = cache.codec.decode(cache.codec.encode(expected[None]), expected.shape[-1])[0]
                apart = (cache.get([f"p/{number}"])[0] - kept).abs().mean() / expected.abs().max()
                # the last bits of a summary depend on its batch, and a rounding to 4 bits on them
                figures["half"] += not (same and apart < 0.01)
            print(f"kill {kill + 1}: {len(there)} images, {len(clients.confirmed)} confirmed, {figures}", flush=True)
        figures["seconds_to_start"] = median(seconds)
    whole = figures["verified"] == figures["healthy"] == figures["kills"] and not figures["lost"] + figures["half"]
    print(figures, "\nwhole" if whole else "\nNOT WHOLE")
    if args.keep:
        keep("kill", figures)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
