"""What the server counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "fwd2bot_requests", "Requests, by path and status code", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "fwd2bot_request_seconds",
            "From a request's arrival to its last byte",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "fwd2bot_time_to_first_token_seconds",
            "From a request's arrival to the first token of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch = Histogram(
            "fwd2bot_batch_size", "Jobs that the model ran together", ["kind"], buckets=SIZES, registry=registry
        )
        self.prompt_tokens = Counter("fwd2bot_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter(
            "fwd2bot_cached_tokens", "Summary tokens of prompts that needed no compress pass", registry=registry
        )
        self.answer_tokens = Counter("fwd2bot_answer_tokens", "Tokens of answers", registry=registry)
        self.summaries = Counter(
            "fwd2bot_summaries",
            "Summaries of images in requests, by where they came from",
            ["origin"],
            registry=registry,
        )
        self.running = Gauge("fwd2bot_requests_running", "Requests that are being answered", registry=registry)

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware: counts requests by the route that answered them; what no route did is "other"."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.running.inc()
        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.running.dec()
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
