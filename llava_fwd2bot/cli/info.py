"""`fwd2bot info`: describe a checkpoint or a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import folder_of
from .parser import Parser

# settings that a short description shows; --verbose shows all
MAIN_SETTINGS = ("nested_k", "pooling", "adapters", "lora_r", "answer_weight", "contrastive_weight")


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="fwd2bot info", description="Describe a checkpoint or a cache without loading the model.")
    parser.add_argument("path", metavar="CKPT|CACHE", help="a Fwd2Bot checkpoint: a folder or a hub name; or a cache")
    parser.add_argument("--verbose", action="store_true", help="every setting with its meaning and source; every file")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    args = parser.parse_args(argv)
    if _is_cache(args.path):
        found = describe_cache(args.path)
        text = render_cache(found)
    else:
        from ..checkpoint.describe import describe

        found = describe(folder_of(args.path))
        text = render(found, args.verbose)
    print(json.dumps(found, indent=2) if args.json else text)


def _is_cache(path: str) -> bool:
    """Whether `path` is a cache: a bucket, or a folder with LanceDB tables."""
    return "://" in path or any(Path(path).glob("*.lance"))


def describe_cache(path: str) -> dict[str, Any]:
    """The settings and sizes of a cache, ready for JSON. Errors as of SummaryCache.open."""
    from dataclasses import asdict

    from ..cache.maintenance import stats
    from ..cache.reader import SummaryCache

    cache = SummaryCache.open(path)
    return {"cache": path, "settings": asdict(cache.settings), "stats": stats(cache)}


def render_cache(found: dict[str, Any]) -> str:
    """The description of a cache (`describe_cache`) as text."""
    settings, stats = found["settings"], found["stats"]
    size = "" if stats["bytes"] is None else f", {stats['bytes'] / 1e6:,.1f} MB on disk"
    quantised = f", its language model in {settings['quantised']}" if settings["quantised"] else ""
    lines = [
        ("cache", f"{found['cache']}  (llava_fwd2bot {settings['version']}, format {settings['format']})"),
        ("images", f"{stats['rows']:,}{size}; {stats['skipped']:,} files skipped"),
        (
            "summary of an image",
            f"{settings['k']} x {settings['size']} as {settings['codec']}: {stats['bytes_per_image']:,} bytes",
        ),
        (
            "vector for search",
            f"{settings['size']} numbers, pooled by {settings['pooling']}: {stats['bytes_per_vector']:,} bytes",
        ),
        ("made by", f"{settings['model'] or 'an unnamed model'}{quantised}"),
        ("more", f"fwd2bot cache stats {found['cache']}; fwd2bot cache verify {found['cache']}"),
    ]
    return _table(lines)


def render(found: dict[str, Any], verbose: bool = False) -> str:
    """The description of a checkpoint (`checkpoint.describe`) as text: 12 lines, or everything."""
    base, summary, dense, settings = found["base"], found["summary"], found["dense"], found["settings"]
    place = f"found at {base['found']}" if base["found"] else "not on this machine"
    named = base["name_or_path"] or "unnamed"
    lines = [
        ("Fwd2Bot checkpoint", f"{found['checkpoint']}  (llava_fwd2bot {found['version']})"),
        ("base", named if base["found"] == named else f"{named}, {place}"),
        (
            "",
            f"{base['class']}, {base['layers']} layers, hidden size {base['hidden_size']}, "
            f"vocabulary {base['vocabulary']:,}",
        ),
        ("summary of an image", _tokens(summary)),
    ]
    if dense:
        ratio = dense["bytes_float16"] / summary["bytes_float16"]
        lines.append(("dense tokens", f"{_tokens(dense)}: {ratio:.3g} times as much"))
    size = f"{found['trained_parameters']:,} in {found['bytes']:,} bytes, {len(found['files'])} files"
    lines.append(("trained parameters", size))
    if not verbose:
        lines += [(name, json.dumps(settings[name]["value"])) for name in MAIN_SETTINGS]
        return _table(lines)
    text = [_table(lines)]
    text += [f"  {name:<40} {f['trained_parameters']:>15,} {f['bytes']:>15,} B" for name, f in found["files"].items()]
    text += ["settings"]
    for name, setting in settings.items():
        text += [f"  {name} = {json.dumps(setting['value'])}", f"      {setting['help']} [{setting['source']}]"]
    return "\n".join(text)


def _table(lines: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<19} {value}" for name, value in lines)


def _tokens(size: dict[str, int]) -> str:
    return f"{size['tokens']} x {size['dim']} = {size['bytes_float16']:,} bytes in float16"
