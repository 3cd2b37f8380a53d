"""Metrics of a pool: which models are loaded, how often they were, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nybble.server.metrics import Metrics
from nybble.server.pool.entry import Entry
from nybble.server.pool.needs import Limits


def add_pool_metrics(metrics: Metrics, entries: Sequence[Entry], limits: Limits) -> None:
    """Adds the metrics of a pool to those of the server.

    Args:
        metrics: The metrics of the server.
        entries: The models.
        limits: How much they may take together.
    """
    metrics.add(_PoolCollector(entries, limits))


class _PoolCollector(Collector):
    """Reads the state of a pool whenever Prometheus reads the metrics."""

    def __init__(self, entries: Sequence[Entry], limits: Limits) -> None:
        self._entries = entries
        self._limits = limits

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        gauges: dict[str, tuple[str, Callable[[Entry], float]]] = {
            "loaded": ("1 for a loaded model, 0 for another.", lambda entry: entry.state == "loaded"),
            "bytes": ("Memory that is reserved for the model.", lambda entry: entry.nbytes + entry.lost_bytes),
            "requests_in_progress": ("Requests that use the model.", lambda entry: entry.users),
            "requests_waiting": ("Requests that wait for the model.", lambda entry: len(entry.waiting)),
        }
        for name, (description, value) in gauges.items():
            gauge = GaugeMetricFamily(f"nybble_model_{name}", description, labels=["model"])
            for entry in self._entries:
                gauge.add_metric([entry.name], value(entry))
            yield gauge
        counts: dict[str, tuple[str, Callable[[Entry], float]]] = {
            "loads": ("Times that the model was loaded.", lambda entry: entry.loads),
            "unloads": ("Times that the model was unloaded.", lambda entry: entry.unloads),
            "load_failures": ("Times that the model could not be loaded.", lambda entry: entry.failures),
        }
        for name, (description, value) in counts.items():
            counter = CounterMetricFamily(f"nybble_model_{name}", description, labels=["model"])
            for entry in self._entries:
                counter.add_metric([entry.name], value(entry))
            yield counter
        if self._limits.max_bytes is not None:
            yield GaugeMetricFamily(
                "nybble_models_max_bytes", "Memory that models may take together.", value=self._limits.max_bytes
            )
