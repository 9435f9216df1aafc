"""smol-llava: a small LLaVA of real parts, the model for anyone without a GPU or a hub.

SmolLM2-135M-Instruct reads EfficientNet-Lite0's 49 tokens of a photograph. `load_fwd2bot("smol-llava")` opens it with
Fwd2Bot; as a base for training, `--model_name_or_path smol-llava` names it without. It is put together the first time
it is needed, in LLAVA_FWD2BOT_CACHE or else the user's cache folder (270 MB).
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from .name import NAME

WEIGHTS = Path(__file__).parent / "weights"


def is_smol(name: str | os.PathLike) -> bool:
    """Whether `name` means the model of this package, and not a folder that is called so."""
    return str(name) == NAME and not Path(name).exists()


def checkpoint_folder() -> Path:
    """The trained Fwd2Bot checkpoint, which is part of this package.

    Raises:
        FileNotFoundError: it is not, in this version.
    """
    return _trained("fwd2bot")


def _trained(part: str) -> Path:
    if not (WEIGHTS / part).is_dir():
        raise FileNotFoundError(
            2, f"{NAME} was not trained in this version: scripts/train_smol_llava.sh does so", str(WEIGHTS / part)
        )
    return WEIGHTS / part


def cached_base() -> Path | None:
    """The folder of the base, where it has been put together already."""
    if not (WEIGHTS / "base").is_dir():
        return None
    folder = _base_place()
    return folder if (folder / "config.json").is_file() else None


def base_folder() -> Path:
    """The folder of the base, put together now if it is not there yet.

    Raises:
        ImportError, OSError, ValueError: a part is missing and cannot be brought, or is damaged.
    """
    folder = cached_base()
    if folder is None:
        from .build import build

        folder = _base_place()
        print(f"Putting {NAME} together in {folder} (once, under a minute) …", file=sys.stderr)
        quiet = os.environ.get("FWD2BOT_LOG", "").lower() != "debug"
        with redirect_stderr(io.StringIO()) if quiet else nullcontext():  # bars of transformers; errors are raised
            build(folder, adapter=_trained("base"))
    return folder


def _base_place() -> Path:
    root = os.environ.get("LLAVA_FWD2BOT_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_fwd2bot"
    # by what it is made of, so that other weights of a later version do not meet an old base
    digest = hashlib.sha256()
    for file in sorted(_trained("base").iterdir()) + [Path(__file__).with_name("build.py")]:
        digest.update(file.read_bytes())
    return Path(root) / f"{NAME}-{digest.hexdigest()[:12]}"
