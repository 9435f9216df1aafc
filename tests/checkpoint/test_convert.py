"""One model in two layouts: the original LLaVA's and transformers'."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "llava.model", reason="the original LLaVA is not installed: pip install --no-deps llava-torch==1.2.2.post1"
)

from conftest import settings  # noqa: E402
from original_toys import DENSE, IMAGE, SIDE, clip_tower, original_base, shaken  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from llava_fwd2bot.cli.main import main  # noqa: E402
from llava_fwd2bot.hosts import host_class, install  # noqa: E402
from llava_fwd2bot.hosts.opening import open_checkpoint  # noqa: E402

PLACEHOLDER = 127  # transformers' image token, within the toy's vocabulary


def twin(original: torch.nn.Module) -> torch.nn.Module:
    """The same weights in transformers' layout."""
    own = original.config
    text = {
        name: getattr(own, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    }
    text |= {name: getattr(own, name) for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**original.get_vision_tower().vision_tower.config.to_dict()),
        text_config=LlamaConfig(**text),
        image_token_id=PLACEHOLDER,
        image_seq_length=DENSE,
    )
    model = LlavaForConditionalGeneration(config)
    state = {}
    for name, tensor in original.state_dict().items():
        name = name.replace("model.vision_tower.vision_tower.", "model.vision_tower.")
        for theirs, ours in (("0", "linear_1"), ("2", "linear_2")):
            name = name.replace(f"model.mm_projector.{theirs}.", f"model.multi_modal_projector.{ours}.")
        if name.startswith("model.") and not name.startswith(("model.vision_tower", "model.multi_modal")):
            name = "model.language_model." + name.removeprefix("model.")
        state[name] = tensor
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture
def both(tmp_path):
    """Folders of the two bases, and a Fwd2Bot checkpoint with a trained projector on the original."""
    original = original_base(clip_tower(tmp_path / "clip"), torch.float32)
    twin(original).save_pretrained(tmp_path / "hf")
    original.save_pretrained(tmp_path / "llava-original")
    base = type(original).from_pretrained(tmp_path / "llava-original")
    base.get_vision_tower().load_model()
    model = shaken(install(base, host_class("LlavaLlamaForCausalLM"), settings(), [5, 6], [7, 8], train_projector=True))
    with torch.no_grad():
        for parameter in model.trained_projector().parameters():
            parameter.mul_(1.5)
    model.eval().save_pretrained(tmp_path / "m")
    return tmp_path


def test_same_weights_same_summaries_losses_and_gradients(both, capsys):
    """The two hosts are one method: whatever is trained in one layout answers the same in the other."""
    command = ["convert", str(both / "m"), "--base", str(both / "hf"), "--output", str(both / "m-hf")]
    assert main(command) == 0
    one, other = open_checkpoint(both / "m"), open_checkpoint(both / "m-hf")
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.compress(images=pixels), other.compress(pixels), rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [1, 9, IMAGE, 4, 8]])
    labels = ids.masked_fill(ids == IMAGE, -100)
    captions = {"caption_input_ids": torch.tensor([[3, 4], [5, 6]])}
    long = [
        torch.cat([torch.tensor([PLACEHOLDER] * DENSE if t == IMAGE else [t]) for t in row.tolist()]) for row in ids
    ]
    long_labels = [row.masked_fill(row == PLACEHOLDER, -100) for row in long]
    theirs = one(input_ids=ids, labels=labels, images=pixels, **captions)
    ours = other(input_ids=torch.stack(long), labels=torch.stack(long_labels), pixel_values=pixels, **captions)
    for name in ("answer_loss", "contrastive_loss"):
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-5)
    theirs.loss.backward(), ours.loss.backward()
    for stage in ("compress", "answer"):
        expected = {name: p.grad for name, p in one._stages.tensors(stage).items()}
        found = {name: p.grad for name, p in other._stages.tensors(stage).items()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_there_and_back_is_the_same_checkpoint(both):
    for source, base, output in (("m", "hf", "m-hf"), ("m-hf", "llava-original", "m-back")):
        assert main(["convert", str(both / source), "--base", str(both / base), "--output", str(both / output)]) == 0
    for name in ("fwd2bot.safetensors", "compress/adapter_model.safetensors", "answer/adapter_model.safetensors"):
        assert (both / "m" / name).read_bytes() == (both / "m-back" / name).read_bytes()


def test_another_model_is_refused(both, capsys):
    torch.manual_seed(5)
    other = original_base(both / "clip", torch.float32)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.3)
    twin(other).save_pretrained(both / "other")
    assert main(["convert", str(both / "m"), "--base", str(both / "other"), "--output", str(both / "x")]) == 1
    assert "its language model differs" in capsys.readouterr().err
    assert not (both / "x").exists()
    assert main(["convert", str(both / "m"), "--base", str(both / "llava-original"), "--output", str(both / "x")]) == 1
    assert "in the layout of LlavaLlamaForCausalLM already" in capsys.readouterr().err
