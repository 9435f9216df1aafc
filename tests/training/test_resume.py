"""Going on with a run: which checkpoint, the same run or another, which data are skipped or repeated."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from train_toys import command, history

from llava_fwd2bot.training.command import train
from llava_fwd2bot.training.resume import checkpoint_to_resume, data_of, moved_data, settings_of

SAVES = ("--save_strategy", "steps", "--save_steps", "1")


@pytest.fixture
def folder(tmp_path):
    """Checkpoints 2, 4 and 10, and 12, which was not finished."""
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 12:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-x").mkdir()
    return tmp_path


def test_the_named_checkpoint_wins(folder):
    """An explicit path lost to any checkpoint in the folder, and True was taken for a folder's name."""
    with pytest.warns(
        UserWarning, match=r"resumed as requested, though .* newer ones \(checkpoint-12, checkpoint-10, ch"
    ):
        assert checkpoint_to_resume(str(folder / "checkpoint-2"), folder) == str(folder / "checkpoint-2")
    for newest in ("True", "yes", "1", True, None):
        with pytest.warns(UserWarning, match="checkpoint-12 was not finished"):
            assert checkpoint_to_resume(newest, folder) == str(folder / "checkpoint-10")
    for none in ("False", "no", "0", False):
        assert checkpoint_to_resume(none, folder) is None
    assert checkpoint_to_resume(None, folder / "new") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("checkpoint-12", "no finished checkpoint of a run"),
        ("checkpoint-99", "there is no such folder"),
        ("True", "no finished checkpoint in"),
    ],
)
def test_checkpoints_that_are_not_there(folder, tmp_path, given, message):
    empty = tmp_path / "empty"
    with pytest.raises(ValueError, match=message):
        checkpoint_to_resume(given if given == "True" else str(folder / given), empty)


def layout(processes, batch, accumulation, rows=100):
    return {"rows": rows, "processes": processes, "batch": batch, "accumulation": accumulation}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (layout(8, 1, 1), "No row is skipped or repeated"),  # still 8 rows in a step
        (layout(1, 2, 1), r"^.*= 8 rows in a step, now it is .* = 2\. 60 rows are trained again: 80 of the 100"),
        (layout(2, 8, 1), r"68 rows are skipped: 80 of the 100 rows .* after 48 rows of epoch 2\."),
        (layout(2, 4, 1, rows=90), "trained with"),
    ],
)
def test_moved_data_are_told(folder, now, message):
    """Resuming counts steps, so with other processes it goes on elsewhere in the data."""
    import re

    told = moved_data(str(folder / "checkpoint-10"), layout(2, 4, 1), now)
    assert re.search(message, told)
    assert moved_data(str(folder / "checkpoint-10"), layout(2, 4, 1), layout(2, 4, 1)) is None


