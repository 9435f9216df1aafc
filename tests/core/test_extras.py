"""Packages of extras: whoever lacks one is told its name and the command, wherever the package is needed."""

from __future__ import annotations

import logging
import sys

import pytest

from llava_fwd2bot.cache.format import CacheSettings, lancedb_module
from llava_fwd2bot.cache.ray_fill import fill_by_ray
from llava_fwd2bot.cache.reader import SummaryCache
from llava_fwd2bot.cli.serve import main as serve
from llava_fwd2bot.evaluation.drawing import pyplot
from llava_fwd2bot.evaluation.metrics import check_caption_scores
from llava_fwd2bot.extras import require
from llava_fwd2bot.smol.build import assemble


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("lancedb", "cache", lancedb_module),
        ("pyarrow", "cache", lambda: SummaryCache.create("never", CacheSettings("f", 4, 64, "float16", "mean"))),
        ("filelock", "cache", lambda: SummaryCache.open("never")),
        ("ray", "ray", lambda: fill_by_ray(None, {}, None, {}, batch_size=1, max_pixels=None, retry=False)),
        ("matplotlib", "eval", pyplot),
        ("pycocoevalcap", "eval", check_caption_scores),
        ("gguf", "smol", assemble),
        ("fastapi", "serve", lambda: serve(["--model", "never"])),
    ],
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, module, extra, use):
    """ "No module named 'pyarrow'" does not say that `[cache]` brings it, nor how to install that from a checkout."""
    if extra == "cache":  # all three are asked for, the first that is missing is told
        for other in {"lancedb", "pyarrow", "filelock"} - {module}:
            pytest.importorskip(other)
        monkeypatch.chdir(tmp_path)  # the caches are named without a folder
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as error:
        use()
    message = str(error.value)
    assert f"needs {module}, which is not installed: pip install 'llava_fwd2bot[{extra}]'" in message
    assert f"pip install -e '.[{extra}]'" in message


def test_a_package_that_is_there_but_broken(tmp_path, monkeypatch):
    """ "Not installed" would send its owner to install what is installed: the reason is another package."""
    (tmp_path / "broken_package.py").write_text("import a_package_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"cannot be imported \(No module named 'a_package_that_is_nowhere'\)"):
        require("broken_package", "cache", "A cache")


def test_the_hint_of_a_kernel_is_for_debugging(caplog):
    """Where bitsandbytes is installed, PEFT imports it, and every Python program on a CPU began with its hint."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hint = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    with caplog.at_level(logging.WARNING, logger.name):
        logger.warning(hint, "no kernels")
        logger.warning("another warning")
    assert [record.getMessage() for record in caplog.records] == ["another warning"]
    with caplog.at_level(logging.DEBUG, logger.name):
        logger.warning(hint, "no kernels")
    assert (caplog.records[-1].levelname, len(caplog.records)) == ("DEBUG", 2)
