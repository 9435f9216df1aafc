"""What is on disk: small, exact, refused where it does not fit, and never half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SIZE, settings, shake, standard_batch, toy_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from train_toys import command, history
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot, load_fwd2bot, register
from llava_fwd2bot.checkpoint.read import file_hash, read_checkpoint
from llava_fwd2bot.training.command import train

PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(on_disk, tmp_path):
    on_disk.save_pretrained(tmp_path / "fwd2bot")
    return tmp_path / "fwd2bot"


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def as_before(saved):
    """The checkpoint as it was written when temperature and gain were scalars."""
    tensors = load_file(saved / "fwd2bot.safetensors")
    tensors = {name: t[0] if t.shape == (1,) else t for name, t in tensors.items()}
    save_file(tensors, saved / "fwd2bot.safetensors")
    settings_file = saved / "fwd2bot_config.json"
    values = json.loads(settings_file.read_text())
    values["sha256"]["fwd2bot.safetensors"] = file_hash(saved / "fwd2bot.safetensors")
    settings_file.write_text(json.dumps(values))
    return {name for name, t in tensors.items() if t.dim() == 0}


@pytest.mark.parametrize("residual", ["average", "pool"])
def test_no_parameter_is_a_scalar_and_checkpoints_of_scalars_open(residual, base_dir, processor, tmp_path):
    """DeepSpeed and FSDP2 cannot split a tensor without dimensions."""
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    model = add_fwd2bot(base, settings(residual=residual, bridge="scale"), processor)
    assert all(p.dim() for p in model.parameters())
    with torch.no_grad():
        model.fwd2bot.logit_scale += 0.5
        model.fwd2bot.log_gain += 0.5
    model.save_pretrained(tmp_path / "m", processor=processor)
    assert as_before(tmp_path / "m") == {"logit_scale", "log_gain"}
    again, _ = load_fwd2bot(tmp_path / "m")
    for name, parameter in model.fwd2bot.named_parameters():
        assert torch.equal(dict(again.fwd2bot.named_parameters())[name], parameter)
    assert torch.equal(again.compress(PIXELS), model.eval().compress(PIXELS))


def test_a_run_that_was_begun_with_scalars_is_resumed(base_dir, llava_data, tmp_path):
    """The optimizer's state of temperature and gain has no dimension there."""
    argv = command(base_dir, llava_data, tmp_path / "m", "--max_steps", "2", "--save_strategy", "steps")
    argv += ["--save_steps", "1", "--fwd2bot_residual", "average"]
    train(argv)
    whole = history(tmp_path / "m")
    kept = tmp_path / "m" / "checkpoint-1"
    kept.rename(tmp_path / "checkpoint-1")
    shutil.rmtree(tmp_path / "m")
    (tmp_path / "m").mkdir()
    (tmp_path / "checkpoint-1").rename(kept)
    as_before(kept)
    optimizer = torch.load(kept / "optimizer.pt", weights_only=True)
    for state in optimizer["state"].values():
        state.update({n: v[0] for n, v in state.items() if v.shape == (1,)})
    torch.save(optimizer, kept / "optimizer.pt")
    train(argv)
    assert [(e["step"], e["loss"]) for e in history(tmp_path / "m")] == [(e["step"], e["loss"]) for e in whole]


def test_layout_is_that_of_the_design(saved):
    assert {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()} == {
        "README.md",
        "config.json",
        "fwd2bot_config.json",
        "fwd2bot.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "compress/adapter_config.json",
        "compress/adapter_model.safetensors",
        "answer/adapter_config.json",
        "answer/adapter_model.safetensors",
    }
    assert set(load_file(saved / "fwd2bot.safetensors")) == {"tokens", "logit_scale"}


def test_round_trip_is_exact(on_disk, saved):
    again, processor = load_fwd2bot(saved)
    assert not again.training and processor.tokenizer is not None
    assert torch.equal(again.compress(PIXELS), on_disk.compress(PIXELS))
    batch = standard_batch(on_disk)
    assert torch.equal(again(**batch).loss, on_disk(**batch).loss)
    assert again.fwd2bot_config == on_disk.fwd2bot_config
    assert torch.equal(again.fwd2bot.image_prompt_ids, on_disk.fwd2bot.image_prompt_ids)


