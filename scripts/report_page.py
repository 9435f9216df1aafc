"""A run's table, on the terminal and as one self-contained HTML page; for the quickstart and the easy-VQA run."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fwd2bot.cache.search import thumbnail
from llava_fwd2bot.evaluation.tables import percent


@dataclass(frozen=True)
class Answered:
    """One question about a picture, and what each model answers; `truth` is "" where there is no one right answer."""

    question: str
    truth: str
    base: str
    summary: str
    tuned: str | None = None  # of the model that was fine-tuned in this run

    @property
    def differs(self) -> bool:
        """Whether the summary gives another answer than the base's dense tokens."""
        return self.summary.casefold() != self.base.casefold()


Example = tuple[Path, list[Answered]]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .9rem; text-align: right }
th { border-bottom: 2px solid #444 } td { border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
.card { border: 1px solid #ddd; border-radius: .5rem; padding: .8rem; font-size: .9rem }
.card img { min-width: 6rem; max-width: 100%; max-height: 11rem }
.card p { margin: .4rem 0 } .wrong { color: #b00020 } .note { color: #555 } img.plot { max-width: 100% }
.differs { background: #fff3bf } .differs::after { content: " ≠"; color: #946200 }
"""


def share(value: float, count: int) -> str:
    return f"{percent(value, count)}%"


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row for the base, one for each k."""
    count = report["questions"]
    header = ["answers from", f"accuracy (n = {count:,})", "retention", "bytes per image", "questions/s"]
    speed, size = report["questions_per_second"], report["bytes_per_image"]
    base = f"{speed['base']:.0f}" if "base" in speed else ""
    rows = [["dense tokens (base)", share(report["base_accuracy"], count), "", f"{size['dense']:,}", base]]
    for k, accuracy in report["accuracy"].items():
        name = f"{k} summary token{'s' * (k != '1')}"
        retention = share(report["retention"][k], count)
        rows.append([name, share(accuracy, count), retention, f"{size[k]:,}", f"{speed[k]:.0f}"])
    return header, rows


def summary_lines(report: dict[str, Any]) -> list[str]:
    found = report["retrieval"]
    spent = ", ".join(f"{name.replace('_', '-')} {value:.0f} s" for name, value in report["seconds"].items())
    return [
        f"Search among {found['images']} images and {found['captions']} captions: image→text R@1 "
        f"{share(found['image_to_text_r1'], found['images'])}, "
        f"text→image R@1 {share(found['text_to_image_r1'], found['captions'])}.",
        f"{report['questions']:,} questions ({report['split']}), answered from stored float16 summaries.",
        f"{report['wall_s']:.0f} s in all: {spent}.",
    ]


def print_table(report: dict[str, Any]) -> None:
    header, rows = table(report)
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells))
    print(*summary_lines(report), sep="\n")


def _plot(log: list[dict[str, Any]]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    steps = [entry["step"] for entry in log]
    for name in ("answer_loss", "contrastive_loss"):
        left.plot(steps, [entry.get(name) for entry in log], label=name.replace("_", " "))
    left.set(xlabel="step", ylabel="loss", yscale="log", title="Losses of the fine-tune")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend(frameon=False)
    right.plot(steps, [entry.get("retrieval_accuracy") for entry in log], color="tab:green")
    right.set(xlabel="step", ylim=(0, 1), title="Retrieval accuracy within the batch")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def write_html(
    path: Path, report: dict[str, Any], log: list[dict[str, Any]], examples: list[Example], about: dict[str, str]
) -> None:
    """One page without links to anything outside it. `about`: title, intro, note (below the curves), heading."""
    header, rows = table(report)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    cards = []
    for picture, lines in examples:
        image = f"<img src='data:image/jpeg;base64,{thumbnail(str(picture))}' alt=''>"
        cards.append(f"<div class='card'>{image}{''.join(map(_answers, lines))}</div>")
    shown = [line for _, lines in examples for line in lines]
    told = f"The summary's answer differs from the base's in {sum(line.differs for line in shown)} of {len(shown)} "
    told += "answers below; these are marked ≠. Wrong answers are red."
    notes = "".join(f"<p class='note'>{html.escape(line)}</p>" for line in summary_lines(report))
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{about["title"]}</title><style>{STYLE}</style>
<h1>{about["title"]}</h1>
<p>{about["intro"]}</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}
<img class="plot" alt="loss curves" src="data:image/png;base64,{_plot(log)}">
<p class="note">{about["note"]}</p>
<h2>{about["heading"]}, with answers from {max(map(int, report["accuracy"]))} summary tokens</h2>
<p class="note">{told}</p>
<div class="cards">{"".join(cards)}</div></html>
""",
        encoding="utf-8",
    )


def _answers(line: Answered) -> str:
    """A question with each model's answer on a line of its own."""
    truth = f" <span class='note'>(right: {html.escape(line.truth)})</span>" if line.truth else ""
    sides = [("base", line.base), ("summary", line.summary), ("fine-tuned", line.tuned)]
    rows = []
    for name, text in sides:
        if text is not None:
            wrong = "wrong" if line.truth and text.casefold() != line.truth.casefold() else ""
            differs = "differs" if name == "summary" and line.differs else ""
            kind = f" class='{' '.join(filter(None, (wrong, differs)))}'" if wrong or differs else ""
            rows.append(f"<br><span class='note'>{name}:</span> <b{kind}>{html.escape(text)}</b>")
    return f"<p>{html.escape(line.question)}{truth}{''.join(rows)}</p>"
