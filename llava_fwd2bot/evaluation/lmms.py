"""The entry point `lmms_eval.models`, by which lmms-eval finds `--model llava_fwd2bot`. Imports no torch."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFESTS = [
    ModelManifest(
        "llava_fwd2bot",
        simple_class_path="llava_fwd2bot.evaluation.lmms_model.Fwd2BotSimple",
        chat_class_path="llava_fwd2bot.evaluation.lmms_model.Fwd2BotChat",
        aliases=("fwd2bot",),
    )
]
