"""What goes wrong on a GPU alone, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

backend = pytest.importorskip("torch.utils.backend_registration")
TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(
    not hasattr(backend, "_setup_privateuseone_for_python_backend"), reason="torch has no devices written in Python"
)
def test_a_training_forward_stays_on_the_device_of_its_batch():
    """The plan of a batch is made on the CPU. It must go where the ids are, also without our collator."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(TESTS / "other_device.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == 6 * ["other"]
