"""A saved checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OF_REPOSITORY = ("private", "token")
_OF_COMMIT = ("commit_message", "commit_description", "revision", "create_pr", "token")


def push(directory: str | os.PathLike, files: Sequence[str], repo_id: str | None = None, **options: Any) -> str:
    """Uploads these files of `directory`, in one commit; gives the address of the commit.

    Args:
        files: paths below `directory`. What else lies there stays here.
        repo_id: the repository, which is made where it is missing; by default one called as the folder.
        options: private, token, commit_message, commit_description, revision, create_pr, as huggingface_hub has them.

    Raises:
        OSError: the Hub did not take it; what was saved is whole.
    """
    from huggingface_hub import HfApi

    repo_id = repo_id or Path(directory).resolve().name
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True, **_chosen(options, _OF_REPOSITORY)).repo_id
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=str(directory),
                allow_patterns=[Path(file).as_posix() for file in files],
                **_chosen(options, _OF_COMMIT),
            )
        )
    except Exception as error:  # of many kinds: no login, no right to it, no network
        raise OSError(
            f"The checkpoint is saved in {directory}, but was not pushed to {repo_id} ({error}). Log in with "
            "`hf auth login` or pass token=…, then push it again."
        ) from error


def _chosen(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}
