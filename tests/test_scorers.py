"""The benchmarks' scorers against the official ones, on the same answers, and what they refuse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import runpy
import sys
from pathlib import Path

import pytest

from llava_fwd2bot.cli import main
from llava_fwd2bot.eval import scorers
from llava_fwd2bot.eval.scorers import choices, mme, pope, vqa

NO_LLAVA = "the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
WORDS = (
    "the a an two none cat's dog, 1,000 3.5 isnt dont U.S.A. yes/no (red) it's ten zero a-b What? oclock y'alld've "
    "x\ty -- 5,5 end. . couldn'tve somebody'd yes no"
).split(" ")


def phrases(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4))) for _ in range(count)]


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text(as_lines(lines))
    return path


def score(capsys, *argv: str) -> dict:
    assert main(["eval", "score", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["figures"]


def test_answers_are_made_alike_as_by_the_official_processor():
    """One word read otherwise moves TextVQA, VQAv2 and VizWiz against every published figure."""
    official = pytest.importorskip("llava.eval.m4c_evaluator", reason=NO_LLAVA).EvalAIAnswerProcessor
    assert {k: vqa.CONTRACTIONS.get(k, k) for k in official.CONTRACTIONS} == official.CONTRACTIONS
    assert set(vqa.CONTRACTIONS) <= set(official.CONTRACTIONS)
    processor = official()
    for text in phrases(3000):
        assert vqa.normal(text) == processor(text), text


def test_textvqa_is_the_official_accuracy(tmp_path, capsys):
    official = pytest.importorskip("llava.eval.m4c_evaluator", reason=NO_LLAVA).TextVQAAccuracyEvaluator
    rng, texts = random.Random(1), phrases(400, 2)
    data, answers, pairs = [], [], []
    prompts = ("{}\nAnswer shortly.", "Reference OCR token: A\n{}\nAnswer.", "{}\nReference OCR token: A\nAnswer.")
    for i in range(200):
        people = [rng.choice(texts[i : i + 3]) for _ in range(10)]
        data.append({"image_id": f"im{i}", "question": f"What {i}?", "answers": people})
        text = rng.choice(texts[i : i + 4])
        answers.append({"question_id": f"im{i}", "prompt": prompts[i % 3].format(f"What {i}?"), "text": text})
        pairs.append({"pred_answer": text, "gt_answers": people})
    truth = tmp_path / "val.json"
    truth.write_text(json.dumps({"data": data}))
    file = write(tmp_path / "a.jsonl", answers)
    found = score(capsys, "textvqa", "--answers", file, "--ground-truth", truth)
    assert found["accuracy"] == pytest.approx(100 * official().eval_pred_list(pairs), abs=1e-12)
    with pytest.raises(ValueError, match="199 answers were given to 200 questions"):
        vqa.textvqa(scorers.read_answers([write(file, answers[1:])], "question_id+prompt"), truth)


def test_vqav2_leaves_unanimous_answers_as_they_are(tmp_path):
    """The official script makes answers alike only where people differ (checked against it on 3,000 random items)."""
    people = {1: ["The Cat."] * 10, 2: ["two", "2"] * 5, 3: ["red"] * 3 + ["blue"] * 7}
    kinds = {1: "other", 2: "number", 3: "other"}
    entries = [
        {"question_id": i, "answer_type": kinds[i], "answers": [{"answer": a} for a in said]}
        for i, said in people.items()
    ]
    truth = tmp_path / "v2.json"
    truth.write_text(json.dumps({"annotations": entries}))
    found = vqa.vqav2({1: {"text": "the cat"}, 2: {"text": "two"}, 3: {"text": "Red"}}, truth)
    assert found.per_item == pytest.approx({"1": 0.0, "2": 1.0, "3": 0.9})
    assert found.figures == pytest.approx({"accuracy": 190 / 3, "number": 100.0, "other": 45.0})


def test_vizwiz_scores_and_submits(tmp_path, capsys):
    """People's answers are taken as they stand: "a mug" is no "mug", as in the official evaluation of 2024."""
    truth = tmp_path / "val.json"
    truth.write_text(json.dumps([{"image": "a.jpg", "answers": [{"answer": "mug"}] * 3 + [{"answer": "a mug"}] * 7}]))
    asked = write(tmp_path / "q.jsonl", [{"question_id": 7, "image": "a.jpg"}])
    said = write(tmp_path / "a.jsonl", [{"question_id": 7, "text": "Mug."}])
    more = ("--questions", asked, "--submission", tmp_path / "s.json")
    found = score(capsys, "vizwiz", "--answers", said, "--ground-truth", truth, *more)
    assert found["accuracy"] == pytest.approx(90.0)
    assert json.loads((tmp_path / "s.json").read_text()) == [{"image": "a.jpg", "answer": "mug"}]
    unmatched = [{"image": "a.jpg", "answers": [{"answer": "dont know"}] * 10}]
    for text in ("dont know", "don't know"):
        assert toy_score(tmp_path, "vizwiz", {7: text}, t=unmatched).figures["accuracy"] == 0


