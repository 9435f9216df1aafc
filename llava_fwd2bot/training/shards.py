"""WebDataset's shards as training data: tar files that hold each record beside its image.

    000.tar:  0001.jpg  0001.json  0002.png  0002.json  0003.jpg  0003.txt ...

The files of a sample share a key: the name up to its first dot. KEY.json is a LLaVA record, or a list of records of the
one image; KEY.txt is a caption. The shards are read through once for the records. An image is then read by its place,
so that rows can be taken in any order.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files.folders import format_counts, matching, reason_of, tree
from ..files.images import ImageError, extensions
from ..files.tar import compression, is_tar_name, members, read_part
from ..files.text import decode_text, is_utf8, parse_json, spelled
from .messages import image_parts, take_file
from .records import IMAGE_KEYS, captions_of, images_of, media_endings

_LEARNT = ("conversations", "messages", "caption", "captions")
_BRACES = re.compile(r"\{([^{}]+)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def shard_paths(path: str | Path) -> list[Path]:
    """The tar files that `path` names, in order; none where it names something else.

    It names one, a pattern, or a folder with tar files in or below it. In a pattern "{000..009}" (numbers) and "{a,b}"
    are spelled out, and wildcards match what is there. Hidden files of a folder are left out.

    Raises:
        FileNotFoundError: one is not there, or a pattern matches none.
        ValueError: one is compressed, or has a name that is not UTF-8; a folder has both tar and parquet files, so that
            it does not say what to read.
    """
    path = Path(path)
    if path.is_dir():
        found = [] if {"state.json", "dataset_dict.json"} & set(os.listdir(path)) else _tar_files(path)
    else:
        found = list(_named(path)) if is_tar_name(path.name) else []
    for shard in found:
        if not is_utf8(str(shard)):  # images are named by it, and those names are written as text
            raise ValueError(f"{spelled(str(shard))}: its name is not UTF-8; rename it")
        if packed := compression(shard):
            raise ValueError(
                f"{shard}: compressed by {packed}, and training reads images of a shard in any order, which a "
                "compressed file does not allow. Unpack it to a .tar, or pack it again as one."
            )
    return list(dict.fromkeys(found))


def _named(path: Path) -> Iterator[Path]:
    for name in [str(path)] if os.path.lexists(path) else _spelled_out(str(path)):
        if os.path.lexists(name):
            yield from _tar_files(Path(name)) if os.path.isdir(name) else [Path(name)]
        elif glob.has_magic(name):
            matches = [Path(match) for match in matching(name, _raise, Counter())]
            if not matches:
                raise FileNotFoundError(f"{name}: no file matches")
            yield from matches
        else:
            of = "" if name == str(path) else f", of {path}"
            raise FileNotFoundError(f"{name}: no such data file{of}")


class _Part(NamedTuple):
    """A member of a sample; a shard may have many, so no more is kept of each."""

    name: str
    start: int
    size: int


class Shards:
    """The records and images of tar files; see this module's docstring.

    Args:
        path: what `shard_paths` takes. shards: what it gives, where that is known.

    Attributes:
        digest: SHA-256 of the members' names and sizes and of the texts, once the records were read through. Images
            are not in it, as they are not for other layouts.

    Raises:
        FileNotFoundError, ValueError: as of `shard_paths`.
    """

    def __init__(self, path: str | Path, shards: Sequence[Path] | None = None) -> None:
        self.path = Path(path)
        self.shards = list(shard_paths(path) if shards is None else shards)
        self.digest: str | None = None
        self._index(bytearray(), array("q"))

    def _index(self, digests: bytearray, places: array) -> None:
        names = np.frombuffer(bytes(digests), dtype="S32")
        order = np.argsort(names, kind="stable")
        self._names = names[order]  # [N] hexadecimal digests of the images' names, sorted
        self._places = np.frombuffer(places, dtype=np.int64).reshape(-1, 3)[order]  # [N, 3]: shard, start, size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records; images can be read once all were given. An image is named "SHARD/MEMBER".

        Raises:
            ValueError: a tar file is damaged, a member is no record or has no partner, or two are of one kind; the
                message names the shard and the member.
        """
        content, digests, places = hashlib.sha256(), bytearray(), array("q")
        left_out: Counter[str] = Counter()
        count = 0
        for number, shard in enumerate(self.shards):
            for key, parts in _samples(shard, left_out).items():
                texts = {kind: read_part(shard, *parts[kind][1:]) for kind in (".json", ".txt") if kind in parts}
                sizes = [[part.name, part.size] for part in parts.values()]
                content.update(json.dumps([shard.name, sizes]).encode() + b"".join(texts.values()))
                image = parts.get("image")
                if image is not None:
                    digests += _digest(f"{shard}/{image.name}")
                    places.extend((number, image.start, image.size))
                for record in _records(shard, key, parts, texts):
                    count += 1
                    yield record
        if not count:
            raise ValueError(f"{self.path}: no records; a shard holds KEY.json beside KEY.jpg, or KEY.txt")
        if left_out:
            warnings.warn(f"{self.path}: left out of the shards: {format_counts(left_out)}", stacklevel=3)
        self._index(digests, places)
        self.digest = content.hexdigest()

    def _find(self, name: str) -> int | None:
        wanted = np.bytes_(_digest(name))
        at = int(np.searchsorted(self._names, wanted))
        return at if at < len(self._names) and self._names[at] == wanted else None

    def holds(self, name: str) -> bool:
        """Whether `name` is of an image in the shards."""
        return self._find(name) is not None

    def image(self, name: str) -> bytes | None:
        """The file's bytes of an image in the shards; None for other names.

        Raises:
            ImageError: the shard cannot be read any more.
        """
        at = self._find(name)
        if at is None:
            return None
        number, start, size = self._places[at].tolist()
        try:
            return read_part(self.shards[number], start, size)
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"{name}: its shard changed or cannot be read ({reason}); start anew") from error


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest().encode()


