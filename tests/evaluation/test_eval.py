"""Metrics, and the table of the small real model: nothing is mixed, done twice or compared with other items."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from eval.metrics import exact, yes_no
from eval.studies import smol, smol_claims, smol_report
from llava_fwd2bot.evaluation import metrics
from llava_fwd2bot.evaluation.resample import bootstrap
from llava_fwd2bot.files.writing import write_json


def test_answers_are_compared_as_people_read_them():
    assert exact(["A night stand.", "lamp, bed", "two"], ["night stand", "bed, lamp", "three"]) == [1, 1, 0]
    found = yes_no(["Yes", "No.", "there is no dog", "yes"], ["yes", "no", "yes", "no"])
    assert (found["accuracy"], found["precision"], found["recall"], found["yes"]) == (0.5, 0.5, 0.5, 0.5)


def test_an_empty_answer_is_not_the_option_a():
    """Articles and end marks are dropped, and "A" without its article is as empty as no answer: that was right."""
    assert exact(["", "The", ".", "B", "a.", "A cat"], ["A", "A", "A", "A", "A", "cat"]) == [0, 0, 0, 0, 1, 1]
    assert exact(["", "", " "], [".", "?", ""]) == [0, 0, 1]


def test_paired_intervals_are_narrower_than_their_parts():
    """Retention's interval must use that both answered the same items."""
    items = np.random.default_rng(0).integers(0, 2, 400)
    low, high = bootstrap(items, items)
    assert low == high == 1.0
    low, high = bootstrap(items)
    assert low < items.mean() < high and high - low == pytest.approx(4 * (0.25 / 400) ** 0.5, rel=0.15)
    # a draw without any of the base's right answers has no ratio
    assert bootstrap([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])[1] == 3.0
    with pytest.raises(ValueError, match="same items: 3 and 2"):
        bootstrap([1, 0, 1], [1, 0])


ENDS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\0", "\ud800"]


@pytest.mark.parametrize("java", [True, False])
def test_no_character_moves_the_captions(monkeypatch, java):
    """Java's tokenizer reads a caption in each line: one line end more, and all later ones were other images'."""
    pytest.importorskip("pycocoevalcap")
    if java and shutil.which("java") is None:
        pytest.skip("no Java here")
    if not java:
        monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    references = [[f"a cat on mat {i} here", f"the cat sits on the mat {i}"] for i in range(len(ENDS))]
    said = [own[0] for own in references]
    good = metrics.caption_scores(said, references)["per_image"]
    broken = [text.replace(" on ", f"{end}on ") for text, end in zip(said, ENDS, strict=True)]
    split = [[one.replace(" mat", f" {end} mat") for one in own] for own, end in zip(references, ENDS, strict=True)]
    # a blank one at the end was lost, and the last image with it
    for given, truth in ((broken, references), (said, split)):
        found = metrics.caption_scores([*given, " "], [*truth, ["\u2028"]])["per_image"]
        assert len(found) == len(ENDS) + 1
        assert metrics.caption_scores(given, truth)["per_image"] == pytest.approx(good)


def test_captions_that_came_back_moved_are_no_scores(monkeypatch):
    """Whatever a tokenizer takes for a line end next: an error, not a table of zeros."""
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")

    def moved(self, given):
        texts = [c["caption"] for own in given.values() for c in own]
        lines = iter(["one more", *texts])
        return {i: [next(lines) for _ in own] for i, own in given.items()}

    monkeypatch.setattr(metrics.shutil, "which", lambda name: "/usr/bin/java")
    for broken in (moved, lambda self, given: {}):
        monkeypatch.setattr(ptb.PTBTokenizer, "tokenize", broken)
        with pytest.raises(ValueError, match="The tokenizer returned other texts than the 2 captions"):
            metrics.caption_scores(["a cat", "a dog"], [["a cat"], ["a dog"]])


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


