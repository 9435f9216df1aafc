"""Puts the checkout on the path: scripts use `eval`, which is not installed with the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
