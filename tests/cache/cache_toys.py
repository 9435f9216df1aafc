"""What the tests of the cache share: a cache that is filled through the pipeline, and small pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lancedb")

from llava_fwd2bot import load_fwd2bot  # noqa: E402
from llava_fwd2bot.cache.compressor import Compressor  # noqa: E402
from llava_fwd2bot.cache.format import CacheSettings  # noqa: E402
from llava_fwd2bot.cache.pipeline import fill  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_fwd2bot(checkpoint)


@pytest.fixture
def made(loaded, tmp_path):
    """A new cache, and a function that fills it from paths."""
    size = loaded[0].get_input_embeddings().weight.shape[1]
    cache = SummaryCache.create(tmp_path / "a.cache", CacheSettings("f" * 64, 4, size, "float16", "mean"))

    def run(*given: Path, **options):
        compressor = options.pop("compressor", None) or Compressor(*loaded, 4, 2)
        return fill(cache, Source([str(path) for path in given]), compressor, **options)

    return cache, run


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), colour).save(path)
    return path
