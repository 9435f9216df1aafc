"""The commands of a cache that exists: what they show, change, refuse, and write for other programs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lancedb")

import llava_fwd2bot.cli.cache  # noqa: E402
from llava_fwd2bot.cache.format import SETTINGS as META  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402
from llava_fwd2bot.cache.remembered import recall  # noqa: E402
from llava_fwd2bot.cache.sources import Source  # noqa: E402
from llava_fwd2bot.cache.summary_file import SummaryFile  # noqa: E402


@pytest.fixture
def filled(run, checkpoint, photos, tmp_path):
    """A cache of the photos, with a copy of one; and its path."""
    (photos / "copy.png").write_bytes((photos / "a.png").read_bytes())
    path = tmp_path / "p.cache"
    command = ("compress", "--model", checkpoint, "--images", photos, "--cache", path, "--codec", "float16")
    assert run(*command, "--device", "cpu")[0] == 0
    return path


def test_ls_skipped_and_dedup(run, filled, photos):
    lines = run("cache", "ls", filled)[1].splitlines()
    assert len(lines) == 6 and any(line.startswith(f"beach/z.jpg\t{photos}/beach/z.jpg\t") for line in lines)
    assert run("cache", "ls", filled, "--paths", "--filter", "id LIKE 'beach/%'")[1].split() == [
        str(photos / "beach" / name) for name in ("a.png", "z.jpg")
    ]
    rows = [json.loads(line) for line in run("cache", "ls", filled, "--json")[1].splitlines()]
    assert {row["id"] for row in rows} == {"a.png", "b.png", "beach/a.png", "beach/z.jpg", "copy.png", "pixel.png"}
    assert "not a picture" in run("cache", "skipped", filled)[1]
    out = run("cache", "dedup", filled, "--near", "0.999999")[1].splitlines()
    assert out[0] == f"same bytes\t{photos}/a.png\t{photos}/copy.png"
    assert all(line.startswith("alike") for line in out[1:])


def test_rm_asks_and_restore_brings_back(run, filled, photos, monkeypatch):
    """What is taken out leaves its summary, until `optimize`."""
    assert run("cache", "rm", filled, "a.png")[0] == 2  # no terminal to confirm on
    code, out, err = run("cache", "rm", filled, "beach/", "--dry-run", "--json")
    assert (
        code == 0
        and json.loads(out) == {"removed": 0, "rows": 6}
        and "beach/z.jpg" in err
        and "3 would be removed" in err
    )
    assert json.loads(run("cache", "rm", filled, "beach/", "a.png", "--yes", "--json")[1]) == {"removed": 4, "rows": 3}
    code, _, err = run("cache", "rm", filled, "nothing.png", "--yes")
    assert code == 1 and "has no image nothing.png" in err
    versions = run("cache", "restore", filled)[1]
    before = next(line for line in versions.splitlines() if "(add" in line).split(" ")[0]
    found = json.loads(run("cache", "restore", filled, "--version", before, "--json")[1])
    assert found["rows"] == 6 and not found["lost"]
    assert run("cache", "verify", filled)[0] == 0
    # after optimize the summaries are gone, and what comes back is to be compressed again
    run("cache", "rm", filled, "beach/", "--yes")
    done = json.loads(run("cache", "optimize", filled, "--older-than", "1", "--json")[1])
    assert done["removed_summaries"] == 2
    found = json.loads(run("cache", "restore", filled, "--version", before, "--json")[1])
    assert sorted(found["lost"]) == ["beach/a.png", "beach/z.jpg"] and found["rows"] == 6
    assert len(SummaryCache.open(filled)) == 4
    repaired = json.loads(run("cache", "repair", filled, "--device", "cpu", "--json")[1])
    assert repaired["compressed"] == 2 and not repaired["lost"] and run("cache", "verify", filled)[0] == 0


def test_restore_lists_every_version(run, filled):
    """Five were shown, and "and 3 more": the one that is looked for may be any. An idle `repair` showed one twice."""
    for name in ("a.png", "b.png", "beach/a.png", "beach/z.jpg", "copy.png"):
        assert run("cache", "rm", filled, name, "--yes")[0] == 0
    assert run("cache", "repair", filled, "--no-compress")[0] == 0
    lines = run("cache", "restore", filled)[1].splitlines()
    assert len({line.split()[0] for line in lines}) == len(lines)
    assert len(lines) > 6 and sum("(rm" in line for line in lines) == 5
    assert lines == json.loads(run("cache", "restore", filled, "--json")[1])["versions"]


def test_rm_takes_paths_from_here(run, filled, photos, monkeypatch):
    """What `cache ls --paths` prints was accepted, and what a shell completes was not."""
    monkeypatch.chdir(photos.parent)
    assert json.loads(run("cache", "rm", filled, f"{photos.name}/a.png", "--yes", "--json")[1])["removed"] == 1
    monkeypatch.chdir(photos / "beach")
    assert json.loads(run("cache", "rm", filled, "./", "--yes", "--json")[1])["removed"] == 3  # one was skipped
    assert run("cache", "rm", filled, "nothing/", "--yes")[0] == 1


def test_prune_shows_and_asks(run, filled, photos, monkeypatch):
    (photos / "b.png").unlink()
    assert run("cache", "prune", filled)[0] == 2
    code, _, err = run("cache", "prune", filled, "--dry-run")
    assert code == 0 and str(photos / "b.png") in err and len(SummaryCache.open(filled)) == 6
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert run("cache", "prune", filled)[0] == 1 and len(SummaryCache.open(filled)) == 6
    assert run("cache", "prune", filled, "--yes")[0] == 0 and len(SummaryCache.open(filled)) == 5
    photos.rename(photos.parent / "away")
    code, _, err = run("cache", "prune", filled, "--yes")
    assert code == 1 and "not there at all" in err and len(SummaryCache.open(filled)) == 5


@pytest.mark.parametrize("kind", ["safetensors", "parquet", "numpy"])
def test_exports_hold_what_the_cache_gives(run, filled, checkpoint, tmp_path, kind):
    output = tmp_path / f"out.{kind}"
    code, out, err = run("cache", "export", filled, "--output", output, "--to", kind, "--json")
    assert code == 0 and json.loads(out)["images"] == 6, err
    cache = SummaryCache.open(filled)
    if kind == "safetensors":
        file = SummaryFile(output, cache.settings.fingerprint)
        for name, row in file.place.items():
            assert torch.equal(file.read([row]).float(), cache.get([name]))
    elif kind == "parquet":
        import pyarrow.parquet as pq

        for row in pq.read_table(output).to_pylist():
            summary = torch.tensor(np.array(row["summary"], np.float32)).view(cache.settings.k, -1)
            assert torch.equal(summary, cache.get([row["source"]])[0])
    else:
        vectors, ids = np.load(output), Path(f"{output}.ids.txt").read_text().splitlines()
        assert vectors.shape == (6, cache.settings.size)
        for name, vector in zip(ids, vectors, strict=True):
            assert cache.search(torch.from_numpy(vector), 2)[0]["score"] > 0.999
            assert name in {hit["id"] for hit in cache.search(torch.from_numpy(vector), 2)}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert run("cache", "export", filled, "--output", output, "--to", kind)[0] == 1  # exists


def test_columns_of_a_users_own(run, filled, photos, tmp_path):
    """They filter searches, stay when a file changes or moves, and are covered by the checksum."""
    table = tmp_path / "tags.csv"
    table.write_text(
        "\ufeffid,stars,tag,day\na.png,5,sun,2024-02-03\nbeach/z.jpg,3,sea,2023-01-01\nnowhere.png,1,x,\n",
        encoding="utf-8",
    )
    found = json.loads(run("cache", "import-metadata", filled, table, "--json")[1])
    assert found == {"updated": 2, "unknown": ["nowhere.png"], "columns": ["stars", "tag", "day"]}
    cache = SummaryCache.open(filled)
    assert run("cache", "verify", filled)[0] == 0
    vector = torch.ones(cache.settings.size)
    hits = cache.search(vector, where="stars >= 3 AND day < '2024-01-01'", columns=["tag"])
    assert [(hit["id"], hit["tag"]) for hit in hits] == [("beach/z.jpg", "sea")]
    (photos / "beach" / "z.jpg").rename(photos / "moved.jpg")
    Image.new("RGB", (9, 9), (1, 99, 1)).save(photos / "a.png")
    assert run("compress", "--cache", filled, "--images", photos, "--device", "cpu")[0] == 0
    cache = SummaryCache.open(filled)
    tags = {row["id"]: row["tag"] for row in cache.about(["id", "tag"])}
    assert (tags["moved.jpg"], tags["a.png"], tags["b.png"]) == ("sea", "sun", None) and "beach/z.jpg" not in tags
    assert run("cache", "verify", filled)[0] == 0
    for text, said in (
        ("a,b\n1,2\n", "names no images"),
        ("id,sha256\na.png,x\n", "keeps itself"),
        ("id,tag\na.png,1\n", "tag as int64"),
    ):
        table.write_text(text)
        code, _, err = run("cache", "import-metadata", filled, table)
        assert code == 1 and said in err


def test_a_camera_s_own_words_can_be_asked_for(run, checkpoint, tmp_path):
    """Time, camera and place of EXIF are columns; damaged EXIF says nothing."""
    exif = Image.Exif()
    exif[0x0110] = "X100"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 30.0, 0.0), 3: "E", 4: (151.0, 0.0, 36.0)})
    (tmp_path / "f").mkdir()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "f" / "a.jpg", exif=exif)
    Image.new("RGB", (20, 20), (200, 2, 3)).save(tmp_path / "f" / "b.jpg")
    path = tmp_path / "p.cache"
    assert (
        run("compress", "--model", checkpoint, "--cache", path, "--images", tmp_path / "f", "--device", "cpu")[0] == 0
    )
    cache, ones = SummaryCache.open(path), torch.ones(64)
    hits = cache.search(ones, where="taken > '2024-01-01' AND camera = 'X100'", columns=["latitude", "longitude"])
    assert [(h["id"], h["latitude"], round(h["longitude"], 4)) for h in hits] == [("a.jpg", -33.5, 151.01)]


def test_search_prints_paths_and_copies_once(run, filled, photos, checkpoint):
    search = ("search", "--cache", filled, "--device", "cpu")
    out = run(*search, "--id", "a.png", "--paths", "--top", 2)[1].splitlines()
    assert out[0] == str(photos / "a.png") and str(photos / "copy.png") not in out and len(out) == 2
    assert run(*search, "--id", "b.png", "--paths", "-0", "--top", 1)[1] == f"{photos / 'b.png'}\0"
    assert "(and 1 copies)" in run(*search, "--id", "a.png")[1]
    queries = photos.parent / "queries.txt"
    queries.write_text("a dog\n\na cat\n")
    answers = [json.loads(line) for line in run(*search, "--queries", queries, "--json", "--top", 1)[1].splitlines()]
    assert [answer["query"] for answer in answers] == ["a dog", "a cat"] and len(answers[0]["hits"]) == 1
    code, _, err = run(*search, "a long tale " * 500)
    assert code == 1 and "up to 512" in err
    assert len(run(*search, "--top", 1_000_000_000, "--id", "a.png", "--paths")[1].splitlines()) == 5  # all there are


def test_archives_tables_and_shards_are_sources(run, checkpoint, photos, tmp_path):
    """Members of a tar, rows of a Parquet file; every shard takes its part, and together they take all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = sorted(photos.glob("*.png"))
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        for file in images:
            archive.add(file, file.name)
            archive.addfile(tarfile.TarInfo(f"{file.stem}.txt"))
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in images]
    pq.write_table(pa.table({"n": list(range(len(rows))), "image": rows}), tmp_path / "t.parquet")
    path = tmp_path / "p.cache"
    command = ("compress", "--model", checkpoint, "--cache", path, "--device", "cpu", "--json", "--images")
    done = json.loads(run(*command, tmp_path / "w.tar")[1])
    assert done["compressed"] == len(images) and done["left_out"] == {".txt": len(images)}
    assert json.loads(run(*command, tmp_path / "w.tar")[1])["known"] == len(images)
    again = json.loads(run(*command, tmp_path / "t.parquet", photos)[1])  # the same bytes in other places
    assert again["renamed"] == 2 * len(images) and again["compressed"] == 2  # of beach/
    names = {row["source"] for row in SummaryCache.open(path).about(["source"])}
    assert f"{tmp_path}/w.tar/a.png" in names and f"{tmp_path}/t.parquet/000000000" in names
    parts = [{entry.source for entry in Source([str(photos)], (i, 3))} for i in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(list(Source([str(photos)])))
    assert json.loads(run("cache", "prune", path, "--yes", "--json")[1])["removed"] == 0  # members are not looked for


def test_a_cache_of_the_earlier_format_is_read_and_converted(run, checkpoint, photos, filled, tmp_path):
    """Written here as it was by version 0.1: one table of images, one of skipped files."""
    old = tmp_path / "old.cache"
    ids = ["a.png", "b.png", "beach/z.jpg"]
    write_old(SummaryCache.open(filled), old, ids)
    cache = SummaryCache.open(old)
    new = SummaryCache.open(filled)
    assert len(cache) == 3 and torch.equal(cache.get(ids, 2), new.get(ids, 2))
    assert cache.search(torch.ones(cache.settings.size), 1)[0]["id"] in ids
    ask = ("search", "--cache", old, "--id", "b.png", "--device", "cpu", "--paths", "--top", 1)
    assert run(*ask)[1].strip() == str(photos / "b.png")
    command = ("compress", "--cache", old, "--images", photos, "--device", "cpu", "--json")
    code, _, err = run(*command)
    assert code == 1 and "cache migrate" in err
    assert run("cache", "rm", old, "a.png", "--yes")[0] == 1
    found = json.loads(run("cache", "migrate", old, "--json")[1])
    assert found == {"rows": 3, "damaged": []} and not list(old.glob("images.lance"))
    cache = SummaryCache.open(old)
    assert torch.equal(cache.get(ids), new.get(ids)) and run("cache", "verify", old)[0] == 0
    assert [row["id"] for row in cache.skipped()] == ["text.jpg"]
    done = json.loads(run(*command)[1])
    assert done["known"] == 3 and done["compressed"] == 2 and done["renamed"] == 1
    assert run("cache", "migrate", old)[0] == 1


def write_old(cache: SummaryCache, path: Path, ids: list[str]) -> None:
    import zlib

    import lancedb
    import pyarrow as pa

    about = {row["id"]: row for row in cache.about() if row["id"] in ids}
    names = ("sha256", "source", "bytes", "modified", "width", "height", "added")
    rows = []
    for name in ids:
        own = cache.rows("summaries", None, f"sha256 = '{about[name]['sha256']}'").to_pylist()[0]
        blocks = {key: value for key, value in own.items() if key.startswith("tokens_")}
        vector = np.array(own["embedding"], "<f2")
        told = "\0".join(str(x) for x in (name, *(about[name][n] for n in names[:-1])))
        crc = zlib.crc32(told.encode(), zlib.crc32(vector.tobytes(), zlib.crc32(b"".join(blocks.values()))))
        rows.append({"id": name, **{n: about[name][n] for n in names}, "crc32": crc, "embedding": vector, **blocks})
    schema, kept = cache.table("summaries").schema, cache.table("files").schema
    fields = [("id", pa.string()), *((n, kept.field(n).type) for n in names), ("crc32", pa.int64())]
    fields += [(n, schema.field(n).type) for n in schema.names if n == "embedding" or n.startswith("tokens_")]
    settings = {k: v for k, v in vars(cache.settings).items() if k != "decoding"} | {"format": 1}
    meta = {META: json.dumps(settings).encode()}
    database = lancedb.connect(str(path))
    bad = {"id": "text.jpg", "reason": "no picture", "source": f"{Path(about['a.png']['source']).parent}/text.jpg"}
    database.create_table("skipped", [{**bad, "bytes": 1, "modified": 1}])
    database.create_table("images", pa.Table.from_pylist(rows, pa.schema(fields, metadata=meta)))


def test_large_jpegs_may_be_decoded_at_a_smaller_scale(run, checkpoint, tmp_path):
    """The setting is the cache's: what is decoded in the other way is not mixed with it."""
    (tmp_path / "f").mkdir()
    Image.effect_mandelbrot((640, 480), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(tmp_path / "f" / "a.jpg")
    command = ("compress", "--model", checkpoint, "--images", tmp_path / "f", "--device", "cpu", "--codec", "float16")
    caches = [tmp_path / name for name in ("full", "fast")]
    for path, more in zip(caches, ((), ("--fast-decode",)), strict=True):
        assert run(*command, "--cache", path, *more)[0] == 0
    full, fast = (SummaryCache.open(path) for path in caches)
    assert full.settings.decoding == "full" and fast.settings.decoding == "fast"
    assert fast.about(["width", "height"]) == [{"width": 640, "height": 480}]
    one, other = full.get(["a.jpg"]), fast.get(["a.jpg"])
    assert not torch.equal(one, other) and torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98
    code, _, err = run(*command, "--cache", caches[0], "--fast-decode")
    assert code == 1 and "decoding = full" in err
    assert run(*command, "--cache", caches[1])[0] == 0  # goes on as it was made


def test_the_first_stats_after_a_command_import_no_engine(run, filled, photos, monkeypatch):
    """LanceDB takes longer to be imported than to count; whoever changed the cache has it imported already."""
    monkeypatch.setattr(llava_fwd2bot.cli.cache, "recall", lambda path: recalled.append(recall(path)) or recalled[-1])
    recalled = []
    first = json.loads(run("cache", "stats", filled, "--json")[1])
    assert recalled.pop() == first and first["rows"] > 1
    assert run("cache", "rm", filled, "a.png", "--yes")[0] == 0
    after = json.loads(run("cache", "stats", filled, "--json")[1])
    assert recalled.pop() == after and after["rows"] == first["rows"] - 1


def test_counting_imports_no_torch(filled):
    """Of the 2.6 s that the first `cache stats` took, torch was 1.1."""
    (filled / ".stats.json").unlink()
    code = "import sys; from llava_fwd2bot.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "cache", "stats", str(filled)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rows" in done.stdout


def test_messages_name_what_the_user_named(run, checkpoint, filled, photos, tmp_path):
    """A hidden temporary file stood in errors, a filter's error was the engine's own statement, and a folder or file of
    another kind was said to be missing, or to be made into a cache."""
    folder, text = tmp_path / "folder", tmp_path / "text"
    folder.mkdir()
    text.write_text("x")
    search, device = ("search", "--cache", filled, "--id", "a.png"), ("--device", "cpu")
    compress = ("compress", "--model", checkpoint, *device)
    for argv, told in (
        ((*search, "--html", folder), f"It cannot be written (Is a directory): choose another place: {folder}"),
        (
            (*search, "--filter", "width >"),
            "'width >' does not work: sql parser error: Expected: an expression, found: )",
        ),
        (("search", "--cache", folder, "--id", "x"), f"{folder} is not a cache: name one that `fwd2bot compress"),
        ((*compress, "--images", photos, "--cache", text), f"and this is a file: choose another: {text}"),
        (
            (*compress, "--images", tmp_path / "x", "--cache", tmp_path / "y"),
            f"{tmp_path}/x: No such file or directory; check",
        ),
        (
            ("ask", "--model", checkpoint, "--summaries", filled, "--id", "a.png", "x?", *device),
            "is named by --cache): ",
        ),
        (
            ("ask", "--model", checkpoint, "--image", photos, "x?", *device),
            f"{photos}: is a folder, not a picture; name a",
        ),
        (
            ("export", checkpoint, "--to", "peft", "--output", "/proc/none"),
            "It cannot be written (No such file or direct",
        ),
    ):
        code, _, err = run(*argv)
        assert code == 1 and told in err and ".tmp" not in err and "sha256 IN" not in err, (argv, err)
    assert list(folder.iterdir()) == [] and text.read_text() == "x"
