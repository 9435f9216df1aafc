"""smol-llava at work: photographs compressed once, answered and searched from their summaries alone, and the one flag.

    python scripts/smol_quickstart.py                    # photographs out of two packages
    python scripts/smol_quickstart.py --data DATA        # Flickr8k's: DATA/flickr8k/{train,dev}.jsonl and images/

Writes WORK/report.json and WORK/report.html.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from PIL import Image
from report_page import Answered, print_table, write_html
from safetensors.torch import load_file

from eval.metrics import yes_no
from llava_fwd2bot import answer, load_fwd2bot
from llava_fwd2bot.cli.main import main as fwd2bot
from llava_fwd2bot.evaluation.retrieval import ranks, recalls
from llava_fwd2bot.files.images import open_image
from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.text import read_json
from llava_fwd2bot.files.writing import write_json
from llava_fwd2bot.processing.generate import summaries_of
from llava_fwd2bot.smol import instructions as make
from llava_fwd2bot.training.command import train

K, NESTED = 16, (1, 2, 4, 8, 16)
SHORT, LONG = 6, 30  # tokens of an answer and of a description
MODEL = "smol-llava"
ABOUT = {
    "title": "Fwd2Bot quickstart",
    "intro": "<b>The base is small and often wrong</b>, with its dense tokens as well. smol-llava reads a photograph "
    "as 49 tokens. Its own language model compresses them into 16 summary tokens once. Answers marked "
    "<i>summary</i> come from those alone, by the model in the package; those marked <i>base</i> from all 49 tokens.",
    "note": "The table is of the model in the package. The curves, and the answers marked <i>fine-tuned</i>, are of a "
    "trial: the base trained again with <code>--fwd2bot 16</code>, for {steps} steps on {learnt}. It shows that "
    "training runs, not how good it gets. Descriptions end at the first full stop, or with … after {words} tokens.",
    "heading": "Photographs",
}


@dataclass
class Photo:
    path: Path
    captions: list[str]
    questions: list[tuple[str, str]]  # and the answers


def packaged(folder: Path) -> list[Photo]:
    """The photographs that come with scikit-image and scikit-learn, and what people said of them."""
    places = {"scikit-image": ("skimage", "data"), "scikit-learn": ("sklearn", "datasets/images")}
    found = []
    for name, entry in read_json(Path(__file__).with_name("quickstart_photos.json")).items():
        package, below = places[entry["from"]]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"The photographs come with {entry['from']}: pip install 'llava_fwd2bot[quickstart]'")
        Image.open(Path(spec.origin).parent / below / name).convert("RGB").save(folder / name)
        found.append(Photo(folder / name, entry["captions"], [tuple(q) for q in entry["questions"]]))
    return found


def flickr(data: Path, folder: Path, split: str, count: int) -> list[Photo]:
    """The first `count` of a split of Flickr8k; the questions are made POPE's way from the captions."""
    entries = read_records(data / "flickr8k" / f"{split}.jsonl")[:count]
    asked: dict[str, list[tuple[str, str]]] = {entry["image"]: [] for entry in entries}
    for question in make.pope_questions(entries, "random"):
        asked[question["image"]].append((question["question"], question["answer"]))
    found = []
    for entry in entries:
        path = folder / entry["image"]
        shutil.copyfile(data / "flickr8k" / "images" / entry["image"], path)
        found.append(Photo(path, [make.tidy(c) for c in entry["captions"]], asked[entry["image"]]))
    return found


def answer_all(
    opened: tuple[Any, Any], summary: torch.Tensor, asked: list[tuple[int, str]], k: int, words: int
) -> tuple[list[str], float]:
    """The answers to (image, question) pairs from summaries, [M, K, D], and how many a second."""
    start, states = time.perf_counter(), summary[[i for i, _ in asked]]
    found = answer(*opened, [q for _, q in asked], summary=states, k=k, max_new_tokens=words, batch_size=64)
    return found, round(len(asked) / (time.perf_counter() - start), 1)


def answer_by_base(opened: tuple[Any, Any], photos: list[Photo], asked: list[tuple[int, str]], words: int) -> list[str]:
    """The base's answers to (image, question) pairs, from all dense tokens."""
    return answer(*opened, [q for _, q in asked], [photos[i].path for i, _ in asked], base=True, max_new_tokens=words)


def one_sentence(text: str) -> str:
    """The text up to its first full stop; one that was cut off before that ends in "…"."""
    found = re.match(r".*?[.!?](?=\s|$)", text, re.DOTALL)
    return found[0] if found else f"{text} …"


def tuned_answers(
    folder: Path, photos: list[Photo], asked: list[tuple[int, str]], described: list[tuple[int, str]]
) -> tuple[list[str], list[str]]:
    """Answers and descriptions by the model that this run trained, from its own summaries."""
    opened = load_fwd2bot(folder)
    state = summaries_of(*opened, [open_image(photo.path) for photo in photos])  # [M, K, D]
    return answer_all(opened, state, asked, K, SHORT)[0], answer_all(opened, state, described, K, LONG)[0]


