"""Random requests made from the server's OpenAPI description, and damaged pictures: no 5xx, and memory that is flat.

    pip install schemathesis
    python scripts/fuzz_server.py --cases 5000 --pictures 500

Requests that the description allows and the server refuses (an empty message, a text that is no data URI) are no
finding here: what a picture or a conversation must be is more than a JSON schema says.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from serve_results import keep
from toy_server import Server, write_toy

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
CHECKS += ",response_headers_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
KINDS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
RUNS = 4  # after each of which the memory is looked at


def damaged(rng: random.Random) -> bytes:
    """A picture of some format that was cut, overwritten, grown in its header, or is another file."""
    out = io.BytesIO()
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (rng.randint(1, 60), rng.randint(1, 60), 3))
    Image.fromarray(pixels.astype("uint8")).save(out, rng.choice(KINDS))
    data = bytearray(out.getvalue())
    kind = rng.choice(("cut", "flip", "flip", "header", "noise", "twice"))
    if kind == "cut":
        return bytes(data[: rng.randint(0, len(data))])
    if kind == "noise":
        return rng.randbytes(rng.randint(1, 400))
    if kind == "twice":
        return bytes(data[: len(data) // 2] + data)
    places = range(min(len(data), 64)) if kind == "header" else range(len(data))
    for _ in range(rng.randint(1, 20)):
        data[rng.choice(places)] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(data)


def send_pictures(url: str, count: int, rng: random.Random) -> Counter:
    """Status codes, of questions, additions and looks in turn."""
    codes: Counter = Counter()
    with httpx.Client(base_url=url, timeout=120) as http:
        for number in range(count):
            image = f"data:image/png;base64,{base64.b64encode(damaged(rng)).decode()}"
            part = {"type": "image_url", "image_url": {"url": image}}
            content = [part, {"type": "text", "text": "what is it"}]
            path, body = (
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 1}),
                ("/v1/images", {"id": f"d/{number}", "image": image}),
                ("/v1/look", {"image": image}),
                ("/v1/embeddings", {"input": [part]}),
            )[number % 4]
            codes[http.post(path, json=body).status_code] += 1
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--examples", type=int, default=40, help="requests of each operation in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write the figures to eval/results/serve.json")
    args = parser.parse_args()
    tool = shutil.which("schemathesis")
    if tool is None:
        sys.exit("schemathesis is not installed: pip install schemathesis")
    rng, cases, run = random.Random(args.seed), 0, 0
    found: Counter = Counter()
    codes: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(write_toy(Path(folder)), "--port", 0, "--cache", Path(folder) / "f.cache", "--create")
        codes += send_pictures(server.url, 20, rng)  # what is loaded late is loaded now
        resident = [server.resident]
        while cases < args.cases or run < RUNS:
            command = [tool, "run", f"{server.url}/openapi.json", "--max-examples", args.examples, "--seed", run]
            command += ["--checks", CHECKS, "--generation-database", "none", "--workers", 2, "--no-color"]
            command += ["--request-timeout", 300]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            made = re.search(r"([\d,]+) generated", done.stdout)
            if made is None:
                sys.exit(done.stdout + done.stderr)
            cases, run = cases + int(made[1].replace(",", "")), run + 1
            for name, count in re.findall(r"❌ (?:ST\d+ )?(.+): (\d+)$", done.stdout, re.MULTILINE):
                found[name] += int(count)
            if done.returncode:
                print(done.stdout, flush=True)
            if run <= RUNS:
                codes += send_pictures(server.url, (args.pictures - 20 + RUNS - 1) // RUNS, rng)
            resident.append(server.resident)
            print(
                f"{cases:,} cases, {sum(codes.values())} pictures {dict(codes)}, {found}, {resident[-1] >> 20} MB",
                flush=True,
            )
        text = httpx.get(f"{server.url}/metrics").text
        errors = re.findall(r'fwd2bot_requests_total\{path="(.*)",status="(5\d\d)"\} (\S+)', text)
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        server.stop()
    figures = {
        "command": f"python {shlex.join(sys.argv)}",
        "schemathesis": version("schemathesis"),
        "cases": cases,
        "server_errors": sum(int(float(count)) for *_, count in errors),
        "findings": ", ".join(f"{name}: {count}" for name, count in found.items()),
        "pictures": sum(codes.values()),
        "pictures_5xx": sum(n for code, n in codes.items() if code >= 500),
        "pictures_read": sum(n for code, n in codes.items() if code < 300),
        "resident": resident,
    }
    print(figures, errors)
    if args.keep:
        keep("fuzz", figures)
    sys.exit(0 if not figures["server_errors"] else 1)


if __name__ == "__main__":
    main()
