"""ZeRO-3 is one process with all rows, also in steps in which no rank has an image, a caption or a label."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from test_distributed import finish, free_port
from test_ranks import NO_CAPTION, NO_LABELS, batch_of, build

from llava_fwd2bot.checkpoint.gathering import whole_weights

# as test_ranks.STEPS has them
STEPS = [
    ([(0,)], [(1,)]),
    ([(0, NO_LABELS)], [(1, NO_LABELS)]),
    ([(2,)], [(2,)]),  # text alone
    ([(0, NO_CAPTION)], [(1, NO_CAPTION)]),
    ([(1,)], [(0,)]),
    ([(2,)], [(2,)]),
    ([(0, NO_LABELS), (1, NO_LABELS)], [(2, NO_LABELS)]),
    ([(2,)], [(0, NO_CAPTION)]),
]
ACCUMULATION = (1, 2)


def learn(model, engine, rank, ranks, accumulation):
    """Steps of SGD by DeepSpeed's engine, or by plain PyTorch; the losses of this rank, of which the sum is the step's.

    Args:
        rank: whose rows are taken; None takes all.
    """
    optimizer = None if engine else torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for first in range(0, len(STEPS), accumulation):
        micro = STEPS[first : first + accumulation]
        whole = [batch_of(model, one + two) for one, two in micro]
        tokens = sum(
            model.labelled_tokens(batch["labels"], batch["input_ids"], batch["attention_mask"]).sum() for batch in whole
        )
        for step, batch in zip(micro, whole, strict=True):
            mine = batch if rank is None else batch_of(model, step[rank])
            run = engine or model
            loss = run(**mine, num_items_in_batch=tokens, micro_batches=ranks * accumulation).loss
            losses.append(loss.detach())
            if engine:  # which takes the mean of all
                engine.backward(loss * ranks * accumulation)
                engine.step()
            else:
                loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses)


def worker(rank, ranks, port, threshold, folder):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now, for minutes
    for accumulation in ACCUMULATION:
        model = build().float()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
        }
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        losses = learn(model, engine, rank if ranks > 1 else None, ranks, accumulation)
        torch.distributed.all_reduce(losses)
        weights = whole_weights(model, keep=rank == 0)
        if rank == 0:
            torch.save({"losses": losses, **weights}, folder / str(accumulation))
    finish()


@pytest.mark.parametrize(("ranks", "threshold"), [(2, 0), (2, 100_000), (1, 0)])
def test_a_step_without_a_gradient_moves_no_weight(tmp_path, ranks, threshold):
    """DeepSpeed keeps the parts of the gradients from step to step.

    In a step without a label on any rank, the answer adapter was updated with the gradients of the step before; so were
    the compress adapter and the projector in a step of text, and the temperature in one without captions. A
    micro-batch without them added its step's gradients to those of the step before.

    Args:
        threshold: weights of fewer numbers stay whole on each rank.
    """
    pytest.importorskip("deepspeed")
    mp.spawn(worker, args=(ranks, free_port(), threshold, tmp_path), nprocs=ranks)
    for accumulation in ACCUMULATION:
        model = build().float()
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        losses = learn(model, None, None, 1, accumulation)
        got = torch.load(tmp_path / str(accumulation), weights_only=True)
        torch.testing.assert_close(got.pop("losses"), losses, rtol=1e-5, atol=1e-5)
        expected = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        assert got.keys() == expected.keys()
        assert max((got[n] - expected[n]).abs().max() for n in got) <= 1e-5
        assert sum(not torch.equal(start[n], expected[n]) for n in start) > 0.9 * len(start)
