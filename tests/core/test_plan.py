"""A planned batch: the same numbers as an unplanned one, without waiting for the device, in one compiled graph."""

from collections import Counter

import pytest
import torch
from conftest import captions, settings, shake, standard_batch, toy_base
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.modeling.plan import BatchPlanner

aten = torch.ops.aten
# operations whose result the CPU must know before it can go on
WAITING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default),
    *(aten.equal.default, aten._unique2.default, aten.repeat_interleave.Tensor, aten.masked_scatter_backward.default),
}
READING = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__}
READING |= {torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__}


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device, boolean masks as indices among them, and numbers put at indices."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [i for i in (args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ())]
        number = func.overloadpacket in (aten.index_put, aten.index_put_) and args[2].dim() == 0
        if number or func in WAITING or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in masks):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts what the dispatcher does not see: numbers read out of a tensor, or copied to the device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING or func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            self.seen[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


def planned(model, batch, **more):
    images = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    return {**batch, "plan": model.planner()(batch, images, **more)}


def gradients(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batches(model):
    """Batches of every kind: both losses, one, rows without labels, text alone, captions of bare images."""
    whole = {**standard_batch(model, "right"), **captions()}
    some = {**whole, "labels": whole["labels"].clone()}
    some["labels"][0] = -100  # for the contrastive loss alone
    text = {n: v[2:] for n, v in whole.items() if n in ("input_ids", "attention_mask", "labels")}
    bare = {**{n: v[:2] for n, v in captions().items()}, "pixel_values": whole["pixel_values"][:2]}
    answers = standard_batch(model, "mixed")
    return {"both": whole, "some rows": some, "text": text, "captions": bare, "answers": answers}


@pytest.mark.parametrize("kind", ["both", "some rows", "text", "captions", "answers"])
@pytest.mark.parametrize("changes", [{}, {"residual": "average", "bridge": "linear", "contrastive_chunk": 1}])
def test_a_plan_changes_no_number(processor, kind, changes):
    """Loss, logits and gradients are equal to the last bit: both paths run one code on one plan."""
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(**changes), processor)).train()
    batch = batches(model)[kind]
    expected, wanted = gradients(model, batch)
    got, found = gradients(model, planned(model, batch))
    assert torch.equal(got.loss, expected.loss)
    assert (got.logits is None) == (expected.logits is None)
    assert got.logits is None or torch.equal(got.logits, expected.logits)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("kind", ["both", "some rows", "text", "captions", "answers"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"residual": "average", "nested_k": [1, 2, 4]}, {"residual": "pool"}, {"contrastive_chunk": 1}],
)
def test_a_planned_forward_waits_for_nothing(processor, kind, changes):
    """Each wait leaves a GPU idle for as long as the CPU is behind; there were 26, and 33 with captions."""
    model = shake(add_fwd2bot(toy_base(processor), settings(**changes), processor)).train()
    batch = planned(model, batches(model)[kind])
    tokens = torch.tensor(7)
    model(**batch)  # what is kept from the first forward on, as the averages of the residual
    if changes.get("nested_k"):
        for j in (1, 2, 4):
            model(**batch, num_tokens=j)
    with Reads() as reads, Waits() as waits:
        model(**batch, num_items_in_batch=tokens, micro_batches=2, return_logits=False).loss.backward()
    assert not reads.seen and not waits.seen, (reads.seen, waits.seen)


def test_the_counters_see_what_waits(model):
    """A count of none means something only if the unplanned forward, which fetches its ids, is seen to wait."""
    batch = {**standard_batch(model, "right"), **captions()}
    with Reads() as reads, Waits() as waits:
        model.train()(**batch)
        torch.ones(3)[torch.ones(3) > 0]
    assert reads.seen["tolist"] and reads.seen["cpu"] and waits.seen["aten.index.Tensor"] and len(waits.seen) > 2


