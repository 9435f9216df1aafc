"""Images that are no files of this machine, caches that are no folders, and exports that need another library."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb")

from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402


@pytest.fixture
def compress(run, checkpoint, tmp_path):
    """`fwd2bot compress --cache` of some sources, → its figures."""

    def compress(*images, cache=tmp_path / "p.cache") -> dict:
        command = ("compress", "--model", checkpoint, "--cache", cache, "--device", "cpu", "--codec", "float16")
        code, out, err = run(*command, "--batch-size", 1, "--json", "--images", *images)
        assert code == 0, err
        return json.loads(out)

    compress.cache = tmp_path / "p.cache"
    return compress


def same_as_files(cache: SummaryCache, names: dict[str, Path]) -> None:
    """The summaries of these ids are those of these files, which are in the cache as well."""
    for name, file in names.items():
        assert np.array_equal(cache.get([name]), cache.get([str(file)])), name


def test_a_bucket_is_a_source(compress, photos):
    """Objects of a bucket, by fsspec: what is new is read, what is known is not, what is no image is counted."""
    fsspec = pytest.importorskip("fsspec")
    bucket = fsspec.filesystem("memory")
    for file in photos.rglob("*"):
        if file.is_file():
            bucket.pipe(f"/bucket/in/{file.relative_to(photos)}", file.read_bytes())
    try:
        done = compress("memory://bucket/in")
        assert (done["compressed"], len(done["skipped"]), done["left_out"]) == (5, 2, {".txt": 1})
        assert compress("memory://bucket/in")["known"] == 5
        assert compress("memory://bucket/in/beach/z.jpg")["known"] == 1  # one object, by its own name
        bucket.pipe("/bucket/in/a.png", (photos / "b.png").read_bytes())  # replaced, by what is known
        done = compress("memory://bucket/in")
        assert (done["compressed"], done["known"], done["renamed"]) == (0, 4, 1)
        compress(photos)
        cache = SummaryCache.open(compress.cache)
        place = "memory:///bucket/in"
        assert {row["root"] for row in cache.about(["root"])} == {place, str(photos)}
        same_as_files(cache, {f"{place}/beach/z.jpg": photos / "beach/z.jpg", f"{place}/a.png": photos / "b.png"})
    finally:
        bucket.rm("/bucket", recursive=True)


def test_an_object_that_is_not_there_is_told(run, checkpoint, tmp_path):
    pytest.importorskip("fsspec")
    command = ("compress", "--model", checkpoint, "--cache", tmp_path / "p.cache", "--device", "cpu", "--images")
    code, _, err = run(*command, "memory://nowhere/at/all.png")
    assert code == 1 and "memory://nowhere/at/all.png: No such file" in err
    assert not (tmp_path / "p.cache").exists()


def test_a_bucket_names_the_package_that_is_missing(run, checkpoint, tmp_path, monkeypatch):
    """fsspec reads s3:// by s3fs, and gs:// by gcsfs, which come by themselves."""
    pytest.importorskip("fsspec")
    command = ("compress", "--model", checkpoint, "--cache", tmp_path / "p.cache", "--images")
    for url, package in (("s3://bucket/in", "s3fs"), ("gs://bucket/in", "gcsfs")):
        monkeypatch.setitem(sys.modules, package, None)  # also where it is installed
        code, _, err = run(*command, url)
        assert code == 1 and err.startswith("fwd2bot: error: ") and package in err and len(err.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "fsspec", None)
    code, _, err = run(*command, "s3://bucket/in")
    assert code == 1 and "pip install fsspec" in err


