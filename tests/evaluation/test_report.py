"""Results of evaluators to a report: what is compared with what, and what is refused."""

from __future__ import annotations

import json

import pytest

from llava_fwd2bot.cli.main import main
from llava_fwd2bot.evaluation.report import compare, report_markdown
from llava_fwd2bot.evaluation.resample import sign_flips
from llava_fwd2bot.evaluation.results import published, published_of, read_results
from llava_fwd2bot.evaluation.tables import markdown, percent


def write(folder, name, **content):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"limit": None, "date": "2026-01-01", **content}))


def scored(folder, name, model, k, hits, **more):
    items = {str(i): float(hit) for i, hit in enumerate(hits)}
    figures = {"accuracy": 100 * sum(hits) / len(hits)}
    write(folder, name, benchmark="gqa", figures=figures, per_item=items, model=model, k=k, **more)


def test_retention_by_hand(tmp_path):
    """8 of 10 right against 9 of 10: 88.9 %; the paired interval knows that they are the same items."""
    scored(tmp_path, "base", "llava", "dense", [1] * 9 + [0])
    scored(tmp_path, "ours", "m", 8, [1] * 8 + [0, 0])
    rows = compare(read_results([tmp_path]).results)
    assert [row["base"] for row in rows] == [True, False]
    assert rows[1]["retention"] == pytest.approx(80 / 90) and rows[1]["value"] == 80
    low, high = rows[1]["retention_interval"]
    assert low < 80 / 90 < high <= 1.0
    assert rows[0]["interval"][1] == 100 and rows[1]["p"] == 1.0  # one item differs: no evidence


def test_significance_against_the_binomial():
    """Ten items for and none against: 2 of 2^10 sign patterns."""
    assert sign_flips([1] * 10, [0] * 10) == pytest.approx(2 / 1024, abs=2e-3)
    assert sign_flips([1, 0], [1, 0]) == 1.0


def test_every_evaluator_s_file_is_read(tmp_path):
    def row(k, figures, items, by=""):
        return {"k": k, "by": by, "figures": figures, "per_item": {str(i): x for i, x in enumerate(items)}}

    rows = [row(1, {"t2i_r1": 0.5, "i2t_r1": 1.0}, [1, 0]), row(4, {"t2i_r1": 0.5, "i2t_r1": 1.0}, [1, 0])]
    write(tmp_path, "r", benchmark="retrieval coco", rows=rows, model="m")
    rows = [row("dense", {"cider": 0.4, "bleu4": 0.1}, [0.3, 0.5]), row(4, {"cider": 0.4, "bleu4": 0.1}, [0.4, 0.4])]
    write(tmp_path, "c", benchmark="captioning nocaps", rows=rows, model="m")
    rows = [row(4, {"accuracy": 0.5, "swap_att (2)": 0.5}, [1.0, 0.0], "likelihood")]
    write(tmp_path, "s", benchmark="sugarcrepe", rows=rows, model="m")
    (tmp_path / "other.json").write_text('{"not": "a result"}')
    found = {(r.name, r.k): r for r in read_results([tmp_path]).results}
    assert {name for name, _ in found} == {
        "retrieval coco (t2i_r1)",
        "captioning nocaps (cider)",
        "sugarcrepe by likelihood (accuracy)",
    }
    assert found["retrieval coco (t2i_r1)", 1].items == {"0": 1.0, "1": 0.0}
    compared = compare(list(found.values()))
    assert next(r for r in compared if "captioning" in r["benchmark"] and r["k"] == 4)["retention"] == 1.0


def test_points_and_f1_get_no_interval(tmp_path):
    """They are no mean of items; an interval made of items would be of something else."""
    write(tmp_path, "p", benchmark="pope", figures={"f1": 0.8}, per_item={"0": 1.0, "1": 0.0}, model="m", k=4)
    assert "interval" not in compare(read_results([tmp_path]).results)[0]


def test_a_named_base_is_its_dense_row(tmp_path):
    """Two models each with their own base: --base names one, and its summaries are no second base."""
    scored(tmp_path, "m-base", "m", "dense", [1] * 9 + [0])
    scored(tmp_path, "n-base", "n", "dense", [1] * 10)
    scored(tmp_path, "ours", "m", 8, [1] * 8 + [0, 0])
    rows = compare(read_results([tmp_path]).results, "m")
    assert [row["model"] for row in rows if row["base"]] == ["m"] and len(rows) == 3
    scored(tmp_path, "four", "m", 8, [1] * 8 + [0, 0], quantised="4bit")  # another width is another model
    assert len(compare(read_results([tmp_path]).results, "m")) == 4


