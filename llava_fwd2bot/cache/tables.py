"""The three tables: their columns, their keys and indexes, and how they are made and opened.

Keys are unenforced primary keys, by which LanceDB finds that two writers put in the same row, also where there is no
lock. Scalar indexes are there from the first commit, so that a look-up does not scan.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ..version import __version__
from .checksum import OWN
from .format import (
    COMMITS,
    FILES,
    FORMAT,
    SETTINGS,
    SUMMARIES,
    TABLES,
    CacheSettings,
    blocks,
    column,
    guarded,
    lancedb_module,
)
from .sizes import bytes_per_token

KEYS = {SUMMARIES: "sha256", FILES: "source"}
INDEXED = {SUMMARIES: ("sha256",), FILES: ("source", "id", "sha256")}
OK, BROKEN, LOST = "ok", "broken", "lost"  # status of a file: has a summary; cannot be used; its summary was damaged
_KEY = {b"lance-schema:unenforced-primary-key": b"true"}


def summaries_schema(settings: CacheSettings) -> Any:
    import pyarrow as pa

    token, parts = bytes_per_token(settings.codec, settings.size), blocks(settings.k)
    return pa.schema(
        [
            pa.field("sha256", pa.string(), nullable=False, metadata=_KEY),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("sums", pa.binary(4 * (OWN + len(parts)))),
            ("embedding", pa.list_(pa.float16(), settings.size)),
            *((column(b), pa.binary((b[1] - b[0]) * token)) for b in parts),
        ],
        metadata=_metadata_of(settings),
    )


def files_schema(settings: CacheSettings) -> Any:
    """`root` and `id` are the folder that was given and the path below it; `source` is both, and the key.

    `reason`: why the file could not be used, or not be reached, the last time. `taken` to `longitude` are of its EXIF.
    """
    import pyarrow as pa

    time = pa.timestamp("us", tz="UTC")
    return pa.schema(
        [
            pa.field("source", pa.string(), nullable=False, metadata=_KEY),
            *((name, pa.string()) for name in ("root", "id", "sha256", "status", "reason")),
            ("bytes", pa.int64()),
            ("modified", pa.int64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("added", time),
            ("taken", pa.string()),  # 2024-12-31 23:59:59, which orders and compares as text does
            ("camera", pa.string()),
            ("latitude", pa.float64()),
            ("longitude", pa.float64()),
            ("crc32", pa.int64()),
        ],
        metadata=_metadata_of(settings),
    )


def commits_schema(settings: CacheSettings) -> Any:
    import pyarrow as pa

    numbers = ("summaries_version", "summaries_rows", "files_version", "files_rows")
    fields = [("at", pa.timestamp("us", tz="UTC")), ("what", pa.string()), *((n, pa.int64()) for n in numbers)]
    return pa.schema(fields, metadata=_metadata_of(settings))


SCHEMAS = {SUMMARIES: summaries_schema, FILES: files_schema, COMMITS: commits_schema}
EXIF = ("taken", "camera", "latitude", "longitude")
# what a search may tell of a hit
ABOUT = ("id", "sha256", "source", "root", "bytes", "modified", "width", "height", "added", *EXIF)
COLUMNS = ("source", "sha256", "bytes", "width", "height", "added", *EXIF)  # of a hit, on the command line
SYSTEM = (*ABOUT, "status", "reason", "crc32")  # the columns of `files` that are not a user's


def users_columns(schema: Any) -> list[str]:
    return [name for name in schema.names if name not in SYSTEM]


def create_tables(path: str, settings: CacheSettings, names: tuple[str, ...] = TABLES) -> None:
    from lancedb.index import BTree

    database = lancedb_module().connect(path)
    for name in names:
        table = database.create_table(name, schema=SCHEMAS[name](settings), exist_ok=True)
        there = {index.columns[0] for index in table.list_indices()}
        for own in INDEXED.get(name, ()):
            if own not in there:
                table.create_index(own, config=BTree(), replace=True)


def open_tables(path: str) -> dict[str, Any]:
    """{name: table}; DamagedCache where one cannot be opened."""
    database = lancedb_module().connect(path)
    with guarded(path):
        return {name: database.open_table(name) for name in TABLES}


def settings_in(table: Any, path: str) -> dict[str, Any]:
    """The settings in a table's metadata; ValueError where there are none."""
    with guarded(path):
        meta = table.schema.metadata or {}
    try:
        return json.loads(meta[SETTINGS])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is a LanceDB database, but not a cache of summaries.") from error


def _metadata_of(settings: CacheSettings) -> dict[bytes, bytes]:
    return {SETTINGS: json.dumps(asdict(settings)).encode()}


def checked_settings(path: str, values: dict[str, Any], fingerprint: str | None) -> CacheSettings:
    """ValueError where they are of a later version, or of another model than `fingerprint`."""
    try:
        settings = CacheSettings(**values)
    except TypeError:  # a setting that this version does not know
        settings = None
    if settings is None or settings.format > FORMAT:
        raise ValueError(
            f"{path} was made by llava_fwd2bot {values.get('version')}, in a format that {__version__} does not "
            "know: upgrade llava_fwd2bot."
        )
    if fingerprint is not None and settings.fingerprint != fingerprint:
        raise ValueError(
            f"{path} was made with another model ({settings.model or settings.fingerprint[:12]}): summaries are "
            "read only by the model that made them. Name that one by --model, or choose another --cache."
        )
    return settings
