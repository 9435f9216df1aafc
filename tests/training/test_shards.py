"""WebDataset's shards: the rows of the same records in JSON, read in any order, and clear words for broken shards."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import tracemalloc
from collections import Counter

import pytest
import torch
from data_fixtures import TWO_ROUNDS, talk
from data_toys import llava
from train_toys import command, history

from llava_fwd2bot.cache.sources import Source
from llava_fwd2bot.files.images import ImageError
from llava_fwd2bot.files.tar import members
from llava_fwd2bot.training.command import train
from llava_fwd2bot.training.data import LlavaDataset
from llava_fwd2bot.training.shards import Shards, _samples, shard_paths

RECORDS = [
    {"image": "a.png", "conversations": TWO_ROUNDS},
    {"image": "b.png", "conversations": talk("<image>\nhow many dogs?", "two")},
    {"conversations": talk("how many dogs?", "two")},
    {"image": "a.png", "caption": "a red cat"},
]


@pytest.fixture
def pack(folder):
    """pack(name, {member: bytes, text or record}) -> a tar file in `folder`; "a.png" as content is that file."""

    def build(name, content, form=tarfile.USTAR_FORMAT, links=()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=form) as archive:
            for member, value in content.items():
                if value in ("a.png", "b.png"):
                    value = (folder / value).read_bytes()
                data = value if isinstance(value, bytes) else value if isinstance(value, str) else json.dumps(value)
                data = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            for member, kind in links:
                info = tarfile.TarInfo(member)
                info.type, info.linkname = kind, next(iter(content))
                archive.addfile(info)
        return path

    return build


@pytest.fixture
def shards(pack):
    """RECORDS in two shards, in a folder."""
    first = {"0.json": RECORDS[0], "0.png": "a.png", "1.png": "b.png", "1.json": RECORDS[1]}
    pack("shards/000.tar", first)
    return pack("shards/001.tar", {"0.json": RECORDS[2], "x/1.png": "a.png", "x/1.txt": "a red cat\n"}).parent


def same(one, other):
    assert len(one) == len(other) == len(RECORDS)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in ("input_ids", "labels", "pixel_values", "caption_ids"):
            assert name not in a or torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("pattern", ["shards", "shards/*.tar", "shards/{000..001}.tar", "shards/00{0,1}.tar"])
def test_shards_are_read_as_json_is(make, folder, shards, pattern):
    """Every way to name them gives the ids, labels, pixels and lengths of the records with files beside them."""
    dataset, plain = LlavaDataset(folder / pattern, llava(), "/nowhere"), make(RECORDS)
    dataset.check_files()  # there is no file to look for
    same(dataset, plain)
    assert dataset.modality_lengths == plain.modality_lengths and dataset.num_captioned == 1
    assert torch.equal(dataset[1]["pixel_values"], plain[1]["pixel_values"])  # in any order
    assert dataset[0]["record"] == 'record 0 (id "000.tar/0")' and dataset[3]["record"] == 'record 3 (id "001.tar/x/1")'


def test_workers_read_shards(shards):
    """Forked workers share the index, spawned ones get a copy; none shares a place in an open file."""
    dataset = LlavaDataset(shards, llava())
    (batch,) = torch.utils.data.DataLoader(dataset, num_workers=2, batch_size=4, collate_fn=list)
    same(batch, dataset)
    copied = pickle.loads(pickle.dumps(dataset.tables[0]))
    names = [name for row in dataset.rows for name in row.images]
    assert len(names) == 3 and all(copied.image(name) == dataset.tables[0].image(name) for name in names)
    assert copied.image("a.png") is None and not copied.holds(f"{shards}/000.tar/0.json")


def test_records_of_one_image_are_a_group(pack):
    """KEY.json may be a list: its rows share the image, so that --group_by_image compresses it once."""
    path = pack("x.tar", {"0.png": "a.png", "0.json": [RECORDS[0], RECORDS[1]], "1.png": "a.png", "1.json": RECORDS[0]})
    dataset = LlavaDataset(path, llava())
    assert dataset.image_groups == [0, 0, 1] and dataset.num_images == 2


@pytest.mark.parametrize(
    "record",
    [
        {"image": "coco/train2017/01.jpg", "conversations": TWO_ROUNDS},  # as it was called before it was packed
        {"images": ["01.jpg"], "url": "https://x/01.jpg", "conversations": TWO_ROUNDS},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "01.jpg"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "a cat"},
            ]
        },
        {"key": "01", "url": "https://x/01.jpg", "caption": "a cat", "width": 40},  # img2dataset's
    ],
)
def test_the_image_beside_a_record_is_its_image(pack, record):
    """Whatever name the record has for it, and by the long names of the pax format too."""
    name = "n" * 120
    dataset = LlavaDataset(pack("x.tar", {f"{name}.json": record, f"{name}.png": "a.png"}, tarfile.PAX_FORMAT), llava())
    (row,) = dataset.rows
    assert [image.rpartition("/")[2] for image in row.images] == [f"{name}.png"]
    assert dataset[0]["pixel_values"].shape[0] == 1


def test_captions_beside_records(pack):
    """KEY.txt is the caption of the record beside it, unless that has its own; other files are left out by name."""
    record = {"conversations": talk("<image>\nhow many dogs?", "two")}
    content = {"0.png": "a.png", "0.json": record, "0.txt": "a cat", "0.cls": "7", "._0.png": b"x", "__meta__": "x"}
    content |= {"1.png": "b.png", "1.json": {**record, "caption": "own"}, "1.txt": "other"}
    content |= {"2.png": "b.png", "2.json": {**record, "captions": ["one", "two"]}, "2.txt": "other"}  # lost both
    content |= {"3.png": "b.png", "3.json": record, "3.txt": " \n"}  # it has something else to learn
    content |= {"4.png": "b.png", "4.json": {**record, "captions": ["one", "two"]}}  # were ignored without a .txt
    content |= {"5.png": "b.png", "5.json": {"caption": " ", "captions": ["one"]}}
    with pytest.warns(UserWarning, match="left out of the shards: 1 .cls"):
        dataset = LlavaDataset(pack("x.tar", content), llava())
    assert [row.captions for row in dataset.rows] == [
        ["a cat"],
        ["own"],
        *[["one", "two"], [], ["one", "two"], ["one"]],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0.png": "a.png"}, r"x.tar/0.png: has no partner; there should be the 0.json or 0.txt"),
        ({"0.txt": "a cat"}, r"x.tar/0.txt: has no partner; there should be the image 0.jpg, .png"),
        ({"0.json": RECORDS[0]}, r"x.tar/0.json: names the image 'a.png', and has no partner"),
        (
            {"0.json": {"messages": [{"role": "user", "content": [{"type": "image"}]}]}},
            r"x.tar/0.json: shows an image, and has no partner",
        ),
        (
            {"0.png": "a.png", "0.json": RECORDS[0], "0.b.jpg": b"x"},
            r"two images have the key 0: 0.png and 0.b.jpg. .*keep one",
        ),
        ({"0.json": RECORDS[2], "0.meta.json": RECORDS[2]}, r"two .json files have the key 0"),
        ({"0.png": "a.png", "0.json": {**RECORDS[0], "image": ["a", "b"]}}, r"0.json: names 2 images"),
        ({"0.mp4": b"x", "0.json": RECORDS[2]}, r"x.tar/0.mp4: .mp4 is not read"),
        ({"0.png": "a.png", "0.txt": " \n"}, r"x.tar/0.txt: the text is empty"),
        ({"0.png": "a.png", "0.json": {"url": "https://x"}, "0.txt": ""}, r"x.tar/0.txt: the text is empty"),
        ({"caf\udce9.png": "a.png", "0.txt": "x"}, r"x.tar/caf\\xe9.png: its name is not UTF-8; rename it"),
        ({"0.png": "a.png", "d\udce9/0.json": RECORDS[0]}, r"x.tar/d\\xe9/0.json: its name is not UTF-8; rename it"),
        ({"0.png": "a.png", "0.json": "{"}, r"x.tar/0.json: .*line 1"),
        ({"0.png": "a.png", "0.json": "3"}, r"x.tar/0.json: should be a record"),
        ({"0.png": "a.png", "0.json": {"question": "q"}}, r"record 0 \(id \"x.tar/0\"\).*Its keys are 'question'"),
        ({"readme.md": "x"}, r"x.tar: no records; a shard holds KEY.json"),
    ],
)
def test_samples_that_cannot_be_read(pack, content, message):
    """The shard and the member, what is wrong, and what should be there."""
    with pytest.raises(ValueError, match=message):
        LlavaDataset(pack("x.tar", content), llava())


@pytest.mark.parametrize(("kind", "option"), [(tarfile.LNKTYPE, "hard-dereference"), (tarfile.SYMTYPE, "dereference")])
def test_a_link_is_named(pack, kind, option):
    """A link has no bytes; it vanished, and the record beside it was said to have no partner."""
    record = {"1.json": {**RECORDS[0], "image": "1.png"}}
    path = pack("x.tar", {"0.png": "a.png", "0.json": RECORDS[0], **record}, links=[("1.png", kind)])
    with pytest.raises(
        ValueError, match=f"x.tar/1.png: is a (hard|symbolic) link in the tar; pack it with --{option}$"
    ):
        LlavaDataset(path, llava())


def test_a_shard_whose_own_name_is_not_utf8(folder, shards):
    """Its images are named by it: like a member's, the name is refused at the start."""
    try:
        (shards / "000.tar").rename(folder / "caf\udce9.tar")
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(ValueError, match=r"caf\\xe9.tar: its name is not UTF-8; rename it"):
        LlavaDataset(folder / "caf\udce9.tar", llava())


