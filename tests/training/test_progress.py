"""What a run says, and that an interrupted one loses nothing."""

from __future__ import annotations

import os
import signal

import pytest
from safetensors.torch import load_file
from train_toys import command, history
from transformers import TrainerCallback

from llava_fwd2bot.training import command as module
from llava_fwd2bot.training.command import train


class _Signal(TrainerCallback):
    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes(base_dir, llava_data, tmp_path, monkeypatch, capfd, number):
    """Nothing was saved on Ctrl-C: hours of training were lost with it."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(command(base_dir, llava_data, tmp_path / "whole"))
    own = module.Fwd2BotTrainer

    def interrupted(*args, **kwargs):
        trainer = own(*args, **kwargs)
        trainer.add_callback(_Signal(number))
        return trainer

    argv = command(base_dir, llava_data, tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(module, "Fwd2BotTrainer", interrupted)
        with pytest.raises(SystemExit) as stop:
            train(argv)
    assert stop.value.code == 128 + number
    err = capfd.readouterr().err
    assert "saving a checkpoint" in err and f"Saved {tmp_path / 'm' / 'checkpoint-3'}" in err
    assert (tmp_path / "m" / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (tmp_path / "m" / "fwd2bot_config.json").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    train(argv)
    assert f"Resuming from {tmp_path / 'm' / 'checkpoint-3'}" in capfd.readouterr().err
    assert [e["step"] for e in history(tmp_path / "m")] == [e["step"] for e in history(tmp_path / "whole")]
    for name in ("fwd2bot.safetensors", "answer/adapter_model.safetensors", "compress/adapter_model.safetensors"):
        ours, whole = load_file(tmp_path / "m" / name), load_file(tmp_path / "whole" / name)
        assert all(ours[key].equal(whole[key]) for key in whole)


def test_the_header_and_the_next_command(base_dir, llava_data, tmp_path, capfd):
    """The first sign of life was a loss after 500 steps; the last one a table of seconds."""
    train(command(base_dir, llava_data, tmp_path / "m"))
    err = capfd.readouterr().err
    for part in (
        "12 rows",
        "12 images",
        "trained of",
        "steps      6 of 4 rows, on 1 × cpu",
        "Next: fwd2bot ask --model",
    ):
        assert part in err
