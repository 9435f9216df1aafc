"""Tables of records: parquet files, and folders that Hugging Face's datasets wrote; the extra [datasets].

The rows stay in memory-mapped Arrow files, images that are in the table included: each is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..extras import require

_AT_ONCE = 1000  # rows


def is_table(path: str | Path) -> bool:
    """Whether `path` is a parquet file or a folder; what a folder holds is looked at by `Table`."""
    path = Path(path)
    return path.is_dir() or path.suffix == ".parquet"


class Table:
    """The records of a parquet file, of a folder of parquet files, or of a folder by `datasets.save_to_disk`.

    Args:
        path: the file or folder. Parquet is converted once, into the cache of `datasets`.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the folder holds neither, or several splits without "train" (the message says what it holds), or
            the table is empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        datasets = require("datasets", "datasets", f"{path}, a table,")
        found = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        if {"state.json", "dataset_dict.json"} & set(found):
            rows = datasets.load_from_disk(str(self.path))
        else:
            files = sorted(map(str, self.path.rglob("*.parquet"))) if self.path.is_dir() else [str(self.path)]
            if not files:
                shown = ", ".join(found[:8]) or "nothing"
                raise ValueError(
                    f"{path} is a folder without parquet files, and was not written by datasets.save_to_disk: it holds "
                    f"{shown}. Name a .json, .jsonl, .parquet or .tar file, or such a folder."
                )
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
        if isinstance(rows, dict):
            if "train" not in rows and len(rows) > 1:
                raise ValueError(f"{path} has the splits {', '.join(rows)}, and no 'train': name the folder of one.")
            rows = rows["train"] if "train" in rows else next(iter(rows.values()))
        self._rows = rows.with_format("arrow")
        if not len(self._rows):
            raise ValueError(f"{path}: no records")
        # as datasets has images: their bytes, or where they are
        self._images = [f.name for f in self._rows.data.schema if _is_images(f.type)]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records; an image that is in the table is named by its place, which `image` reads."""
        for start in range(0, len(self), _AT_ONCE):
            part = self._rows[start : start + _AT_ONCE]
            plain = part.select([name for name in part.column_names if name not in self._images]).to_pylist()
            names = {column: self._names(part, column, start) for column in self._images}
            for i, record in enumerate(plain):
                yield {**_without_none(record), **{c: of[i] for c, of in names.items() if of[i]}}

    def _names(self, part: Any, column: str, start: int) -> list[list[str]]:
        import pyarrow.compute as pc

        found = []
        for i, value in enumerate(part.column(column).combine_chunks()):
            images = value.values if hasattr(value, "values") and not hasattr(value, "keys") else [value]
            row = []
            for at, image in enumerate(images if value.is_valid else ()):
                if not image.is_valid:
                    continue
                stored = pc.is_valid(image["bytes"]).as_py()  # pyright: ignore[reportAttributeAccessIssue]
                row.append(f"{self.path.name}#{column}.{start + i}.{at}" if stored else image["path"].as_py())
            found.append(row)
        return found

    def holds(self, name: str) -> bool:
        """Whether `name` is of an image that is in the table."""
        prefix, _, place = name.rpartition("#")
        return prefix == self.path.name and place.rsplit(".", 2)[0] in self._images

    def image(self, name: str) -> bytes | None:
        """The file's bytes of an image that is in the table; None for the name of a file."""
        if not self.holds(name):
            return None
        column, row, at = name.rpartition("#")[2].rsplit(".", 2)
        value = self._rows[int(row) : int(row) + 1].column(column)[0]
        image = value if hasattr(value, "keys") else value[int(at)]
        return image["bytes"].as_py()


def _is_images(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def _without_none(value: Any) -> Any:
    """A record as it was before Arrow gave each struct the fields of all others."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value
