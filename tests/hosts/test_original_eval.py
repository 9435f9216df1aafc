"""LLaVA's own loader and evaluation programs with a Fwd2Bot checkpoint, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip(
    "llava.model", reason="the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
)
pytest.importorskip("shortuuid", reason="LLaVA's evaluation needs shortuuid")

from llava.model import LlavaLlamaForCausalLM  # noqa: E402
from original_toys import clip_tower, conversations, on_disk, shaken  # noqa: E402

from llava_fwd2bot import Fwd2BotConfig, load_fwd2bot  # noqa: E402
from llava_fwd2bot.checkpoint.original import load_pretrained_model  # noqa: E402
from llava_fwd2bot.cli.main import main  # noqa: E402
from llava_fwd2bot.evaluation.original import evaluate  # noqa: E402
from llava_fwd2bot.hosts import host_class, install  # noqa: E402


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


def test_our_commands_on_their_layout(toys, tmp_path, capsys):
    """ask and compress give what LLaVA's own program answers: its prompt, its padding, its -200."""
    expected = answers(toys, tmp_path, toys["model"])
    capsys.readouterr()
    model = ["--model", str(toys["model"]), "--json"]
    summaries = str(tmp_path / "s.safetensors")
    assert main(["compress", *model, "--images", str(toys["images"]), "--output", summaries]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    for line in expected:
        image = f"{line['question_id']}.png"
        for source in (["--image", str(toys["images"] / image)], ["--summaries", summaries, "--id", image]):
            assert main(["ask", *model, *source, "what is in the picture ?", "--max-new-tokens", "5"]) == 0
            assert json.loads(capsys.readouterr().out)["answer"] == line["text"]
    _, processor = load_fwd2bot(toys["model"])
    assert processor.tokenize("a <image> b <image>")["input_ids"].eq(-200).sum() == 2


def test_their_program_on_stored_summaries(toys, tmp_path, capsys):
    """--from-cache: the same answers, and not one image is opened."""
    cache, gone = tmp_path / "s.safetensors", tmp_path / "gone"
    store = ["compress", "--model", str(toys["model"]), "--images", str(toys["images"]), "--store-dtype", "float32"]
    assert main([*store, "--output", str(cache)]) == 0
    for more in ((), ("--k", "2")):
        expected = answers(toys, tmp_path, toys["model"], *more)
        found = answers({**toys, "images": gone}, tmp_path, toys["model"], *more, "--from-cache", str(cache))
        assert [line["text"] for line in found] == [line["text"] for line in expected]
    with pytest.raises(ValueError, match="no id 'other/0.png'"):
        from llava_fwd2bot.evaluation.original_summaries import from_cache

        theirs = ["--image-folder", "x", "--model-path", str(toys["model"])]
        with from_cache(str(cache), theirs, None):
            from PIL import Image

            Image.open("x/other/0.png")
    for k in ("0", "5"):
        with pytest.raises(ValueError, match=f"holds 4 tokens per image, but --k asks for {k}"):
            answers(toys, tmp_path, toys["model"], "--from-cache", str(cache), "--k", k)
    with pytest.raises(ValueError, match="--k is for Fwd2Bot checkpoints"):
        answers(toys, tmp_path, toys["base"], "--k", "1")
    with pytest.raises(ValueError, match="needs a Fwd2Bot checkpoint"):
        answers(toys, tmp_path, toys["base"], "--from-cache", str(cache))


def test_their_loader_gives_their_four(toys):
    tokenizer, model, image_processor, length = load_pretrained_model(toys["model"], None, "llava-fwd2bot")
    assert model.fwd2bot_config.num_summary_tokens == 4 and length == 2048
    pixels = image_processor(images=[torch.zeros(3, 40, 48)], return_tensors="pt")["pixel_values"]
    assert model.compress(images=pixels).shape == (1, 4, 64)
    assert tokenizer("USER")["input_ids"]


@pytest.mark.skipif(transformers.__version__ < "5", reason="bitsandbytes of today needs transformers 5")
@pytest.mark.parametrize("width", [4, 8])
def test_quantised_the_projector_and_the_tower_stay_as_they_are(toys, width):
    """On transformers 5 LLaVA's "mm_projector" names nothing, and the projector would be quantised without a word."""
    pytest.importorskip("bitsandbytes")
    _, model, _, _ = load_pretrained_model(
        toys["model"], None, "llava-fwd2bot", load_4bit=width == 4, load_8bit=width == 8, device="cpu"
    )
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
    assert kinds["model.layers.0.mlp.up_proj.base_layer"] == f"Linear{'4bit' if width == 4 else '8bitLt'}"
    assert kinds["model.mm_projector.0"] == kinds["lm_head"] == "Linear"
    assert not any("bit" in kind for name, kind in kinds.items() if "vision_tower" in name)
    pixels = torch.randn(1, 3, 32, 32, dtype=model.dtype)
    ids = torch.tensor([[1, -200, 5, 6]])
    summary = model.compress(images=pixels)
    said = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=3)
    assert torch.equal(said, model.generate(ids, summary=summary, do_sample=False, max_new_tokens=3))


