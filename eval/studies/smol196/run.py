"""One evening on one GPU: the base, then as many recipes as there is time for, each resumable.

    python -m eval.studies.smol196.run base    --folder DIR [--steps 1000]
    python -m eval.studies.smol196.run work    --folder DIR --seconds 540 SPEC…
    python -m eval.studies.smol196.run collect --folder DIR --output OUT

SPEC is a recipe of recipes.py, or one with settings changed: `pool:rate=2e-3,steps=100`; `rate=auto` takes the best of
the runs of fewer than 150 steps, and `winner` is the best of Fwd2Bot's variants among them. They are done in the order
given; several processes may share a list. What is done is not done again, what was stopped goes on. `--seconds` counts
from the start of the process. With EAGER=1 in the environment nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from eval.studies.smol196.choosing import QUICK, choose, claim
from eval.studies.smol196.compressors import Compressor
from eval.studies.smol196.data import Data
from eval.studies.smol196.features import PLACES
from eval.studies.smol196.measure import Reader
from eval.studies.smol196.model import Language, Lora, Projector, compile_block
from eval.studies.smol196.recipes import KS, MOST, Recipe, recipe
from eval.studies.smol196.tasks import TASKS
from eval.studies.smol196.training import train
from eval.studies.smol196.weights import load_language

MARGIN = 20.0  # seconds that are left for measuring and writing
BASE_FILES = 3
Base = tuple[Language, Projector]


def open_base(folder: Path, data: Data, trained: bool = True) -> Base:
    """SmolLM2 and the projector, as the base training left them."""
    device, channels = data.device, data.features.shape[-1]
    language = load_language(folder, device)
    projector = Projector(channels, language.shape.hidden, PLACES).to(device)
    if trained:
        stored: dict[str, torch.Tensor] = {}
        for i in range(BASE_FILES):
            stored.update(load_file(folder / f"base-{i}.safetensors", device=str(device)))
        stored = {name: tensor.float() for name, tensor in stored.items()}
        adapter = Lora(language.shape, len(stored["answer.down._q"][0])).to(device)
        adapter.load_state_dict({n.removeprefix("answer."): t for n, t in stored.items() if n.startswith("answer.")})
        language.merge(adapter)
        head = "own.projector."
        projector.load_state_dict({n.removeprefix(head): t for n, t in stored.items() if n.startswith(head)})
        projector.requires_grad_(False)
    if device.type == "cuda" and not os.environ.get("EAGER"):
        compile_block(language)
    return language, projector


def build(chosen: Recipe, base: Base, data: Data) -> Compressor:
    torch.manual_seed(chosen.seed)
    return Compressor(chosen, *base, data.prompts).to(data.device)


def rounded(model: Compressor) -> dict[str, torch.Tensor]:
    """The trained parameters in bfloat16, to which the model itself is rounded: what is kept is what was measured."""
    kept = {}
    for name, parameter in model.named_parameters():
        kept[name] = parameter.detach().bfloat16().contiguous()
        parameter.data.copy_(kept[name].float())
    return {name: t.cpu() for name, t in kept.items() if ".rebuild." not in name}


def split(tensors: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """In parts of about one size."""
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for name in sorted(tensors, key=lambda n: -tensors[n].nbytes):
        min(out, key=lambda part: sum(t.nbytes for t in part.values()))[name] = tensors[name]
    return out


def write(folder: Path, result: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if arrays:
        np.savez_compressed(folder / "answers.npz", **arrays)
    (folder / "result.tmp").write_text(json.dumps(result) + "\n")
    os.replace(folder / "result.tmp", folder / "result.json")


def about(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def train_base(folder: Path, data: Data, chosen: Recipe, until: float, **sizes: int) -> bool:
    """Trains the base, writes it, and measures what all else is held against: floor, bound's start, untrained ways."""
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    if not (folder / f"base-{BASE_FILES - 1}.safetensors").exists():
        model = build(chosen, open_base(folder, data, trained=False), data)
        done = train(model, data, runs / "base.state", until, **sizes)
        if done is None:
            return False
        for i, part in enumerate(split(rounded(model), BASE_FILES)):
            save_file(part, folder / f"base-{i}.safetensors")
        write(runs / "base-training", {"recipe": chosen.to_dict(), **about(data.device), **done}, {})
        del model
    base = open_base(folder, data)
    for kind in ("dense", "pool", "average", "uniform"):
        name = f"untrained-{kind}"
        if (runs / name / "result.json").exists() or time.time() > until:
            continue
        start = time.perf_counter()
        model = build(Recipe(name, kind, steps=0), base, data)
        reader = Reader(model, data)
        reader.answer = base[0].weights(None)
        ks = (0,) if kind == "dense" else KS if kind == "pool" else (MOST,)
        losses = {str(k): reader.tuning_loss(k) for k in ks}
        arrays = {f"k{k}": reader.answers(k) for k in ks}
        if kind == "dense":
            arrays["wrong"] = reader.answers(0, wrong=True)
            arrays.update({f"prune{k}": reader.answers(k, prune=True) for k in (1, 4, MOST)})
        seconds = round(time.perf_counter() - start, 2)
        write(runs / name, {"recipe": model.recipe.to_dict(), "tuning": losses, "measured_seconds": seconds}, arrays)
        print(name, json.dumps(losses), seconds, flush=True)
    return True