def test_shards_of_captions(pack, folder, make):
    """As caption data: an error names the record, which has no line there."""
    path = pack("c.tar", {"0.png": "a.png", "0.txt": "a cat", "1.png": "b.png", "1.json": {"caption": "a mat"}})
    assert [row.captions for row in LlavaDataset(None, llava(), caption_data=path).rows] == [["a cat"], ["a mat"]]
    path = pack("c.tar", {"0.png": "a.png", "0.txt": "a cat", "1.png": "b.png", "1.json": RECORDS[0]})
    with pytest.raises(
        ValueError, match=r"c.tar: caption entry 1 \(id \"c.tar/1\"\): needs one 'image' and a 'caption'"
    ):
        LlavaDataset(None, llava(), caption_data=path)


def test_compressed_shards_are_refused(folder, shards):
    """By their bytes, whatever their name says."""
    plain = (shards / "000.tar").read_bytes()
    for kind, packed, names in (
        ("gzip", gzip.compress(plain), ("z.tar.gz", "z.tgz", "z.tar")),
        ("bzip2", bz2.compress(plain), ("z.tar.bz2", "z.tbz")),
        ("xz", lzma.compress(plain), ("z.txz",)),
        ("zstd", b"\x28\xb5\x2f\xfd", ("z.tzst",)),  # its first bytes are enough
    ):
        for name in names:
            (folder / name).write_bytes(packed)
            with pytest.raises(ValueError, match=f"{name}: compressed by {kind}, .*Unpack it to a .tar"):
                LlavaDataset(folder / name, llava())


