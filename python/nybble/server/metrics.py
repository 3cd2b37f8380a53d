"""What Prometheus may know: counts and times, never texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from nybble.server.service import Service

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {
    "running": "Answers that are being written.",
    "waiting": "Answers that wait for a slot.",
    "cached_pages": "Pages of keys and values that are kept for prompts to come.",
    "cache_bytes": "Bytes of keys and values in memory.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts whose keys and values were there already.",
    "completion_tokens": "Tokens written.",
    "drafted_tokens": "Tokens guessed by speculation.",
    "accepted_tokens": "Guessed tokens that were right.",
    "finished": "Answers that have ended by themselves.",
    "cancelled": "Answers that were cut off.",
    "steps": "Passes through the model.",
}


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(service))
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "nybble_http_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "nybble_http_request_seconds",
            "From a request to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "nybble_first_token_seconds",
            "From submitting a prompt to the first piece of text.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Asks the engine when it is asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        stats = self._service.engine.stats()
        for name, words in _GAUGES.items():
            yield GaugeMetricFamily(f"nybble_{name}", words, value=getattr(stats, name))
        for name, words in _COUNTERS.items():
            yield CounterMetricFamily(f"nybble_{name}", words, value=getattr(stats, name))
