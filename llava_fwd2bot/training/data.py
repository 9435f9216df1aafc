"""LLaVA's conversation JSON and caption pairs -> the standard batch of transformers' LLaVA classes.

A record is `{"id", "image": name or list (optional), "conversations": [{"from": "human" | "gpt", "value"}, ...],
"caption": text or list (optional)}`. In the batch each picture stands as its n placeholder ids, as the host's
processor writes them. The whole conversation is tokenised once and labels are set by character offsets, so there are
no rounds to re-tokenise and LLaVA's "tokenization mismatch" cannot happen.

Shapes: B rows, T tokens, L caption tokens, N pictures of a record, M pictures of a batch.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..files.text import decode_text, parse_json
from ..processing.conversation import PLACEHOLDER, ConversationFormatter, needs_bos
from ..processing.images import DEFAULT_MAX_PIXELS, ImageError, ImageReader
from .collator import IGNORE_INDEX, few

WORDS_PER_IMAGE = 128  # LLaVA's weight of a picture when it groups rows by length


@dataclass(slots=True)
class _Row:
    name: str
    images: list[str]
    turns: list[dict]
    captions: list[str]


def read_records(path: str | Path, lines: bool | None = None) -> list[dict]:
    """The records of a .json list or a .jsonl (`lines`, whatever its name is); errors name the file and the place."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    return parse_records(path.read_bytes(), path, path.suffix == ".jsonl" if lines is None else lines)


