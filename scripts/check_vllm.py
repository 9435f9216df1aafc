"""vLLM with our exports against `generate`: the same greedy ids, and others without the adapter.

    python scripts/check_vllm.py --python VLLM_ENVIRONMENT/bin/python --output eval/results/vllm.md

llava, llava_next: a random model of two layers with a Fwd2Bot checkpoint on it, exported by --to vllm. merged: the
first of these, by --to merged. smol-llava: the trained model of this package, by --to merged. vLLM is started by the
export's own command, and the client asks about one to four images, one question after the other and all at once.
compress, compress_average, compress_pool: the first, and ones with residual="average" or "pool" and a trained
projector; summaries by an engine that runs the compress pass against `model.compress`.

The random models' weights have the names of the hub's checkpoints: transformers 5 saves a CLIP tower as
`vision_tower.embeddings…`, vLLM 0.32 wants `vision_tower.vision_model.embeddings…`. Their heads are 32 wide, the least
that vLLM's attention takes on a CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

from check_vllm_page import page  # noqa: E402
from conftest import PATCH, SIZE, settings, shake, toy_base, toy_processor  # noqa: E402
from server_toys import listening, uri  # noqa: E402

from llava_fwd2bot import add_fwd2bot, load_fwd2bot  # noqa: E402
from llava_fwd2bot.checkpoint.export import export  # noqa: E402
from llava_fwd2bot.checkpoint.export_manifest import read_manifest  # noqa: E402
from llava_fwd2bot.processing.conversation import prompt_ids  # noqa: E402
from llava_fwd2bot.processing.generate import summaries_of  # noqa: E402
from llava_fwd2bot.serving.app import create_app  # noqa: E402
from llava_fwd2bot.serving.vllm import VLLMAnswers  # noqa: E402
from llava_fwd2bot.serving.vllm_compressor import VLLMCompressor  # noqa: E402
from llava_fwd2bot.smol import base_folder, checkpoint_folder  # noqa: E402

HOSTS = ("llava", "llava_next", "merged", "smol-llava")
COMPRESS = ("compress", "compress_average", "compress_pool")
PINPOINTS = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
NEW = 16
QUESTIONS = (
    "What is this?",
    "How many people are there?",
    "Is it day or night?",
    "Which colour is the car?",
    "Describe it.",
    "a word",
)


def make(folder: Path, host: str) -> tuple[Any, Any]:
    """Writes `folder`/export, and for a random model `folder`/base and `folder`/fwd2bot; gives model and processor."""
    if host == "smol-llava":
        export(checkpoint_folder(), "merged", folder / "export", stage="answer", dtype="float32")
        return load_fwd2bot("smol-llava", dtype=torch.float32)
    processor = toy_processor()
    base, file = folder / "base", folder / "base" / "model.safetensors"
    config = toy_base(processor).config
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 2, 1
    config.text_config.head_dim = 32
    kind = LlavaForConditionalGeneration
    if host == "llava_next":
        kind, own = LlavaNextForConditionalGeneration, config.to_dict()
        names = ("vision_config", "text_config", "image_token_id")
        config = LlavaNextConfig(**{n: own.get(n, getattr(config, n)) for n in names}, image_grid_pinpoints=PINPOINTS)
        sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        processor = LlavaNextProcessor(
            LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS),
            processor.tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            chat_template=processor.chat_template,
            num_additional_image_tokens=1,
        )
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # so that the best word is best by far
        for name, parameter in model.model.language_model.layers.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)  # at the default scale a word is followed by itself for ever
    model.save_pretrained(base)
    processor.save_pretrained(base)
    tensors = load_file(file)
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
    loaded = kind.from_pretrained(base)  # which reads those names as well
    trains = host in COMPRESS[1:]
    changes = {"residual": host.removeprefix("compress_")} if trains else {"bridge": "linear"}
    model = shake(add_fwd2bot(loaded, settings(**changes), processor, train_projector=trains)).eval()
    with torch.no_grad():
        if trains:
            for parameter in model.trained_projector().parameters():
                parameter.mul_(1.5)
            model.fwd2bot.log_gain.add_(1.0)
        for weight in model.fwd2bot.bridge.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(folder / "fwd2bot", processor=processor)
    if host == "merged":
        export(folder / "fwd2bot", "merged", folder / "export", stage="answer")
    else:
        export(folder / "fwd2bot", "vllm", folder / "export", probe=True)
    return model, processor


@contextmanager
def engine(python: str, command: list[str], log: Path, minutes: float) -> Iterator[str]:
    """vLLM's address, once it answers; ended with its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve MODEL` asks for a distribution called vllm, which the build for CPU is not
    module = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", command[2], *command[3:]]
    module += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    module += ["--max-model-len", "512", "--max-num-seqs", "8"]
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            module, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **own}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60 * minutes
        while True:
            with socket.socket() as test:
                if test.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def summaries(model: Any) -> torch.Tensor:
    """Of four images, [4, k, D]; of random dense tokens where the model is random."""
    with torch.inference_mode():
        if model.name_or_path == "smol-llava":
            from skimage import data

            images = [Image.fromarray(getattr(data, name)()) for name in ("chelsea", "coffee", "rocket", "astronaut")]
            return summaries_of(model, model.load_processor(str(base_folder())), images)
        dense = [torch.randn(16, 64, generator=torch.Generator().manual_seed(i)) * 0.3 for i in range(4)]
        return model._compress(dense, model.fwd2bot.image_prompt_ids, None)


