"""Every Python and shell block of README.md and docs/ runs here on smol-llava: an example must not fail its reader.

The blocks of a page share a folder and a namespace. `<!-- test: arguments -->` above a block says that it needs what is
not here (7B, a network, LLaVA's own data): its commands are parsed by the real parsers, its Python is compiled and its
imports are made. Output blocks have no language.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from transformers import TrainingArguments

from llava_fwd2bot.checkpoint import load as opening
from llava_fwd2bot.cli.main import main
from llava_fwd2bot.smol import checkpoint_folder

for needed in ("gguf", "lancedb", "skimage"):  # smol-llava, the cache, photographs
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash", "json", "yaml", "toml", "text", "bibtex")
BLOCK = re.compile(r"(<!-- test: (\w+) -->\s*\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"integrations.md": ("sentence_transformers",)}  # what the examples of a page use and the package does not
PHOTOS = {"beach.jpg": "coffee.png", "cat.jpg": "chelsea.png", "rocket.jpg": "rocket.jpg"}


def blocks(page: Path) -> list[tuple[str, str | None, str]]:
    """(language, marker, text) of every block that has a language."""
    return [(m[3], m[2], m[4]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What the pages speak of: photographs, captions, questions, conversations, a trained checkpoint."""
    folder = tmp_path_factory.mktemp("docs")
    source = Path(find_spec("skimage").origin).parent / "data"
    (folder / "photos").mkdir()
    for name, original in PHOTOS.items():
        Image.open(source / original).convert("RGB").resize((224, 224)).save(folder / "photos" / name)
    asked = "Is there a cat in the image?"
    turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": "no"}]
    records = [{"id": n, "image": n, "caption": f"a {n[:-4]}", "conversations": turns} for n in PHOTOS]
    (folder / "train.json").write_text(json.dumps(records))
    questions = [{"question_id": i, "image": n, "text": asked, "answer": "no"} for i, n in enumerate(PHOTOS)]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    pairs = [{"image": n, "captions": [f"a {n[:-4]}", "a photograph"]} for n in PHOTOS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shutil.copytree(checkpoint_folder(), folder / "my-fwd2bot")
    return folder


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """A checkpoint that has been loaded is not loaded again: that would take a third of the time of these tests."""
    known, load = {}, opening.load_fwd2bot

    def remember(path, base=None, **loading):
        key = (Path(path).name, base, *sorted((name, str(value)) for name, value in loading.items()))
        if key not in known:
            known[key] = load(path, base, **loading)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_fwd2bot", remember)
        yield


class Parsed(BaseException):
    """Raised in the place of the work, once a parser has taken the whole command line."""


def theirs(words: list[str]) -> list[str]:
    """What a `fwd2bot llava` command leaves for LLaVA: the flags that its program knows, and their values."""
    if words[1] != "llava":
        return []
    folder = Path(find_spec("llava").origin).parent
    program = folder / "train/train.py" if words[2] == "train" else folder / f"eval/{words[3]}.py"
    known = set(re.findall(r"[A-Za-z][\w-]*", program.read_text(encoding="utf-8"))) | {
        *TrainingArguments.__dataclass_fields__
    }
    return [w for w in words if not w.startswith("--") or w[2:] in known]


def check_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command against its own parser, or against what the repository holds."""
    if ("-m", "llava_fwd2bot") in zip(words, words[1:], strict=False):  # python, torchrun, accelerate launch
        words = ["fwd2bot", *words[words.index("llava_fwd2bot") + 1 :]]
    if words[0] == "fwd2bot":
        if words[1] == "llava" and find_spec("llava") is None:
            return
        parse, depth = argparse.ArgumentParser.parse_known_args, []

        def once(parser, *args, **kwargs):
            depth.append(parser)  # sub-parsers come through here too
            try:
                found, extras = parse(parser, *args, **kwargs)
            finally:
                depth.pop()
            if not depth:
                raise Parsed([x for x in extras if x not in theirs(words)])
            return found, extras

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", once)
            patch.setenv("FWD2BOT_TRACEBACK", "1")  # Parsed must come through, as no error of the program would
            with pytest.raises(Parsed) as parsed:
                main(words[1:])
        assert parsed.value.args == ([],), f"{shlex.join(words)}: {parsed.value.args} are not known"
    elif words[:2] == ["pip", "install"]:
        extras = set(re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
        wanted = [name for word in words for part in re.findall(r"\[(.+)\]", word) for name in part.split(",")]
        assert set(wanted) <= extras, f"setup.py has no extra {wanted}"
    else:
        script = next((word for word in words if word.endswith((".py", ".sh")) or word.startswith("eval.")), None)
        assert script or words[0] == "python", f"{words[0]} is not checked: {shlex.join(words)}"
        if script and words[0] in ("bash", "python") and not script.startswith("PATH"):
            path = ROOT / (script.replace(".", "/") + ".py" if script.startswith("eval.") else script)
            path = path if path.is_file() else path.with_suffix("") / "__main__.py"  # a package that is a program
            text = path.read_text()
            flags = [word for word in words if re.match(r"--[a-z]", word)]
            assert path.suffix == ".sh" or all(flag in text for flag in flags), f"{path} does not know all of {flags}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of(page, files, loaded_once, tmp_path, monkeypatch):
    for name in NEEDS.get(page.name, ()):
        pytest.importorskip(name)
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__docs__"}
    for language, marker, text in blocks(page):
        assert marker in (None, "arguments") and language in LANGUAGES
        if language == "python" and marker is None:
            exec(compile(text, str(page), "exec"), names)
        elif language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    exec(ast.unparse(node), {})
        elif language == "bash":
            for words in commands(text):
                if words[0] == "cd":
                    break  # what follows is another checkout's
                if marker is not None:
                    check_arguments(words, monkeypatch)
                    continue
                words = words[3:] if words[:3] == ["python", "-m", "llava_fwd2bot"] else words[words[0] == "fwd2bot" :]
                assert main(words) == 0, f"{page.name}: fwd2bot {shlex.join(words)} failed"
        elif language == "json":
            json.loads(text)
