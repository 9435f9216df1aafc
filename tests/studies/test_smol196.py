"""The study smol196: the whole run at toy size."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.statistics import holm
from eval.studies import smol_splits
from eval.studies.compare import judge
from eval.studies.report import report
from eval.studies.rows import Cell
from eval.studies.rows import Rows as StudyRows
from eval.studies.smol196 import (
    compressors,
    features,
    measure,
    pictures,
    prepare,
    run,
    score,
    shares,
    tasks,
    training,
)
from eval.studies.smol196.data import Data
from eval.studies.smol196.model import PROJECTIONS, Language, Shape
from eval.studies.smol196.recipes import KS, recipes
from eval.studies.smol196.rows import Rows
from eval.studies.study import Study
from llava_fwd2bot.compressors import compressor_of

CPU = torch.device("cpu")
KNOWN = recipes(Study.read(run.STUDY), steps=4)
OBJECTS = "dog horse bird ball car boat hat tree snow grass bench table".split()


def write_data(folder) -> None:
    """Photographs, captions and questions in the layout of the real data."""
    rng = random.Random(0)
    for name, files in (("flickr8k", ("train", "dev")), ("coco_val2017", ("captions",)), ("daquar", ("train",))):
        (folder / name / "images").mkdir(parents=True)
        for file in files:
            lines = []
            for i in range(48):
                image = f"{file}{i}.png"
                Image.new("RGB", (40, 30), tuple(rng.randint(0, 255) for _ in range(3))).save(
                    folder / name / "images" / image
                )
                thing, other = OBJECTS[i % 12], OBJECTS[(i * 5 + 1) % 12]
                entry = {"image": image, "captions": [f"A {thing} near a {other} ."] * 5}
                if name == "daquar":
                    entry = {"image": image, "question": "what is on the desk ?", "answer": thing}
                lines.append(json.dumps(entry) + "\n")
            (folder / name / f"{file}.jsonl").write_text("".join(lines))


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special[1:])


def toy_blocks(rows: tuple[int, ...], bits: int, generator: torch.Generator) -> torch.Tensor:
    blocks = torch.randint(0, 256, (*rows[:-1], rows[-1] // 32, 20 if bits == 4 else 34), generator=generator)
    blocks = blocks.to(torch.uint8)
    small = torch.tensor([0.03 if bits == 4 else 0.003, -0.2], dtype=torch.float16)[: 2 if bits == 4 else 1]
    blocks[..., : 2 * len(small)] = small.view(torch.uint8)
    return blocks.flatten(-2)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What `prepare` and `features` leave, at toy size: a random language model, random features of 16 channels."""
    folder = tmp_path_factory.mktemp("study")
    data, out = folder / "data", folder / "out"
    out.mkdir()
    write_data(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smol_splits, "FLICKR_TUNING", 20)
        patch.setattr(smol_splits, "DAQUAR_REPORTED", 4)
        patch.setattr(smol_splits, "DAQUAR_TUNING", 4)
        sizes = {s: tasks.Sizes(8, 8, 3, 2) for s in tasks.SIZES}
        texts = [" ".join([i.question, *i.truth]) for i in all_items(data, sizes)]
        template = "user assistant Summarize the image text in a few words ."
        tokenizer = word_tokenizer([*texts, template])
        vocabulary = prepare.write_rows(data, out, sizes, tokenizer, seed=0)
    prepare.write_photos(data, out, quality=30)
    generator = torch.Generator().manual_seed(0)
    shape = Shape(len(vocabulary), 128, 160, 3, 2, 1)
    tensors = {n: toy_blocks((3, *shape.sizes(n)), 4, generator) for n in PROJECTIONS}
    tensors["words"] = toy_blocks((shape.vocabulary, 128), 8, generator)
    tensors |= {"norm_in": torch.ones(3, 128), "norm_mlp": torch.ones(3, 128), "norm_out": torch.ones(128)}
    save_file(tensors, out / "lm-0.safetensors")
    count = len(json.loads((out / "pictures.json").read_text()))
    np.save(out / "features.npy", np.random.default_rng(0).integers(0, 256, (count, 227, 16), dtype=np.uint8))
    run.main(["base", "--folder", str(out), "--steps", "2", "--batch", "4", "--device", "cpu"])
    return out


def all_items(data, sizes) -> list[tasks.Item]:
    return [i for split in sizes for e in tasks.entries(data, split, sizes[split]) for i in e.items]


def test_collages_do_not_overlap_and_render(study):
    """Ground truth holds only while no photograph covers another; and every picture must come out whole."""
    album = features.Album(study)
    seen = set()
    for spec in json.loads((study / "pictures.json").read_text()):
        picture = pictures.Picture.of(spec)
        seen.add(picture.kind)
        for i, part in enumerate(picture.parts):
            assert 0 <= part.box[0] < part.box[2] <= pictures.SIDE and 0 <= part.box[1] < part.box[3] <= pictures.SIDE
            assert all(pictures._apart(part.box, other.box) for other in picture.parts[:i])
    assert seen == {"single", "collage", "words"}
    assert pictures.render(picture, album).size == (448, 448)


