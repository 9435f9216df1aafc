"""The original LLaVA as a host. Runs on transformers 4.37.2, for which it was written, and on today's.

With a checkout of LLaVA-NeXT first on PYTHONPATH the same tests are of its classes.
"""

from __future__ import annotations

import copy

import pytest
import torch

llava = pytest.importorskip(
    "llava.model", reason="the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
)

from original_toys import DENSE, DTYPE, IMAGE, SIDE, TOLERANCE, clip_tower, original_base, shaken  # noqa: E402

from llava_fwd2bot import Fwd2BotConfig  # noqa: E402
from llava_fwd2bot.hosts import host_class, install  # noqa: E402
from llava_fwd2bot.hosts.original import model as original  # noqa: E402
from llava_fwd2bot.hosts.original.shims import repaired_forward  # noqa: E402
from llava_fwd2bot.losses import distillation_loss  # noqa: E402

# two images, text alone, and one image with padding
IDS = torch.tensor([[1, IMAGE, 5, 6, IMAGE, 8], [1, 3, 4, 9, 8, 2], [1, 9, IMAGE, 4, 0, 0]])
MASK = torch.tensor([[1] * 6, [1] * 6, [1, 1, 1, 1, 0, 0]])
LABELS = IDS.masked_fill((IDS == IMAGE) | (MASK == 0), -100)
CAPTIONS = {"caption_input_ids": torch.tensor([[3, 4], [0, 0], [5, 6]])}
CAPTIONS["caption_attention_mask"] = torch.tensor([[1, 1], [0, 0], [1, 1]])
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return clip_tower(tmp_path_factory.mktemp("clip"))


FAMILIES = [name for name in ("LlavaLlama", "LlavaMistral", "LlavaQwen") if hasattr(llava, f"{name}ForCausalLM")]


@pytest.fixture(params=FAMILIES)
def base(request, tower):
    return original_base(tower, family=request.param)


def fwd2bot(base, **changes):
    config = Fwd2BotConfig(**{"num_summary_tokens": 4, "lora_r": 4, "lora_alpha": 8, **changes})
    return shaken(install(copy.deepcopy(base), host_class(type(base).__name__), config, [5, 6], [7, 8]))


@pytest.fixture
def model(base):
    return fwd2bot(base)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_disabled_it_is_the_base_bit_for_bit(base, model):
    """LLaVA's collator adds a blank image for the row of text; the base eats it, and so must this."""
    if "LlavaQwen" in FAMILIES and type(base).__name__ == "LlavaMistralForCausalLM":
        pytest.skip("LLaVA-NeXT's Mistral cannot read an image: it gives the sizes where the modalities belong")
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "images": pixels(4)}
    repaired_forward(base)  # by itself it no longer generates on transformers 5.24
    with model.fwd2bot_disabled():
        ours, said = model(**batch), model.generate(IDS[:1], images=pixels(2), **GREEDY)
    assert torch.equal(ours.loss, base(**batch).loss) and torch.equal(ours.logits, base(**batch).logits)
    assert torch.equal(said, base.generate(IDS[:1], images=pixels(2), **GREEDY))


@pytest.mark.parametrize(
    "version, base_generates, refused",
    [("4.37.2", True, False), ("4.40.2", True, True), ("4.40.2", False, False), ("5.2.0", False, True)]
    + [("5.4.0", True, False), ("5.23.0", False, False)],
)
def test_versions_in_between_are_refused_before_loading(monkeypatch, version, base_generates, refused):
    """4.38 to 5.3 break LLaVA's generate, 5.0 to 5.3 its tokenizer, without a word (hosts.md, 1.6)."""
    monkeypatch.setattr(original.transformers, "__version__", version)
    if refused and version < "5" and "LlavaQwen" in FAMILIES:
        pytest.skip("LLaVA-NeXT's forward takes cache_position")
    if refused:
        with pytest.raises(ImportError, match=f"transformers {version} .*: install 4.37.2, or 5.4 or later"):
            original.check_version(base_generates)
    else:
        original.check_version(base_generates)


def test_lora_stays_out_of_the_vision_tower(model):
    """The tower hangs in the language model, with layers called q_proj as well (hosts.md, 0.6)."""
    assert len(model._stages.layers) == 2 * 7
    assert not any("vision" in name for name in model._stages.layers)


