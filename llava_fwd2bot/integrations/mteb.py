"""A checkpoint as an encoder of mteb: texts, images, and queries of both.

    from llava_fwd2bot.integrations.mteb import Fwd2BotEncoder
    mteb.evaluate(Fwd2BotEncoder("my-fwd2bot", k=8), mteb.get_tasks(tasks=["Flickr30kT2IRetrieval"]))

`eval/mteb_tasks.py` runs tasks by name.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..checkpoint.load import load_for_inference
from ..compressors import check_prefix
from ..config import check_k
from ..extras import require
from ..processing.generate import summaries_of

require("mteb", "mteb", "Fwd2BotEncoder")
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from mteb.models.model_meta import ModelMeta, ScoringFunction  # noqa: E402

MODALITIES = ("text", "image")


class Fwd2BotEncoder(AbsEncoder):
    """Unit vectors of a checkpoint. One of a text and an image is the direction of the sum of both.

    Args:
        checkpoint: its folder, its name on the hub, or "smol-llava".
        k: from the first k summary tokens; default: all.
        loading: of `load_for_inference`: base, device, dtype, load_4bit, load_8bit.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there; k is not from 1 to what it has.
    """

    def __init__(self, checkpoint: str | os.PathLike, k: int | None = None, **loading: Any) -> None:
        self.model, self.processor = load_for_inference(checkpoint, **loading)
        config = self.model.fwd2bot_config
        check_k(config, k)
        check_prefix(config, k)
        self.k = config.num_summary_tokens if k is None else k
        name = f"llava_fwd2bot/{os.path.basename(os.path.normpath(checkpoint))}-k{self.k}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": "local",
                "modalities": list(MODALITIES),
                "embed_dim": self.model.get_input_embeddings().weight.shape[1],
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
            }
        )

    @torch.inference_mode()
    def encode(self, inputs: Any, *, show_progress_bar: bool = True, **task: Any) -> Any:
        """The vectors of a loader's rows, a NumPy array [N, D].

        Args:
            inputs: batches with the columns `text`, `image` (PIL images) or both; a row may lack one of them.
            told: what mteb tells of the task. There are no instructions: the model was trained without.

        Raises:
            ValueError: a row has neither a text nor an image.
        """
        rows = [self._rows(batch) for batch in tqdm(inputs, desc="encode", disable=not show_progress_bar)]
        return torch.cat(rows).float().cpu().numpy()

    def _rows(self, batch: dict[str, Any]) -> Tensor:
        found: dict[int, Tensor] = {}
        for column, embed in (("text", self._texts), ("image", self._images)):
            given = {i: value for i, value in enumerate(batch.get(column) or []) if _is_there(value)}
            for i, vector in zip(given, embed(list(given.values())) if given else (), strict=True):
                found[i] = found[i] + vector if i in found else vector
        count = max(len(batch[column]) for column in MODALITIES if column in batch)
        if missing := [i for i in range(count) if i not in found]:
            raise ValueError(f"Rows {missing} of a batch have neither a text nor an image.")
        return F.normalize(torch.stack([found[i] for i in range(count)]).float(), dim=-1)

    def _texts(self, texts: list[str]) -> Tensor:
        ids = self.processor.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        device = self.model.get_input_embeddings().weight.device
        given = (ids["input_ids"].to(device), ids["attention_mask"].to(device))
        return self.model.embed_text(*given, num_tokens=self.k)

    def _images(self, images: list[Image.Image]) -> Tensor:
        pictures = [image.convert("RGB") for image in images]
        return self.model.embed_image(summary=summaries_of(self.model, self.processor, pictures, self.k))


def _is_there(value: Any) -> bool:
    return value is not None and (not isinstance(value, str) or bool(value.strip()))
