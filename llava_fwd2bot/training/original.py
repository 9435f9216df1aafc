"""The own `train()` of the original LLaVA, or of LLaVA-NeXT, with one extra flag.

    fwd2bot llava train <LLaVA's arguments> --fwd2bot 16

Their parser, data, conversation formats and loop run as they are. Before the trainer is made the model gets Fwd2Bot;
LoRA is then ours, one adapter per stage, so that `--lora_enable` and its rank are read here and not acted on twice.
Without the flag nothing but the repairs of hosts/original/shims.py differs from `python llava/train/train.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import random
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PretrainedConfig, Trainer
from transformers.hf_argparser import string_to_bool

from ..checkpoint.load import original_class_name
from ..config import Fwd2BotConfig, read_json
from ..hosts import host_class, install
from ..hosts.original import shims
from ..hosts.original.model import check_version
from .arguments import Fwd2BotArguments, given_settings, renamed
from .data import read_records
from .trainer import Fwd2BotTrainerMixin


def train(argv: Sequence[str], attn_implementation: str | None = None) -> None:
    """Runs LLaVA's `train()` on `argv`; `attn_implementation` is what its caller would give it.

    Raises:
        ImportError: `llava` is not installed, or transformers is of a version that it cannot run on.
        ValueError: an argument is wrong, or the base is no LLaVA.
    """
    check_version()
    own, lora, attention, theirs = _own_arguments(argv)
    attention = attention or attn_implementation
    with shims.importable():
        module = importlib.import_module("llava.train.train")
        trainer = importlib.import_module("llava.train.llava_trainer")
    if hasattr(module.TrainingArguments, "attn_implementation"):  # LLaVA-NeXT: an argument of theirs, not train()'s
        theirs += ["--attn_implementation", attention] if attention else []
    with shims.applied(module, trainer), _command_line(_names_of_today(theirs)):
        if own.fwd2bot is None:
            given_settings(own, argparse.Namespace(lora_enable=True))  # refuses --fwd2bot_… without --fwd2bot
            sys.argv += ["--lora_enable", str(lora)]
            return module.train(attention)
        _check(theirs)
        with shims.rebound(module, **_with_fwd2bot(module, own, lora)):
            return module.train(attention)


def _names_of_today(argv: Sequence[str]) -> list[str]:
    """The command line with the names that this transformers has."""
    return renamed(argv) if shims.needed("arguments") else list(argv)


def _check(theirs: Sequence[str]) -> None:
    """Refuses, before anything is loaded, what does not go with --fwd2bot.

    Raises:
        ValueError: the base is no LLaVA on disk, another stage of training, ZeRO-3, the vision tower, no gradients.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model_name_or_path", "pretrain_mm_mlp_adapter", "mm_tunable_parts", "trainer_mode", "deepspeed"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--tune_mm_mlp_adapter", nargs="?", const="True", default="False")
    given, _ = parser.parse_known_args(list(theirs))
    parts = (given.mm_tunable_parts or "").split(",")  # LLaVA-NeXT's
    if string_to_bool(given.tune_mm_mlp_adapter) or parts == ["mm_mlp_adapter"]:
        raise ValueError(
            "--tune_mm_mlp_adapter is LLaVA's first stage, the projector alone: do that first, without --fwd2bot; then "
            "train what it gives with --fwd2bot."
        )
    if given.pretrain_mm_mlp_adapter or not original_class_name(given.model_name_or_path or ""):
        raise ValueError(
            f"--fwd2bot needs a whole LLaVA as --model_name_or_path, such as liuhaotian/llava-v1.5-7b, not "
            f"{given.model_name_or_path} with a projector put on it: its checkpoints are opened on that base again."
        )
    if "mm_vision_tower" in parts:
        raise ValueError("--fwd2bot leaves the vision tower as it is: take mm_vision_tower out of --mm_tunable_parts.")
    if given.trainer_mode not in (None, "regular"):
        raise ValueError(f"--trainer_mode {given.trainer_mode} has no gradients: --fwd2bot trains with regular alone.")
    if given.deepspeed and read_json(Path(given.deepspeed)).get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            f"{given.deepspeed} is ZeRO-3, which splits the base's weights: take LLaVA's scripts/zero2.json. What "
            "trains is small, two LoRA adapters and k tokens."
        )


def _own_arguments(argv: Sequence[str]) -> tuple[Any, bool, str | None, list[str]]:
    """Ours (a Fwd2BotArguments), `--lora_enable`, the attention, and what is left for LLaVA."""
    parser = argparse.ArgumentParser(prog="fwd2bot llava train", allow_abbrev=False, add_help=False)
    for field in dataclasses.fields(Fwd2BotArguments):
        kind = next(k for k in (int, float, str) if k.__name__ in str(field.type))
        parser.add_argument(f"--{field.name}", type=kind, help=field.metadata.get("help"))
    parser.add_argument("--lora_enable", nargs="?", const="True", default="False")
    parser.add_argument("--attn_implementation", help="LLaVA's train_mem.py says flash_attention_2")
    found, theirs = parser.parse_known_args(list(argv))
    own = {field.name: getattr(found, field.name) for field in dataclasses.fields(Fwd2BotArguments)}
    return Fwd2BotArguments(**own), string_to_bool(found.lora_enable), found.attn_implementation, theirs


