"""What is measured of a trained recipe on the device: answers as token numbers, losses on the tuning split, vectors.

Scores are made of the answers later, where the tokenizer is (score.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.studies.smol196.compressors import Compressor
from eval.studies.smol196.data import Data
from eval.studies.smol196.model import Language, block, rms, turn
from eval.studies.smol196.recipes import LANGUAGE, MOST
from eval.studies.smol196.rows import Memory, Rows, answer_rows
from eval.studies.smol196.tasks import TASKS

# tokens of an answer; those of one length are answered together
NEW = {22: ("caption", "at"), 16: ("words",), 6: ("exists", "any", "where", "count", "daquar")}
LONGEST = max(NEW)
PRUNING_LAYER = 2  # FastV's


class Reader:
    """A recipe over the reported pictures; what does not depend on k is made once."""

    def __init__(self, model: Compressor, data: Data, chunk: int = 256) -> None:
        self.model, self.data, self.chunk = model.eval(), data, chunk
        with torch.inference_mode():
            trained = model.answer is not None and model.recipe.steps > 0
            self.answer = model.adapted("answer") if trained else model.language.weights(None)
            self.compress = model.adapted("compress") if model.recipe.kind in LANGUAGE else None
        self.features = data.features[data.reported :]
        self.cached: dict[int, tuple[Memory | None, Tensor | None]] = {}  # by k, the last one made

    @torch.inference_mode()
    def passed(self, k: int) -> tuple[Memory | None, Tensor | None]:
        """What the compress pass made of the reported pictures, and what the vectors are made of."""
        k = k if self.model.recipe.residual == "pool" else MOST  # the first k of 16, but for grid cells
        if k in self.cached:
            return self.cached[k]
        parts, said = [], []
        for at in range(0, len(self.features), self.chunk):
            part = self.features[at : at + self.chunk]
            ks = torch.full((len(part),), k, device=part.device)
            if self.model.recipe.kind == "last":
                said.append(self.model.said(self.model.dense(part), self.compress, 1, ks, fast=False))
                continue
            memory, out = self.model.memory(part, ks, self.compress, fast=False)
            parts.append(memory)
            if out is not None:
                said.append(out)
        made = None
        if parts and parts[0].past is None:
            made = Memory(torch.cat([p.slots for p in parts]), None, torch.cat([p.k for p in parts]))
        elif parts:
            layers = zip(*(p.past for p in parts), strict=True)
            past = [tuple(torch.cat([pair[i] for pair in layer]) for i in (0, 1)) for layer in layers]
            made = Memory(None, past, torch.cat([p.k for p in parts]), parts[0].start)
        self.cached = {k: (made, torch.cat(said) if said else None)}
        return self.cached[k]

    def memory(self, pictures: Tensor, k: int) -> Memory:
        """Of reported pictures by number; k = 0 is all dense tokens."""
        ks = torch.full((len(pictures),), k, device=pictures.device)
        if self.model.recipe.kind in (*LANGUAGE, "query"):
            return self.passed(k)[0].pick(pictures, ks)
        return self.model.memory(self.features[pictures], ks, fast=False)[0]

    # ------------------------------------------------------------------ answers
    @torch.inference_mode()
    def answers(self, k: int, wrong: bool = False, prune: bool = False) -> np.ndarray:
        """Greedy answers to all questions that are reported, [Q, LONGEST] token numbers.

        Args:
            wrong: each question is put to another picture of the same kind. prune: to the k dense tokens that the
                question's end attends to most (with a recipe that reads dense tokens).
        """
        arrays, device = self.data.arrays, self.features.device
        task_of, picture_of = arrays["question_task"], arrays["question_picture"]
        if wrong:
            picture_of = other_pictures(task_of, picture_of)
        out = np.zeros((len(task_of), LONGEST), dtype=np.uint16)
        for new, tasks in NEW.items():
            at = np.flatnonzero(np.isin(task_of, [TASKS.index(task) for task in tasks]))
            at = at[np.argsort(arrays["question_lengths"][at], kind="stable")]
            for start in range(0, len(at), 4 * self.chunk):
                part = at[start : start + 4 * self.chunk]
                rows = self._questions(part)
                memory = self.memory(torch.from_numpy(picture_of[part].astype(np.int64)).to(device), k)
                if prune:
                    memory = pruned(self.model.language, self.answer, self.data.prompts.prefix, memory, rows, k)
                said = generate(self.model.language, self.answer, self.data, memory, rows, new)
                out[part, :new] = said.cpu().numpy()
        return out

    def _questions(self, at: np.ndarray) -> Rows:
        lengths = self.data.arrays["question_lengths"][at].astype(np.int64)
        tokens = self.data.arrays["questions"][at, -lengths.max() :].astype(np.int64)
        tokens, length = (torch.from_numpy(x).to(self.features.device) for x in (tokens, lengths))
        place = torch.arange(tokens.shape[1], device=tokens.device)
        begin = tokens.shape[1] - length[:, None]
        last = torch.arange(1, len(at) + 1, device=tokens.device) * tokens.shape[1] - 1
        return Rows(tokens, (place >= begin).long(), (place - begin).clamp(min=0), last, last)

    # ------------------------------------------------------------------ losses, vectors, shares
    @torch.inference_mode()
    def tuning_loss(self, k: int, same: bool = False) -> dict[str, float]:
        """Mean loss per answer token of each task on the tuning split, from k tokens of an image.

        Args:
            same: every slot in use gets the mean, over slots, of what they say of this picture and not of any.
        """
        pictures, packs = self.data.tuning()
        sums = torch.zeros(len(TASKS) + 1, 2, dtype=torch.float64)
        # the batches here are large enough for a mean over pictures
        for start in range(0, len(packs), self.chunk):
            rows = self.data.rows(packs[start : start + self.chunk])
            features = self.data.features[pictures[start : start + self.chunk]]
            ks = torch.full((len(features),), k, device=features.device)
            memory, _ = self.model.memory(features, ks, self.compress, fast=False)
            if same:
                typical = memory.slots.float().mean(0)
                beyond = (memory.slots.float() - typical)[:, :k].mean(1, keepdim=True)
                memory = Memory((typical + beyond).to(memory.slots.dtype), None, memory.k)
            logits = self.model.language.logits(self.model.hidden(memory, rows, self.answer, fast=False))
            loss = F.cross_entropy(logits.float(), rows.targets, reduction="none").double().cpu()
            kind = torch.from_numpy(packs[start : start + self.chunk, 2].astype(np.int64)).flatten()
            kind = kind[kind > 0]
            sums[:, 0].index_add_(0, kind, loss)
            sums[:, 1].index_add_(0, kind, torch.ones_like(loss))
        return {t: round(float(sums[i + 1, 0] / sums[i + 1, 1]), 4) for i, t in enumerate(TASKS) if sums[i + 1, 1] > 0}

    @torch.inference_mode()
    def ranks(self, j: int) -> np.ndarray:
        """Of each caption, how many photographs are nearer than its own."""
        arrays, device = self.data.arrays, self.features.device
        at = torch.from_numpy(arrays["report_captioned"].astype(np.int64)).to(device)
        said = self.passed(j if self.model.recipe.vector == "mean" else MOST)[1][at]
        images = F.normalize(said[:, 0].float(), dim=-1) if said.shape[1] == 1 else self.model.vector(said, j)
        ids = torch.from_numpy(arrays["report_captions"].astype(np.int64)).to(device).flatten(0, 1)
        lengths = arrays["report_caption_lengths"].flatten().tolist()
        texts = [
            self.model.texts(ids[s : s + 512], lengths[s : s + 512], self.compress, j, fast=False)
            for s in range(0, len(ids), 512)
        ]
        alike = images @ torch.cat(texts).T  # [M, M · 5]
        owner = torch.arange(len(images), device=device).repeat_interleave(arrays["report_captions"].shape[1])
        own = alike[owner, torch.arange(len(owner), device=device)]
        return (alike > own).sum(0).cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def own_share(self, k: int, pictures: int = 800) -> dict[str, float]:
        """How much of what differs from picture to picture differs from slot to slot, too: 0 when all say the same.

        "language" is that of the language model's part alone, without the averages of a residual.
        """
        ks = torch.full((min(pictures, len(self.features)),), k, device=self.features.device)
        memory = self.memory(torch.arange(len(ks), device=ks.device), k)
        found = {"slots": share(memory.slots[:, :k])}
        if self.model.recipe.residual != "none" and self.model.recipe.comes_out:
            dense = torch.cat([self.model.dense(part) for part in self.features[: len(ks)].split(self.chunk)])
            averages = self.model.averages(dense, MOST, ks)
            found["language"] = share((memory.slots.float() - averages.float())[:, :k])
        return found


def share(summary: Tensor) -> float:
    """[M, k, D]"""
    varied = summary.float() - summary.float().mean(0)
    common = varied.mean(1).square().sum(-1).mean()
    return round(float(1 - common / varied.square().sum(-1).mean()), 4)


def other_pictures(task_of: np.ndarray, picture_of: np.ndarray) -> np.ndarray:
    """Another picture of the same kind for each question: the next but some, in a ring of those asked the same task."""
    out = picture_of.copy()
    for task in np.unique(task_of):
        at = np.flatnonzero(task_of == task)
        ring = np.unique(picture_of[at])
        out[at] = ring[(np.searchsorted(ring, picture_of[at]) + max(len(ring) // 3, 1)) % len(ring)]
    return out


def generate(language: Language, weights: Any, data: Data, memory: Memory, rows: Rows, new: int) -> Tensor:
    """Greedy answers to questions that end at the last column, [N, new] token numbers, 0-padded after the end."""
    prefix = data.prompts.prefix
    embeds, positions, bias, last = answer_rows(language, prefix, memory, rows)
    hidden, past = language.run(weights, embeds, positions, bias, memory.past, keep=True, fast=False)
    count, device = len(embeds), embeds.device
    at = last - torch.arange(count, device=device) * embeds.shape[1]  # within its row
    each = torch.arange(count, device=device)
    position, bias = positions[each, at][:, None], bias[each, :, at][:, :, None]  # [N, 1], [N, 1, 1, L]
    state, said, done = hidden[each, at], [], torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(new):
        token = language.logits(state).argmax(-1)
        said.append(token.masked_fill(done, 0))
        done |= token == data.prompts.end
        if step + 1 == new or (step % 4 == 3 and bool(done.all())):
            break
        position, bias = position + 1, F.pad(bias, (0, 1))
        out, past = language.run(weights, language.words[token][:, None], position, bias, past, keep=True, fast=False)
        state = out[:, 0]
    out = torch.stack(said, dim=1)
    return F.pad(out, (0, new - out.shape[1]))


def pruned(language: Language, weights: Any, prefix: Tensor, memory: Memory, rows: Rows, k: int) -> Memory:
    """The k dense tokens that the question's last token attends to most in an early layer, in their order."""
    embeds, positions, bias, last = answer_rows(language, prefix, memory, rows)
    cos, sin = language.rotation(positions)
    shape, x = language.shape, embeds
    sizes = (shape.heads, shape.groups, shape.epsilon)
    for layer in weights[:PRUNING_LAYER]:
        x, _, _ = block(x, *layer, cos, sin, bias, None, None, *sizes)
    scores = attention(x, weights[PRUNING_LAYER], cos, sin, bias, last, sizes)  # [N, L]
    first = len(prefix)
    at = scores[:, first : first + memory.size].topk(k, dim=1).indices.sort(dim=1).values
    slots = memory.slots.gather(1, at[..., None].expand(-1, -1, memory.slots.shape[-1]))
    return Memory(slots, None, torch.full_like(memory.k, k))


def attention(
    x: Tensor, layer: tuple[Tensor, ...], cos: Tensor, sin: Tensor, bias: Tensor, last: Tensor, sizes: tuple
) -> Tensor:
    """What the token at `last` of each row attends to in a layer, mean over heads: [N, L]"""
    heads, groups, epsilon = sizes
    count, length, size = x.shape
    mixed = F.linear(rms(x, layer[0], epsilon), layer[1]).view(count, length, heads + 2 * groups, size // heads)
    q, keys, _ = mixed.transpose(1, 2).split((heads, groups, groups), dim=1)
    q, keys = turn(q, cos, sin), turn(keys, cos, sin).repeat_interleave(heads // groups, 1)
    each = torch.arange(count, device=x.device)
    at = last - each * length
    scores = (q[each, :, at][:, :, None] @ keys.mT).float() / (size // heads) ** 0.5  # [N, H, 1, L]
    return (scores + bias[each, :, at][:, :, None].float()).softmax(-1).mean(1)[:, 0]