def test_a_shard_that_is_only_called_compressed_is_read(folder, shards):
    """It was said to be compressed, and to unpack it would have failed."""
    (shards / "000.tar").rename(folder / "x.tbz2")
    assert len(LlavaDataset(folder / "x.tbz2", llava())) == 2


def test_a_damaged_tar_file_is_refused(folder, shards):
    """Cut off anywhere, also between two members, and damaged within; the cache's reader is the same."""
    whole = (shards / "000.tar").read_bytes()
    places = [member.start for member in members(shards / "000.tar")]
    at = places[2] - 512  # where the header of the third member begins
    broken = {
        "in a member": whole[: places[1] + 7],
        "in a header": whole[: at + 100],
        "between members": whole[:at],
        "a header": whole[:at] + b"x" * 512 + whole[at + 512 :],
        "no tar": b"no tar file at all" * 100,
        "empty": b"",
    }
    joined = {"joined": whole + whole, "a header of zeros": whole[:at] + bytes(512) + whole[at + 512 :]}
    path = folder / "cut.tar"
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cut.tar: .*(cut off|damaged).*copy or download it again"):
            LlavaDataset(path, llava())
        with pytest.raises(ValueError, match="cut.tar: .*(cut off|damaged)"):
            list(Source([str(path)]))
    for content in joined.values():  # the rest was lost without a word
        path.write_bytes(content)
        for read in (lambda: LlavaDataset(path, llava()), lambda: list(Source([str(path)]))):
            with pytest.raises(ValueError, match="cut.tar: data after the tar's end mark .*pack it again"):
                read()


def test_shards_that_are_not_there(folder, shards):
    """One of a range by its own name; a pattern without a match; a folder of two kinds."""
    with pytest.raises(FileNotFoundError, match=r"002.tar: no such data file, of .*\{000..002\}.tar"):
        LlavaDataset(shards / "{000..002}.tar", llava())
    with pytest.raises(FileNotFoundError, match=r"y\*.tar: no file matches"):
        LlavaDataset(shards / "y*.tar", llava())
    (shards / "000.parquet").touch()
    with pytest.raises(
        ValueError, match=r"holds both .tar and .parquet files: name those to read, as .*\*.tar"
    ) as info:
        LlavaDataset(shards, llava())
    assert "or move the .parquet files to a folder of their own" in str(info.value)
    assert len(LlavaDataset(shards / "*.tar", llava())) == 4


