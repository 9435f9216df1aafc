"""What is found in folders, what is left out of them, and that both are told."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest
from PIL import Image

from llava_fwd2bot.files.folders import find_images, format_counts


@pytest.fixture
def photos(tmp_path):
    for name in ("photos/a.png", "photos/sub/b.png", "nas/2021/c.png", "nas/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path / "photos"


def ids(*given) -> tuple[list[str], Counter]:
    left_out: Counter[str] = Counter()
    images, unreadable = find_images([str(name) for name in given], left_out=left_out)
    assert not unreadable and all(path.is_file() for path in images.values())
    return sorted(images), left_out


def test_linked_folders_are_followed(photos):
    """A folder on another disk, linked in, was passed over in silence."""
    (photos / "nas").symlink_to("../nas")
    assert ids(photos) == (["a.png", "nas/2021/c.png", "nas/d.png", "sub/b.png"], Counter())
    assert ids(photos / "**" / "*.png")[0] == ["a.png", "b.png", "c.png", "d.png"]


def test_links_in_a_circle_end(photos):
    """Ten links between ten folders are ten million paths; each folder is read once, by its own name."""
    folders = [photos / f"f{i}" for i in range(10)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    for folder in folders:
        for other in (*folders, photos, photos.parent):
            (folder / f"to-{other.name}").symlink_to(other)
    (photos / "aaa").symlink_to("sub")  # before "sub" in the alphabet; its images keep their own name
    found = []
    thread = threading.Thread(target=lambda: found.extend((ids(photos), ids(photos / "**" / "*.png"))), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    names, left_out = found[0]
    inside = {"a.png", "sub/b.png", *(f"f{i}/{i}.png" for i in range(10))}
    assert inside <= set(names) and len(names) == len(inside) + 2  # and, once, those of the folder above
    assert left_out["linked folders that are read already"] > 100
    assert len(found[1][0]) == len(names)


def test_what_is_left_out_is_counted_by_reason(photos):
    """Telephones' .heic, files without an extension and broken links vanished uncounted."""
    for name in ("x.heic", "y.HEIC", "notes.txt", "IMG_1", "data.h5", "page.ps", "z.svg"):
        (photos / name).write_bytes(b"?")
    (photos / "2020").symlink_to("/nowhere")
    names, left_out = ids(photos)
    assert names == ["a.png", "sub/b.png"]
    heif = 0 if ".heic" in _extensions() else 2
    assert left_out[".heic (pip install pillow-heif)"] == heif and left_out["without an extension"] == 1
    assert left_out["links that lead nowhere"] == 1 and left_out[".h5"] == left_out[".ps"] == left_out[".svg"] == 1
    assert format_counts(Counter({f".{i}": i for i in range(1, 9)})) == "8 .8, 7 .7, 6 .6, 5 .5, 4 .4, 6 others"
    with pytest.raises(ValueError, match="no image file.* Left out: 1 .csv"):
        (photos.parent / "other").mkdir()
        (photos.parent / "other" / "x.csv").touch()
        find_images([str(photos.parent / "other")])


def _extensions() -> set[str]:
    from llava_fwd2bot.files.images import extensions

    return extensions()


def test_patterns_are_glob_s(photos, tmp_path, monkeypatch):
    """`**` is walked here, as glob runs in circles; without links the two find the same."""
    import glob

    (photos / ".hidden").mkdir()
    for name in (".hidden/h.png", ".h.png", "sub/deep.png"):
        Image.new("RGB", (8, 8)).save(photos / name)
    monkeypatch.chdir(tmp_path)
    for pattern in (
        "**/*.png",
        "photos/**/*.png",
        "photos/**/b.*",
        "**/su?/*",
        "photos/**/[ab].png",
        "photos/**/.h.png",
    ):
        theirs = {path for path in glob.glob(pattern, recursive=True) if path.endswith(".png")}
        assert {str(path) for path in find_images([pattern])[0].values()} == theirs, pattern


def test_compress_tells_what_is_left_out(run, checkpoint, photos, tmp_path):
    """In the figures for programs, and in words."""
    (photos / "notes.md").touch()
    command = ("compress", "--model", checkpoint, "--images", photos, "--device", "cpu")
    code, out, _ = run(*command, "--output", tmp_path / "s.st", "--json")
    assert code == 0 and json.loads(out)["left_out"] == {".md": 1}
    code, out, _ = run(*command, "--output", tmp_path / "t.st")
    assert code == 0 and "left out of the folders: 1 .md" in out


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_of_notepad(run, checkpoint, photos, tmp_path, encoding):
    (photos / "list.txt").write_bytes("a.png\r\nsub/b.png\r\n".encode(encoding))
    output = tmp_path / "s.st"
    code, out, _ = run("compress", "--model", checkpoint, "--images", photos / "list.txt", "--output", output, "--json")
    assert code == 0 and json.loads(out)["images"] == 2 and json.loads(out)["skipped"] == []
