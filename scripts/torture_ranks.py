"""Two processes, hundreds of steps, rows drawn at random: does a rank wait for ever, do the ranks train what one would?

    python scripts/torture_ranks.py --steps 200 --kinds ddp fsdp2 zero2 zero3

Each step deals each rank one to three rows: an image with text and a caption, without a caption, without labels, a
caption alone, or text alone. One process then takes the same rows in one batch. Told are the largest difference of a
step's loss, and of a weight after all steps. A run that does not come on for --patience seconds is ended and named.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_common import build, table, with_fwd2bot
from bench_shapes import SHAPES
from torch import Tensor, nn

from llava_fwd2bot.checkpoint.gathering import whole_weights

SHAPE, K, RATE = SHAPES["tiny"], 4, 0.01
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
ROWS = ("all", "no caption", "no labels", "caption alone", "text", "text without labels")


def draw(step: int, seed: int) -> list[list[tuple[str, int]]]:
    """The rows of each rank in a step: what kind, and a number that their content is made of."""
    chance = random.Random(f"{seed}-{step}")
    return [[(chance.choice(ROWS), chance.randrange(10**6)) for _ in range(chance.randint(1, 3))] for _ in range(2)]


def batch_of(model: nn.Module, rows: list[tuple[str, int]], dtype: torch.dtype) -> dict[str, Any]:
    image, most, n = SHAPE.vocab - 1, 12, SHAPE.dense_tokens
    ids, labels, captions, pixels = [], [], [], []
    for kind, number in rows:
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(3, image, (most,), generator=generator)[: 4 + number % 8]
        shown = not kind.startswith("text")
        row = torch.cat([words[:1], torch.full((n * shown,), image), words])
        ids.append(row)
        learnt = kind in ("all", "no caption", "text")
        labels.append(torch.where((row != image) & learnt, row, -100))
        captioned = kind in ("all", "no labels", "caption alone")
        captions.append(words[: 3 + number % 3] if captioned else words[:0])
        if shown:
            pixels.append(torch.randn(3, SHAPE.image_size, SHAPE.image_size, generator=generator))

    def padded(parts: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    batch = {"input_ids": padded(ids, 0), "labels": padded(labels, -100)}
    batch["attention_mask"] = padded([torch.ones_like(row) for row in ids], 0)
    if any(map(len, captions)):
        batch["caption_input_ids"] = padded(captions, 0)
        batch["caption_attention_mask"] = padded([torch.ones_like(row) for row in captions], 0)
    if pixels:
        batch["pixel_values"] = torch.stack(pixels).to(dtype)
    return {**batch, "plan": model.planner()(batch, len(pixels), [n] * len(pixels))}


def made(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = with_fwd2bot(build(SHAPE, torch.device("cpu"), dtype), K, SHAPE.lora_r)
    with torch.no_grad():
        for name in model._stages.names:  # LoRA starts as a no-op, which would hide a mix-up of stages
            for key, parameter in model._stages.tensors(name).items():
                if "lora_B" in key:
                    parameter.normal_(std=0.05)
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def wrapped(model: nn.Module, kind: str) -> tuple[nn.Module, Any]:
    """The model as its way of splitting has it, and its optimizer."""
    if kind == "ddp":
        parallel = nn.parallel.DistributedDataParallel(model)
        return parallel, torch.optim.SGD(trained(model), lr=RATE)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for part in model.modules():
            if type(part).__name__ in ("LlamaDecoderLayer", "CLIPEncoderLayer"):
                fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh), torch.optim.SGD(trained(model), lr=RATE)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now, for minutes
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1 by default
        "zero_optimization": {"stage": int(kind[-1])},
    }
    optimizer = torch.optim.SGD(trained(model), lr=RATE)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, engine


def worker(rank: int, kind: str, options: argparse.Namespace, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.stdout = sys.stderr = open(folder / f"{kind}.{rank}.log", "w", encoding="utf-8")  # noqa: SIM115
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    dtype = torch.float32 if kind.startswith("zero") else torch.float64
    model = made(dtype)
    parallel, optimizer = wrapped(model, kind)
    losses = []
    for step in range(options.steps):
        faulthandler.dump_traceback_later(options.patience, exit=True, file=sys.stderr)
        rows = draw(step, options.seed)
        mine = batch_of(model, rows[rank], dtype)
        tokens = torch.tensor(mine["plan"].labelled_tokens)
        dist.all_reduce(tokens)
        loss = parallel(**mine, num_items_in_batch=tokens, micro_batches=2).loss * 2  # of which the mean is taken
        if optimizer is parallel:
            parallel.backward(loss)
            parallel.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().double())
    faulthandler.cancel_dump_traceback_later()
    told = torch.stack(losses)
    dist.all_reduce(told)
    weights = whole_weights(model, keep=rank == 0)
    if rank == 0:
        torch.save({"losses": told / 2, "weights": weights}, folder / kind)
    dist.barrier()
    os._exit(0)  # gloo's threads and the interpreter's own clean-up can wait for each other for ever


def alone(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The same rows in one batch on one process."""
    model = made(dtype)
    optimizer, losses = torch.optim.SGD(trained(model), lr=RATE), []
    for step in range(options.steps):
        rows = [row for of_rank in draw(step, options.seed) for row in of_rank]
        batch = batch_of(model, rows, dtype)
        if batch["plan"].labelled_rows or batch["plan"].captions is not None:
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.detach().double())
        else:
            losses.append(torch.zeros((), dtype=torch.float64))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--patience", type=int, default=120, help="seconds that one step may take")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = options.parse_args()
    torch.set_num_threads(1)
    references: dict[torch.dtype, Any] = {}
    rows, failed = [], False
    for kind in given.kinds:
        dtype = torch.float32 if kind.startswith("zero") else torch.float64
        if dtype not in references:
            references[dtype] = alone(given, dtype)
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            try:
                mp.spawn(worker, args=(kind, given, port, Path(folder)), nprocs=2)
            except Exception as error:
                failed = True
                rows.append([kind, given.steps, "-", "-", "-", f"ended: {str(error).splitlines()[-1][:60]}"])
                for log in sorted(Path(folder).glob("*.log")):
                    print(log.name, log.read_text(encoding="utf-8")[-3000:], sep="\n", file=sys.stderr)
                continue
            found = torch.load(Path(folder, kind), weights_only=True)
            losses, weights = references[dtype]
            apart = (found["losses"] - losses).abs().max().item()
            drift = max((found["weights"][n].to(p.dtype) - p).abs().max().item() for n, p in weights.items())
            seconds = time.monotonic() - start
            rows.append([kind, given.steps, f"{seconds:.0f}", f"{apart:.1e}", f"{drift:.1e}", str(dtype)[6:]])
    table(["kind", "steps", "seconds", "largest loss difference", "largest weight difference", "in"], rows)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