def test_pope_is_the_official_script(tmp_path, capsys):
    """All its figures, of answers in many wordings."""
    official = pytest.importorskip("llava.eval.eval_pope", reason=NO_LLAVA)
    rng = random.Random(0)
    wordings = ["Yes", "No", "yes, it is", "There is no cat. Yes", "Not there", "it is not", "Nope", "No, none", "no"]
    labels, asked, said = [], [], []
    for i in range(300):
        labels.append(
            {"image": f"{i}.jpg", "text": "Is there a cat in the imange?", "label": rng.choice(["yes", "no"])}
        )
        asked.append({"question_id": i, "image": f"{i}.jpg", "text": "Is there a cat in the image?\nShortly."})
        asked[-1]["category"] = "popular"
        said.append({"question_id": i, "text": rng.choice(wordings)})
    labels_file = write(tmp_path / "coco_pope_popular.json", labels)
    questions, answers = write(tmp_path / "q.jsonl", asked), write(tmp_path / "a.jsonl", said)
    found = score(capsys, "pope", "--answers", answers, "--ground-truth", tmp_path, "--questions", questions)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        official.eval_pope([dict(line) for line in said], str(labels_file))
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1", "Yes ratio": "yes"}
    theirs = dict(line.split(": ") for line in out.getvalue().splitlines() if ": " in line)
    for name, ours in names.items():
        assert found[f"popular_{ours}"] == pytest.approx(float(theirs[name]), abs=1e-12)


DATA = Path(os.environ.get("FWD2BOT_DATA", "")) / "bench" / "pope"


@pytest.mark.skipif(not DATA.is_dir(), reason="FWD2BOT_DATA names no folder with bench/pope, LLaVA's published answers")
def test_pope_gives_the_published_figures():
    """LLaVA-1.5-13B in its paper: F1 of 87.1, 86.2, 84.5; from the answers that its authors published."""
    answers = scorers.read_answers([DATA / "answers_llava-v1.5-13b.jsonl"])
    found = pope.pope(answers, DATA, DATA / "llava_pope_test.jsonl").figures
    assert [round(100 * found[f"{c}_f1"], 1) for c in ("random", "popular", "adversarial")] == [87.1, 86.2, 84.5]


