"""What vLLM calls when it starts, by the entry point `vllm.general_plugins`: it makes our model class known there."""

from __future__ import annotations

from ..checkpoint.export_manifest import ARCHITECTURE


def register() -> None:
    """Tells vLLM where the class is; it imports the class when it is asked for, in a process of its own."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "llava_fwd2bot.serving.vllm_summaries:LlavaSummaries")
