"""Tiny LLaVAs of transformers' own classes for generated or simple pictures: the parts that their recipes share.

A word-level tokenizer, a processor with a chat template, a model of a million or two parameters, rows of ids and
labels, and a training loop's parts. For scripts/build_easy_vqa.py.

Shapes: B rows, T tokens, n dense tokens of an image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_fwd2bot.files.writing import write_folder, write_json

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
PROMPTS = "summarize the image in a few words. summarize the text in a few words."
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' }}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + '</s>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_processor(texts: Iterable[str], side: int, patch: int, mean: float, std: float) -> LlavaProcessor:
    """One id per word of `texts`, of Fwd2Bot's prompts and of the chat template; `side`² pixels in patches."""
    split = pre_tokenizers.Split(Regex(r"(?:user|assistant):|\w+|[^\w\s]"), "removed", invert=True)
    corpus = {*texts, PROMPTS, "user: assistant: a"}
    vocabulary = SPECIALS + sorted({w for text in corpus for w, _ in split.pre_tokenize_str(text.lower())})
    vocabulary += [f"<extra_{i}>" for i in range(-len(vocabulary) % 64)]  # a multiple of 64, for quantisation
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), split
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words by spaces
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[mean] * 3,
        image_std=[std] * 3,
    )
    return LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_model(processor: LlavaProcessor, vision_layers: int = 2, text_layers: int = 3) -> nn.Module:
    """An untrained LlavaForConditionalGeneration, 128 wide, for the pictures and words of `processor`."""
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    side, patch = processor.image_processor.crop_size["height"], processor.patch_size
    vision = CLIPVisionConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=vision_layers,
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
        num_hidden_layers=text_layers,
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
        image_seq_length=(side // patch) ** 2,
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
        side = processor.image_processor.crop_size["height"]
        self.image = [processor.image_token_id] * (side // processor.patch_size) ** 2
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
    cosine = [
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / max(1, total - warm))) for s in range(total + 1)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda s: min((s + 1) / warm, 1) * cosine[min(s, total)])

    def step(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)

    return step


def batches(count: int, size: int, total: int, rng: np.random.Generator) -> Iterator[list[int]]:
    order: list[int] = []
    for _ in range(total):
        if len(order) < size:
            order = rng.permutation(count).tolist()
        yield order[:size]
        order = order[size:]


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
    """The loss at the labelled places, and which tokens of answers are right, their ends aside."""
    where = labels != -100
    logits, target = model.lm_head(hidden[where]), labels[where]
    return cross_entropy(logits, target), (logits.argmax(-1) == target)[target != model.generation_config.eos_token_id]


def write_base(model: nn.Module, processor: LlavaProcessor, output: Path, recipe: dict[str, Any]) -> None:
    """The checkpoint folder, with `recipe` as recipe.json; written to a temporary folder, then renamed."""
    with write_folder(output) as partial:
        model.eval().save_pretrained(partial)
        processor.save_pretrained(partial)
        write_json(partial / "recipe.json", recipe)