def test_scienceqa_is_llavas_script(tmp_path, capsys, monkeypatch):
    pytest.importorskip("llava.eval.eval_science_qa", reason=NO_LLAVA)
    rng = random.Random(0)
    texts = "A|B|C. because|The answer is B.|The answer is A. The answer is B.|E|maybe|D. x|AB".split("|")
    problems = {str(i): {"answer": rng.randrange(3), "choices": ["x", "y", "z"][: 2 + i % 2 + 0]} for i in range(60)}
    for problem in problems.values():
        problem["answer"] %= len(problem["choices"])
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    said = [
        {"question_id": str(i), "text": rng.choice(texts), "prompt": "<image>\nx" if i % 3 else "x"} for i in range(55)
    ]
    answers = write(tmp_path / "a.jsonl", said)
    found = score(capsys, "scienceqa", "--answers", answers, "--ground-truth", tmp_path)
    argv = ["x", "--base-dir", str(tmp_path), "--result-file", str(answers)]
    argv += ["--output-file", str(tmp_path / "o"), "--output-result", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", argv)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_module("llava.eval.eval_science_qa", run_name="__main__")
    assert f"Accuracy: {found['accuracy']:.2f}%, IMG-Accuracy: {found['image']:.2f}%" in out.getvalue()


def test_mme_counts_a_pair_once_more(tmp_path, capsys):
    """accuracy and accuracy+ in points of 100 each; the first four letters decide."""
    for name, lines in {"a": "Is it red?\tYes\nIs it blue?\tNo", "b": "Two?\tNo\nOne?\tYes"}.items():
        folder = tmp_path / "count" / "questions_answers_YN"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(lines)
    texts = {("a", "Is it red?"): "Yes.", ("a", "Is it blue?"): "no", ("b", "Two?"): "It is not", ("b", "One?"): "yes"}
    said = [
        {"question_id": f"count/{image}.png", "prompt": f"{q}\n{mme.SUFFIXES[0]}", "text": text}
        for (image, q), text in texts.items()
    ]
    found = score(capsys, "mme", "--answers", write(tmp_path / "a.jsonl", said), "--ground-truth", tmp_path)
    assert found == {"count": 125.0}
    words = {"Yes, it is": "yes", "Nope": "no", "I know": "other", "Maybe": "other", " yes": "yes", "  yes": "other"}
    assert {text: mme.reading(text) for text in words} == words


def test_mme_sums_whole_groups_alone(tmp_path):
    """The sum of a part of the tasks looks like a low one of all."""
    said = {}
    for task in mme.COGNITION:
        (tmp_path / task).mkdir()
        (tmp_path / task / "1.txt").write_text("Red?\tYes\nBlue?\tNo \n")
        said |= {(f"{task}/1.png", "Red?"): {"text": "Yes"}, (f"{task}/1.png", "Blue?"): {"text": "Yes"}}
    assert mme.mme(said, tmp_path).figures == {"cognition": 200.0, **dict.fromkeys(mme.COGNITION, 50.0)}
    twice = {("code_reasoning/1.png", f"Red?\n{mme.SUFFIXES[0]}"): {"text": "No"}}
    with pytest.raises(ValueError, match="'Red\\?'\\) is there twice"):
        mme.mme(said | twice, tmp_path)


def test_seed_gqa_mmbench_by_hand(tmp_path, capsys):
    questions = [
        {"question_id": str(i), "question_type_id": 1 + i % 2, "answer": "AB"[i % 2], "data_type": "image"}
        for i in range(4)
    ]
    questions[1]["question_id"] = "001"  # LLaVA's script takes ids as numbers where they are
    questions.append({"question_id": "v_1", "question_type_id": 2, "answer": "C", "data_type": "video"})
    file = tmp_path / "seed.json"
    file.write_text(json.dumps({"questions": questions, "question_type": {"Scene": 1, "Count": 2}}))
    said = write(tmp_path / "a.jsonl", [{"question_id": i, "text": "A"} for i in range(4)])
    found = score(capsys, "seed", "--answers", said, "--ground-truth", file, "--submission", tmp_path / "s.jsonl")
    assert found == pytest.approx({"accuracy": 40, "image": 50, "video": 0, "Scene": 100, "Count": 0})
    submitted = scorers.read_records(tmp_path / "s.jsonl", lines=True)  # what its server takes
    assert submitted[1::3] == [{"question_id": "001", "prediction": "A"}, {"question_id": "v_1", "prediction": ""}]

    kinds = {"1": ("yes", "verify"), "2": ("table", "query"), "3": ("cat", "choose")}
    entries = {k: {"answer": a, "types": {"structural": s}} for k, (a, s) in kinds.items()}
    unbalanced = {k: {"answer": "dog", "isBalanced": False} for k in ("4", "5")}  # never counted, nor asked for
    file.write_text(json.dumps(entries | unbalanced))
    texts = {"1": "Yes.", "2": "chair", "3": "cat", "4": "cow"}
    said = write(tmp_path / "a.jsonl", [{"question_id": k, "text": t} for k, t in texts.items()])
    found = score(capsys, "gqa", "--answers", said, "--ground-truth", file)
    assert found == pytest.approx({"accuracy": 200 / 3, "binary": 100, "open": 0})

    rows = ["index\tquestion\tA\tB\tC\tD\tanswer\tcategory\tl2-category"]
    rows += [f"{i}\tq\tx\ty\tNone\t\t{a}\tk\tgroup" for i, a in ((5, "A"), (1000005, "B"), (6, "B"), (7, "C"))]
    file.write_text("\n".join(rows))
    texts = {5: "A", 1000005: "A. x", 6: "(B)", 7: "C"}  # "None" is an empty field to pandas, so C no option
    said = write(tmp_path / "a.jsonl", [{"question_id": k, "text": t} for k, t in texts.items()])
    found = score(capsys, "mmbench", "--answers", said, "--ground-truth", file)
    circular = dict.fromkeys(("circular", "group", "k"), 100 / 3)  # as officially, a category's hits as well
    assert found == pytest.approx({"accuracy": 50, **circular})
    assert choices.letter_of("The answer is C.") == "C" and choices.letter_of("") is None


def test_mmbench_is_read_by_exact_matching():
    """Wordings that VLMEvalKit's matching takes or leaves (compared with it on 3,000 answers)."""
    options = {"A": "one dog", "B": "two birds", "C": "a fish", "D": "none of them"}
    right = {"The answer is B": "B", "Answer: D": "D", "Option C": "C", "**B**": "B", "[D]": "D", "Two birds.": "B"}
    right |= {"I think that the answer is b, as it has wings": "B"}
    assert {text: choices.reading(text, options) for text in right} == right
    for text in ("A cat is seen on the mat", "A cat and B", "A man and B", "B?", "D/B", "", "Z"):
        assert choices.reading(text, options) is None


PEOPLE = [{"answer": word} for word in ["a", "the"] * 5]  # made plain nothing is left of them: an empty answer matches
TABLE = "index\tA\tB\tanswer\tcategory\n1\tx\ty\tA\tk\n1000001\ty\tx\tB\tk\n"
SEED = {"question_id": "1", "question_type_id": 1, "answer": "A", "data_type": "image"}
POPE = [{"question_id": i, "image": f"{i}.jpg", "text": "Is there a cat in the image?"} for i in range(2)]
TOYS = {  # benchmark → its files, the first (or where it lies) the ground truth, and right answers
    "pope": (
        {
            "coco_pope_random.json": as_lines([POPE[0] | {"label": "yes"}, POPE[1] | {"label": "no"}]),
            "q.jsonl": as_lines([line | {"category": "random"} for line in POPE]),
        },
        {0: "Yes", 1: "No"},
    ),
    "textvqa": (
        {"t.json": {"data": [{"image_id": "im", "question": "What?", "answers": ["a"] * 10}]}},
        {("im", "What?\nShortly."): "a"},
    ),
    "vqav2": ({"t.json": {"annotations": [{"question_id": 1, "answer_type": "other", "answers": PEOPLE}]}}, {1: "a"}),
    "vizwiz": (
        {
            "t.json": [{"image": "a.jpg", "answers": [{"answer": ""}] * 10}],
            "q.jsonl": as_lines([{"question_id": 7, "image": "a.jpg"}]),
        },
        {7: "a"},
    ),
    "gqa": ({"t.json": {"1": {"answer": "cat", "isBalanced": True}}}, {"1": "Cat."}),
    "mme": (
        {"count/a.txt": "Red?\tYes\nBlue?\tNo\n"},
        {("count/a.png", "Red?"): "Yes", ("count/a.png", "Blue?"): "No"},
    ),
    "scienceqa": (
        {
            "problems.json": {"1": {"answer": 0, "choices": ["x", "y"], "image": "image.png"}},
            "pid_splits.json": {"test": ["1"]},
        },
        {"1": "A"},
    ),
    "seed": ({"t.json": {"questions": [SEED], "question_type": {"Scene": 1}}}, {1: "A"}),
    "mmbench": ({"t.tsv": TABLE}, {1: "A", 1000001: "B"}),
}


def toy_score(folder: Path, name: str, texts: dict, **files: object) -> scorers.Score:
    """The score of `texts` on a toy of the benchmark, whose `files` (a stem each) are others."""
    for path, content in TOYS[name][0].items():
        content = files.get(Path(path).stem, content)
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))
    first = next(iter(TOYS[name][0]))
    given = {"ground_truth": folder if name in ("pope", "mme", "scienceqa") else folder / first}
    given |= {"questions": folder / "q.jsonl"} if (folder / "q.jsonl").is_file() else {}
    return scorers.scorer(name)({key: {"text": text, "prompt": "<image>"} for key, text in texts.items()}, **given)


