"""The runner of studies: files are read strictly, nothing is mixed or done twice, verdicts follow from the items."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import settings, shake
from filelock import FileLock
from PIL import Image
from transformers import LlavaForConditionalGeneration

from eval.statistics import over_seeds
from eval.studies import __main__ as command
from eval.studies import run as runner
from eval.studies import smol
from eval.studies.compare import Scores, chance_over_seeds, judge
from eval.studies.picture import picture
from eval.studies.report import page, report, summarise
from eval.studies.rivals import RIVALS
from eval.studies.rows import Cell, Rows
from eval.studies.run import Job, run_one
from eval.studies.study import Study
from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.evaluation.encode import read_tensor

STUDIES = Path(__file__).parents[2] / "eval" / "studies"
RESULTS = Path(__file__).parents[2] / "eval" / "results"
TASKS = ["caption", "exists", "retrieval", "coco", "sugarcrepe"]
STUDY = {
    "title": "A study",
    "module": "eval.studies.smol",
    "k": [1, 4],
    "common": "--image_folder {data}/flickr8k/images --fwd2bot 4 --lora_r 2 --lora_alpha 4 --max_steps 1",
    "rows": {
        "base": {"k": [0], "method": "base", "tasks": ["caption", "exists"]},
        "fwd2bot": {"tasks": TASKS},
        "prune": {"method": "prune", "tasks": ["caption", "exists"]},
    },
    "figures": {task: task for task in TASKS},
    "tables": [{"title": "", "figures": TASKS, "show": ["value", "interval", "share"]}],
    "claims": [{"says": "ahead of pruning", "figures": ["exists"], "ours": ["fwd2bot"], "others": ["prune"]}],
    "picture": {"figures": ["exists", "retrieval"], "grey": ["prune"]},
}


@pytest.fixture
def photographs(tmp_path):
    """The folders of the real data, in small."""
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    said = [["Two dogs run in the snow.", "A black dog on snow."], ["A man on a bike.", "A person rides a red bike."]]
    for name, file in (("flickr8k", "dev.jsonl"), ("coco_val2017", "captions.jsonl")):
        (data / name / "images").mkdir(parents=True)
        lines = []
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(data / name / "images" / f"{i}.png")
            lines.append(json.dumps({"image": f"{i}.png", "captions": said[i % 2]}))
        (data / name / file).write_text("\n".join(lines))
    (data / "bench" / "sugarcrepe").mkdir(parents=True)
    pairs = {"0": {"filename": "COCO_val2014_1.png", "caption": "a dog", "negative_caption": "a cat"}}
    (data / "bench" / "sugarcrepe" / "add_obj.json").write_text(json.dumps(pairs))
    return data


def write_study(file: Path, models: dict[str, Path], **changes) -> Path:
    """A study's file, its rows with checkpoints of their own."""
    rows = {name: {**row, "model": str(models[name])} for name, row in STUDY["rows"].items()}
    file.write_text(yaml.safe_dump({**STUDY, "rows": rows, **changes}))
    return file


@pytest.fixture
def jobs(base_dir, on_disk, processor, photographs, tmp_path):
    """Makes the jobs of a study of three checkpoints."""
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    models = {"base": base_dir, "prune": base_dir, "fwd2bot": tmp_path / "m"}
    file = write_study(tmp_path / "toy.yaml", models)
    study = Study.read(file)
    return lambda **more: [
        Job(study, study.rows[name], seed, photographs, tmp_path / "w", **more) for name, seed in study.runs()
    ]


