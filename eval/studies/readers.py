"""One interface to the base, Fwd2Bot and the other methods.

A reader encodes pixels into a state once (what a cache would store), and answers from k tokens of it.

Shapes: M images, Q questions, n dense tokens, k tokens in use, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_fwd2bot import load_fwd2bot, register
from llava_fwd2bot.bottleneck import embed
from llava_fwd2bot.checkpoint.load import base_source
from llava_fwd2bot.processing.conversation import ConversationFormatter, needs_bos
from llava_fwd2bot.processing.generate import contiguous_head
from llava_fwd2bot.processing.images import open_image

from .rivals import RIVALS, KeyValueLlava, PooledLlava

PRUNING_LAYER = 2  # FastV's


class BaseReader:
    """The base, from all its dense tokens; `k` is ignored."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor
        self.tokenizer = processor.tokenizer
        self.prompt = ConversationFormatter(processor).prompt

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """[M, 3, S, S] → [M, n, D]"""
        found = self.model.model.get_image_features(pixel_values=pixels.to(self.model.dtype), return_dict=True)
        return torch.stack(list(found.pooler_output))

    def visual(self, state: Tensor, k: int, questions: Sequence[str]) -> Tensor:
        """The embeddings in the place of the image: [Q, n, D] → [Q, any, D]"""
        return state

    def answer(
        self,
        state: Tensor,
        owner: Sequence[int],
        questions: Sequence[str],
        k: int,
        max_new_tokens: int,
        batch_size: int = 64,
        advance: Callable[[int], Any] | None = None,
    ) -> list[str]:
        """Greedy answers in the order of the questions; questions of similar length share a batch.

        Args:
            state: of all images, [M, …]. owner: the image of each question.
            advance: called after each batch with the number of new answers.
        """
        order, found = sorted(range(len(questions)), key=lambda i: len(questions[i])), [""] * len(questions)
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            with contiguous_head(self.model):
                new = self._generate(state[[owner[i] for i in part]], [questions[i] for i in part], k, max_new_tokens)
            for i, text in zip(part, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                found[i] = text.strip()
            if advance is not None:
                advance(len(part))
        return found

    @torch.inference_mode()
    def _generate(self, state: Tensor, questions: list[str], k: int, max_new_tokens: int) -> Tensor:
        visual = self.visual(state, k, questions)
        ids, mask = self._ids(questions, visual.shape[1])
        words = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id)[..., None].expand_as(words)
        return self.model.generate(
            inputs_embeds=words.masked_scatter(places, visual.to(words.dtype)),
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )

    def _ids(self, questions: Sequence[str], placeholders: int) -> tuple[Tensor, Tensor]:
        token = self.processor.image_token
        texts = [self.prompt(question).replace(token, token * placeholders) for question in questions]
        found = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=needs_bos(self.tokenizer, texts[0]),
        )
        return found["input_ids"], found["attention_mask"]

    @torch.inference_mode()
    def _attention(self, visual: Tensor, questions: Sequence[str], layers: int | None = None) -> list[Tensor]:
        """Attention of the prompt's last token to each visual token, averaged over heads: per layer, [Q, n]."""
        ids, mask = self._ids(questions, visual.shape[1])
        is_image = ids == self.model.config.image_token_id
        words = self.model.get_input_embeddings()(ids)
        if hasattr(self.model, "fwd2bot"):
            visual = self.model.fwd2bot.bridge(visual.to(self.model.fwd2bot.tokens.dtype))
        words = words.masked_scatter(is_image[..., None].expand_as(words), visual.to(words.dtype))
        language_model = self.model.model.language_model
        with _first_layers(language_model, layers or len(language_model.layers)):
            seen = language_model(inputs_embeds=words, attention_mask=mask, output_attentions=True).attentions
        return [layer[:, :, -1].float().mean(1)[is_image].view(len(visual), -1) for layer in seen]


class PrunedReader(BaseReader):
    """The k dense tokens that the prompt's last token attends to most in an early layer (as FastV, arXiv 2403.06764).

    Needs no training. It depends on the question, so that no summary can be stored. Unlike in FastV, the layers before
    the choice see k tokens too, so that the budget equals that of the other methods.
    """

    def visual(self, state: Tensor, k: int, questions: Sequence[str]) -> Tensor:
        score = self._attention(state, questions, PRUNING_LAYER + 1)[-1]  # [Q, n]
        best = score.topk(k, dim=1).indices.sort(dim=1).values  # in their order
        return state.gather(1, best[..., None].expand(-1, -1, state.shape[-1]))


@contextmanager
def _first_layers(language_model: nn.Module, count: int) -> Iterator[None]:
    layers, implementation = language_model.layers, language_model.config._attn_implementation
    language_model.layers = layers[:count]
    language_model.set_attn_implementation("eager")  # other implementations return no attention maps
    try:
        yield
    finally:
        language_model.layers = layers
        language_model.set_attn_implementation(implementation)