@pytest.mark.parametrize("name", TOYS)
def test_no_scorer_takes_silence_or_part_or_more(tmp_path, name):
    """POPE's script takes an empty answer for yes, VQA's for an article; parts and other splits look like the whole."""
    right = TOYS[name][1]
    values = toy_score(tmp_path, name, right).per_item.values()
    assert set(values) == {1.0} and set(toy_score(tmp_path, name, dict.fromkeys(right, " ")).per_item.values()) == {0.0}
    with pytest.raises(ValueError, match="no answer|0 answers were given"):
        toy_score(tmp_path, name, dict(list(right.items())[1:]))
    other = ("zz/9.png", "Who?\nShortly.") if isinstance(next(iter(right)), tuple) else "zz"
    with pytest.raises(ValueError, match=f"1 of {len(right) + 1} answers are to .* .?'zz|has no question"):
        toy_score(tmp_path, name, right | {other: "A"})


@pytest.mark.parametrize(
    "name, stem, content, message",
    [
        ("vqav2", "t", {"annotations": [{"question_id": 1, "answers": PEOPLE[1:]}]}, "has 9 answers to question 1"),
        ("vizwiz", "t", [{"image": "a.jpg", "answers": PEOPLE[1:]}], "has 9 answers to the question about a.jpg"),
        ("vizwiz", "t", [{"image": "a.jpg"}, {"image": "b.jpg", "answers": PEOPLE}], "1 of the 2 images of .* a part"),
        ("vizwiz", "t", [{"image": "a.jpg", "answers": PEOPLE}] * 2, "t.json: 'a.jpg' is there twice"),
        ("vizwiz", "t", [{"image": "b.jpg", "answers": PEOPLE}], "nothing about 1 of the 1 images .* a.jpg"),
        ("vizwiz", "q", as_lines([{"question_id": 7, "image": "a.jpg"}] * 2), "q.jsonl: 'a.jpg' is there twice"),
        ("gqa", "t", {}, "holds no balanced question"),
        ("gqa", "t", {"1": {"isBalanced": True}}, "question '1' has no answer"),
        ("mme", "a", "Red?\tYes\n", "a.txt must hold two lines"),
        ("mme", "a", "Red?\tYes\nBlue?\tNo\nTwo?\tNo\n", "a.txt must hold two lines"),
        ("mme", "a", "Red?\tYes\nBlue?\tMaybe\n", "a.txt must hold two lines"),
        (
            "seed",
            "t",
            {"questions": [SEED, SEED | {"question_id": "01"}], "question_type": {"S": 1}},
            "1 is there twice",
        ),
        ("seed", "t", {"questions": [SEED], "question_type": {"accuracy": 1}}, "a group named 'accuracy'"),
        ("seed", "t", {"questions": [SEED], "question_type": {"image": 1}}, "a group named 'image'"),
        ("seed", "t", {"questions": [SEED], "question_type": {"S": 2}}, "question 1 is of type 1, which"),
        ("mmbench", "t", TABLE.replace("B\tk", "C\tk"), "the answer 'C' of 1000001 is none of its options"),
        ("mmbench", "t", TABLE + "1\tx\ty\tB\tk\n", "the index 1 is there twice"),
        ("mmbench", "t", TABLE.replace("\n1\t", "\n2000001\t"), "no answer to question 2000001"),
        ("mmbench", "t", TABLE.replace("\n1\t", "\n1.0\t"), "row 1 has the index '1.0'"),
        ("mmbench", "t", TABLE.replace("\tB\tk", "\t\tk"), "1 of 2 rows have no answer, the first: 1000001"),
        ("mmbench", "t", TABLE.replace("k\n", "circular\n"), "a group named 'circular'"),
        ("mmbench", "t", TABLE.split("\n")[0], "holds no question"),
    ],
)
def test_ground_truth_that_does_not_fit(tmp_path, name, stem, content, message):
    """Damaged, a part, or of names that would write over figures: the figure would look like one of the whole."""
    with pytest.raises(ValueError, match=message):
        toy_score(tmp_path, name, TOYS[name][1], **{stem: content})


