"""Pages of the site that live outside docs/, and the table of the settings."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# links as GitHub follows them → as the site does
LINKS = (
    (r"(\.\./)*eval/results/", "results/"),
    (r"(\.\./)*docs/", ""),
    (r"(\.\./)*CONTRIBUTING\.md", "contributing.md"),
    (r"(\.\./)*CHANGELOG\.md", "changelog.md"),
)


def on_files(files: Any, config: Any, **kwargs: Any) -> Any:
    """Adds the pages that stand outside docs/, and the pictures and figures of eval/results."""
    results = [
        p for p in (ROOT / "eval" / "results").iterdir() if p.suffix in (".md", ".png", ".jpg", ".json", ".jsonl")
    ]
    outside = {f"results/{path.name}": path for path in results} | {name: ROOT / path for name, path in PAGES.items()}
    for name, path in sorted(outside.items()):
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links to those files become links within the site; `<!-- settings -->` becomes the table of the settings."""
    up = "../" * page.file.src_uri.count("/")
    for pattern, place in LINKS:
        markdown = re.sub(rf"\]\({pattern}", f"]({up}{place}", markdown)
    return markdown.replace("<!-- settings -->", settings()) if "<!-- settings -->" in markdown else markdown


def settings() -> str:
    """Every field of Fwd2BotConfig with its flag, default, meaning and source, as a table."""
    sys.path.insert(0, str(ROOT))
    from llava_fwd2bot.config import Fwd2BotConfig

    flags = {"num_summary_tokens": "fwd2bot"} | {name: name for name in ("lora_r", "lora_alpha", "lora_dropout")}
    default, lines = Fwd2BotConfig(), ["| flag | default | meaning | source |", "|---|---|---|---|"]
    for field in dataclasses.fields(Fwd2BotConfig):
        value, source = getattr(default, field.name), field.metadata["source"]
        meaning = field.metadata["help"].removesuffix(f" [{source}]").replace("|", "\\|")
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"| `--{flags.get(field.name, 'fwd2bot_' + field.name)}` | {shown} | {meaning} | {source} |")
    return "\n".join(lines)