def _samples(shard: Path, left_out: Counter[str]) -> dict[str, dict[str, _Part]]:
    """Key → the members of a sample as "image", ".json" and ".txt"."""
    images, media = extensions(), media_endings()
    found: dict[str, dict[str, _Part]] = {}
    for member in members(shard):
        folder, slash, own = member.name.rpartition("/")
        stem = own.partition(".")[0]
        if not stem or (own.startswith("__") and own.endswith("__")):
            continue  # hidden files, such as macOS adds, and WebDataset's own
        ending = os.path.splitext(own)[1].lower()
        kind = "image" if ending in images else ending
        if kind not in ("image", ".json", ".txt"):
            if ending in media:
                raise ValueError(
                    f"{shard}/{member.name}: {ending} is not read; convert it to .jpg or .png, or take it out"
                )
            left_out[reason_of(None, ending)] += 1
            continue
        if not is_utf8(member.name):  # names are written to files of text
            raise ValueError(f"{shard}/{spelled(member.name)}: its name is not UTF-8; rename it")
        if member.problem is not None:
            raise ValueError(f"{shard}/{member.name}: {member.problem}")
        parts = found.setdefault(f"{folder}{slash}{stem}", {})
        if kind in parts:
            what = "images" if kind == "image" else f"{kind} files"
            raise ValueError(
                f"{shard}: two {what} have the key {folder}{slash}{stem}: {parts[kind].name} and {member.name}. The "
                "key is the name up to its first dot; keep one, or give the other a key and a record of its own"
            )
        parts[kind] = _Part(member.name, member.start, member.size)
    return found


def _records(shard: Path, key: str, parts: dict[str, _Part], texts: dict[str, bytes]) -> list[dict[str, Any]]:
    """The records of one sample, each with the name of its image and its place as `id`."""
    image = parts.get("image")
    if ".json" not in parts and (image is None or ".txt" not in parts):
        (alone,) = parts.values()
        wanted = f"{key}.json or {key}.txt" if image is not None else f"image {key}.jpg, .png, …"
        raise ValueError(f"{shard}/{alone.name}: has no partner; there should be the {wanted} in the same shard")
    records: Any = {}
    if ".json" in parts:
        where = f"{shard}/{parts['.json'].name}"
        records = parse_json(decode_text(texts[".json"], where), where)
    records = records if isinstance(records, list) else [records]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{shard}/{key}.json: should be a record (a JSON object), or a list of records of its image")
    if ".txt" in parts:
        where = f"{shard}/{parts['.txt'].name}"
        caption = decode_text(texts[".txt"], where).strip()
        if not caption and not all(any(map(record.get, _LEARNT)) for record in records):
            raise ValueError(f"{where}: the text is empty, and there is nothing else to learn from the sample")
        records = [{**r, "caption": captions_of(r, f"{shard}/{key}.json") or caption} for r in records]
    name = None if image is None else f"{shard}/{image.name}"
    return [{**_with_image(record, name, f"{shard}/{key}.json"), "id": f"{shard.name}/{key}"} for record in records]


def _with_image(record: dict[str, Any], image: str | None, where: str) -> dict[str, Any]:
    """The record with the image that stands beside it, in the place of the name that the image had before."""
    shown = image_parts(record.get("messages"))
    files = list(filter(None, map(take_file, shown)))
    if image is None:
        named = images_of(record, where) or files
        if named or shown:
            what = f"names the image {named[0]!r}" if named else "shows an image"
            raise ValueError(f"{where}: {what}, and has no partner: there is no image of its key in the same shard")
        return record
    named = images_of({key: record[key] for key in IMAGE_KEYS if key in record}, where)
    if len({*named, *files}) > 1:
        raise ValueError(
            f"{where}: names {len({*named, *files})} images, and in a shard a record has the one of its key"
        )
    return {**{key: value for key, value in record.items() if key not in IMAGE_KEYS}, "image": image}


def _tar_files(folder: Path) -> list[Path]:
    """The tar files in and below a folder; hidden ones, such as macOS adds, are none of the data."""
    found: dict[str, list[Path]] = {"tar": [], "parquet": []}
    for place, names in tree(folder, _raise, Counter()):
        hidden = any(part.startswith(".") for part in place.relative_to(folder).parts)
        for name in () if hidden else names:
            kind = "tar" if is_tar_name(name) else name.rpartition(".")[2]
            if kind in found and not name.startswith("."):
                found[kind].append(place / name)
    if all(found.values()):
        raise ValueError(
            f"{folder} holds both .tar and .parquet files: name those to read, as {folder}/*.tar, or move the .parquet "
            "files to a folder of their own and name that"
        )
    return sorted(found["tar"])


def _spelled_out(name: str) -> list[str]:
    """`name` with its braces spelled out; those that are no list and no range of numbers stay."""
    for braces in _BRACES.finditer(name):
        if (numbers := _RANGE.fullmatch(braces[1])) is not None:
            first, last = numbers.groups()
            padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
            width = max(len(first), len(last)) if padded else 1
            step = 1 if int(first) <= int(last) else -1
            values = [f"{i:0{width}d}" for i in range(int(first), int(last) + step, step)]
        elif "," in braces[1]:
            values = braces[1].split(",")
        else:
            continue
        before, after = name[: braces.start()], name[braces.end() :]
        return [full for value in values for full in _spelled_out(f"{before}{value}{after}")]
    return [name]


def _raise(error: OSError) -> None:
    raise error
