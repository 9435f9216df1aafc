"""The base that scenes are measured on: a tiny LLaVA with 36 dense tokens, trained on them in minutes on a CPU.

    python -m eval.studies.scenes_base --output DIR --seed 0

In LLaVA's order: a language model that answers from words standing where the image will; a vision tower and projector
that give each patch the words of its place and of what is there; then both together. It learns from scenes of the
training split alone, with questions drawn anew each time.

Shapes: B scenes, n = 36 patches, D = 128.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import LlavaProcessor

from . import scenes
from .scene import SIDE
from .tiny_llava import Log, Rows, answer_loss, batches, build_model, build_processor, optimizer, write_base

PATCH, ACROSS = 16, SIDE // 16
NOTHING = "nothing"
# a patch is told by one word of each group; the words of an object by NOTHING where there is none
PLACE_GROUPS = (("top", "middle", "bottom"), ("left", "center", "right"))
GROUPS = (*PLACE_GROUPS, tuple(scenes.SIZES), tuple(scenes.COLOURS), scenes.SHAPES)


@dataclass(frozen=True)
class Schedule:
    """Steps of the three stages and their batches: 12 to 30 minutes on one core."""

    text: int = 700
    tower: int = 800
    together: int = 900
    rows: int = 64
    scenes: int = 8000


def vocabulary() -> list[str]:
    """Texts with every word that a scene, a question or an answer can have."""
    things = [
        f"{size} {colour} {shape}" for size in scenes.SIZES for colour in scenes.COLOURS for shape in scenes.SHAPES
    ]
    counts = [str(n) for n in range(len(scenes.PLACES) + 1)]
    asked = [q["question"] for i in range(300) for q in scenes.questions(scenes.make(0, "words", i), random.Random(i))]
    plurals = [f"how many {shape}{'es' if shape == 'cross' else 's'} are there?" for shape in scenes.SHAPES]
    said = ["describe the picture.", "a at the , and yes no", "what colour shape size", NOTHING]
    return [*things, *counts, *asked, *plurals, *said, *scenes.PLACES, *scenes.RELATIONS]


def words_of(scene: scenes.Scene) -> Tensor:
    """Which word of each group tells each patch, [n, groups]; -100 in an object's groups where there is none."""
    there = {thing.place: thing for thing in scene.things}
    rows = []
    for patch in range(ACROSS**2):
        row, column = patch // ACROSS // 2, patch % ACROSS // 2
        thing = there.get(3 * row + column)
        seen = [-100] * 3
        if thing is not None:
            values = (thing.size, thing.colour, thing.shape)
            seen = [group.index(value) for group, value in zip(GROUPS[2:], values, strict=True)]
        rows.append([row, column, *seen])
    return torch.tensor(rows)


class Words:
    """The directions of the words that tell a patch, in the language model's own embeddings."""

    def __init__(self, model: nn.Module, processor: LlavaProcessor) -> None:
        self.table = model.get_input_embeddings()
        ids = processor.tokenizer.convert_tokens_to_ids
        self.ids = [torch.tensor(ids(list(group))) for group in GROUPS]
        self.nothing = torch.tensor(ids(NOTHING))

    def patches(self, told: Tensor) -> Tensor:
        """The sum of each patch's words: [B, n, groups] → [B, n, D]"""
        total = self.table(self.nothing) * (told[..., 2] < 0).unsqueeze(-1)
        for ids, index in zip(self.ids, told.unbind(-1), strict=True):
            total = total + self.table(ids)[index.clamp_min(0)] * (index >= 0).unsqueeze(-1)
        return total

    def directions(self) -> list[Tensor]:
        """Unit vectors of the words of each group, and of nothing against something: [words, D] each."""
        groups = [normalize(self.table(ids).detach(), dim=-1) for ids in self.ids]
        return [*groups, normalize(self.table(self.nothing[None]).detach(), dim=-1)]


