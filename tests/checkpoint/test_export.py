"""`fwd2bot export`: each export is opened by its consumer, whose answers are ours, and others without the adapter."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from conftest import SIZE, settings, shake, toy_base
from host_toys import TOYS
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.checkpoint.export import export
from llava_fwd2bot.checkpoint.export_manifest import read_manifest
from llava_fwd2bot.checkpoint.export_template import pieces_of
from llava_fwd2bot.processing.conversation import V1_TEMPLATE, ConversationFormatter, prompt_ids

PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
NEW = {"max_new_tokens": 8, "do_sample": False}
QUESTIONS = ("What is this?", "Compare <image> with <image>.", "<image> and <image>\nand <image>: which?")


@pytest.fixture
def trained(on_disk, processor, tmp_path):
    """The model, and its checkpoint; a bridge, so that what a client must apply shows."""
    path = tmp_path / "m"
    on_disk.save_pretrained(path, processor=processor)
    return on_disk, path


@torch.no_grad()
def prompt_of(model, processor, question, images):
    """Ids, summaries, and the rows that the answer pass reads."""
    summary = model.compress(PIXELS[:images])
    ids = prompt_ids(processor, ConversationFormatter(processor).prompt(question, images))["input_ids"]
    rows, _ = model._answer_rows(model._collapse(ids, None, summary, None), ids, summary)
    return ids, summary, rows


def ours(model, ids, summary):
    return model.generate(input_ids=ids, summary=summary, **NEW)[:, ids.shape[1] :]


def test_merged_is_a_plain_causal_lm_with_our_answers(trained, processor, tmp_path, monkeypatch):
    """Any engine that takes embeddings serves it."""
    model, path = trained
    monkeypatch.setattr("llava_fwd2bot.checkpoint.export_merged.SHARD", "100KB")
    out = export(path, "merged", tmp_path / "out", stage="answer")
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(export(path, "merged", tmp_path / "base", stage="base"))
    for question, images in zip(QUESTIONS, (1, 2, 3), strict=True):
        ids, summary, rows = prompt_of(model, processor, question, images)
        expected = ours(model, ids, summary)
        assert torch.equal(plain.generate(inputs_embeds=rows, **NEW), expected)
        assert not torch.equal(base.generate(inputs_embeds=rows, **NEW), expected)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("what is this")["input_ids"] == processor.tokenizer("what is this")["input_ids"]
    # what an engine takes for weights is these alone
    assert {p.name for p in out.glob("*.safetensors")} == set(read_manifest(out)["files"])


def test_merged_compress_gives_our_summaries(trained, tmp_path):
    model, path = trained
    plain = AutoModelForCausalLM.from_pretrained(export(path, "merged", tmp_path / "out", stage="compress"))
    with torch.no_grad():
        dense = model._dense_tokens(pixel_values=PIXELS[:1])[0]
        prompt = model.get_input_embeddings()(model.fwd2bot.image_prompt_ids)
        rows = torch.cat([dense, prompt, model.fwd2bot.tokens])[None]
        hidden = plain.model(inputs_embeds=rows).last_hidden_state[:, -4:]
        torch.testing.assert_close(hidden, model.compress(PIXELS[:1]), rtol=1e-4, atol=1e-4)
        with safe_open(tmp_path / "out" / "fwd2bot" / "fwd2bot.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("tokens"), model.fwd2bot.tokens)


def test_a_checkpoint_trained_as_a_whole_is_merged_as_it_is(base_dir, processor, tmp_path):
    """There is no adapter, and the way out of the refusals must lead somewhere."""
    model = add_fwd2bot(LlavaForConditionalGeneration.from_pretrained(base_dir), settings(adapters="none"), processor)
    with torch.no_grad():
        for p in model._language_model().parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.eval().save_pretrained(tmp_path / "m", processor=processor)
    for to in ("vllm", "peft"):
        with pytest.raises(ValueError, match="trained as a whole.*Use --to merged --stage answer"):
            export(tmp_path / "m", to, tmp_path / "x")
    with pytest.raises(ValueError, match="there is no base in the checkpoint"):
        export(tmp_path / "m", "merged", tmp_path / "x", stage="base")
    assert not (tmp_path / "x").exists()
    plain = AutoModelForCausalLM.from_pretrained(export(tmp_path / "m", "merged", tmp_path / "out", stage="answer"))
    ids, summary, rows = prompt_of(model, processor, QUESTIONS[0], 1)
    assert torch.equal(plain.generate(inputs_embeds=rows, **NEW), ours(model, ids, summary))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_merged_of_other_hosts(name, processor, tmp_path, monkeypatch):
    """LLaVA-OneVision's language model is Qwen2, which may share its head with its word embeddings."""
    base = TOYS[name](torch.float32).base
    base.resize_token_embeddings(448)
    base.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = shake(
        add_fwd2bot(type(base).from_pretrained(tmp_path / "base"), settings(image_prompt="", text_prompt=""), processor)
    )
    model.eval().save_pretrained(tmp_path / "m", processor=processor)
    plain = AutoModelForCausalLM.from_pretrained(export(tmp_path / "m", "merged", tmp_path / "out", stage="answer"))
    rows = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(model._language_model()(inputs_embeds=rows).last_hidden_state)
        torch.testing.assert_close(plain(inputs_embeds=rows).logits, expected, rtol=1e-4, atol=1e-4)
    if name == "llava_onevision":
        assert type(plain).__name__ == "Qwen2ForCausalLM"
        with pytest.raises(ValueError, match="vLLM has no LoRA for LlavaOnevision.*use --to merged"):
            export(tmp_path / "m", "vllm", tmp_path / "x")
    else:
        assert read_manifest(export(tmp_path / "m", "vllm", tmp_path / "v"))["stages"] == ["answer"]
        with pytest.raises(
            ValueError, match="The compress pass runs in vLLM for LlavaForConditional.*this is Llava.*fwd2bot compress"
        ):
            export(tmp_path / "m", "vllm", tmp_path / "x", stage="compress")


