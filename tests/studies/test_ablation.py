"""The ablation study: its file is read strictly, its runs go on where they were, its verdicts follow from the items."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from eval.statistics import over_seeds
from eval.studies import ablation, scenes, scenes_base
from eval.studies.ablation_report import judge, label, report
from eval.studies.ablation_study import Claim, Study
from eval.studies.scene import SIDE

STUDY = """
scenes: {train: 24, test: 8, objects: [1, 3], seed: 0}
seeds: [1]
capacity: [both]
common: --fwd2bot 4 --lora_r 2 --lora_alpha 4 --max_steps 2 --per_device_train_batch_size 4 --learning_rate 1e-3
rows:
  both: {k: [1, 4], arguments: "--fwd2bot_nested_k 1,4"}
  answer alone: {k: [4], arguments: --fwd2bot_contrastive_weight 0, captions: short}
  one forward: {k: [4], method: kv, arguments: --fwd2bot_contrastive_weight 0 --fwd2bot_adapters shared}
claims:
  - {says: two losses, figure: t2i, better: both, than: answer alone}
  - {says: attention, figure: attention, better: both, than: base}
  - {says: no vectors, figure: t2i, better: both, than: one forward}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, Path]:
    """The study's file, and a work folder with scenes and an untrained base."""
    folder = tmp_path_factory.mktemp("ablation")
    file, work = folder / "study.yaml", folder / "work"
    file.write_text(STUDY)
    plan = scenes_base.Schedule(text=2, tower=2, together=2, rows=4, scenes=8)
    scenes_base.build(work / "base", 0, (1, 3), plan)
    return file, work


def test_from_nothing_to_a_table_and_again(study, tmp_path, capsys):
    """Each run is a process of its own; a second call trains nothing, and writes the same table."""
    pytest.importorskip("matplotlib")
    file, work = study
    assert ablation.main([str(file), "--work", str(work), "--output", str(tmp_path / "a"), "--jobs", "2"]) == 0
    text = (tmp_path / "a.md").read_text()
    assert "| one forward | 4 | 1 |" in text and text.count("\n| both |") == 2 and "not measured" in text
    found = json.loads((tmp_path / "a.json").read_text())
    assert [c["verdict"] for c in found["claims"]][2] == "not measured" and len(found["capacity"]) == 3
    own = json.loads((work / "runs" / "both" / "1" / "result.json").read_text())["answers"]["k"]["4"]
    (row,) = [row for row in found["rows"] if row["row"] == "both" and row["k"] == 4]
    assert row["answers"] == pytest.approx(sum(own) / len(own))
    assert (tmp_path / "a.png").stat().st_size > 10_000
    times = {p: p.stat().st_mtime_ns for p in work.rglob("result.json")}
    assert len(times) == 4 and not list(work.rglob("checkpoint-*"))
    assert ablation.main([str(file), "--work", str(work), "--output", str(tmp_path / "b")]) == 0
    assert {p: p.stat().st_mtime_ns for p in work.rglob("result.json")} == times
    assert (tmp_path / "b.md").read_text() == text
    # on another machine, from what was written alone
    elsewhere = tmp_path / "elsewhere"
    before = {p.relative_to(work): json.loads(p.read_text()) for p in work.rglob("result.json")}
    assert ablation.main([str(file), "--work", str(elsewhere), "--output", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a.md").read_text() == text and not list(elsewhere.rglob("fwd2bot_config.json"))
    for name, result in before.items():
        again = json.loads((elsewhere / name).read_text())
        assert np.allclose(again.pop("attention", 0), result.pop("attention", 0), rtol=1e-4) and again == result
    # a result of other settings is left where it is: the row is to be trained again
    changed = tmp_path / "changed.yaml"
    changed.write_text(STUDY.replace("--fwd2bot_nested_k 1,4", "--fwd2bot_nested_k 2,4"))
    shutil.rmtree(elsewhere / "runs")
    assert ablation.main([str(changed), "--work", str(elsewhere), "--output", str(tmp_path / "a"), "--report"]) == 0
    assert "| answer alone |" in (tmp_path / "a.md").read_text() and "| both |" not in (tmp_path / "a.md").read_text()
    assert "both" in json.loads((tmp_path / "a.runs.json").read_text())["runs"]
    # but not on another base
    weights = elsewhere / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="another base"):
        ablation.main([str(file), "--work", str(elsewhere), "--output", str(tmp_path / "a"), "--report"])
    # a row whose settings changed is not averaged in
    with pytest.raises(ValueError, match="other settings"):
        ablation.main([str(changed), "--work", str(work), "--report"])
    # nor is one that was begun with others, and not measured yet
    result = work / "runs" / "both" / "1" / "result.json"
    kept = result.read_text()
    result.unlink()
    assert ablation.main([str(changed), "--work", str(work), "--only", "both"]) == 1
    assert "other settings" in (work / "runs" / "both" / "1" / "log.txt").read_text()
    result.write_text(kept)
    # what fails is named, and the rest is done
    (work / "runs" / "both" / "1" / "result.json").unlink()
    (work / "runs" / "both" / "1" / "fwd2bot_config.json").write_text("{")
    assert ablation.main([str(file), "--work", str(work)]) == 1
    assert "both, seed 1" in capsys.readouterr().err


def test_two_do_not_train_in_one_folder(tmp_path):
    """A killed study's run goes on by itself: the next study waits for it, and takes its result."""
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    folder = ablation.folder_of(tmp_path, "both", 1)
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, FileLock(folder / "lock") as lock:
        second = pool.submit(ablation.run_one, Study.read(file), tmp_path, "both", 1)
        assert not wait([second], 0.2).done
        row = Study.read(file).rows["both"]
        (folder / "result.json").write_text(json.dumps({"settings": Study.read(file).settings(row), "k": row.k}))
        lock.release()
        second.result(60)  # there is no base here: it would fail if it trained
    assert [file.name for file in folder.iterdir() if file.name != "lock"] == ["result.json"]


def test_a_row_can_have_seeds_of_its_own(tmp_path):
    """A close comparison needs more of them; one that is named twice would be averaged in twice."""
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("captions: short}", "captions: short, seeds: [0, 1]}"))
    row = "answer alone"
    assert Study.read(file).runs() == [("base", 0), (row, 0), ("both", 1), (row, 1), ("one forward", 1)]
    for seeds in ("[0, 0]", "2", "[one]"):
        file.write_text(STUDY.replace("captions: short}", f"captions: short, seeds: {seeds}}}"))
        with pytest.raises(ValueError, match="seeds must be distinct integers"):
            Study.read(file)


