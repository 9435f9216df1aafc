"""One record of the data: checked, its images wherever it names them, its turns and captions.

Images are read from LLaVA's `image` and from what other tools call it; what cannot be read is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.conversation import PLACEHOLDER
from .messages import turns_of_messages

IMAGE_KEYS = ("image", "images", "image_path", "image_paths")  # the first is LLaVA's
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_KNOWN = {*IMAGE_KEYS, *_OTHER_MEDIA, "id", "conversations", "messages", "caption", "captions"}
_TURNS = ("conversation", "dialog")
LAYOUTS = (
    "'conversations' (LLaVA: [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': text}]), 'messages' (OpenAI, "
    "TRL: [{'role': 'user', 'content': text or parts}, {'role': 'assistant', …}]), or 'caption' (or 'captions'), "
    f"with the images under {', '.join(map(repr, IMAGE_KEYS))}"
)
_VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gifv")


@dataclass(slots=True)
class Row:
    name: str
    images: list[str]
    turns: list[dict]
    captions: list[str]


def strings(value: Any, name: str, field: str) -> list[str]:
    """The texts of a field that holds one, a list, or nothing; ValueError that names the record for anything else."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise ValueError(f"{name}: '{field}' should be a text or a list of texts, not {value!r}")
    return [item for item in values if item.strip()]


def images_of(record: dict[str, Any], name: str) -> list[str]:
    """The names of the record's images, whichever of `IMAGE_KEYS` has them.

    Raises:
        ValueError: two keys name different images, or the record brings a video, sound, or an image under a key that
            is not read: it would be trained on without it. The message begins with `name`.
    """
    found = {key: names for key in IMAGE_KEYS if key in record for names in [strings(record[key], name, key)] if names}
    if len({tuple(names) for names in found.values()}) > 1:
        raise ValueError(f"{name}: {' and '.join(map(repr, found))} name different images; keep 'image' alone")
    for key in _OTHER_MEDIA:
        if record.get(key):
            raise ValueError(
                f"{name}: has {key!r} ({_short(record[key])}), and only images are trained on; take it out"
            )
    if found:
        return next(iter(found.values()))
    for key, value in record.items():
        if key not in _KNOWN and _names_media(value):
            raise ValueError(
                f"{name}: {key!r} seems to name an image ({_short(value)}), but images are read from "
                f"{', '.join(map(repr, IMAGE_KEYS))}; rename it to 'image'"
            )
    return []


def captions_of(record: dict[str, Any], name: str) -> list[str]:
    """The record's captions: its `caption`, a text or a list; where there is none, its `captions`.

    Raises:
        ValueError: they are something else; the message begins with `name`.
    """
    return strings(record.get("caption"), name, "caption") or strings(record.get("captions"), name, "captions")


def captions_of_images(entries: Iterable[dict[str, Any]], path: str | Path) -> dict[str, list[str]]:
    """Image → captions, of the entries of the caption file `path`; an image may have several entries.

    Raises:
        ValueError: an entry has not one image, or no caption; the message names the file and the entry.
    """
    found: dict[str, list[str]] = {}
    for i, entry in enumerate(entries):
        name = f"{path}: {name_of('caption entry', i, entry)}"
        images, texts = images_of(entry, name), captions_of(entry, name)
        if len(images) != 1 or not texts:
            raise ValueError(f"{name}: needs one 'image' and a 'caption' (or 'captions') that is not empty")
        found.setdefault(images[0], []).extend(texts)
    return found


def turns_of(record: dict[str, Any], name: str) -> list[Any]:
    """The record's `conversations`, empty where it has none.

    Raises:
        ValueError: the turns stand under a key of another layout.
    """
    turns = record.get("conversations") or []
    for key in _TURNS:
        if not turns and record.get(key):
            raise ValueError(f"{name}: its turns stand under {key!r}, another layout; what is read is {LAYOUTS}")
    return turns


def row_of(record: dict[str, Any], name: str) -> tuple[Row, bool]:
    """The row of one record, and whether a leading gpt turn was dropped, as LLaVA does.

    Raises:
        ValueError: the record is wrong; the message begins with `name`.
    """
    images, captions = images_of(record, name), captions_of(record, name)
    if record.get("messages") and not record.get("conversations"):
        turns, images = turns_of_messages(record["messages"], images, name)
        record = {**record, "conversations": turns}
    turns, dropped = _turns(record, name, len(images))
    if not turns and not captions:
        keys = ", ".join(map(repr, list(record)[:12])) or "none"
        raise ValueError(
            f"{name}: neither 'conversations' nor 'caption'; there is nothing to learn from it. Its keys are {keys}; "
            f"what is read is {LAYOUTS}"
        )
    if captions and not images:
        raise ValueError(f"{name}: a 'caption' but no 'image' that it describes")
    return Row(name, images, turns, captions), dropped


def _turns(record: dict, name: str, num_images: int) -> tuple[list[dict], bool]:
    """The checked turns, and whether a leading gpt turn was dropped (LLaVA drops it too)."""
    turns = turns_of(record, name)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"{name}: turn {i} should be {{'from': ..., 'value': text}}")
        if turn.get("from") not in ("human", "gpt"):
            raise ValueError(f"{name}: turn {i} is from {turn.get('from')!r}; known are 'human' and 'gpt'")
    dropped = bool(turns) and turns[0]["from"] == "gpt"
    turns = turns[1:] if dropped else turns
    order = [turn["from"] for turn in turns]
    if order != ["human", "gpt"] * (len(turns) // 2) or (dropped and not turns):
        raise ValueError(f"{name}: turns should go human, gpt, human, gpt, ... and end with gpt, not {order}")
    if not num_images:  # a placeholder is a quotation there
        return turns, dropped
    if any(PLACEHOLDER in turn["value"] for turn in turns[1::2]):
        raise ValueError(f"{name}: {PLACEHOLDER} stands in an answer; it may only stand in a human turn")
    found = sum(turn["value"].count(PLACEHOLDER) for turn in turns)
    if turns and found != num_images:
        remedy = f"put '{PLACEHOLDER}\\n' before the question, once for each picture"
        if found > num_images:
            remedy = f"name all pictures in 'image', or take {PLACEHOLDER} out of the text"
        raise ValueError(f"{name}: {found} {PLACEHOLDER} in the conversation but {num_images} image(s); {remedy}")
    return turns, dropped


def _names_media(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_names_media, value))
    if isinstance(value, dict):
        return "bytes" in value or _names_media(value.get("path") or value.get("url"))
    if not isinstance(value, str) or "\n" in value[:512]:
        return False
    return value.startswith("data:image/") or (len(value) < 1024 and value.lower().endswith(media_endings()))


@cache
def media_endings() -> tuple[str, ...]:
    """The endings of image and video files, whether they are read here or not."""
    Image.init()
    return (*Image.registered_extensions(), *_VIDEO_ENDINGS)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def name_of(kind: str, number: int, record: dict[str, Any]) -> str:
    """What messages call a record: its number, and its id if it has one."""
    return f"{kind} {number}" + (f' (id "{record["id"]}")' if record.get("id") is not None else "")
