"""`fwd2bot export`: a checkpoint in the form that other programs take.

vllm    both adapters under the names that vLLM resolves, for its LoRA requests on the base
peft    both adapters for the language model as a plain causal LM
merged  that plain causal LM with one stage's adapter in its weights

Beside each lies `fwd2bot/`, for the client: the manifest, the summary tokens and the bridge, processor and template.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from ..compressors import compressor_of
from ..config import CONFIG_NAME, STAGES
from ..files.outputs import refuse_overlap
from ..files.writing import as_other_files, write_folder, write_json, write_text
from ..version import __version__
from .export_adapters import VLLM_RANKS, check_vllm, compresses_in_vllm, vllm_commands, write_adapters
from .export_manifest import CLIENT, FORMAT, MANIFEST, TEMPLATE, is_export
from .export_merged import BASE, write_merged
from .export_probe import probes_of
from .export_template import PROMPT_FLAG, served_template
from .load import base_of, load_fwd2bot, processor_source, register
from .read import TENSORS_NAME, file_hash, read_checkpoint

KINDS = ("vllm", "peft", "merged")


def export(
    checkpoint: str | os.PathLike,
    to: str,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    stage: str | None = None,
    dtype: str = "auto",
    probe: bool = False,
) -> Path:
    """Writes the checkpoint for another program.

    Args:
        checkpoint: a folder with a Fwd2Bot checkpoint.
        to: "vllm", "peft" or "merged".
        output: the folder to write. It must not be there yet, unless it holds an export.
        base: the base, where it is no longer at the place that the checkpoint names.
        stage: "answer" or "compress" alone; default: what can be served. For "merged" it must be given, and may be
            "base", for the language model without an adapter, onto which those of "peft" go.
        dtype: of the weights of "merged".
        probe: for "vllm": load the base, and store what the right engine answers to a few questions, so that a client
            knows an engine of another base.

    Returns:
        `output`. Its `fwd2bot/export.json` says what is there, with the command by which vLLM serves it.

    Raises:
        ValueError: what is asked for cannot be served so; the message says why, and what can be done instead.
        FileNotFoundError: checkpoint or base are not there.
    """
    if to not in KINDS:
        raise ValueError(f"An export is one of {', '.join(KINDS)}, not {to!r}.")
    checkpoint, output = Path(checkpoint), Path(output).absolute()
    settings = read_checkpoint(checkpoint)
    stages = _stages(checkpoint, settings, to, stage)
    refuse_overlap("--output", output, models={"CKPT": checkpoint, "--base": base})
    if output.is_dir() and any(output.iterdir()) and not is_export(output):
        raise ValueError(f"--output {output} is there already, and is no export: choose another folder.")
    host = host_config(checkpoint)
    if to == "vllm":
        check_vllm(checkpoint, settings, host, stages)
    with write_folder(output) as folder:
        manifest = _manifest(checkpoint, settings, to, stages, base)
        processor = _write_client(checkpoint, base, folder / CLIENT, manifest)
        if to == "merged":
            manifest |= write_merged(checkpoint, base, folder, stages[0], dtype, processor)
        else:
            name = manifest["base"]["name_or_path"]
            manifest["adapters"] = write_adapters(checkpoint, settings, to, folder, stages, name)
        if to == "vllm":
            manifest["max_lora_rank"] = next(r for r in VLLM_RANKS if r >= settings["fwd2bot"].lora_r)
            if probe:
                manifest["probes"] = probes_of(*load_fwd2bot(checkpoint, base, dtype="auto"))
        if to == "vllm" or manifest.get("probes"):
            manifest["commands"] = vllm_commands(manifest, output)
        write_json(folder / CLIENT / MANIFEST, manifest)
        write_text(folder / "README.md", _readme(manifest))
        for file in folder.rglob("*.safetensors"):
            as_other_files(file)
    return output


def host_config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json: the base's configuration, by which it is told what its parts are."""
    from ..files.text import read_json

    return read_json(checkpoint / "config.json") if (checkpoint / "config.json").is_file() else {}