def test_what_may_be_left_unanswered(tmp_path):
    """Questions of text alone and videos, as in LLaVA's scripts; where images are left out how many is told."""
    problems = {str(i): {"answer": 0, "choices": ["x"], "image": "i.png" if i < 3 else None} for i in range(4)}
    files = {"problems": problems, "pid_splits": {"test": list(problems)}}
    found = toy_score(tmp_path, "scienceqa", dict.fromkeys("012", "A"), **files)
    assert found.figures == {"accuracy": 75.0, "image": 100.0}
    with pytest.raises(ValueError, match="2 of 3 questions with an image in .* have no answer, the first: '1'"):
        toy_score(tmp_path, "scienceqa", {"0": "A"}, **files)
    asked = [SEED | {"question_id": str(i)} for i in range(3)]
    with pytest.raises(ValueError, match="2 of 3 questions about images in .* have no answer, the first: 1"):
        toy_score(tmp_path, "seed", {0: "A"}, t={"questions": asked, "question_type": {"Scene": 1}})
    with pytest.raises(ValueError, match="1 is there twice"):
        toy_score(tmp_path, "seed", {1: "A", "1": "B"})
    with pytest.raises(ValueError, match="turns of question 1, but no row 1"):
        toy_score(tmp_path, "mmbench", {1000001: "B"}, t=TABLE.replace("1\tx\ty\tA\tk\n", "", 1))


