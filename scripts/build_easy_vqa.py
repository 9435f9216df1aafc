"""A small LLaVA of transformers' own classes, trained from nothing on easy-VQA in a few minutes on two cores.

In LLaVA's own order: a language model that can reason about shapes and colours in words, then a vision tower and
projector that give it those words' directions, then both together on the questions.

    python scripts/build_easy_vqa.py --output easy-vqa/base
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from easy_vqa_data import COLORS, PATCH, SHAPES, SIZE, Question, attributes, build_processor, load
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

TEXT_STEPS, TOWER_EPOCHS, JOINT_EPOCHS = 450, 8, 4
BATCH, TURNS = 32, 5
DENSE = (SIZE // PATCH) ** 2


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        hidden_act="gelu",
        initializer_factor=2.0,
        initializer_range=0.05,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=DENSE,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    model = LlavaForConditionalGeneration(config)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    return model


class Rows:
    """Ids of conversations, put together from turns that are tokenised once; as the chat template writes them."""

    def __init__(self, processor: LlavaProcessor) -> None:
        tokenizer = processor.tokenizer
        self.ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.user, self.pad_id = self.ids("USER:"), tokenizer.pad_token_id
        self.start = [tokenizer.bos_token_id, *self.user]
        self.image = [processor.image_token_id] * DENSE
        self.turns: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        if (question, answer) not in self.turns:
            self.turns[question, answer] = self.ids(f"{question} ASSISTANT:"), self.ids(f"{answer}</s>")
        return self.turns[question, answer]

    def row(self, turns: list[tuple[str, str]], image: list[int]) -> tuple[list[int], list[int]]:
        ids = self.start + image
        labels = [-100] * len(ids)
        for n, turn in enumerate(turns):
            question, answer = self.turn(*turn)
            question = self.user * (n > 0) + question
            ids = ids + question + answer
            labels = labels + [-100] * len(question) + answer
        return ids, labels

    def batch(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Padded on the right, where causal attention never looks: ids and the labels of the next token, [B, T]."""
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([r + [self.pad_id] * (longest - len(r)) for r, _ in rows])
        labels = torch.tensor([r + [-100] * (longest - len(r)) for _, r in rows])
        return ids, torch.cat([labels[:, 1:], torch.full((len(rows), 1), -100)], dim=1)


def optimizer(modules: list[nn.Module], lr: float, total: int) -> Callable[[Tensor], None]:
    """AdamW with warm-up and cosine; the answer takes one step on a loss."""
    parameters = list(dict.fromkeys(p for m in modules for p in m.parameters()))
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    warm = max(1, total // 10)
    cosine = [0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / (total - warm))) for s in range(total + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda s: min((s + 1) / warm, 1) * cosine[min(s, total)])

    def step(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)

    return step


def batches(count: int, total: int, rng: np.random.Generator) -> Iterator[list[int]]:
    order: list[int] = []
    for _ in range(total):
        if len(order) < BATCH:
            order = rng.permutation(count).tolist()
        yield order[:BATCH]
        order = order[BATCH:]


def augment(pixels: Tensor) -> Tensor:
    """Flips and a transposition, which change neither shape nor colour. [B, 3, H, W]"""
    flip = torch.rand(3, len(pixels), 1, 1, 1) < 0.5
    pixels = torch.where(flip[0], pixels.flip(-1), pixels)
    pixels = torch.where(flip[1], pixels.flip(-2), pixels)
    return torch.where(flip[2], pixels.transpose(-1, -2), pixels).contiguous()


class Log:
    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.seen, self.start = name, total, [], time.time()

    def __call__(self, step: int, loss: Tensor, right: Tensor) -> None:
        self.seen.append((loss.item(), right.float().mean().item()))
        if step % 100 == 0 or step == self.total:
            loss, accuracy = np.mean(self.seen[-50:], axis=0)
            seconds = time.time() - self.start
            print(
                f"{self.name} {step}/{self.total}: loss {loss:.3f}, right {accuracy:.3f}, {seconds:.0f} s", flush=True
            )


def answer_loss(model: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    where = labels != -100
    logits, target = model.lm_head(hidden[where]), labels[where]
    return cross_entropy(logits, target), (logits.argmax(-1) == target)[target != model.generation_config.eos_token_id]


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
    for n, batch in enumerate(batches(len(pixels), total, np.random.default_rng(seed)), 1):
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
    for n, batch in enumerate(batches(len(pixels), total, rng), 1):
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
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    model.eval().save_pretrained(beside)
    processor.save_pretrained(beside)
    (beside / "recipe.json").write_text(json.dumps({"data": "easy-vqa 1.0, train split", "seed": seed}))
    shutil.rmtree(output, ignore_errors=True)
    os.replace(beside, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.output, *load("train"), arguments.seed)
