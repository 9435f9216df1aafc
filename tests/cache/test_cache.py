"""The cache: what goes in comes out, whatever happens in between; nothing of another model, nothing damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("lancedb")

from llava_fwd2bot.cache import maintenance as tools
from llava_fwd2bot.cache.format import blocks  # noqa: E402
from llava_fwd2bot.cache.index import build  # noqa: E402
from llava_fwd2bot.cache.reader import SummaryCache  # noqa: E402

SCRIPTS = str(Path(__file__).parents[2] / "scripts")
sys.path.insert(0, SCRIPTS)
from torture_cache import kills, together  # noqa: E402
from torture_rows import SETTINGS, D, K, about, content, rows  # noqa: E402


@pytest.fixture
def cache(tmp_path) -> SummaryCache:
    return SummaryCache.create(tmp_path / "a.cache", SETTINGS)


def test_what_goes_in_comes_out(cache):
    """In the order asked for, twice where asked twice, and of fewer tokens the first ones: the same numbers."""
    ids, summary, vectors = rows(10)
    cache.add(ids, summary, vectors, about(ids))
    picked = [7, 2, 7]
    got = cache.get([ids[i] for i in picked])
    assert torch.equal(got, summary[picked].half().float())
    for k in range(1, K + 1):
        assert torch.equal(cache.get([ids[i] for i in picked], k), got[:, :k])
    assert cache.get([]).shape == (0, K, D)
    assert len(cache) == 10 and len(SummaryCache.open(cache.path)) == 10


@pytest.mark.parametrize("k", [1, 2, 3, 6, 16, 32])
def test_the_columns_hold_every_token_once(k):
    """A budget of j tokens reads the columns below j, and no others."""
    parts = blocks(k)
    assert [t for a, b in parts for t in range(a, b)] == list(range(k))


def test_the_same_id_again_replaces(cache):
    """A file that changed: one row, the new one."""
    ids, summary, vectors = rows(4)
    cache.add(ids, summary, vectors, about(ids))
    cache.add(ids[1:3], -summary[1:3], vectors[1:3], about(ids[1:3], 1))
    assert len(cache) == 4
    assert torch.equal(
        cache.get(ids)[:, 0],
        torch.stack([s[0] for s in (summary[0], -summary[1], -summary[2], summary[3])]).half().float(),
    )


def test_ids_with_quotes_are_names_not_sql(cache):
    _, summary, vectors = rows(2)
    ids = ["it's a dog'); DROP.jpg", 'say "cheese".jpg']
    cache.add(ids, summary, vectors, about(ids))
    assert torch.equal(cache.get(ids), summary.half().float()) and len(cache) == 2


def test_search_is_the_brute_force(cache):
    ids, summary, vectors = rows(300)
    cache.add(ids, summary, vectors, about(ids))
    query = normalize(torch.randn(D, generator=torch.Generator().manual_seed(5)), dim=0)
    hits = cache.search(query, top=10)
    scores = vectors.half().float() @ query.half().float()
    assert [hit["id"] for hit in hits] == [ids[i] for i in scores.topk(10).indices]
    assert set(hits[0]) == {"id", "score"}
    assert cache.search(query, top=1, columns=("width", "source"))[0].keys() == {"id", "width", "source", "score"}
    with pytest.raises(ValueError, match="no column colour; there are sha256"):
        cache.search(query, columns=("width", "colour"))
    torch.testing.assert_close(torch.tensor([hit["score"] for hit in hits]), scores.topk(10).values, rtol=0, atol=2e-3)


def test_a_filter_is_sql_over_the_columns_and_a_bad_one_names_them(cache):
    ids, summary, vectors = rows(6)
    cache.add(ids[:3], summary[:3], vectors[:3], about(ids[:3], width=100))
    cache.add(ids[3:], summary[3:], vectors[3:], about(ids[3:], width=2000))
    found = cache.search(vectors[0], top=10, where="width > 1000 AND id LIKE '0-%'")
    assert {hit["id"] for hit in found} == set(ids[3:])
    for wrong in ("width >", "colour = 'red'", "width > 1 ; DROP TABLE images", "width > 1 width", "1"):
        with pytest.raises(ValueError, match=r"filter .* does not work: .*Columns: id, sha256"):
            cache.search(vectors[0], where=wrong)
    assert len(cache) == 6


def test_a_filter_of_any_share_finds_what_brute_force_finds(cache):
    """Vectors are of contents, filters of files: few, some and all of 600, with and without an index, and copies."""
    ids, summary, vectors = rows(600)
    cache.add(ids, summary, vectors, [row | {"width": i} for i, row in enumerate(about(ids))])
    copies = [
        row | {"source": f"/copies/{i}", "id": str(i), "root": "/copies", "width": -1}
        for i, row in enumerate(about(ids))
    ]
    cache.commit(entries=copies)
    build(cache)
    scores = vectors[7].half().float() @ vectors.half().float().T
    for least in (595, 300, 3, -5):
        right = [f"0-{i}" for i in scores.topk(600).indices.tolist() if i >= least][:5]
        for exact in (True, False):
            for _ in range(2):  # the second time the filter is remembered
                hits = cache.search(vectors[7], 5, f"width >= {least} AND root = '/nowhere'", exact)
                assert [hit["id"] for hit in hits] == right, (least, exact)


def test_errors_say_what_is_wrong(cache, tmp_path):
    ids, summary, vectors = rows(3)
    cache.add(ids, summary, vectors, about(ids))
    with pytest.raises(ValueError, match=r"no id '0-9'.*Close ones: 0-"):
        cache.get(["0-9"])
    with pytest.raises(ValueError, match="holds 6 tokens per image, but --k asks for 7"):
        cache.get(ids, 7)
    with pytest.raises(ValueError, match="another model"):
        SummaryCache.open(cache.path, "e" * 64)
    with pytest.raises(FileNotFoundError, match="no such cache"):
        SummaryCache.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()  # looking does not make one
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is not a cache"):
        SummaryCache.open(tmp_path / "other")
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other things in it \(letter.txt"):
        SummaryCache.create(tmp_path / "other", SETTINGS)
    with pytest.raises(ValueError, match="k = 6, but 4 was asked for"):
        SummaryCache.create(cache.path, replace(SETTINGS, k=4))
    with pytest.raises(ValueError, match="codec = float16, but int8"):
        SummaryCache.create(cache.path, replace(SETTINGS, codec="int8"))


def test_quantised_and_not_are_not_mixed(cache):
    with pytest.raises(ValueError, match="quantised = no, but 4bit was asked"):
        SummaryCache.create(cache.path, replace(SETTINGS, quantised="4bit"))


def test_a_cache_of_a_later_version_is_refused(tmp_path):
    later = replace(SETTINGS, format=3, version="9.9")
    path = tmp_path / "later"
    with pytest.raises(ValueError, match=r"made by llava_fwd2bot 9\.9.*upgrade"):
        SummaryCache.create(path, later)


def data_files(cache: SummaryCache) -> list[Path]:
    return sorted(Path(cache.path).glob("summaries.lance/data/*"))


def test_every_flipped_byte_of_a_summary_is_found(cache):
    """Lance does not check the bytes of its pages: our checksum does, in verify and when a whole summary is read."""
    ids, summary, vectors = rows(20)
    cache.add(ids, summary, vectors, about(ids))
    assert tools.verify(cache) == {"rows": 20, "damaged": [], "twice": [], "unreadable": None, "ok": True}
    (file,) = data_files(cache)
    whole = file.read_bytes()
    for row, j in ((3, 0), (11, 2), (19, 5)):
        at = whole.index(summary[row, j].half().numpy().tobytes())
        file.write_bytes(whole[: at + 7] + bytes([whole[at + 7] ^ 16]) + whole[at + 8 :])
        damaged = SummaryCache.open(cache.path)
        assert tools.verify(damaged)["damaged"] == [ids[row]]
        with pytest.raises(ValueError, match=f"damaged at {ids[row]}"):
            damaged.get([ids[0], ids[row]])
        damaged.get([ids[0]])
    file.write_bytes(whole)
    assert tools.verify(SummaryCache.open(cache.path))["ok"]


@pytest.mark.parametrize("place", ["id", "source", "sha256 of the file", "sha256 of the summary"])
def test_a_summary_under_a_wrong_name_is_found(cache, place):
    """The checksum covers what is said of the image: a flipped byte there would give another image's answers."""
    ids, summary, vectors = rows(20)
    cache.add(ids, summary, vectors, about(ids))
    (file,) = Path(cache.path).glob(f"{'summaries' if 'summary' in place else 'files'}.lance/data/*")
    whole = file.read_bytes()
    at = whole.index({"id": b"0-7", "source": b"/nowhere/0-7"}.get(place, content("0-7").encode()))
    file.write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    assert not tools.verify(SummaryCache.open(cache.path))["ok"]