@contextmanager
def _command_line(argv: Sequence[str]):
    before, sys.argv = sys.argv, ["llava/train/train.py", *argv]  # their parser reads it there
    try:
        yield
    finally:
        sys.argv = before


def _with_fwd2bot(module: Any, own: Any, lora: bool) -> dict[str, Any]:
    """What `llava.train.train` finds under its own names."""

    class LLaVATrainer(Fwd2BotTrainerMixin, module.LLaVATrainer):
        def __init__(self, model: Any, tokenizer: Any, args: Any, **kwargs: Any) -> None:
            _add(model, tokenizer, args, own, lora)
            super().__init__(model=model, tokenizer=tokenizer, args=args, **kwargs)

        # LLaVA-NeXT's trainer has a loop of its own, for an optimizer that is refused in _check
        _inner_training_loop = Trainer._inner_training_loop

    make_theirs = module.make_supervised_data_module

    def make_data(tokenizer: Any, data_args: Any) -> dict[str, Any]:
        found = make_theirs(tokenizer=tokenizer, data_args=data_args)
        data = WithCaptions(found["train_dataset"], own.fwd2bot_caption_data, tokenizer)
        return {**found, "train_dataset": data, "data_collator": CaptionCollator(found["data_collator"])}

    def save(trainer: Any, output_dir: str) -> None:
        trainer.save_model(output_dir)  # theirs gathers all weights, and LLaVA-NeXT's needs a GPU for it

    names = {"LLaVATrainer": LLaVATrainer, "make_supervised_data_module": make_data}
    return {**names, "safe_save_model_for_hf_trainer": save}


def _add(model: Any, tokenizer: Any, args: Any, own: Any, lora: bool) -> None:
    if not hasattr(model, "get_vision_tower") or model.get_vision_tower() is None:
        raise ValueError("--fwd2bot needs a LLaVA as its base: this model has no vision tower.")
    ranks = {name: getattr(args, name) if lora else None for name in ("lora_r", "lora_alpha", "lora_dropout")}
    config = Fwd2BotConfig(**given_settings(own, argparse.Namespace(lora_enable=lora, **ranks)))
    prompts = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in (config.image_prompt, config.text_prompt)]
    known = PretrainedConfig.get_config_dict(model.name_or_path)[0].get("vocab_size")
    if known is not None and known != model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"The vocabulary of {model.name_or_path} was changed from {known} to "
            f"{model.get_input_embeddings().num_embeddings} by --version v0 or --mm_use_im_…: a checkpoint could not "
            "be opened on its base again. Say --version v1 (or what the base was trained with), "
            "--mm_use_im_patch_token False and --mm_use_im_start_end False."
        )
    trains_projector = args.mm_projector_lr is not None and not args.freeze_mm_mlp_adapter
    if getattr(args, "mm_tunable_parts", None):  # LLaVA-NeXT's way to say what trains
        trains_projector = "mm_mlp_adapter" in args.mm_tunable_parts.split(",")
    install(model, host_class(type(model).__name__), config, *prompts, train_projector=trains_projector)


class WithCaptions(Dataset):
    """LLaVA's data set, and captions for its rows: `caption` of the record, or out of `--fwd2bot_caption_data`.

    Captioned images that no record shows become rows of their own, without an answer to learn.
    """

    def __init__(self, data: Any, caption_data: str | None, tokenizer: Any, max_length: int = 77) -> None:
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length
        records, self.answered = data.list_data_dict, len(data.list_data_dict)
        known: dict[str, list[str]] = {}
        if caption_data is not None:
            for entry in read_records(caption_data):
                said = entry.get("caption", entry.get("captions"))
                known.setdefault(entry["image"], []).extend([said] if isinstance(said, str) else said)
        shown = {_first_image(record) for record in records}
        for image, said in known.items():
            if image not in shown:
                turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": said[0]}]
                records.append({"image": image, "conversations": turns, "caption": said})
        self.captions = []
        for record in records:
            said = record.get("caption") or known.get(_first_image(record), [])
            self.captions.append([said] if isinstance(said, str) else list(said))
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:  # lengths, modality_lengths: what their sampler asks for
        return getattr(self.__dict__["data"], name)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = dict(self.data[i])
        if i >= self.answered:
            item["labels"] = torch.full_like(item["labels"], -100)
        # LLaVA-NeXT gives another record for one that it cannot read, and says so by its id alone
        stand_in = "id" in item and item["id"] != self.data.list_data_dict[i].get("id", i)
        if self.captions[i] and not stand_in:
            said = random.Random(f"{self.epoch}-{i}").choice(self.captions[i])
            ids = self.tokenizer(said.strip(), add_special_tokens=False)["input_ids"]
            item["caption_ids"] = torch.tensor(ids[: self.max_length])
        return item


def _first_image(record: dict[str, Any]) -> str | None:
    image = record.get("image")  # LLaVA-NeXT's may be several; a caption is of the first
    return image[0] if isinstance(image, list) and image else image


class CaptionCollator:
    """LLaVA's collator, and the captions beside: [B, L] and their mask, all zero for rows without one."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        captions = [item.pop("caption_ids", torch.zeros(0, dtype=torch.long)) for item in items]
        batch = self.collate(items)
        if any(len(ids) for ids in captions):
            batch["caption_input_ids"] = pad_sequence(captions, batch_first=True)
            mask = [torch.ones_like(ids) for ids in captions]
            batch["caption_attention_mask"] = pad_sequence(mask, batch_first=True)
        return batch
