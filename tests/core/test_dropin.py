"""Drop-in is proved, not claimed: code that was written for LLaVA, run unchanged."""

import warnings

import pytest
import torch
from conftest import SIZE, settings, shake, toy_base
from PIL import Image
from transformers import Trainer, TrainingArguments, pipeline

import llava_fwd2bot.hosts.opening
from llava_fwd2bot import add_fwd2bot, register, smol


def messages(answer=None):
    question = [{"type": "image"}, {"type": "text", "text": "what is in the picture?"}]
    turns = [{"role": "user", "content": question}]
    return turns + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


def picture(i=0):
    return Image.new("RGB", (SIZE, SIZE), (i * 40 % 255, 100, 200))


@pytest.mark.parametrize("from_disk", [False, True])
def test_pipeline_image_text_to_text(on_disk, processor, tmp_path, from_disk):
    on_disk.save_pretrained(tmp_path / "m", processor=processor)
    register()
    if from_disk:
        pipe = pipeline("image-text-to-text", model=str(tmp_path / "m"))
    else:
        pipe = pipeline("image-text-to-text", model=on_disk, processor=processor)
    turns = messages()
    turns[0]["content"][0]["image"] = picture()
    out = pipe(text=turns, max_new_tokens=4, do_sample=False, return_full_text=False)
    text = processor.apply_chat_template(messages(), add_generation_prompt=True)
    inputs = processor(text=text, images=picture(), return_tensors="pt")
    ids = on_disk.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert out[0]["generated_text"] == processor.tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("own_processor", [True, False])
def test_smol_llava_is_a_name_for_pipelines(on_disk, processor, tmp_path, monkeypatch, own_processor):
    """After register() the name opens the folder of this package, where transformers would ask the hub for 40 s."""
    on_disk.save_pretrained(tmp_path / "m", processor=processor if own_processor else None)
    for module in (smol.hub, llava_fwd2bot.hosts.opening):
        monkeypatch.setattr(module, "checkpoint_folder", lambda: tmp_path / "m")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kw: pytest.fail("the hub was asked"))
    register()
    register()  # once is enough, and twice does no harm
    pipe = pipeline("image-text-to-text", model="smol-llava")
    turns = messages()
    turns[0]["content"][0]["image"] = picture()
    out = pipe(text=turns, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    by_path = pipeline("image-text-to-text", model=str(tmp_path / "m"))
    assert out == by_path(text=turns, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]


def test_stock_trainer_trains_both_adapters(model, processor, tmp_path):
    """transformers' own Trainer with a user's own collator: no part of ours but the model."""

    def collate(items):
        texts = [processor.apply_chat_template(messages(t)) for t in items]
        batch = processor(text=texts, images=[picture(i) for i in range(len(items))], return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        labels[labels == model.config.image_token_id] = -100
        return {**batch, "labels": labels}

    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    args = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none"
    )
    Trainer(model=model, args=args, data_collator=collate, train_dataset=["red", "blue", "green", "two"]).train()
    unmoved = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert unmoved == ["fwd2bot.logit_scale"]  # no captions, so nothing for the temperature to learn
    assert (tmp_path / "checkpoint-2" / "fwd2bot_config.json").exists()


def test_trl_sft_trainer_with_its_own_vision_collator(processor, tmp_path):
    """TRL runs the backbone itself and applies the head to labelled places: the loss must be the one of our forward."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = shake(add_fwd2bot(toy_base(processor), settings(), processor))
    answers = ["red", "blue", "green", "two"]
    rows = [
        {"prompt": messages(), "completion": messages(a)[1:], "images": [picture(i)]} for i, a in enumerate(answers)
    ]
    data = datasets.Dataset.from_list(rows)
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        max_length=None,
        gradient_checkpointing=True,
        bf16=False,
        use_cpu=True,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            expected = model(**batch).loss
        trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(float(expected), rel=1e-4)
    moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved == set(before) - {"fwd2bot.logit_scale"}
    assert (tmp_path / "checkpoint-2" / "compress" / "adapter_model.safetensors").exists()
