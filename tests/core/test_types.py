"""The public modules pass pyright in basic mode, so that an editor completes what `load_fwd2bot` returns."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = """from llava_fwd2bot import load_fwd2bot

model, processor = load_fwd2bot("smol-llava")
reveal_type(model.compress)
reveal_type(model.embed_image)
reveal_type(model.generate)
reveal_type(model.fwd2bot_disabled())
"""


@pytest.mark.skipif(not (shutil.which("pyright") and shutil.which("node")), reason="needs pyright and node")
def test_public_modules_are_typed(tmp_path):
    """The modules that pyproject.toml names have no error, and the loaded model's methods resolve to their types."""
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"\[tool\.pyright\].*?include = \[(.*?)\]", text, re.S)
    modules = re.findall(r'"(.+?)"', listed[1])
    assert len(modules) > 8
    config = {"typeCheckingMode": "basic", "include": [str(probe), *(str(ROOT / module) for module in modules)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({**config, "extraPaths": [str(ROOT)]}))
    command = ["pyright", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("Type of") == 4 and "-> Tensor" in run.stdout and "Unknown" not in run.stdout, run.stdout