def fine_tune(photos: list[Photo], work: Path, steps: int) -> list[dict[str, Any]]:
    """The command that a user would type, on these photographs' captions and questions; gives its log."""
    records = [
        make.record(p.path.name, [*p.questions[:1], (make.DESCRIBE, caption)], caption=caption)
        for p in photos
        for caption in p.captions[:2]
    ]
    (work / "train.json").write_text(json.dumps(records), encoding="utf-8")
    shutil.rmtree(work / "fwd2bot", ignore_errors=True)
    command = f"""--model_name_or_path {MODEL} --data_path {work / "train.json"} --image_folder {photos[0].path.parent}
        --output_dir {work / "fwd2bot"} --fwd2bot {K} --fwd2bot_nested_k {",".join(map(str, NESTED))}
        --lora_r 12 --lora_alpha 24 --learning_rate 1e-3 --per_device_train_batch_size 8 --max_steps {steps}
        --logging_steps 1 --save_strategy no --report_to none --disable_tqdm True""".split()
    print("fwd2bot train", *command, flush=True)
    train(command)
    log = json.loads((work / "fwd2bot" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def run(work: Path, data: Path | None, count: int, steps: int) -> dict[str, Any]:
    start, seconds = time.perf_counter(), {}

    def lap(name: str, since: float) -> float:
        seconds[name] = round(time.perf_counter() - since, 1)
        return time.perf_counter()

    folder = work / "photos"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    photos = packaged(folder) if data is None else flickr(data, folder, "dev", count)
    mark = time.perf_counter()

    print(f"1. Compressing {len(photos)} photographs", flush=True)
    stored_at = work / "photos.safetensors"
    command = ["compress", "--model", MODEL, "--output", str(stored_at), "--overwrite", "--images"]
    if fwd2bot([*command, *(str(photo.path) for photo in photos)]):
        raise SystemExit("fwd2bot compress failed; see above.")
    mark = lap("compress", mark)

    print("2. Answering from the summaries", flush=True)
    opened = model, processor = load_fwd2bot(MODEL)
    stored = load_file(stored_at)
    summary = stored["summary"].to(model.dtype)
    asked = [(i, q) for i, photo in enumerate(photos) for q, _ in photo.questions]
    truth = [a for photo in photos for _, a in photo.questions]
    described = [(i, make.DESCRIBE) for i in range(len(photos))]
    from_dense = answer_by_base(opened, photos, asked, SHORT)
    dense_words = answer_by_base(opened, photos, described, LONG)
    accuracy, speed, answers = {}, {}, {}
    for k in NESTED:
        answers[k], speed[str(k)] = answer_all(opened, summary, asked, k, SHORT)
        accuracy[str(k)] = yes_no(answers[k], truth)["accuracy"]
    summary_words, _ = answer_all(opened, summary, described, K, LONG)
    base_accuracy = yes_no(from_dense, truth)["accuracy"]
    mark = lap("answer", mark)

    print("3. Searching among them", flush=True)
    captions = [caption for photo in photos for caption in photo.captions]
    owner = torch.tensor([i for i, photo in enumerate(photos) for _ in photo.captions])
    ids = processor.tokenizer(captions, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        vectors = model.embed_text(ids["input_ids"], ids["attention_mask"])
    found = recalls(*ranks(stored["embedding"].float(), vectors, owner), (1,))
    mark = lap("search", mark)

    print("4. Fine-tuning from the base with one extra flag", flush=True)
    learnt = photos
    if data is not None:
        (work / "train").mkdir(exist_ok=True)
        learnt = flickr(data, work / "train", "train", 400)
    log = fine_tune(learnt, work, steps)
    tuned, tuned_words = tuned_answers(work / "fwd2bot", photos, asked, described)
    lap("fine_tune", mark)

    size = summary.shape[-1]
    report = {
        "base_accuracy": base_accuracy,
        "accuracy": accuracy,
        "retention": {k: value / max(base_accuracy, 1e-9) for k, value in accuracy.items()},
        "retrieval": {
            "image_to_text_r1": found["i2t_r1"],
            "text_to_image_r1": found["t2i_r1"],
            "images": len(photos),
            "captions": len(captions),
        },
        "bytes_per_image": {str(k): 2 * k * size for k in NESTED} | {"dense": 2 * model.config.image_seq_length * size},
        "questions_per_second": speed,
        "questions": len(truth),
        "split": "photographs of scikit-image and scikit-learn" if data is None else "Flickr8k dev",
        "seed": 0,
        "seconds": seconds,
        "wall_s": round(time.perf_counter() - start, 1),
    }
    examples = []
    for i, photo in enumerate(photos[:8]):
        own = [n for n, (image, _) in enumerate(asked) if image == i][:3]
        words = (dense_words[i], summary_words[i], tuned_words[i])
        lines = [Answered(make.DESCRIBE, "", *map(one_sentence, words))]
        for n in own:
            given = (text.strip().lower() for text in (from_dense[n], answers[K][n], tuned[n]))
            lines.append(Answered(asked[n][1], truth[n], *given))
        examples.append((photo.path, lines))
    shown = {path.name: [asdict(line) | {"differs": line.differs} for line in lines] for path, lines in examples}
    write_json(work / "report.json", report | {"answers": shown})
    of = "these photographs" if data is None else "other photographs"
    note = ABOUT["note"].format(steps=steps, learnt=of, words=LONG)
    write_html(work / "report.html", report, log, examples, ABOUT | {"note": note})
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("quickstart"), help="the folder for all that is written")
    parser.add_argument("--data", type=Path, help="the folder that holds flickr8k/")
    parser.add_argument("--count", type=int, default=100, help="how many of Flickr8k's photographs")
    parser.add_argument("--steps", type=int, default=15, help="steps of the fine-tune")
    arguments = parser.parse_args()
    print_table(run(arguments.work, arguments.data, arguments.count, arguments.steps))
    print(f"\n{arguments.work}/report.html has the photographs with their answers, and the loss curves.")


if __name__ == "__main__":
    sys.exit(main())
