"""Data as people have it: messages, parquet, folders of datasets; one set of rows, and clear words for all else."""

import json

import pytest
import torch
from data_fixtures import learnt, num_images_ids, talk
from data_toys import llava
from train_toys import command, history

from llava_fwd2bot.training.command import train
from llava_fwd2bot.training.data import LlavaDataset
from llava_fwd2bot.training.packed import PackedRows
from llava_fwd2bot.training.records import Row

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "what is in the picture?"}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in ("input_ids", "labels", "pixel_values", "caption_ids"):
            assert name not in a or torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ([IMAGE, TEXT], ["a.png"]),
        ([{**IMAGE, "image": "a.png"}, TEXT], None),
        ([{**IMAGE, "path": "a.png"}, TEXT], ["a.png"]),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT], None),
        (f"<image>\n{TEXT['text']}", ["a.png"]),
        (TEXT["text"], ["a.png"]),  # TRL's: the images come first
    ],
)
def test_messages_are_conversations(make, content, images):
    """OpenAI's and TRL's records give the ids, labels and pixels that LLaVA's give."""
    record = {"messages": [{"role": "user", "content": content}, ANSWER], **({"images": images} if images else {})}
    plain = {"image": "a.png", "conversations": talk(f"<image>\n{TEXT['text']}", "a cat")}
    dataset, expected = make([record]), make([plain])
    same(dataset, expected)
    assert num_images_ids(dataset[0]) == 4 and learnt(dataset, dataset[0]).strip().startswith("a cat")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system", "content": "be kind"}, ANSWER], "message 0 is of role 'system'.*take it out"),
        ([{"role": "user", "content": [{"type": "video"}]}, ANSWER], "a part of type 'video'; known are"),
        ([{"role": "user", "content": 3}, ANSWER], "message 0: its content should be a text or a list"),
        ([{"role": "user"}, ANSWER], "message 0 should be"),
        ({"role": "user"}, "'messages' should be a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}], "is no file"),
        ([{"role": "user", "content": [{**IMAGE, "path": "b.png"}]}, ANSWER], "keep one"),
        ([{"role": "user", "content": "q"}], "end with gpt"),
    ],
)
def test_messages_that_cannot_be_read(make, messages, message):
    with pytest.raises(ValueError, match=f"record 0: ?.*{message}"):
        make([{"image": "a.png", "messages": messages}])


def test_an_unknown_layout_is_told_with_the_known_ones(make):
    """What was found, and which layouts there are."""
    with pytest.raises(
        ValueError, match="Its keys are 'question', 'answer'; what is read is 'conversations'.*'messages'"
    ):
        make([{"question": "q", "answer": "a"}])


def records(names=("a.png", "b.png")):
    one = {"id": "1", "image": names[0], "conversations": talk("<image>\nhow many dogs?", "two"), "caption": None}
    return [one, {"id": "2", "image": names[1], "conversations": [], "caption": "a cat"}]


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "split"])
def test_tables_are_read_as_json_is(folder, tmp_path, kind):
    """Names of files in a column; the rows of a table are those of the same records in JSON."""
    datasets = pytest.importorskip("datasets")
    (folder / "data.json").write_text(json.dumps(records()))
    rows = datasets.Dataset.from_list(records())
    path = tmp_path / ("x.parquet" if kind == "parquet" else "table")
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "folder":
        path.mkdir()
        rows.to_parquet(path / "train-0.parquet")
    else:
        (datasets.DatasetDict({"train": rows}) if kind == "split" else rows).save_to_disk(path)
    same(LlavaDataset(path, llava(), folder), LlavaDataset(folder / "data.json", llava(), folder))


def test_images_in_a_table(folder, tmp_path):
    """As on the hub: bytes in an `images` column, `messages` with typed parts; read at access, from any process."""
    datasets = pytest.importorskip("datasets")
    (folder / "data.json").write_text(json.dumps(records()[:1]))
    turns = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "how many dogs?"}]}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": "two"}]})
    bytes_of = {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}
    rows = datasets.Dataset.from_list([{"messages": turns, "images": [bytes_of]}])
    path = tmp_path / "x.parquet"
    rows.to_parquet(path)
    dataset = LlavaDataset(path, llava(), "/nowhere")
    dataset.check_files()  # there is no file to look for
    same(dataset, LlavaDataset(folder / "data.json", llava(), folder))
    (worked,) = torch.utils.data.DataLoader(dataset, num_workers=1, batch_size=1, collate_fn=list)
    assert torch.equal(worked[0]["pixel_values"], dataset[0]["pixel_values"])


def test_the_command_trains_on_a_folder_of_datasets(base_dir, llava_data, tmp_path):
    """The hash of a folder is that of its files: a changed one is another run."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(json.loads(llava_data["data"].read_text()))
    rows.save_to_disk(tmp_path / "table")
    data = {**llava_data, "data": tmp_path / "table"}
    output = train(command(base_dir, data, tmp_path / "m", "--max_steps", "1"))
    plain = train(command(base_dir, llava_data, tmp_path / "plain", "--max_steps", "1"))
    assert [e["loss"] for e in history(output)] == [e["loss"] for e in history(plain)]
    assert train(command(base_dir, data, tmp_path / "m", "--max_steps", "1")) == output  # nothing to do
    (tmp_path / "table" / "more").touch()
    with pytest.raises(ValueError, match="data_path table → table .its content changed."):
        train(command(base_dir, data, tmp_path / "m", "--max_steps", "1"))


def test_folders_that_are_no_data(tmp_path):
    """What the folder holds, and what could be named."""
    pytest.importorskip("datasets")
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ValueError, match="folder without parquet files.*it holds readme.txt.*Name a .json"):
        LlavaDataset(tmp_path, llava())


def test_packed_rows_are_the_rows():
    """Texts of any kind come back, and what is counted is what the rows hold."""
    rows = [
        Row("r 0", ["a.png"], [{"from": "human", "value": "é \ud83d \u2028 <image>"}], ["c", "d"]),
        Row("r 1", [], [{"from": "human", "value": "a b"}], []),
        Row("r 2", ["a.png"], [], ["e"]),
    ]
    packed = PackedRows(rows)
    assert list(packed) == rows and packed[-1] == rows[2] and len(packed) == 3
    assert packed.words.tolist() == [3, 2, 0] and packed.captions.tolist() == [2, 0, 1]
    assert packed.groups.tolist() == [0, 1, 0] and packed.distinct_images == 1
    with pytest.raises(IndexError):
        packed[3]
    assert list(PackedRows([])) == []
