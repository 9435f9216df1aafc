"""Ways to reduce an image to k tokens that the package's registry of compressors has not.

Each is Fwd2Bot's host class with another compress pass, so that data, trainer, losses and checkpoints are the same
code. They implement the papers' ideas at a small size, and do not reproduce the papers' systems. Others are compressors
of the package: `fwd2bot train --fwd2bot_compressor query`, and `--fwd2bot_adapters shared`.

pool     the registry's average pooling, for training on several k: its tokens for k are no prefix of those for more
kv       the summary tokens' keys and values of every layer, not their outputs (VoCo-LLaMA, arXiv 2406.12275)
mean     for retrieval: the mean of the dense tokens, and of the text's states, through a learned head each

Pruning by attention, which needs no training, is in readers.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from llava_fwd2bot.bottleneck import Collapsed
from llava_fwd2bot.compressors import compressor_of
from llava_fwd2bot.hosts.llava import Fwd2BotLlava


class _ImagesAlone(Fwd2BotLlava):
    """A method without a vector for texts: train it with `--fwd2bot_contrastive_weight 0`."""

    def _compress_whole(self, contexts: list[Tensor], prompt_ids: Tensor, num_tokens: int | None) -> Tensor:
        if prompt_ids is self.fwd2bot.text_prompt_ids:
            raise ValueError(f"{type(self).__name__} compresses images only: set --fwd2bot_contrastive_weight 0.")
        return self._condense(contexts, num_tokens or self.fwd2bot_config.num_summary_tokens)

    def _condense(self, dense: list[Tensor], k: int) -> Tensor:
        """M × [n, D] → [M, k, D]"""
        raise NotImplementedError


class PooledLlava(_ImagesAlone):
    def _condense(self, dense: list[Tensor], k: int) -> Tensor:
        return compressor_of("pool").images(self, dense, k)


class KeyValueLlava(_ImagesAlone):
    """The summary is the keys and values at R of every layer: [M, k, layers · 2 · heads · size].

    R has positions 0 … k-1 and the image before it has negative ones, so that the stored keys have the rotations that
    the answer pass needs, whose text starts at position k. Each row has exactly one image, which comes before its text.
    """

    def _condense(self, dense: list[Tensor], k: int) -> Tensor:
        with self._stages.use("compress"):
            prompt = self.get_input_embeddings()(self.fwd2bot.image_prompt_ids)
            tail = torch.cat([prompt, self.fwd2bot.tokens[:k].to(prompt.dtype)])
            rows = torch.stack([torch.cat([v.to(tail.dtype), tail]) for v in dense])  # [M, L, D]
            places = torch.arange(rows.shape[1], device=rows.device) + k - rows.shape[1]
            past = DynamicCache()
            self._language_model()(
                inputs_embeds=rows, position_ids=places[None], use_cache=True, **{self.past_name: past}
            )
            kept = [x[:, :, -k:] for layer in past.layers for x in (layer.keys, layer.values)]
            return torch.stack(kept, dim=1).permute(0, 3, 1, 2, 4).flatten(2)  # [M, k, layers · 2 · heads · size]

    def stored(self, summary: Tensor) -> DynamicCache:
        """[M, k, …] → the key-value cache that the answer pass continues from."""
        config = self.config.text_config
        heads = config.num_key_value_heads
        parts = summary.unflatten(2, (config.num_hidden_layers, 2, heads, -1)).permute(2, 3, 0, 4, 1, 5)
        return DynamicCache(ddp_cache_data=[(keys, values) for keys, values in parts])  # each [M, heads, k, size]

    def _answer_hidden(self, plan: Collapsed, input_ids: Tensor, summary: Tensor | None) -> Tensor:
        if summary is None or not torch.equal(plan.image_row, torch.arange(len(plan.lengths), device=input_ids.device)):
            raise ValueError("KeyValueLlava takes rows with exactly one image.")
        k = summary.shape[1]
        text = ~plan.is_summary
        words = self.get_input_embeddings()(input_ids.flatten()[plan.origin[text]])
        none = plan.summary_at[:0]
        own = Collapsed(
            *(plan.origin[text], plan.is_summary[text], plan.lengths - k, plan.image_row, plan.row[text]),
            summary_at=none,
            longest=plan.longest - k,
        )
        rows, _ = own.pad(words)
        places = k + torch.arange(rows.shape[1], device=rows.device)[None]
        past = {self.past_name: self.stored(summary)}
        out = self._language_model()(inputs_embeds=rows, position_ids=places, **past)
        hidden = rows.new_zeros(len(text), rows.shape[-1])
        return hidden.masked_scatter(text[:, None], own.pack(out.last_hidden_state).to(hidden.dtype))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, summary: Tensor, **options: Any) -> Tensor:
        """The ids with the answers after them; each row has one image: [Q, T], [Q, T], [Q, k, …] → [Q, T + new]

        Rows of one length at a time: transformers' `generate` does not support a cache before left padding.
        """
        text = (attention_mask == 1) & (input_ids != self._image_token_id())
        lengths, found = text.sum(1), [input_ids[:0]] * len(input_ids)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            own = input_ids[rows][text[rows]].view(len(rows), -1)
            ids = torch.cat([own.new_zeros(len(rows), summary.shape[1]), own], 1)  # what is cached is not read
            past = {self.past_name: self.stored(summary[rows].to(self.dtype))}
            out = super().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **past, **options)
            for row, new in zip(rows.tolist(), out[:, ids.shape[1] :], strict=True):
                found[row] = new
        ends = self.generation_config.eos_token_id
        filled = pad_sequence(found, batch_first=True, padding_value=ends[0] if isinstance(ends, list) else ends)
        return torch.cat([input_ids, filled], 1)


class MeanPooledLlava(Fwd2BotLlava):
    def _init_fwd2bot(self, *args: Any, **kwargs: Any) -> None:
        super()._init_fwd2bot(*args, **kwargs)
        size = self.fwd2bot.tokens.shape[1]
        self.fwd2bot.image_head, self.fwd2bot.text_head = nn.Linear(size, size), nn.Linear(size, size)

    def _compress_whole(self, contexts: list[Tensor], prompt_ids: Tensor, num_tokens: int | None) -> Tensor:
        if prompt_ids is not self.fwd2bot.text_prompt_ids:
            head, means = self.fwd2bot.image_head, torch.stack([v.float().mean(0) for v in contexts])
            return head(means.to(head.weight.dtype))[:, None]  # [M, 1, D]
        with self._stages.use(None), torch.no_grad():
            rows = pad_sequence(contexts, batch_first=True)
            hidden = self._language_model()(inputs_embeds=rows, use_cache=False).last_hidden_state.float()
        head = self.fwd2bot.text_head
        means = torch.stack([h[: len(c)].mean(0) for h, c in zip(hidden, contexts, strict=True)])
        return head(means.to(head.weight.dtype))[:, None]


RIVALS: dict[str, type | None] = {"fwd2bot": None, "pool": PooledLlava, "kv": KeyValueLlava, "mean": MeanPooledLlava}
