"""The original LLaVA in small, made with its own classes: CLIP tower on disk, 16 dense tokens, Llama of two layers.

Works on transformers 4.37.2 as well, where float64 rows with a mask do not: the type follows the version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

SIDE, DENSE, IMAGE = 32, 16, -200
DTYPE = torch.float32 if transformers.__version__ < "5" else torch.float64
TOLERANCE = 1e-5 if DTYPE == torch.float32 else 1e-10


def clip_tower(folder: Path) -> Path:
    """A vision tower and its image processor, as the original finds them: by the name of a folder."""
    torch.manual_seed(7)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    pixels = {"crop_size": side, "size": {"shortest_edge": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels |= {"do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    pixels["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def original_base(tower: Path, dtype: torch.dtype = DTYPE, family: str = "LlavaLlama", **changes: Any) -> nn.Module:
    from llava import model as classes

    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": str(tower),
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 64,
        "image_aspect_ratio": "pad",
    }
    torch.manual_seed(0)
    kind = getattr(classes, f"{family}ForCausalLM")
    model = kind(kind.config_class(**{**settings, **changes}))
    model.get_vision_tower().load_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        if hasattr(model.model, "image_newline"):
            model.model.image_newline.normal_()
    return model.to(dtype).eval()


def shaken(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """LoRA starts as a no-op; with random weights a mix-up of stages shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in model._stages.names:
            for key, parameter in model._stages.tensors(name).items():
                if "lora_B" in key:
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def sentencepiece_tokenizer(folder: Path) -> Path:
    """LLaVA's kind of tokenizer: a `tokenizer.model` of Llama's layout, in which USER is a piece."""
    import sentencepiece

    words = "what is in the picture how many dogs are there two red a cat on mat yes no green blue colour ? ." * 4
    speech = "A chat between a curious user and an artificial intelligence assistant . The assistant gives helpful"
    (folder / "text.txt").write_text("\n".join([words, speech, "USER : ASSISTANT :"] * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["USER", "ASSISTANT"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "model_max_length": 2048, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def qwen_tokenizer(folder: Path) -> int:
    """A tokenizer of Qwen2's kind, byte-level with <|im_start|> and <|im_end|>; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    own.train_from_iterator(["what colour is the picture ? red green blue user assistant system"], trainer)
    named = {"eos_token": special[2], "pad_token": special[0], "additional_special_tokens": special[1:]}
    PreTrainedTokenizerFast(tokenizer_object=own, **named).save_pretrained(folder)
    return -(-(len(own.get_vocab()) + 8) // 64) * 64


def on_disk(folder: Path, tower: Path) -> Path:
    """A base as liuhaotian/llava-v1.5-7b lies on disk: weights, configuration, tokenizer.model."""
    import sentencepiece

    folder.mkdir()
    sentencepiece_tokenizer(folder)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    original_base(tower, torch.float32, vocab_size=-(-size // 64) * 64, tokenizer_model_max_length=256).save_pretrained(
        folder
    )
    return folder


def conversations(folder: Path) -> dict[str, Path]:
    """Six pictures of one colour, LLaVA's JSON that asks for it, and one record of text alone."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    records = []
    for i, colour in enumerate(("red", "green", "blue") * 2):
        Image.new("RGB", (48, 40), colour).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat colour is the picture ?"}, {"from": "gpt", "value": colour}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns, "caption": f"a {colour} picture"})
    text = [{"from": "human", "value": "is there a cat ?"}, {"from": "gpt", "value": "no"}]
    records.append({"id": "text", "conversations": text})
    (folder / "data.json").write_text(json.dumps(records))
    return {"data": folder / "data.json", "images": folder / "images"}
