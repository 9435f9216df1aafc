"""Data sets on toy processors, and what the tests of data, conversations, images and batches share."""

from __future__ import annotations

import json

import data_toys
import pytest
from PIL import Image

from llava_fwd2bot.training.collator import IGNORE_INDEX
from llava_fwd2bot.training.data import LlavaDataset

PROCESSORS = {
    "v1-llama": data_toys.llava(),
    "v1-bytes": data_toys.llava(data_toys.byte_tokenizer()),
    "template-no-eos": data_toys.llava(chat_template=data_toys.TEMPLATE_WITHOUT_EOS),
    "template-eos": data_toys.llava(chat_template=data_toys.TEMPLATE_WITH_EOS),
    "template-eos-bytes": data_toys.llava(data_toys.byte_tokenizer(), data_toys.TEMPLATE_WITH_EOS),
    "next": data_toys.llava_next(),
}
LLAVA = PROCESSORS["v1-llama"]


def talk(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


TWO_ROUNDS = talk("<image>\nwhat is in the picture?", "a red cat", "how many dogs?", "two é dogs")


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 60), (200, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 30), (10, 200, 10)).save(tmp_path / "b.png")
    return tmp_path


@pytest.fixture
def make(folder):
    """make(records, captions=..., processor=..., **options) -> LlavaDataset on files in `folder`."""

    def build(records=None, captions=None, processor=LLAVA, **options):
        paths = []
        for name, content in (("data.json", records), ("captions.json", captions)):
            paths.append(None if content is None else folder / name)
            if content is not None:
                (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return LlavaDataset(paths[0], processor, folder, paths[1], **options)

    return build


def learnt(dataset, item) -> str:
    return dataset.tokenizer.decode(item["labels"][item["labels"] != IGNORE_INDEX])


def num_images_ids(item, processor=LLAVA) -> int:
    return int((item["input_ids"] == processor.image_token_id).sum())
