"""Everything that the device needs, as small files: rows of tokens, specifications of pictures, photographs, weights.

    python -m eval.studies.smol196.prepare --data DATA --output DIR [--part-mib 56]

The device needs neither tokenizer nor GGUF reader: rows are tokenised here, the language model's weights stay in their
published 4-bit blocks. The vocabulary is cut to the words that the rows use; the other rows of the embedding matrix are
left out, and nothing else changes.

rows.npz          packs for training and tuning, questions to report on, captions; shapes in `Rows`
pictures.json     what to draw, in the order of the features
truth.json        answers and groups of what is reported; stays here
photos-N.bin      photographs as WebP, one after the other, with photos.json saying where each lies
tower.safetensors, lm-N.safetensors
part-N.tar        the same in parts of at most --part-mib, with the code
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.studies.smol196.pictures import SIDE
from eval.studies.smol196.tasks import SIZES, TASKS, Entry, Sizes, entries, lookup
from eval.studies.smol196.weights import quantised
from llava_fwd2bot.smol import build, tower

TEXT = 96  # tokens of the questions and answers of one picture
QUESTION, CAPTION, VARIANTS = 48, 32, 4
IMAGE_PROMPT, TEXT_PROMPT = "Summarize the image in a few words.", "Summarize the text in a few words."
SHARD = 9 << 20
QUALITY = 40  # of the photographs


class Words:
    """A tokenizer whose numbers are those of the words in use, in the order in which they come up."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.place = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.place.setdefault(i, len(self.place)) for i in ids]

    def asked(self, question: str) -> list[int]:
        return self(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")

    def said(self, answer: str) -> list[int]:
        return self(f"{answer}<|im_end|>")


def pack(entry: Entry, words: Words, rng: random.Random, extra: int = 2) -> np.ndarray:
    """Questions and answers of one picture in a row, [3, TEXT]: token, segment (0: none), task + 1 where labelled.

    Of each task one item, of yes/no questions up to three; those that tell most come last and are left out first.
    """
    by_task: dict[str, list[Any]] = {}
    for item in rng.sample(entry.items, len(entry.items)):
        by_task.setdefault(item.task, []).append(item)
    limit = {"exists": 1 + extra, "any": extra, "daquar": 5}
    chosen = [item for task, items in by_task.items() for item in items[: limit.get(task, 1)]]
    chosen.sort(
        key=lambda item: ("caption", "at", "words", "count", "where", "any", "exists", "daquar").index(item.task)
    )
    row, at = np.zeros((3, TEXT), dtype=np.uint16), 0
    for number, item in enumerate(chosen, 1):
        question, answer = words.asked(item.question), words.said(rng.choice(item.truth))
        end = at + len(question) + len(answer)
        if end > TEXT:
            continue
        row[0, at:end] = question + answer
        row[1, at:end] = number
        row[2, at + len(question) : end] = TASKS.index(item.task) + 1
        at = end
    return row


def padded(rows: Sequence[Sequence[int]], length: int, right: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens, cut at `length`, and their lengths. With `right`, rows end at the last column and are never cut.

    Raises:
        ValueError: with `right`, a row is longer.
    """
    if right and max(map(len, rows)) > length:
        raise ValueError(f"a question has {max(map(len, rows))} tokens, but there is room for {length}")
    out, lengths = np.zeros((len(rows), length), dtype=np.uint16), np.zeros(len(rows), dtype=np.uint8)
    for i, row in enumerate(rows):
        row = list(row)[:length]
        lengths[i] = len(row)
        out[i, length - len(row) :] = row if right else 0
        if not right:
            out[i, : len(row)] = row
    return out, lengths


def write_rows(data: Path, output: Path, sizes: dict[str, Sizes], tokenizer: Any, seed: int) -> list[int]:
    """Writes rows.npz, pictures.json and truth.json; returns the vocabulary's numbers in use."""
    words, rng = Words(tokenizer), random.Random(seed)
    found = {split: entries(data, split, sizes[split], seed) for split in ("train", "tune", "report")}
    every = [entry for split in found.values() for entry in split]
    arrays: dict[str, Any] = {
        "prefix": words("<|im_start|>user\n"),
        "image_prompt": words(IMAGE_PROMPT),
        "text_prompt": words(TEXT_PROMPT),
        "end": words("<|im_end|>"),
    }
    arrays["train_packs"] = np.stack([[pack(e, words, rng) for _ in range(VARIANTS)] for e in found["train"]])
    arrays["tune_packs"] = np.stack([[pack(e, words, rng, extra=3)] for e in found["tune"]])
    for split in ("train", "report"):
        captioned = [e for e in found[split] if e.captions]
        texts = [words(c) for e in captioned for c in e.captions[:5]]
        ids, lengths = padded(texts, CAPTION)
        arrays[f"{split}_captions"] = ids.reshape(len(captioned), -1, CAPTION)
        arrays[f"{split}_caption_lengths"] = lengths.reshape(len(captioned), -1)
        arrays[f"{split}_captioned"] = [i for i, e in enumerate(found[split]) if e.captions]
    items = [(i, item) for i, e in enumerate(found["report"]) for item in e.items]
    arrays["questions"], arrays["question_lengths"] = padded(
        [words.asked(q.question) for _, q in items], QUESTION, True
    )
    arrays["question_picture"] = [i for i, _ in items]
    arrays["question_task"] = [TASKS.index(q.task) for _, q in items]
    arrays["counts"] = [len(found[split]) for split in ("train", "tune", "report")]
    np.savez_compressed(output / "rows.npz", **{name: np.asarray(value) for name, value in arrays.items()})
    (output / "pictures.json").write_text(json.dumps([e.picture.to_list() for e in every], separators=(",", ":")))
    blind = lookup(found["train"], [q for _, q in items])
    known = [
        {"picture": i, "task": q.task, "question": q.question, "truth": q.truth, "blind": guess,
         "set": found["report"][i].picture.parts[0].photo.split("/")[0]}
        for (i, q), guess in zip(items, blind, strict=True)
    ]  # fmt: skip
    (output / "truth.json").write_text(json.dumps({"items": known, "vocabulary": list(words.place)}))
    return list(words.place)


def write_photos(data: Path, output: Path, quality: int) -> None:
    """Photographs that the pictures use, at most 224 pixels a side (DAQUAR's and COCO's 320), as WebP."""
    used = sorted({part[0] for _, parts, *_ in json.loads((output / "pictures.json").read_text()) for part in parts})
    index, shard, held = {}, 0, io.BytesIO()

    def close() -> None:
        (output / f"photos-{shard:02d}.bin").write_bytes(held.getvalue())

    for name in used:
        folder, file = name.split("/")
        image = Image.open(data / folder / "images" / file).convert("RGB")
        image.thumbnail((320, 320) if folder != "flickr8k" else (224, 224))
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=quality)
        if held.tell() + encoded.tell() > SHARD:
            close()
            shard, held = shard + 1, io.BytesIO()
        index[name] = [shard, held.tell(), encoded.tell()]
        held.write(encoded.getvalue())
    close()
    (output / "photos.json").write_text(json.dumps(index))


def write_weights(output: Path, vocabulary: Sequence[int]) -> None:
    """The tower in float16, the language model in its published blocks, in shards."""
    with tempfile.TemporaryDirectory() as folder:
        gguf = build.published_file(build.LANGUAGE_MODEL, Path(folder))
        lite = torch.load(build.published_file(build.VISION_TOWER, Path(folder)), weights_only=True)
        save_file({n: w.half().contiguous() for n, w in tower.convert(lite).items()}, output / "tower.safetensors")
        shard, number = {}, 0
        for name, tensor in quantised(gguf, vocabulary).items():
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > 2 * SHARD:
                save_file(shard, output / f"lm-{number}.safetensors")
                shard, number = {}, number + 1
            shard[name] = tensor
        save_file(shard, output / f"lm-{number}.safetensors")


def write_parts(output: Path, mib: float) -> list[Path]:
    """The files in tar archives of at most `mib` MiB; code first, what the features need next, a trained base last."""
    package = Path(build.__file__).parents[1]
    study = Path(__file__).parents[1]
    files = [(p, Path("src/llava_fwd2bot") / p.relative_to(package)) for p in sorted(package.rglob("*.py"))]
    files += [(study.parent / "__init__.py", Path("src/eval/__init__.py"))]
    files += [
        (p, Path("src/eval/studies") / p.relative_to(study))
        for p in sorted([*study.rglob("*.py"), *study.rglob("*.sh"), *study.rglob("*.yaml")])
    ]
    order = ("pictures.json", "photos.json", "tower.safetensors", "photos-*.bin", "rows.npz", "lm-*.safetensors")
    order += ("base-*.safetensors",)
    files += [(p, Path(p.name)) for pattern in order for p in sorted(output.glob(pattern))]
    for old in output.glob("part-*.tar"):
        old.unlink()
    parts, tar, size = [], None, 0
    for source, name in files:
        take = source.stat().st_size + 1536
        if tar is None or size + take > mib * 2**20 - 20480:
            if tar is not None:
                tar.close()
            parts.append(output / f"part-{len(parts) + 1}.tar")
            tar, size = tarfile.open(parts[-1], "w"), 0
        tar.add(source, arcname=str(name))
        size += take
    tar.close()
    return parts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part-mib", type=float, default=56)
    parser.add_argument("--repack", action="store_true", help="only the parts, with the code as it is now")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(argv)
    a.output.mkdir(parents=True, exist_ok=True)
    if not a.repack:
        write_all(a.data, a.output, a.seed)
    for part in write_parts(a.output, a.part_mib):
        print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")


def write_all(data: Path, output: Path, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gguf = build.published_file(build.LANGUAGE_MODEL, Path(folder))
        tokenizer = build._processor(gguf, SIDE).tokenizer
    vocabulary = write_rows(data, output, SIZES, tokenizer, seed)
    write_photos(data, output, QUALITY)
    write_weights(output, vocabulary)


if __name__ == "__main__":
    main()
