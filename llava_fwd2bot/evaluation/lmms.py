"""lmms-eval finds this by the entry point `lmms_eval.models`: `--model llava_fwd2bot`. Imports nothing heavy."""

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
