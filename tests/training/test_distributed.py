"""Two processes with gloo: the gradients of one process with the whole batch; the training command under torchrun."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import captions, settings, shake, standard_batch, toy_base, toy_processor
from torch.nn.parallel import DistributedDataParallel
from train_toys import command, history

from llava_fwd2bot import add_fwd2bot, load_fwd2bot
from llava_fwd2bot.losses import contrastive_loss, gather_with_grad
from llava_fwd2bot.modeling import blocks


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def finish():
    """Ends a worker at once: gloo's threads and the interpreter's own clean-up can wait for each other for ever."""
    torch.distributed.barrier()
    os._exit(0)


def build(**changes):
    processor = toy_processor()
    base = toy_base(processor, torch.float64)
    torch.manual_seed(0)
    return shake(add_fwd2bot(base, settings(answer_weight=0.0, **changes), processor)).train()


def whole_batch(model):
    batch = {**standard_batch(model, "right"), **captions()}
    batch["labels"][:] = -100  # means of answers are per rank; the contrastive loss is over all pairs
    return batch


def rank_batch(batch, rank):
    """Rank 0 has one captioned image; rank 1 the row of two images, captioned, and the row of text alone."""
    rows, images = (slice(0, 1), slice(0, 1)) if rank == 0 else (slice(1, 3), slice(1, 3))
    return {k: v[images if k == "pixel_values" else rows] for k, v in batch.items()}


def worker(rank, port, path, chunk, rows):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    if rows:
        blocks.block_rows = lambda pairs: rows
    model = build(contrastive_chunk=chunk)
    parallel = DistributedDataParallel(model)  # kept: its hooks die with it
    out = parallel(**rank_batch(whole_batch(model), rank))
    out.loss.backward()
    if rank == 0:
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": out.contrastive_loss.detach(), **grads}, path)
    finish()


@pytest.mark.parametrize(("chunk", "rows"), [(None, None), (1, None), (1, 1)])
def test_two_ranks_are_one_with_the_whole_batch(tmp_path, chunk, rows):
    """Negatives of all ranks, with gradient, through DDP; ranks with different numbers of pairs; by blocks of rows."""
    mp.spawn(worker, args=(free_port(), tmp_path / "grads", chunk, rows), nprocs=2)
    got = torch.load(tmp_path / "grads", weights_only=True)
    model = build()
    out = model(**whole_batch(model))
    out.loss.backward()
    assert abs(got.pop("loss") - out.contrastive_loss) <= 1e-10
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any(".compress." in n for n in expected)
    assert max((got[n] - g).abs().max() for n, g in expected.items()) <= 1e-10
    assert all(g.abs().max() == 0 for n, g in got.items() if n not in expected)


def uneven(rank, port, with_captions):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = DistributedDataParallel(build())
    batch = standard_batch(model.module, "right")
    if with_captions and rank == 0:
        batch.update(captions())
    if rank == 1:  # text alone: neither the compress adapter nor the summary tokens take part
        batch = {k: v[2:] for k, v in batch.items() if k != "pixel_values"}
    for _ in range(2):  # a parameter left out would make the second step hang or raise
        model(**batch).loss.backward()
    finish()


@pytest.mark.parametrize("with_captions", [False, True])
def test_a_rank_without_images_or_captions_does_not_stall_the_others(with_captions):
    mp.spawn(uneven, args=(free_port(), with_captions), nprocs=2)


def test_gather_outside_a_process_group_is_the_identity():
    rows = torch.randn(2, 3)
    assert gather_with_grad(rows) is rows
    assert contrastive_loss(rows, rows, torch.tensor(0.0))[0] > 0


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_the_training_command_on_two_processes(base_dir, llava_data, tmp_path, launcher):
    """torchrun and accelerate: it trains, logs the mean over ranks, and one rank writes a checkpoint that opens."""
    argv = command(base_dir, llava_data, tmp_path / "m", "--max_steps", "2", "--per_device_train_batch_size", "2")
    argv += ["--gradient_checkpointing", "True", "--group_by_modality_length", "True"]
    where = ["--nproc_per_node", "2"] if "distributed" in launcher else ["--cpu", "--num_processes", "2"]
    port = ["--master_port" if "distributed" in launcher else "--main_process_port", free_port()]
    done = subprocess.run(
        [sys.executable, "-m", launcher, *where, *port, "-m", "llava_fwd2bot", "train", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "m" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and {"answer_loss", "contrastive_loss"} <= set(history(tmp_path / "m")[0])
    assert load_fwd2bot(tmp_path / "m")[0].fwd2bot_config.num_summary_tokens == 4
