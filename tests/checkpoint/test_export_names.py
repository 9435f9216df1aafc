"""Names in an adapter's file: PEFT and vLLM find every tensor under them, and older checkpoints still open.

Both pass over a tensor whose name they do not know, and answer as the base, without an error.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SIZE, settings, shake
from peft import PeftModel
from safetensors.torch import load_file, save_file
from train_toys import command, history
from transformers import LlavaForConditionalGeneration

from llava_fwd2bot import add_fwd2bot, load_fwd2bot
from llava_fwd2bot.checkpoint.adapter_names import placed, unplaced
from llava_fwd2bot.checkpoint.read import file_hash
from llava_fwd2bot.training.command import train

PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def as_before(checkpoint: Path) -> None:
    """The checkpoint as it was written when adapters were those of the language model alone."""
    file = checkpoint / "fwd2bot_config.json"
    values = json.loads(file.read_text())
    for adapter in ("compress", "answer"):
        path = checkpoint / adapter / "adapter_model.safetensors"
        tensors = {name.replace(".model.language_model.", "."): t for name, t in load_file(path).items()}
        assert all(name.startswith("base_model.model.layers.") for name in tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        values["sha256"][f"{adapter}/adapter_model.safetensors"] = file_hash(path)
        config = json.loads((path.parent / "adapter_config.json").read_text())
        config.update(target_modules=r"layers\.\d+\.(.*\.)?(q_proj|down_proj)", exclude_modules=None)
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    file.write_text(json.dumps(values))


@pytest.fixture
def saved(on_disk, processor, tmp_path):
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    return tmp_path / "m"


@torch.no_grad()
def test_peft_answers_as_the_model_does(on_disk, saved, base_dir):
    """The file of a stage, on the base as transformers opens it, is that stage."""
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    summary = on_disk.compress(PIXELS[:1])
    ids = torch.tensor([[1, 300, on_disk.config.image_token_id, 301, 302]])
    rows, _ = on_disk._answer_rows(on_disk._collapse(ids, None, summary, None), ids, summary)
    ours = on_disk.generate(input_ids=ids, summary=summary, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    before = base.generate(inputs_embeds=rows, max_new_tokens=8, do_sample=False)
    tower = base.model.get_image_features(PIXELS).pooler_output
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as PEFT tells of tensors that it did not find
        peft = PeftModel.from_pretrained(base, str(saved / "answer"))
    assert torch.equal(peft.generate(inputs_embeds=rows, max_new_tokens=8, do_sample=False), ours)
    assert not torch.equal(before, ours)
    assert not [name for name, _ in peft.named_parameters() if "vision_tower" in name and "lora" in name]
    assert torch.equal(peft.model.model.get_image_features(PIXELS).pooler_output[0], tower[0])


def test_targets_are_a_list(saved):
    """vLLM takes no pattern."""
    config = json.loads((saved / "answer" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_checkpoints_of_before_open_and_are_written_anew(on_disk, saved, tmp_path):
    """smol-llava's is one, and every checkpoint trained so far."""
    before = {p.relative_to(saved): p.read_bytes() for p in saved.rglob("*.safetensors")}
    as_before(saved)
    again, processor = load_fwd2bot(saved)
    assert torch.equal(again.compress(PIXELS), on_disk.compress(PIXELS))
    load_fwd2bot(saved, trainable=True)[0].save_pretrained(tmp_path / "new", processor=processor)
    assert {
        p.relative_to(tmp_path / "new"): p.read_bytes() for p in (tmp_path / "new").rglob("*.safetensors")
    } == before


def test_a_run_begun_with_the_names_of_before_is_resumed(base_dir, llava_data, tmp_path):
    """The trainer reads the adapters of its checkpoint by itself."""
    argv = command(base_dir, llava_data, tmp_path / "m", "--max_steps", "2", "--save_strategy", "steps")
    argv += ["--save_steps", "1", "--save_total_limit", "2"]
    train(argv)
    whole = history(tmp_path / "m")
    final = {p: load_file(tmp_path / "m" / p / "adapter_model.safetensors") for p in ("compress", "answer")}
    kept = tmp_path / "m" / "checkpoint-1"
    kept.rename(tmp_path / "checkpoint-1")
    shutil.rmtree(tmp_path / "m")
    (tmp_path / "m").mkdir()
    (tmp_path / "checkpoint-1").rename(kept)
    as_before(kept)
    train(argv)
    assert [(e["step"], e["loss"]) for e in history(tmp_path / "m")] == [(e["step"], e["loss"]) for e in whole]
    for part, tensors in final.items():
        torch.testing.assert_close(load_file(tmp_path / "m" / part / "adapter_model.safetensors"), tensors)


