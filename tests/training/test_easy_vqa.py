"""The easy-VQA run's parts, without its training: data, rows, report."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("easy_vqa")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import easy_vqa_data  # noqa: E402
from report_page import Answered, table, write_html  # noqa: E402
from tiny_llava import Rows  # noqa: E402

from llava_fwd2bot.processing.conversation import ConversationFormatter  # noqa: E402
from llava_fwd2bot.training.data import LlavaDataset  # noqa: E402


@pytest.fixture(scope="module")
def processor():
    return easy_vqa_data.build_processor()


def test_captions_agree_with_every_answer_of_their_picture():
    """They come from answers; "is there not a circle? no" must be read the right way round."""
    _, questions = easy_vqa_data.load("train")
    said = easy_vqa_data.captions(questions)
    assert len(said) > 3000
    for image, question, answer in questions:
        if image in said and answer not in ("yes", "no"):
            assert answer in said[image]
        elif image in said and answer == "yes" and not {"no", "not"} & set(question.rstrip("?").split()):
            named = [w for w in question.rstrip("?").split() if w in easy_vqa_data.SHAPES + easy_vqa_data.COLORS]
            assert all(w in said[image] for w in named)


def test_no_test_picture_is_in_the_training_file(tmp_path):
    paths, questions = easy_vqa_data.load("train")
    easy_vqa_data.write_llava_json(paths, questions, tmp_path / "train.json")
    records = json.loads((tmp_path / "train.json").read_text())
    assert len({r["image"] for r in records}) == 4000
    assert sum(len(r["conversations"]) for r in records) == 2 * len(questions)
    assert not {p.resolve() for p in paths.values()} & {p.resolve() for p in easy_vqa_data.load("test")[0].values()}


def test_the_base_is_trained_on_the_rows_that_the_plugin_makes(processor, tmp_path):
    """Base builder and fine-tune tokenise by different roads; the ids must be the same."""
    paths, questions = easy_vqa_data.load("train")
    few = {n: p for n, p in paths.items() if n < 5}
    asked = [q for q in questions if q[0] in few]
    easy_vqa_data.write_llava_json(few, asked, tmp_path / "train.json")
    data = LlavaDataset(tmp_path / "train.json", processor, image_folder=paths[0].parent)
    rows = Rows(processor)
    for i, record in enumerate(json.loads((tmp_path / "train.json").read_text())):
        said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        ids, labels = rows.row(list(zip(said[::2], said[1::2], strict=True)), rows.image)
        assert data[i]["input_ids"].tolist() == ids and data[i]["labels"].tolist() == labels
    prompt = ConversationFormatter(processor).prompt("is there a circle?")
    assert (
        processor.tokenizer(prompt)["input_ids"] == rows.start + rows.image[:1] + rows.turn("is there a circle?", "")[0]
    )


def test_the_report_is_one_page_with_the_figures(tmp_path):
    paths, _ = easy_vqa_data.load("test")
    picture = next(iter(paths.values()))
    report = {
        "base_accuracy": 0.98,
        "accuracy": {"1": 0.9, "4": 0.97},
        "retention": {"1": 0.9 / 0.98, "4": 0.97 / 0.98},
        "retrieval": {"image_to_text_r1": 0.5, "text_to_image_r1": 0.6, "images": 7, "captions": 3},
        "bytes_per_image": {"1": 256, "4": 1024, "dense": 16384},
        "questions_per_second": {"base": 10.0, "1": 20.0, "4": 15.0},
        "questions": 9,
        "split": "test",
        "seconds": {"base": 1.0},
        "wall_s": 2.0,
    }
    # 9 questions bear no decimals, 9,673 one
    assert table(report)[0][1] == "accuracy (n = 9)"
    assert table(report)[1][2] == ["4 summary tokens", "97%", "99%", "1,024", "15"]
    assert table(report | {"questions": 9673})[1][2][1:3] == ["97.0%", "99.0%"]
    pytest.importorskip("matplotlib")
    about = dict.fromkeys(("title", "intro", "note", "heading"), "About")
    log = [{"step": 1, "answer_loss": 1.0, "contrastive_loss": 2.0, "retrieval_accuracy": 0.1}]
    write_html(tmp_path / "r.html", report, log, [(picture, [Answered("is it <b>?", "yes", "no", "yes")])], about)
    page = (tmp_path / "r.html").read_text()
    assert "<td>99%</td>" in page and "is it &lt;b&gt;?" in page and "http" not in page
