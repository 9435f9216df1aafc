"""The mixin's `save_pretrained` and `push_to_hub`; what is on disk is checkpoint.py's."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from torch import Tensor

from ..checkpoint.hub import push
from ..checkpoint.write import save_checkpoint


class Fwd2BotSavingMixin:
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        *,
        processor: Any = None,
        safe_serialization: bool = True,
        save_function: Any = None,
        repo_id: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Writes the Fwd2Bot checkpoint (design: config, R, one PEFT adapter per stage); the base is not copied.

        Args:
            processor: the processor to save beside it, so that AutoProcessor opens the checkpoint.
            is_main_process: False on the ranks that do not write.
            state_dict: weights gathered by a trainer from several ranks, used instead of the live ones.
            push_to_hub: upload what was written to `repo_id`, by default one called as the folder; token, private,
                commit_message, commit_description, revision and create_pr are huggingface_hub's.
            max_shard_size, save_function: known, for programs that pass them; the files are small, and safetensors.

        Raises:
            ValueError: `safe_serialization=False` or a `variant` is requested, which does not exist.
            OSError: it cannot be written, and what was there is as it was; or it cannot be pushed.
        """
        if not safe_serialization:
            raise ValueError("Fwd2Bot checkpoints are safetensors only: leave safe_serialization=False out.")
        if variant is not None:
            raise ValueError("A Fwd2Bot checkpoint has no variants: leave variant out, and choose dtype on loading.")
        if not is_main_process:
            return
        files = save_checkpoint(self, save_directory, processor=processor, state_dict=state_dict)
        if push_to_hub:
            commit = {"commit_message": commit_message or "Upload Fwd2Bot checkpoint", "revision": revision}
            commit |= {"commit_description": commit_description, "create_pr": create_pr or None}
            push(save_directory, files, repo_id, token=token, private=private, **commit)

    def push_to_hub(self, repo_id: str, *, processor: Any = None, **options: Any) -> None:
        """Uploads the Fwd2Bot checkpoint alone; the options are those of `save_pretrained` for the Hub."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, processor=processor, **options)
