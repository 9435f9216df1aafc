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
from .vllm_http import EngineError
from .vllm_request import CHAT, EngineModel

TOKENS = 4  # of an answer to a probe
MOST = 20  # log-probabilities that vLLM gives of one token
NOISE = 1e-3  # by which an engine's log-probabilities differ from run to run
APART = 0.5  # by which those of the base are apart from another model's, in nats


def check_engine(client: EngineModel) -> None:
    """Raises EngineError where the engine lacks the adapter, ignores it, or has another template, tokenizer or base.

    The base is told by what the export has of it, if it was written with --probe; without, by its tokenizer and sizes.
    """
    base = _base_of(client)
    _check_template(client, base)
    own, without = ([_said(client, name, probe) for probe in PROBES] for name in (client.adapter, base))
    pairs = [(a, b) for x, y in zip(own, without, strict=True) for a, b in zip(x, y, strict=False)]
    if all(a[0] == b[0] and abs(a[1] - b[1]) < NOISE for a, b in pairs):
        raise EngineError(
            f"The engine at {client.engine.url} answers with the adapter {client.adapter!r} exactly as without it: it "
            f"found none of the adapter's tensors. Serve an export: {_command(client)}"
        )
    for probe in client.files.probes:
        for name, model in (("base", base), ("answer", client.adapter)):
            _check_known(client, model, probe["question"], probe[name])


def _base_of(client: EngineModel) -> str:
    """The engine's name for the base, beside which it has the adapter."""
    models = client.engine.get("/v1/models").get("data")
    known = {m.get("id"): m for m in models if isinstance(m, dict)} if isinstance(models, list) else {}
    if client.adapter not in known or not known[client.adapter].get("parent"):
        raise EngineError(
            f"The engine at {client.engine.url} has no adapter {client.adapter!r}, only {', '.join(map(str, known))}. "
            f"Start it by: {_command(client)}"
        )
    return known[client.adapter]["parent"]


def _check_template(client: EngineModel, base: str) -> None:
    """What the engine makes of a prompt must be what training read, to the last token."""
    processor, k = client.files.processor, len(client.files.tokens)
    prompt = client.formatter.prompt(PROBES[0], 1)
    ids = processor.tokenizer(prompt, add_special_tokens=needs_bos(processor.tokenizer, prompt))["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    expected = [i for one in ids for i in ([one] * k if one == image else [one])]
    try:
        found = client.engine.post("/tokenize", {"model": base, **client.request(prompt, _picture(client))})
    except EngineError as error:
        if error.status == 404:  # the engine was started without that
            return
        raise
    if found.get("tokens") != expected:
        raise EngineError(
            f"The engine at {client.engine.url} reads a prompt of {len(expected)} tokens as "
            f"{len(found.get('tokens') or [])}, or as others: it has another tokenizer, or not the export's chat "
            f"template. Start it by: {_command(client)}"
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


def _check_known(client: EngineModel, model: str, question: str, expected: list[float]) -> None:
    """Compares the probabilities of the most probable first tokens with those that the export has."""
    body = client.request(client.formatter.prompt(question, 1), _picture(client))
    body |= {"model": model, "temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": MOST}
    found = {entry["token"]: entry["logprob"] for entry in _entries(client, body)[0]["top_logprobs"]}
    apart = [abs(found.get(f"token_id:{token}", -100.0) - value) for token, value in expected]
    if sorted(apart)[len(apart) // 2] > APART:
        raise EngineError(
            f"The engine at {client.engine.url} is on another base than {client.files.base}, or has another adapter: "
            f"its {model!r} does not say what the export has of it. Start it by: {_command(client)}"
        )


def _command(client: EngineModel) -> str:
    if client.files.command:
        return shlex.join(client.files.command)
    return f"`fwd2bot export {client.files.name} --to vllm --output DIR` tells the command."
