"""Whether an engine is the one of a model: asked when a client connects.

vLLM says nothing when an adapter's names fit none of its modules, when another chat template is set, or when the base
is a model of the same sizes; it just answers worse. Seen from outside, each shows in what it answers.
"""

from __future__ import annotations

import shlex
from typing import Any

import torch

from ..checkpoint.export_manifest import PROBES
from ..processing.conversation import needs_bos
from .vllm_http import Engine, EngineError
from .vllm_request import CHAT, EngineModel

TOKENS = 4  # of an answer to a probe
MOST = 20  # log-probabilities that vLLM gives of one token
NOISE = 0.01  # by which an engine's log-probabilities may differ from run to run, in half precision
APART = 0.5  # by which those of the base are apart from another model's, in nats


def check_engine(client: EngineModel) -> None:
    """Raises EngineError where the engine lacks the adapter, ignores it, or has another template, tokenizer or base.

    Base and adapter are told by what the export has of them: one with a merged adapter always, one for LoRA if it was
    written with --probe. Without, the base is told by its tokenizer and sizes alone.
    """
    names = {"answer": client.name}
    if not client.files.merged:
        names["base"] = base_of_adapter(client)
    _check_template(client)
    if not client.files.merged:
        _check_used(client, names["base"])
    for probe in client.files.probes:
        for kind, name in names.items():
            _check_known(client, name, probe["question"], probe[kind])


def models_of(engine: Engine) -> dict[str, str | None]:
    """The names that the engine has, an adapter's with that of its base."""
    models = engine.get("/v1/models").get("data")
    known = [m for m in models if isinstance(m, dict) and "id" in m] if isinstance(models, list) else []
    return {str(m["id"]): m.get("parent") for m in known}


def base_of_adapter(client: EngineModel) -> str:
    """The engine's name for the base, beside which it has the adapter."""
    known = models_of(client.engine)
    if not known.get(client.name):
        raise EngineError(
            f"The engine at {client.engine.url} has no adapter {client.name!r}, only {', '.join(known)}. "
            f"Start it by: {command_of(client)}"
        )
    return known[client.name]


def _check_used(client: EngineModel, base: str) -> None:
    """With the adapter it must answer otherwise than without."""
    own, without = ([_said(client, name, probe) for probe in PROBES] for name in (client.name, base))
    pairs = [(a, b) for x, y in zip(own, without, strict=True) for a, b in zip(x, y, strict=False)]
    if all(a[0] == b[0] and abs(a[1] - b[1]) < NOISE for a, b in pairs):
        raise EngineError(
            f"The engine at {client.engine.url} answers with the adapter {client.name!r} exactly as without it: it "
            f"found none of the adapter's tensors. Serve an export: {command_of(client)}"
        )


def _check_template(client: EngineModel) -> None:
    """What the engine makes of a prompt must be what training read, to the last token."""
    processor, k = client.files.processor, len(client.files.tokens)
    images = 0 if client.files.merged else 1  # rows of a prompt have no ids
    prompt = client.formatter.prompt(PROBES[0], images)
    ids = processor.tokenizer(prompt, add_special_tokens=needs_bos(processor.tokenizer, prompt))["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    expected = [i for one in ids for i in ([one] * k if one == image else [one])]
    picture = _picture(client)[:images]
    try:
        found = client.engine.post("/tokenize", {"model": client.name, **client.request(prompt, picture)})
    except EngineError as error:
        if error.status == 404:  # the engine was started without that
            return
        raise
    if found.get("tokens") != expected:
        raise EngineError(
            f"The engine at {client.engine.url} reads a prompt of {len(expected)} tokens as "
            f"{len(found.get('tokens') or [])}, or as others: it has another tokenizer, or not the export's chat "
            f"template. Start it by: {command_of(client)}"
        )


def _picture(client: EngineModel) -> torch.Tensor:
    """R in the place of a summary, [1, k, D]: numbers of the right size that every client has."""
    return client.files.tokens[None]


def _said(client: EngineModel, model: str, question: str, tokens: int = TOKENS) -> list[tuple[str, float]]:
    """The tokens of a greedy answer, and how probable each was."""
    body = client.request(client.formatter.prompt(question, 1), _picture(client))
    body |= {"model": model, "temperature": 0.0, "max_tokens": tokens, "logprobs": True, "top_logprobs": 1}
    return [(entry["token"], entry["logprob"]) for entry in _entries(client, body)]


def _entries(client: EngineModel, body: dict[str, Any]) -> list[dict[str, Any]]:
    values = client.engine.post(CHAT, {**body, "return_tokens_as_token_ids": True})
    try:
        return values["choices"][0]["logprobs"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineError(f"The engine at {client.engine.url} gives no log-probabilities ({error!r}).") from error


def _check_known(client: EngineModel, model: str, question: str, expected: list[list[float]]) -> None:
    """Compares the probabilities of the most probable first tokens with those that the export has."""
    body = client.request(client.formatter.prompt(question, 1), _picture(client))
    body |= {"model": model, "temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": MOST}
    found = {entry["token"]: entry["logprob"] for entry in _entries(client, body)[0]["top_logprobs"]}
    apart = [abs(found.get(f"token_id:{token}", -100.0) - value) for token, value in expected]
    if sorted(apart)[len(apart) // 2] > APART:
        raise EngineError(
            f"The engine at {client.engine.url} is on another base than {client.files.base}, or has another adapter: "
            f"its {model!r} does not say what the export has of it. Start it by: {command_of(client)}"
        )


def command_of(client: EngineModel) -> str:
    if client.files.command:
        return shlex.join(client.files.command)
    return f"`fwd2bot export {client.files.name} --to vllm --output DIR` tells the command."
