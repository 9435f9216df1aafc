"""Rows to batches: padding, and the order that keeps batches of one modality and similar lengths together.

Shapes: B rows, T tokens, L caption tokens, M pictures of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..modeling.plan import BatchPlanner
from ..processing.images import stack_pixels

IGNORE_INDEX = -100
# all else of a row is an image input of the host
_OF_TEXT = ("record", "input_ids", "labels", "caption_ids", "images", "image_lengths")


class Fwd2BotCollator:
    """Pads rows of `LlavaDataset` into one batch.

    Args:
        pad_token_id: fills `input_ids` and `caption_input_ids`; masks come from lengths, so it may be the eos.
        padding_side: "right" or "left".
        planner: a model's `planner()`: the batch then comes with its plan, so that the model's forward does not wait
            for the device, and each distinct image comes once.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right", planner: BatchPlanner | None = None):
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; set tokenizer.pad_token, to unk or eos if there is no other")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side should be 'right' or 'left', not {padding_side!r}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.planner = planner
        self._warned: set[str] = set()

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate B rows.

        Returns:
            input_ids, attention_mask, labels [B, T]; where there are pictures, pixel_values [M, 3, H, W] and the host's
            other image inputs (image_sizes [M, 2], batch_num_images [rows with pictures]), in row order; where there
            are captions, caption_input_ids and caption_attention_mask
            [B, L], the mask all zero for rows without one. With a planner, `plan`; pixel_values are then [U, 3, H, W],
            without the pictures that an earlier row shows too.

        Raises:
            ValueError: there is nothing to learn from in the whole batch.
        """
        self._check(items)
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),  # [B, T]
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),  # [B, T]
            "labels": self._pad([item["labels"] for item in items], IGNORE_INDEX),  # [B, T]
        }
        shown, distinct = self._distinct(items)
        for name in dict.fromkeys(name for item in items for name in item if name not in _OF_TEXT):
            parts = [items[i][name] for i in shown if name in items[i]]
            batch[name] = stack_pixels(parts) if name == "pixel_values" else torch.cat(parts)  # [M, …]
        if any("caption_ids" in item for item in items):
            captions = [item.get("caption_ids", ids[0][:0]) for item in items]
            batch["caption_input_ids"] = self._pad(captions, self.pad_token_id)  # [B, L]
            batch["caption_attention_mask"] = self._pad([torch.ones_like(row) for row in captions], 0)  # [B, L]
        if self.planner is not None:
            lengths: list[int] | None = [n for item in items for n in item.get("image_lengths", ())]
            images = len(lengths)
            if any("pixel_values" in item and "image_lengths" not in item for item in items):  # rows that are not ours
                images, lengths = len(batch["pixel_values"]), None
            batch["plan"] = self.planner(batch, images, lengths, distinct)
        return batch

    def _distinct(self, items: Sequence[dict[str, Any]]) -> tuple[list[int], list[int] | None]:
        """The rows whose pictures come with the batch, and which of these each picture of the rows is.

        Rows share their pictures if they show the same ones in the same order: a picture beside others may be cut into
        other crops than alone.
        """
        if self.planner is None or not all("images" in item for item in items if "image_lengths" in item):
            return list(range(len(items))), None
        first: dict[tuple[str, ...], int] = {}  # where the pictures of a row begin
        shown, order, count = [], [], 0
        for i, item in enumerate(items):
            names = tuple(item.get("images", ()))
            if names not in first:
                first[names] = count
                shown.append(i)
                count += len(names)
            order += range(first[names], first[names] + len(names))
        return shown, order if count < len(order) else None

    def _check(self, items: Sequence[dict[str, Any]]) -> None:
        # The loss predicts label t from token t - 1, so a label on the first token never counts.
        idle = [
            item["record"]
            for item in items
            if "caption_ids" not in item and not bool((item["labels"][1:] != IGNORE_INDEX).any())
        ]
        if len(idle) == len(items):
            raise ValueError(
                f"no token to learn from in the whole batch ({first_names(idle)}). Likely reasons: --model_max_length "
                "cuts the rows before their answers; the answers are empty; or --version does not fit the model's "
                "tokenizer"
            )
        for name in idle:
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"{name}: no token to learn from; is it cut by --model_max_length?", stacklevel=2)

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        width = max(len(row) for row in rows)
        left = self.padding_side == "left"
        gaps = [width - len(row) for row in rows]
        return torch.stack(
            [F.pad(row, (gap, 0) if left else (0, gap), value=value) for row, gap in zip(rows, gaps, strict=True)]
        )


def first_names(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
