"""The losses of an optimizer step do not depend on how its rows are spread over micro-batches."""

import json

import pytest
import torch
from conftest import captions, settings, shake, standard_batch, toy_base
from train_toys import command, history
from transformers import Trainer, TrainingArguments

from llava_fwd2bot import add_fwd2bot
from llava_fwd2bot.training.command import train


def micro_batches(model):
    """The rows of the standard batch one by one: 3, 3 and 5 labelled tokens, and captions for the first two."""
    whole, pairs = standard_batch(model, "right"), captions()
    images = [slice(0, 1), slice(1, 3), None]
    for i, at in enumerate(images):
        pixels = {} if at is None else {"pixel_values": whole["pixel_values"][at]}
        row = {k: v[i : i + 1] for k, v in {**whole, **pairs}.items() if k != "pixel_values"}
        yield {**row, **pixels}


def labelled(model, batch):
    return int(model.labelled_tokens(batch["labels"], batch["input_ids"], batch["attention_mask"]).sum())


def test_shares_add_up_to_the_step(model64):
    """Means of means weigh a token by the length of its row."""
    whole = standard_batch(model64, "right")
    rows = list(micro_batches(model64))
    tokens = labelled(model64, whole)
    assert len({labelled(model64, row) for row in rows}) > 1
    outs = [model64(**row, num_items_in_batch=torch.tensor(tokens), micro_batches=3) for row in rows]
    assert [int(out.answer_tokens) for out in outs] == [labelled(model64, row) for row in rows]
    answer = model64(**whole).answer_loss
    contrastive = sum(out.contrastive_loss or 0 for out in outs) / 3
    torch.testing.assert_close(sum(out.loss for out in outs), answer + contrastive, rtol=0, atol=1e-10)


def test_without_the_number_of_micro_batches_no_loss_counts_twice(model64):
    """transformers' own Trainer does not tell it: the contrastive losses are weighted by tokens, and sum to one."""
    batch = {**standard_batch(model64, "right"), **captions()}
    once = model64(**batch)
    tokens = 2 * labelled(model64, batch)
    twice = [model64(**batch, num_items_in_batch=tokens).loss for _ in range(2)]
    torch.testing.assert_close(sum(twice), once.answer_loss + once.contrastive_loss)
    alone = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    torch.testing.assert_close(model64(**alone, num_items_in_batch=0).loss, once.contrastive_loss)


def test_distillation_is_weighted_by_tokens_too(processor):
    model = shake(add_fwd2bot(toy_base(processor, torch.float64), settings(distill_weight=0.5), processor))
    whole, rows = standard_batch(model, "right"), list(micro_batches(model))
    for row in rows:
        row.pop("caption_input_ids")
    tokens = labelled(model, whole)
    shares = [model(**row, num_items_in_batch=tokens, micro_batches=3).loss for row in rows]
    torch.testing.assert_close(sum(shares), model(**whole).loss, rtol=0, atol=1e-10)


def uneven(llava_data):
    """Answers of one to twelve words, no captions."""
    data = json.loads(llava_data["data"].read_text())
    for i, record in enumerate(data):
        record.pop("caption")
        record["conversations"][1]["value"] = " ".join(["red"] * (i + 1))
    llava_data["data"].write_text(json.dumps(data))
    return llava_data


def test_accumulation_does_not_weigh_rows(base_dir, llava_data, tmp_path):
    """The training command: 4 rows in one batch and in 4 are one objective, as they are without --fwd2bot."""
    off = ["--fwd2bot_contrastive_weight", "0", "--max_steps", "3", "--max_grad_norm", "1e9"]
    runs = []
    for batch, steps in (("4", "1"), ("1", "4")):
        out = tmp_path / batch
        size = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps]
        train(command(base_dir, uneven(llava_data) if batch == "4" else llava_data, out, *off, *size))
        runs.append([(e["loss"], e["answer_loss"], e["grad_norm"]) for e in history(out)])
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-3) and one[0] == pytest.approx(one[1], abs=1e-3)


def test_accumulation_under_transformers_own_trainer(processor, tmp_path):
    """Drop-in: the stock Trainer passes num_items_in_batch to models that take it."""
    losses = []
    for rows, steps in ((3, 1), (1, 3)):
        torch.manual_seed(0)
        model = shake(add_fwd2bot(toy_base(processor), settings(), processor))

        def collate(items, model=model):
            picked = [list(micro_batches(model))[i] for i in items]
            pixels = [row["pixel_values"] for row in picked if "pixel_values" in row]
            batch = {k: torch.cat([row[k] for row in picked]) for k in ("input_ids", "attention_mask", "labels")}
            return {**batch, **({"pixel_values": torch.cat(pixels)} if pixels else {})}

        args = TrainingArguments(
            tmp_path / str(rows),
            max_steps=2,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            max_grad_norm=1e9,
            learning_rate=1e-4,
        )
        trainer = Trainer(model=model, args=args, data_collator=collate, train_dataset=[0, 1, 2])
        trainer.train()
        # transformers 5.4 has accelerate divide once more by the steps, for every model
        norm = steps if trainer.accelerator.gradient_accumulation_steps == steps else 1
        losses.append([(e["loss"], e["grad_norm"] * norm) for e in trainer.state.log_history if "loss" in e])
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