def test_names_there_and_back():
    name = "base_model.model.layers.3.self_attn.q_proj.lora_A.weight"
    for inside, stored in (
        ("", name),
        ("model", "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"),
        ("model.language_model", "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight"),
    ):
        assert placed(name, inside) == stored and unplaced(stored) == name


def vllm_module(name: str, renamed: dict[str, str]) -> str:
    """The module that vLLM (0.32) looks for, from a tensor's name: the rule, told anew.

    PEFT's prefix goes, then the beginning of the rest is renamed as a checkpoint's weights are, and what is left before
    `.lora_A.weight` is the module.
    """
    prefix = "base_model.model."
    inner = name.removeprefix(prefix) if name.startswith(prefix) else name
    for old, new in renamed.items():
        if inner.startswith(old):
            inner = new + inner.removeprefix(old)
            break
    assert inner.endswith((".lora_A.weight", ".lora_B.weight"))
    return inner.rsplit(".", 2)[0]


def test_vllm_finds_every_tensor(on_disk, saved):
    """vLLM has the language model of LLaVA at `language_model.model`; another name is passed over."""
    renamed = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    linear += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    modules = {f"language_model.model.layers.{n}.{name}" for n in range(2) for name in linear}
    for stage in ("compress", "answer"):
        names = load_file(saved / stage / "adapter_model.safetensors")
        assert {vllm_module(name, renamed) for name in names} == modules
    before = [name.replace(".model.language_model.", ".") for name in names]
    assert not {vllm_module(name, renamed) for name in before} & modules  # the rule tells the names of before apart


def test_peft_opens_the_adapter_of_an_original_llava(tmp_path):
    """The original hangs its blocks directly into `model`, and its vision tower as well."""
    pytest.importorskip("llava.model", reason="the original LLaVA is not installed")
    from original_toys import clip_tower, original_base, shaken

    from llava_fwd2bot.hosts import host_class, install

    base = original_base(clip_tower(tmp_path / "clip"), torch.float32)
    base.save_pretrained(tmp_path / "base")
    own = type(base).from_pretrained(tmp_path / "base")
    own.get_vision_tower().load_model()
    model = shaken(install(own, host_class("LlavaLlamaForCausalLM"), settings(), [5, 6], [7, 8])).eval()
    model.save_pretrained(tmp_path / "m")
    assert all(
        n.startswith("base_model.model.model.layers.")
        for n in load_file(tmp_path / "m/answer/adapter_model.safetensors")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft = PeftModel.from_pretrained(base, str(tmp_path / "m" / "answer"))
    assert not [name for name, _ in peft.named_parameters() if "vision_tower" in name and "lora" in name]
    rows = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_model()(inputs_embeds=rows).last_hidden_state
        torch.testing.assert_close(peft.model.get_model()(inputs_embeds=rows).last_hidden_state, expected)
        with peft.disable_adapter():
            assert not torch.allclose(peft.model.get_model()(inputs_embeds=rows).last_hidden_state, expected)


def test_peft_opens_each_stage_on_other_hosts(tmp_path):
    """LLaVA-OneVision's language model is Qwen's, its tower SigLIP's: both have layers of the targets' names."""
    from host_toys import TOYS

    for name in ("llava_next", "llava_onevision"):
        base = TOYS[name](torch.float32).base
        model = shake(add_fwd2bot(TOYS[name](torch.float32).base, settings(), None)).eval()
        model.save_pretrained(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            peft = PeftModel.from_pretrained(base, str(tmp_path / name / "compress"))
        rows = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), model._stages.use("compress"):
            expected = model._language_model()(inputs_embeds=rows).last_hidden_state
            found = peft.model.model.language_model(inputs_embeds=rows).last_hidden_state
        torch.testing.assert_close(found, expected)
