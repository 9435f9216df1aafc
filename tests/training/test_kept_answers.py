"""Kept answers while training: to which share of a sample of questions Fwd2Bot gives the base's answer."""

import json
import random
import warnings

import pytest
import torch
from conftest import toy_processor
from sharded_toys import mixed_data, on_two_processes
from test_evaluating import evaluating, evaluations
from train_toys import command
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_fwd2bot import answer, load_fwd2bot
from llava_fwd2bot.processing import answer as answering
from llava_fwd2bot.processing.normal import normal
from llava_fwd2bot.training.arguments import parse
from llava_fwd2bot.training.command import train
from llava_fwd2bot.training.data import LlavaDataset
from llava_fwd2bot.training.kept_answers import KeptAnswers, sample

SHORT = ("--eval_kept_answers_tokens", "2")  # so short that a toy sometimes says the same


def asking(base_dir, llava_data, output, count, *more):
    return evaluating(base_dir, llava_data, output, "--eval_kept_answers", str(count), *more)


@pytest.fixture
def base_calls(monkeypatch):
    """How often the base was asked."""
    calls, own = [], answering.from_base

    def counted(*args, **options):
        calls.append(args[2])
        return own(*args, **options)

    monkeypatch.setattr(answering, "from_base", counted)
    return calls


QUESTION = "what colour is the picture?"


def need(condition):
    """Skips where the random weights of this version of transformers show nothing more than what was asserted."""
    if not condition:
        pytest.skip("with this version's random weights no answer of the toy is kept")


@pytest.fixture
def taught(base_dir, llava_data):
    """The data, with the base's own answers as the right ones in every second record."""
    records = json.loads(llava_data["data"].read_text())
    base, processor = LlavaForConditionalGeneration.from_pretrained(base_dir), AutoProcessor.from_pretrained(base_dir)
    images = [llava_data["images"] / record["image"] for record in records]
    said = answer(base, processor, [QUESTION] * len(images), images, max_new_tokens=2)
    for record, text in zip(records[::2], said[::2], strict=True):
        record["conversations"][1]["value"] = text
    llava_data["data"].write_text(json.dumps(records))
    return {**llava_data, "pictures": images, "right": [record["conversations"][1]["value"] for record in records]}


def test_the_metric_is_what_the_checkpoint_answers(base_dir, taught, tmp_path, base_calls):
    """Recomputed from the saved model by `answer`, one question at a time; the data's own answers count as well."""
    images, right, options = taught["pictures"], taught["right"], {"max_new_tokens": 2, "batch_size": 1}
    saving = ("--save_strategy", "steps", "--save_steps", "2")
    output = train(asking(base_dir, taught, tmp_path / "m", 12, *SHORT, *saving))
    assert len(base_calls) == 12  # at the first of two evaluations
    found = evaluations(output)
    assert [entry["step"] for entry in found] == [2, 4]
    for entry in found:
        model, processor = load_fwd2bot(output / f"checkpoint-{entry['step']}")
        pairs = [
            answer(model, processor, [QUESTION] * len(images), images, base=base, **options) for base in (False, True)
        ]
        kept = sum(normal(a) == normal(b) for a, b in zip(*pairs, strict=True)) / 12
        assert entry["eval_kept_answers"] == pytest.approx(kept)
        short = [len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) <= 2 for text in right]
        for name, texts in zip(("eval_answers_right", "eval_base_answers_right"), pairs, strict=True):
            hits = [normal(a) == normal(b) for a, b, fits in zip(texts, right, short, strict=True) if fits]
            assert entry[name] == pytest.approx(sum(hits) / len(hits))
    card = (output / "README.md").read_text()
    assert "eval kept answers" in card
    need(0 < found[0]["eval_kept_answers"] < 1 and 0 < found[0]["eval_answers_right"] < 1)


