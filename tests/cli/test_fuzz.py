"""The whole command line under random arguments and random small files.

FWD2BOT_FUZZ=5000 python -m pytest tests/cli/test_fuzz.py    looks further, at random; without it the examples are fixed
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, note, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import llava_fwd2bot.checkpoint.load  # noqa: E402
from llava_fwd2bot.cli.main import COMMANDS, main  # noqa: E402

MORE = int(os.environ.get("FWD2BOT_FUZZ", 0))
ACTIONS = {
    "cache": (
        *("ls", "skipped", "stats", "verify", "repair", "optimize", "rm", "prune", "restore", "dedup", "export"),
        *("import-metadata", "merge", "index", "migrate"),
    ),
    "eval": ("score", "retrieval", "compositionality", "captioning", "answer", "report"),
    "llava": ("train", "eval"),
}


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=MORE or examples,
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint, own_base, processor):
    """A folder of good and bad files, in which all runs; nothing is trained, fetched, shown or watched."""
    folder = tmp_path_factory.mktemp("fuzz")
    loaded = llava_fwd2bot.checkpoint.load.load_fwd2bot(checkpoint)
    with pytest.MonkeyPatch.context() as patch:  # undone also where this fails: other tests load models as well
        patch.chdir(folder)
        patch.delenv("FWD2BOT_TRACEBACK", raising=False)

        def offline(*args, **kwargs):
            raise OSError("the hub is not asked in this test")

        def stop(*args, **kwargs):
            raise ValueError("this test stops here")

        patch.setattr("huggingface_hub.snapshot_download", offline)
        patch.setattr("llava_fwd2bot.checkpoint.load.load_fwd2bot", lambda *args, **kwargs: loaded)
        patch.setattr("llava_fwd2bot.cache.watch.watch", stop)
        patch.setattr("llava_fwd2bot.cache.ray_fill.fill_by_ray", stop)
        patch.setattr("llava_fwd2bot.cli.evaluate.load_model", stop)
        patch.setattr("llava_fwd2bot.training.command.load_for_training", stop)
        patch.setattr("webbrowser.open", lambda url: True)
        if find_spec("fastapi") and find_spec("uvicorn"):
            patch.setattr("llava_fwd2bot.serving.listen.run", stop)
        shutil.copytree(checkpoint, folder / "model")
        for name in ("a.png", "b.jpg"):
            Image.new("RGB", (9, 7), (200, 30, 30)).save(folder / name)
        shutil.copytree(own_base, folder / "base")
        (folder / "empty").write_bytes(b"")
        (folder / "text.txt").write_text("a.png\nnowhere.png\n")
        (folder / "bytes").write_bytes(bytes(range(256)))
        (folder / "list.json").write_text("[1, null, {}]")
        (folder / "deep.json").write_text("[" * 100_000)
        (folder / "records.jsonl").write_text(
            '{"question_id": 1, "image": "a.png", "text": "what?", "answer": "yes"}\n'
        )
        assert main("compress --model model --images a.png b.jpg --output stored --device cpu".split()) == 0
        assert main("compress --model model --images a.png b.jpg --cache photos.cache --device cpu".split()) == 0
        yield folder


@pytest.fixture(scope="module")
def options(place) -> dict[str, list[str]]:
    """The options of each command, out of its own help."""
    found = {}
    capture = pytest.MonkeyPatch()
    for command in COMMANDS:
        words: list[str] = []
        for rest in [[]] + [[action] for action in ACTIONS.get(command, ())]:
            if rest == ["train"]:
                continue
            out = io.StringIO()
            capture.setattr("sys.stdout", out)
            main([command, *rest, "--help"])
            words += re.findall(r"--[a-z][a-z0-9_-]+", out.getvalue())
        found[command] = sorted(set(words) - {"--help"})
    capture.undo()
    return found


NAMES = (
    *("a.png", "b.jpg", "model", "base", "stored", "photos.cache", "empty", "text.txt", "bytes", "list.json"),
    *("deep.json", "records.jsonl", ".", "nowhere", "nobody/nowhere", "smol-llava2", "out/file"),
)
NUMBERS = ("0", "1", "2", "3", "-1", "1e309", "nan", "0.5", "99999999999999999999")
WORDS = (
    *("", " ", "-", "--", "<image>", "<image> <image>", "what is it?", "cpu", "cuda:9", "meta", "float32", "auto"),
    *(
        "int8",
        "id > 3",
        "id = '",
        "pope",
        "gqa",
        "coco",
        "dense",
        "x" * 5000,
        "é\u2028\udcff",
        "https://x.org/a",
    ),
)
values = st.one_of(st.sampled_from(NAMES), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=8))


# command lines that work, but for what the test stops
SOUND = (
    "info model --verbose",
    "info photos.cache",
    "ask --model model --image a.png --max-new-tokens 2 what?",
    "ask --model base --image a.png b.jpg --each --max-new-tokens 2 what?",
    "ask --model model --summaries stored --id a.png --k 2 --max-new-tokens 2 what?",
    "ask --cache photos.cache --search dog --top 2 --max-new-tokens 2 what?",
    "compress --model model --images a.png --output out.safetensors --overwrite",
    "compress --model model --images text.txt --cache new.cache --codec int8",
    "search --cache photos.cache dog --top 2 --filter width>3",
    "search --cache photos.cache --image a.png --html out.html",
    "search --cache photos.cache --id a.png --exact",
    "cache verify photos.cache",
    "cache stats photos.cache --json",
    "cache export photos.cache --output exported --overwrite",
    "cache merge photos.cache photos.cache",
    "cache vacuum photos.cache --older-than 1",
    "cache index photos.cache",
    "serve --model model --cache photos.cache --port 0 --device cpu",
    "convert model --base base --output converted",
    "eval score pope --answers records.jsonl --questions records.jsonl --ground-truth .",
    "eval score mme --answers records.jsonl --ground-truth .",
    "eval answer --model model --questions records.jsonl --images . --answers answers.jsonl --k 2",
    "eval retrieval --model model --dataset records.jsonl --images .",
    "eval captioning --model model --dataset coco --annotations list.json --images .",
    "eval compositionality --model model --tests list.json --images .",
    "eval report list.json",
    "train --model_name_or_path base --data_path records.jsonl --output_dir out --fwd2bot 2",
    "llava train --model_name_or_path base --fwd2bot 2",
    "llava eval model_vqa --model-path model --k 2",
)


@st.composite
def changed_lines(draw, options: dict[str, list[str]]) -> list[str]:
    """A sound command line with a value or two changed, an option added, or a word left out."""
    words = draw(st.sampled_from(SOUND)).split()
    given = [at for at, word in enumerate(words) if at and not word.startswith("--")]
    for _ in range(draw(st.integers(1, 2))):
        change = draw(st.sampled_from(("value", "value", "value", "value", "option", "out")))
        if change == "value":
            words[draw(st.sampled_from(given))] = draw(values)
        elif change == "option" and options[words[0]]:
            words += [draw(st.sampled_from(options[words[0]])), draw(values)]
        elif change == "out":
            del words[draw(st.integers(1, len(words) - 1))]
            break
    return [word.replace("\0", "") for word in words]


@st.composite
def random_lines(draw, options: dict[str, list[str]]) -> list[str]:
    command = draw(st.sampled_from(sorted(options)))
    words = [command]
    if command in ACTIONS and draw(st.integers(0, 9)):
        words.append(draw(st.sampled_from(ACTIONS[command])))
    for _ in range(draw(st.integers(0, 8))):
        if options[command] and draw(st.booleans()):
            words.append(draw(st.sampled_from(options[command])))
            words += draw(st.lists(values, max_size=2))
        else:
            words.append(draw(values))
    return [word.replace("\0", "") for word in words]


def check(argv: list[str], capsys: Any) -> tuple[str, str]:
    """What every run of every command keeps."""
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    note(f"{argv} -> {code}\n{err}")
    assert code in (0, 1, 2), argv
    assert "Traceback" not in out + err, argv
    assert "fault of fwd2bot" not in err, argv
    assert code == 0 or "error: " in err, argv
    return out, err


def test_random_arguments(place, options, capsys):
    """No words after `fwd2bot` may give a traceback, or what only a fault of the program gives."""

    @fuzz(120)
    @given(st.one_of(random_lines(options), changed_lines(options), changed_lines(options)))
    def run(argv):
        check(quick(argv), capsys)

    run()


def quick(argv: list[str]) -> list[str]:
    """The same, without what takes long on any machine."""
    return [*argv, "--max-new-tokens", "2"] if argv[0] == "ask" else argv


# ---------------------------------------------------------------------- damaged files
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(allow_nan=True), st.text(max_size=4))
JSON = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner))
COMMANDS_OF_FILES = {
    "model/fwd2bot_config.json": ("info model", "ask --model model --image a.png what? --max-new-tokens 2"),
    "model/config.json": ("info model",),
    "model/compress/adapter_config.json": ("info model",),
    "model/fwd2bot.safetensors": ("info model --verbose",),
    "model/compress/adapter_model.safetensors": ("info model",),
    "stored": ("ask --model model --summaries stored --id a.png what? --max-new-tokens 2",),
    "a.png": ("ask --model model --image a.png what? --max-new-tokens 2",),
    "text.txt": ("compress --model model --images text.txt --output out.safetensors --overwrite",),
    "records.jsonl": (
        "eval score pope --answers records.jsonl --questions records.jsonl --ground-truth .",
        "eval score gqa --answers records.jsonl --ground-truth records.jsonl",
        "eval report records.jsonl",
        "eval answer --model model --questions records.jsonl --images . --answers out.jsonl",
        "train --model_name_or_path base --data_path records.jsonl --image_folder . --output_dir out --fwd2bot 2",
    ),
}


@st.composite
def damages(draw, name: str, original: bytes) -> bytes:
    # a list of paths that became "/" would have every image of the machine compressed
    kinds = ("cut", "flip") if name == "text.txt" else ("cut", "flip", "bytes", "json", "value")
    kind = draw(st.sampled_from(kinds))
    if kind == "cut":
        return original[: draw(st.integers(0, len(original)))]
    if kind == "flip" and original:
        at = draw(st.integers(0, min(len(original), 4000) - 1))
        return original[:at] + bytes([draw(st.integers(0, 255))]) + original[at + 1 :]
    if kind == "value":
        try:
            values = json.loads(original)
        except ValueError:
            return draw(st.binary(max_size=40))
        spots = list(places(values))
        holder, key = draw(st.sampled_from(spots))
        if draw(st.booleans()):
            holder[key] = draw(JSON)
        elif isinstance(holder, dict):
            del holder[key]
        return json.dumps(values).encode()
    return json.dumps(draw(JSON)).encode() if kind == "json" else draw(st.binary(max_size=40))


def places(values: Any) -> Any:
    """Every (container, key) within a JSON value."""
    if isinstance(values, (dict, list)):
        for key in list(values) if isinstance(values, dict) else range(len(values)):
            yield values, key
            yield from places(values[key])


@pytest.mark.parametrize("name", COMMANDS_OF_FILES)
def test_damaged_files(place, capsys, name):
    """A file that was cut, garbled or edited by hand is told as that, whatever is in it."""
    path = Path(name)
    original = path.read_bytes()

    @fuzz(12)
    @given(st.data())
    def run(data):
        try:
            path.write_bytes(data.draw(damages(name, original)))
            for command in COMMANDS_OF_FILES[name]:
                check(command.split(), capsys)
        finally:
            path.write_bytes(original)

    run()