def test_ids_are_embedded_once(model):
    """Under ZeRO-3 each call gathers weights from all ranks, which have unlike numbers of images."""
    calls = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    lengths = [len(dense) for dense in model._dense_tokens(images=pixels(3))]
    hook.remove()
    assert len(calls) == 1 and lengths == [DENSE] * 3


def test_dense_tokens_are_what_the_base_reads(base, model):
    expected = base.encode_images(pixels(3))
    found = model._dense_tokens(images=pixels(3))
    assert [len(v) for v in found] == [DENSE] * 3
    close(torch.stack(found), expected)


def test_both_passes_against_a_hand_written_reference(model):
    """Equations 1 and 2, row by row, with nothing of the plugin but its adapters."""
    images = pixels(3)
    own = [images[0], images[1], None, images[2]]
    words, decoder = model.get_input_embeddings(), model.get_model()
    total, count = 0.0, 0
    with torch.no_grad():
        summaries = {}
        for i, image in enumerate(own):
            if image is not None:
                dense = model.encode_images(image[None])[0]
                row = torch.cat([dense, words(torch.tensor([5, 6])), model.fwd2bot.tokens.to(DTYPE)])
                with model._stages.use("compress"):
                    summaries[i] = decoder(inputs_embeds=row[None]).last_hidden_state[0, -4:]
        for r, places in enumerate(([0, 1], [], [3])):
            given, pieces, targets = iter(places), [], []
            for token, label in zip(IDS[r][MASK[r] == 1].tolist(), LABELS[r][MASK[r] == 1].tolist(), strict=True):
                piece = summaries[next(given)] if token == IMAGE else words(torch.tensor([token]))
                pieces.append(piece)
                targets += [label] if token != IMAGE else [-100] * 4
            hidden = decoder(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state[0]
            logits, target = model.lm_head(hidden)[:-1], torch.tensor(targets)[1:]
            total += torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
            count += int((target != -100).sum())
        with_blank = torch.cat([images[:2], pixels(1, 9) * 0, images[2:]])  # as LLaVA's collator gives it
        for given in (images, with_blank, list(with_blank)):
            found = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, images=given)
            close(found.answer_loss, total / count)


