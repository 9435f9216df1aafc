"""The training command's arguments for a toy, and the losses that it logged."""

from __future__ import annotations

import json


def command(base_dir, llava_data, output, *more, fwd2bot=True):
    argv = [
        *("--model_name_or_path", str(base_dir), "--data_path", str(llava_data["data"])),
        *("--image_folder", str(llava_data["images"]), "--output_dir", str(output)),
        *("--per_device_train_batch_size", "4", "--num_train_epochs", "2", "--learning_rate", "1e-2"),
        *("--logging_steps", "1", "--report_to", "none", "--lora_r", "4", "--lora_alpha", "8"),
        *("--warmup_steps", "0", "--save_strategy", "no", "--disable_tqdm", "True"),
    ]
    return [*argv, *(["--fwd2bot", "4"] if fwd2bot else []), *more]


def history(output) -> list[dict]:
    return [e for e in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in e]