def test_the_whole_table_and_its_resume(jobs, photographs, tmp_path, monkeypatch):
    """A stopped study resumes: what is done is not answered again, and the report is of all that is there."""
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("matplotlib")
    rows = Rows(tmp_path / "toy.rows.jsonl")
    for job in jobs():
        run_one(job, rows)
    assert len(rows.cells) == 2 + 2 * 2 + 5 * 2  # base and pruning answer alone; Fwd2Bot does all
    report(jobs()[0].study, tmp_path, smol)
    found = json.loads((tmp_path / "toy.json").read_text())
    lines = {(line["figure"], line["row"], line["k"]): line for line in found["figures"]}
    assert {"share", "share_interval"} <= lines["exists", "fwd2bot", 4].keys()
    assert {one["verdict"] for one in found["claims"]} <= {"holds", "refuted", "open"} and len(found["claims"]) == 2
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    text = (tmp_path / "toy.md").read_text()
    assert "| fwd2bot |" in text and "### ahead of pruning" in text

    monkeypatch.setattr(smol, "open_method", lambda *args: pytest.fail("everything was done already"))
    again = Rows(rows.file)
    for job in jobs():
        run_one(job, again)
    for other in ({"limit": 2}, {"tuning": True}):
        with pytest.raises(ValueError, match=r"Give another --results"):
            jobs(**other)[0].missing(again)
    image = photographs / "flickr8k" / "images" / "0.png"
    before = image.read_bytes()
    Image.new("RGB", (40, 40)).save(image)  # replaced under its name
    with pytest.raises(ValueError, match=r"base, caption, k = 0, seed 0 is a result of data '\w+', not '"):
        jobs()[0].missing(again)
    image.write_bytes(before)
    key = ("coco", "fwd2bot", 1, 0)
    again.cells[key].about["fingerprint"] = "0000"  # trained anew under its old path
    with pytest.raises(ValueError, match="is a result of fingerprint '0000"):
        jobs()[1].missing(again)
    del again.cells[key]
    assert jobs()[1].missing(again) == [key]


@pytest.mark.parametrize("method", ["pool", "kv"])
def test_a_rival_is_measured_at_every_k(base_dir, processor, photographs, tmp_path, method):
    """Pooling to one token is no prefix of pooling to four, and keys and values are no summary of width D."""
    pytest.importorskip("pycocoevalcap")
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    config = settings(num_summary_tokens=4, contrastive_weight=0.0)
    model = shake(add_fwd2bot(base, config, processor, host=RIVALS[method])).eval()
    model.save_pretrained(tmp_path / "m", processor=processor)
    row = {"method": method, "model": str(tmp_path / "m"), "tasks": ["caption"]}
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump({**STUDY, "rows": {"rival": row}, "tables": [], "claims": [], "picture": {}}))
    study, rows = Study.read(file), Rows(tmp_path / "toy.rows.jsonl")
    run_one(Job(study, study.rows["rival"], 0, photographs, tmp_path / "w"), rows)
    kept = [read_tensor(path).shape[0] for path in (tmp_path / "w" / "summaries").iterdir()]
    assert sorted(kept) == ([1] * 4 + [4] * 4 if method == "pool" else [4] * 4)  # of four photographs
    assert [key[2] for key in rows.cells] == [1, 4]


def test_a_row_is_trained_once_and_a_failure_is_named(base_dir, photographs, tmp_path, capsys):
    """Each run is a process of its own; what fails is named with its log, and the rest is done."""
    pytest.importorskip("pycocoevalcap")
    caption = [{"image": "0.png", "captions": ["A dog."]}, {"image": "1.png", "captions": ["A man."]}]
    (tmp_path / "w" / "data").mkdir(parents=True)
    (tmp_path / "w" / "data" / "captions.json").write_text(json.dumps(caption))
    data = f"--model_name_or_path {base_dir} --fwd2bot_caption_data {{work}}/data/captions.json"
    rows = {
        "ours": {"tasks": ["coco"], "k": [4], "arguments": data},
        "wrong": {"tasks": ["coco"], "k": [4], "arguments": f"{data} --max_steps none"},
    }
    study = {**STUDY, "rows": rows, "figures": {"coco": "R@1"}, "tables": [], "claims": [], "picture": {}}
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(study))
    argv = ["run", str(file), "--data", str(photographs), "--work", str(tmp_path / "w"), "--results", str(tmp_path)]
    assert command.main([*argv, "--jobs", "2"]) == 1
    assert "failed: wrong, seed 0" in capsys.readouterr().err
    found = Rows(tmp_path / "toy.rows.jsonl")
    assert list(found.cells) == [("coco", "ours", 4, 0)]
    # another machine, from the rows alone: nothing is trained
    shutil.rmtree(tmp_path / "w" / "runs")
    assert command.main([*argv, "--only", "ours"]) == 0
    assert not list((tmp_path / "w").rglob("fwd2bot_config.json"))
    # a row whose settings changed is not taken for it, whether it was measured or only begun
    rows["ours"]["arguments"] += " --seed 3"
    file.write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match="is a result of arguments"):
        command.main([*argv, "--only", "ours"])
    job = Job(Study.read(file), Study.read(file).rows["ours"], 0, photographs, tmp_path / "w")
    job.folder.mkdir(parents=True)
    (job.folder / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="was started with other settings"):
        runner._train(job)