def test_no_photograph_is_in_two_splits(study):
    with np.load(study / "rows.npz") as stored:
        ends = np.cumsum(stored["counts"])
    specs = json.loads((study / "pictures.json").read_text())
    parts = [{p[0] for spec in specs[a:b] for p in spec[1]} for a, b in zip([0, *ends], ends, strict=False)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_every_recipe_runs_and_is_not_run_twice(study, tmp_path, monkeypatch):
    """Rows of every kind train, are measured, scored and reported; what is done stays done."""
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("matplotlib")
    data, about = Data(study, CPU), Study.read(run.STUDY)
    known = recipes(about, steps=1)
    assert [r.name for r in known.values()][:4] == [f"untrained-{k}" for k in ("pool", "average", "uniform", "dense")]
    kinds = (
        "untrained-pool",
        "untrained-dense",
        "dense",
        "pool",
        "query",
        "kv",
        "last",
        "downsample",
        "token",
        "residual",
        "cells",
        "cells, seed 1",
        "shared",
    )
    known = {name: known[name] for name in kinds}
    monkeypatch.setattr(run, "train", lambda model, *a, **k: {"curve": [], "seconds": 0.0})
    done = run.work(study, data, list(known.values()), float("inf"), batch=6, singles=3)
    assert done == list(known)
    assert run.work(study, data, list(known.values()), float("inf"), batch=6, singles=3) == []
    run.collect(study, tmp_path, base=False)
    assert (tmp_path / "runs.tar.gz").exists()
    with np.load(study / "runs" / "kv" / "answers.npz") as stored:
        assert {"k1", "k16"} <= set(stored.files) and stored["k1"].any()
    monkeypatch.setattr(shares, "MEASURES", -1)  # nothing is learned in no step
    rows = StudyRows(tmp_path / "smol196.rows.jsonl")
    for _ in range(2):
        score.write_rows(study, rows, lambda found: [" ".join(map(str, r[:3])) for r in found])
    names = {row for _, row, *_ in rows.cells}
    rows_of = {r.name for r in known.values()} | {
        "dense, wrong image",
        "blind lookup",
        "pruning by attention, untrained",
    }
    assert rows_of <= names <= {*about.rows}
    assert {seed for _, row, _, seed in rows.cells if row == "cells"} == {0, 1}
    assert len(rows.file.read_text().splitlines()) == len(rows.cells) + len(rows.tasks)
    assert {task for task, *_ in rows.cells} == {*about.figures} - {"share"}
    text = report(about, tmp_path, shares)
    assert "| token | " in text and "### Does the base need the image?" in text


def test_every_loss_reaches_every_parameter(study):
    """A recipe with a part that gets no gradient would compare something that was never trained."""
    data = Data(study, CPU)
    base = run.open_base(study, data)
    for chosen in recipes(Study.read(run.STUDY), steps=4).values():
        model = run.build(chosen, base, data)
        for lora in (model.compress, model.answer):
            if lora is not None:
                for up in lora.up.values():  # at its start of zero the other half gets no gradient
                    torch.nn.init.normal_(up, std=0.02)
        losses = model.losses(data.batch(0, chosen, batch=6, singles=3))
        assert torch.isfinite(losses["loss"])
        losses["loss"].backward()
        idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        idle -= {"own.tokens.logit_scale"} if not chosen.contrastive else set()
        idle -= {"own.tokens.tokens"} if chosen.kind == "last" else set()
        assert not idle, f"{chosen.name}: {sorted(idle)}"


def test_stopped_training_goes_on_where_it_was(study, tmp_path):
    data = Data(study, CPU)
    base = run.open_base(study, data)
    chosen = KNOWN["token"]
    whole = run.build(chosen, base, data)
    training.train(whole, data, tmp_path / "whole", float("inf"), batch=6, singles=3)
    clock = iter([0, 0, 1e9])
    with pytest.MonkeyPatch.context() as patch:
        # not time.time itself, which other threads read as well
        patch.setattr(training, "time", SimpleNamespace(time=lambda: next(clock, 0), perf_counter=time.perf_counter))
        halves = run.build(chosen, base, data)
        assert training.train(halves, data, tmp_path / "halves", 1.0, batch=6, singles=3) is None
        fresh = run.build(chosen, base, data)
        assert training.train(fresh, data, tmp_path / "halves", 1.0, batch=6, singles=3) is not None
    for (name, a), b in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["residual-token", "kv", "residual", "cells", "seeded"])
def test_a_gpus_types_fit_together(study, name, monkeypatch):
    """On a GPU the passes run in bfloat16: a mismatch of types would show there only."""
    monkeypatch.setattr(Language, "dtype", property(lambda self: torch.bfloat16))
    monkeypatch.setattr(compressors, "autocast", lambda device: torch.autocast("cpu", dtype=torch.bfloat16))
    data = Data(study, CPU)
    built = run.build(KNOWN[name], run.open_base(study, data), data)
    loss = built.losses(data.batch(0, built.recipe, batch=4, singles=2))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert np.isfinite(list(measure.Reader(built, data).tuning_loss(4).values())).all()


