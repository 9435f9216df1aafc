"""The table, the picture and the claims of the study.

    python -m eval.studies.smol196.report --folder DIR --output NAME

DIR holds truth.json and rows.npz of prepare.py, and `runs` as they came back from the device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.statistics import chance, holm
from eval.studies.smol196.pictures import SIDE
from eval.studies.smol196.recipes import KS
from eval.studies.smol196.scoring import Table, decoder, read_table
from llava_fwd2bot.evaluation.drawing import png, powers, pyplot
from llava_fwd2bot.evaluation.resample import bounds
from llava_fwd2bot.evaluation.tables import markdown, ranged
from llava_fwd2bot.files.writing import write_bytes, write_json, write_text
from llava_fwd2bot.smol import build

HEAD = """# smol-llava-196: {title}

Made by `python -m eval.studies.smol196.report` from runs of {date} on {device} (PyTorch {torch}).
SmolLM2-135M reads 14 × 14 = 196 dense tokens of EfficientNet-Lite0 at 448 pixels. A share is
(x − floor) / (bound − floor) in hundredths: the floor is the better of a blind lookup and of the bound shown another
picture, the bound is a dense adapter trained as long. In brackets 95 % intervals, by drawing pictures anew, paired
where two are compared. One seed.

`fwd2bot` is the paper's recipe, `answer` the answer loss alone, `residual` our residual with distillation, and `token`
a token of its own for retrieval. `residual-answer` and `residual-token` combine two of these. `kv` keeps keys and
values, `average` takes nested averages, `pool` grid cells, and `uniform` every (n / k)-th token. `downsample` shrinks
the picture. `query` is a query transformer. `pool-distill` is distilled, and `untrained-pool` is not trained.
`eval/studies/smol196/recipes.py` defines them. In the claims "open" means p ≥ 0.05 after correction.

"""


def long_runs(table: Table, results: dict[str, dict[str, Any]]) -> list[str]:
    runs = {run for run, variant in table.scores if not run.startswith("untrained")}
    return sorted(runs, key=lambda r: (results[r]["recipe"]["kind"] != "dense", results[r]["recipe"]["kind"], r))


def entry_condition(table: Table) -> tuple[str, list[dict[str, Any]]]:
    """Whether the base's images matter: of each task floor, base, bound, and what untrained pooling to 16 keeps."""
    floor, bound = table.floor_and_bound()
    base, base_wrong = (table.means(table.scores["untrained-dense", v])[0] for v in ("k0", "wrong"))
    pooled = table.means(table.scores["untrained-pool", "k16"])[0]
    rows, lines = [], []
    heads = ["task", "blind", "wrong image", "base", "bound", "untrained pooling, 16", "keeps", "met"]
    blind = table.means(table.blind)[0]
    for i, task in enumerate(table.tasks):
        base_floor = max(base_wrong[i], blind[i])
        kept = 100 * (pooled[i] - base_floor) / max(base[i] - base_floor, 1e-9)
        met = bool(base[i] - base_wrong[i] >= 25 and kept <= 85)
        numbers = (blind[i], base_wrong[i], base[i], bound[0, i], pooled[i])
        told = f"{kept:.0f} %" if base[i] - base_floor >= 5 else "no room"  # a share of less is noise
        names = ("blind", "wrong", "base", "bound", "pooled")
        rows.append({"task": task, **dict(zip(names, map(float, numbers), strict=True)), "keeps": kept, "met": met})
        lines.append([task, *(f"{x:.1f}" for x in numbers), told, "yes" if met else "no"])
    return markdown(heads, lines) + "\n", rows


