"""The client's examples of docs/serve.md, against a real server: its page marks them as needing one."""

from __future__ import annotations

import re
from pathlib import Path

from server_toys import *  # noqa: F403
from server_toys import app_of, file_bytes, listening, pixels

from llava_fwd2bot.cli.main import main

PAGE = Path(__file__).parents[2] / "docs/serve.md"


def test_the_examples_work(loaded, checkpoint, tmp_path, monkeypatch, capsys):
    """In order, with one namespace, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("cat.jpg", "cup.jpg")):
        (tmp_path / "photos" / name).write_bytes(file_bytes(pixels(i).resize((150, 150)), "JPEG"))
    filling = ["compress", "--model", str(checkpoint), "--images", "photos", "--cache", "photos.cache"]
    assert main([*filling, "--device", "cpu"]) == 0
    blocks = re.findall(r"<!-- test: arguments -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    with listening(app_of(loaded, checkpoint, tmp_path / "photos.cache")) as server:
        names: dict = {}
        for block in blocks:
            block = block.replace("http://127.0.0.1:8000", server.url).replace('"my-fwd2bot"', '"toy"')
            exec(compile(block, str(PAGE), "exec"), names)
        assert [hit["id"] for hit in names["hits"]] and len(names["vectors"].data) == 2
        assert server.http.get("/health").json()["images"] == {"photos.cache": 2}
    assert "cached_tokens=4" in capsys.readouterr().out
