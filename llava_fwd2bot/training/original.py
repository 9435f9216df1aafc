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
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PretrainedConfig, Trainer
from transformers.hf_argparser import string_to_bool

from ..checkpoint.gathering import is_split
from ..checkpoint.load import original_class_name
from ..config import Fwd2BotConfig
from ..files.outputs import refuse_overlap, refuse_whole_model
from ..hosts import host_class, install
from ..hosts.original import shims
from ..hosts.original.model import check_version
from . import original_accumulate as accumulate
from .arguments import Fwd2BotArguments, given_settings, renamed
from .checks import check_arguments, float32_where_trained
from .original_data import CaptionCollator, WithCaptions
from .original_options import train_options
from .resume import check_same_run, checkpoint_to_resume, data_of, is_finished, settings_of, write_run
from .trainer import Fwd2BotTrainerMixin


def train(argv: Sequence[str], attn_implementation: str | None = None) -> None:
    """Runs LLaVA's `train()` on `argv`; `attn_implementation` is what its caller would give it.

    Raises:
        ImportError: `llava` is not installed, or transformers is of a version that it cannot run on.
        ValueError: an argument is wrong, or the base is no LLaVA.
    """
    check_version()
    own, lora, on_bad_image, attention, theirs = _own_arguments(argv)
    attention = attention or attn_implementation
    with shims.importable():
        module = importlib.import_module("llava.train.train")
        trainer = importlib.import_module("llava.train.llava_trainer")
    if hasattr(module.TrainingArguments, "attn_implementation"):  # LLaVA-NeXT: an argument of theirs, not train()'s
        theirs += ["--attn_implementation", attention] if attention else []
    with shims.applied(module, trainer), _ready_to_split(module), _command_line(_names_of_today(theirs)):
        if own.fwd2bot is None:
            given_settings(own, argparse.Namespace(lora_enable=True))  # refuses --fwd2bot_… without --fwd2bot
            if on_bad_image != "raise":
                raise ValueError("--on_bad_image skip needs --fwd2bot K here: without it LLaVA's own data are used.")
            sys.argv += ["--lora_enable", str(lora)]
            return module.train(attention)
        _check(theirs, own)
        with shims.rebound(module, **_with_fwd2bot(module, own, lora, on_bad_image)), accumulate.resumable():
            return module.train(attention)


def _names_of_today(argv: Sequence[str]) -> list[str]:
    """The command line with the names that this transformers has."""
    return renamed(argv) if shims.needed("arguments") else list(argv)