def parse_records(content: bytes, path: Path, lines: bool) -> list[dict]:
    """The records in the `content` of `path`, or in a part of it; ValueError that names `path` and the place."""
    text = decode_text(content, path)
    records: Any = []
    if lines:
        # Not splitlines(): a string may hold U+2028 and its like, which are no line ends in JSON.
        for number, part in enumerate(text.split("\n"), start=1):
            part = part.removeprefix("\ufeff")  # files with marks may have been joined
            records += [parse_json(part, path, number)] if part.strip() else []
    elif text.strip():
        records = parse_json(text, path)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: should be a list of records (JSON objects)")
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def with_labels(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of `text`, [T], and its labels, [T]: the ids in the answers' spans, IGNORE_INDEX elsewhere."""
    options = {"add_special_tokens": needs_bos(tokenizer, text), "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(text, **options)
    ids = torch.tensor(encoded["input_ids"])
    labels = torch.full_like(ids, IGNORE_INDEX)
    # A token counts if it overlaps an answer: "▁word" may begin with a space that belongs to the prompt.
    start, end = torch.tensor(encoded["offset_mapping"]).unbind(-1)
    for first, last in spans:
        inside = (start < last) & (torch.maximum(end, start + 1) > first)
        labels[inside] = ids[inside]
    return ids, labels


def _strings(value: Any, name: str, field: str) -> list[str]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise ValueError(f"{name}: '{field}' should be a text or a list of texts, not {value!r}")
    return [item for item in values if item.strip()]


def _turns(record: dict, name: str, num_images: int) -> tuple[list[dict], bool]:
    """The checked turns, and whether a leading gpt turn was dropped (LLaVA drops it too)."""
    turns = record.get("conversations") or []
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
    if any(PLACEHOLDER in turn["value"] for turn in turns[1::2]):
        raise ValueError(f"{name}: {PLACEHOLDER} stands in an answer; it may only stand in a human turn")
    found = sum(turn["value"].count(PLACEHOLDER) for turn in turns)
    if turns and found != num_images:
        remedy = f"put '{PLACEHOLDER}\\n' before the question, once for each picture"
        if found > num_images:
            remedy = f"name the pictures in 'image', or take {PLACEHOLDER} out of the text"
        raise ValueError(f"{name}: {found} {PLACEHOLDER} in the conversation but {num_images} image(s); {remedy}")
    return turns, dropped


class LlavaDataset(Dataset):
    """LLaVA records and caption pairs as model inputs.

    Args:
        data_path: LLaVA's .json list or .jsonl; None for captions alone.
        processor: the host's processor; its tokenizer must be a fast one.
        image_folder: where the names of the pictures are looked for; files are opened at access, not here.
        caption_data: .json or .jsonl of {"image", "caption"} or {"image", "captions": [...]}. A record with that
            one picture gets the caption unless it has its own; pictures that no such record shows become extra rows.
        version: see `ConversationFormatter`.
        model_max_length: rows are cut to this many ids (placeholders counted), on the right.
        max_pixels: see `open_image`.
        caption_max_length: captions are cut to this many ids.
        seed: with the epoch and the index, decides which of several captions a row gets.

    Raises:
        FileNotFoundError, ValueError: a data file is missing, malformed or empty, or a record is wrong (named).
    """

    def __init__(
        self,
        data_path: str | Path | None,
        processor: Any,
        image_folder: str | Path | None = None,
        caption_data: str | Path | None = None,
        version: str = "auto",
        model_max_length: int = 2048,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        caption_max_length: int = 77,
        seed: int = 0,
    ):
        if data_path is None and caption_data is None:
            raise ValueError("no data: give data_path, caption_data or both")
        self.tokenizer = processor.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError("labels need character offsets, which only a fast tokenizer gives; use one")
        self.formatter = ConversationFormatter(processor, version)
        self.reader = ImageReader(processor, image_folder, max_pixels)
        self.model_max_length = model_max_length
        self.caption_max_length = caption_max_length
        self.seed = seed
        # Shared memory: workers that outlive an epoch (persistent_workers) see set_epoch too.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.rows = self._conversation_rows(data_path) if data_path is not None else []
        if caption_data is not None:
            self._add_captions(caption_data)

    def _conversation_rows(self, path: str | Path) -> list[_Row]:
        rows, dropped = [], []
        for i, record in enumerate(read_records(path)):
            name = f"record {i}" + (f' (id "{record["id"]}")' if record.get("id") is not None else "")
            images = _strings(record.get("image"), name, "image")
            captions = _strings(record.get("caption"), name, "caption")
            turns, first_dropped = _turns(record, name, len(images))
            if not turns and not captions:
                raise ValueError(f"{name}: neither 'conversations' nor 'caption'; there is nothing to learn from it")
            if captions and not images:
                raise ValueError(f"{name}: a 'caption' but no 'image' that it describes")
            if turns:
                self.formatter.check(turns, name)
            dropped += [name] if first_dropped else []
            rows.append(_Row(name, images, turns, captions))
        if dropped:
            message = f"dropped the leading gpt turn of {len(dropped)} record(s), as LLaVA does: {few(dropped)}"
            warnings.warn(message, stacklevel=3)
        return rows

    def _add_captions(self, path: str | Path) -> None:
        captions: dict[str, list[str]] = {}
        for i, entry in enumerate(read_records(path)):
            name = f"{path}: caption entry {i}"
            images = _strings(entry.get("image"), name, "image")
            texts = _strings(entry.get("caption", entry.get("captions")), name, "caption")
            if len(images) != 1 or not texts:
                raise ValueError(f"{name}: needs one 'image' and a 'caption' (or 'captions') that is not empty")
            captions.setdefault(images[0], []).extend(texts)
        alone = dict(captions)
        for row in self.rows:
            if len(row.images) == 1 and row.images[0] in captions:
                row.captions = row.captions or captions[row.images[0]]
                alone.pop(row.images[0], None)
        self.rows += [_Row(f'caption of "{image}"', [image], [], texts) for image, texts in alone.items()]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_captions(self) -> bool:
        """Whether any row can feed the contrastive loss."""
        return any(row.captions for row in self.rows)

    @property
    def lengths(self) -> list[int]:
        """Rough length of each row in words; opens no picture."""
        return [
            max(sum(len(turn["value"].split()) for turn in row.turns) + (WORDS_PER_IMAGE if row.images else 0), 1)
            for row in self.rows
        ]

    @property
    def modality_lengths(self) -> list[int]:
        """`lengths`, negative for rows without a picture."""
        return [n if row.images else -n for n, row in zip(self.lengths, self.rows, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Choose this epoch's captions: by (seed, epoch, index) alone, so a resumed run sees the same ones."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: record, input_ids [T], labels [T]; if any, pixel_values [N, 3, H, W], image_sizes, caption_ids [L].

        Raises:
            ImageError: a picture is missing or unusable; the message names record and file.
            ValueError: the row does not fit model_max_length with its placeholders whole.
        """
        row = self.rows[index]
        item: dict[str, Any] = {"record": row.name}
        counts: list[int] = []
        if row.images:
            try:
                pixels, counts = self.reader(row.images)
            except ValueError as error:
                kind = ImageError if isinstance(error, ImageError) else ValueError
                raise kind(f"{row.name}: {error}") from error
            item.update(pixels)
        text, spans = self.reader.image_token * len(counts), []
        if row.turns:
            text, spans = self.formatter(row.turns, row.name)
        item["input_ids"], item["labels"] = self._encode(text, spans, counts, row.name)
        if row.captions:
            choice = random.Random(f"{self.seed}-{int(self._epoch)}-{index}").choice(row.captions)
            ids = self.tokenizer(choice.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            item["caption_ids"] = torch.tensor(ids[: self.caption_max_length])  # [L]
        return item

    def _encode(
        self, text: str, spans: list[tuple[int, int]], counts: list[int], name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = with_labels(self.tokenizer, text, spans)  # [T'], one id per picture
        is_image = ids == self.reader.image_token_id
        if int(is_image.sum()) != len(counts):
            raise ValueError(
                f"{name}: its text came out with {int(is_image.sum())} image token(s) for {len(counts)} image(s); the "
                f"text may quote {self.reader.image_token!r}, or the chat template may not write it for each picture"
            )
        labels[is_image] = IGNORE_INDEX
        repeats = torch.ones_like(ids)
        repeats[is_image] = torch.tensor(counts, dtype=torch.long)
        ids, labels, is_image = (x.repeat_interleave(repeats) for x in (ids, labels, is_image))  # [T]
        needed = int(is_image.nonzero()[-1]) + 1 if counts else 0
        if needed > self.model_max_length:
            raise ValueError(
                f"{name}: its pictures end at token {needed}, beyond --model_max_length {self.model_max_length}, and "
                "placeholders cannot be cut; raise --model_max_length or use fewer or smaller pictures"
            )
        length = self.model_max_length if spans else needed  # a caption's row ends with its picture
        return ids[:length], labels[:length]
