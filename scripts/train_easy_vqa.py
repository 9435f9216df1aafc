"""From nothing to a table: a small LLaVA, fine-tuned with one extra flag, answering and searching from summaries alone.

    bash scripts/train_easy_vqa.sh          # everything under ./easy-vqa, report.json and report.html among it

`--tune` holds out the last 500 training pictures and reports on them: settings are not chosen on the test split.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from build_easy_vqa import build
from easy_vqa_data import Question, captions, load, write_llava_json
from PIL import Image
from report_page import Answered, print_table, write_html
from safetensors.torch import load_file

from llava_fwd2bot import load_fwd2bot
from llava_fwd2bot.cli.main import main as fwd2bot
from llava_fwd2bot.files.writing import write_json
from llava_fwd2bot.processing.conversation import ConversationFormatter
from llava_fwd2bot.training.command import train

K, NESTED = 4, (1, 2, 4)
BATCH = 256
SETTINGS = """--lora_r 16 --lora_alpha 32 --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_steps 20
--num_train_epochs 1.25 --per_device_train_batch_size 32
--logging_steps 10 --save_strategy no --report_to none --disable_tqdm True"""

ABOUT = {
    "title": "Fwd2Bot on easy-VQA",
    "intro": "A small LLaVA was trained on easy-VQA, then fine-tuned with <code>--fwd2bot 4</code>. Its language model "
    "compresses an image into summary tokens once; every answer below comes from those alone.",
    "note": "There are only 24 captions, so that a batch holds the same one several times: within the batch the "
    "contrastive loss cannot reach 0, nor the retrieval accuracy 1.",
    "heading": "Test images",
}


def fine_tune(base: Path, data: Path, images: Path, output: Path) -> list[dict[str, Any]]:
    """The command a user would type; gives its log."""
    shutil.rmtree(output, ignore_errors=True)
    command = ["--model_name_or_path", str(base), "--data_path", str(data), "--image_folder", str(images)]
    command += ["--output_dir", str(output), "--fwd2bot", str(K), "--fwd2bot_nested_k", ",".join(map(str, NESTED))]
    command += SETTINGS.split()
    print("fwd2bot train", *command, flush=True)
    train(command)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


@torch.inference_mode()
def answers(model: Any, processor: Any, questions: list[Question], given: dict[str, Any]) -> tuple[list[str], float]:
    """The greedy answer to each question, and questions per second. `given` picks the images' inputs by number."""
    prompt = ConversationFormatter(processor).prompt
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][1]))  # little padding
    found, start = [""] * len(questions), time.perf_counter()
    for at in range(0, len(order), BATCH):
        part = order[at : at + BATCH]
        inputs = given([questions[i][0] for i in part])
        texts = [prompt(questions[i][1]) for i in part]
        if "pixel_values" in inputs:  # the base needs a placeholder for every dense token; a summary stands for one
            n = model.config.image_seq_length
            texts = [text.replace("<image>", "<image>" * n) for text in texts]
        ids = processor.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=True)
        out = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            **inputs,
            max_new_tokens=3,
            do_sample=False,
        )
        new = processor.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(part, new, strict=True):
            found[i] = text.strip()
    return found, len(questions) / (time.perf_counter() - start)


def recall(scores: torch.Tensor, relevant: torch.Tensor) -> float:
    """R@1: how often the best-scored column of a row is relevant. Both [rows, columns]."""
    return relevant.gather(1, scores.argmax(1, keepdim=True)).float().mean().item()


@torch.inference_mode()
def retrieval(model: Any, processor: Any, vectors: dict[int, torch.Tensor], said: dict[int, str]) -> dict[str, float]:
    """R@1 both ways between the pictures and the distinct captions; several pictures may be right for one caption."""
    pictures, texts = [n for n in vectors if n in said], sorted(set(said.values()))
    ids = processor.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    text = model.embed_text(ids["input_ids"], ids["attention_mask"])
    scores = torch.stack([vectors[n] for n in pictures]) @ text.T  # [pictures, captions]
    relevant = torch.tensor([[said[n] == caption for caption in texts] for n in pictures])
    return {
        "image_to_text_r1": recall(scores, relevant),
        "text_to_image_r1": recall(scores.T, relevant.T),
        "images": len(pictures),
        "captions": len(texts),
    }