def test_hidden_files_are_no_shards(folder, shards):
    """macOS writes ._0.tar beside 0.tar, which is no tar file and stopped the whole folder; so did .cache/x.parquet."""
    for name in ("._000.tar", ".cache/x.tar", ".cache/x.parquet", "sub/._x.parquet"):
        (shards / name).parent.mkdir(exist_ok=True)
        (shards / name).write_bytes(b"Mac OS X")
    assert len(LlavaDataset(shards, llava())) == 4
    (shards / "000.tar").unlink()
    (shards / "001.tar").unlink()
    assert shard_paths(shards) == []  # hidden ones alone make no folder of shards


def test_a_folder_is_walked_once(shards, monkeypatch):
    """Folders may hold a million files on a slow disk: one walk finds the shards, and says that there are no others."""
    walked, scandir = Counter(), os.scandir

    def count(path="."):
        walked[str(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", count)
    assert len(LlavaDataset(shards, llava())) == 4
    assert walked[str(shards)] == 1


def test_little_is_kept_of_a_member(pack):
    """A shard's names, places and sizes: with all that tarfile knows it was 1,260 bytes a sample."""
    path = pack("x.tar", {f"{i // 2:09d}.{('jpg', 'json')[i % 2]}": b"x" for i in range(4000)})
    tracemalloc.start()
    found = _samples(path, Counter())
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 2000 and kept < 1000 * len(found)


def test_braces_are_spelled_out_as_a_shell_does(tmp_path):
    """Padded only where a number is; downwards too; a file whose own name has braces is that file."""
    for name in ("8", "9", "10", "08", "09", "{1}"):
        with tarfile.open(tmp_path / f"{name}.tar", "w"):
            pass

    def names(pattern):
        return [path.stem for path in shard_paths(tmp_path / pattern)]

    assert names("{8..10}.tar") == ["8", "9", "10"]
    assert names("{08..10}.tar") == ["08", "09", "10"]
    assert names("{10..8}.tar") == ["10", "9", "8"]
    assert names("{0,}{8,9}.tar") == ["08", "09", "8", "9"]
    assert names("{1}.tar") == ["{1}"]


def test_a_shard_that_changed_meanwhile(shards):
    """An image that is not there any more is named; with "skip" training goes on without it."""
    dataset = LlavaDataset(shards, llava())
    skipping = LlavaDataset(shards, llava(), on_bad_image="skip")
    (shards / "000.tar").write_bytes((shards / "000.tar").read_bytes()[:600])
    with pytest.raises(ImageError, match=r'record 0 \(id "000.tar/0"\): .*000.tar/0.png: its shard changed'):
        dataset[0]
    with pytest.warns(UserWarning, match="skipped a picture"):
        assert skipping[0]["record"] == skipping[2]["record"]
    assert skipping.skipped_images[0].endswith("000.tar/0.png")


def test_the_command_trains_on_shards(base_dir, llava_data, pack, folder, tmp_path):
    """The losses of the same records in JSON; the same shards resume, changed records are another run."""
    records = json.loads(llava_data["data"].read_text())
    content = {}
    for i, record in enumerate(records):
        content[f"{i:03d}.json"] = record
        if record.get("image"):
            content[f"{i:03d}.png"] = (llava_data["images"] / record["image"]).read_bytes()
    data = {**llava_data, "data": pack("w/0.tar", content)}
    output = train(command(base_dir, data, tmp_path / "m", "--max_steps", "1"))
    plain = train(command(base_dir, llava_data, tmp_path / "plain", "--max_steps", "1"))
    assert [e["loss"] for e in history(output)] == [e["loss"] for e in history(plain)]
    assert train(command(base_dir, data, tmp_path / "m", "--max_steps", "1")) == output  # nothing to do
    with pytest.raises(ValueError, match="output_dir .* holds --data_path"):
        train(command(base_dir, {**data, "data": folder / "w" / "{0..0}.tar"}, folder / "w", "--max_steps", "1"))
    content["000.json"] = {**records[0], "conversations": talk("<image>\nwhat?", "a mat")}
    pack("w/0.tar", content)
    with pytest.raises(ValueError, match="data_path 0.tar → 0.tar .its content changed."):
        train(command(base_dir, data, tmp_path / "m", "--max_steps", "1"))


def test_the_digest_is_of_records_and_names(pack):
    """Equal for equal shards wherever they lie; a record that changed within its length changes it."""
    digests = []
    for name, text in (("p/x.tar", "a cat"), ("q/x.tar", "a cat"), ("r/x.tar", "a mat")):
        shards = Shards(pack(name, {"0.png": "a.png", "0.txt": text}))
        assert [record["caption"] for record in shards] == [text]
        digests.append(shards.digest)
    assert digests[0] == digests[1] != digests[2]
