"""Two processes, DDP and FSDP2, are one process with all rows, whatever each rank's rows hold."""

import copy
import os

import pytest
import torch
import torch.multiprocessing as mp
from conftest import captions, settings, shake, standard_batch, toy_base, toy_processor
from test_distributed import finish, free_port
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.losses import MAX_LOGIT_SCALE

NO_LABELS, NO_CAPTION = "labels", "caption"
# of each step, the rows of rank 0 and of rank 1: of the standard batch (0: an image, 1: two images, 2: text), and what
# is taken from each
STEPS = [
    ([(0,)], [(2,)]),  # images and text; a single pair
    ([(1,)], [(0, NO_LABELS)]),
    ([(2,)], [(2, NO_LABELS)]),  # nothing to learn from on one rank
    ([(0,), (1,)], [(0,), (2,)]),  # one picture on both ranks
    ([(0, NO_CAPTION)], [(2,), (2,)]),
    ([(2, NO_LABELS)], [(1, NO_LABELS)]),
    ([(0, NO_LABELS, NO_CAPTION)], [(1, NO_CAPTION)]),  # an image that nothing is asked of
    ([(1,), (0,), (0,)], [(1, NO_LABELS)]),
]
SETUPS = {
    "ddp": ("ddp", {}, False),
    "fsdp": ("fsdp", {}, False),
    "fsdp, chunks and checkpoints": ("fsdp", {"contrastive_chunk": 1}, True),
    "fsdp, the language model itself": ("fsdp", {"adapters": "none"}, False),
    "fsdp, a grid": ("fsdp", {"residual": "pool", "nested_k": None, "contrastive_chunk": 1}, False),
}


def build(**changes):
    processor = toy_processor()
    base = toy_base(processor, torch.float64)
    torch.manual_seed(0)
    own = settings(**{"residual": "average", "bridge": "scale", "nested_k": [1, 2, 4], **changes})
    return shake(add_fwd2bot(base, own, processor, train_projector=True)).train()


def batch_of(model, rows):
    whole, images = {**standard_batch(model, "right"), **captions()}, [[0], [1, 2], []]
    batch = {n: whole[n][[row for row, *_ in rows]].clone() for n in whole if n != "pixel_values"}
    for i, (_, *without) in enumerate(rows):
        if NO_LABELS in without:
            batch["labels"][i] = -100
        if NO_CAPTION in without:
            batch["caption_attention_mask"][i] = 0
    if taken := [image for row, *_ in rows for image in images[row]]:
        batch["pixel_values"] = whole["pixel_values"][taken]
    if not batch["caption_attention_mask"].any():
        batch = {n: v for n, v in batch.items() if "caption" not in n}
    return batch


def plan(model, rank=None):
    """Each step's batch of a rank, or of all, and the labelled tokens of the whole step."""
    for step in STEPS:
        whole = batch_of(model, step[0] + step[1])
        tokens = model.labelled_tokens(whole["labels"], whole["input_ids"], whole["attention_mask"]).sum()
        yield (whole if rank is None else batch_of(model, step[rank])), tokens


def learn(model, batches, ranks):
    """Plain steps; the losses of this rank, of which the mean is the step's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for mine, tokens in batches:
        loss = model(**mine, num_items_in_batch=tokens, micro_batches=ranks).loss * ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def split(model, kind):
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.modules()]:
        if type(layer).__name__.endswith("Layer"):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def bounds_the_temperature(model, batch):
    """The parameter in the forward is a copy of what each rank holds a part of."""
    with torch.no_grad():
        model.fwd2bot.logit_scale.add_(9)
    out = model(**batch)
    assert abs(out.temperature - 0.01) < 1e-4
    out.loss.backward()
    assert isinstance(model.fwd2bot.logit_scale, DTensor)
    model.fwd2bot.bound_temperature()
    assert model.fwd2bot.logit_scale.full_tensor() <= MAX_LOGIT_SCALE


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name, (kind, changes, checkpointing) in SETUPS.items():
        model = build(**changes)
        if checkpointing:
            model.gradient_checkpointing_enable()
        batches = list(plan(model, rank))
        parallel = split(model, kind)
        losses = learn(parallel, batches, 2)
        torch.distributed.all_reduce(losses)
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in trained.items()}
        if rank == 0:
            torch.save({"losses": losses / 2, **weights}, folder / name)
        if name == "fsdp":
            bounds_the_temperature(model, batches[3][0])
    # in bfloat16 a rank without a pair joined the gather with half the bytes
    model = build().to(torch.bfloat16)
    for batch, _ in plan(model, rank):
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite()
    finish()


def test_two_ranks_are_one_with_all_rows(tmp_path):
    """Losses and weights after steps in which the ranks hold images, text, captions, labels or none of them.

    The ranks draw the same prefix lengths, share pictures, weigh tokens alike, and run the same calls under FSDP: a
    rank of text alone ran fewer, and both waited for ever.
    """
    mp.spawn(worker, args=(free_port(), tmp_path), nprocs=2)
    for name, (_, changes, _) in SETUPS.items():
        model = build(**{setting: value for setting, value in changes.items() if setting != "contrastive_chunk"})
        start = {n: copy.deepcopy(p.data) for n, p in model.named_parameters() if p.requires_grad}
        losses = learn(model, plan(model), 1)
        got = torch.load(tmp_path / name, weights_only=True)
        torch.testing.assert_close(got.pop("losses"), losses, rtol=0, atol=1e-9)
        expected = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        assert got.keys() == expected.keys()
        assert max((got[n] - expected[n]).abs().max() for n in got) <= 1e-8, name
        assert sum(not torch.equal(start[n], expected[n]) for n in start) > 0.9 * len(start)


def test_distillation_is_refused_where_weights_are_split(model, monkeypatch):
    model.fwd2bot_config.distill_weight = 0.5
    from llava_fwd2bot.modeling.objective import Batch

    with pytest.raises(ValueError, match="distill_weight is not supported where .* split over ranks"):
        model._agree(Batch(None, None, None, None, None, {}))
