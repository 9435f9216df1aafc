"""Exact search: ranks by hand, in blocks, screened in bfloat16, and of vectors that are all alike."""

from __future__ import annotations

import pytest
import torch

from llava_fwd2bot.evaluation import search


def test_retrieval_counts_by_hand():
    """Two images, three captions; the first image owns two of them."""
    scores = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.5, 0.3]])
    t2i, i2t = search.ranks(scores, torch.eye(3), torch.tensor([0, 0, 1]))
    found = search.recalls(t2i, i2t, (1, 2))
    assert found["t2i_r1"] == pytest.approx(1 / 3)  # captions 1 and 2 lie nearer to the other image
    assert found["t2i_r2"] == 1.0
    assert found["i2t_r1"] == 0.5  # image 0's best is its own; image 1's is not
    assert t2i.tolist() == [0, 1, 1]


def test_search_in_blocks_is_the_whole_search():
    """Ranks must not depend on how much is scored at once; also those of late interaction, by hand."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(40).repeat_interleave(3)
    images, captions = (torch.randn(n, 2, 8, generator=generator) for n in (40, 120))
    images, captions = search.unit_tokens(images), search.unit_tokens(captions + 2 * images[owner])
    for one, other, function in ((images[:, 0], captions[:, 0], search.cosine), (images, captions, search.maxsim)):
        scores = function(one, other)  # [N, C]
        right = scores[owner, torch.arange(120)]
        best = scores.masked_fill(owner != torch.arange(40)[:, None], -9).amax(1)
        mine = owner == torch.arange(40)[:, None]
        for block in (1, 500, 2**20):
            t2i, i2t = search.ranks(one, other, owner, function, block)
            assert torch.equal(t2i, ((scores > right) & ~mine).sum(0))
            assert torch.equal(i2t, ((scores > best[:, None]) & ~mine).sum(1))
    pair = torch.einsum("id,jd->ij", images[3], captions[7])
    assert search.maxsim(images[3:4], captions[7:8]).item() == pytest.approx(pair.max(0).values.mean().item())


@pytest.mark.parametrize("alike, since, screened", [(0, 0, True), (5, 0, False), (60, 0, False), (60, 150, False)])
def test_a_search_screened_in_bfloat16_has_the_same_ranks(alike, since, screened):
    """What rounding leaves open is looked at exactly; where that is too much, all that follows is, and is not screened.

    Of images that are alike since the 150th, some tiles are screened before it is given up: each counts once.
    """
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(200).repeat_interleave(3)
    images = torch.randn(200, 256, generator=generator)
    images[since:] += alike * torch.randn(256, generator=generator)
    images = torch.nn.functional.normalize(images, dim=1)
    images[5] = images[4]  # ties, which rounding must not break
    captions = images[owner] + 3.5 * torch.randn(600, 256, generator=generator) / 16
    captions = torch.nn.functional.normalize(captions, dim=1)
    seen = []

    def scores(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(one.dtype)
        return one @ other.T

    for block in (2**16, 2**22):
        expected = search.ranks(images, captions, owner, block=block, screen=False)
        seen.clear()
        found = search.ranks(images, captions, owner, scores, block, screen=True)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert seen[0] == torch.bfloat16 and (torch.float32 in seen) != screened
        if since and block == 2**16:
            assert seen.count(torch.bfloat16) > 1  # given up on the way
    assert len(expected[0].unique()) > 3  # not trivial


@pytest.mark.parametrize("count", [10, 100])
def test_vectors_that_are_all_alike_find_nothing(count):
    """A collapsed model has its ties decided by rounding otherwise: R@1 was 0 or 1, as the number of images fell."""
    one = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1).expand(count, -1)
    owner = torch.arange(count).repeat_interleave(2)
    t2i, i2t = search.ranks(one, one[owner], owner)
    assert set(t2i.tolist()) == {(count - 1) // 2} and set(i2t.tolist()) == {count - 1}
    with pytest.raises(ValueError, match="not finite"):
        search.ranks(one * float("nan"), one[owner], owner)
