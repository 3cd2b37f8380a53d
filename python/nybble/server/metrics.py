"""Metrics for Prometheus: counts and times, never prompts or answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nybble.engine import EngineStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {
    "running": "Answers that are being generated.",
    "waiting": "Answers that wait for a slot.",
    "cached_pages": "Pages of keys and values in the prefix cache.",
    "cache_bytes": "Bytes of the KV cache.",
    "disk_cache_bytes": "Bytes of the prefix cache on disk.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts found in the prefix cache.",
    "restored_tokens": "Tokens whose keys and values were read from disk.",
    "disk_cache_hits": "Requests with keys and values from disk.",
    "disk_cache_errors": "Files of the prefix cache that could not be read or written.",
    "completion_tokens": "Tokens generated.",
    "drafted_tokens": "Draft tokens proposed by speculation.",
    "accepted_tokens": "Draft tokens accepted.",
    "finished": "Answers that finished.",
    "cancelled": "Answers that were cancelled.",
    "steps": "Forward passes of the model.",
}


class Metrics:
    """The metrics of one server, in their own registry.

    Args:
        engine_stats: Returns the counters of the engine.
    """

    def __init__(self, engine_stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine_stats))
        ProcessCollector(registry=self._registry)
        self.requests: Counter = Counter(
            "nybble_http_requests", "HTTP requests answered.", ["path", "status"], registry=self._registry
        )
        self.seconds: Histogram = Histogram(
            "nybble_http_request_seconds",
            "Time from a request to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds: Histogram = Histogram(
            "nybble_first_token_seconds",
            "Time from a prompt to the first piece of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the counters of the engine whenever Prometheus reads the metrics."""

    def __init__(self, engine_stats: Callable[[], EngineStats]) -> None:
        self._engine_stats = engine_stats

    def collect(self) -> Iterable[Metric]:
        stats = self._engine_stats()
        for name, description in _GAUGES.items():
            yield GaugeMetricFamily(f"nybble_{name}", description, value=getattr(stats, name))
        for name, description in _COUNTERS.items():
            yield CounterMetricFamily(f"nybble_{name}", description, value=getattr(stats, name))
