"""The errors that the FAQ explains are those that the code raises: a reader searches for the words on the screen."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)


@cache
def texts() -> list[str]:
    """Every text in the package, a value that is filled in as one space."""
    found = []
    for path in (ROOT / "llava_fwd2bot").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values))
    return found


@pytest.mark.parametrize("message", QUOTED)
def test_an_error_of_the_faq_is_in_the_code(message):
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in texts())
