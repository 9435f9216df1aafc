"""A small LLaVA of transformers' own classes, trained from nothing on easy-VQA in a few minutes on two cores.

In LLaVA's own order: a language model that can reason about shapes and colours in words, then a vision tower and
projector that give it those words' directions, then both together on the questions.

    python scripts/build_easy_vqa.py --output easy-vqa/base
"""

from __future__ import annotations

import argparse
import collections
import math
from pathlib import Path

import numpy as np
import torch
from easy_vqa_data import COLORS, SHAPES, Question, attributes, build_processor, load
from PIL import Image
from tiny_llava import Log, Rows, answer_loss, batches, build_model, optimizer, write_base
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

TEXT_STEPS, TOWER_EPOCHS, JOINT_EPOCHS = 450, 8, 4
BATCH, TURNS = 32, 5


def augment(pixels: Tensor) -> Tensor:
    """Flips and a transposition, which change neither shape nor colour. [B, 3, H, W]"""
    flip = torch.rand(3, len(pixels), 1, 1, 1) < 0.5
    pixels = torch.where(flip[0], pixels.flip(-1), pixels)
    pixels = torch.where(flip[1], pixels.flip(-2), pixels)
    return torch.where(flip[2], pixels.transpose(-1, -2), pixels).contiguous()


def train_text(
    model: nn.Module, rows: Rows, names: Tensor, labels: Tensor, questions: list[Question], seed: int
) -> None:
    """The language model alone: four places that name shape and colour stand where the image will."""
    rng, log = np.random.default_rng(seed), Log("words", TEXT_STEPS)
    words, lm = model.get_input_embeddings(), model.model.language_model
    known = [q for q in questions if (labels[:, q[0]] >= 0).all()]
    step = optimizer([lm], 2e-3, TEXT_STEPS)
    at = len(rows.start)
    for n in range(1, TEXT_STEPS + 1):
        part = [known[i] for i in rng.integers(0, len(known), 4 * BATCH)]
        ids, targets = rows.batch([rows.row([q[1:]], [rows.pad_id] * 4) for q in part])
        shape, color = labels[:, [q[0] for q in part]]
        picture = words(names[shape]) + words(names[len(SHAPES) + color])  # [B, D]
        shown = torch.rand(len(part), 4, 1) < 0.7
        shown[:, 0] = True
        inputs = words(ids)
        inputs = torch.cat([inputs[:, :at], picture[:, None] * shown, inputs[:, at + 4 :]], dim=1)
        loss, right = answer_loss(model, lm(inputs_embeds=inputs, use_cache=False).last_hidden_state, targets)
        step(loss)
        log(n, loss, right)


def train_tower(model: nn.Module, names: Tensor, labels: Tensor, pixels: Tensor, seed: int) -> None:
    """Tower and projector: the image tokens learn the directions of the words for what is seen."""
    total = TOWER_EPOCHS * (len(pixels) // BATCH)
    tower, projector, log = model.model.vision_tower, model.model.multi_modal_projector, Log("tower", total)
    directions = normalize(model.get_input_embeddings()(names).detach(), dim=-1)
    head = nn.Linear(tower.config.hidden_size, len(names))  # speeds the tower up; thrown away
    step, parts = optimizer([tower, projector, head], 2e-3, total), [len(SHAPES), len(COLORS)]
    for n, batch in enumerate(batches(len(pixels), BATCH, total, np.random.default_rng(seed)), 1):
        seen = tower(augment(pixels[batch])).last_hidden_state[:, 1:]  # [B, n, D]
        direct = head(seen.mean(1)).split(parts, dim=1)
        named = (4 * projector(seen).mean(1) @ directions.T).split(parts, dim=1)
        truth = labels[:, batch]
        loss = sum(cross_entropy(z, t) for view in (direct, named) for z, t in zip(view, truth, strict=True))
        step(loss)
        log(n, loss, torch.stack([z.argmax(1) == t for z, t in zip(named, truth, strict=True)])[truth >= 0])


def train_together(model: nn.Module, rows: Rows, pixels: Tensor, questions: list[Question], seed: int) -> None:
    total = JOINT_EPOCHS * (len(pixels) // BATCH)
    rng, step, log = np.random.default_rng(seed), optimizer([model], 1e-3, total), Log("together", total)
    # without it yes/no answers stay for long at the guess that the question's wording suggests
    asked, answered = collections.Counter(q[1] for q in questions), collections.Counter(q[1:] for q in questions)
    turns: list[list[tuple[str, str]]] = [[] for _ in pixels]
    weights: list[list[float]] = [[] for _ in pixels]
    for image, question, answer in questions:
        turns[image].append((question, answer))
        rarity = asked[question] / answered[question, answer]
        weights[image].append(math.sqrt(rarity) if answer in ("yes", "no") else 1.0)
    for n, batch in enumerate(batches(len(pixels), BATCH, total, rng), 1):
        picked = []
        for i in batch:
            chance = np.array(weights[i]) / sum(weights[i])
            picked.append(rng.choice(len(turns[i]), min(TURNS, len(turns[i])), replace=False, p=chance))
        chosen = [rows.row([turns[i][t] for t in some], rows.image) for i, some in zip(batch, picked, strict=True)]
        ids, targets = rows.batch(chosen)
        out = model.model(input_ids=ids, pixel_values=augment(pixels[batch]), use_cache=False)
        loss, right = answer_loss(model, out.last_hidden_state, targets)
        step(loss)
        log(n, loss, right)


def build(output: Path, paths: dict[int, Path], asked: list[Question], seed: int = 0) -> None:
    """Trains the model on the pictures and questions, and writes it with its processor (beside first, then renamed)."""
    torch.manual_seed(seed)
    processor = build_processor()
    model, rows = build_model(processor).train(), Rows(processor)
    number = {image: n for n, image in enumerate(paths)}
    questions = [(number[image], question, answer) for image, question, answer in asked]
    pictures = [Image.open(path).convert("RGB") for path in paths.values()]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]  # [images, 3, H, W]
    labels = torch.full((2, len(pixels)), -100)
    for n, found in attributes(questions).items():
        for row, (kind, known) in enumerate((("shape", SHAPES), ("color", COLORS))):
            labels[row, n] = known.index(found[kind]) if kind in found else -100
    names = torch.tensor(processor.tokenizer.convert_tokens_to_ids(SHAPES + COLORS))
    train_text(model, rows, names, labels, questions, seed)
    train_tower(model, names, labels, pixels, seed)
    train_together(model, rows, pixels, questions, seed)
    write_base(model, processor, output, {"data": "easy-vqa 1.0, train split", "seed": seed})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.output, *load("train"), arguments.seed)