def test_faults_of_the_other_table_and_of_the_index_are_found(cache):
    ids, summary, vectors = rows(300)
    cache.add(ids, summary, vectors, about(ids))
    cache.skip([{"id": "bad", "reason": "broken", "source": "x", "bytes": 1, "modified": 1}])
    build(cache)
    assert tools.verify(cache)["ok"]
    for pattern in ("files.lance/data/*", "summaries.lance/_indices/*/*"):
        file = max(Path(cache.path).glob(pattern), key=lambda f: f.stat().st_size)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert not tools.verify(SummaryCache.open(cache.path))["ok"], pattern
        file.write_bytes(whole)


def test_a_create_that_was_killed_is_begun_again(tmp_path):
    """Tables are there once they have a manifest; what a killed `create` left is no cache, and in nobody's way."""
    path = tmp_path / "a.cache"
    SummaryCache.create(path, SETTINGS)
    for manifest in (path / "commits.lance" / "_versions").iterdir():
        manifest.unlink()
    with pytest.raises(ValueError, match="is not a cache"):
        SummaryCache.open(path)
    cache = SummaryCache.create(path, SETTINGS)
    cache.add(*rows(3), about(rows(3)[0]))
    assert len(cache) == 3


def test_fewer_tokens_read_fewer_bytes(tmp_path):
    """By the kernel's own count."""
    wide = replace(SETTINGS, k=32, size=512)
    cache = SummaryCache.create(tmp_path / "wide.cache", wide)
    summary = torch.randn(64, 32, 512)
    names = [str(i) for i in range(64)]
    cache.add(names, summary, summary.mean(1), about(names))

    def read(k: int) -> int:
        def count() -> int:
            return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

        opened = SummaryCache.open(cache.path)
        before = count()
        assert torch.equal(opened.get([str(i) for i in range(64)], k), summary[:, :k].half().float())
        return count() - before

    if not Path("/proc/self/io").exists():
        pytest.skip("the kernel does not count")
    read(32)
    assert read(4) < read(16) / 2 < read(32) / 2