def test_their_program_answers_with_our_model(toys, tmp_path):
    """The answer file has LLaVA's keys, so that its scorers read it; the texts are what generate says."""
    argv, cuda, initialise = sys.argv, torch.Tensor.cuda, torch.nn.Linear.reset_parameters
    found = answers(toys, tmp_path, toys["model"])
    assert [set(line) for line in found] == [{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}] * 4
    assert sys.argv is argv and torch.Tensor.cuda is cuda and torch.nn.Linear.reset_parameters is initialise
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


@pytest.mark.skipif(
    not os.environ.get("LLAVA_CHECKOUT"), reason="LLAVA_CHECKOUT names no checkout of haotian-liu/LLaVA"
)
def test_the_suite_runs_their_scorers_unchanged(toys, tmp_path):
    """POPE in one process and SEED-Bench in two, from a checkout's root, to LLaVA's own scorers."""
    checkout = tmp_path / "LLaVA"
    for part in ("llava", "scripts"):
        shutil.copytree(Path(os.environ["LLAVA_CHECKOUT"]) / part, checkout / part)
    pope, seed = (checkout / "playground" / "data" / "eval" / name for name in ("pope", "seed_bench"))
    (pope / "coco").mkdir(parents=True)
    seed.mkdir(parents=True)
    shutil.copytree(toys["images"], pope / "val2014")
    shutil.copytree(toys["images"], seed / "images")
    asked = [
        {"question_id": i, "image": f"{i}.png", "text": "is there a cat ?", "category": "random"} for i in range(4)
    ]
    (pope / "llava_pope_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    truth = [{"question_id": i, "label": "no" if i % 2 else "yes"} for i in range(4)]
    (pope / "coco" / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in truth))
    for line in asked:
        line.update(image=f"images/{line['image']}", question_id=str(line["question_id"]))
    (seed / "llava-seed-bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    types = {"kind": 1}
    items = [{"question_id": str(i), "question_type_id": 1, "answer": "A", "data_type": "image"} for i in range(4)]
    items[3]["data_type"] = "video"  # their scorer divides by the number of either
    (seed / "SEED-Bench.json").write_text(json.dumps({"questions": items, "question_type": types}))

    qbench = seed.parent / "qbench"
    shutil.copytree(toys["images"], qbench / "images_llvisionqa")
    record = {"question": "is it dark ?", "candidates": ["yes", "no"], "correct_ans": "no"}
    (qbench / "llvisionqa_dev.json").write_text(json.dumps([{**record, "img_path": f"{i}.png"} for i in range(3)]))

    suite = Path(__file__).parents[2] / "eval" / "llava_suite"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{checkout}{os.pathsep}{suite.parents[1]}"}
    environment["CUDA_VISIBLE_DEVICES"] = "0,1"  # as names of shards; there is no GPU to see
    said = {}
    for script in ("pope", "seed", "qbench"):
        command = ["bash", str(suite / f"{script}.sh"), str(toys["model"]), "--k", "2", "--max_new_tokens", "3"]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said[script] = done.stdout
    assert "F1 score" in said["pope"] and "Category: random, # samples: 4" in said["pope"]
    merged = (seed / "answers" / f"{toys['model'].name}-k2" / "merge.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in merged] == ["0", "1", "2", "3"]
    assert "accuracy" in said["seed"].lower()
    assert "accuracy: 0." in said["qbench"]
    lines = (qbench / "answers" / "dev" / f"{toys['model'].name}-k2_submission.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{*record, "img_path", "response"}] * 3


def test_the_command_without_its_program_says_what_there_is(capsys):
    assert main(["llava"]) == 2
    assert "{train,eval}" in capsys.readouterr().err
