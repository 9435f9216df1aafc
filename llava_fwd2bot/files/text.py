"""Text files that people bring along: lists, JSON, JSON lines, tables; one way to read them all.

Windows' programs write a byte order mark, UTF-16, and CRLF. All of it is read. An error names the file and
the line.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's, so it comes first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What some program takes for the end of a line: Python's str.splitlines, Java's tokenizers, the terminal. And NUL, and
# halves of surrogate pairs, which no encoder writes.
LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029\0\ud800-\udfff]")
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte 0x80 to 0xff, as Python has it in the names of files
_RAW_IN_JSON = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with `head`: by its byte order mark, by its zero bytes, else UTF-8."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    # UTF-16 without a mark: every other byte of an ASCII character is zero
    found = json.detect_encoding(head[:4])
    return "utf-8" if found.startswith("utf-8") else found


def decode_text(content: bytes, path: str | os.PathLike) -> str:
    """`content` of the file `path` as text; the line ends stay as they are.

    Raises:
        ValueError: it is no text; the message names the file and the line.
    """
    encoding = encoding_of(content[:4])
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_text(path, content, encoding, error) from error
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{path}: line {line} holds a NUL character, which no text file has; save it as UTF-8")
    return text


def read_text(path: str | os.PathLike) -> str:
    """The text of the file `path`; errors as of `decode_text`."""
    return decode_text(Path(path).read_bytes(), path)


def is_utf8(name: str) -> bool:
    """Whether the name of a file is UTF-8; other bytes stand in it as surrogates, which no text file can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def spelled(text: str) -> str:
    """A text with the bytes of file names that are not UTF-8 spelled out, as in "caf\\xe9.jpg"."""
    text = _UNDECODED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of the file `path`, ended by LF, CRLF or CR alone: a file's name may hold any other separator."""
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.removeprefix("\ufeff") for line in lines]  # files with marks may have been joined


def parse_json(text: str, path: str | os.PathLike, line: int | None = None) -> Any:
    """The JSON value `text` of the file `path`.

    Args:
        line: the number of this line, where each is a value of its own.

    Raises:
        ValueError: it is no JSON; the message names the file, the line and the column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}, column {error.colno} (char {error.pos})"
        hint = "; one object per line? Name it .jsonl" if error.msg == "Extra data" and line is None else ""
        raise ValueError(f"{path}: not JSON at {where}: {error.msg}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON that can be read at line {line or 1}: it is nested too deeply") from error


def read_table(path: str | os.PathLike, delimiter: str = "\t") -> Iterator[tuple[int, dict[str | None, str]]]:
    """(number, fields by their column's name) of each row of a table whose first row names the columns, from 1 on.

    It is read row by row: tables of benchmarks hold their images as text.

    Raises:
        ValueError: it is no such table; the message names the file and the line.
    """
    path = Path(path)
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    with path.open(encoding=encoding, newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        try:
            yield from enumerate(rows, 1)
        except csv.Error as error:
            raise ValueError(f"{path}: not a table at line {rows.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            # it is decoded in large blocks, so the reader cannot say in which line
            raise _not_text(path, path.read_bytes(), encoding, error) from error


def one_line(text: str) -> str:
    """`text` without anything that a program may take for the end of a line; each such character becomes a space."""
    return LINE_ENDS.sub(" ", text)


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, other letters as they are; escaped are what other programs take for a line end, and surrogates.

    A file name that is not UTF-8 holds surrogates: no file of UTF-8 takes them, and their escapes are read back as they
    were.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _RAW_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def json_line(value: Any) -> str:
    """`json_text` of `value` as one line with its newline."""
    return json_text(value) + "\n"


def _not_text(path: str | os.PathLike, content: bytes, encoding: str, error: UnicodeDecodeError) -> ValueError:
    # the place by UTF-8, whatever was tried: of a damaged UTF-16 file the mark itself is where to look
    try:
        content.decode("utf-8")
        start = error.start
    except UnicodeDecodeError as plain:
        start = plain.start
    line = content.count(b"\n", 0, start) + 1
    tried = "" if encoding.startswith("utf-8") else f", and as {encoding.upper()} it is damaged ({error.reason})"
    return ValueError(f"{path}: not UTF-8 text (byte {start}) at line {line}{tried}; save it as UTF-8")


def read_any_json(path: str | os.PathLike) -> Any:
    """What JSON `path` holds; ValueError with the place of the fault when it is none."""
    try:
        return parse_json(read_text(path), path)
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path} is not valid JSON ({why}). It is damaged: restore it or make it again.") from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from `path`; ValueError with the place of the fault when it is none."""
    values = read_any_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object. It is damaged: restore it.")
    return values
