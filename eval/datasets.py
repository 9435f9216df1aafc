"""Images and their captions, in the formats that people have on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fwd2bot.config import read_any_json
from llava_fwd2bot.data import read_records

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
        FileNotFoundError, ValueError: the file or an image is missing, an image is there twice or has no caption.
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
    _check(entries, file, split)
    paths = [images / name for name, _ in entries]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        problem = f"{len(missing)} of {len(paths)} images of {file} are missing, the first"
        raise FileNotFoundError(2, problem, str(missing[0]))
    return Captioned(dataset if dataset in KNOWN else file.stem, paths, [said for _, said in entries])


def _entries(file: Path, split: str) -> list[tuple[str, list[str]]]:
    if file.suffix == ".jsonl":
        return [_entry(record, file) for record in read_records(file)]
    try:
        data = read_any_json(file)
    except ValueError as error:
        raise ValueError(f"{error} Or is it one object per line? Then name it .jsonl") from None
    if isinstance(data, list):
        return [_entry(record, file) for record in data]
    if "annotations" in data:  # COCO's and NoCaps'
        said: dict[Any, list[str]] = {}
        for entry in data["annotations"]:
            said.setdefault(entry["image_id"], []).append(entry["caption"])
        chosen = [image for image in data["images"] if split == "test" or image.get("domain", split) == split]
        return [(image["file_name"], said.get(image["id"], [])) for image in chosen]
    if "images" in data:  # Karpathy's
        return [
            (str(Path(image.get("filepath", "")) / image["filename"]), [s["raw"] for s in image["sentences"]])
            for image in data["images"]
            if image["split"] == split
        ]
    raise ValueError(f"{file} is neither Karpathy's, COCO's nor a list of {{'image', 'captions'}}.")


def _entry(record: Any, file: Path) -> tuple[str, list[str]]:
    image = record.get("image") if isinstance(record, dict) else None
    if not isinstance(image, str):
        raise ValueError(f"{file}: a record has no 'image': {str(record)[:80]}")
    said = record.get("captions", record.get("caption"))
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or not all(isinstance(text, str) and text.strip() for text in said):
        raise ValueError(f"{file}: the captions of {image} must be texts that are not empty, not {said!r}")
    return image, said


def _check(entries: list[tuple[str, list[str]]], file: Path, split: str) -> None:
    if not entries:
        raise ValueError(f"{file} has no image in split {split!r}.")
    twice = [name for name, times in Counter(name for name, _ in entries).items() if times > 1]
    if twice:
        raise ValueError(f"{file}: {len(twice)} images are there twice, the first: {twice[0]}")
    silent = [name for name, said in entries if not said]
    if silent:
        raise ValueError(f"{file}: {len(silent)} images have no caption, the first: {silent[0]}")