def test_gradients_reach_both_adapters_and_checkpointing_changes_nothing(model):
    """LLaVA's scripts all turn checkpointing on; recomputed in the wrong stage, gradients are wrong without a word."""
    found = []
    for checkpointing in (False, True):
        own = copy.deepcopy(model).train()
        if checkpointing:
            own.gradient_checkpointing_enable()
            own.enable_input_require_grads()
        own(input_ids=IDS, attention_mask=MASK, labels=LABELS, images=pixels(3), **CAPTIONS).loss.backward()
        found.append({n: p.grad for n, p in own.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        assert grad is not None and grad.abs().sum() > 0, name
        assert torch.equal(grad, found[1][name]), name


def test_generate_from_pixels_and_from_summaries(model):
    """New ids alone, as the original gives them; batched with padding as one by one."""
    summary = model.compress(images=pixels(3))
    said = model.generate(IDS[:1], images=pixels(3)[:2], **GREEDY)
    assert torch.equal(said, model.generate(IDS[:1], summary=summary[:2], **GREEDY))
    assert said.shape[1] <= 7  # 4.37.2 puts a BOS first
    step = model(input_ids=IDS[:1], images=pixels(3)[:2]).logits[0, -1].argmax()
    assert said[0, -6] == step
    both = model.generate(IDS[[0, 2]], attention_mask=MASK[[0, 2]], images=pixels(3), **GREEDY)
    alone = model.generate(IDS[2:, :4], images=pixels(3)[2:], **GREEDY)
    assert torch.equal(both[1:, -6:], alone[:, -6:])
    assert torch.equal(model.compress(images=pixels(3), num_tokens=2), summary[:, :2]) or DTYPE == torch.float32


def test_text_alone_and_next_steps_are_the_hosts_business(base, model):
    text = torch.tensor([[1, 3, 4, 9]])
    with model._stages.use(None):
        assert torch.equal(model(input_ids=text).logits, base(input_ids=text).logits)
    assert model.generate(text, **GREEDY).shape[0] == 1


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_the_crops_of_an_image_are_compressed_together(tower, merge):
    """anyres: an image of five crops has as many summary tokens as an image of one."""
    base = original_base(
        tower,
        mm_patch_merge_type=merge,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        tokenizer_model_max_length=20,  # of the text: an image must not be cut to it
    )
    model = fwd2bot(base)
    images, sizes = [pixels(5), pixels(3, 2)], [(60, 60), (20, 60)]  # width, height
    dense = model._dense_tokens(images=images, image_sizes=sizes)
    assert len(dense[0]) > 4 * DENSE and len(dense[1]) > 2 * DENSE
    assert model.config.tokenizer_model_max_length == 20
    summary = model.compress(images=images, image_sizes=sizes)
    assert summary.shape == (2, 4, 64)
    for i in range(2):  # rows of different lengths do not disturb each other
        close(model.compress(images=images[i : i + 1], image_sizes=sizes[i : i + 1])[0], summary[i])
    ids = torch.tensor([[1, IMAGE, 5, 6], [1, 7, IMAGE, 4]])
    found = model(input_ids=ids, labels=ids.masked_fill(ids == IMAGE, -100), images=images, image_sizes=sizes)
    assert torch.isfinite(found.answer_loss)


def test_distillation_on_text_alone_and_beyond_the_texts_limit(base):
    """Batches of text alone are usual; rows longer than the tokenizer's limit must not be compared with zeros."""
    model = fwd2bot(base, distill_weight=1.0, contrastive_weight=0.0)
    text = IDS[1:2]
    with model._stages.use("answer"):
        student = model.lm_head(model.get_model()(input_ids=text).last_hidden_state)[0, :-1]
    teacher = base(input_ids=text).logits[0, :-1]
    close(model(input_ids=text, labels=text).distill_loss, distillation_loss(student, teacher))
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "images": pixels(3)}
    whole = model(**batch).distill_loss
    model.config.tokenizer_model_max_length = 20
    close(model(**batch).distill_loss, whole)


def test_distillation_reads_the_base_at_the_same_tokens(base):
    """The base's rows are longer; its answers must be compared at the same tokens."""
    model = fwd2bot(base, distill_weight=1.0, contrastive_weight=0.0)
    images = pixels(3)
    found = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, images=images)
    teacher = []
    with torch.no_grad():
        for r, own in enumerate((images[:2], images[:1] * 0, images[2:])):
            row, labels = IDS[r][MASK[r] == 1][None], LABELS[r][MASK[r] == 1][None]
            _, _, _, _, rows, long = base.prepare_inputs_labels_for_multimodal(row, None, None, None, labels, own)
            states = base.model(inputs_embeds=rows).last_hidden_state[0, :-1]
            teacher.append(base.lm_head(states[long[0, 1:] != -100]))
        summary = model.compress(images=images)
        plan = model._collapse(IDS, MASK, summary, None)
        targets = LABELS.flatten()[plan.origin].masked_fill(plan.is_summary, -100)
        targets = torch.cat([targets[1:], torch.tensor([-100])])
        targets[plan.lengths.cumsum(0) - 1] = -100
        student = model.lm_head(model._answer_hidden(plan, IDS, summary)[targets != -100])
    close(found.distill_loss, distillation_loss(student, torch.cat(teacher)))


def test_rows_of_a_batch_that_differ(model):
    """The server's batches: one id of −200 stands for k tokens, new ids come alone, and the first that a streamer gets
    are not the answer's."""
    from types import SimpleNamespace

    from llava_fwd2bot.processing.batched import Answer, run

    summary = model.compress(images=pixels(3))
    silent = SimpleNamespace(decode=lambda ids, **options: "")
    rows = [(IDS[0], MASK[0], summary[:2]), (IDS[2], MASK[2], summary[2:])]
    answers = [Answer(ids[mask.bool()], list(own), silent, max_new_tokens=6) for ids, mask, own in rows]
    assert run(model, answers) == []
    for answer, (ids, mask, own) in zip(answers, rows, strict=True):
        alone = model.generate(ids[mask.bool()][None], summary=own, max_new_tokens=6, do_sample=False)
        assert answer.tokens == alone[0, -len(answer.tokens) :].tolist()
