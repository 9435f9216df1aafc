"""Lets transformers find smol-llava by its name: `pipeline("image-text-to-text", model="smol-llava")`.

transformers has no place for names that belong to a package: it would look for smol-llava on the hub, and try again
for 40 seconds without a network. All its look-ups of a model's files go through `transformers.utils.hub.cached_files`,
which gets the folder of this package where the name is smol-llava. No other name is touched.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import transformers.utils.hub

from . import checkpoint_folder, is_smol


def register() -> None:
    """Does so once; without effect on a transformers that has no such function."""
    theirs = getattr(transformers.utils.hub, "cached_files", None)
    if theirs is None or hasattr(theirs, "knows_smol"):
        return

    @wraps(theirs)
    def cached_files(path_or_repo_id: Any, *args: Any, **kwargs: Any) -> Any:
        if is_smol(path_or_repo_id):
            path_or_repo_id = str(checkpoint_folder())
        return theirs(path_or_repo_id, *args, **kwargs)

    cached_files.knows_smol = True
    transformers.utils.hub.cached_files = cached_files