def _conversation(scene: scenes.Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions in any order; the description last, as it gives every answer away."""
    asked = [(q["question"], q["answer"]) for q in scenes.questions(scene, rng)]
    rng.shuffle(asked)
    return [*asked[: rng.randint(1, 4)], ("describe the picture.", scene.caption())]


def train_text(
    model: nn.Module, rows: Rows, words: Words, known: Sequence[scenes.Scene], told: Tensor, plan: Schedule, seed: int
) -> None:
    rng, log = random.Random(f"text {seed}"), Log("words", plan.text)
    lm = model.model.language_model
    step, at = optimizer([lm], 2e-3, plan.text), len(rows.start)
    for n in range(1, plan.text + 1):
        picked = [rng.randrange(len(known)) for _ in range(plan.rows)]
        chosen = [rows.row(_conversation(known[i], rng), [rows.pad_id] * ACROSS**2) for i in picked]
        ids, targets = rows.batch(chosen)
        inputs = model.get_input_embeddings()(ids)
        picture = words.patches(told[picked])  # [B, n, D]
        inputs = torch.cat([inputs[:, :at], picture, inputs[:, at + ACROSS**2 :]], dim=1)
        loss, right = answer_loss(model, lm(inputs_embeds=inputs, use_cache=False).last_hidden_state, targets)
        step(loss)
        log(n, loss, right)


def train_tower(model: nn.Module, words: Words, pixels: Tensor, told: Tensor, plan: Schedule, seed: int) -> None:
    """Each patch's token learns to be the sum of its words, which is what the language model has read so far."""
    tower, projector, log = model.model.vision_tower, model.model.multi_modal_projector, Log("tower", plan.tower)
    step, directions = optimizer([tower, projector], 2e-3, plan.tower), words.directions()
    order = batches(len(pixels), plan.rows, plan.tower, np.random.default_rng(seed))
    for n, picked in enumerate(order, 1):
        seen = projector(tower(pixels[picked]).last_hidden_state[:, 1:])  # [B, n, D]
        with torch.no_grad():
            goal = words.patches(told[picked])
        loss, right = (seen - goal).pow(2).sum(-1).mean() / goal.pow(2).sum(-1).mean(), []
        for direction, truth in zip(directions, told[picked].unbind(-1), strict=False):
            scores = 8 * (seen @ direction.T)
            loss = loss + 0.2 * cross_entropy(scores.flatten(0, 1), truth.flatten(), ignore_index=-100)
            right.append((scores.argmax(-1) == truth)[truth >= 0])
        step(loss)
        log(n, loss, torch.cat(right[2:]))


def train_together(
    model: nn.Module, rows: Rows, pixels: Tensor, known: Sequence[scenes.Scene], plan: Schedule, seed: int
) -> None:
    rng, log = random.Random(f"together {seed}"), Log("together", plan.together)
    step = optimizer([model], 1e-3, plan.together)
    order = batches(len(pixels), plan.rows, plan.together, np.random.default_rng(seed + 1))
    for n, picked in enumerate(order, 1):
        ids, targets = rows.batch([rows.row(_conversation(known[i], rng), rows.image) for i in picked])
        out = model.model(input_ids=ids, pixel_values=pixels[picked], use_cache=False)
        loss, right = answer_loss(model, out.last_hidden_state, targets)
        step(loss)
        log(n, loss, right)


def build(output: Path, seed: int = 0, objects: tuple[int, int] = (1, 6), plan: Schedule | None = None) -> Path:
    """Trains the base on scenes of the training split of `seed`, and writes it with its processor.

    Raises:
        FileExistsError: `output` is there and is not such a base.
    """
    plan = Schedule() if plan is None else plan
    if output.exists() and not (output / "recipe.json").is_file():
        raise FileExistsError(17, "The folder exists and is not a base of scenes: choose another", str(output))
    torch.manual_seed(seed)
    # the ground is dark: half of the values near 0.15
    processor = build_processor(vocabulary(), SIDE, PATCH, mean=0.2, std=0.25)
    model = build_model(processor, vision_layers=3, text_layers=4).train()
    rows, words = Rows(processor), Words(model, processor)
    known = [scenes.make(seed, "train", i, objects) for i in range(plan.scenes)]
    told = torch.stack([words_of(scene) for scene in known])  # [scenes, n, groups]
    pictures = [scene.draw() for scene in known]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]  # [scenes, 3, 96, 96]
    train_text(model, rows, words, known, told, plan, seed)
    train_tower(model, words, pixels, told, plan, seed)
    train_together(model, rows, pixels, known, plan, seed)
    recipe = {"data": "scenes, train split", "seed": seed, "objects": list(objects), "scenes": plan.scenes}
    write_base(model, processor, output, recipe)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objects", type=int, nargs=2, default=(1, 6), metavar=("LEAST", "MOST"))
    args = parser.parse_args()
    print(build(args.output, args.seed, tuple(args.objects)))


if __name__ == "__main__":
    main()