def _stages(checkpoint: Path, settings: dict[str, Any], to: str, stage: str | None) -> list[str]:
    adapters = settings["fwd2bot"].adapters
    allowed = (*STAGES, BASE) if to == "merged" else STAGES
    if stage is not None and stage not in allowed:
        raise ValueError(f"--stage must be one of {', '.join(allowed)} for --to {to}, not {stage!r}.")
    if to == "merged":
        if stage is None:
            raise ValueError("--to merged puts one adapter into the weights: give --stage answer or --stage compress.")
        if stage == BASE and adapters == "none":
            raise ValueError(
                "The language model itself was trained here, so there is no base in the checkpoint: open the base by "
                "its own name, or give --stage answer."
            )
        return [stage]
    if adapters == "none":
        raise ValueError(
            f'The checkpoint has adapters="none": its language model was trained as a whole, and there is no adapter '
            f"for --to {to}. Use --to merged --stage answer, and serve that as a model of its own."
        )
    there = STAGES if compressor_of(settings["fwd2bot"].compressor).runs_language_model else ("answer",)
    if stage is not None and stage not in there:
        raise ValueError(f"{checkpoint} has no adapter {stage!r}: its compressor runs no language model.")
    if stage is None and to == "vllm" and not compresses_in_vllm(settings):
        return ["answer"]
    return [stage] if stage else list(there)


def _manifest(
    checkpoint: Path, settings: dict[str, Any], to: str, stages: list[str], base: str | os.PathLike | None
) -> dict[str, Any]:
    config, named = settings["fwd2bot"], settings["base"]
    name = named["name_or_path"]
    if base is not None or named.get("relative_path"):
        name = str(Path(base_of(checkpoint, base, settings)).absolute())
    return {
        "format": FORMAT,
        "version": __version__,
        "to": to,
        "stages": stages,
        "k": config.num_summary_tokens,
        "nested_k": config.nested_k,
        "bridge": config.bridge,
        "pooling": config.pooling,
        "compressor": config.compressor,
        "residual": config.residual,
        "image_prompt_ids": settings["image_prompt_ids"],
        "base": {"name_or_path": name, "fingerprint": named["fingerprint"]},
        "checkpoint": file_hash(checkpoint / CONFIG_NAME),  # by which caches know it
    }


def _write_client(checkpoint: Path, base: str | os.PathLike | None, folder: Path, manifest: dict[str, Any]) -> Any:
    """The client's folder but for the manifest; gives the processor."""
    from .load import ORIGINAL

    folder.mkdir()
    shutil.copyfile(checkpoint / TENSORS_NAME, folder / TENSORS_NAME)
    if manifest["base"]["fingerprint"]["class"] in ORIGINAL.values():
        return None  # LLaVA's own processor is no file of transformers
    from transformers import AutoProcessor

    register()
    processor = AutoProcessor.from_pretrained(processor_source(checkpoint, base))
    processor.save_pretrained(folder)
    text, special = served_template(processor)
    write_text(folder / TEMPLATE, text)
    manifest["template"] = {"file": TEMPLATE, "flag": PROMPT_FLAG, "add_special_tokens": special}
    return processor


def _readme(manifest: dict[str, Any]) -> str:
    """What lies here, for people."""
    base = manifest["base"]["name_or_path"]
    lines = [f"# Export of a Fwd2Bot checkpoint ({manifest['to']}, {' and '.join(manifest['stages'])})", ""]
    lines += [f"Base: `{base}`. Summary tokens: {manifest['k']}. Bridge: {manifest['bridge']}.", ""]
    for stage, command in manifest.get("commands", {}).items():
        lines += [f"To {stage}:", "", "```", shlex.join(command), "```", ""]
    if "compress" in manifest.get("commands", {}):
        lines += ["The engine that compresses needs this package: `pip install --no-deps llava_fwd2bot`.", ""]
    lines += ["`fwd2bot/` is for the clients: `VLLMAnswers` and `VLLMCompressor` of `llava_fwd2bot.serving`.", ""]
    return "\n".join(lines)
