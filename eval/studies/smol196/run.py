"""The study on one GPU: the base, then as many recipes as there is time for, each resumable.

    python -m eval.studies.smol196.run base    --folder DIR [--steps 1000]
    python -m eval.studies.smol196.run work    --folder DIR --seconds 540 [ROW …]
    python -m eval.studies.smol196.run collect --folder DIR --output OUT

ROW is a row of eval/studies/smol196.yaml; without one, all are done in their order, the untrained first. Several
processes may share a list. What is done is not done again, what was stopped resumes. `--seconds` counts from the start
of the process. With EAGER=1 in the environment nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from eval.studies.smol196.compressors import Compressor
from eval.studies.smol196.data import Data
from eval.studies.smol196.features import PLACES
from eval.studies.smol196.measure import Reader
from eval.studies.smol196.model import Language, Lora, Projector, compile_block
from eval.studies.smol196.recipes import BASE_TRAINING, KS, MOST, Recipe, recipes
from eval.studies.smol196.training import train
from eval.studies.smol196.weights import load_language
from eval.studies.study import Study

STUDY = Path(__file__).parents[1] / "smol196.yaml"
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
    return {name: t.cpu() for name, t in kept.items()}


def split(tensors: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """In parts of about one size."""
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for name in sorted(tensors, key=lambda n: -tensors[n].nbytes):
        min(out, key=lambda part: sum(t.nbytes for t in part.values()))[name] = tensors[name]
    return out


def train_base(folder: Path, data: Data, chosen: Recipe, until: float, **sizes: int) -> bool:
    """Trains the base and writes it; False where there was no time for all of it."""
    if (folder / f"base-{BASE_FILES - 1}.safetensors").exists():
        return True
    (folder / "runs").mkdir(exist_ok=True)
    model = build(chosen, open_base(folder, data, trained=False), data)
    if train(model, data, folder / "runs" / "base.state", until, **sizes) is None:
        return False
    for i, part in enumerate(split(rounded(model), BASE_FILES)):
        save_file(part, folder / f"base-{i}.safetensors")
    return True


def measure(model: Compressor, data: Data) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Everything of one recipe: figures by part, k and item, and arrays of answers and ranks; score.py reads both."""
    chosen = model.recipe
    reader = Reader(model, data)
    found: dict[str, dict[str, dict[str, float]]] = {}
    arrays: dict[str, np.ndarray] = {}
    ks = (0,) if chosen.kind == "dense" else KS
    if chosen.contrastive:
        for j in (1, 4, MOST) if chosen.vector == "mean" and chosen.kind != "last" else (1,):
            arrays[f"t2i{j}"] = reader.ranks(j)
    if chosen.kind != "last":
        found["tuning loss"] = {str(k): reader.tuning_loss(k) for k in ks}
        arrays.update({f"k{k}": reader.answers(k) for k in ks})
    if chosen.kind in ("fwd2bot", "query"):
        found["one vector"] = {str(k): reader.tuning_loss(k, same=True) for k in (4, MOST)}
        for k in KS[1:]:
            for part, share in reader.own_share(k).items():
                name = "own share" if part == "slots" else f"own share, {part}"
                found.setdefault(name, {})[str(k)] = {part: share}
    if chosen.kind == "dense":
        arrays["wrong"] = reader.answers(0, wrong=True)
        if not chosen.steps:
            arrays.update({f"prune{k}": reader.answers(k, prune=True) for k in (1, 4, MOST)})
    return {"scalars": found}, arrays


def work(folder: Path, data: Data, chosen: Sequence[Recipe], until: float, **sizes: int) -> list[str]:
    """Does what is not done of `chosen`, in order, while there is time. Returns what it did.

    Raises:
        SystemExit: some failed, after all others were done.
    """
    runs, done, failed = folder / "runs", [], []
    runs.mkdir(exist_ok=True)
    base = open_base(folder, data)
    for recipe in chosen:
        place = runs / recipe.run
        if (place / "result.json").exists() or time.time() > until:
            continue
        try:
            with FileLock(runs / f"{recipe.run}.lock", timeout=0):
                finished = one(place, recipe, base, data, until, **sizes)
        except Timeout:  # another process is at it
            continue
        except (RuntimeError, FloatingPointError):  # out of memory, or a loss that is no number: the others go on
            print(f"{recipe.run} failed:\n{traceback.format_exc()}", flush=True)
            failed.append(recipe.run)
            torch.cuda.empty_cache()
            continue
        if not finished:
            print(f"{recipe.run}: stopped, to be resumed", flush=True)
            break
        done.append(recipe.run)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; done: {', '.join(done)}")
    return done


def one(place: Path, chosen: Recipe, base: Base, data: Data, until: float, **sizes: int) -> bool:
    """Trains, measures and writes one recipe; False where there was no time for all of it."""
    model, state = build(chosen, base, data), place.with_name(f"{place.name}.state")
    trained: dict[str, Any] | None = {}
    if chosen.steps:
        trained = train(model, data, state, until, **sizes)
        if trained is None:
            return False
    count = sum(t.numel() for t in rounded(model).values()) if chosen.steps else 0
    start = time.perf_counter()
    found, arrays = measure(model, data)
    name = torch.cuda.get_device_name() if data.device.type == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    about |= {"parameters": count, "measured_seconds": round(time.perf_counter() - start, 2)}
    place.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(place / "answers.npz", **arrays)
    (place / "result.tmp").write_text(json.dumps({"recipe": chosen.to_dict(), **about, **trained, **found}) + "\n")
    os.replace(place / "result.tmp", place / "result.json")
    print(f"{chosen.run}: {json.dumps(found)}", flush=True)
    state.unlink(missing_ok=True)
    return True


def collect(folder: Path, output: Path, base: bool) -> None:
    """All results in one archive; with `base`, the base beside it, in files that may travel."""
    output.mkdir(parents=True, exist_ok=True)
    with tarfile.open(output / "runs.tar.gz", "w:gz") as tar:
        for file in sorted((folder / "runs").glob("*/*")):
            if file.suffix in (".json", ".npz"):
                tar.add(file, arcname=str(file.relative_to(folder)))
    for file in sorted(folder.glob("base-*.safetensors")) if base else ():
        (output / file.name).write_bytes(file.read_bytes())


def main(argv: Sequence[str] | None = None) -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("base", "work", "collect"))
    parser.add_argument("rows", nargs="*", default=[], metavar="ROW")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--steps", type=int, help="of training, instead of the study's")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step; half are captioned photographs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--with-base", action="store_true", help="collect: the base too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_intermixed_args(argv)
    if a.command == "collect":
        return collect(a.folder, a.output, a.with_base)
    known = recipes(Study.read(STUDY), a.steps)
    if unknown := {*a.rows} - {*known}:
        parser.error(f"no row that can be run: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    torch.set_float32_matmul_precision("high")
    until = started + a.seconds - MARGIN
    data = Data(a.folder, torch.device(a.device))
    print(f"data: {time.time() - started:.1f} s, {data.train} {data.tune} {data.report} pictures", flush=True)
    if a.command == "work":
        chosen = [known[name] for name in a.rows] or list(known.values())
        print(work(a.folder, data, chosen, until, batch=a.batch, singles=a.batch // 2), flush=True)
        return
    base = replace(BASE_TRAINING, steps=a.steps or BASE_TRAINING.steps)
    # it sees each photograph many times
    train_base(a.folder, data, base, until, batch=a.batch, singles=a.batch // 4)


if __name__ == "__main__":
    main()
