"""Bytes of quantised models, counted and by their layout; and the study goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from eval.studies import quantised
from eval.studies.compare import Scores
from eval.studies.quantised_models import bytes_nf4, bytes_of, bytes_of_shape, llava_7b, open_model
from eval.studies.report import page, summarise
from eval.studies.rows import Rows
from eval.studies.run import Job, run_one
from eval.studies.study import Study

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (192, 576), (320, 1536)])
def test_layout_is_that_of_bitsandbytes(rows, columns, double):
    """The 7B's bytes are arithmetic: it must be that of a real layer, scales and tables included."""
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=False, quant_type="nf4", compress_statistics=double, compute_dtype=torch.bfloat16
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(rows, columns), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    layer.to("cpu")
    assert layer.weight.dtype == torch.uint8
    assert bytes_of(layer) == bytes_nf4(rows * columns, double)


def test_bytes_of_a_float_model_are_its_weights_once():
    """Tied weights are one tensor, and a buffer counts."""
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("mask", torch.zeros(6, dtype=torch.int64))
    assert bytes_of(model) == 10 * 4 * 4 + 6 * 8
    assert bytes_of(nn.Linear(4, 10, device="meta", dtype=torch.bfloat16)) == 2 * 50


def test_bytes_of_llava_7b():
    """Counted on the meta device: the linear layers alone are 0.26 of bfloat16; with what stays float, more."""
    model = llava_7b()
    weights = sum(p.numel() for p in model.parameters())
    assert 7.05e9 < weights < 7.08e9
    assert bytes_of_shape(model, 0, 16) == 2 * weights
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if "language_model.layers" in n and hasattr(m, "in_features")
    )
    assert bytes_nf4(linear) / (2 * linear) == pytest.approx(0.258, abs=1e-3)
    ratio = {
        (r, tower): bytes_of_shape(model, r, 4, tower=tower) / bytes_of_shape(model, r, 16)
        for r in (0, 64)
        for tower in (False, True)
    }
    assert ratio[0, False] == pytest.approx(0.320, abs=2e-3) and ratio[0, True] < 0.30 < ratio[0, False]
    assert ratio[64, False] > ratio[0, False]  # both adapters are bfloat16 on either side


@pytest.fixture
def data(tmp_path):
    """As the study's folder of data, with three photographs."""
    said = ["a dog and a man on a beach", "a man with a ball in the water", "two girls and a dog in a park"]
    entries = [{"image": f"{i}.png", "captions": [text] * 2} for i, text in enumerate(said)]
    for folder, file in (("flickr8k", "dev.jsonl"), ("coco_val2017", "captions.jsonl")):
        (tmp_path / folder / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40 + i), ("red", "green", "blue")[i]).save(tmp_path / folder / "images" / f"{i}.png")
        (tmp_path / folder / file).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    tests = {str(i): {"filename": f"{i}.png", "caption": t, "negative_caption": f"no {t}"} for i, t in enumerate(said)}
    (tmp_path / "bench" / "sugarcrepe").mkdir(parents=True)
    (tmp_path / "bench" / "sugarcrepe" / "swap_obj.json").write_text(json.dumps(tests))
    return tmp_path


def test_study_measures_both_stages_and_each_alone(data, tmp_path, on_disk, processor, monkeypatch):
    """Every row of the table is there, the float model's is the reference, and nothing is done twice."""
    pytest.importorskip("pycocoevalcap")
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    monkeypatch.setattr(quantised, "TOKENS", 3)
    monkeypatch.setattr(quantised, "IMAGES", 3)
    monkeypatch.setattr(quantised, "PAIRS", 3)
    study = Study.read(Path(quantised.__file__).with_name("quantised.yaml"))
    names = ("float32 → float32", "nf4 double → nf4 double", "float32 → nf4 double", "nf4 double → float32")
    study.rows = {name: study.rows[name] for name in names}
    jobs = []
    for row in study.rows.values():
        row.model, row.k = str(tmp_path / "m"), [4]
        jobs.append(Job(study, row, 0, data, tmp_path / "w"))
    rows = Rows(tmp_path / "quantised.rows.jsonl")
    for job in jobs:
        run_one(job, rows)
    assert {row for _, row, *_ in rows.cells} == {*names} and len(rows.cells) == 2 * 8 + 2 * 4
    size = {row: cell.scores[0] for (task, row, *_), cell in rows.cells.items() if task == "layers"}
    assert size["nf4 double → nf4 double"] < 0.5 * size["float32 → float32"]
    assert all(cell.scores[0] > 0 for (task, *_), cell in rows.cells.items() if task in ("answer", "compress"))
    text = page(study, summarise(study, Scores(rows)), quantised.extra(study, None))
    assert text.count("| float32 → nf4 double |") == 1 and "## LLaVA-1.5-7B, counted" in text
    monkeypatch.setattr(quantised, "open_model", lambda *_: pytest.fail("a model was opened again"))
    for job in jobs:
        run_one(job, Rows(rows.file))
    monkeypatch.setattr(quantised, "IMAGES", 2)
    with pytest.raises(ValueError, match="is a result of data"):
        Job(study, jobs[0].row, 0, data, tmp_path / "w").missing(rows)


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="no precision 'int3'; there are float32, bfloat16"):
        open_model("int3")


def test_torchao_reads_a_checkpoint(on_disk, processor, tmp_path):
    """Its tensors call themselves float, and the base was looked up in their packed numbers."""
    pytest.importorskip("torchao")
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    model, _ = open_model("torchao int8", str(tmp_path / "m"))
    pixels = torch.rand(1, 3, 32, 32, dtype=model.dtype)
    with torch.inference_mode():
        found, own = model.compress(pixels).float(), on_disk.eval().compress(pixels.float())
    assert torch.nn.functional.cosine_similarity(found, own, dim=-1).min() > 0.99