def test_the_whole_table_and_its_resume(base_dir, on_disk, processor, photographs, tmp_path, monkeypatch):
    """A stopped evaluation goes on: what is done is not answered again, and the report is of all that is there."""
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("matplotlib")
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    tasks = ["caption", "exists", "retrieval", "coco", "sugarcrepe"]
    command = ["--data", str(photographs), "--work", str(tmp_path / "w"), "--k", "1", "4", "--tasks", *tasks]
    command += ["--run", f"base={base_dir}", "--run", f"fwd2bot={tmp_path / 'm'}", "--run", f"prune={base_dir}"]
    assert smol.main([*command, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(r["task"], r["method"], r["k"]): r for r in report["results"]}
    assert len(rows) == 2 + 2 * 2 + 5 * 2  # base and pruning answer alone; Fwd2Bot does all
    assert {"retention", "retention_interval"} <= rows["exists", "fwd2bot", 4].keys()
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "| fwd2bot |" in (tmp_path / "out.md").read_text()

    monkeypatch.setattr(smol, "open_reader", lambda *args: pytest.fail("everything was done already"))
    assert smol.main(command) == 0
    for other in (["--limit", "2"], ["--tuning"], ["--run", "fwd2bot=another"]):
        with pytest.raises(ValueError, match="give another --work, or delete it"):
            smol.main([*command, *other])
    image = photographs / "flickr8k" / "images" / "0.png"
    before = image.read_bytes()
    Image.new("RGB", (40, 40)).save(image)  # replaced under its name
    with pytest.raises(ValueError, match=r"base.caption.k0.json is a result of data '\w+', not '"):
        smol.main(command)
    image.write_bytes(before)
    kept = tmp_path / "w" / "fwd2bot.coco.k1.json"  # trained anew under its old path
    kept.write_text(re.sub(r'"fingerprint": "\w{4}', '"fingerprint": "0000', kept.read_text()))
    with pytest.raises(ValueError, match="is a result of fingerprint '0000"):
        smol.main(command)
    kept.unlink()
    (tmp_path / "w" / "fwd2bot.coco.k4.json").unlink()
    with pytest.raises(pytest.fail.Exception):
        smol.main(command)


def test_equal_items_can_be_drawn():
    """Their interval is one number, from which rounding puts the mean apart: a bar of negative length was an error."""
    pytest.importorskip("matplotlib")
    row = {"task": "exists", "method": "pool", "k": 1, "items": 3, "value": 0.3}
    for bound in (0.3 + 1e-16, 0.3 - 1e-16):
        assert smol_report.picture([{**row, "interval": (bound, bound)}])[:4] == b"\x89PNG"


@pytest.mark.parametrize("second", [{"limit": 10}, {"tuning": True}])
def test_results_of_other_items_are_not_mixed(tmp_path, second):
    for k, about in ((1, {}), (2, second)):
        result = {
            "task": "coco",
            "method": "fwd2bot",
            "path": "smol-llava",
            "k": k,
            "limit": None,
            "tuning": False,
            **about,
            "figures": {"t2i_r1": 0.5},
            "items": [1, 0],
        }
        write_json(smol.result_file(tmp_path, "fwd2bot", "coco", k), result)
    with pytest.raises(ValueError, match="different --limit"):
        smol_report.read_results(tmp_path)


def test_claims_compare_the_same_items_at_the_budgets_that_are_named():
    """What the README says of rivals is read off this: the sign, the doubled budget and the ratio must be right."""
    ours, other = [1, 1, 1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0, 0, 0]
    results = {
        "exists": {"fwd2bot-short": {1: {"items": ours}, 2: {"items": ours}}, "pool": {2: {"items": other}}},
        "retrieval": {"fwd2bot-short": {1: {"items": ours}, 2: {"items": ours}}, "mean": {1: {"items": other}}},
    }

    def images_of(task):
        return range(8)

    found = {(e["claim"], r["against"], r["k"]): r for e in smol_claims.claims(results, images_of) for r in e["rows"]}
    assert [(key[2], row["value"]) for key, row in found.items() if "twice" in key[0]] == [(1, 0.625)]
    assert [row["value"] for key, row in found.items() if key[1] == "mean"] == [3.5]  # of the one vector, once
    low, high = next(row["interval"] for key, row in found.items() if key[1:] == ("pool", 2))
    assert 0 < low < 0.625 < high <= 1
    text = smol_claims.markdown(smol_claims.claims(results, images_of), smol_report.TITLES)
    assert "**+62 [" in text and "3.50 [" in text  # points of eight items have no decimals
    results["exists"]["pool"][2]["items"] = [1]
    with pytest.raises(ValueError, match="fwd2bot-short has 8 items, pool 1"):
        smol_claims.claims(results, images_of)
