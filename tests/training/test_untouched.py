"""What no row of a step touches still takes part in it, on one process as on many."""

import json

import torch
from train_toys import command

from llava_fwd2bot.training.command import train


def test_the_temperature_goes_on_through_a_step_without_captions(base_dir, llava_data, tmp_path):
    """Without a gradient AdamW passes over a weight and its averages; on several ranks it has one of zero."""
    records = json.loads(llava_data["data"].read_text())
    for record in records[4:]:
        del record["caption"]
    llava_data["data"].write_text(json.dumps(records))
    more = (
        "--train_sampling_strategy",
        "sequential",
        "--max_steps",
        "3",
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
    )
    output = train(command(base_dir, llava_data, tmp_path / "m", *more, "--save_steps", "3"))
    saved = torch.load(output / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert {float(state["step"]) for state in saved["state"].values()} == {3.0}