@pytest.mark.parametrize("kind", ["parquet", "plain parquet", "folder"])
def test_a_data_set_is_a_source(compress, photos, tmp_path, monkeypatch, kind):
    """Rows of a Hugging Face data set, streamed; here one on disk, with its images inside or as files beside it."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    place, images = tmp_path / "set", sorted(photos.glob("*.png"))
    place.mkdir()
    if kind == "folder":
        for file in images:
            (place / file.name).write_bytes(file.read_bytes())
    else:
        rows = [{"bytes": file.read_bytes(), "path": file.name} for file in images]
        meta = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}
        table = pa.table({"image": rows}).replace_schema_metadata(meta if kind == "parquet" else None)
        pq.write_table(table, place / "train-00000-of-00001.parquet")
    assert compress(f"hf://{place}")["compressed"] == len(images)
    assert compress(f"hf://{place}:train")["renamed"] == len(images)  # the same by another name
    done = compress(f"hf://{place}", photos)
    assert (done["known"], done["renamed"], done["compressed"]) == (len(images), len(images), 2)
    files = {f"hf://{place}/{number:09d}": file for number, file in enumerate(images)}
    same_as_files(SummaryCache.open(compress.cache), files)


def test_a_data_set_without_images_is_told(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("text\nno image\n")
    with pytest.raises(ValueError, match="has no column of images: text"):
        list(Source([f"hf://{tmp_path / 'set'}"]))


def test_data_sets_name_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        list(Source(["hf://someone/something"]))


def test_a_cache_by_the_scheme_of_object_storage(compress, run, checkpoint, photos, tmp_path):
    """file:// takes the code of a bucket, without a lock: all commands do there what they do in a folder."""
    cache = f"file://{tmp_path}/bucket/p.cache"
    assert compress(photos, cache=cache)["compressed"] == 5
    (photos / "beach/a.png").unlink()
    assert compress(photos, cache=cache)["known"] == 4
    stats = json.loads(run("cache", "stats", cache, "--json")[1])
    assert (stats["rows"], stats["bytes"]) == (5, None)  # listing a bucket costs money
    hits = json.loads(run("search", "--cache", cache, "--id", "a.png", "--json")[1])["hits"]
    assert hits[0]["id"] == "a.png" and len(hits) == 5
    ask = ("ask", "--cache", cache, "--id", "a.png", "what is it", "--max-new-tokens", 2, "--device", "cpu")
    assert run(*ask)[0] == 0
    assert run("cache", "rm", cache, "b.png", "--yes")[0] == 0
    version = json.loads(run("cache", "restore", cache, "--json")[1])["versions"][1].split()[0]
    assert json.loads(run("cache", "restore", cache, "--version", version, "--json")[1])["rows"] == 5
    assert json.loads(run("cache", "prune", cache, "--yes", "--json")[1])["removed"] == 1
    assert json.loads(run("cache", "optimize", cache, "--json")[1])["rows"] == 4
    assert json.loads(run("cache", "verify", cache, "--json")[1])["ok"]
    assert run("cache", "export", cache, "--output", tmp_path / "out.safetensors")[0] == 0
    assert run("cache", "repair", cache, "--no-compress")[0] == 0


def test_a_bucket_that_cannot_be_reached_is_an_error(run):
    """No credentials, no network: one line, and not a traceback of the engine's Rust."""
    code, _, err = run("cache", "stats", "nowhere://bucket/p.cache")
    assert code == 1 and err.startswith("fwd2bot: error: ") and "nowhere" in err


def test_an_export_to_faiss_finds_what_the_cache_finds(compress, run, photos, tmp_path):
    """The index and the ids beside it belong together."""
    faiss = pytest.importorskip("faiss")
    compress(photos)
    output = tmp_path / "out.faiss"
    command = ("cache", "export", compress.cache, "--output", output, "--to", "faiss", "--json")
    assert json.loads(run(*command)[1])["images"] == 5
    index, names = faiss.read_index(str(output)), Path(f"{output}.ids.txt").read_text().splitlines()
    cache = SummaryCache.open(compress.cache)
    assert index.ntotal == len(names) == 5 and index.d == cache.settings.size
    for place, name in enumerate(names):
        vector = index.reconstruct(place)
        scores, found = index.search(vector[None], 3)
        import torch

        hits = cache.search(torch.from_numpy(vector), 3)
        assert [names[i] for i in found[0]] == [hit["id"] for hit in hits] and hits[0]["id"] == name
        assert np.allclose(scores[0], [hit["score"] for hit in hits], atol=2e-3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_an_export_to_faiss_names_its_extra(compress, run, photos, tmp_path, monkeypatch):
    compress(photos)
    monkeypatch.setitem(sys.modules, "faiss", None)
    code, _, err = run("cache", "export", compress.cache, "--output", tmp_path / "out", "--to", "faiss")
    assert code == 1 and "faiss" in err and "pip install" in err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("ending", "packed"),
    [(".tar", ""), (".tgz", "gz"), (".tar.bz2", "bz2"), (".tbz", "bz2"), (".tar.xz", "xz"), (".TXZ", "xz")],
)
def test_tar_files_are_known_by_all_their_endings(photos, tmp_path, ending, packed):
    """.tar.bz2 and .tar.xz were taken for images, and so was every tar file that a pattern or a list named."""
    path = tmp_path / f"x{ending}"
    with tarfile.open(path, f"w:{packed}") as archive:
        archive.add(photos / "a.png", "a.png")
    (tmp_path / "list.txt").write_text(f"{path.name}\n")
    for given in (path, tmp_path / "x.*", tmp_path / "list.txt"):
        (entry,) = Source([str(given)])
        assert (entry.source, entry.problem) == (f"{path}/a.png", None)
        assert entry.read() == (photos / "a.png").read_bytes()


def test_links_and_names_in_a_tar_are_skipped_with_their_reasons(run, checkpoint, photos, tmp_path):
    """A link vanished without a word, and a name that is not UTF-8 ended the run: its table keeps text."""
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(photos / "a.png", "a.png")
        archive.add(photos / "b.png", "caf\udce9.png")
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    command = ("compress", "--model", checkpoint, "--cache", tmp_path / "p.cache", "--device", "cpu", "--json")
    done = json.loads(run(*command, "--images", path)[1])
    assert done["compressed"] == 1
    assert {entry["reason"] for entry in done["skipped"]} == {
        f"{path}/caf\\xe9.png: its name is not UTF-8; rename it",
        f"{path}/c.png: is a hard link in the tar; pack it with --hard-dereference",
    }