def test_moving_makes_no_doubles(cache):
    """A moved file whose new name is taken already, and a copy: one row each, of the right content, verified."""
    ids, summary, vectors = rows(4)
    cache.add(ids, summary, vectors, about(ids))
    own = about(ids)
    moved = {**own[1], "sha256": own[0]["sha256"], "root": "/nowhere", "id": ids[1]}
    copy = {**own[2], "source": "/nowhere/copy", "root": "/nowhere", "id": "copy"}
    cache.commit(entries=[moved, copy], gone=["/nowhere/0-0", "/nowhere/absent"])
    assert sorted(row["id"] for row in cache.about(["id"])) == sorted([ids[1], ids[2], ids[3], "copy"])
    assert torch.equal(cache.get([ids[1], "copy"]), summary[[0, 2]].half().float())
    assert tools.verify(cache)["ok"]


def test_what_cannot_be_reached_is_not_forgotten(cache, tmp_path):
    """A drive that is away for a day costs nothing; a file that was read and is broken replaces what was there."""
    ids, summary, vectors = rows(2)
    (tmp_path / "photos").mkdir()
    own = [{**row, "source": f"{tmp_path}/photos/{row['source'][9:]}"} for row in about(ids)]
    cache.add(ids, summary, vectors, own)
    entries = [
        {"id": name, "reason": "gone", "source": row["source"], "bytes": 0} for name, row in zip(ids, own, strict=True)
    ]
    cache.skip(entries[:1], broken=False)
    assert len(cache) == 2 and len(cache.skipped()) == 1
    cache.skip(entries[1:])
    assert [row["id"] for row in cache.about(["id"])] == [ids[0]]
    assert tools.prune(cache) == {"removed": 2, "rows": 0} and not cache.skipped()


def test_a_truncated_file_is_told_not_guessed(cache):
    ids, summary, vectors = rows(20)
    cache.add(ids, summary, vectors, about(ids))
    (file,) = data_files(cache)
    file.write_bytes(file.read_bytes()[:-100])
    assert not tools.verify(SummaryCache.open(cache.path))["ok"]
    with pytest.raises(ValueError, match="missing or cut"):
        SummaryCache.open(cache.path).get(ids[:1])