def run(work: Path, seed: int, tune: bool) -> dict[str, Any]:
    start, seconds = time.perf_counter(), {}

    def lap(name: str, since: float) -> None:
        seconds[name] = round(time.perf_counter() - since, 1)

    work.mkdir(parents=True, exist_ok=True)
    paths, questions = load("train")
    held_out = set(list(paths)[-500:]) if tune else set()
    test_paths, test_questions = (paths, questions) if tune else load("test")
    if tune:
        test_paths = {n: p for n, p in paths.items() if n in held_out}
        test_questions = [q for q in questions if q[0] in held_out]
        paths = {n: p for n, p in paths.items() if n not in held_out}
        questions = [q for q in questions if q[0] not in held_out]
    base = work / ("base-tune" if tune else "base")
    mark = time.perf_counter()
    if not (base / "recipe.json").exists():
        print("1. A small LLaVA, trained on easy-VQA", flush=True)
        build(base, paths, questions, seed)
    lap("base", mark)

    print("2. Fine-tuning it with one extra flag", flush=True)
    mark = time.perf_counter()
    write_llava_json(paths, questions, work / "train.json")
    log = fine_tune(base, work / "train.json", next(iter(paths.values())).parent, work / "fwd2bot")
    lap("fine_tune", mark)

    print("3. Compressing the test images", flush=True)
    mark = time.perf_counter()
    command = ["compress", "--model", str(work / "fwd2bot"), "--output", str(work / "test.safetensors"), "--overwrite"]
    command += ["--batch-size", "100", "--images", *map(str, test_paths.values())]
    if fwd2bot(command):
        raise SystemExit("fwd2bot compress failed; see above.")
    lap("compress", mark)

    print("4. Answering the test questions", flush=True)
    mark = time.perf_counter()
    model, processor = load_fwd2bot(work / "fwd2bot")
    stored = load_file(work / "test.safetensors")
    row = {n: i for i, n in enumerate(test_paths)}
    pictures = [Image.open(p).convert("RGB") for p in test_paths.values()]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    truth = [q[2] for q in test_questions]

    def right(found: list[str]) -> float:
        return sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)

    with model.fwd2bot_disabled():
        from_dense, rate = answers(
            model, processor, test_questions, lambda who: {"pixel_values": pixels[[row[n] for n in who]]}
        )
    accuracy, speed, said_by_k = {}, {"base": round(rate, 1)}, {}
    for k in NESTED:
        summary = stored["summary"][:, :k].float()
        said_by_k[k], rate = answers(
            model, processor, test_questions, lambda who, s=summary: {"summary": s[[row[n] for n in who]]}
        )
        accuracy[str(k)], speed[str(k)] = right(said_by_k[k]), round(rate, 1)
    lap("answer", mark)

    vectors = {n: stored["embedding"][i] for n, i in row.items()}
    report = {
        "base_accuracy": right(from_dense),
        "accuracy": accuracy,
        "retention": {k: value / right(from_dense) for k, value in accuracy.items()},
        "retrieval": retrieval(model, processor, vectors, captions(test_questions)),
        "bytes_per_image": {str(k): 2 * k * stored["summary"].shape[-1] for k in NESTED}
        | {"dense": 2 * model.config.image_seq_length * stored["summary"].shape[-1]},
        "questions_per_second": speed,
        "questions": len(truth),
        "split": "easy-VQA, held out of train" if tune else "easy-VQA, test",
        "seed": seed,
        "seconds": seconds,
        "wall_s": round(time.perf_counter() - start, 1),
    }
    write_json(work / "report.json", report)
    examples = []
    for image in list(test_paths)[:6]:
        asked = [i for i, q in enumerate(test_questions) if q[0] == image][:4]
        lines = [Answered(test_questions[i][1], truth[i], from_dense[i], said_by_k[K][i]) for i in asked]
        examples.append((test_paths[image], lines))
    write_html(work / "report.html", report, log, examples, ABOUT)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("easy-vqa"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="report on held-out training pictures")
    arguments = parser.parse_args()
    print_table(run(arguments.work, arguments.seed, arguments.tune))
    print(f"\n{arguments.work}/report.html has the loss curves and a few pictures with questions and answers.")


if __name__ == "__main__":
    sys.exit(main())
