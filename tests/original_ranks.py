"""Runs of LLaVA's own train() with Fwd2Bot on two processes, and data of which a rank may get text alone."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import nn

from llava_fwd2bot.checkpoint.gathering import fill, full_shape

STEPS = 6


def configuration(folder: Path, stage: int) -> Path:
    """LLaVA's scripts/zero2.json or zero3.json, in float32."""
    auto = "auto"
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9}
    zero["reduce_bucket_size"] = auto
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": auto, "stage3_param_persistence_threshold": auto}
        zero |= {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({**dict.fromkeys(sizes, auto), "bf16": {"enabled": auto}, "zero_optimization": zero}))
    return path


def mixed(folder: Path, images: Path, rows: int = 24) -> Path:
    """Pairs of rows: with images and captions, text alone, images without a caption."""
    records = []
    for i in range(rows):
        kind, colour = (i // 2) % 3, ("red", "green", "blue")[i % 3]
        question = "is there a cat ?" if kind == 1 else "<image>\nwhat colour is the picture ?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{colour} " * (1 + i % 4)}]
        record = {"id": str(i), "conversations": turns}
        record |= {} if kind == 1 else {"image": f"{i % 6}.png"}
        records.append({**record, "caption": f"a {colour} picture"} if kind == 0 else record)
    path = folder / "mixed.json"
    path.write_text(json.dumps(records))
    return path


def begun(model: nn.Module) -> nn.Module:
    """What trains begins as numbers made from its name, the same however the model was loaded."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" in name or name == "fwd2bot.tokens"):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            fill(parameter, 0.05 * torch.randn(full_shape(parameter), generator=generator))
    return model


def worker(rank: int, port: int, log: Path, runs: list[list[str]]) -> None:
    """One of two processes; it trains with each of the arguments."""
    sys.stdout = sys.stderr = open(f"{log}.{rank}", "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.dump_traceback_later(240, exit=True, file=sys.stderr)  # of a process that waits for ever
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # the random state of transformers 4.37's checkpoints
    torch.set_num_threads(1)
    import accelerate
    import deepspeed
    import transformers
    from accelerate.state import AcceleratorState
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    from llava_fwd2bot.training import original

    if accelerate.__version__.startswith("0."):  # its --use_cpu passes over DeepSpeed, which else asks for NCCL
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        runs = [[*argv, "--use_cpu", "False"] for argv in runs]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now, for minutes
    install = original.install
    original.install = lambda *args, **given: begun(install(*args, **given))
    # LLaVA's tower is in half precision without --bf16, of which ZeRO-3 knows nothing: so that losses can be compared
    CLIPVisionTower.to = lambda self, *args, **given: self
    stock, told = transformers.Trainer.training_step, []

    def step(trainer, model, inputs, *args, **given):  # 4.37 logs four digits
        images = int((inputs["input_ids"] == -200).sum())
        loss = stock(trainer, model, inputs, *args, **given)
        told.append({"loss": float(loss), "images": images})
        return loss

    transformers.Trainer.training_step = step
    for argv in runs:
        AcceleratorState._reset_state()
        original.train(argv)
        Path(argv[argv.index("--output_dir") + 1], f"steps.{rank}.json").write_text(json.dumps(told))
        told.clear()
        torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads and the interpreter's own clean-up can wait for each other for ever


def on_two_processes(log: Path, *runs: list[str]) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    try:
        mp.spawn(worker, args=(port, log, list(runs)), nprocs=2)
    except Exception as error:
        logs = [Path(f"{log}.{rank}") for rank in (0, 1)]
        told = "\n".join(path.read_text()[-4000:] for path in logs if path.is_file())
        raise AssertionError(f"{error}\n{told}") from error
