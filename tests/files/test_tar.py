"""Tar files, compressed or not: every member or an error that says what is wrong; nothing vanishes without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import tarfile
from collections import Counter
from functools import partial
from importlib import import_module
from itertools import pairwise

import pytest

from llava_fwd2bot.cache.other_sources import of_tar
from llava_fwd2bot.files.tar import Member, members

PACK = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
try:
    zstd = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    PACK["zst"] = partial(zstd.compress, options={zstd.CompressionParameter.checksum_flag: 1})  # as the tool zstd does
except ImportError:
    pass  # backports.zstd is not installed; what is told then has a test of its own
DAMAGE = r"x.tar: no tar file, or it is cut off or damaged \(.*copy or download it again"


def tar(*names: str, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file whose members hold their own names."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as archive:
        for name in names:
            data = name.encode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def read(tmp_path):
    """read(bytes) -> {name: content} of a tar file that has these bytes."""

    def read(content: bytes) -> dict[str, bytes]:
        path = tmp_path / "x.tar"
        path.write_bytes(content)
        return {member.name: member.read() for member in members(path)}

    return read


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_members_are_given(read, packed, form):
    """Also by the long names of two formats, and where the zeros at the end were cut to the end mark's first block."""
    names = ["a.jpg", "b.jpg", *(["n" * 150] if form != tarfile.USTAR_FORMAT else [])]
    whole = tar(*names, form=form)
    assert read(PACK[packed](whole)) == {name: name.encode() for name in names}
    assert read(PACK[packed](whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512 + 512))) == read(whole)
    assert read(PACK[packed](tar())) == {}


@pytest.mark.parametrize("packed", PACK)
def test_data_after_the_end_mark_are_an_error(read, packed):
    """tarfile stops at a block of zeros: `cat a.tar b.tar` lost b.tar, and a zeroed header all that followed."""
    one, other = tar("a.jpg", "b.jpg"), tar("c.jpg")
    with pytest.raises(ValueError, match=f"x.tar: data after the tar's end mark at byte {len(one):,}.*concatenated"):
        read(PACK[packed](one + other))
    with pytest.raises(ValueError, match=r"after the tar's end mark at byte 1,536.*pack it again"):
        read(PACK[packed](one[:1024] + bytes(512) + one[1536:]))  # the header of b.jpg


def test_a_second_stream_is_told(read):
    """Compressed tar files that are joined: gzip reads on, and finds the second tar file."""
    with pytest.raises(ValueError, match="of what gzip compressed: it is concatenated"):
        read(gzip.compress(tar("a.jpg")) + gzip.compress(tar("b.jpg")))


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_is_an_error(read, packed, form):
    """tarfile took it for the end where it was not the first; also the headers that hold a long name."""
    names = ["a.jpg", "b.jpg", "c" * 150 if form != tarfile.USTAR_FORMAT else "c.jpg", "d.jpg"]
    whole = tar(*names, form=form)
    long = {tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE}
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 4 + sum(whole[at + 156 : at + 157] in long for at in headers) and len(headers) > 3
    for at in headers:
        with pytest.raises(ValueError, match=DAMAGE):
            read(PACK[packed](whole[: at + 3] + b"\xff" + whole[at + 4 :]))
    with pytest.raises(ValueError, match=DAMAGE):  # a size that leads back: its header would be read for ever
        size = tarfile.TarInfo("a.jpg")
        size.size = -1024
        read(PACK[packed](size.tobuf(tarfile.GNU_FORMAT) + whole))


@pytest.mark.parametrize("packed", PACK)
def test_a_tar_file_that_was_cut_is_an_error(tmp_path, packed):
    """Between two members too, where no byte of a member is missing; it is a whole compressed file then."""
    whole = tar("a.jpg", "b.jpg", "c.jpg")
    for at in (0, 100, 512, 600, 1024, 1100, 2048, 3 * 1024):
        (tmp_path / "x.tar").write_bytes(PACK[packed](whole[:at]))
        with pytest.raises(ValueError, match=DAMAGE):
            list(members(tmp_path / "x.tar"))