def compare(model: Any, processor: Any, client: VLLMAnswers) -> dict[str, Any]:
    """Asks every question about one to four images, with all tokens and with a half of them."""
    stored, most = summaries(model), model.fwd2bot_config.num_summary_tokens
    rows = [(q, images, k) for q in QUESTIONS for images in (1, 2, 3, 4) for k in (most, most // 2)]
    expected, bodies, without = [], [], []
    for question, images, k in rows:
        ids = prompt_ids(processor, client.formatter.prompt(question, images))["input_ids"]
        given = {"input_ids": ids, "summary": stored[:images, :k], "max_new_tokens": NEW, "do_sample": False}
        expected.append(model.generate(**given)[0, ids.shape[1] :].tolist())
        with model._stages.use(None):
            without.append(model.generate(**given)[0, ids.shape[1] :].tolist())
        bodies.append({"question": question, "summary": stored[:images, :k], "max_new_tokens": NEW})
    alone = [client.complete(**body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: client.complete(**body).token_ids, bodies))
    streamed = ["".join(client.answer(**body, stream=True)).strip() for body in bodies[:4]]
    if not client.files.merged:  # the engine's own base, with the same requests
        base = client.engine.get("/v1/models")["data"][0]["id"]
        without = [client.complete(**body, model=base).token_ids for body in bodies]

    def same(found: list[list[int]]) -> int:
        return sum(a == b for a, b in zip(found, expected, strict=True))

    return {
        "prompts": len(rows),
        "identical": same([one.token_ids for one in alone]),
        "identical, all at once": same(together),
        "different without the adapter": len(rows) - same(without),
        "distinct answers": len({tuple(ids) for ids in expected}),
        "streamed alike, of 4": sum(a == b.text for a, b in zip(streamed, alone, strict=False)),
        # a random model writes bytes that are no text, which engines replace in ways of their own
        "served alike, of 8": served(model, processor, client) if model.name_or_path == "smol-llava" else "–",
    }


def served(model: Any, processor: Any, client: VLLMAnswers) -> int:
    """Answers of `fwd2bot serve --engine-url` to questions about one and two images that equal those without it."""
    random = np.random.default_rng(1)
    files = []
    for _ in range(2):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (48, 64, 3)).astype("uint8")).save(file, "PNG")
        files.append({"type": "image_url", "image_url": {"url": uri(file.getvalue())}})
    found: list[list[str]] = []
    for engine in (client, None):
        with listening(create_app(model, processor, "model", engine=engine)) as server:
            found.append([])
            for question in QUESTIONS[:4]:
                for images in (1, 2):
                    content = [*files[:images], {"type": "text", "text": question}]
                    body = {"messages": [{"role": "user", "content": content}], "max_tokens": NEW}
                    answer = server.http.post("/v1/chat/completions", json=body).raise_for_status().json()
                    found[-1].append(answer["choices"][0]["message"]["content"])
    return sum(a == b for a, b in zip(*found, strict=True))


def compare_summaries(model: Any, client: VLLMCompressor) -> dict[str, Any]:
    """Of pictures of several sizes, all at once; the client itself has seen that the adapter matters."""
    random = np.random.default_rng(0)
    sizes = [(40, 50), (32, 32), (90, 33), (64, 200)] * 4
    prepared = []
    for size in sizes:
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (*size, 3)).astype("uint8")).save(file, "PNG")
        prepared.append(client.prepare(file.getvalue(), "noise").pixels)
    summary, _ = client(prepared)
    with torch.inference_mode():
        expected = model.compress(torch.cat([one["pixel_values"] for one in prepared]))
    return {
        "images": len(sizes),
        "largest difference": f"{(summary - expected).abs().max():.1e}",
        "largest value": f"{expected.abs().max():.2f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS + COMPRESS, default=HOSTS + COMPRESS)
    parser.add_argument("--minutes", type=float, default=5.0, help="that an engine may take to start")
    parser.add_argument("--output", type=Path, help="the page of results to write")
    args = parser.parse_args()
    told = "import torch, transformers, vllm; print(vllm.__version__, transformers.__version__, torch.__version__)"
    found = subprocess.run([args.python, "-c", told], capture_output=True, text=True, check=True)
    theirs = dict(zip(("vllm", "transformers", "torch"), found.stdout.split()[-3:], strict=True))
    results = {}
    for host in args.hosts:
        with tempfile.TemporaryDirectory() as folder:
            model, processor = make(Path(folder), host)
            command = read_manifest(Path(folder) / "export")["commands"]["compress" if host in COMPRESS else "answer"]
            with engine(args.python, command, Path(folder) / "log", args.minutes) as url:
                if host in COMPRESS:
                    results[host] = compare_summaries(model, VLLMCompressor(url, Path(folder) / "export"))
                else:
                    results[host] = compare(model, processor, VLLMAnswers(url, model=Path(folder) / "export"))
        print(host, json.dumps(results[host]))
    if args.output:
        args.output.write_text(page(results, COMPRESS, theirs, NEW, len(QUESTIONS)), encoding="utf-8")
    return 0 if all(fine(host, result) for host, result in results.items()) else 1


def fine(host: str, result: dict[str, Any]) -> bool:
    if host in COMPRESS:
        return float(result["largest difference"]) < 1e-5
    every = result["prompts"]
    different = result["different without the adapter"] >= (every if host != "smol-llava" else 1)
    same = result["identical"] == result["identical, all at once"] == every
    return same and different and result["streamed alike, of 4"] == 4 and result["served alike, of 8"] in (8, "–")


if __name__ == "__main__":
    sys.exit(main())
