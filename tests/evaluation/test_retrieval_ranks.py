"""Exact search: ranks by hand, in blocks, and of vectors that are all alike."""

from __future__ import annotations

import pytest
import torch

from llava_fwd2bot.evaluation import retrieval


def test_retrieval_counts_by_hand():
    """Two images, three captions; the first image owns two of them."""
    scores = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.5, 0.3]])
    t2i, i2t = retrieval.ranks(scores, torch.eye(3), torch.tensor([0, 0, 1]))
    found = retrieval.recalls(t2i, i2t, (1, 2))
    assert found["t2i_r1"] == pytest.approx(1 / 3)  # captions 1 and 2 lie nearer to the other image
    assert found["t2i_r2"] == 1.0
    assert found["i2t_r1"] == 0.5  # image 0's best is its own; image 1's is not
    assert t2i.tolist() == [0, 1, 1]


def test_search_in_blocks_is_the_whole_search():
    """Ranks must not depend on how much is scored at once; also those of late interaction, by hand."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(40).repeat_interleave(3)
    images, captions = (torch.randn(n, 2, 8, generator=generator) for n in (40, 120))
    images, captions = retrieval.unit_tokens(images), retrieval.unit_tokens(captions + 2 * images[owner])
    for one, other, function in (
        (images[:, 0], captions[:, 0], retrieval.cosine),
        (images, captions, retrieval.maxsim),
    ):
        scores = function(one, other)  # [N, C]
        right = scores[owner, torch.arange(120)]
        best = scores.masked_fill(owner != torch.arange(40)[:, None], -9).amax(1)
        mine = owner == torch.arange(40)[:, None]
        for block in (1, 500, 2**20):
            t2i, i2t = retrieval.ranks(one, other, owner, function, block)
            assert torch.equal(t2i, ((scores > right) & ~mine).sum(0))
            assert torch.equal(i2t, ((scores > best[:, None]) & ~mine).sum(1))
    pair = torch.einsum("id,jd->ij", images[3], captions[7])
    assert retrieval.maxsim(images[3:4], captions[7:8]).item() == pytest.approx(pair.max(0).values.mean().item())


@pytest.mark.parametrize("count", [10, 100])
def test_vectors_that_are_all_alike_find_nothing(count):
    """A collapsed model has its ties decided by rounding otherwise: R@1 was 0 or 1, as the number of images fell."""
    one = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1).expand(count, -1)
    owner = torch.arange(count).repeat_interleave(2)
    t2i, i2t = retrieval.ranks(one, one[owner], owner)
    assert set(t2i.tolist()) == {(count - 1) // 2} and set(i2t.tolist()) == {count - 1}
    with pytest.raises(ValueError, match="not finite"):
        retrieval.ranks(one * float("nan"), one[owner], owner)
