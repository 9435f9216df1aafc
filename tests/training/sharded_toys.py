"""Runs of the training command on two processes, each way of splitting; data in which ranks have different rows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image

ROOT = Path(__file__).parents[2]


def mixed_data(folder: Path, rows: int = 24) -> Path:
    """Rows with image, caption and conversation; text alone; a caption alone; an image without a caption."""
    (folder / "images").mkdir()
    records = []
    for i in range(rows):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        question = "how many dogs are there?" if i % 4 == 1 else "<image>\nwhat colour is it?"
        record = {"id": str(i)}
        if i % 4 != 2:
            turns = [("human", question), ("gpt", f"red {i} dogs")]
            record["conversations"] = [{"from": who, "value": text} for who, text in turns]
        if i % 4 != 1:
            record["image"] = f"{i}.png"
        if i % 2 == 0:
            record["caption"] = f"a cat {i} on mat"
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def arguments(start: Path, data: Path, output: Path, kind: str, batch: int) -> list[str]:
    """Of a run of 20 steps of 4 rows with a checkpoint at 10."""
    argv = [
        *("--model_name_or_path", str(start), "--data_path", str(data), "--image_folder", str(data.parent / "images")),
        *("--output_dir", str(output), "--per_device_train_batch_size", str(batch), "--max_steps", "20"),
        *("--learning_rate", "3e-4", "--adam_epsilon", "1e-2", "--warmup_steps", "0", "--logging_steps", "1"),
        *("--save_steps", "10", "--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True"),
        *("--fwd2bot", "4", "--fwd2bot_nested_k", "2,4"),
    ]
    if kind == "fsdp2":
        settings = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"],
        }
        file = output.parent / "fsdp2.json"
        file.write_text(json.dumps(settings))
        argv += ["--fsdp", "full_shard", "--fsdp_config", str(file)]
    if kind.startswith("zero"):
        argv += ["--deepspeed", str(ROOT / "scripts" / "accelerate" / f"{kind}.json")]
    return argv


def worker(rank: int, port: str, log: Path, *runs: list[str]) -> None:
    """One of two processes; it runs the command with each of the arguments."""
    # a process that waits for ever would hold up the tests
    import faulthandler

    sys.stdout = sys.stderr = open(f"{log}.{rank}", "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.dump_traceback_later(540, exit=True, file=sys.stderr)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    if any("--deepspeed" in argv for argv in runs):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now, for minutes
    from accelerate.state import AcceleratorState

    from llava_fwd2bot.training.command import train

    for argv in runs:
        AcceleratorState._reset_state()
        train(argv)
    torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads and the interpreter's own clean-up can wait for each other for ever


def on_two_processes(log: Path, *runs: list[str]) -> None:
    from test_distributed import free_port

    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        mp.spawn(worker, args=(free_port(), log, *runs), nprocs=2)
    except Exception as error:
        told = "\n".join(
            Path(f"{log}.{rank}").read_text()[-3000:] for rank in (0, 1) if Path(f"{log}.{rank}").is_file()
        )
        raise AssertionError(f"{error}\n{told}") from error
