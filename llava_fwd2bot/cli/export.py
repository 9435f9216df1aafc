"""`fwd2bot export`: a checkpoint for vLLM, for PEFT, or as a plain causal LM."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from .options import DTYPES, folder_of, json_alone
from .parser import Parser


def main(argv: Sequence[str]) -> None:
    about = "Write a checkpoint for another program: adapters for vLLM or PEFT, or one stage merged into a causal LM."
    parser = Parser(prog="fwd2bot export", description=about)
    parser.add_argument("checkpoint", metavar="CKPT", help="the Fwd2Bot checkpoint: a folder, a hub name or smol-llava")
    parser.add_argument("--to", required=True, choices=("vllm", "peft", "merged"), help="the program, or one model")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    stages = "one stage alone; with --to merged also base: no adapter"
    parser.add_argument("--stage", choices=("answer", "compress", "base"), help=stages)
    parser.add_argument("--base", metavar="PATH", help="the base, if it has moved from the path in the checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="with --to merged; auto: the base's own")
    text = "with --to vllm: load the base, and store answers by which a client knows an engine of another base"
    parser.add_argument("--probe", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    args = parser.parse_args(argv)
    if args.dtype != "auto" and args.to != "merged":
        parser.error("--dtype goes with --to merged: adapters are written as they were trained")
    if args.probe and (args.to != "vllm" or args.stage == "compress"):
        parser.error("--probe goes with --to vllm and the answer stage")
    from ..checkpoint.export import export
    from ..checkpoint.export_manifest import read_manifest
    from .console import quiet_bars

    quiet_bars()
    with json_alone(args.json):
        options = {"base": args.base, "stage": args.stage, "dtype": args.dtype, "probe": args.probe}
        path = export(folder_of(args.checkpoint), args.to, args.output, **options)
    manifest = read_manifest(path)
    if args.json:
        print(json.dumps({"output": str(path), **manifest}))
        return
    print(path)
    for stage, command in manifest.get("commands", {}).items():
        print(f"to {stage}: {shlex.join(command)}")