def test_tied_words_stay_tied(processor, tmp_path):
    base = toy_base(processor)
    base.config.tie_word_embeddings = True
    base.config.text_config.tie_word_embeddings = True
    base.lm_head.weight = base.get_input_embeddings().weight
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    model = shake(add_fwd2bot(loaded, settings(), processor)).eval()
    model.save_pretrained(tmp_path / "m", processor=processor)
    plain = AutoModelForCausalLM.from_pretrained(export(tmp_path / "m", "merged", tmp_path / "out", stage="answer"))
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    ids, summary, rows = prompt_of(model, processor, QUESTIONS[0], 1)
    assert torch.equal(plain.generate(inputs_embeds=rows, **NEW), ours(model, ids, summary))


@torch.no_grad()
def test_peft_opens_it_on_the_plain_causal_lm(trained, processor, tmp_path):
    """From our checkpoint's own files PEFT would load nothing there, with a warning alone."""
    model, path = trained
    out = export(path, "peft", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(export(path, "merged", tmp_path / "base", stage="base"))
    ids, summary, rows = prompt_of(model, processor, QUESTIONS[1], 2)
    without = base.generate(inputs_embeds=rows, **NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft = PeftModel.from_pretrained(base, str(out / "answer"), adapter_name="answer")
        peft.load_adapter(str(out / "compress"), adapter_name="compress")
    assert torch.equal(peft.generate(inputs_embeds=rows, **NEW), ours(model, ids, summary))
    assert not torch.equal(without, ours(model, ids, summary))
    peft.set_adapter("compress")
    with model._stages.use("compress"):
        expected = model._language_model()(inputs_embeds=rows).last_hidden_state
    torch.testing.assert_close(peft.model.model(inputs_embeds=rows).last_hidden_state, expected)


def test_vllm_adapters_are_those_of_the_checkpoint_also_of_an_old_one(trained, tmp_path):
    """vLLM looks names up; those of earlier checkpoints are found by none of its modules."""
    from test_export_names import as_before

    _, path = trained
    as_before(path)
    out = export(path, "vllm", tmp_path / "out")
    for stage in ("answer", "compress"):
        tensors = load_file(out / stage / "adapter_model.safetensors")
        assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
        assert len(tensors) == 2 * 7 * 2
        config = json.loads((out / stage / "adapter_config.json").read_text())
        assert config["target_modules"][:2] == ["q_proj", "k_proj"] and config["r"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(
            LlavaForConditionalGeneration.from_pretrained(trained[0].name_or_path), str(out / "answer")
        )


def test_the_manifest_has_the_commands(trained, base_dir, tmp_path, run):
    code, text, _ = run("export", trained[1], "--to", "vllm", "--output", tmp_path / "out", "--json")
    assert code == 0
    told, out = json.loads(text), tmp_path / "out"
    assert read_manifest(out) == {name: value for name, value in told.items() if name != "output"}
    template = ("--chat-template", f"{out}/fwd2bot/vllm_template.jinja", "--chat-template-content-format", "openai")
    images = ("--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}')
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules")
    own = json.dumps({"architectures": ["Fwd2BotLlavaSummaries"], "fwd2bot": str(out)})
    pooling = ("--runner", "pooling", "--hf-overrides", own, "--limit-mm-per-prompt", '{"image": 1}')
    assert told["commands"] == {
        "answer": ["vllm", "serve", str(base_dir), *images, *lora, f"answer={out}/answer", *template],
        "compress": ["vllm", "serve", str(base_dir), *pooling, *lora, f"compress={out}/compress", *template],
    }
    assert told["k"] == 4 and told["bridge"] == "none" and told["base"]["fingerprint"]["hidden_size"] == 64
    code, text, _ = run("export", trained[1], "--to", "vllm", "--output", out, "--stage", "answer")  # written anew
    assert code == 0 and "to answer: vllm serve" in text and not (out / "compress").exists()
    assert "vllm serve" in (out / "README.md").read_text()


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (8, 8), (9, 16), (129, 256), (300, 320), (512, 512), (513, None)])
def test_the_rank_is_one_that_vllm_takes(base_dir, processor, tmp_path, rank, served):
    """It refuses others when it starts, minutes later."""
    base = LlavaForConditionalGeneration.from_pretrained(base_dir)
    add_fwd2bot(base, settings(lora_r=rank, lora_targets=["q_proj"]), processor).save_pretrained(tmp_path / "m")
    if served is None:
        with pytest.raises(
            ValueError, match="LoRA up to rank 512, and this one has 513: use --to merged --stage answer"
        ):
            export(tmp_path / "m", "vllm", tmp_path / "out")
    else:
        assert read_manifest(export(tmp_path / "m", "vllm", tmp_path / "out"))["max_lora_rank"] == served


def test_refusals_name_the_way_out(trained, tmp_path, run):
    _, path = trained
    with pytest.raises(ValueError, match="give --stage answer or --stage compress"):
        export(path, "merged", tmp_path / "x")
    code, _, err = run("export", path, "--to", "vllm", "--output", tmp_path / "x", "--stage", "base")
    assert code == 1 and "--stage must be one of compress, answer for --to vllm" in err
    assert run("export", path, "--to", "peft", "--output", tmp_path / "x", "--dtype", "float16")[0] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already, and is no export"):
        export(path, "peft", tmp_path / "mine")
    with pytest.raises(ValueError, match="is also CKPT"):
        export(path, "peft", path)
    values = json.loads((path / "fwd2bot_config.json").read_text())
    values["base"]["fingerprint"]["class"] = "LlavaLlamaForCausalLM"
    shutil.copytree(path, tmp_path / "o")
    (tmp_path / "o" / "fwd2bot_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="original LLaVA's layout.*`fwd2bot convert`"):
        export(tmp_path / "o", "vllm", tmp_path / "x")
    host = json.loads((path / "config.json").read_text())
    host["vision_config"]["model_type"] = "efficientnet_lite"
    (path / "config.json").write_text(json.dumps(host))
    with pytest.raises(ValueError, match="smol-llava's, which vLLM does not know: use --to merged"):
        export(path, "vllm", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    _, path = trained
    export(path, "vllm", tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    monkeypatch.setattr("llava_fwd2bot.checkpoint.export_adapters.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(path, "vllm", tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


@pytest.mark.parametrize("own", ["template", "v1", "bos"])
def test_the_template_gives_the_prompt_to_the_last_token(trained, processor, tmp_path, own, monkeypatch):
    """What an engine reads must be what training read."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers import AutoProcessor

    _, path = trained
    template = {"template": processor.chat_template, "v1": None, "bos": "{{ '<s>' }}" + V1_TEMPLATE}[own]
    monkeypatch.setattr(processor, "chat_template", template)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args: processor)
    out = export(path, "vllm", tmp_path / "out")
    about = read_manifest(out)["template"]
    # as transformers, and vLLM with it, set templates
    text = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        (out / "fwd2bot" / about["file"]).read_text()
    )
    formatter = ConversationFormatter(processor)
    for question, images in zip((*QUESTIONS, "Why {{ this }}?\n "), (1, 2, 3, 0), strict=True):
        prompt = formatter.prompt(question, images)
        pieces = pieces_of(prompt, processor.image_token, [{"type": "image"}] * images)
        assert text.render(messages=[{"role": "user", "content": pieces}], fwd2bot_prompt=True) == prompt
    # any other client, by the model's own conversation
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    written = text.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer(written, add_special_tokens=about["add_special_tokens"])["input_ids"]
    assert ids == prompt_ids(processor, formatter.prompt("What is this?"))["input_ids"][0].tolist()


def test_smol_llava_is_exported_as_a_plain_llama(tmp_path):
    """The one model whose answers can be read."""
    pytest.importorskip("gguf")
    pytest.importorskip("skimage")
    from PIL import Image
    from skimage.data import chelsea

    from llava_fwd2bot import load_fwd2bot
    from llava_fwd2bot.processing.images import prepare_pixels
    from llava_fwd2bot.smol import checkpoint_folder

    out = export(checkpoint_folder(), "merged", tmp_path / "out", stage="answer", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(out)
    model, processor = load_fwd2bot("smol-llava", dtype=torch.float32)
    summary = model.compress(**prepare_pixels(processor, model, [Image.fromarray(chelsea())]))
    ids = prompt_ids(processor, ConversationFormatter(processor).prompt("What animal is in the image?"))["input_ids"]
    rows, _ = model._answer_rows(model._collapse(ids, None, summary, None), ids, summary)
    expected = model.generate(input_ids=ids, summary=summary, **NEW)[:, ids.shape[1] :]
    found = plain.generate(inputs_embeds=rows, **NEW)
    assert torch.equal(found, expected) and "cat" in processor.decode(found[0])


def test_an_original_llava_is_exported_as_a_plain_llama_and_for_peft(tmp_path):
    """Its language model holds the vision tower, and its configuration is more than Llama's."""
    pytest.importorskip("llava.model", reason="the original LLaVA is not installed")
    from original_toys import clip_tower, on_disk, shaken

    from llava_fwd2bot.hosts import host_class, install

    base = on_disk(tmp_path / "llava-base", clip_tower(tmp_path / "clip"))
    host = host_class("LlavaLlamaForCausalLM")
    model = shaken(install(host.load_base(str(base)), host, settings(), [5, 6], [7, 8])).eval()
    model.save_pretrained(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(export(tmp_path / "m", "merged", tmp_path / "out", stage="answer"))
    assert type(plain).__name__ == "LlamaForCausalLM" and not hasattr(plain.config, "mm_vision_tower")
    rows = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(model.get_model()(inputs_embeds=rows).last_hidden_state)
        torch.testing.assert_close(plain(inputs_embeds=rows).logits, expected, rtol=1e-4, atol=1e-4)
    own = AutoModelForCausalLM.from_pretrained(export(tmp_path / "m", "merged", tmp_path / "base", stage="base"))
    with torch.no_grad():
        assert not torch.allclose(own(inputs_embeds=rows).logits, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            peft = PeftModel.from_pretrained(own, str(export(tmp_path / "m", "peft", tmp_path / "peft") / "answer"))
        torch.testing.assert_close(peft(inputs_embeds=rows).logits, expected, rtol=1e-4, atol=1e-4)
