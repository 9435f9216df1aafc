"""LLaVA-NeXT's own repository: its train() with the one flag, its loader, its patch.

It runs where the `llava` that is installed is LLaVA-NeXT's, e.g. with a checkout of it first on PYTHONPATH, on
transformers 4.38 to 4.40; elsewhere it is skipped. What calls its train() also needs what that imports: deepspeed,
datasets, and the `trl` of the checkout. LLAVA_NEXT_CHECKOUT names the checkout for the test of the patch.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

llava = pytest.importorskip("llava.model", reason="LLaVA-NeXT is not installed")
if not hasattr(llava, "LlavaQwenForCausalLM"):
    pytest.skip("the llava that is installed is not LLaVA-NeXT's", allow_module_level=True)

from original_toys import clip_tower, conversations, original_base, qwen_tokenizer  # noqa: E402

from llava_fwd2bot.checkpoint.original import load_pretrained_model  # noqa: E402
from llava_fwd2bot.checkpoint.read import read_checkpoint  # noqa: E402
from llava_fwd2bot.training import original as original_train  # noqa: E402

PATCHES = Path(__file__).parents[2] / "patches"
PINPOINTS = "[[32, 64], [64, 32], [64, 64]]"


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tower, base = clip_tower(folder / "clip"), folder / "llava-qwen-toy"
    base.mkdir()
    size = qwen_tokenizer(base)
    anyres = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": json.loads(PINPOINTS)}
    anyres |= {"mm_patch_merge_type": "spatial_unpad", "tokenizer_model_max_length": 512}
    original_base(tower, torch.float32, "LlavaQwen", vocab_size=size, **anyres).save_pretrained(base)
    return {"tower": tower, "base": base, **conversations(folder / "data")}


@pytest.fixture
def their_train():
    """Skips where their own train() cannot be imported: nothing of ours is imported by it."""
    try:
        importlib.import_module("llava.train.train")
    except ImportError as error:
        pytest.skip(f"LLaVA-NeXT's train() cannot be imported here: {error}")


def command(toys: dict[str, Path], output: Path, *more: str) -> list[str]:
    """scripts/train/finetune_ov.sh, as far as a CPU goes, with LoRA."""
    return [
        *("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--attn_implementation", "eager"),
        *("--mm_tunable_parts", "mm_mlp_adapter,mm_language_model", "--model_name_or_path", str(toys["base"])),
        *("--version", "qwen_1_5", "--data_path", str(toys["data"]), "--image_folder", str(toys["images"])),
        *("--vision_tower", str(toys["tower"]), "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2"),
        *("--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False", "--group_by_modality_length", "True"),
        *("--image_aspect_ratio", "anyres", "--image_grid_pinpoints", PINPOINTS),
        *("--mm_patch_merge_type", "spatial_unpad", "--output_dir", str(output), "--num_train_epochs", "4"),
        *("--per_device_train_batch_size", "4", "--evaluation_strategy", "no", "--save_strategy", "steps"),
        *("--save_steps", "2", "--learning_rate", "2e-2", "--lr_scheduler_type", "cosine", "--logging_steps", "1"),
        *("--model_max_length", "512", "--gradient_checkpointing", "True", "--lazy_preprocess", "True"),
        *("--report_to", "none", "--use_cpu", "True", *more),
    ]


def history(output: Path) -> list[dict]:
    return [e for e in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in e]


def test_the_one_flag_on_their_train(their_train, toys, tmp_path):
    """Crops, text alone, captions: the loss falls; what is saved opens by their loader's names and answers."""
    original_train.train(command(toys, tmp_path / "m", "--fwd2bot", "4", "--num_train_epochs", "12"))
    log = history(tmp_path / "m")
    assert log[-1]["answer_loss"] < 0.8 * log[0]["answer_loss"] and "contrastive_loss" in log[0]
    settings = read_checkpoint(tmp_path / "m")
    assert settings["base"]["fingerprint"]["class"] == "LlavaQwenForCausalLM"
    tokenizer, model, processor, _ = load_pretrained_model(
        tmp_path / "m", None, "llava_qwen", device_map="cpu", attn_implementation="eager", multimodal=True
    )
    assert model.trained_projector() is not None  # mm_mlp_adapter among the parts that train
    crops = torch.randn(3, 3, 32, 32)
    ids = torch.tensor([[5, -200, 7, 8]])
    given = {"images": [crops], "image_sizes": [(20, 60)], "modalities": ["image"], "max_new_tokens": 3}
    assert model.generate(ids, **given, do_sample=False).shape[0] == 1
    assert model.compress(images=[crops], image_sizes=[(20, 60)]).shape == (1, 4, 64)
    with pytest.raises(OSError):  # the stock loader must not merge one adapter without a word
        llava.LlavaQwenForCausalLM.from_pretrained(tmp_path / "m")


