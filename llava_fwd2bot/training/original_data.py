"""The original LLaVA's training data with captions beside them, and its image files checked before they are needed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..files.check import refuse_unusable, unusable
from ..files.records import read_records
from ..processing.images import ImageError
from .records import captions_of, captions_of_images, images_of, strings


class WithCaptions(Dataset):
    """LLaVA's data set, and captions for its rows, of the record or out of `--fwd2bot_caption_data`.

    Captioned images that no record shows become rows of their own, without an answer to learn.
    """

    def __init__(
        self,
        data: Any,
        caption_data: str | None,
        tokenizer: Any,
        on_bad_image: str = "raise",
        image_folder: str | None = None,
        max_length: int = 77,
    ) -> None:
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length
        records = data.list_data_dict
        for i, record in enumerate(records):
            images = images_of(record, f"record {i}")
            if images and not record.get("image"):  # under the name that LLaVA reads
                record["image"] = images[0] if len(images) == 1 else images
        if not any(record.get("image") for record in records) and caption_data is None:
            raise ValueError("--fwd2bot needs images, and no record of the data has one: name them by 'image'.")
        self.on_bad_image = on_bad_image
        self._missing = _check_files(records, image_folder, on_bad_image)
        self.answered = len(records)
        known = {} if caption_data is None else captions_of_images(read_records(caption_data), caption_data)
        shown = {_first_image(record) for record in records}
        for image, captions in known.items():
            if image not in shown:
                turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": captions[0]}]
                records.append({"image": image, "conversations": turns, "caption": captions})
        self.captions: list[list[str]] = []
        for i, record in enumerate(records):
            captions, image = captions_of(record, f"record {i}"), _first_image(record)
            if captions and not image:
                raise ValueError(f"record {i}: a 'caption' but no 'image' that it describes")
            self.captions.append(captions or known.get(image, []))
        self.epoch = 0
        self._bad = torch.zeros(len(records), dtype=torch.uint8).share_memory_()  # which workers find, too

    @property
    def skipped_images(self) -> list[str]:
        """The images that were left out by `on_bad_image="skip"` so far, by this process or its workers."""
        found = [_first_image(self.data.list_data_dict[i]) for i in self._bad.nonzero().flatten().tolist()]
        return list(dict.fromkeys([*self._missing, *found]))

    @property
    def num_captioned(self) -> int:
        """How many rows can feed the contrastive loss."""
        return sum(map(bool, self.captions))

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:  # lengths, modality_lengths: what their sampler asks for
        return getattr(self.__dict__["data"], name)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict[str, Any]:
        """LLaVA's row, and `caption_ids` [L] where it has a caption; the next one for a row that is skipped."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        for step in range(len(self)):
            at = (i + step) % len(self)
            if self._bad[at]:
                continue
            try:
                return self._item(at)
            except (OSError, SyntaxError) as error:  # what Pillow raises on damaged files
                image = _first_image(self.data.list_data_dict[at])
                if self.on_bad_image == "raise":
                    raise ImageError(f"record {at}: {image}: {error}") from error
                self._bad[at] = 1
                warnings.warn(f"skipped a picture: record {at}: {image}: {error}", stacklevel=2)
        raise ImageError("not one row is left: none of the pictures can be used")

    def _item(self, i: int) -> dict[str, Any]:
        item = dict(self.data[i])
        if i >= self.answered:
            item["labels"] = torch.full_like(item["labels"], -100)
        # LLaVA-NeXT gives another record for one that it cannot read, and says so by its id alone
        stand_in = "id" in item and item["id"] != self.data.list_data_dict[i].get("id", i)
        if self.captions[i] and not stand_in:
            caption = random.Random(f"{self.epoch}-{i}").choice(self.captions[i])
            ids = self.tokenizer(caption.strip(), add_special_tokens=False)["input_ids"]
            item["caption_ids"] = torch.tensor(ids[: self.max_length])
        return item


def _check_files(records: list[dict[str, Any]], folder: str | None, on_bad_image: str) -> list[str]:
    """Looks for every image of the records; with "skip" takes those records out, and gives the images' names.

    Raises:
        ImageError: as of `LlavaDataset.check_files`.
    """
    owners: dict[str, str] = {}
    images = [strings(record.get("image"), f"record {i}", "image") for i, record in enumerate(records)]
    for i, names in enumerate(images):
        for name in names:
            owners.setdefault(name, f"record {i}")
    bad = unusable(owners, folder)
    kept = [record for record, names in zip(records, images, strict=True) if not any(name in bad for name in names)]
    if on_bad_image == "raise" or not kept:
        remedy = "leave the records out by --on_bad_image skip" if kept else "give other data"
        refuse_unusable(bad, owners, len(owners), folder, remedy)
    for name, reason in bad.items():
        warnings.warn(f"skipped a picture: {owners[name]}: {name}: {reason}", stacklevel=2)
    records[:] = kept
    return list(bad)


def _first_image(record: dict[str, Any]) -> str | None:
    image = record.get("image")  # LLaVA-NeXT's may be several; a caption is of the first
    return image[0] if isinstance(image, list) and image else image


class CaptionCollator:
    """LLaVA's collator, and the captions beside: [B, L] and their mask, all zero for rows without one."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        captions = [item.pop("caption_ids", torch.zeros(0, dtype=torch.long)) for item in items]
        batch = self.collate(items)
        if any(len(ids) for ids in captions):
            batch["caption_input_ids"] = pad_sequence(captions, batch_first=True)
            mask = [torch.ones_like(ids) for ids in captions]
            batch["caption_attention_mask"] = pad_sequence(mask, batch_first=True)
        return batch
