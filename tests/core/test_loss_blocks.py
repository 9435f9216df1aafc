"""The contrastive loss by blocks of rows is the plain formula, and never holds a whole matrix of logits."""

import pytest
import torch
from conftest import captions, settings, shake, standard_batch, toy_base
from test_losses import unit
from torch.utils._python_dispatch import TorchDispatchMode

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.losses import MAX_LOGIT_SCALE, Candidates, contrastive_loss
from llava_fwd2bot.modeling import blocks
from llava_fwd2bot.modeling.blocks import block_rows, contrastive_loss_by_blocks

PAIRS = 24
# of each pair, its image and its text: all different, copies of pairs, and chains of shared images and texts
KEYS = {
    "different": (list(range(PAIRS)), list(range(PAIRS))),
    "copies": ([i % 5 for i in range(PAIRS)], [i % 5 for i in range(PAIRS)]),
    "chains": ([i // 2 for i in range(PAIRS)], [(i + 1) // 3 * 7 for i in range(PAIRS)]),
    "one image": ([3] * PAIRS, list(range(PAIRS))),
}


def found(loss_of, keys, scale, dtype=torch.float64, autocast=False):
    """Loss and accuracy, and the gradients of images, texts and scale."""
    images, texts = unit(PAIRS, 0)[keys[0]].to(dtype), unit(PAIRS, 1)[[t % PAIRS for t in keys[1]]].to(dtype)
    leaves = images.requires_grad_(), texts.requires_grad_(), torch.tensor([scale], dtype=dtype, requires_grad=True)
    candidates = Candidates.of(torch.tensor(keys[0]), torch.tensor(keys[1]), dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, accuracy = loss_of(*leaves, candidates)
    return loss, accuracy, *torch.autograd.grad(3 * loss, leaves)


@pytest.mark.parametrize("rows", [1, 5, 8, PAIRS - 1, PAIRS, 100])
@pytest.mark.parametrize("keys", KEYS)
def test_blocks_are_the_plain_formula(keys, rows):
    """Also where blocks are uneven, and where equal images and texts stand in different blocks."""
    for scale in (0.0, MAX_LOGIT_SCALE):
        plain = found(contrastive_loss, KEYS[keys], scale)
        by_blocks = found(lambda *given: contrastive_loss_by_blocks(*given, rows), KEYS[keys], scale)
        torch.testing.assert_close(by_blocks, plain, rtol=0, atol=1e-12, equal_nan=True)


def test_blocks_in_float32_under_autocast():
    """Blocks are computed once more in backward, which must not be in bfloat16 either."""
    plain = found(contrastive_loss, KEYS["chains"], 3.0, torch.float32)
    by_blocks = found(
        lambda *given: contrastive_loss_by_blocks(*given, 5), KEYS["chains"], 3.0, torch.float32, autocast=True
    )
    torch.testing.assert_close(by_blocks, plain, rtol=1e-6, atol=1e-6)


class _Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_no_matrix_of_all_pairs_is_made():
    """8,192 pairs have matrices of 268 MB in float32, and eight of them. Keys and weights count as well."""
    pairs, size = 2048, 16
    images, texts = (torch.randn(pairs, size).requires_grad_() for _ in range(2))
    keys = torch.arange(pairs) // 2
    with _Largest() as largest:
        candidates = Candidates.of(keys, torch.arange(pairs), torch.float32)
        contrastive_loss_by_blocks(images, texts, torch.tensor(1.0), candidates)[0].backward()
    assert pairs * size <= largest.numbers <= (block_rows(pairs) + 1) * pairs < pairs**2 / 3


def test_small_batches_keep_the_plain_path():
    assert [block_rows(pairs) for pairs in (2, 1024, 2048, 8192, 65536)] == [2, 1024, 512, 128, 64]


def test_a_training_step_by_blocks(processor, monkeypatch):
    """Through the model: one row at a time gives the gradients of the whole."""
    grads = []
    for rows in (None, 1):
        if rows:
            monkeypatch.setattr(blocks, "block_rows", lambda pairs, rows=rows: rows)
        torch.manual_seed(0)
        model = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(), processor)).train()
        out = model(**standard_batch(model), **captions())
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": out.loss})
    assert grads[0].keys() == grads[1].keys()
    assert max((grads[0][n] - grads[1][n]).abs().max() for n in grads[0]) <= 1e-12