@pytest.mark.parametrize("packed", [packed for packed in PACK if packed != "tar"])
def test_a_compressed_stream_that_was_cut_or_changed_is_an_error(read, packed):
    """Cut anywhere, a wrong checksum at its end included, which is read only after the last member."""
    whole = PACK[packed](tar(*map("{}.jpg".format, range(50))))
    for at in range(20, len(whole), 7):
        with pytest.raises(ValueError, match=DAMAGE):
            read(whole[:at])
    ends = {"gz": -8, "bz2": -5, "xz": -30, "zst": -2}  # in the checksum
    at = len(whole) + ends[packed]
    with pytest.raises(ValueError, match=DAMAGE):
        read(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    for at in range(12, len(whole) - 12, len(whole) // 20):  # whatever changes: an error, or all is there as it was
        try:
            assert read(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]) == read(whole)
        except ValueError as error:
            assert "x.tar: " in str(error)


def test_links_are_given_with_what_to_do(tmp_path):
    """A link has no bytes in a tar, and vanished without a word; the cache skips it with its reason."""
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "b.jpg").hardlink_to(tmp_path / "a.jpg")
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path, "./", filter=lambda info: None if info.name.endswith(".tar") else info)
    found = {member.name: member for member in members(tmp_path / "x.tar")}
    told = {name: member.problem for name, member in found.items()}
    hard = "is a hard link in the tar; pack it with --hard-dereference"
    assert sorted(told) == ["a.jpg", "b.jpg", "c.jpg"] and told["c.jpg"].startswith("is a symbolic link in the tar")
    assert {told["a.jpg"], told["b.jpg"]} == {None, hard}  # whichever the folder names first is the file
    (link,) = [member for member in found.values() if member.problem == hard]
    with pytest.raises(ValueError, match=f"x.tar/{link.name}: {hard}"):
        link.read()
    entries = {entry.id: entry for entry in of_tar(str(tmp_path / "x.tar"), Counter())}
    assert entries[link.name].problem == f"{tmp_path}/x.tar/{link.name}: {hard}"
    assert sum(entry.problem is None for entry in entries.values()) == 1


@pytest.mark.parametrize("packed", PACK)
def test_a_name_that_is_not_utf8_is_a_problem_in_the_cache(tmp_path, packed):
    """The cache keeps text: as for files, such a member is skipped, and its name spelled out."""
    (tmp_path / "x.tar").write_bytes(PACK[packed](tar("a.jpg", "caf\udce9.jpg", "b.jpg")))
    one, bad, other = of_tar(str(tmp_path / "x.tar"), Counter())
    assert (bad.id, bad.problem) == ("caf\\xe9.jpg", f"{tmp_path}/x.tar/caf\\xe9.jpg: its name is not UTF-8; rename it")
    assert [entry.problem for entry in (one, other)] == [None, None] and other.read() == b"b.jpg"


def test_an_error_of_the_disk_stays_one(tmp_path, monkeypatch):
    """What cannot be opened or read is not called damaged."""
    with pytest.raises(FileNotFoundError):
        list(members(tmp_path / "none.tar"))
    (tmp_path / "x.tar").write_bytes(gzip.compress(tar("a.jpg")))

    def fail(self, size):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gzip.GzipFile, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(members(tmp_path / "x.tar"))


def test_a_compression_that_python_does_not_read_is_named(tmp_path, monkeypatch):
    """zstd came with Python 3.14, and others may be left out of a build."""
    for name in ("compression.zstd", "backports.zstd", "lzma"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "x.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    remedy = "pip install backports.zstd, or unpack it"
    with pytest.raises(ValueError, match=f"x.tar: compressed by zstd, which this Python does not read; {remedy}$"):
        list(members(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(b"\xfd7zXZ\0" + bytes(600))
    with pytest.raises(ValueError, match="x.tar: compressed by xz, which this Python does not read; unpack it$"):
        list(members(tmp_path / "x.tar"))


def test_places_are_in_order(tmp_path):
    """A member's place is that of its bytes, so that it can be read at any time."""
    (tmp_path / "x.tar").write_bytes(tar("a.jpg", "b.jpg", "c.jpg"))
    found: list[Member] = list(members(tmp_path / "x.tar"))
    assert all(one.start + one.size <= other.start for one, other in pairwise(found))
    assert [member.read() for member in reversed(found)] == [b"c.jpg", b"b.jpg", b"a.jpg"]