class SummaryReader(BaseReader):
    """Fwd2Bot, and methods whose first k tokens are their output for k."""

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.compress(pixel_values=pixels.to(self.model.dtype))

    def visual(self, state: Tensor, k: int, questions: Sequence[str]) -> Tensor:
        return state[:, :k]

    @torch.inference_mode()
    def _generate(self, state: Tensor, questions: list[str], k: int, max_new_tokens: int) -> Tensor:
        ids, mask = self._ids(questions, 1)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            summary=self.visual(state, k, questions),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return out[:, ids.shape[1] :]

    def embed_images(self, state: Tensor, k: int) -> Tensor:
        """[M, K, D] → unit vectors [M, D]"""
        return embed(state[:, :k], self.model.fwd2bot_config.pooling)

    @torch.inference_mode()
    def text_states(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Summaries of texts, [texts, K, D]; their first k rows are the summaries for k.

        If the first token is the search vector, only that one is computed, [texts, 1, D].
        """
        most = 1 if self.model.fwd2bot_config.pooling == "first" else None
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            ids = self.tokenizer(
                [texts[i] for i in part],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            made = self.model.compress_text(ids["input_ids"], ids["attention_mask"], num_tokens=most)
            for i, summary in zip(part, made, strict=True):
                found[i] = summary
        return torch.stack(found)


class PooledReader(SummaryReader):
    """Average pooling. A coarser grid is not a prefix of a finer one, so the state is the dense tokens."""

    encode = BaseReader.encode

    def visual(self, state: Tensor, k: int, questions: Sequence[str]) -> Tensor:
        return self.model._condense(list(state), k)


class KeyValueReader(SummaryReader):
    """Keys and values, with a greedy loop of its own: `generate` does not support a cache before left padding."""

    @torch.inference_mode()
    def _generate(self, state: Tensor, questions: list[str], k: int, max_new_tokens: int) -> Tensor:
        model: KeyValueLlava = self.model
        ids, mask = self._ids(questions, 1)
        # tokenised with the image, which is then removed: joined text would be tokenised differently
        text = (mask == 1) & (ids != model.config.image_token_id)
        rows = [row[own] for row, own in zip(ids, text, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        ids, past = pad_sequence(rows, batch_first=True), {model.past_name: model.stored(state[:, :k])}
        # right padding: a row's own tokens come first, and its padding is masked in later steps
        places = k + torch.arange(ids.shape[1])[None].expand(len(ids), -1)
        mask = torch.cat([torch.ones(len(ids), k), (torch.arange(ids.shape[1]) < lengths[:, None]).float()], 1).long()
        words, ends = model.get_input_embeddings(), self.tokenizer.eos_token_id
        hidden = model._language_model()(
            inputs_embeds=words(ids), position_ids=places, attention_mask=mask, use_cache=True, **past
        ).last_hidden_state
        last, found = hidden[torch.arange(len(ids)), lengths - 1], []
        done = torch.zeros(len(ids), dtype=torch.bool)
        for step in range(max_new_tokens):
            token = model.get_output_embeddings()(last).argmax(-1).masked_fill(done, ends)
            found.append(token)
            done |= token == ends
            if bool(done.all()):
                break
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
            last = model._language_model()(
                inputs_embeds=words(token)[:, None],
                position_ids=(k + lengths + step)[:, None],
                attention_mask=mask,
                use_cache=True,
                **past,
            ).last_hidden_state[:, -1]
        return torch.stack(found, 1)


class Images:
    """Encodes images once, for all tasks and all k of a reader."""

    def __init__(self, reader: BaseReader) -> None:
        self.reader, self.known = reader, {}

    def __call__(self, paths: Sequence[Path], batch_size: int = 32) -> Tensor:
        missing = list(dict.fromkeys(path for path in paths if path not in self.known))
        bar = tqdm(total=len(missing), desc="encode", unit="image", disable=not missing)
        for at in range(0, len(missing), batch_size):
            part = missing[at : at + batch_size]
            pictures = [open_image(path) for path in part]
            pixels = self.reader.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            self.known.update(zip(part, self.reader.encode(pixels), strict=True))
            bar.update(len(part))
        bar.close()
        return torch.stack([self.known[path] for path in paths])


def open_reader(method: str, path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16) -> BaseReader:
    """The reader of a method: "base" and "prune" open a base, those of `RIVALS` a checkpoint.

    Raises:
        ValueError: the method is unknown.
    """
    register()
    if method in ("base", "prune"):
        source = base_source(str(path))
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        kind = BaseReader if method == "base" else PrunedReader
        return kind(model, AutoProcessor.from_pretrained(source))
    if method not in RIVALS:
        raise ValueError(f"unknown method {method!r}; choose base, prune, {', '.join(RIVALS)}")
    host = RIVALS[method]
    model, processor = load_fwd2bot(path, host=host, dtype=dtype)
    readers = {PooledLlava: PooledReader, KeyValueLlava: KeyValueReader}
    return readers.get(host, SummaryReader)(model.to(dtype), processor)
