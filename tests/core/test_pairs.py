"""Equal pictures and equal captions of a batch: they are no negatives of each other, whatever else changes."""

import pytest
import torch
from conftest import SIZE, captions, settings, shake, standard_batch, toy_base
from test_losses import unit

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.losses import Candidates, contrastive_loss
from llava_fwd2bot.modeling.pairs import content_keys, text_keys


def candidates(images, texts):
    return Candidates.of(torch.tensor(images), torch.tensor(texts), torch.float64)


def by_hand(similar, images, texts):
    """The loss of the distinct pairs, in loops: each against the distinct candidates not known to belong to it."""
    known = set(zip(images, texts, strict=True))
    value = {(a, t): similar[images.index(a), texts.index(t)].exp() for a in images for t in texts}
    total = 0.0
    for a, t in known:
        to_text = sum(value[a, other] for other in set(texts) if (a, other) not in known)
        to_image = sum(value[other, t] for other in set(images) if (other, t) not in known)
        total -= (value[a, t] / (value[a, t] + to_text)).log() + (value[a, t] / (value[a, t] + to_image)).log()
    return total / (2 * len(known))


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 1, 1, 2], [1, 1, 1, 2]),  # LLaVA's records: one picture, one caption, several conversations
        ([1, 1, 2, 3], [1, 2, 3, 4]),  # two captions of one picture
        ([1, 2, 3, 4], [1, 1, 2, 3]),  # one caption of two pictures
        ([1, 2, 2, 3, 3, 1], [1, 1, 2, 3, 3, 4]),  # chains: text 2 belongs to image 2 alone, text 1 to both
    ],
)
def test_equal_pairs_by_hand(images, texts):
    """A picture in several records has ln(copies) as its lowest loss, if its copies are its negatives."""
    a, b = unit(9, 0), unit(9, 1)
    images_at, texts_at = a[images], b[texts]
    loss, _ = contrastive_loss(images_at, texts_at, torch.tensor(1.5), candidates(images, texts))
    similar = torch.tensor(1.5).double().exp() * images_at @ texts_at.T
    torch.testing.assert_close(loss, by_hand(similar, images, texts), rtol=0, atol=1e-12)


def test_copies_change_neither_loss_nor_accuracy_nor_gradient():
    """Each record four times is the same objective: a pair, and a candidate, counts once."""
    found = []
    for times in (1, 4):
        a, b = unit(3, 0).requires_grad_(), unit(3, 1).requires_grad_()
        copies = candidates(list(range(3)) * times, list(range(3)) * times)
        loss, accuracy = contrastive_loss(a.repeat(times, 1), b.repeat(times, 1), torch.tensor(2.0), copies)
        found.append((loss, accuracy, *torch.autograd.grad(loss, (a, b))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_accuracy_is_of_pairs_that_have_a_negative():
    """Of one picture alone nothing is told apart: no accuracy of 1."""
    a = unit(2, 0)
    loss, accuracy = contrastive_loss(a, a, torch.tensor(2.0), candidates([1, 1], [1, 1]))
    assert loss == 0 and accuracy.isnan()
    swapped = torch.cat([a, a[[1, 0]]])  # rows 2 and 3 are wrong, but have negatives as rows 0 and 1 have
    assert contrastive_loss(swapped, torch.cat([a, a]), torch.tensor(2.0))[1] < 1


def test_keys_tell_content_apart():
    """What collators do to equal rows must not change the key; what differs in one bit must."""
    rows = torch.randn(6, 2, 3, 5)
    keys = content_keys(rows)
    assert len(keys.unique()) == 6
    assert torch.equal(content_keys(rows.flip(0)), keys.flip(0))
    filled = torch.cat([rows, torch.zeros(6, 2, 3, 5)], dim=1)  # more crops in the batch
    assert torch.equal(content_keys(filled), keys)
    assert torch.equal(content_keys(list(rows)), keys)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.long):
        cast = (rows * 100).to(dtype)
        changed = cast.clone()
        changed[2, 1, 2, 4] += 1
        assert (content_keys(cast) != content_keys(changed)).tolist() == [False, False, True, False, False, False]
    assert content_keys(rows[:0]).shape == (0,)
    swapped = rows.clone()
    swapped[0, 0, 0, 0], swapped[0, 0, 0, 1] = rows[0, 0, 0, 1], rows[0, 0, 0, 0]
    assert content_keys(swapped)[0] != keys[0]


def test_keys_of_texts_do_not_depend_on_padding():
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 0, 0], [6, 5, 0, 0], [5, 6, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    first, same, other, longer = text_keys(ids, mask)
    assert first == same and len({int(first), int(other), int(longer)}) == 3


def grown(model, times):
    """The first two rows of the standard batch and their captions, `times` over."""
    batch, pairs = standard_batch(model, "right"), captions()
    batch = {k: v[: 3 if k == "pixel_values" else 2].repeat(times, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    return {**batch, **{k: v[:2].repeat(times, 1) for k, v in pairs.items()}}


@pytest.mark.parametrize("chunk", [None, 2])
def test_records_of_one_picture(processor, chunk):
    """Through the model, from pixels: four records of each picture are the same loss and gradient as one."""
    found = []
    for times, size in ((1, None), (4, chunk)):
        torch.manual_seed(0)
        base = toy_base(processor, torch.float64)
        model = shake(add_fwd2bot(base, settings(contrastive_chunk=size, answer_weight=0.0), processor)).train()
        out = model(**grown(model, times))
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": out.loss, "accuracy": out.retrieval_accuracy, **grads})
    assert found[0]["loss"] > 0.1 and found[0].keys() == found[1].keys()
    assert max((found[0][n] - found[1][n]).abs().max() for n in found[0]) <= 1e-10


def test_records_of_one_stored_summary(model64):
    batch = grown(model64, 2)
    summary = model64.compress(batch.pop("pixel_values")[:3])
    one = model64(**grown(model64, 1)).contrastive_loss
    torch.testing.assert_close(model64(**batch, summary=summary.repeat(2, 1, 1)).contrastive_loss, one)


def test_one_pair_has_no_accuracy_and_says_so_once(model):
    """A batch of one, usual at 7B with accumulation: a loss of 0 and an accuracy of 1 would look like success."""
    pixels, ids = torch.randn(1, 3, SIZE, SIZE), torch.tensor([[5, 6]])
    model.train()
    with pytest.warns(UserWarning, match="no negatives.*accumulation adds no negatives") as said:
        for _ in range(2):
            out = model(pixel_values=pixels, caption_input_ids=ids)
            assert out.contrastive_loss == 0 and out.retrieval_accuracy is None
    assert len([w for w in said if "no negatives" in str(w.message)]) == 1