def _check(theirs: Sequence[str], own: Any) -> None:
    """Refuses, before anything is loaded, what does not go with --fwd2bot.

    Raises:
        ValueError: the base is no LLaVA on disk, another stage of training, the vision tower, no gradients;
            --output_dir overlaps with what is read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (
        *("model_name_or_path", "pretrain_mm_mlp_adapter", "mm_tunable_parts", "trainer_mode"),
        *("output_dir", "data_path", "image_folder", "vision_tower"),
    ):
        parser.add_argument(f"--{name}")
    parser.add_argument("--tune_mm_mlp_adapter", nargs="?", const="True", default="False")
    given, _ = parser.parse_known_args(list(theirs))
    if given.output_dir:
        models = {"--model_name_or_path": given.model_name_or_path, "--vision_tower": given.vision_tower}
        files = {"--data_path": given.data_path, "--fwd2bot_caption_data": own.fwd2bot_caption_data}
        images = {"--image_folder": given.image_folder}
        refuse_overlap("--output_dir", given.output_dir, models=models, files=files, images=images)
        refuse_whole_model("--output_dir", given.output_dir)
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


def _own_arguments(argv: Sequence[str]) -> tuple[Any, bool, str, str | None, list[str]]:
    """Ours (a Fwd2BotArguments), `--lora_enable`, `--on_bad_image`, the attention, and what is left for LLaVA."""
    found, theirs = train_options().parse_known_args(list(argv))
    own = {field.name: getattr(found, field.name) for field in dataclasses.fields(Fwd2BotArguments)}
    lora = string_to_bool(found.lora_enable)
    return Fwd2BotArguments(**own), lora, found.on_bad_image, found.attn_implementation, theirs


@contextmanager
def _ready_to_split(module: Any) -> Iterator[None]:
    """Within it DeepSpeed knows all processes before a model is loaded: ZeRO-3 splits weights as they are read."""
    stock = module.TrainingArguments.__post_init__

    def started(args: Any) -> None:
        stock(args)
        if args.deepspeed and args.device and dist.is_initialized():  # `device` is what starts the processes' group
            import deepspeed

            deepspeed.init_distributed(dist_backend=dist.get_backend())

    with shims.rebound(module.TrainingArguments, __post_init__=started):
        yield


@contextmanager
def _command_line(argv: Sequence[str]):
    before, sys.argv = sys.argv, ["llava/train/train.py", *argv]  # their parser reads it there
    try:
        yield
    finally:
        sys.argv = before


def _with_fwd2bot(module: Any, own: Any, lora: bool, on_bad_image: str) -> dict[str, Any]:
    """What `llava.train.train` finds under its own names."""
    data: dict[str, Any] = {}  # what the run is trained on, once it is known

    class LLaVATrainer(Fwd2BotTrainerMixin, module.LLaVATrainer):
        def __init__(self, model: Any, tokenizer: Any, args: Any, **kwargs: Any) -> None:
            check_arguments(args, fwd2bot=True)
            self.config = _add(model, tokenizer, args, own, lora)
            super().__init__(model=model, tokenizer=tokenizer, args=args, **kwargs)
            plugin = self.accelerator.state.deepspeed_plugin
            if plugin is not None and plugin.hf_ds_config.is_zero3():
                # transformers 4.37 and accelerate 0.26 put a fraction in the place of "auto"; DeepSpeed refuses it
                bucket = int(0.9 * model.config.hidden_size**2)
                plugin.hf_ds_config.fill_only("zero_optimization.stage3_prefetch_bucket_size", bucket)
            if is_split(self.model) and self.accelerator.distributed_type.value != "DEEPSPEED":
                raise ValueError(
                    f"{args.deepspeed} is ZeRO-3, and this accelerate does not use DeepSpeed here: start the command "
                    "by torchrun, and without --use_cpu."
                )

        # LLaVA-NeXT's trainer has a loop of its own, for an optimizer that is refused in _check
        _inner_training_loop = Trainer._inner_training_loop

        untouched = False  # whether there was nothing to do

        def save_state(self) -> None:
            if not self.untouched:
                super().save_state()

        def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            """LLaVA's says True wherever there is a checkpoint, whatever --resume_from_checkpoint names."""
            named, output = self.args.resume_from_checkpoint, Path(self.args.output_dir)
            settings = settings_of(self.args, **self.config.to_dict())
            self.run = {"data": data, "settings": settings}
            if named is None and is_finished(output, {**self.run, "layout": self.run_layout}):
                if self.is_world_process_zero():
                    print(f"Nothing to do: {output} holds the finished result of this run.", file=sys.stderr)
                self.untouched = True
                return None
            checkpoint = checkpoint_to_resume(named, output)
            if checkpoint is not None:
                check_same_run(checkpoint, self.run, named is not None)
            with self._own_loading():  # transformers 4.37 does it within its loop
                return super().train(checkpoint, *args, **kwargs)

        def get_train_dataloader(self) -> Any:
            loader = super().get_train_dataloader()
            if not accumulate.needed():
                return loader
            return accumulate.look_ahead(loader, self.args.gradient_accumulation_steps, self.look_ahead)

    make_theirs = module.make_supervised_data_module

    def make_data(tokenizer: Any, data_args: Any) -> dict[str, Any]:
        found = make_theirs(tokenizer=tokenizer, data_args=data_args)
        folder = data_args.image_folder
        captioned = WithCaptions(found["train_dataset"], own.fwd2bot_caption_data, tokenizer, on_bad_image, folder)
        path = data_args.data_path
        single = isinstance(path, str) and Path(path).is_file()  # LLaVA-NeXT's may be several
        data.update(data_of(data_path=path if single else None, caption_data=own.fwd2bot_caption_data))
        return {**found, "train_dataset": captioned, "data_collator": CaptionCollator(found["data_collator"])}

    def save(trainer: Any, output_dir: str) -> None:
        if trainer.untouched:
            return
        trainer.save_model(output_dir)  # theirs gathers all weights, and LLaVA-NeXT's needs a GPU for it
        state = trainer.state
        if trainer.is_world_process_zero():
            finished = {"steps": state.global_step, "finished": state.global_step >= state.max_steps}
            finished["skipped_images"] = trainer.train_dataset.skipped_images
            write_run(output_dir, {**trainer.run, "layout": trainer.run_layout, **finished})

    names = {"LLaVATrainer": LLaVATrainer, "make_supervised_data_module": make_data}
    return {**names, "safe_save_model_for_hf_trainer": save}


def _add(model: Any, tokenizer: Any, args: Any, own: Any, lora: bool) -> Fwd2BotConfig:
    """Puts Fwd2Bot on the model; gives its settings."""
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
    if not args.deepspeed:  # which keeps float32 weights of its own
        float32_where_trained(model)
    return config