def test_killed_writers_leave_whole_commits(tmp_path):
    """kill -9 while it writes: what was told to be there is there, the rest is not or is whole; verify passes."""
    assert kills(tmp_path / "a.cache", 4)["commits"] > 0


def test_several_writers_are_as_one(tmp_path):
    assert together(tmp_path / "a.cache", 3, commits=10)["rows"] == 480


FULL = """
import resource, signal, sys
from torture_rows import SETTINGS, about, rows
from llava_fwd2bot.cache.reader import SummaryCache
cache = SummaryCache.create(sys.argv[1], SETTINGS)
cache.add(*rows(16), about(rows(16)[0]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    cache.add(*rows(500, 1), about(rows(500, 1)[0]))
except OSError as error:
    print(error)
"""


def test_a_full_disk_changes_nothing(tmp_path):
    """No file may grow beyond 4 KiB, which is how a full disk looks to a writer."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SCRIPTS, *sys.path])}
    command = [sys.executable, "-c", FULL, str(tmp_path / "a.cache")]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert "could not be written" in said and "no image in it is changed" in said
    cache = SummaryCache.open(tmp_path / "a.cache")
    assert len(cache) == 16 and tools.verify(cache)["ok"]


def test_merge_vacuum_and_stats(cache, tmp_path):
    """Joining takes what is new; afterwards the same rows in fewer files."""
    other = SummaryCache.create(tmp_path / "b.cache", SETTINGS)
    for seed in range(3):
        cache.add(*rows(20, seed), about(rows(20, seed)[0]))
    other.add(*rows(20, 2), about(rows(20, 2)[0]))
    other.add(*rows(20, 3), about(rows(20, 3)[0]))
    other.skip([{"id": "bad", "reason": "broken", "source": "x", "bytes": 1, "modified": 1}])
    assert tools.merge(cache, other) == {"added": 20, "rows": 80}
    assert tools.merge(cache, other)["added"] == 0 and cache.skipped()[0]["reason"] == "broken"
    kept = tools.optimize(cache)  # small files were joined, and the joined ones stay for an hour
    assert kept["bytes"] > kept["bytes_before"] and "--older-than 0" in kept["note"]
    found = tools.optimize(cache, older_than=0)
    assert "note" not in found and found["rows"] == 80 and found["bytes"] < found["bytes_before"]
    assert tools.verify(cache)["ok"] and len(data_files(cache)) == 1
    assert torch.equal(cache.get(["3-5"])[0], rows(20, 3)[1][5].half().float())
    stats = tools.stats(cache)
    assert stats["rows"] == 80 and stats["bytes_per_image"] == K * D * 2 and stats["bytes_per_source_image"] == 10
    other.add(["0-1"], *(x[:1] for x in rows(20, 7)[1:]), about(["0-1"], 9))
    with pytest.raises(ValueError, match="/nowhere/0-1 is one image in"):
        tools.merge(cache, other)
    alien = SummaryCache.create(tmp_path / "c.cache", replace(SETTINGS, fingerprint="e" * 64))
    with pytest.raises(ValueError, match="cannot be joined"):
        tools.merge(cache, alien)


def test_the_index_finds_what_brute_force_finds(cache):
    """Of 2,000 rows on 50 heaps; and rows that came after the index was built are found as well."""
    heaps = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    ids, summary, _ = rows(2000)
    summary = summary + 2 * heaps[torch.arange(2000) % 50][:, None]
    vectors = normalize(summary.mean(1), dim=-1)
    cache.add(ids, summary, vectors, about(ids))
    assert build(cache)["rows"] == 2000
    right = 0
    for i in range(20):
        exact = {hit["id"] for hit in cache.search(vectors[i], exact=True)}
        right += len(exact & {hit["id"] for hit in cache.search(vectors[i], exact=False)})
    assert right >= 190
    late = rows(1, 9)
    cache.add(*late, about(late[0]))
    assert cache.search(late[2][0], top=1, exact=False)[0]["id"] == "9-0"
    with pytest.raises(ValueError, match="an index needs 256"):
        build(SummaryCache.create(Path(cache.path).parent / "small", SETTINGS))