def test_auto_classes_open_it(on_disk, saved, processor):
    """Opens wherever a LLaVA checkpoint does, with the base's processor or its own."""
    register()
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert torch.equal(model.compress(PIXELS), on_disk.compress(PIXELS))
    assert AutoProcessor.from_pretrained(saved).tokenizer.vocab_size == processor.tokenizer.vocab_size
    on_disk.save_pretrained(saved, processor=processor)
    assert AutoProcessor.from_pretrained(saved).image_processor.crop_size["height"] == SIZE
    assert AutoTokenizer.from_pretrained(saved).vocab_size == processor.tokenizer.vocab_size


def test_each_stage_is_an_ordinary_peft_adapter(on_disk, saved, base_dir):
    """Anyone with PEFT alone can load one, on the base."""
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    rows = torch.randn(1, 5, 64)
    peft = PeftModel.from_pretrained(base, str(saved / "compress")).model.model.language_model
    with on_disk._stages.use("compress"):
        expected = on_disk.model.language_model(inputs_embeds=rows).last_hidden_state
    torch.testing.assert_close(peft(inputs_embeds=rows).last_hidden_state, expected)


def test_the_trained_projector_travels(base_dir, processor, tmp_path):
    model = add_fwd2bot(
        LlavaForConditionalGeneration.from_pretrained(base_dir), settings(), processor, train_projector=True
    )
    with torch.no_grad():
        model.trained_projector().linear_2.weight.mul_(2)
    model.save_pretrained(tmp_path / "m")
    again, _ = load_fwd2bot(tmp_path / "m")
    assert torch.equal(again.compress(PIXELS), model.compress(PIXELS))
    with again.fwd2bot_disabled(), model.fwd2bot_disabled():
        a, b = (m.model.get_image_features(PIXELS).pooler_output[0] for m in (again, model))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["shared", "none"])
def test_other_adapter_layouts_round_trip(base_dir, processor, tmp_path, kind):
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    model = add_fwd2bot(base, settings(adapters=kind), processor).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    model.save_pretrained(tmp_path / "m")
    again, _ = load_fwd2bot(tmp_path / "m")
    assert torch.equal(again.compress(PIXELS), model.compress(PIXELS))
    assert (tmp_path / "m" / "base").is_dir() == (kind == "none")


def test_base_and_checkpoint_may_move_together_or_apart(on_disk, tmp_path, base_dir):
    (tmp_path / "a").mkdir()
    os.symlink(base_dir, tmp_path / "a" / "base")
    on_disk.config._name_or_path = on_disk.name_or_path = str(tmp_path / "a" / "base")
    on_disk.save_pretrained(tmp_path / "a" / "m")
    (tmp_path / "a").rename(tmp_path / "b")
    assert torch.equal(load_fwd2bot(tmp_path / "b" / "m")[0].compress(PIXELS), on_disk.compress(PIXELS))
    os.remove(tmp_path / "b" / "base")
    with pytest.raises(FileNotFoundError, match="Pass where it is now: base="):
        load_fwd2bot(tmp_path / "b" / "m")
    load_fwd2bot(tmp_path / "b" / "m", base=base_dir)


def test_another_base_is_refused_by_name_and_reason(saved, processor, tmp_path):
    """Same shapes, other weights: without the fingerprint it would load, and answer nonsense."""
    other = toy_base(processor, seed=7)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other is not the base of this checkpoint: the sizes agree, but the weights"):
        load_fwd2bot(saved, base=tmp_path / "other")
    other.resize_token_embeddings(other.config.text_config.vocab_size + 64)
    other.save_pretrained(tmp_path / "wide")
    processor.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="its vocabulary is"):
        load_fwd2bot(saved, base=tmp_path / "wide")


@pytest.mark.parametrize("part", ["model.vision_tower", "model.language_model.layers.1.mlp", "lm_head"])
def test_a_base_that_differs_in_one_part_is_refused(saved, processor, base_dir, tmp_path, part):
    other = LlavaForConditionalGeneration.from_pretrained(base_dir)
    with torch.no_grad():
        for p in other.get_submodule(part).parameters():
            p.add_(torch.randn_like(p) * 0.1)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the sizes agree, but the weights"):
        load_fwd2bot(saved, base=tmp_path / "other")


def test_a_base_in_half_precision_is_still_the_base(saved):
    model, _ = load_fwd2bot(saved, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.generate(torch.tensor([[1, 300, 301]]), max_new_tokens=2).shape[1] > 3


@pytest.mark.parametrize("name", ["fwd2bot.safetensors", "compress/adapter_model.safetensors"])
def test_a_changed_file_is_refused(saved, name):
    """A flipped byte in a weight is still a valid safetensors file: only the hash tells."""
    data = bytearray((saved / name).read_bytes())
    data[-3] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"is not the file that was saved \(its hash differs\)"):
        load_fwd2bot(saved)
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_fwd2bot(saved)


