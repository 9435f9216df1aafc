"""A checkpoint whose answers are words, photographs good and bad, and the command line in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.cli.main import main

QUESTION = "how many dogs are there"
SHORT = ("--max-new-tokens", "12", "--device", "cpu")


@pytest.fixture(scope="session")
def own_base(base_dir, processor) -> Path:
    """The toy base, made to speak in printable words, so that answers can be compared as text."""
    base, vocabulary = LlavaForConditionalGeneration.from_pretrained(base_dir), processor.tokenizer.get_vocab()
    words = {at for word, at in vocabulary.items() if word.strip("▁").isalpha()}
    base.generation_config.suppress_tokens = sorted(set(range(base.config.text_config.vocab_size)) - words)
    path = base_dir.parent / "cli-base"
    base.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(own_base, processor) -> Path:
    from conftest import settings, shake  # which imports this module

    model = shake(add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(own_base), settings(), processor))
    path = own_base.parent / "cli-checkpoint"
    model.save_pretrained(path, processor=processor)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven files that look like images, of which two cannot be read, one of them in a sub-folder; and a text."""
    folder = tmp_path / "photos"
    (folder / "beach").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("b.png", "a.png", "beach/a.png", "beach/z.jpg"):
        Image.fromarray(random.integers(0, 255, (40, 50, 3)).astype("uint8")).save(folder / name)
    Image.new("RGB", (1, 1), (9, 99, 9)).save(folder / "pixel.png")
    whole = (folder / "beach/z.jpg").read_bytes()
    (folder / "beach/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture at all")
    (folder / "notes.txt").write_text("not to be looked at")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """main() → (exit code, stdout, stderr); an error must not show a traceback."""
    monkeypatch.delenv("FWD2BOT_TRACEBACK", raising=False)

    def run(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def stored(run, checkpoint, photos, tmp_path) -> Path:
    """Summaries of `photos`, exact."""
    path = tmp_path / "stored.safetensors"
    command = ("compress", "--model", checkpoint, "--images", photos, "--output", path, "--store-dtype", "float32")
    # one at a time, as `ask` compresses: a batch may differ in the last bits
    assert run(*command, "--batch-size", 1, "--device", "cpu")[0] == 0
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()
