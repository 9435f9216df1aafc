"""The compressors, trained: what stands in the place of the dense tokens, and the losses of a batch.

Shapes: B pictures, n = 196 dense tokens, S = 16 slots of which the first k are seen, D hidden size, T tokens of text.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.studies.smol196.data import Batch, Prompts
from eval.studies.smol196.features import PLACES, SHRUNK, STEP
from eval.studies.smol196.model import Language, Lora, Projector
from eval.studies.smol196.recipes import KS, LANGUAGE, LINEAR, MOST, Recipe
from eval.studies.smol196.rows import Memory, Rows, answer_rows
from llava_fwd2bot.bottleneck import SummaryTokens, compress_pass, embed
from llava_fwd2bot.compressors import compressor_of
from llava_fwd2bot.compressors.averages import nested_averages
from llava_fwd2bot.compressors.query import QueryTransformer
from llava_fwd2bot.config import Fwd2BotConfig
from llava_fwd2bot.losses import MAX_LOGIT_SCALE, answer_loss, contrastive_loss, distillation_loss


class Compressor(nn.Module):
    """A recipe's parameters, on a frozen base."""

    def __init__(self, recipe: Recipe, language: Language, projector: Projector, prompts: Prompts) -> None:
        super().__init__()
        self.recipe, self.prompts = recipe, prompts
        self.base = [language, projector]  # in a list: no part of what is trained
        shape, size = language.shape, language.shape.hidden
        self.answer = Lora(shape, recipe.rank) if recipe.kind != "last" else None
        self.compress = Lora(shape, recipe.rank) if recipe.kind in LANGUAGE and not recipe.shared else None
        if recipe.shared:
            self.compress = self.answer
        self.own = nn.ModuleDict()
        if recipe.kind in LANGUAGE:
            config = Fwd2BotConfig(
                num_summary_tokens=MOST + (recipe.vector == "token"),
                residual=recipe.residual if recipe.comes_out else "none",
            )
            self.own["tokens"] = SummaryTokens(config, language.words, prompts.image, prompts.text)
            if recipe.residual == "pool":
                self.register_buffer("weights", linear_weights("pool"), persistent=False)
        elif recipe.kind == "query":
            self.own["resampler"] = QueryTransformer(size, MOST, heads=size // 64, places=PLACES)
        elif recipe.kind == "downsample":
            self.own["places"] = nn.Embedding(len(KS) * MOST, size)
            nn.init.normal_(self.own["places"].weight, std=0.02)
        elif recipe.kind in LINEAR:
            self.register_buffer("weights", linear_weights(recipe.kind), persistent=False)
        elif recipe.kind == "base":
            self.own["projector"] = projector

    @property
    def language(self) -> Language:
        return self.base[0]

    def adapted(self, stage: str) -> list[tuple[Tensor, ...]]:
        return self.language.weights(self.compress if stage == "compress" else self.answer)

    # ------------------------------------------------------------------ compress
    def dense(self, features: Tensor) -> Tensor:
        """uint8 features [B, ≥ 196, 1280] → V [B, 196, D]"""
        with autocast(features.device):
            return self.base[1](features[:, :PLACES].float() * STEP).to(self.language.dtype)

    def memory(
        self, features: Tensor, k: Tensor, weights: Any = None, dense: Tensor | None = None, fast: bool = True
    ) -> tuple[Memory, Tensor | None]:
        """What the answer pass reads, and S with what else the language model said beside it (for the vector).

        Args:
            features: [B, 227, 1280]. k: [B]. weights: of the compress stage, where there is one.
        """
        recipe, kind = self.recipe, self.recipe.kind
        dense = self.dense(features) if dense is None else dense
        if kind in ("base", "dense"):
            return Memory(dense, None, torch.full_like(k, PLACES)), None
        if kind in LINEAR:
            return Memory(self.linear(dense, k), None, k), None
        if kind == "downsample":
            number = torch.bucketize(k, torch.tensor(KS, device=k.device))
            first = PLACES + torch.tensor([sum(list(SHRUNK)[:i]) for i in range(len(KS))], device=k.device)[number]
            at = (first[:, None] + torch.arange(MOST, device=k.device)).clamp(max=features.shape[1] - 1)
            small = features.gather(1, at[..., None].expand(-1, -1, features.shape[-1]))
            places = self.own["places"](number[:, None] * MOST + torch.arange(MOST, device=k.device))
            with autocast(k.device):
                return Memory(self.base[1](small.float() * STEP, places), None, k), None
        if kind == "query":
            with autocast(k.device):
                return Memory(self.own["resampler"](dense.float(), MOST), None, k), None
        if kind == "kv":
            return self._key_values(dense, k, weights, fast), None
        out = self.said(dense, weights, MOST + (recipe.vector == "token"), k, fast)
        return Memory(out[:, :MOST], None, k), out

    def linear(self, dense: Tensor, k: Tensor) -> Tensor:
        """Tokens of `weights`, for the k of each picture, [B, 16, D]"""
        which = torch.tensor(KS, device=k.device)
        return self.weights[torch.bucketize(k, which)].to(dense) @ dense

    def said(self, dense: Tensor, weights: Any, count: int, k: Tensor, fast: bool = True) -> Tensor:
        """S, and the vector's token after it, [B, count, D]; for `last` the state after the prompt, [B, 1, D]."""
        language, recipe = self.language, self.recipe
        prompt = language.words[self.own["tokens"].image_prompt_ids].to(language.dtype)
        decoder = language.decoder(weights, fast)
        if recipe.kind == "last":
            return compress_pass(decoder, list(dense), prompt[:-1], prompt[-1:])
        tokens = self.own["tokens"].tokens[:count]
        if recipe.residual == "none":
            return compress_pass(decoder, list(dense), prompt, tokens)
        averages = self.averages(dense, count, k)
        out = compress_pass(decoder, list(dense), prompt, tokens, list(averages))
        return out if not recipe.comes_out else averages + self.own["tokens"].log_gain.exp().to(out) * out

    def averages(self, dense: Tensor, count: int, k: Tensor) -> Tensor:
        """What the residual adds, [B, count, D]; the vector's token, after the sixteen, has none."""
        if self.recipe.residual == "pool":
            found = self.linear(dense, k)
        else:
            found = nested_averages(PLACES, min(count, MOST)).to(dense) @ dense
        return F.pad(found, (0, 0, 0, count - found.shape[1]))

    def _key_values(self, dense: Tensor, k: Tensor, weights: Any, fast: bool) -> Memory:
        tail = [self.language.words[self.own["tokens"].image_prompt_ids], self.own["tokens"].tokens]
        tail = torch.cat([t.to(dense.dtype) for t in tail]).expand(len(dense), -1, -1)
        rows = torch.cat([dense, tail], dim=1)
        _, kept = self.language.run(weights, rows, keep=True, fast=fast)
        return Memory(None, [(a[:, :, -MOST:], b[:, :, -MOST:]) for a, b in kept], k, rows.shape[1])

    def texts(self, ids: Tensor, lengths: list[int], weights: Any, j: int | Tensor, fast: bool = True) -> Tensor:
        """Unit vectors of captions: ids [C, T] → [C, D]; j as of `vector`"""
        language, recipe = self.language, self.recipe
        words = language.words[ids].to(language.dtype)
        contexts = [row[:n] for row, n in zip(words, lengths, strict=True)]
        prompt = language.words[self.own["tokens"].text_prompt_ids].to(language.dtype)
        decoder = language.decoder(weights, fast)
        if recipe.kind == "last":
            return embed(compress_pass(decoder, contexts, prompt[:-1], prompt[-1:]), "mean")
        tokens = self.own["tokens"].tokens[: {"token": MOST + 1, "first": 1, "mean": MOST}[recipe.vector]]
        return self.vector(compress_pass(decoder, contexts, prompt, tokens), j)

    def vector(self, said: Tensor, j: int | Tensor) -> Tensor:
        """Unit vectors of what was said of pictures or texts, [B, ≥ j, D] → [B, D]; j may be of each, [B]."""
        if self.recipe.vector == "token":
            return embed(said, "last")
        if isinstance(j, Tensor):
            used = torch.arange(said.shape[1], device=j.device) < j[:, None]
            return F.normalize((said.float() * used[..., None]).sum(1), dim=-1)
        return embed(said[:, :j], self.recipe.vector)

    # ------------------------------------------------------------------ losses
    def hidden(self, memory: Memory, rows: Rows, weights: Any, fast: bool = True) -> Tensor:
        """The answer pass: last hidden states where a label is, [N, D]"""
        embeds, positions, bias, at = answer_rows(self.language, self.prompts.prefix, memory, rows)
        out, _ = self.language.run(weights, embeds, positions, bias, memory.past, fast=fast)
        return out.flatten(0, 1)[at]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The recipe's losses and their weighted sum, "loss"."""
        recipe, language = self.recipe, self.language
        found: dict[str, Tensor] = {}
        with nullcontext() if recipe.kind == "base" else torch.no_grad():
            dense = self.dense(batch.features)
        stage = self.adapted("compress") if recipe.kind in LANGUAGE else None
        said = None
        if recipe.answer or recipe.distill:
            memory, said = self.memory(batch.features, batch.k, stage, dense)
            logits = language.logits(self.hidden(memory, batch.rows, self.adapted("answer")))
            found["answer"] = answer_loss(logits, batch.rows.targets)
            if recipe.distill:
                with torch.no_grad():
                    seen = Memory(dense, None, torch.full_like(batch.k, PLACES))
                    teacher = language.logits(self.hidden(seen, batch.rows, language.weights(None)))
                found["distill"] = distillation_loss(logits, teacher)
        if recipe.contrastive:
            pairs = len(batch.captions)
            if said is None:
                said = self.said(dense[:pairs], stage, MOST, batch.k[:pairs])
            # grid cells are those of each picture's k, and its captions have as many outputs
            j = batch.k[:pairs] if recipe.residual == "pool" and recipe.vector == "mean" else batch.j
            images = self.vector(said[:pairs], j) if recipe.kind != "last" else embed(said, "mean")
            texts = self.texts(batch.captions, batch.caption_lengths, stage, j)
            scale = self.own["tokens"].logit_scale
            with torch.no_grad():
                scale.clamp_(max=MAX_LOGIT_SCALE)
            found["contrastive"], found["hits"] = contrastive_loss(images, texts, scale)
        names = ("answer", "distill", "contrastive")
        found["loss"] = sum(getattr(recipe, name) * found[name] for name in names if name in found)
        return found


def linear_weights(kind: str) -> Tensor:
    """Weights over the 14 × 14 grid for each k, zeros beyond it, [5, 16, 196]: the package's, but for `uniform`."""
    side, out = math.isqrt(PLACES), torch.zeros(len(KS), MOST, PLACES)
    for number, (k, shape) in enumerate(SHRUNK.items()):
        if kind == "uniform":  # over the grid; the package's is over the line
            ys, xs = (((torch.arange(c) + 0.5) * side / c).long() for c in shape)
            out[number, torch.arange(k), (ys[:, None] * side + xs).flatten()] = 1
        else:
            out[number, :k] = compressor_of(kind).weights(PLACES, k)
    return out


def autocast(device: torch.device) -> Any:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
