"""lmms-eval runs tasks on a Fwd2Bot checkpoint: found by its entry point, in batches, simple and chat, from a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install lmms-eval")

TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
task: toy_{kind}
test_split: test
output_type: generate_until
{doc_to}: !function utils.{kind}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
process_results: !function utils.results
metric_list:
  - metric: said
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(name).convert("RGB") for name in doc["images"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

simple = text

def chat(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": image} for image in visual(doc)]
    return [{"role": "user", "content": content + [{"type": "text", "text": doc["question"]}]}]

def results(doc, results):
    return {"said": float(bool(results[0]))}
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = []
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 40 + i), colour).save(tmp_path / f"{i}.png")
    for i in range(5):
        images = [str(tmp_path / f"{i % 3}.png")] if i < 4 else [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
        docs.append(
            {"images": images, "question": ("what is it?", "how many red dogs are there?")[i % 2], "answer": "x"}
        )
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "utils.py").write_text(UTILS)
    for kind, doc_to in (("simple", "doc_to_text"), ("chat", "doc_to_messages")):
        told = TASK.format(docs=folder / "docs.jsonl", kind=kind, doc_to=doc_to)
        if kind == "simple":
            told = told.replace("doc_to_text: !function utils.text\n", "")
        (folder / f"toy_{kind}.yaml").write_text(told)
    return folder


def evaluate(tasks, checkpoint, out, kind, *more: str) -> list[str]:
    """What was said, in the order of the documents."""
    args = ",".join([f"pretrained={checkpoint}", *more])
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_fwd2bot", "--model_args", args, "--device", "cpu"]
    command += ["--tasks", f"toy_{kind}", "--include_path", str(tasks), "--batch_size", "2", "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    if kind == "simple":
        command.append("--force_simple")
    done = subprocess.run([*command, "--output_path", str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = sorted(out.rglob(f"*samples_toy_{kind}.jsonl"))
    assert samples, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in samples[-1].read_text().splitlines()]
    said = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return [text if isinstance(text, str) else text[0] for text in said]


def test_a_task_from_end_to_end(tasks, checkpoint, tmp_path, run):
    """What lmms-eval gets is what `ask` says; also from the cache, where the image is compressed once."""
    found = evaluate(tasks, checkpoint, tmp_path / "a", "simple", "k=2", f"cache={tmp_path / 'cache'}")
    docs = [json.loads(line) for line in (tasks / "docs.jsonl").read_text().splitlines()]
    for doc, said in zip(docs, found, strict=True):
        ask = ["ask", "--model", checkpoint, "--image", *doc["images"], doc["question"], "--k", 2]
        answer = json.loads(run(*ask, "--max-new-tokens", 5, "--json", "--device", "cpu")[1])["answer"]
        assert answer == said
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    assert evaluate(tasks, checkpoint, tmp_path / "b", "chat", "k=2", f"cache={tmp_path / 'cache'}") == found


def test_the_base_by_the_same_wrapper(checkpoint, processor, tmp_path):
    """The figure that retention is measured against comes of the same code; likelihoods as of the model's loss."""
    import torch
    from lmms_eval.api.instance import Instance

    from llava_fwd2bot.evaluation.lmms_model import Fwd2BotSimple

    picture = Image.new("RGB", (40, 40), "red")
    model = Fwd2BotSimple(str(checkpoint), device="cpu", batch_size=4)
    base = Fwd2BotSimple(str(checkpoint), device="cpu", from_base=True)
    docs = {"t": {"test": {0: {"target": "a cat"}}}}
    requests = [("what is it?", {"max_new_tokens": 5, "until": []}, lambda doc: [picture], 0, "t", "test")]
    texts = {}
    for own in (model, base):
        own.task_dict = docs
        instances = [Instance("generate_until", args, 0, {"task": "t", "doc_id": 0, "repeats": 1}) for args in requests]
        texts[own] = own.generate_until(instances)[0]
    inputs = processor(text=base.formatter.prompt("what is it?"), images=picture, return_tensors="pt")
    with torch.no_grad(), base.model.fwd2bot_disabled():
        out = base.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert (
        texts[base]
        == processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    )
    asked = ("what is it?", lambda doc: doc["target"], lambda doc: [picture], 0, "t", "test")
    instance = Instance("loglikelihood", asked, 0, {"task": "t", "doc_id": 0, "repeats": 1})
    loss, greedy = model.loglikelihood([instance])[0]
    assert loss > 0 and greedy is False  # a loss: where there are choices, lmms-eval takes the least
    with pytest.raises(ValueError, match="likelihoods"):
        base.loglikelihood([instance])
    with pytest.raises(ValueError, match="does not know these --model_args: kk"):
        Fwd2BotSimple(str(checkpoint), kk=3)
    with pytest.raises(ValueError, match="k must be from 1"):
        Fwd2BotSimple(str(checkpoint), k=9, device="cpu")


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_a_batch_opens_its_own_pictures(kind):
    """All pictures of a task at once took 10 GB for POPE; order, like options and the cache's key are as before."""
    from llava_fwd2bot.evaluation import lmms_model

    opened, alive, batches, kept = [], [], [], []

    class Model({"simple": lmms_model.Fwd2BotSimple, "chat": lmms_model.Fwd2BotChat}[kind]):
        def __init__(self):  # no checkpoint: what is asked of it is held here
            self.batch_size, self._rank, self.task_dict = 4, 0, {"t": {"s": list(range(20))}}
            self.formatter = SimpleNamespace(prompt=lambda text, n: text, ask=lambda turns: turns[-1]["value"])
            self.cache_hook = SimpleNamespace(add_partial=lambda *told: kept.append(told))

        def _texts(self, rows):
            alive.extend(weakref.ref(image) for row in rows for image in row.images)
            batches.append((len(opened), sum(one() is not None for one in alive), {str(row.options) for row in rows}))
            return [f"said to {row.context}\nmore" for row in rows]

    def visual(doc):
        opened.append(doc)
        return [Image.new("RGB", (8, 8))]

    def messages(doc):
        return [{"role": "user", "content": [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": "?"}]}]

    requests = []
    for i in range(20):
        given = {"max_new_tokens": 5 + i % 2, "until": ["\n"]}
        call = (given, visual) if kind == "simple" else (messages, given)
        requests.append(SimpleNamespace(args=(f"{'very ' * (i % 3)}{i}", *call, i, "t", "s")))
    said = Model().generate_until(requests)
    assert said == [f"said to {request.args[0]}" for request in requests]
    assert [count for count, _, _ in batches] == [4, 8, 10, 14, 18, 20]
    assert all(living <= 2 * 4 and len(options) == 1 for _, living, options in batches)
    assert sorted(told[1][1]["max_new_tokens"] for told in kept) == [5] * 10 + [6] * 10