def test_a_finished_run(base_dir, llava_data, tmp_path, capsys):
    """Other data or settings trained nothing, exit 0, and the card then claimed the new data."""
    argv = command(base_dir, llava_data, tmp_path / "m", *SAVES, "--max_steps", "2")
    train(argv)
    files = {p: p.read_bytes() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    train(argv)
    assert "Nothing to do" in capsys.readouterr().err
    other = tmp_path / "other.json"
    records = json.loads(llava_data["data"].read_text())
    other.write_text(json.dumps(records[:8]))
    for more, message in (
        (("--data_path", str(other)), "data_path data.json → other.json"),
        (("--learning_rate", "1e-3"), "learning_rate 0.01 → 0.001"),
        (("--max_steps", "3"), "max_steps 2 → 3"),
        (("--per_device_train_batch_size", "2"), "rows in a step 4 → 2"),
        (("--fwd2bot_pooling", "last"), "pooling mean → last"),
    ):
        with pytest.raises(ValueError, match=f"is finished, and was trained with other settings: {message}"):
            train([*argv, *more])
    llava_data["data"].write_text(json.dumps(records[:8]))
    with pytest.raises(ValueError, match=r"data.json → data.json \(its content changed\)"):
        train(argv)
    assert {p: p.read_bytes() for p in (tmp_path / "m").rglob("*") if p.is_file()} == files
    (tmp_path / "m" / "training_run.json").unlink()  # as an earlier version left it
    with pytest.raises(ValueError, match="finished run of 2 steps, without a word of its data"):
        train(argv)


def test_a_run_that_was_stopped(base_dir, llava_data, tmp_path):
    """The same command goes on; another one only where the checkpoint is named, and then with a warning."""
    argv = command(base_dir, llava_data, tmp_path / "m", *SAVES, "--max_steps", "3")
    train(argv)
    (tmp_path / "cut").mkdir()
    cut = shutil.copytree(tmp_path / "m" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1")
    changed = [*command(base_dir, llava_data, tmp_path / "cut", *SAVES, "--max_steps", "2"), "--weight_decay", "0.1"]
    with pytest.raises(ValueError, match=r"other settings: .*weight_decay 0.0 → 0.1.*--resume_from_checkpoint"):
        train(changed)
    with pytest.warns(UserWarning, match="It is resumed as requested"):
        train([*changed, "--resume_from_checkpoint", str(cut)])
    assert [e["step"] for e in history(tmp_path / "cut")] == [1, 2]


def test_a_named_checkpoint_of_a_finished_run(base_dir, llava_data, tmp_path):
    argv = command(base_dir, llava_data, tmp_path / "m", *SAVES, "--max_steps", "3")
    train(argv)
    whole = history(tmp_path / "m")
    with pytest.warns(UserWarning, match="newer ones"):
        train([*argv, "--resume_from_checkpoint", str(tmp_path / "m" / "checkpoint-1")])
    assert [e["loss"] for e in history(tmp_path / "m")] == [e["loss"] for e in whole]


def test_other_processes_are_told_on_resume(base_dir, llava_data, tmp_path):
    argv = command(base_dir, llava_data, tmp_path / "m", *SAVES, "--max_steps", "2")
    train(argv)
    run = tmp_path / "m" / "checkpoint-1" / "training_run.json"
    record = json.loads(run.read_text())
    assert record["layout"] == {"rows": 12, "processes": 1, "batch": 4, "accumulation": 1}
    run.write_text(json.dumps({**record, "layout": {**record["layout"], "processes": 2}}))
    (tmp_path / "cut").mkdir()
    shutil.copytree(run.parent, tmp_path / "cut" / "checkpoint-1")
    with pytest.warns(UserWarning, match=r"2 process\(es\) x batch 4 .* 4 rows are trained again: 8 of the 12 rows"):
        train(command(base_dir, llava_data, tmp_path / "cut", "--max_steps", "2"))


def test_another_base_of_the_same_shape_is_refused(base_dir, llava_data, tmp_path, processor):
    """Its adapters would go on with weights that they were not trained on."""
    from conftest import toy_base

    train(command(base_dir, llava_data, tmp_path / "m", *SAVES, "--max_steps", "2"))
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "m" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1")
    other = tmp_path / "x" / base_dir.name
    toy_base(processor, seed=5).save_pretrained(other)
    processor.save_pretrained(other)
    with pytest.raises(ValueError, match="is not the base of this checkpoint"):
        train(command(other, llava_data, tmp_path / "cut", *SAVES, "--max_steps", "2"))


def test_what_a_run_is_known_by(tmp_path):
    from transformers import TrainingArguments

    (tmp_path / "a.json").write_text("[]")
    found = data_of(data_path=tmp_path / "a.json", caption_data=None)
    assert found["data_path"]["name"] == "a.json" and len(found["data_path"]["sha256"]) == 64 and len(found) == 1
    settings = settings_of(TrainingArguments(tmp_path, report_to="none"), seed=7)
    assert settings["seed"] == 7 and json.loads(json.dumps(settings)) == settings


def test_names_that_are_not_utf8(base_dir, llava_data, tmp_path):
    """Such a run ended when its record was written. The name is read back as it was."""
    named = {**llava_data, "data": tmp_path / os.fsdecode(b"caf\xe9.json")}
    shutil.copy(llava_data["data"], named["data"])
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"--output_dir .*out\\xe9: its name is not UTF-8; choose another name"):
        train(command(base_dir, named, tmp_path / os.fsdecode(b"out\xe9")))  # no tokenizer can be saved there
    train(command(base_dir, named, output, *SAVES, "--max_steps", "1"))
    run = json.loads((output / "training_run.json").read_text("utf-8"))
    assert run["finished"] and run["data"]["data_path"]["name"] == named["data"].name
    assert "| Data | caf\\xe9.json |" in (output / "README.md").read_text("utf-8")
    assert len(history(output)) == 1
    before = (output / "trainer_state.json").stat().st_mtime_ns
    train(command(base_dir, named, output, *SAVES, "--max_steps", "1"))  # finished: nothing to do
    assert (output / "trainer_state.json").stat().st_mtime_ns == before


def test_a_folder_with_a_name_that_is_not_utf8_has_a_hash(tmp_path):
    """Tables may lie in a folder, whose hash is also of the names in it."""
    for name in (b"a\xe9.parquet", b"a\xe8.parquet"):
        folder = tmp_path / name.hex()
        folder.mkdir()
        (folder / os.fsdecode(name)).write_text("x")
    found = [data_of(data_path=folder)["data_path"]["sha256"] for folder in tmp_path.iterdir()]
    assert len(set(found)) == 2
