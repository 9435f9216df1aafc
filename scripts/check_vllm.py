"""vLLM with our exports against `generate`: the same greedy ids, and others without the adapter.

    python scripts/check_vllm.py --python VLLM_ENVIRONMENT/bin/python --output eval/results/vllm.md

For each host: a random LLaVA of two layers with a Fwd2Bot checkpoint on it is exported, vLLM is started by the export's
own command, and the client asks about one to four images, one question after the other and all at once. Weights have
the names of the hub's checkpoints: transformers 5 saves a CLIP tower as `vision_tower.embeddings…`, vLLM 0.32 wants
`vision_tower.vision_model.embeddings…`. Heads are 32 wide, the least that vLLM's attention takes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import PATCH, SIZE, settings, shake, toy_base, toy_processor  # noqa: E402

from llava_fwd2bot import add_fwd2bot  # noqa: E402
from llava_fwd2bot.checkpoint.export import export  # noqa: E402
from llava_fwd2bot.checkpoint.export_manifest import read_manifest  # noqa: E402
from llava_fwd2bot.processing.conversation import prompt_ids  # noqa: E402
from llava_fwd2bot.serving.vllm import VLLMAnswers  # noqa: E402

HOSTS = ("llava", "llava_next")
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
    """Writes `folder`/base, `folder`/fwd2bot and `folder`/export; gives the model and its processor."""
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
    model = shake(add_fwd2bot(loaded, settings(bridge="linear"), processor)).eval()
    with torch.no_grad():
        weight = model.fwd2bot.bridge.weight
        weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(folder / "fwd2bot", processor=processor)
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


def compare(model: Any, processor: Any, client: VLLMAnswers) -> dict[str, Any]:
    """Asks every question about one to four images, with all tokens and with the first two."""
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        dense = [torch.randn(16, 64, generator=torch.Generator().manual_seed(i)) * 0.3 for i in range(4)]
        crops = type(model).__name__ != "Fwd2BotLlava"
        summary = model._compress(dense, model.fwd2bot.image_prompt_ids, None) if crops else model.compress(pixels)
    rows = [(q, images, k) for q in QUESTIONS for images in (1, 2, 3, 4) for k in (4, 2)]
    expected, bodies, without = [], [], []
    for question, images, k in rows:
        ids = prompt_ids(processor, client.formatter.prompt(question, images))["input_ids"]
        given = {"input_ids": ids, "summary": summary[:images], "num_tokens": k}
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False)
        expected.append(out[0, ids.shape[1] :].tolist())
        bodies.append({"question": question, "summary": summary[:images, :k], "max_new_tokens": NEW})
    alone = [client.complete(**body).token_ids for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: client.complete(**body).token_ids, bodies))
    streamed = [list(client.answer(**body, stream=True)) for body in bodies[:4]]
    base = client.engine.get("/v1/models")["data"][0]["id"]
    for body in bodies:
        without.append(client.complete(**body, model=base).token_ids)
    return {
        "prompts": len(rows),
        "identical": sum(a == b for a, b in zip(alone, expected, strict=True)),
        "identical, all at once": sum(a == b for a, b in zip(together, expected, strict=True)),
        "different without the adapter": sum(a != b for a, b in zip(without, expected, strict=True)),
        "distinct answers": len({tuple(ids) for ids in expected}),
        "streamed": sum(
            "".join(s).strip() == client.complete(**b).text for s, b in zip(streamed, bodies[:4], strict=True)
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=HOSTS)
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
            command = read_manifest(Path(folder) / "export")["command"]
            with engine(args.python, command, Path(folder) / "log", args.minutes) as url:
                client = VLLMAnswers(url, model=Path(folder) / "export")
                results[host] = compare(model, processor, client)
        print(host, json.dumps(results[host]))
    if args.output:
        args.output.write_text(page(results, theirs), encoding="utf-8")
    fine = all(
        r["identical"] == r["identical, all at once"] == r["different without the adapter"] == r["prompts"]
        and r["streamed"] == 4
        for r in results.values()
    )
    return 0 if fine else 1


def page(results: dict[str, dict[str, Any]], theirs: dict[str, str]) -> str:
    names = list(next(iter(results.values())))
    head = "| | " + " | ".join(results) + " |\n|---|" + "---|" * len(results)
    rows = "\n".join(f"| {name} | " + " | ".join(str(r[name]) for r in results.values()) + " |" for name in names)
    versions = ", ".join(f"{name} {version}" for name, version in theirs.items())
    return f"""# Answers by vLLM against `generate`

Written by `bash scripts/test_vllm.sh`: random LLaVAs of two layers in float32 on a CPU ({platform.machine()}), k = 4
and the first 2, a linear bridge, greedy decoding of {NEW} tokens, {len(QUESTIONS)} questions about one to four images.
vLLM is started by the command that `fwd2bot export --to vllm` gives.
Engine: {versions}. Reference: transformers {transformers.__version__}, torch {torch.__version__}.

{head}
{rows}

"Identical" counts prompts whose ids are those of `model.generate(summary=…)`, to the last one. "All at once" are the
same prompts, eight at a time, which vLLM batches. "Different" counts prompts that the base without the adapter answers
otherwise.
"""


if __name__ == "__main__":
    sys.exit(main())