def test_two_do_not_train_in_one_folder(jobs, tmp_path, monkeypatch):
    """A killed study's run goes on by itself: the next study waits for it, and takes its result."""
    job, rows = jobs()[0], Rows(tmp_path / "toy.rows.jsonl")
    job.folder.mkdir(parents=True)
    monkeypatch.setattr(smol, "open_method", lambda *args: pytest.fail("the first one did it"))
    with ThreadPoolExecutor(1) as pool, FileLock(job.folder / "lock") as lock:
        second = pool.submit(run_one, job, rows)
        assert not wait([second], 0.2).done
        first = Rows(rows.file)
        for task, *_ in job.keys():
            first.add_task(task, [0])
            first.add(Cell(task, "base", 0, 0, [1]))
        lock.release()
        second.result(60)
    assert len(rows.cells) == 2


def test_rows_come_back_as_they_were(tmp_path):
    """A line cut off by a kill is measured again; other items, or too few, are never taken for these."""
    rows = Rows(tmp_path / "a.rows.jsonl")
    rows.add_task("t", ["x", "x", "y"], {"part": [2]})
    rows.add(Cell("t", "ours", 4, 0, [1, 0, 1]))
    rows.add(Cell("t", "ours", 4, 1, [0.25, 0, 1], {"fingerprint": "f"}))
    with rows.file.open("a") as file:
        file.write('{"task": "t", "row": "ou')
    again = Rows(rows.file)
    assert again.tasks == rows.tasks and list(again.cells) == list(rows.cells)
    assert [cell.scores.tolist() for cell in again.cells.values()] == [[1, 0, 1], [0.25, 0, 1]]
    assert Scores(again).value("t/part", "ours", 4) == 1 and Scores(again).items("t", "ours", 4).shape == (2, 3)
    with pytest.raises(ValueError, match="other items of 't'"):
        again.add_task("t", ["x", "y", "y"])
    with pytest.raises(ValueError, match="2 scores of 3 items"):
        again.add(Cell("t", "ours", 8, 0, [1, 1]))
    rows.file.write_text('{"task": "t", "groups": [0]}\n{"task": "t", "row": "a", "k": 1, "seed": 0, "scores": "01"}\n')
    with pytest.raises(ValueError, match="line 2: 2 scores of 1 items"):
        Rows(rows.file)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": None}, "is not a study"),
        ({"rows": {"base": {"methods": "kv"}}}, "is not a study"),
        ({"tables": [{"title": "x", "figures": ["no"]}]}, "names unknown figures: no"),
        ({"tables": [{"title": "x", "figures": [], "layout": "wide"}]}, "layout is by k or by figure"),
        ({"claims": [{"says": "x", "figures": [], "ours": ["no"], "others": []}]}, "names unknown rows: no"),
        ({"picture": {"figures": ["no"]}}, "names unknown figures: no"),
        ({"seeds": [0, 0]}, "seeds must be distinct integers"),
        ({"seeds": 2}, "seeds must be distinct integers"),
    ],
)
def test_a_study_with_a_wrong_name_is_refused(tmp_path, change, told):
    """Hours of training follow from it."""
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **change}))
    with pytest.raises(ValueError, match=told):
        Study.read(file)


def toy_scores(tmp_path: Path, cells: dict[tuple[str, int, int], np.ndarray]) -> Scores:
    rows = Rows(tmp_path / "s.rows.jsonl")
    rows.add_task("exists", list(range(len(next(iter(cells.values()))))))
    for (row, k, seed), scores in cells.items():
        rows.add(Cell("exists", row, k, seed, scores))
    return Scores(rows)


def test_a_verdict_follows_from_the_items(tmp_path):
    """A clear difference holds or is refuted; a small one is open, and is within a margin."""
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    low, high = ((rng.random((3, 400)) < p).astype(float) for p in (0.5, 0.8))
    sides = (("low", low), ("high", high), ("same", low))
    scores = toy_scores(tmp_path, {(name, 8, s): own[s] for name, own in sides for s in range(3)})

    def verdict(ours: str, other: str, margin: float = 0.0) -> list[str]:
        claim = {"says": "x", "figures": ["exists"], "ours": [ours], "others": [other], "margin": margin}
        given = {"title": "", "rows": dict.fromkeys(("low", "high", "same", "absent")), "figures": {"exists": "x"}}
        file = tmp_path / "v.yaml"
        file.write_text(yaml.safe_dump({**given, "claims": [claim]}))
        return [one["verdict"] for one in judge(Study.read(file), scores)]

    assert verdict("high", "low") == ["holds"] and verdict("low", "high") == ["refuted"]
    assert verdict("same", "low") == ["open"] and verdict("same", "low", margin=0.1) == ["holds"]
    assert verdict("high", "absent") == []
    # more than the seeds of one side, less than everything: the interval has the true difference in it
    bottom, top = over_seeds(high, low, np.arange(400))
    assert bottom < 0.3 < top and top - bottom < 0.2
    # the same four times over says no more, and pictures drawn whole say so
    four, groups = [np.repeat(side, 4, axis=1) for side in (high, low)], np.repeat(np.arange(400), 4)
    assert over_seeds(*four, groups) == pytest.approx((bottom, top))
    assert np.diff(over_seeds(*four, np.arange(1600))) < 0.8 * (top - bottom)
    apart = [chance_over_seeds(side, low, np.arange(400)) for side in (high, low)]
    assert apart[0] < 1e-4 and apart[1] == 1
    assert chance_over_seeds(*four, groups) == pytest.approx(apart[0])
    assert over_seeds(high, low, np.arange(400), ratio=True)[0] > 1.3