def test_a_video_is_compressed_as_one(toys):
    """Frames of one video become k tokens, as the crops of one image do."""
    from llava_fwd2bot import Fwd2BotConfig
    from llava_fwd2bot.hosts import host_class, install

    video = {"mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2, "mm_newline_position": "one_token"}
    base = original_base(toys["tower"], family="LlavaQwen", mm_patch_merge_type="spatial_unpad", **video)
    model = install(base, host_class("LlavaQwenForCausalLM"), Fwd2BotConfig(num_summary_tokens=4), [5], [6])
    frames = torch.randn(6, 3, 32, 32).to(next(base.parameters()).dtype)
    still = frames[:1]
    given = {"images": [frames, still], "image_sizes": [(32, 32)] * 2, "modalities": ["video", "image"]}
    assert [len(v) for v in model._dense_tokens(**given)] == [6 * 4 + 1, 16 + 1]
    assert model.compress(**given).shape == (2, 4, 64)


def test_another_record_in_its_place_gets_no_caption(toys):
    """Its data set answers an unreadable image with the next record, silently: the caption would be of the other."""
    from transformers import AutoTokenizer

    class Data:
        list_data_dict = json.loads(toys["data"].read_text())

        def __len__(self):
            return len(self.list_data_dict)

        def __getitem__(self, i):
            shown = i + 1 if i == 0 else i
            return {"input_ids": torch.tensor([1]), "labels": torch.tensor([1]), "id": self.list_data_dict[shown]["id"]}

    tokenizer = AutoTokenizer.from_pretrained(toys["base"])
    data = original_train.WithCaptions(Data(), None, tokenizer, image_folder=str(toys["images"]))
    assert "caption_ids" not in data[0] and "caption_ids" in data[1]


def test_several_images_in_a_record(their_train, toys, tmp_path):
    """Interleaved data: `image` is a list; its caption is of the first."""
    records = json.loads(toys["data"].read_text())[:4]
    for record in records[:2]:
        record["image"] = [record["image"], "1.png"]
        record["conversations"][0]["value"] = "<image>\n<image>\nwhat colour ?"
    (tmp_path / "several.json").write_text(json.dumps(records))
    more = ("--data_path", str(tmp_path / "several.json"), "--fwd2bot", "4", "--num_train_epochs", "1")
    original_train.train(command(toys, tmp_path / "m", *more))
    assert "contrastive_loss" in history(tmp_path / "m")[0]


def test_a_plain_model_goes_to_their_loader_as_it_came(toys, monkeypatch):
    """Their arguments differ from LLaVA's by place; one too many would end in their pdb.set_trace()."""
    from llava.model import builder

    seen, loaded = {}, (None, torch.nn.Identity(), None, 2048)

    def load(*args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        return loaded

    monkeypatch.setattr(builder, "load_pretrained_model", load)
    given = {"device_map": "cpu", "overwrite_config": {"a": 1}}
    assert load_pretrained_model(toys["base"], None, "llava_qwen", **given) is loaded
    assert seen == {
        "args": (toys["base"], None, "llava_qwen"),
        "kwargs": {"device_map": "cpu", "overwrite_config": {"a": 1}},
    }


def test_full_fine_tuning_leaves_the_tower(their_train, toys, tmp_path):
    """The tower hangs in the language model, and its forward keeps gradients here."""
    argv = command(toys, tmp_path / "m", "--fwd2bot", "4", "--num_train_epochs", "1", "--lora_enable", "False")
    original_train.train(argv)
    before = llava.LlavaQwenForCausalLM.from_pretrained(toys["base"])
    before.get_vision_tower().load_model()
    _, after, _, _ = load_pretrained_model(tmp_path / "m", None, "llava_qwen", device_map="cpu")
    tower = after.get_vision_tower().state_dict()
    for name, value in before.get_vision_tower().state_dict().items():
        torch.testing.assert_close(tower[name].float(), value, atol=1e-4, rtol=1e-3)  # their train() makes it float16
    layers = before.model.layers.state_dict()
    assert not any(torch.equal(v, layers[n]) for n, v in after.model.layers.state_dict().items() if "proj.weight" in n)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--pretrain_mm_mlp_adapter", "x.bin"), "a whole LLaVA"),
        (("--trainer_mode", "zo"), "no gradients"),
        (("--mm_tunable_parts", "mm_vision_tower,mm_mlp_adapter,mm_language_model"), "vision tower"),
        (("--mm_tunable_parts", "mm_mlp_adapter"), "first stage"),
    ],
)
def test_what_does_not_go_with_the_flag(their_train, toys, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        original_train.train(command(toys, tmp_path / "m", "--fwd2bot", "4", *more))


@pytest.mark.skipif(not os.environ.get("LLAVA_NEXT_CHECKOUT"), reason="LLAVA_NEXT_CHECKOUT names no checkout")
def test_the_patch(their_train, toys, tmp_path):
    """`git apply`, then their train() with --fwd2bot, then their load_pretrained_model()."""
    checkout = tmp_path / "LLaVA-NeXT"
    for part in ("llava", "trl"):
        shutil.copytree(Path(os.environ["LLAVA_NEXT_CHECKOUT"]) / part, checkout / part)
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    done = subprocess.run(["bash", str(PATCHES / "apply.sh"), str(checkout)], capture_output=True, text=True)
    assert done.stdout.startswith("llava-next-df17966.patch fits"), done.stderr
    places = [str(checkout), str(PATCHES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "HF_HUB_OFFLINE": "1"}

    def run(code: str, *argv: str) -> str:
        command = [sys.executable, "-c", code, *argv]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    argv = command(toys, tmp_path / "llava-qwen-fwd2bot", "--fwd2bot", "4", "--num_train_epochs", "1")
    run("from llava.train.train import train; train()", *argv)
    load = "from llava.model.builder import load_pretrained_model as f; import sys\n"
    load += "m = f(sys.argv[1], None, 'llava_qwen', device_map='cpu', attn_implementation='eager')[1]\n"
    said = run(load + "print(m.fwd2bot_config.num_summary_tokens)", str(tmp_path / "llava-qwen-fwd2bot"))
    assert said.strip().endswith("4")