@pytest.mark.parametrize("name", ["fwd2bot", "kv", "dense", "downsample", "cells"])
def test_generation_is_the_full_forward(study, name):
    """Answers go through stored keys and values; they must be those that the whole row gives, token by token."""
    data = Data(study, CPU)
    model = run.build(replace(KNOWN[name], seed=1), run.open_base(study, data), data)
    for lora in filter(None, (model.compress, model.answer)):
        for up in lora.up.values():
            torch.nn.init.normal_(up, std=0.2)
    with torch.inference_mode():
        reader = measure.Reader(model, data, chunk=4)
        at = np.flatnonzero(data.arrays["question_task"] == tasks.TASKS.index("at"))[:4]
        rows = reader._questions(at)
        memory = reader.memory(torch.from_numpy(data.arrays["question_picture"][at].astype(np.int64)), 4)
        said = measure.generate(model.language, reader.answer, data, memory, rows, 6)
        grown = torch.cat([rows.tokens, said], dim=1)
        segment = torch.cat([rows.segment, torch.ones_like(said)], dim=1)
        offset = torch.cat([rows.offset, rows.offset[:, -1:] + 1 + torch.arange(6)], dim=1)
        width = grown.shape[1]
        ahead = (torch.arange(4)[:, None] * width + width - 7 + torch.arange(6)).flatten()
        hidden = model.hidden(memory, Rows(grown, segment, offset, ahead, ahead), reader.answer)
        expected = model.language.logits(hidden).argmax(-1).view(4, 6)
    for got, want in zip(said.tolist(), expected.tolist(), strict=True):
        length = got.index(data.prompts.end) + 1 if data.prompts.end in got else 6
        assert got[:length] == want[:length]


def test_shares_and_claims(tmp_path):
    """The floor is 0, the bound is 100, differences are paired, and a task without room does not count."""
    groups = {"exists": np.repeat(np.arange(20), 2), "words": 20 + np.arange(20)}
    rng = np.random.default_rng(0)
    good = {task: rng.random(len(own)) < 0.9 for task, own in groups.items()}
    base = "untrained-dense"
    sides = {(base, 0): 1.0, ("blind lookup", 0): 0.0, (f"{base}, wrong image", 0): 0.0, ("token", 1): 1.0}
    rows = StudyRows(tmp_path / "smol196.rows.jsonl")
    for task, own in groups.items():
        rows.add_task(task, own.tolist())
        for (name, k), times in {**sides, ("pool", 1): 0.5}.items():
            times = 1.0 if task == "words" else times  # the floor is the bound
            rows.add(Cell(task, name, k, 0, times * good[task]))
    found = shares.Shares(rows)
    assert found.tasks == ["exists", "words"] and found.measuring().tolist() == [True, False]
    np.testing.assert_allclose(found.overall("token", 1), 1)
    np.testing.assert_allclose(found.overall("pool", 1), 0.5)
    assert found.value("share", "query", 1) is None and found.ks("share", "token") == [1]
    apart = found.compare("share", ("token", 1), ("pool", 1))
    assert apart.p < 0.01 and apart.interval[0] > 0.49
    for seed in (1, 2):  # a row with several seeds: the mean over them, and a wider interval
        for task in groups:
            rows.add(Cell(task, "pool", 1, seed, (0.5 + 0.05 * seed) * good[task]))
    several = shares.Shares(rows)
    assert several.value("share", "pool", 1) == pytest.approx(0.55)
    np.testing.assert_allclose(several.of_seeds("pool", 1), [0.5, 0.55, 0.6])
    low, high = several.interval("share", "pool", 1)
    assert high - low > 0.05 and found.interval("share", "pool", 1) == pytest.approx((0.5, 0.5))
    if find_spec("scipy"):
        assert several.compare("share", ("token", 1), ("pool", 1)).p > apart.p
    claims = judge(Study.read(run.STUDY), found)
    assert [(c["ours"], c["against"], c["verdict"]) for c in claims] == [("token", "pool", "holds")]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert score.letters("dog rad", "dog red") == pytest.approx(6 / 7)
    assert score.letters("", "dog") == 0 and score.letters("Dog", "dog") == 1


def test_the_averages_are_the_packages():
    """One definition of pooling: the study's weights are the registry's, for each k."""
    for kind in ("pool", "average"):
        for number, k in enumerate(KS):
            weights_of_k = compressors.linear_weights(kind)[number]
            assert torch.equal(weights_of_k[:k], compressor_of(kind).weights(196, k)) and not weights_of_k[k:].any()


@pytest.mark.parametrize("wrong", [{"kind": "pools"}, {"vector": "last"}, {"rates": 1}])
def test_a_recipe_with_a_wrong_setting_is_refused(wrong):
    study = Study.read(run.STUDY)
    study.rows["pool"].settings |= wrong
    with pytest.raises(ValueError, match="'pool'"):
        recipes(study)
