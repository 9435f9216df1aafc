"""LLaVA's own loader and evaluation programs with a Fwd2Bot checkpoint, on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "llava.model", reason="the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
)
pytest.importorskip("shortuuid", reason="LLaVA's evaluation needs shortuuid")

from llava.model import LlavaLlamaForCausalLM  # noqa: E402
from original_toys import clip_tower, conversations, on_disk, shaken  # noqa: E402

from llava_fwd2bot import Fwd2BotConfig  # noqa: E402
from llava_fwd2bot.hosts import host_class, install  # noqa: E402
from llava_fwd2bot.hosts.original_eval import evaluate  # noqa: E402
from llava_fwd2bot.hosts.original_load import load_pretrained_model  # noqa: E402


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tower = clip_tower(folder / "clip")
    base = on_disk(folder / "llava-toy", tower)
    model = LlavaLlamaForCausalLM.from_pretrained(base)
    model.get_vision_tower().load_model()
    config = Fwd2BotConfig(num_summary_tokens=4, lora_r=4, lora_alpha=8)
    shaken(install(model, host_class("LlavaLlamaForCausalLM"), config, [5, 6], [7, 8]), 0.5)
    model.save_pretrained(folder / "llava-fwd2bot")
    return {"base": base, "model": folder / "llava-fwd2bot", **conversations(folder / "data")}


def questions(toys: dict[str, Path], folder: Path) -> Path:
    lines = [{"question_id": i, "image": f"{i}.png", "text": "what is in the picture ?"} for i in range(4)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "questions.jsonl"


def answers(toys: dict[str, Path], folder: Path, model: Path, *more: str) -> list[dict]:
    argv = ["model_vqa_loader", "--model-path", str(model), "--question-file", str(questions(toys, folder))]
    argv += ["--image-folder", str(toys["images"]), "--answers-file", str(folder / "answers.jsonl"), *more]
    evaluate([*argv, "--temperature", "0", "--conv-mode", "vicuna_v1", "--max_new_tokens", "5"])
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_their_loader_gives_their_four(toys):
    tokenizer, model, image_processor, length = load_pretrained_model(toys["model"], None, "llava-fwd2bot")
    assert model.fwd2bot_config.num_summary_tokens == 4 and length == 2048
    pixels = image_processor(images=[torch.zeros(3, 40, 48)], return_tensors="pt")["pixel_values"]
    assert model.compress(images=pixels).shape == (1, 4, 64)
    assert tokenizer("USER")["input_ids"]


def test_their_program_answers_with_our_model(toys, tmp_path):
    """The answer file has LLaVA's keys, so that its scorers read it; the texts are what generate says."""
    argv, cuda = sys.argv, torch.Tensor.cuda
    found = answers(toys, tmp_path, toys["model"])
    assert [set(line) for line in found] == [{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}] * 4
    assert sys.argv is argv and torch.Tensor.cuda is cuda
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    tokenizer, model, image_processor, _ = load_pretrained_model(toys["model"], None, "llava-fwd2bot")
    said = {}
    for k in (None, 1):
        model.default_num_tokens = k
        said[k] = []
        for line in found:
            conversation = conv_templates["vicuna_v1"].copy()
            conversation.append_message(conversation.roles[0], "<image>\n" + line["prompt"])
            conversation.append_message(conversation.roles[1], None)
            ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
            picture = Image.open(toys["images"] / f"{line['question_id']}.png").convert("RGB")
            pixels = process_images([picture], image_processor, model.config)
            out = model.generate(ids[None], images=pixels, do_sample=False, max_new_tokens=5)
            said[k].append(tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip())
    assert [line["text"] for line in found] == said[None]
    assert [line["text"] for line in answers(toys, tmp_path, toys["model"], "--k", "1")] == said[1] != said[None]


def test_a_plain_llava_goes_through_their_own_loader(toys, tmp_path):
    """The wrapper is no fork: the base beside Fwd2Bot is evaluated by the same command."""
    assert len(answers(toys, tmp_path, toys["base"])) == 4
