"""Images and their captions, in the formats that people have on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.records import read_records
from ..files.text import read_any_json

KARPATHY = {"flickr30k": "dataset_flickr30k.json", "flickr8k": "dataset_flickr8k.json", "coco": "dataset_coco.json"}
NOCAPS = "nocaps_val_4500_captions.json"
KNOWN = (*KARPATHY, "nocaps")


@dataclass
class Captioned:
    """Images of one data set and what people said of them, in the data set's order."""

    name: str
    paths: list[Path]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.paths)

    def first(self, limit: int | None) -> Captioned:
        return Captioned(self.name, self.paths[:limit], self.captions[:limit])


def read_captioned(
    dataset: str, images: Path | None = None, annotations: Path | None = None, split: str = "test"
) -> Captioned:
    """A data set by its name, or from a file of one's own.

    Args:
        dataset: flickr30k, flickr8k, coco (Karpathy's splits: dataset_*.json), nocaps (its annotation file), or a file:
            .jsonl of {"image", "captions": […]}, Karpathy's JSON, or COCO's captions JSON.
        images: the folder of the images; default: the folder of the annotations, or `images` in it.
        annotations: the file, where `dataset` is a name; default: its usual name in `images`.
        split: Karpathy's train, restval, val or test; NoCaps' in-domain, near-domain, out-domain, or test for all.

    Raises:
        FileNotFoundError, ValueError: the file or an image is missing, an image is there twice or has no caption, a
            field is missing or of another kind, or no image is in `split`.
    """
    if dataset in KNOWN:
        usual = NOCAPS if dataset == "nocaps" else KARPATHY[dataset]
        if annotations is None and images is None:
            raise ValueError(
                f"--dataset {dataset} needs --images, and --annotations where {usual} is not in that folder."
            )
        file = annotations or images / usual
    else:
        file = Path(dataset)
    if not file.is_file():
        raise FileNotFoundError(2, "There is no such file of captions", str(file))
    if images is None:
        images = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    entries = _entries(file, split)
    _check(entries, file)
    paths = [images / name for name, _ in entries]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        problem = f"{len(missing)} of {len(paths)} images of {file} are missing, the first"
        raise FileNotFoundError(2, problem, str(missing[0]))
    return Captioned(dataset if dataset in KNOWN else file.stem, paths, [said for _, said in entries])


def field_of(record: Any, name: str, kind: type, where: str) -> Any:
    """`record[name]`, which must be a `kind`, and a text not blank; a ValueError says `where` it is not."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object with the field {name!r}, not {str(record)[:80]}")
    if name not in record:
        raise ValueError(f"{where} has no {name!r}, only {', '.join(map(repr, record)) or 'nothing'}.")
    value = record[name]
    if not isinstance(value, kind) or kind is str and not value.strip():
        wanted = {str: "a text that is not empty", list: "a list"}[kind]
        raise ValueError(f"{where}: {name!r} must be {wanted}, not {repr(value)[:80]}")
    return value


def _entries(file: Path, split: str) -> list[tuple[str, list[str]]]:
    if file.suffix == ".jsonl":
        data = read_records(file)
    else:
        try:
            data = read_any_json(file)
        except ValueError as error:
            raise ValueError(f"{error} Or is it one object per line? Then name it .jsonl") from None
    if isinstance(data, list):
        if split != "test":  # all of it under the name of a part would be another figure
            raise ValueError(f"{file} is a list, which has no splits: leave out --split {split}.")
        return [_entry(record, file) for record in data]
    if isinstance(data, dict) and "annotations" in data:
        return _coco(data, file, split)
    if isinstance(data, dict) and "images" in data:
        return _karpathy(data, file, split)
    raise ValueError(f"{file} is neither Karpathy's, COCO's nor a list of {{'image', 'captions'}}.")


def _coco(data: dict[str, Any], file: Path, split: str) -> list[tuple[str, list[str]]]:
    """COCO's and NoCaps'."""
    said: dict[Any, list[str]] = {}
    images = field_of(data, "images", list, str(file))
    if split != "test":
        images = _of_split(images, "domain", file, split)
    for number, image in enumerate(images, 1):
        where = f"{file}, image {number}"
        field_of(image, "file_name", str, where)
        name = _id(image, "id", where)
        if name in said:
            raise ValueError(f"{where}: the id {name!r} is that of another image, too.")
        said[name] = []
    for number, entry in enumerate(field_of(data, "annotations", list, str(file)), 1):
        where = f"{file}, annotation {number}"
        if (name := _id(entry, "image_id", where)) in said:  # a part of the images may stand beside all annotations
            said[name].append(field_of(entry, "caption", str, where))
    return [(image["file_name"], said[image["id"]]) for image in images]


def _karpathy(data: dict[str, Any], file: Path, split: str) -> list[tuple[str, list[str]]]:
    images = field_of(data, "images", list, str(file))
    for number, image in enumerate(images, 1):
        field_of(image, "split", str, f"{file}, image {number}")
    found = []
    for image in _of_split(images, "split", file, split):
        name = field_of(image, "filename", str, f"{file}, an image of {split}")
        where = f"{file}, image {name}"
        folder = field_of(image, "filepath", str, where) if image.get("filepath") else ""
        said = [field_of(sentence, "raw", str, where) for sentence in field_of(image, "sentences", list, where)]
        found.append((str(Path(folder) / name), said))
    return found


def _of_split(images: list[dict[str, Any]], name: str, file: Path, split: str) -> list[dict[str, Any]]:
    known = [image for image in images if isinstance(image, dict) and name in image]
    chosen = [image for image in known if image[name] == split]
    if images and not chosen:
        there = ", ".join(dict.fromkeys(str(image[name]) for image in known))
        raise ValueError(f"{file} has no image in split {split!r}; its splits: {there or 'none, leave out --split'}.")
    return chosen


def _id(record: Any, name: str, where: str) -> int | str:
    if not isinstance(record, dict) or not isinstance(record.get(name), (int, str)):
        raise ValueError(f"{where} needs {name!r}, a number or a text: {str(record)[:80]}")
    return record[name]


def _entry(record: Any, file: Path) -> tuple[str, list[str]]:
    image = record.get("image") if isinstance(record, dict) else None
    if not isinstance(image, str):
        raise ValueError(f"{file}: a record has no 'image': {str(record)[:80]}")
    said = record.get("captions", record.get("caption"))
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or not all(isinstance(text, str) and text.strip() for text in said):
        raise ValueError(f"{file}: the captions of {image} must be texts that are not empty, not {said!r}")
    return image, said


def _check(entries: list[tuple[str, list[str]]], file: Path) -> None:
    if not entries:
        raise ValueError(f"{file} has no image.")
    twice = [name for name, times in Counter(name for name, _ in entries).items() if times > 1]
    if twice:
        raise ValueError(f"{file}: {len(twice)} images are there twice, the first: {twice[0]}")
    silent = [name for name, said in entries if not said]
    if silent:
        raise ValueError(f"{file}: {len(silent)} images have no caption, the first: {silent[0]}")