def shares_table(table: Table, runs: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    lines, rows = [], []
    for run in runs:
        cells = []
        for k in KS:
            if (run, f"k{k}") in table.scores:
                drawn = table.overall(run, f"k{k}")
                value, (low, high) = float(drawn[0]), bounds(drawn[1:])
                rows.append({"run": run, "k": k, "share": value, "interval": [low, high]})
                cells.append(ranged(value, rows[-1]["interval"]))
            else:
                cells.append("")
        if any(cells):
            lines.append([name_of(run), *cells])
    return markdown(["recipe", *(f"k = {k}" for k in KS)], lines) + "\n", rows


def raw_table(table: Table, runs: Sequence[str], ks: Sequence[int] = (1, 4, 16)) -> str:
    lines = []
    for run in (*runs, "untrained-dense"):
        for k in (0, *ks):
            if (run, f"k{k}") in table.scores:
                lines.append([name_of(run), str(k or "dense"), *_means(table, run, f"k{k}")])
    for k in KS:
        if ("untrained-dense", f"prune{k}") in table.scores:
            name = "pruning by attention, untrained"
            lines.append([name, str(k), *_means(table, "untrained-dense", f"prune{k}")])
    return markdown(["recipe", "k", *table.tasks], lines) + "\n"


def _means(table: Table, run: str, variant: str) -> list[str]:
    return [f"{x:.1f}" for x in table.means(table.scores[run, variant])[0]]


def language_table(results: dict[str, dict[str, Any]]) -> str:
    """What the outputs say of a picture: own share, the cost of one vector in the place of all, retrieval."""
    lines = []
    heads = ["recipe", "steps", "own share, k = 16", "tuning loss, k = 1, 4, 16"]
    heads += ["one vector in place of 16", "t2i R@1"]
    for run, result in results.items():
        tuning = {k: float(np.mean(list(v.values()))) for k, v in result.get("tuning", {}).items()}
        own = result.get("own", {}).get("16", {})
        same = result.get("same", {}).get("16")
        ranks = result.get("ranks", {})
        best = {n: 100 * float((v < 1).mean()) for n, v in ranks.items() if n.startswith("t2i")}
        cells = [
            ", ".join(f"{n} {v:.2f}" for n, v in own.items()),
            ", ".join(f"{tuning[k]:.3f}" for k in ("1", "4", "16", "0") if k in tuning),
            "" if same is None else f"{float(np.mean(list(same.values()))):.3f}",
            ", ".join(f"{v:.1f}" for v in best.values()),
        ]
        lines.append([run, str(result["recipe"]["steps"]), *cells])
    return markdown(heads, lines) + "\n"


def claims(table: Table, runs: Sequence[str], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Decided before anything was measured: Fwd2Bot's recipes against all others at equal k, and pooling at 2 k."""
    kind = {run: results[run]["recipe"]["kind"] for run in runs}
    ours = [run for run in runs if kind[run] == "fwd2bot"]
    others = [run for run in runs if kind[run] not in ("fwd2bot", "dense", "last")]
    found = []
    for run in ours:
        for other in others:
            for k in KS:
                for factor in (1, 2) if kind[other] == "pool" else (1,):
                    if (run, f"k{k}") in table.scores and (other, f"k{k * factor}") in table.scores:
                        apart = table.overall(run, f"k{k}") - table.overall(other, f"k{k * factor}")
                        value, (low, high) = float(apart[0]), bounds(apart[1:])
                        found.append(
                            {"run": run, "k": k, "against": other, "at": k * factor, "difference": value}
                            | {"interval": [low, high], "p": chance(value, apart[1:])}
                        )
    for claim, p in zip(found, holm([c["p"] for c in found]), strict=True):
        claim["p_holm"] = p
        sure = "ahead" if claim["difference"] > 0 else "behind"
        claim["verdict"] = sure if p < 0.05 else "open"
    return found


def claims_table(found: Sequence[dict[str, Any]]) -> str:
    """Those against average pooling; the others are counted here and listed in the JSON."""
    others: dict[tuple[str, str], list[str]] = {}
    for c in found:
        others.setdefault((name_of(c["run"]), name_of(c["against"])), []).append(f"{c['verdict']} at {c['k']}")
    against = {name_of(c["against"]) for c in found if not name_of(c["against"]).startswith("pool")}
    rest = [f"- {run} against {other}: {', '.join(v)}." for (run, other), v in others.items() if other in against]
    lines = [
        [name_of(c["run"]), str(c["k"]), name_of(c["against"]), str(c["at"])]
        + [ranged(c["difference"], c["interval"], "{:+.1f}".format), f"{c['p_holm']:.3f}", c["verdict"]]
        for c in found
        if name_of(c["against"]).startswith("pool")
    ]
    table = markdown(["recipe", "k", "against", "its k", "difference of shares", "p (Holm)", "verdict"], lines)
    return "\n".join([table, "", "Against the others, at equal k:", "", *rest]) + "\n"


def name_of(run: str) -> str:
    """A run's recipe, without its number of steps and its rate."""
    return run.split("_")[0]


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Shares against k, a line for each recipe: a PNG."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5))
    for number, run in enumerate(dict.fromkeys(row["run"] for row in rows)):
        mine = [row for row in rows if row["run"] == run]
        ks = [row["k"] * 1.012**number for row in mine]  # beside each other
        values = [row["share"] for row in mine]
        bars = [
            [row["share"] - row["interval"][0] for row in mine],
            [row["interval"][1] - row["share"] for row in mine],
        ]
        again = number >= 10  # the colours repeat: dashed, with hollow markers
        style = {"linestyle": "--", "markerfacecolor": "white"} if again else {"linestyle": "-"}
        style |= {"marker": "os^Dv"[number % 5], "markersize": 5}
        axis.errorbar(ks, values, yerr=bars, elinewidth=0.6, label=name_of(run), **style)
    axis.axhline(100, color="black", linestyle=":", linewidth=1, label="all dense tokens")
    powers(axis, KS)
    axis.set(xlabel="tokens per image", ylabel="share: 0 without the image, 100 from all dense tokens")
    axis.legend(fontsize=7, ncols=2, handlelength=4)
    figure.tight_layout()
    return png(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="NAME: writes NAME.json, NAME.md and NAME.png")
    a = parser.parse_args(argv)
    vocabulary = json.loads((a.folder / "truth.json").read_text())["vocabulary"]
    with np.load(a.folder / "rows.npz", allow_pickle=False) as stored:
        end = int(stored["end"][0])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build._processor(build.published_file(build.LANGUAGE_MODEL, Path(folder)), SIDE).tokenizer
    write_report(a.folder, a.output, decoder(vocabulary, tokenizer, end))


def write_report(folder: Path, output: Path, decode: Any) -> None:
    table, results = read_table(folder, decode)
    runs = long_runs(table, results)
    entry, entry_rows = entry_condition(table)
    measuring = [t for t, m in zip(table.tasks, table.measuring(), strict=True) if m]
    about = next((r for r in results.values() if "device" in r), {"device": "", "torch": "", "date": ""})
    text = HEAD.format(title="which k tokens keep most", **{n: about[n] for n in ("device", "torch", "date")})
    text += f"## Does the base need the image?\n\n{entry}\n"
    found, share_rows = [], []
    if measuring:
        pooled = [r for r in ("untrained-pool",) if (r, "k16") in table.scores]
        shares, share_rows = shares_table(table, runs + pooled)
        found = claims(table, runs, results)
        text += f"## Shares, mean over {', '.join(measuring)}\n\n{shares}\n"
    text += f"## Raw figures\n\n{raw_table(table, runs)}\n## What the outputs hold\n\n{language_table(results)}\n"
    text += f"## Claims\n\n{claims_table(found)}" if found else ""
    output.parent.mkdir(parents=True, exist_ok=True)
    for result in results.values():
        result.pop("ranks", None)
    whole = {"entry": entry_rows, "shares": share_rows, "claims": found, "measuring": measuring, "runs": results}
    write_json(output.with_suffix(".json"), whole)
    write_text(output.with_suffix(".md"), text)
    write_bytes(output.with_suffix(".png"), picture(share_rows))


if __name__ == "__main__":
    main()
