"""Toy processors for the data tests: real tokenizer algorithms and image processors, tiny vocabularies, offline."""

from __future__ import annotations

import string

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

WORDS = "what is in the picture and how many dogs are there two red a cat on mat yes no USER ASSISTANT".split()

# llava-hf/llava-1.5-7b-hf's behaviour: pictures first, a space after each text, and no end token at all.
TEMPLATE_WITHOUT_EOS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# ChatML's behaviour: pictures where they stand, the end token after every answer and a newline after that.
TEMPLATE_WITH_EOS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


def llama_tokenizer(bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """Llama's own pipeline: "▁" for spaces and before every piece, byte fallback, BOS in front (`eos`: EOS behind)."""
    alphabet = ["▁", *string.ascii_letters, *string.digits, *".,:;?!'[]-_<>/|"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *alphabet]
    merges = []
    for word in WORDS:
        built = "▁"
        for letter in word:
            if built + letter not in pieces:
                pieces.append(built + letter)
                merges.append((built, letter))
            built += letter
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrap(tokenizer, bos, eos)


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's and Qwen's pipeline: byte-level BPE, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return _wrap(tokenizer, bos)


def _wrap(tokenizer: Tokenizer, bos: bool, eos: bool = False) -> PreTrainedTokenizerFast:
    if bos or eos:
        single = "<s> " * bos + "$A" + " </s>" * eos
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def llava(tokenizer=None, chat_template: str | None = None) -> LlavaProcessor:
    """LLaVA-1.5 in small: 28 x 28 pixels, patches of 14, so n = 4."""
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        image_processor,
        tokenizer or llama_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,
    )


def llava_next(tokenizer=None) -> LlavaNextProcessor:
    """LLaVA-NeXT in small: n and the number of crops depend on the picture's shape."""
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaNextProcessor(
        image_processor,
        tokenizer or llama_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


class _WithoutVideos(LlavaOnevisionProcessor):
    """Its video processor needs torchvision, which the tests do without."""

    def check_argument_for_proper_class(self, name, argument):
        return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)


def llava_onevision(tokenizer=None) -> LlavaOnevisionProcessor:
    """LLaVA-OneVision in small: an image is cropped only where it is alone in its row."""
    # in transformers 5.4 it needs torchvision, which the tests do without
    module = "transformers.models.llava_onevision.image_processing_pil_llava_onevision"
    LlavaOnevisionImageProcessorPil = pytest.importorskip(module, exc_type=ImportError).LlavaOnevisionImageProcessorPil
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
    )
    tokenizer = tokenizer or llama_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    return _WithoutVideos(image_processor, tokenizer, num_image_tokens=4, vision_feature_select_strategy="full")