def test_a_base_of_the_first_items_stands_beside_the_whole_one(tmp_path):
    """Each result is compared with the base of its own --limit; a file named twice is one."""
    for limit in (None, 5):
        scored(tmp_path, f"base{limit}", "m", "dense", [1] * (limit or 10), limit=limit)
        scored(tmp_path, f"ours{limit}", "m", 8, [0] + [1] * ((limit or 10) - 1), limit=limit)
    twice = tmp_path / ".." / tmp_path.name / "ours5.json"
    rows = compare(read_results([tmp_path, twice]).results)
    assert [(row["limit"], row.get("retention")) for row in rows if not row["base"]] == [(5, 0.8), (None, 0.9)]
    assert [row["base"] for row in rows] == [True, True, False, False]
    scored(tmp_path, "again", "n", "dense", [1] * 10)
    with pytest.raises(ValueError, match="several bases"):
        compare(read_results([tmp_path]).results)


def test_images_are_known_by_names(tmp_path):
    """TextVQA's and GQA's are; signs are flipped by image, and an image's questions agree here: 2 of 2^4 patterns."""
    images = [f"n{i}" for i in range(4) for _ in range(3)]
    scored(tmp_path, "base", "m", "dense", [1] * 12, image_of_item=images)
    scored(tmp_path, "ours", "m", 8, [0] * 12, image_of_item=images)
    assert compare(read_results([tmp_path]).results)[1]["p"] == pytest.approx(1 / 8, abs=0.02)


def test_captions_of_one_image_are_drawn_together(tmp_path):
    """Five captions of an image hit or miss together: taken for independent, the interval would be half as wide."""
    hits = {str(n): float(n // 5 % 2 == 0) for n in range(200)}
    more = {"benchmark": "retrieval coco", "model": "m"}
    widths = []
    for groups in (None, [i for i in range(40) for _ in range(5)]):
        row = {"k": 4, "figures": {"t2i_r1": 0.5}, "per_item": hits, "image_of_item": groups}
        write(tmp_path, "r", rows=[row], **more)
        low, high = compare(read_results([tmp_path]).results)[0]["interval"]
        widths.append(high - low)
    assert widths[1] > 1.8 * widths[0]


def test_files_of_another_kind_are_named(tmp_path, capsys):
    """Left out without a word, a result would be missing and nobody would know why; named by itself it is an error."""
    scored(tmp_path / "in", "ours", "m", 8, [1, 0])
    write(tmp_path / "in", "answered", questions=3)
    found = read_results([tmp_path / "in"])
    assert len(found.results) == 1 and [p.stem for p in found.skipped] == ["answered"]
    assert main(["eval", "report", str(tmp_path / "in")]) == 0
    assert "skipped 1 file(s) without results" in (err := capsys.readouterr().err) and "answered.json" in err
    assert main(["eval", "report", str(tmp_path / "in" / "answered.json")]) == 1
    assert "answered.json holds no result with its items" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "shown"), [(24, "67"), (1200, "66.7"), (120_000, "66.67")])