def test_a_resumed_run_keeps_the_base_s_answers(base_dir, llava_data, tmp_path, base_calls):
    """They are read where all that they depend on is the same, and made again where a picture or the length is not."""
    saving = ("--save_strategy", "steps", "--save_steps", "2")

    def run(steps, *more):
        base_calls.clear()
        argv = asking(base_dir, llava_data, tmp_path / "m", 5, *saving, "--save_total_limit", "1", *more)
        argv[argv.index("--max_steps") + 1] = str(steps)
        (tmp_path / "m" / "training_run.json").unlink(missing_ok=True)
        train([*argv, "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "True"] if steps > 2 else argv)
        return len(base_calls)

    assert run(2) == 5
    (file,) = (tmp_path / "m").glob("base_answers_*.json")
    saved = json.loads(file.read_text())
    assert [line["record"] for line in saved["questions"]] == [f'record {i} (id "{i}")' for i in (0, 2, 4, 7, 9)]
    with pytest.warns(UserWarning, match="was trained with other settings"):
        assert run(4) == 0
    with pytest.warns(UserWarning, match="was trained with other settings"):
        assert run(6, *SHORT) == 5
    picture = llava_data["images"] / "0.png"
    picture.write_bytes((llava_data["images"] / "1.png").read_bytes())
    with pytest.warns(UserWarning, match="was trained with other settings"):
        assert run(8) == 5
    files = sorted((tmp_path / "m").glob("base_answers_*.json"))
    assert len(files) == 3
    for file in files:
        file.write_text(file.read_text()[:-20])
    with pytest.warns(UserWarning, match="cannot be used .* not valid JSON.*; the base answers again"):
        assert run(10) == 5


def test_the_best_checkpoint_by_kept_answers(base_dir, taught, tmp_path):
    """More is better: training ends when no later evaluation has more, and the best one is the result."""
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "kept_answers", "--save_total_limit", "20")
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--early_stopping_patience", "2")
    output = train(asking(base_dir, taught, tmp_path / "m", 12, *SHORT, *best, *saving, "--max_steps", "20"))
    state = json.loads((output / "trainer_state.json").read_text())
    scored = {entry["step"]: entry["eval_kept_answers"] for entry in evaluations(output)}
    kept = max(scored, key=scored.get)
    assert state["best_metric"] == scored[kept] and state["best_model_checkpoint"].endswith(f"checkpoint-{kept}")
    assert state["global_step"] == kept + 4 < 20
    saved = (output / f"checkpoint-{kept}" / "fwd2bot.safetensors").read_bytes()
    assert (output / "fwd2bot.safetensors").read_bytes() == saved
    need(scored[kept] > 0)


def test_training_is_the_same_with_and_without(base_dir, llava_data, tmp_path):
    """Generating within a run must leave no trace: neither in random numbers, nor in the mode of the model."""
    outputs = [train(asking(base_dir, llava_data, tmp_path / str(n), n, "--lora_dropout", "0.3")) for n in (0, 4)]
    one, other = [(output / "fwd2bot.safetensors").read_bytes() for output in outputs]
    assert one == other


def test_bfloat16_with_gradient_checkpointing(base_dir, llava_data, tmp_path):
    """As most runs are: a base in half precision, float32 adapters, no cache of keys while training."""
    more = ("--bf16", "True", "--gradient_checkpointing", "True", *SHORT)
    for entry in evaluations(train(asking(base_dir, llava_data, tmp_path / "m", 3, *more))):
        assert 0 <= entry["eval_kept_answers"] <= 1


# ---------------------------------------------------------------------- the sample
def mixed(folder):
    return LlavaDataset(mixed_data(folder), toy_processor(), folder / "images")


def test_the_sample_is_spread_over_the_questions_about_images(tmp_path):
    """Rows of text or of a caption alone are passed over; the global generator has no say."""
    dataset = mixed(tmp_path)
    able = [i for i in range(24) if i % 4 in (0, 3)]
    names = [question.record for question in sample(dataset, 100)]
    assert names == [f'record {i} (id "{i}")' for i in able]
    random.seed(3)
    torch.manual_seed(3)
    assert [question.record for question in sample(dataset, 4)] == [
        f'record {able[at]} (id "{able[at]}")' for at in (0, 3, 6, 9)
    ]


def test_of_several_turns_the_first_question_is_asked(tmp_path):
    """Its images alone go with it; a record whose first question shows none is passed over."""
    mixed_data(tmp_path)

    def turns(*texts):
        return [{"from": "human" if at % 2 == 0 else "gpt", "value": text} for at, text in enumerate(texts)]

    records = [
        {"id": "a", "image": ["0.png", "1.png"], "conversations": turns("<image> hi?", "red", "<image> and?", "blue")},
        {"id": "b", "image": "2.png", "conversations": turns("hello?", "red", "<image> and?", "blue")},
    ]
    path = tmp_path / "turns.json"
    path.write_text(json.dumps(records))
    (question,) = sample(LlavaDataset(path, toy_processor(), tmp_path / "images"), 5)
    assert question.images == ("0.png",) and question.answer == "red"
    assert "hi?" in question.prompt and "and?" not in question.prompt and "red" not in question.prompt


def test_more_questions_than_the_data_have_are_told_once(base_dir, llava_data, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        output = train(asking(base_dir, llava_data, tmp_path / "m", 99))
    told = [str(w.message) for w in told if "eval_kept_answers" in str(w.message)]
    assert len(told) == 1 and "99: the evaluation data have 12 record(s)" in told[0]
    assert len(evaluations(output)) == 2


@pytest.mark.filterwarnings("ignore:skipped a picture")
def test_a_damaged_picture_is_an_error_or_is_left_out(base_dir, llava_data, tmp_path):
    """As in training: by name, or with --on_bad_image skip without its question."""
    folder, other = llava_data["images"], tmp_path / "others"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "3.png").write_bytes(b"no picture")
    more = ("--eval_image_folder", str(other), "--on_bad_image", "skip")
    train(asking(base_dir, llava_data, tmp_path / "m", 12, *more))
    (file,) = (tmp_path / "m").glob("base_answers_*.json")
    lines = json.loads(file.read_text())["questions"]
    assert [line["answer"] is None for line in lines] == [at == 3 for at in range(12)]
    for entry in evaluations(tmp_path / "m"):
        assert (entry["eval_kept_answers"] * 11) % 1 == pytest.approx(0, abs=1e-9)

    dataset = LlavaDataset(llava_data["data"], toy_processor(), other)
    asked = KeptAnswers(dataset, 12, 2, dataset.reader.processor)
    with pytest.raises(ValueError, match=r'record 3 \(id "3"\): .*3.png'):
        asked._open(asked.questions[3], {})


# ---------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_kept_answers", "-1"), "a number of questions, or 0 for none, got -1"),
        (("--eval_kept_answers", "3", "--eval_kept_answers_tokens", "0"), "_tokens must be at least 1"),
        (("--metric_for_best_model", "kept_answers"), "needs --eval_kept_answers N"),
        (("--eval_kept_answers", "3", "--fsdp", "full_shard"), "does not run under FSDP"),
        (("--eval_kept_answers", "3", "--fwd2bot_adapters", "none"), "trains the base itself"),
        (("--eval_kept_answers", "3", "--lora_enable", "False"), "trains the base itself"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_loaded(base_dir, llava_data, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(evaluating(base_dir, llava_data, tmp_path / "m", *more))


def test_without_evaluation_data_or_fwd2bot_it_is_refused(base_dir, llava_data, tmp_path, monkeypatch):
    plain = command(base_dir, llava_data, tmp_path / "m", "--eval_kept_answers", "3")
    with pytest.raises(ValueError, match="name conversations by --eval_data_path"):
        parse(plain)
    own = ("--eval_data_path", str(llava_data["data"]), "--eval_strategy", "steps", "--eval_steps", "2")
    with pytest.raises(ValueError, match="give --fwd2bot K"):
        parse(command(base_dir, llava_data, tmp_path / "m", "--eval_kept_answers", "3", *own, fwd2bot=False))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` says it
    with pytest.raises(ValueError, match="does not run under FSDP"):
        parse([*plain, *own])


def test_zero3_is_refused(base_dir, llava_data, tmp_path, monkeypatch):
    """By transformers' own word on it, which a configuration of DeepSpeed or of accelerate sets."""
    monkeypatch.setattr("llava_fwd2bot.training.checks.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="does not run under ZeRO-3"):
        parse(asking(base_dir, llava_data, tmp_path / "m", 3))


def test_data_without_a_question_about_an_image_are_refused(base_dir, llava_data, tmp_path):
    records = [{"id": "0", "conversations": [{"from": "human", "value": "hi?"}, {"from": "gpt", "value": "red"}]}]
    path = tmp_path / "text.json"
    path.write_text(json.dumps(records))
    argv = asking(base_dir, llava_data, tmp_path / "m", 3)
    argv[argv.index("--eval_data_path") + 1] = str(path)
    with pytest.raises(ValueError, match="no record of the evaluation data has an image in its first question"):
        train(argv)


# ---------------------------------------------------------------------- ranks
@pytest.mark.parametrize("count", [5, 1])
def test_two_processes_ask_what_one_asks(base_dir, taught, tmp_path, count):
    """Each rank answers its share, and of one question a rank has none: no rank waits; the metric is one process'."""

    def argv(output, batch):
        own = asking(base_dir, taught, tmp_path / output, count, *SHORT, "--use_cpu", "True")
        own[own.index("--per_device_train_batch_size") + 1] = str(batch)
        return own

    on_two_processes(tmp_path / "log", argv("two", 2))
    train(argv("one", 4))
    one, two = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    assert len(one) == len(two) == 2
    for name in ("eval_kept_answers", "eval_answers_right", "eval_base_answers_right"):
        assert [entry.get(name) for entry in one] == [entry.get(name) for entry in two]
    (alone,), (both,) = ((tmp_path / name).glob("base_answers_*.json") for name in ("one", "two"))
    assert alone.name == both.name and alone.read_text() == both.read_text()
    need(count == 1 or one[0]["eval_kept_answers"] > 0)
