"""`fwd2bot serve`: a server of OpenAI's API over a model and its caches, with a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..extras import require
from .console import tell
from .options import checked, count, load_model, model_options, number, quantisation
from .parser import Parser
from .precision import check_precision, precision_option


def main(argv: Sequence[str]) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.model and not args.cache:
        parser.error("--model is missing")
    if args.create and not args.cache:
        parser.error("--create goes with --cache PATH")
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        require(name, "serve", "The server")
    from ..serving.listen import bound, hosts_of, run, token_of

    token = token_of(args.host, args.token_file)
    limits = _limits(args)
    listening = bound(args.host, args.port)
    try:
        app = _app(args, limits, token, hosts_of(args.host))
        host, port = listening.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        tell(f"serving {app.state.service.name} on http://{place}:{port} ({_described(app.state.service, token)})")
        try:
            run(app, listening, limits)
        finally:
            app.state.service.close()
    finally:
        listening.close()


def _parser() -> Parser:
    about = (
        "Serve a model and its caches: OpenAI's API (/v1/chat/completions, /v1/embeddings, /v1/models), /v1/search, "
        "/v1/images, /health, /metrics, and a page at /."
    )
    from ..serving.limits import Limits

    serve = Parser(
        prog="fwd2bot serve", description=about, parents=[model_options(k=False, required=False, json=False)]
    )
    group = serve.add_argument_group("what is served")
    group.add_argument("--cache", action="append", default=[], metavar="PATH", help="a cache; may be repeated")
    group.add_argument("--create", action="store_true", help="make caches that are not there")
    group.add_argument("--name", help="of the model in requests; default: its folder's")
    text = "a vLLM server that answers from the summaries, as http://host:8001; the compress pass stays here"
    group.add_argument("--engine-url", metavar="URL", help=text)
    precision_option(group)
    group = serve.add_argument_group("where it listens")
    group.add_argument("--host", default="127.0.0.1", help="address; default: 127.0.0.1, this machine alone")
    group.add_argument(
        "--port", type=number(int, 0, "a port", 65535), default=8000, help="default: 8000; 0: a free one"
    )
    text = "a file with the bearer token that requests must bring; needed beyond this machine"
    group.add_argument("--token-file", metavar="FILE", help=f"{text}. Or set FWD2BOT_TOKEN")
    text = "a host from which URLs of images are fetched; may be repeated; default: no URL is fetched"
    group.add_argument("--fetch-host", action="append", default=[], metavar="HOST", help=text)
    group = serve.add_argument_group("limits")
    defaults = {field.name: field.default for field in fields(Limits)}
    for option, field, help in _LIMITS:
        default = defaults[field]
        kind = number(float, 1, "a number of seconds") if field == "seconds" else count
        group.add_argument(
            option, dest=f"limit_{field}", type=kind, default=default, metavar="N", help=f"{help}; {default:,}"
        )
    return serve


# option, field of Limits, help
_LIMITS = (
    ("--batch-size", "batch", "requests that the model works on at once"),
    ("--max-queue", "queue", "requests that wait"),
    ("--max-tokens", "new_tokens", "tokens of an answer"),
    ("--max-prompt-tokens", "prompt_tokens", "tokens of a prompt"),
    ("--max-images", "images", "images of a request"),
    ("--max-pixels", "pixels", "pixels of an image"),
    ("--max-image-bytes", "image_bytes", "bytes of an image's file"),
    ("--max-body-bytes", "body_bytes", "bytes of a request"),
    ("--timeout", "seconds", "seconds of a request"),
)


def _limits(args: argparse.Namespace) -> Any:
    from ..serving.limits import Limits

    return Limits(**{field: getattr(args, f"limit_{field}") for _, field, _ in _LIMITS})


def _app(args: argparse.Namespace, limits: Any, token: str | None, hosts: tuple[str, ...]) -> Any:
    """The application, once all that can be wrong with what is served is looked at before the model is loaded."""
    from ..cache.naming import fingerprint_of
    from ..serving.app import create_app
    from ..serving.caches import Caches
    from .search import model_of

    args.model = args.model or model_of(args.cache[0])
    path, most = checked(args.model)
    settings = _settings(args, path, most) if args.create else None
    caches = Caches(args.cache, fingerprint_of(path), settings, quantisation(args) or "")
    for name in caches.names:
        check_precision(args, caches.named(name)[1].settings, name)
    engine = None
    if args.engine_url:
        from ..serving.vllm import VLLMAnswers

        engine = VLLMAnswers(args.engine_url, path)
    model, processor = load_model(path, args)
    name = args.name or Path(args.model).name
    return create_app(
        model,
        processor,
        name,
        caches=caches,
        limits=limits,
        engine=engine,
        token=token,
        hosts=hosts,
        fetch_hosts=args.fetch_host,
    )


def _settings(args: argparse.Namespace, path: Path, k: int) -> Any:
    """Of a cache that is made: as `fwd2bot compress --cache` makes one."""
    from ..cache.format import CacheSettings
    from ..cache.naming import fingerprint_of
    from ..config import CONFIG_NAME
    from ..files.pixels import OWN
    from ..files.text import read_json
    from .fill import DEFAULT_CODEC

    saved = read_json(path / CONFIG_NAME)  # which `checked` has verified
    size, pooling = saved["base"]["fingerprint"]["hidden_size"], saved["fwd2bot"]["pooling"]
    name = str(Path(args.model).absolute()) if Path(args.model).is_dir() else args.model
    more = {**OWN.as_settings(), "model": name, "quantised": quantisation(args) or ""}
    return CacheSettings(fingerprint_of(path), k, size, DEFAULT_CODEC, pooling, **more)


def _described(service: Any, token: str | None) -> str:
    images = sum(service.caches.counts().values())
    parts = [f"{images:,} images" if service.caches else "no cache", "with a token" if token else "this machine alone"]
    return ", ".join(parts)
