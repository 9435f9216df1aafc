"""LLaVA's conversation JSON and caption pairs -> the standard batch of transformers' LLaVA classes.

A record is `{"id", "image": name or list (optional), "conversations": [{"from": "human" | "gpt", "value"}, ...],
"caption" or "captions": text or list (optional)}`; records.py has the other names that images are read from. In the
batch each picture stands as its n placeholder ids, as the host's processor writes them. The whole conversation is
tokenised once and labels are set by character offsets, so that LLaVA's "tokenization mismatch" cannot happen.

Shapes: B rows, T tokens, L caption tokens, N pictures of a record, M pictures of a batch.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..files.check import ON_BAD_IMAGE, refuse_unusable, unusable
from ..files.records import read_records
from ..files.tables import Table, is_table
from ..processing.conversation import PLACEHOLDER, ConversationFormatter
from ..processing.images import DEFAULT_MAX_PIXELS, ImageError, ImageReader
from .bad_images import BadImages
from .collator import first_names
from .packed import PackedRows
from .records import Row, captions_of_images, name_of, row_of
from .shards import Shards, shard_paths
from .tokenized import QuotingTokenizer, repeat_images, with_labels

WORDS_PER_IMAGE = 128  # LLaVA's weight of a picture when it groups rows by length


class LlavaDataset(Dataset):
    """LLaVA records and caption pairs as model inputs.

    Args:
        data_path: a .json list or .jsonl; a parquet file, or a folder of them or by `datasets.save_to_disk` (extra
            [datasets]); WebDataset's shards, see `shards.shard_paths`; None for captions alone.
        processor: the host's processor; its tokenizer must be a fast one.
        image_folder: where the names of the pictures are looked for; files are opened at access, not here.
        caption_data: files as these, of {"image", "caption"} or {"image", "captions": [...]}. A record with that
            one picture gets the caption unless it has its own; pictures that no such record shows become extra rows.
        version: see `ConversationFormatter`.
        model_max_length: rows are cut to this many ids (placeholders counted), on the right.
        max_pixels: see `open_image`.
        caption_max_length: captions are cut to this many ids.
        seed: with the epoch and the index, decides which of several captions a row gets.
        image_input_names: what the model takes of the image processor's tensors; None takes all.
        on_bad_image: "raise", or "skip": another row stands in for one whose picture cannot be used, and the picture
            is named once and counted in `skipped_images`.

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
        image_input_names: Sequence[str] | None = None,
        on_bad_image: str = "raise",
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image must be one of {', '.join(ON_BAD_IMAGE)}, got {on_bad_image!r}")
        if data_path is None and caption_data is None:
            raise ValueError("no data: give data_path, caption_data or both")
        self.tokenizer = processor.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError("labels need character offsets, which only a fast tokenizer gives; use one")
        self.formatter = ConversationFormatter(processor, version)
        self.tables: list[Table | Shards] = []  # whose rows hold their images
        self.reader = ImageReader(processor, image_folder, max_pixels, image_input_names, self._stored)
        self.model_max_length = model_max_length
        self.caption_max_length = caption_max_length
        self.seed = seed
        self._read: dict[tuple[str, ...], Any] | None = None  # pictures of the batch that is being read
        # Shared memory: workers that outlive an epoch (persistent_workers) see set_epoch too.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        rows = self._conversation_rows(data_path) if data_path is not None else []
        if caption_data is not None:
            self._add_captions(rows, caption_data)
        self.rows = PackedRows(rows)
        self.on_bad_image = on_bad_image
        names = (name for row in self.rows for name in row.images) if on_bad_image == "skip" else ()
        self.bad_images = BadImages(names)

    def _records(self, path: str | Path) -> Iterable[dict[str, Any]]:
        shards = shard_paths(path)
        if not (shards or is_table(path)):
            return read_records(path)
        table = Shards(path, shards) if shards else Table(path)
        self.tables.append(table)
        return table

    def _stored(self, name: str) -> bytes | None:
        """The file's bytes of a picture that is in a table or a shard."""
        return next((data for table in self.tables if (data := table.image(name)) is not None), None)

    def _conversation_rows(self, path: str | Path) -> list[Row]:
        rows, dropped, quoting = [], [], []
        for i, record in enumerate(self._records(path)):
            name = name_of("record", i, record)
            try:
                row, first_dropped = row_of(record, name)
                if row.turns:
                    self.formatter.check(row.turns, name, bool(row.images))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            dropped += [name] if first_dropped else []
            quoting += [name] if not row.images and any(PLACEHOLDER in turn["value"] for turn in row.turns) else []
            rows.append(row)
        if dropped:
            message = f"dropped the leading gpt turn of {len(dropped)} record(s), as LLaVA does: {first_names(dropped)}"
            warnings.warn(message, stacklevel=3)
        if quoting:
            message = f"{len(quoting)} record(s) without a picture hold {PLACEHOLDER}, which is text there, as in LLaVA"
            warnings.warn(f"{message}: {first_names(quoting)}", stacklevel=3)
        return rows

    def _add_captions(self, rows: list[Row], path: str | Path) -> None:
        captions = captions_of_images(self._records(path), path)
        alone = dict(captions)
        for row in rows:
            if len(row.images) == 1 and row.images[0] in captions:
                row.captions = row.captions or captions[row.images[0]]
                alone.pop(row.images[0], None)
        rows += [Row(f'caption of "{image}"', [image], [], texts) for image, texts in alone.items()]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_captioned(self) -> int:
        """How many rows can feed the contrastive loss."""
        return int((self.rows.captions > 0).sum())

    @property
    def num_images(self) -> int:
        """How many distinct images the rows name."""
        return self.rows.distinct_images

    @property
    def has_images(self) -> bool:
        return bool(self.rows.images.any())

    def check_files(self) -> None:
        """Looks for every picture's file, and opens none. With `on_bad_image="skip"` rows without theirs are taken out.

        Raises:
            ImageError: files are missing or empty; their number, and the first ten by record and name. With "skip":
                no row would be left.
        """
        owners: dict[str, str] = {}
        for row in self.rows:
            for image in row.images:
                if not any(table.holds(image) for table in self.tables):
                    owners.setdefault(image, row.name)
        bad = unusable(owners, self.reader.image_folder)
        kept = [row for row in self.rows if not any(image in bad for image in row.images)]
        if self.on_bad_image == "raise" or not kept:
            remedy = "leave the records out by --on_bad_image skip" if kept else "give other data"
            return refuse_unusable(bad, owners, len(owners), self.reader.image_folder, remedy)
        for image, reason in bad.items():
            self.bad_images.skip(image, f"{owners[image]}: {Path(self.reader.image_folder or '', image)}: {reason}")
        self.rows = PackedRows(kept)

    @property
    def skipped_images(self) -> list[str]:
        """The pictures that could not be used so far, by this process or its workers."""
        return self.bad_images.skipped

    @property
    def lengths(self) -> list[int]:
        """Rough length of each row in words; opens no picture."""
        return np.maximum(self.rows.words + WORDS_PER_IMAGE * (self.rows.images > 0), 1).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """`lengths`, negative for rows without a picture."""
        return [n if images else -n for n, images in zip(self.lengths, self.rows.images, strict=True)]

    @property
    def image_groups(self) -> list[int]:
        """A number for each row, which rows of the same images share; rows of text have one of their own."""
        return self.rows.groups.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose this epoch's captions: by (seed, epoch, index) alone, so a resumed run sees the same ones."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: record, input_ids [T], labels [T]; if any, pixel_values [N, 3, H, W], image_sizes, caption_ids [L].

        Raises:
            ImageError: a picture is missing or unusable; the message names record and file. With
                `on_bad_image="skip"` the next row that can be used is given instead, always the same one.
            ValueError: the row does not fit model_max_length with its placeholders whole.
        """
        if not -len(self.rows) <= index < len(self.rows):
            raise IndexError(f"row {index} of {len(self.rows)}")
        for step in range(len(self.rows)):
            at = (index + step) % len(self.rows)
            if self.bad_images.any_of(self.rows[at].images):
                continue
            try:
                return self._item(at)
            except ImageError as error:
                if self.on_bad_image == "raise":
                    raise
                self.bad_images.skip(error.image or self.rows[at].images[0], str(error))
        raise ImageError("not one row is left: none of the pictures can be used")

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, as PyTorch's loader asks for them; pictures that several show are read once."""
        self._read = {}
        try:
            return [self[i] for i in indices]
        finally:
            self._read = None

    def _images_of(self, row: Row) -> tuple[dict[str, torch.Tensor], list[int]]:
        names = tuple(row.images)
        if self._read is None:
            return self.reader(names)
        if names not in self._read:
            self._read[names] = self.reader(names)
        return self._read[names]

    def _item(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        item: dict[str, Any] = {"record": row.name}
        counts: list[int] = []
        if row.images:
            try:
                pixels, counts = self._images_of(row)
            except ImageError as error:
                error.args = (f"{row.name}: {error}",)
                raise
            except ValueError as error:
                raise ValueError(f"{row.name}: {error}") from error
            item.update(pixels, images=row.images, image_lengths=counts)
        text, spans = self.reader.image_token * len(counts), []
        if row.turns:
            text, spans = self.formatter(row.turns, row.name, bool(row.images))
        item["input_ids"], item["labels"] = self._encode(text, spans, counts, row.name)
        if row.captions:
            choice = random.Random(f"{self.seed}-{int(self._epoch)}-{index}").choice(row.captions).strip()
            ids = self._tokenizer_of(choice)(choice, add_special_tokens=False, verbose=False)["input_ids"]
            item["caption_ids"] = torch.tensor(ids[: self.caption_max_length])  # [L]
        return item

    def _tokenizer_of(self, text: str) -> Any:
        """What makes ids of a text in which no image stands."""
        return self._quoting if self.reader.image_token in text else self.tokenizer

    @cached_property
    def _quoting(self) -> QuotingTokenizer:
        return QuotingTokenizer(self.tokenizer, self.reader.image_token)

    def _encode(
        self, text: str, spans: list[tuple[int, int]], counts: list[int], name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokenizer = self.tokenizer if counts else self._tokenizer_of(text)
        ids, labels = with_labels(tokenizer, text, spans)  # [T'], one id per picture
        is_image = ids == self.reader.image_token_id
        if int(is_image.sum()) != len(counts):
            raise ValueError(
                f"{name}: its text came out with {int(is_image.sum())} image token(s) for {len(counts)} image(s); the "
                f"text may quote {self.reader.image_token!r}, or the chat template may not write it for each picture"
            )
        ids, labels, needed = repeat_images(ids, labels, is_image, counts)
        if needed > self.model_max_length:
            raise ValueError(
                f"{name}: its pictures end at token {needed}, beyond --model_max_length {self.model_max_length}, and "
                "placeholders cannot be cut; raise --model_max_length or use fewer or smaller pictures"
            )
        length = self.model_max_length if spans else needed  # a caption's row ends with its picture
        return ids[:length], labels[:length]