def test_broken_json_is_named(saved):
    path = saved / "fwd2bot_config.json"
    good = path.read_text()
    path.write_text(good[:100])
    with pytest.raises(ValueError, match="fwd2bot_config.json is not valid JSON"):
        load_fwd2bot(saved)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        load_fwd2bot(saved)
    values = json.loads(good)
    path.write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        load_fwd2bot(saved)
    path.write_text(json.dumps({**values, "fwd2bot": {**values["fwd2bot"], "num_summary_tokens": 0}}))
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        load_fwd2bot(saved)
    for changes in ({"image_prompt_ids": [10**6]}, {"text_prompt_ids": "abc"}, {"sha256": {}}, {"base": {}}):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(ValueError, match="is damaged"):
            load_fwd2bot(saved)
    del values["sha256"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is damaged"):
        load_fwd2bot(saved)


def test_settings_and_tensors_that_disagree_are_named(saved):
    """Tampering with k and the hash alike still cannot pass."""
    import hashlib

    save_file({"tokens": torch.zeros(9, 64), "logit_scale": torch.tensor(1.0)}, saved / "fwd2bot.safetensors")
    settings_path = saved / "fwd2bot_config.json"
    values = json.loads(settings_path.read_text())
    digest = hashlib.sha256((saved / "fwd2bot.safetensors").read_bytes()).hexdigest()
    values["sha256"]["fwd2bot.safetensors"] = digest
    settings_path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"tokens is \[9, 64\] there, \[4, 64\] here"):
        load_fwd2bot(saved)


def test_no_checkpoint_there(tmp_path, base_dir):
    for path in (tmp_path, base_dir, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="There is no Fwd2Bot checkpoint here"):
            load_fwd2bot(path)


@pytest.mark.parametrize("fails_at", ["safetensors", "json"])
def test_a_full_disk_leaves_the_old_checkpoint(on_disk, saved, monkeypatch, fails_at):
    """Everything is written beside first; an error names the folder, and nothing is left lying about."""
    before = files(saved)
    shake(on_disk, seed=9)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = "save_file" if fails_at == "safetensors" else "write_json"
    monkeypatch.setattr(f"llava_fwd2bot.checkpoint.write.{target}", full)
    with pytest.raises(OSError, match="No space left on device.*What was there before is unchanged"):
        on_disk.save_pretrained(saved)
    assert files(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_file_in_the_way_is_an_error(on_disk, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="could not be saved"):
            on_disk.save_pretrained(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_again_replaces_the_weights_and_keeps_what_else_is_there(on_disk, saved):
    (saved / "README.md").write_text("my card")
    (saved / "notes.txt").write_text("mine")
    shake(on_disk, seed=9)
    on_disk.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "my card" and (saved / "notes.txt").exists()
    assert torch.equal(load_fwd2bot(saved)[0].compress(PIXELS), on_disk.compress(PIXELS))


def test_something_in_the_way_is_found_before_anything_moves(on_disk, saved):
    import shutil

    shutil.rmtree(saved / "compress")
    (saved / "compress").write_text("mine")
    before = files(saved)
    with pytest.raises(OSError, match="is in the way"):
        shake(on_disk, seed=9).save_pretrained(saved)
    assert files(saved) == before


def test_no_pickle(saved):
    assert not [p for p in saved.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_config_json_round_trip(tmp_path):
    config = Fwd2BotConfig(num_summary_tokens=8, nested_k=[4, 1, 8], bridge="scale")
    config.save(tmp_path / "c.json")
    assert Fwd2BotConfig.load(tmp_path / "c.json") == config
    assert read_checkpoint.__doc__
    with pytest.raises(ValueError, match="Unknown Fwd2Bot settings: tokens"):
        Fwd2BotConfig.from_dict({"tokens": 4})


def test_others_may_read_what_a_new_file_would_let_them(saved):
    """safetensors' files are their owner's alone: a checkpoint in a shared folder opened for nobody else."""
    plain = saved / "plain"
    plain.touch()
    mode = plain.stat().st_mode
    plain.unlink()
    assert all(file.stat().st_mode == mode for file in saved.rglob("*.safetensors"))
