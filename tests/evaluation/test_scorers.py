"""The benchmarks' scorers against the official ones, on the same answers."""

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
from score_toys import score, toy_score, write

from llava_fwd2bot.cli.main import main
from llava_fwd2bot.evaluation import scorers
from llava_fwd2bot.evaluation.scorers import choices, mme, pope, vqa
from llava_fwd2bot.files.records import read_records

NO_LLAVA = "the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
WORDS = (
    "the a an two none cat's dog, 1,000 3.5 isnt dont U.S.A. yes/no (red) it's ten zero a-b What? oclock y'alld've "
    "x\ty -- 5,5 end. . couldn'tve somebody'd yes no"
).split(" ")


def phrases(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4))) for _ in range(count)]


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


def test_vqav2_is_submitted_without_ground_truth(tmp_path, capsys):
    """LLaVA's table has test-dev, whose answers its server alone has."""
    said = write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "The cat."}, {"question_id": 2, "text": "two"}])
    argv = ["eval", "score", "vqav2", "--answers", str(said)]
    assert main(argv) == 1 and "vqav2 needs --ground-truth" in capsys.readouterr().err
    argv += ["--submission", str(tmp_path / "s.json")]
    assert main(argv) == 1 and "vqav2 needs --questions" in capsys.readouterr().err
    asked = write(tmp_path / "test2015.jsonl", [{"question_id": i, "image": "a.jpg", "text": "?"} for i in (3, 1, 2)])
    assert main([*argv, "--questions", str(asked)]) == 0
    told = capsys.readouterr()
    assert "offline" in told.out and "2 of 3 questions are answered" in told.err
    submitted = json.loads((tmp_path / "s.json").read_text())  # of the whole split, as LLaVA's script writes it
    assert submitted == [{"question_id": i, "answer": text} for i, text in ((3, ""), (1, "cat"), (2, "2"))]
    write(asked, [{"question_id": 1, "image": "a.jpg", "text": "?"}])
    assert (
        main([*argv, "--questions", str(asked)]) == 1 and "1 of 2 answers are to questions" in capsys.readouterr().err
    )


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


def test_scienceqa_of_our_own_answers(tmp_path):
    """They name the image, and their prompt has no placeholder: the headline was the accuracy over all questions."""
    problems = {"1": {"answer": 0, "choices": ["x", "y"], "image": "i.png"}, "2": {"answer": 0, "choices": ["x", "y"]}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "2"]}))
    said = [{"question_id": "1", "text": "A", "prompt": "Which?", "image": "i.png", "model_id": "m"}]
    answers = scorers.read_answers([write(tmp_path / "a.jsonl", said)])
    found = scorers.scorer("scienceqa")(answers, ground_truth=tmp_path)
    assert found.figures == {"image": 100.0, "accuracy": 50.0} and found.per_item == {"1": 1.0}


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
    submitted = read_records(tmp_path / "s.jsonl", lines=True)  # what its server takes
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
