"""--group_by_image: rows of one image in one batch, where it is read, stacked and compressed once."""

import json

import pytest
import torch
from conftest import settings, shake, toy_base
from train_toys import command, history

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.training.collator import Fwd2BotCollator
from llava_fwd2bot.training.data import LlavaDataset
from llava_fwd2bot.training.sampler import ImageGroupSampler


@pytest.fixture
def repeated(llava_data):
    """Sixteen records of four images, four records each, in mixed order, and two of text alone."""
    records = json.loads(llava_data["data"].read_text())
    mixed = [{**records[i % 4], "id": str(i)} for i in range(16)]
    for i, record in enumerate(mixed):
        turns = [dict(turn) for turn in record["conversations"]]
        turns[1]["value"] = f"{turns[1]['value']} {i}"
        record["conversations"], record["caption"] = turns, f"a cat {i}"
    text = [{"from": "human", "value": "how many dogs?"}, {"from": "gpt", "value": "two"}]
    mixed[3:3] = [{"id": "t1", "conversations": text}, {"id": "t2", "conversations": text}]
    llava_data["data"].write_text(json.dumps(mixed))
    return llava_data


def batches_of(sampler, size):
    order = list(sampler)
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("size", [3, 4, 8])
def test_every_row_comes_once_and_images_come_together(by_length, size):
    """Each index exactly once, another order in each epoch, and few images that stand in more than one batch."""
    groups = [i // 4 for i in range(160)] + list(range(40, 60))
    lengths = [10 + i % 7 for i in range(160)] + [-5] * 20 if by_length else None
    sampler = ImageGroupSampler(groups, size, world_size=2, seed=1, modality_lengths=lengths)
    batches = batches_of(sampler, size)
    assert sorted(i for batch in batches for i in batch) == list(range(180)) and len(sampler) == 180
    images = sum(len({groups[i] for i in batch if i < 160}) for batch in batches)
    assert images <= (40 if size % 4 == 0 else 90) + 2 * by_length  # there are 40; three rows cannot hold four
    if by_length:
        assert all(len({i < 160 for i in batch}) == 1 for batch in batches[:-2])
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first == [i for batch in batches for i in batch]


def test_images_are_read_once_and_the_loss_is_that_of_the_plain_batch(processor, repeated, monkeypatch):
    """Loss and gradients of the grouped batch equal those of the batch with each image as often as it is shown."""
    dataset = LlavaDataset(repeated["data"], processor, image_folder=repeated["images"])
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(), processor)).train()
    rows = next(iter(batches_of(ImageGroupSampler(dataset.image_groups, 8), 8)))
    read, opener = [], type(dataset.reader).open
    monkeypatch.setattr(type(dataset.reader), "open", lambda self, name: read.append(name) or opener(self, name))
    items, once = dataset.__getitems__(rows), len(read)
    assert once == len(set(read)) < sum("pixel_values" in item for item in items)
    grouped = Fwd2BotCollator(0, planner=model.planner())(items)
    plain = Fwd2BotCollator(0)(dataset.__getitems__(rows))
    assert len(grouped["pixel_values"]) == once < len(plain["pixel_values"])
    found = []
    for batch in (grouped, plain):
        batch["pixel_values"] = batch["pixel_values"].double()
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        found.append(
            (out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-10)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[1][1].items():  # the host's norms are float32 in between, where sums round by their order
        assert (found[0][1][name] - grad).abs().max() <= 1e-6 * grad.abs().max(), name


def test_the_command_groups(base_dir, repeated, tmp_path):
    """The flag reaches the sampler, workers read whole batches, and a run with it trains."""
    from llava_fwd2bot.training.command import train

    seen, more = [], ("--group_by_image", "True", "--max_steps", "3", "--dataloader_num_workers", "1")
    collate = Fwd2BotCollator.__call__

    def spy(self, items):
        batch = collate(self, items)
        seen.append((len(batch["pixel_values"]), batch["plan"].images))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fwd2BotCollator, "__call__", spy)
        train(command(base_dir, repeated, tmp_path / "a", *more[:4]))
    assert any(apart < shown for apart, shown in seen)
    train(command(base_dir, repeated, tmp_path / "b", *more))  # plans come out of a worker as they went in
    assert [e["loss"] for e in history(tmp_path / "a")] == [e["loss"] for e in history(tmp_path / "b")]


def test_two_orders_are_refused(base_dir, repeated, tmp_path):
    from llava_fwd2bot.training.command import train

    more = ("--group_by_image", "True", "--train_sampling_strategy", "group_by_length")
    with pytest.raises(ValueError, match="--group_by_image and --train_sampling_strategy .* drop one"):
        train(command(base_dir, repeated, tmp_path / "a", *more))
