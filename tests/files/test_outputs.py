"""Outputs never stand on inputs, for every command that writes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from train_toys import command

from llava_fwd2bot.cli.main import main
from llava_fwd2bot.files.outputs import refuse_overlap, refuse_whole_model
from llava_fwd2bot.training.command import train


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def places(tmp_path):
    for name in ("base", "images/more", "work"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work" / "data.json").write_text("[]")
    os.symlink(tmp_path / "base", tmp_path / "link")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("base", "is also the base"),
        ("link", "is also the base"),  # by another name
        ("base/sub/deep", "lies in the base"),
        ("images", "is also the images"),
        ("images/out", "lies in the images"),
        ("work", "holds the data"),
        (".", "holds the base"),
        ("work/data.json", "is also the data"),
    ],
)
def test_overlaps_are_refused(places, output, message):
    inputs = {"models": {"the base": places / "base"}, "images": {"the images": places / "images"}}
    with pytest.raises(ValueError, match=message):
        refuse_overlap("--output_dir", places / output, **inputs, files={"the data": places / "work/data.json"})


def test_what_is_apart_is_fine(places, monkeypatch):
    inputs = {"models": {"the base": places / "base", "hub": "llava-hf/llava-1.5-7b-hf", "no": None}}
    inputs["images"] = {"the images": places / "images"}
    for output in ("out", "work/out", "base2", "basement/x"):
        refuse_overlap("--output_dir", places / output, **inputs, files={"d": places / "work/data.json"})
    refuse_overlap("--cache", places / "images/c", **inputs, inside_images=True)
    monkeypatch.chdir(places / "images")  # --image_folder . is everybody's; outputs have to go somewhere
    refuse_overlap("--output_dir", "out", images={"the images": "."})
    with pytest.raises(ValueError, match="is also the images"):
        refuse_overlap("--output_dir", ".", images={"the images": "."})


def test_another_model_is_not_written_over(places):
    refuse_whole_model("--output_dir", places / "work")
    (places / "work" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="holds a whole model"):
        refuse_whole_model("--output_dir", places / "work")


@pytest.mark.parametrize("where", ["base", "base/fwd2bot", "images", "data"])
@pytest.mark.parametrize("fwd2bot", [True, False])
def test_training_leaves_its_inputs_alone(base_dir, llava_data, tmp_path, where, fwd2bot):
    """It overwrote the base's config.json, exit 0, and neither base nor result could be opened any more."""
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    output = {"images": llava_data["images"], "data": tmp_path}.get(where, tmp_path / where)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="--output_dir"):
        train(command(base, llava_data, output, fwd2bot=fwd2bot))
    assert content(tmp_path) == before


def test_save_pretrained_leaves_the_base_alone(on_disk, base_dir, tmp_path):
    before = content(base_dir)
    for folder in (base_dir, base_dir / "sub"):
        with pytest.raises(ValueError, match="save_pretrained"):
            on_disk.save_pretrained(folder)
    shutil.copytree(base_dir, tmp_path / "other")
    with pytest.raises(ValueError, match="holds a whole model"):
        on_disk.save_pretrained(tmp_path / "other")
    assert content(base_dir) == before
    on_disk.save_pretrained(base_dir.parent / f"beside-{tmp_path.name}")


def test_the_commands_leave_their_inputs_alone(on_disk, processor, llava_data, tmp_path, capsys):
    """compress --overwrite on an image or a weight file, a cache in the checkpoint, a score over its answers."""
    on_disk.save_pretrained(tmp_path / "ckpt", processor=processor)
    model, images = ("--model", str(tmp_path / "ckpt")), ("--images", str(llava_data["images"]))
    before = content(tmp_path)
    ours = ("--overwrite", "--output")
    for argv in (
        ("compress", *model, *images, *ours, str(llava_data["images"] / "0.png")),
        ("compress", *model, *images, *ours, str(tmp_path / "ckpt" / "fwd2bot.safetensors")),
        ("compress", *model, *images, "--cache", str(tmp_path / "ckpt" / "cache")),
        ("compress", *model, *images, "--cache", str(llava_data["images"])),
        ("convert", str(tmp_path / "ckpt"), "--base", on_disk.name_or_path, "--output", on_disk.name_or_path),
        ("convert", str(tmp_path / "ckpt"), "--base", on_disk.name_or_path, "--output", str(tmp_path / "ckpt")),
        ("eval", "score", "pope", "--answers", str(llava_data["data"]), "--output", str(llava_data["data"])),
    ):
        assert main(argv) == 1, argv
        assert "overwrite or mix with an input" in capsys.readouterr().err, argv
    assert content(tmp_path) == before