def test_short_captions_alone(study):
    """The row learns from one caption of each scene: the short one where there is one."""
    file, work = study
    read = Study.read(file)
    data, _ = ablation.prepare(read, work)
    both, short = (json.loads((data / name).read_text()) for name in ("train.json", "train.short.json"))
    assert all(len(r["caption"]) == 1 for r in short) and any(len(r["caption"]) == 2 for r in both)
    assert all(s["caption"][0] == b["caption"][0] for s, b in zip(short, both, strict=True))


@pytest.mark.parametrize(
    "wrong",
    ["method: kv", "figure: t2i", "than: base", "rows:"],
    ids=["method", "figure", "row", "form"],
)
def test_a_study_with_a_wrong_name_is_refused(tmp_path, wrong):
    file = tmp_path / "s.yaml"
    name = wrong.split(": ")[0].rstrip(":")
    file.write_text(STUDY.replace(wrong, "row:" if wrong == "rows:" else f"{name}: nonsense"))
    with pytest.raises(ValueError, match=r"unknown method|names unknown|is not a study"):
        Study.read(file)


def test_a_verdict_follows_from_the_items():
    """A clear difference holds or is refuted; a small one is open, and is within a margin."""
    rng = np.random.default_rng(0)
    low, high = ((rng.random((3, 400)) < p).astype(float).tolist() for p in (0.5, 0.8))
    results = {
        name: [
            {"answers": {"k": {"8": own}, "kinds": [], "objects": [1] * 400, "images": list(range(400))}}
            for own in items
        ]
        for name, items in (("low", low), ("high", high), ("same", low))
    }

    def verdict(better: str, than: str, margin: float = 0.0) -> str:
        return judge(Claim("", "answers", better, than, margin), results)["verdict"]

    assert verdict("high", "low") == "holds" and verdict("low", "high") == "refuted"
    assert verdict("same", "low") == "open" and verdict("same", "low", margin=0.1) == "holds"
    assert verdict("high", "absent") == "not measured"
    # more than the seeds of one side, less than everything: the interval has the true difference in it
    bottom, top = over_seeds(np.array(high), np.array(low), np.arange(400))
    assert bottom < 0.3 < top and top - bottom < 0.2
    # the same four times over says no more, and pictures drawn whole say so
    four = [np.repeat(np.array(side), 4, axis=1) for side in (high, low)]
    again = over_seeds(*four, np.repeat(np.arange(400), 4))
    assert again == pytest.approx((bottom, top)) and np.diff(over_seeds(*four, np.arange(1600))) < 0.8 * (top - bottom)
    assert over_seeds(np.array(high), np.array(low), np.arange(400), ratio=True)[0] > 1.3


def test_the_words_of_a_patch_are_those_of_its_cell():
    """Tower training's truth: each cell is 2 × 2 patches, and only cells with an object have its three words."""
    scene = scenes.make(0, "train", 3, (4, 4))
    told = scenes_base.words_of(scene).view(6, 6, 5)
    for place in range(9):
        row, column = divmod(place, 3)
        cell = told[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(4, 5)
        assert (cell == cell[0]).all() and cell[0, :2].tolist() == [row, column]
        thing = next((t for t in scene.things if t.place == place), None)
        if thing is None:
            assert (cell[0, 2:] == -100).all()
        else:
            named = [group[i] for group, i in zip(scenes_base.GROUPS[2:], cell[0, 2:].tolist(), strict=True)]
            assert named == [thing.size, thing.colour, thing.shape]


def test_the_vocabulary_has_every_word():
    """A word that the tokenizer does not know would be answered as <unk>, in silence."""
    processor = scenes_base.build_processor(scenes_base.vocabulary(), SIDE, scenes_base.PATCH, 0.2, 0.25)
    unknown = processor.tokenizer.unk_token_id
    for item in scenes.items(1, "test", 300, (1, 9)):
        said = [item["caption"], item["short"] or "", *item["negatives"].values()]
        said += [q[name] for q in item["questions"] for name in ("question", "answer")]
        for text in said:
            assert unknown not in processor.tokenizer(text)["input_ids"], text
    assert torch.tensor(processor.tokenizer("describe the picture.")["input_ids"]).ne(unknown).all()


def test_a_row_named_for_its_k_says_it_once():
    """The picture of the published study had curves called "k 1, k = 1"."""
    assert [label(name) for name in ("k 16, k = 16", "k 1, k = 16", "both, k = 8")] == [
        "k = 16",
        "k 1, k = 16",
        "both, k = 8",
    ]


def test_a_report_of_nothing_says_so(tmp_path, study):
    with pytest.raises(ValueError, match="run the study first"):
        report(Study.read(study[0]), tmp_path, None)