def measure(model: Compressor, data: Data, quick: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Everything of one trained recipe: the tuning split's losses, and unless `quick`, answers, ranks and shares."""
    chosen, start = model.recipe, time.perf_counter()
    reader = Reader(model, data)
    found: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    answers = chosen.kind != "last"
    ks = (0,) if chosen.kind == "dense" else tuple(chosen.ks)
    if answers:
        found["tuning"] = {str(k): reader.tuning_loss(k) for k in ks}
        if chosen.kind in ("fwd2bot", "query"):
            found["same"] = {str(k): reader.tuning_loss(k, same=True) for k in (4, 16)}
            found["own"] = {str(k): reader.own_share(k) for k in (2, 4, 8, 16)}
    if chosen.contrastive:
        for j in (1, 4, MOST) if chosen.vector == "mean" and chosen.kind != "last" else (1,):
            arrays.update({f"{way}{j}": ranks for way, ranks in reader.ranks(j).items()})
            found[f"r1_{j}"] = round(float((arrays[f"t2i{j}"] < 1).mean()), 4)
    if answers and not quick:
        arrays.update({f"k{k}": reader.answers(k) for k in ks})
        if chosen.kind == "dense":
            arrays["wrong"] = reader.answers(0, wrong=True)
    found["measured_seconds"] = round(time.perf_counter() - start, 2)
    return found, arrays


def work(folder: Path, data: Data, specs: Sequence[str], until: float, **sizes: int) -> list[str]:
    """Does what is not done of `specs`, in order, while there is time. Returns what it did."""
    runs, done, failed = folder / "runs", [], []
    runs.mkdir(exist_ok=True)
    base = open_base(folder, data)
    for spec in specs:
        try:
            chosen = choose(runs, spec)
        except ValueError as error:  # of those that it would be chosen from, none came to an end
            print(f"{spec} failed: {error}", flush=True)
            failed.append(spec)
            continue
        place, lock = runs / chosen.name, runs / f"{chosen.name}.lock"
        if (place / "result.json").exists() or time.time() > until or not claim(lock):
            continue
        try:
            finished = one(runs, chosen, base, data, until, **sizes)
        except (RuntimeError, FloatingPointError):  # out of memory, or a loss that is no number: the others go on
            print(f"{chosen.name} failed:\n{traceback.format_exc()}", flush=True)
            failed.append(chosen.name)
            torch.cuda.empty_cache()
            continue
        if not finished:
            print(f"{chosen.name}: stopped, to go on later", flush=True)
            lock.unlink()
            break
        done.append(chosen.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; done: {', '.join(done)}")
    return done


def one(runs: Path, chosen: Recipe, base: Base, data: Data, until: float, **sizes: int) -> bool:
    """Trains, measures and writes one recipe; False where there was no time for all of it."""
    model = build(chosen, base, data)
    state = runs / f"{chosen.name}.state"
    trained = train(model, data, state, until, **sizes)
    if trained is None:
        return False
    kept = rounded(model)
    found, arrays = measure(model, data, chosen.steps < QUICK)
    count = sum(t.numel() for t in kept.values())
    write(
        runs / chosen.name,
        {"recipe": chosen.to_dict(), **about(data.device), "parameters": count, **trained, **found},
        arrays,
    )
    if chosen.keep:
        save_file(kept, runs / chosen.name / "weights.safetensors")
    print(f"{chosen.name}: {json.dumps(found)}", flush=True)
    state.unlink(missing_ok=True)
    return True


def collect(folder: Path, output: Path, base: bool) -> None:
    """All results in one archive; the base and the kept adapters beside it, each in files that may travel."""
    output.mkdir(parents=True, exist_ok=True)
    with tarfile.open(output / "runs.tar.gz", "w:gz") as tar:
        for file in sorted((folder / "runs").glob("*/*")):
            if file.suffix in (".json", ".npz"):
                tar.add(file, arcname=str(file.relative_to(folder)))
    if base:
        for file in sorted(folder.glob("base-*.safetensors")):
            (output / file.name).write_bytes(file.read_bytes())
    else:
        for file in sorted((folder / "runs").glob("*/weights.safetensors")):
            tensors = load_file(file)
            for stage in ("compress", "answer"):  # the language model's part is too large for one file
                part = {n: t for n, t in tensors.items() if n.startswith(stage) or (stage == "answer" and "own." in n)}
                if part:
                    save_file(part, output / f"{file.parent.name}.{stage}.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("base", "work", "collect"))
    parser.add_argument("specs", nargs="*", default=[], metavar="SPEC")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--steps", type=int, help="of the base; and of recipes that do not name theirs")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step; half are captioned photographs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--with-base", action="store_true", help="collect: the base, not the adapters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_intermixed_args(argv)
    if a.command == "collect":
        return collect(a.folder, a.output, a.with_base)
    torch.set_float32_matmul_precision("high")
    until = started + a.seconds - MARGIN
    data = Data(a.folder, torch.device(a.device))
    print(f"data: {time.time() - started:.1f} s, {data.train} {data.tune} {data.report} pictures, {TASKS}", flush=True)
    sizes = {"batch": a.batch, "singles": a.batch // 2}
    if a.command == "base":
        sizes["singles"] = a.batch // 4  # it sees each photograph many times
        settings = "" if a.steps is None else f":steps={a.steps}"
        chosen = recipe(f"base{settings}")
        train_base(a.folder, data, chosen, until, **sizes)
    else:
        more = "" if a.steps is None else f"steps={a.steps}"
        specs = [s if not more or "steps=" in s else f"{s}{',' if ':' in s else ':'}{more}" for s in a.specs]
        print(work(a.folder, data, specs, until, **sizes), flush=True)


if __name__ == "__main__":
    main()