def test_a_percentage_has_as_many_decimals_as_its_items_bear(tmp_path, count, shown):
    """Twenty-four questions gave 66.67 % and a retention of 66.7 %: the error is ten points."""
    assert percent(2 / 3, count) == shown
    scored(tmp_path, "base", "llava", "dense", [1] * count, limit=None)
    scored(tmp_path, "ours", "m", 8, [1, 1, 0] * (count // 3))
    if count < 100_000:  # each of 2,000 draws is of all items
        text = report_markdown(compare(read_results([tmp_path]).results))
        assert f"| m | 8 | {count:,} | {shown} |" in text and f"| {shown} % |" in text


@pytest.mark.parametrize("fault", ["cut", "twice", "items", "limit", "bases", "nothing", "tokens", "split", "others"])
def test_what_must_not_be_averaged_in(tmp_path, capsys, fault):
    scored(tmp_path, "base", "llava", "dense", [1] * 9 + [0])
    scored(tmp_path, "ours", "m", 8, [1] * 8 + [0, 0])
    if fault == "cut":
        (tmp_path / "ours.json").write_text((tmp_path / "ours.json").read_text()[:50])
    elif fault == "twice":
        scored(tmp_path, "again", "m", 8, [1] * 10)
    elif fault == "items":
        scored(tmp_path, "ours", "m", 8, [1] * 8)
    elif fault == "limit":
        scored(tmp_path, "ours", "m", 8, [1] * 10, limit=10)
    elif fault == "bases":
        scored(tmp_path, "other", "n", "dense", [1] * 10)
    elif fault == "tokens":
        scored(tmp_path, "ours", "m", None, [1] * 10)
    elif fault == "split":  # F1 is no mean of items; all the same it must be of the same ones
        for name, model, k, count in (("base", "llava", "dense", 3), ("ours", "m", 8, 2)):
            figures, items = {"f1": 0.8}, {str(i): float(i > 0) for i in range(count)}
            write(tmp_path, name, benchmark="pope", figures=figures, per_item=items, model=model, k=k)
    elif fault == "others":  # as many images, and others
        for k, of in (("dense", "a"), (4, "b")):
            rows = [{"k": k, "figures": {"cider": 0.4}, "per_item": {"0": 0.3, "1": 0.5}}]
            write(tmp_path, f"c{k}", rows=rows, benchmark="captioning own", of=of, model="m")
    else:
        for file in tmp_path.glob("*.json"):
            file.unlink()
    said = {
        "cut": "ours.json is not valid JSON",
        "twice": "is in",
        "items": "not of the same items",
        "limit": "not of the same items",
        "bases": "several bases",
        "nothing": "There is no result",
        "tokens": "does not say how many tokens m answered from",
        "split": "not of the same items",
        "others": "not of the same items",
    }
    assert main(["eval", "report", str(tmp_path)]) == 1
    assert said[fault] in capsys.readouterr().err


def test_the_report_by_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scored(tmp_path / "in", "base", "llava", "dense", [1] * 9 + [0])
    for k in (4, 8):
        scored(tmp_path / "in", f"ours{k}", "m", k, [1] * k + [0] * (10 - k))
    assert main(["eval", "report", str(tmp_path / "in"), "--output", str(tmp_path / "out" / "r")]) == 0
    said = capsys.readouterr().out
    assert "| m | 8 | 10 | 80 |" in said and "89 %" in said and "QueCC 59.0 (16 tokens)" in said
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".json", ".md", ".png", ".html"}
    assert (tmp_path / "out" / "r.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "out" / "r.html").read_text()
    assert "data:image/png;base64" in text and "http" not in text.split("base64,")[1][:100]
    assert "<td>89 %</td>" in text
    (tmp_path / "report").mkdir()  # NAME is how the files' names begin: a folder may have it
    assert main(["eval", "report", str(tmp_path / "in"), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report.md").is_file()


def test_what_others_published_stands_beside_the_same_metric_alone(tmp_path):
    """64.3 of MMBench is circular, 66.8 of ScienceQA of questions with an image, on the scale of one's own figure."""
    assert published_of("mmbench (circular)")[0][0] == ("LLaVA-1.5", 576, 64.3)
    assert published_of("mmbench (accuracy)")[0] == published_of("scienceqa (accuracy)")[0] == []
    assert published_of("pope (f1)")[0][0][2] == pytest.approx(0.859)
    assert published_of("retrieval coco (t2i_r1)")[0][0] == ("CLIP ViT-L", None, pytest.approx(0.37))
    assert published_of("retrieval coco-val (t2i_r1)")[0] == []
    scored(tmp_path, "whole", "m", 8, [1] * 4)
    assert "TokenPacker" in report_markdown(compare(read_results([tmp_path]).results))
    scored(tmp_path, "part", "m", 4, [1] * 2, limit=2)  # in one table with the whole: each row says what it is of
    said = report_markdown(compare(read_results([tmp_path]).results))
    assert "| m | 8 |" in said and "| m, first 2 items | 4 |" in said and "TokenPacker" not in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_item": [1.0]}, "ours.json is not a result"),
        ({"k": "eight"}, "ours.json: k is 'eight'"),
        ({"per_item": {}}, "ours.json holds no result"),
        ({"benchmark": None, "figures": None, "rows": [{}]}, "ours.json is not a result"),
    ],
)
def test_a_result_of_another_form_is_named(tmp_path, capsys, change, message):
    scored(tmp_path, "ours", "m", 8, [1, 0])
    content = json.loads((tmp_path / "ours.json").read_text())
    kept = {name: value for name, value in {**content, **change}.items() if value is not None}
    if "rows" in change:
        kept["evaluator"] = "retrieval"
    (tmp_path / "ours.json").write_text(json.dumps({**kept, "limit": None}))
    assert main(["eval", "report", str(tmp_path / "ours.json")]) == 1
    assert message in capsys.readouterr().err


def test_a_base_that_is_not_there(tmp_path, capsys):
    """A name spelt wrong would leave the table without retention, and nobody would know why."""
    scored(tmp_path, "ours", "m", 8, [1, 0])
    assert main(["eval", "report", str(tmp_path), str(tmp_path), "--base", "lava"]) == 1
    assert "--base 'lava' has no result. The models are: m." in capsys.readouterr().err


def test_published_figures_name_their_source():
    known = published()
    assert all(known[part]["source"] for part in ("generation", "retrieval"))
    assert all(0 < row["tokens"] < 576 for row in known["generation"]["rows"])


def test_a_row_of_another_width_is_refused():
    """Markdown shows such a table with figures under the wrong titles."""
    assert markdown(["a", "b"], [["1", ""]]) == "| a | b |\n|---|---|\n| 1 |  |"
    with pytest.raises(ValueError, match="3 cells in a table of 2 columns"):
        markdown(["a", "b"], [["1", "2", "3"]])
