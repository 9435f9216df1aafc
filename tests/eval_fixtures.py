"""What evaluators are given."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def import_script(monkeypatch):
    """Imports a script by name; all modules of scripts/ are forgotten afterwards, so that no test sees another's."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).parent == SCRIPTS:
            del sys.modules[name]


@pytest.fixture
def captioned(tmp_path):
    """Six pictures with two captions each, in all formats that are read."""
    images = tmp_path / "images"
    images.mkdir()
    entries = []
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "grey")):
        Image.new("RGB", (40, 30 + 5 * i), colour).save(images / f"{i}.png")
        entries.append({"image": f"{i}.png", "captions": [f"a {colour} picture", f"{colour} all over"]})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (tmp_path / "own.json").write_text(json.dumps(entries))
    said = [{"filename": e["image"], "sentences": [{"raw": c} for c in e["captions"]]} for e in entries]
    karpathy = {"images": [{**image, "split": "test" if i < 4 else "val"} for i, image in enumerate(said)]}
    (images / "dataset_flickr30k.json").write_text(json.dumps(karpathy))
    coco = {"images": [{"id": i, "file_name": e["image"], "domain": "in-domain"} for i, e in enumerate(entries)]}
    coco["annotations"] = [{"image_id": i, "caption": c} for i, e in enumerate(entries) for c in e["captions"]]
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    return tmp_path
