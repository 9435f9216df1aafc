"""Rows to batches: padding, and the order that keeps batches of one modality and similar lengths together.

Shapes: B rows, T tokens, L caption tokens, M pictures of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..processing.images import stack_pixels

IGNORE_INDEX = -100
_OF_TEXT = ("record", "input_ids", "labels", "caption_ids")  # all else of a row is an image input of the host


class Fwd2BotCollator:
    """Pads rows of `LlavaDataset` into one batch.

    Args:
        pad_token_id: fills `input_ids` and `caption_input_ids`; masks come from lengths, so it may be the eos.
        padding_side: "right" or "left".
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right"):
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; set tokenizer.pad_token, to unk or eos if there is no other")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side should be 'right' or 'left', not {padding_side!r}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self._warned: set[str] = set()

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate B rows.

        Returns:
            input_ids, attention_mask, labels [B, T]; where there are pictures, pixel_values [M, 3, H, W] and the host's
            other image inputs (image_sizes [M, 2], batch_num_images [rows with pictures]), in row order; where there
            are captions, caption_input_ids and caption_attention_mask
            [B, L], the mask all zero for rows without one.

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
        for name in dict.fromkeys(name for item in items for name in item if name not in _OF_TEXT):
            parts = [item[name] for item in items if name in item]
            batch[name] = stack_pixels(parts) if name == "pixel_values" else torch.cat(parts)  # [M, …]
        if any("caption_ids" in item for item in items):
            captions = [item.get("caption_ids", ids[0][:0]) for item in items]
            batch["caption_input_ids"] = self._pad(captions, self.pad_token_id)  # [B, L]
            batch["caption_attention_mask"] = self._pad([torch.ones_like(row) for row in captions], 0)  # [B, L]
        return batch

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
