"""Text files as other programs write them: one reader for all, and errors that say where."""

from __future__ import annotations

import json
import os

import pytest

from llava_fwd2bot.files.records import read_records
from llava_fwd2bot.files.text import json_line, one_line, read_any_json, read_lines, read_table, read_text, spelled
from llava_fwd2bot.files.writing import write_json, write_text

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
RECORDS = [{"id": 1, "text": "für Élise\u2028 日本"}, {"id": 2, "text": "b"}]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists(tmp_path, encoding, end):
    """Notepad's list: its first picture did not exist, being called by the mark and its name."""
    (tmp_path / "l.txt").write_bytes(end.join(["a.jpg", "b\u2028ü.jpg", ""]).encode(encoding))
    assert read_lines(tmp_path / "l.txt") == ["a.jpg", "b\u2028ü.jpg", ""]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_and_json_lines(tmp_path, encoding, end):
    text = json.dumps(RECORDS, ensure_ascii=False, indent=1).replace("\n", end)
    (tmp_path / "x.json").write_bytes(text.encode(encoding))
    lines = "".join(json.dumps(r, ensure_ascii=False) + end for r in RECORDS)
    (tmp_path / "x.jsonl").write_bytes(lines.encode(encoding))
    assert read_any_json(tmp_path / "x.json") == read_records(tmp_path / "x.json") == RECORDS
    assert read_records(tmp_path / "x.jsonl") == RECORDS


def test_joined_files_have_marks_within(tmp_path):
    """`cat a.jsonl b.jsonl` of two files with a byte order mark."""
    part = b"\xef\xbb\xbf" + json.dumps(RECORDS[1]).encode() + b"\n"
    (tmp_path / "x.jsonl").write_bytes(part * 2)
    assert read_records(tmp_path / "x.jsonl") == [RECORDS[1]] * 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables(tmp_path, encoding):
    (tmp_path / "t.tsv").write_bytes('index\tq\r\n1\t"a\r\nb"\r\n2\tü\r\n'.encode(encoding))
    assert list(read_table(tmp_path / "t.tsv")) == [(1, {"index": "1", "q": "a\r\nb"}), (2, {"index": "2", "q": "ü"})]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("l.txt", "a.jpg\nbü.jpg\n".encode("latin-1"), r"l.txt: not UTF-8 text \(byte 7\) at line 2"),
        ("l.txt", b"a.jpg\nb\0.jpg", r"l.txt: line 2 holds a NUL"),
        ("l.txt", b"\xff\xfea\0b", r"l.txt: not UTF-8 text \(byte 0\) at line 1, and as UTF-16 it is damaged"),
        ("x.json", b"[" * 100_000, r"x.json: not JSON that can be read at line 1: it is nested too deeply"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xfc"}\n', r"x.jsonl: not UTF-8 text \(byte 16\) at line 2"),
        ("t.tsv", b"a\tb\n1\t2\n\xfc\t3\n", r"t.tsv: not UTF-8 text \(byte 8\) at line 3"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, told):
    """A message without a file sends people through all that they gave."""
    (tmp_path / name).write_bytes(content)
    read = {".txt": read_text, ".tsv": lambda path: list(read_table(path))}.get((tmp_path / name).suffix, read_records)
    with pytest.raises(ValueError, match=told):
        read(tmp_path / name)


def test_studies_too(tmp_path):
    """A YAML that does not parse ended in a traceback, and named no file."""
    study = pytest.importorskip("eval.studies.study")
    (tmp_path / "s.yaml").write_text("rows: [\n")
    with pytest.raises(ValueError, match=r"s.yaml is not YAML: (.|\n)*line 2"):
        study.Study.read(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_bytes("rows: 1".encode("utf-16"))
    with pytest.raises(ValueError, match="s.yaml is not a study"):
        study.Study.read(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    "end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\0"]
)
def test_one_line_and_one_line_of_json(end):
    """What any program takes for the end of a line would move all later lines."""
    assert one_line(f"a{end}b").split() == ["a", "b"]
    written = json_line({"text": f"a{end}b"})
    assert len(written.splitlines()) == 1 and json.loads(written) == {"text": f"a{end}b"}


def test_halves_of_characters_can_be_written():
    """JSON may hold "\\ud83d" alone, which no file can: a run died while it wrote its answers."""
    written = json_line({"text": "\ud83d"})
    assert json.loads(written.encode("utf-8")) == {"text": "\ud83d"}
    one_line("\ud83d").encode("utf-8")


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    """Python has their bytes as surrogates, which no UTF-8 file takes: JSON gives them back, a text spells them out."""
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.jpg")
    write_json(tmp_path / "x.json", {"name": name, name: ["ü\u2028", "\ud83d"]})
    assert read_any_json(tmp_path / "x.json") == {"name": name, name: ["ü\u2028", "\ud83d"]}
    assert "ü" in read_text(tmp_path / "x.json")
    write_text(tmp_path / "x.md", f"Data: {name}, \ud83d")
    assert read_text(tmp_path / "x.md") == "Data: caf\\xe9 é.jpg, \\ud83d" and spelled(name) == "caf\\xe9 é.jpg"
