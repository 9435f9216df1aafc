"""easy-VQA (PyPI `easy-vqa`, MIT), pictures of one shape and questions, in LLaVA's format; and a processor for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from easy_vqa import get_test_image_paths, get_test_questions, get_train_image_paths, get_train_questions
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZE, PATCH = 64, 8
TURNS = 3
SHAPES = ["circle", "rectangle", "triangle"]
COLORS = ["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"]
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
PROMPTS = "summarize the image in a few words. summarize the text in a few words."
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' }}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + '</s>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

Question = tuple[int, str, str]  # image, question, answer


def load(split: str) -> tuple[dict[int, Path], list[Question]]:
    """Paths of the pictures of a split by number, and its questions."""
    train = split == "train"
    paths = get_train_image_paths() if train else get_test_image_paths()
    questions, answers, images = get_train_questions() if train else get_test_questions()
    return {n: Path(paths[n]) for n in sorted(paths)}, list(zip(images, questions, answers, strict=True))


def attributes(questions: list[Question]) -> dict[int, dict[str, str]]:
    """Shape and colour of each picture, as far as its own questions and answers tell them."""
    found: dict[int, dict[str, str]] = {}
    for image, question, answer in questions:
        words = question.rstrip("?").split()
        negated = "not" in words or "no" in words
        if answer in ("yes", "no") and (answer == "yes") == negated:
            continue  # "is there a circle? no" tells only what it is not
        for word in [answer, *words]:
            for kind, names in (("shape", SHAPES), ("color", COLORS)):
                if word in names:
                    found.setdefault(image, {})[kind] = word
    return found


def captions(questions: list[Question]) -> dict[int, str]:
    """ "a blue circle", put together from the answers, for the pictures whose answers tell both."""
    known = attributes(questions)
    return {n: f"a {k['color']} {k['shape']}" for n, k in known.items() if len(k) == 2}


def write_llava_json(paths: dict[int, Path], questions: list[Question], output: Path) -> None:
    """LLaVA's conversations: a picture's questions, in any order, as turns of a few records; its caption.

    Few turns each: the answers of long conversations can be told from earlier turns, without the picture.
    """
    asked: dict[int, list[tuple[str, str]]] = {}
    for image, question, answer in questions:
        asked.setdefault(image, []).append((question, answer))
    caption, rng = captions(questions), random.Random(0)
    records = []
    for image, file in paths.items():
        rng.shuffle(asked[image])
        for start in range(0, len(asked[image]), TURNS):
            turns = []
            for question, answer in asked[image][start : start + TURNS]:
                turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
                turns.append({"from": "gpt", "value": answer})
            record = {"id": f"{image}-{start}", "image": file.name, "conversations": turns}
            records.append(record | ({"caption": caption[image]} if image in caption else {}))
    output.write_text(json.dumps(records), encoding="utf-8")


def build_processor() -> LlavaProcessor:
    """A word-level tokenizer over the training questions and the prompts; 64 × 64 pixels in patches of 8, so n = 64."""
    split = pre_tokenizers.Split(Regex(r"(?:user|assistant):|\w+|[^\w\s]"), "removed", invert=True)
    texts = {text for q in load("train")[1] for text in q[1:]} | {PROMPTS, "user: assistant: a"}
    words = sorted({w for text in texts for w, _ in split.pre_tokenize_str(text.lower())})
    vocabulary = SPECIALS + words
    vocabulary += [f"<extra_{i}>" for i in range(-len(vocabulary) % 64)]  # a multiple of 64, for quantisation
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), split
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words by spaces
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.75] * 3,  # the pictures are mostly white; measured better than CLIP's own numbers
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