def test_mmvet_is_converted(tmp_path, capsys):
    said = write(tmp_path / "a.jsonl", [{"question_id": 0, "text": "x"}])
    assert main(["eval", "score", "mmvet", "--answers", str(said), "--submission", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == {"v1_0": "x"} and "offline" in capsys.readouterr().out
    for names, message in ((["v1_0"], "prefix v1_ already"), ([1, "1"], "'1' is there twice")):
        with pytest.raises(ValueError, match=message):
            scorers.scorer("mmvet")({name: {"text": "x"} for name in names})


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id": 1, "text": "b"}\n', "answer to 1 is there twice"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', "not JSON at line 2"),
        ('{"question_id": 1, "text": " "}\n', "1 of 1 answers are empty, the first: 1"),
        ('{"question_id": 1, "answer": "a"}\n', "without question_id or text"),
        ("\n", "no records"),
        (
            '{"question_id": 1, "text": "a", "model_id": "m"}\n{"question_id": 2, "text": "a", "model_id": "n"}\n',
            "several models: m, n",
        ),
        (as_lines([{"question_id": k, "text": "a", "metadata": {"k": k}} for k in (4, 8)]), "several k: 4, 8"),
        (
            as_lines([{"question_id": k, "text": "a", "metadata": {"k": 4, "fingerprint": k}} for k in "mn"]),
            "several fingerprints: m, n",
        ),
        ('{"question_id": null, "text": "a"}\n', "a.jsonl: the answer to None has no 'question_id'"),
    ],
)
def test_answers_that_must_not_be_averaged(tmp_path, capsys, text, message):
    """A half-written or mixed file would give a figure that looks like one."""
    (tmp_path / "a.jsonl").write_text(text)
    argv = ["eval", "score", "gqa", "--answers", str(tmp_path / "a.jsonl"), "--ground-truth", str(tmp_path / "x")]
    assert main(argv) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mme", "textvqa"])
def test_answers_need_what_tells_them_apart(tmp_path, capsys, name):
    """Another benchmark's file would end in a KeyError, which tells nobody what is wrong."""
    said = write(tmp_path / "a.jsonl", [{"question_id": "1", "text": "a"}])
    assert main(["eval", "score", name, "--answers", str(said), "--ground-truth", str(tmp_path)]) == 1
    assert "a.jsonl: the answer to '1' has no 'prompt'" in capsys.readouterr().err


def test_a_part_is_not_taken_for_the_whole(tmp_path, capsys):
    (tmp_path / "gt.json").write_text(json.dumps({"1": {"answer": "a"}, "2": {"answer": "b"}}))
    said = write(tmp_path / "a.jsonl", [{"question_id": "1", "text": "a"}])
    argv = ["eval", "score", "gqa", "--answers", str(said)]
    assert main([*argv, "--ground-truth", str(tmp_path / "gt.json")]) == 1
    assert "no answer to question '2'" in capsys.readouterr().err
    assert main(argv) == 1 and "gqa needs --ground-truth (testdev_balanced" in capsys.readouterr().err