def test_p_is_as_often_small_as_it_says():
    """A test over three seeds that knew no seeds would find a difference that is none in a third of the cases."""
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        sides = [0.1 * rng.standard_normal((3, 1)) + rng.standard_normal((3, 200)) for _ in range(2)]
        found.append(chance_over_seeds(*sides, np.arange(200)))
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.09


def test_claims_compare_the_same_items_at_the_budgets_that_are_named(tmp_path):
    """What the README says of rivals is read off this: the sign, the doubled budget and the ratio must be right."""
    pytest.importorskip("scipy")
    ours, other = [1, 1, 1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0, 0, 0]
    cells = {("ours", 1, 0): ours, ("ours", 2, 0): ours, ("pool", 2, 0): other, ("mean", 1, 0): other}
    scores = toy_scores(tmp_path, {key: np.array(own) for key, own in cells.items()})
    claim = {"figures": ["exists"], "ours": ["ours"]}
    claims = [
        {**claim, "says": "the same k", "others": ["pool"]},
        {**claim, "says": "twice as many", "others": ["pool"], "factor": 2},
        {**claim, "says": "ratio", "others": ["mean"], "k": 1, "against": 1, "ratio": True},
    ]
    given = {"title": "", "rows": dict.fromkeys(("ours", "pool", "mean")), "figures": {"exists": "yes/no"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**given, "claims": claims}))
    study = Study.read(tmp_path / "c.yaml")
    found = summarise(study, scores)
    by_claim = {one["claim"]: one for one in found["claims"]}
    assert [(one["k"], one["at"]) for one in found["claims"]] == [(2, 2), (1, 2), (1, 1)]
    assert by_claim["twice as many"]["value"] == 0.625 and by_claim["ratio"]["value"] == 3.5
    low, high = by_claim["the same k"]["interval"]
    assert 0 < low < 0.625 < high <= 1
    text = page(study, found)
    assert "+62 | [" in text and "| 3.50 | [" in text  # points of eight items have no decimals


def test_equal_items_can_be_drawn():
    """Their interval is one number, from which rounding puts the mean apart: a bar of negative length was an error."""
    pytest.importorskip("matplotlib")
    study = Study.read(STUDIES / "smol.yaml")
    for bound in (0.3 + 1e-16, 0.3 - 1e-16):
        line = {"figure": "exists", "row": "pool", "k": 1, "value": 0.3, "interval": (bound, bound)}
        for bars in (False, True):
            study.picture["bars"] = bars
            assert picture(study, [line])[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["smol", "ablation", "smol196", "quantised"])
def test_the_committed_reports_are_of_their_rows(name):
    """Every row is in the study, and each line of the committed JSON has the mean of its rows."""
    study = Study.read(STUDIES / f"{name}.yaml")
    rows, found = Rows(RESULTS / f"{name}.rows.jsonl"), json.loads((RESULTS / f"{name}.json").read_text())
    scores = runner.module_of(study).scores(rows) if name == "smol196" else Scores(rows)
    assert {row for _, row, *_ in rows.cells} - {*study.rows} <= {"base"}
    for line in found["figures"]:
        value = scores.value(line["figure"], line["row"], line["k"])
        assert value == pytest.approx(line["value"], abs=1e-9), line
    if name == "smol":  # another study's tables and pictures are of the same code
        assert page(study, found) == (RESULTS / "smol.md").read_text()


def test_a_report_of_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="run the study first"):
        report(Study.read(STUDIES / "smol.yaml"), tmp_path)
