"""The results of a study as rows of {task, row, k, seed, item, group, score}, in one file of JSON lines.

A line holds the rows of one cell: a task, measured on one row of the study at one k with one seed. What all cells of a
task share stands once: the group of each item, which is its picture, and the parts of the task that have figures of
their own.

    {"task": "exists", "groups": [0, 0, 1, …], "parts": {"dogs": [0, 4, …]}}
    {"task": "exists", "row": "pool", "k": 4, "seed": 0, "scores": "0110…" or [0.31, …], "about": {…}}

`about` says what the cell was made of, so that a result of another checkpoint or of other data is not taken for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_fwd2bot.extras import require
from llava_fwd2bot.files.resumable import resumable_lines

Key = tuple[str, str, int, int]  # task, row, k (0: all dense tokens), seed


@dataclass
class Task:
    """The items of a task: the group of each, and parts by the numbers of their items."""

    groups: list[Any]
    parts: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Cell:
    """One score per item, in [0, 1] where it is a share."""

    task: str
    row: str
    k: int
    seed: int
    scores: Sequence[float]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.task, self.row, self.k, self.seed


class Rows:
    """The rows in `file`, to which more can be added, also by several processes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tasks: dict[str, Task] = {}
        self.cells: dict[Key, Cell] = {}
        self.read()

    def read(self) -> None:
        """Reads what other processes have added since.

        Raises:
            ValueError: the file was not written by a study, or a cell has more or fewer scores than its task has items.
        """
        if not self.file.exists():
            return
        with self._lock():
            lines = resumable_lines(self.file)
        for number, line in enumerate(lines, 1):
            try:
                if "groups" in line:
                    self.tasks[line["task"]] = Task(line["groups"], line.get("parts", {}))
                    continue
                scores = [float(x) for x in line["scores"]]
                key = line["task"], line["row"], line["k"], line["seed"]
                count = len(self.tasks[line["task"]].groups)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.file}, line {number} holds no rows of a study: {error!r}.") from error
            if len(scores) != count:
                raise ValueError(f"{self.file}, line {number}: {len(scores)} scores of {count} items.")
            self.cells[key] = Cell(*key, np.asarray(scores), line.get("about", {}))

    def add_task(self, name: str, groups: Sequence[Any], parts: dict[str, list[int]] | None = None) -> None:
        """Adds the items of a task, unless they are known.

        Raises:
            ValueError: the file holds other items of that name.
        """
        task = Task(list(groups), parts or {})
        if name in self.tasks:
            if self.tasks[name] != task:
                raise ValueError(f"{self.file} has other items of {name!r}: give another --results, or remove it.")
            return
        self.tasks[name] = task
        self._write({"task": name, "groups": task.groups} | ({"parts": task.parts} if task.parts else {}))

    def add(self, cell: Cell) -> None:
        """Adds a cell; the last of one key counts."""
        scores = [round(float(x), 5) for x in cell.scores]
        count = len(self.tasks[cell.task].groups)
        if len(scores) != count:
            raise ValueError(f"{cell.row} has {len(scores)} scores of {count} items of {cell.task!r}.")
        packed = "".join(str(int(x)) for x in scores) if all(x in (0, 1) for x in scores) else scores
        self._write(
            dict(zip(("task", "row", "k", "seed"), cell.key, strict=True))
            | {"scores": packed}
            | ({"about": cell.about} if cell.about else {})
        )
        self.cells[cell.key] = Cell(*cell.key, np.asarray(scores), cell.about)

    def has(self, key: Key, about: dict[str, Any]) -> bool:
        """Whether a cell is there.

        Raises:
            ValueError: it was made of something else than `about`.
        """
        if key not in self.cells:
            return False
        found = self.cells[key].about
        wrong = [f"{n} {found.get(n)!r}, not {v!r}" for n, v in about.items() if found.get(n, v) != v]
        if wrong:
            name = f"{key[1]}, {key[0]}, k = {key[2]}, seed {key[3]}"
            raise ValueError(f"{self.file}: {name} is a result of {'; '.join(wrong)}. Give another --results.")
        return True

    def _write(self, line: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(), self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")

    def _lock(self) -> Any:
        return require("filelock", "cache", "A study").FileLock(self.file.with_name(f".{self.file.name}.lock"))