def test_images_that_stand_in_several_rows_come_once(model64):
    """Two rows of one picture, planned with the picture stacked once: the loss and gradients of the plain batch."""
    model = model64.train()
    whole = {**standard_batch(model, "right"), **captions()}
    rows = [0, 1, 0, 2]
    batch = {name: whole[name][rows] for name in whole if name != "pixel_values"}
    pixels = whole["pixel_values"]
    expected, wanted = gradients(model, {**batch, "pixel_values": pixels[[0, 1, 2, 0]]})
    plan = model.planner()(batch, 4, distinct=[0, 1, 2, 0])
    got, found = gradients(model, {**batch, "pixel_values": pixels, "plan": plan})
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-12)
    assert found.keys() == wanted.keys()
    assert max((found[n] - wanted[n]).abs().max() for n in wanted) <= 1e-12


def test_distillation_with_images_that_come_once(processor):
    """The teacher is the base, which wants each image as often as it stands in the rows."""
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(distill_weight=0.5), processor)).train()
    whole = standard_batch(model, "right")
    batch = {name: whole[name][[0, 0]] for name in whole if name != "pixel_values"}
    pixels = whole["pixel_values"]
    expected = model(**batch, pixel_values=pixels[[0, 0]]).distill_loss
    plan = model.planner()(batch, 2, distinct=[0, 0])
    torch.testing.assert_close(
        model(**batch, pixel_values=pixels[:1], plan=plan).distill_loss, expected, rtol=0, atol=1e-12
    )


def test_a_plan_that_does_not_fit_is_refused(model):
    """A plan of another batch, or of other prefix lengths, would train on the wrong places without a word."""
    batch = planned(model, standard_batch(model, "right"))
    with pytest.raises(ValueError, match="planned for 3 image.*2 came"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="planned for summaries of 4 tokens, and has some of 2"):
        model(**batch, num_tokens=2)
    first = {name: value[:1].clone() for name, value in standard_batch(model, "right").items()}
    first["input_ids"][0, 2:10] = 300  # a processor that writes 8 placeholders where the tower gives 16
    with pytest.raises(ValueError, match=r"hold \[8\] placeholders .* have \[16\] dense tokens"):
        model(**planned(model, first, image_lengths=[8]))


def test_a_plan_moves_as_data_loaders_move_tensors(model):
    """accelerate moves what has `to`; tensors that stayed on the CPU would wait on a GPU."""
    from accelerate.utils import send_to_device

    batch = planned(model, {**standard_batch(model, "right"), **captions()})
    moved = send_to_device(batch, "meta")["plan"]
    answer = moved.answers[4]
    tensors = [moved.image_row, answer.targets, answer.labelled, moved.captions.ids, moved.captions.keys]
    tensors += [getattr(answer.collapsed, name) for name in ("origin", "lengths", "row", "summary_at", "is_summary")]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.counts == batch["plan"].counts == [3, 2, 3]


def test_the_planner_tells_what_does_not_fit(model):
    """In the collator, where the rows are at hand, instead of in the forward."""
    planner = BatchPlanner(model.config.image_token_id, (4,))
    batch = {**standard_batch(model, "right"), **captions()}
    with pytest.raises(ValueError, match="2 image"):
        planner({"input_ids": batch["input_ids"]}, 2, [16, 16])
    with pytest.raises(ValueError, match=r"Row\(s\) \[2\] have a caption, but no image"):
        planner({**batch, "caption_attention_mask": torch.ones(3, 4)}, 3)


class Graphs:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def test_a_planned_forward_compiles_with_two_graph_breaks_at_most(processor):
    """More breaks bring back the launches that compiling takes away; an unplanned forward has a dozen."""
    torch.compiler.reset()
    model = shake(add_fwd2bot(toy_base(processor), settings(), processor)).train()
    batch = planned(model, batches(model)["both"])
    expected = model(**batch, return_logits=False).loss
    backend = Graphs()
    try:
        loss = torch.compile(model.forward, backend=backend)(**batch, return_logits=False).loss
    finally:
        torch.compiler.reset()
    assert 1 <= backend.count <= 3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
