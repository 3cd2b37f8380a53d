"""Metrics for Prometheus: counts and times, never prompts or answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
    "disk_cache_bytes": "Bytes of the prefix cache on disk, of all models in its folder.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts found in the prefix cache.",
    "restored_tokens": "Tokens whose keys and values were read from disk.",
    "disk_cache_hits": "Requests with keys and values from disk.",
    "disk_cache_errors": "Files of the prefix cache that could not be read or written, or were read too slowly.",
    "completion_tokens": "Tokens generated.",
    "drafted_tokens": "Draft tokens proposed by speculation.",
    "accepted_tokens": "Draft tokens accepted.",
    "finished": "Answers that finished.",
    "cancelled": "Answers that were cancelled.",
    "steps": "Forward passes of the model.",
}


GAUGES = tuple(_GAUGES)
"""The engine's statistics of the present. The others are counts."""


class Metrics:
    """The metrics of one server, in their own registry.

    Args:
        engine_stats: Returns the counters of the engines by model. A server of one model calls it None: its metrics
            have no label `model`, so that the names of their series stay as they are.
        is_labelled: Whether metrics of answers have the label `model`.
    """

    def __init__(
        self, engine_stats: Callable[[], Mapping[str | None, EngineStats]], *, is_labelled: bool = False
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine_stats, is_labelled))
        self._is_labelled = is_labelled
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
        self._first_token_seconds = Histogram(
            "nybble_first_token_seconds",
            "Time from a prompt to the first piece of its answer.",
            _labels(is_labelled),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def observe_first_token(self, model: str, seconds: float) -> None:
        """Counts the time from a prompt to the first piece of its answer."""
        histogram = self._first_token_seconds
        (histogram.labels(model) if self._is_labelled else histogram).observe(seconds)

    def add(self, collector: Collector) -> None:
        """Adds more metrics."""
        self._registry.register(collector)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the counters of the engines whenever Prometheus reads the metrics."""

    def __init__(self, engine_stats: Callable[[], Mapping[str | None, EngineStats]], is_labelled: bool) -> None:
        self._engine_stats = engine_stats
        self._labels = _labels(is_labelled)

    def collect(self) -> Iterable[Metric]:
        by_model = self._engine_stats()
        kinds = ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS))
        for kind, names in kinds:
            for name, description in names.items():
                family = kind(f"nybble_{name}", description, labels=self._labels)
                for model, stats in by_model.items():
                    family.add_metric([] if model is None else [model], getattr(stats, name))
                yield family


def _labels(is_labelled: bool) -> list[str]:
    return ["model"] if is_labelled else []
