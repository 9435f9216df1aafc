"""Search in a cache by words, by an image file or by an id; results as a table or a contact sheet.

Shapes: k summary tokens, D hidden size.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bottleneck import embed
from ..files.pixels import LLAVA, OWN, Reading
from ..files.writing import write_text
from ..processing.images import ImageError, join_pixels, open_image, prepare_pixels, prepared_size
from .naming import escaped
from .reader import SummaryCache
from .tables import ABOUT

LONGEST = 512  # tokens of a text: a caption has 20, and a book would take minutes
THUMBNAIL = 240  # pixels of the longer side


@torch.inference_mode()
def summary_of_text(model: nn.Module, processor: Any, text: str, k: int) -> Tensor:
    """[k, D]; ValueError if the text is empty."""
    if not text.strip():
        raise ValueError("The text to search for is empty.")
    ids = processor.tokenizer(text.strip(), return_tensors="pt", add_special_tokens=False)
    if (length := ids["input_ids"].shape[1]) > LONGEST:
        raise ValueError(f"The text to search for has {length:,} tokens; up to {LONGEST} are searched for.")
    return model.compress_text(ids["input_ids"].to(model.device), num_tokens=k)[0].cpu()


@torch.inference_mode()
def summary_of_image(
    model: nn.Module, processor: Any, path: str | os.PathLike, k: int, reading: Reading = LLAVA
) -> Tensor:
    """[k, D]; `reading`: how the file becomes a picture, of a cache its own settings."""
    image = open_image(path, reading=reading, prepared=prepared_size(processor))
    pixels = [prepare_pixels(processor, model, [image])]
    return model.compress(**join_pixels(pixels, model.get_input_embeddings().weight), num_tokens=k)[0].cpu()


def search(
    cache: SummaryCache,
    query: Tensor,
    top: int = 10,
    where: str | None = None,
    exact: bool | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The images nearest to a summary.

    Args:
        query: the summary of a text or an image, [k, D], with the cache's k.
        where, exact: see SummaryCache.search.
        columns: of each hit; default: ABOUT.
    """
    vector = embed(query[None], cache.settings.pooling)[0]
    return cache.search(vector, top, where, exact, ABOUT if columns is None else columns)


def distinct(hits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hits with different contents: of copies of a file the first, with the others' paths as `copies`."""
    found: dict[str, dict[str, Any]] = {}
    for hit in hits:
        if hit["sha256"] in found:
            found[hit["sha256"]]["copies"].append(hit["source"])
        else:
            found[hit["sha256"]] = {**hit, "copies": []}
    return list(found.values())


def table(hits: Sequence[dict[str, Any]]) -> str:
    """One line per hit: rank, score, size, path; what a terminal would take for a command is escaped."""
    lines = [f"{'':>4} {'score':>6}  {'pixels':<11} path"]
    for rank, hit in enumerate(hits, 1):
        copies = f"  (and {len(hit['copies'])} copies)" if hit.get("copies") else ""
        pixels = f"{hit['width']}x{hit['height']}"
        lines.append(f"{rank:>4} {hit['score']:6.3f}  {pixels:<11} {escaped(hit['source'])}{copies}")
    return "\n".join(lines)


def contact_sheet(hits: Sequence[dict[str, Any]], title: str, output: str | os.PathLike) -> Path:
    """Writes one HTML page with a small picture of each hit; a missing file is an empty frame with its name."""
    cards = []
    for rank, hit in enumerate(hits, 1):
        picture = thumbnail(hit["source"])
        shown = (
            f'<img alt="{html.escape(hit["id"])}" src="data:image/jpeg;base64,{picture}">'
            if picture
            else '<div class="gone">the file is not there any more</div>'
        )
        caption = f"<b>{rank}</b> {html.escape(hit['id'])} <span>{hit['score']:.3f}</span>"
        cards.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222}main{display:flex;flex-wrap:wrap;gap:1rem}"
        "figure{margin:0;width:15rem}img,.gone{width:15rem;height:11rem;object-fit:cover;border-radius:6px}"
        ".gone{background:#eee;color:#888;display:flex;align-items:center;justify-content:center;text-align:center}"
        "figcaption{font-size:13px;overflow-wrap:anywhere}span{color:#888}"
    )
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = f"<h1>{html.escape(title)}</h1><main>{''.join(cards)}</main>"
    text = f"<!doctype html><html lang=en><head>{head}<style>{style}</style></head><body>{body}</body></html>\n"
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def thumbnail(source: str) -> str | None:
    """A small picture of a file as a JPEG in base64, for pages that carry all with them; None where it is gone."""
    try:
        picture = open_image(source, reading=OWN, prepared=lambda size: 0)  # for people's eyes, not for the model
    except ImageError:
        return None
    picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))  # twice, for fine screens
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()
