# SPDX-License-Identifier: Apache-2.0
"""The page that Prometheus reads, written by prometheus-client out of what is read at that moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from splicer.errors import SplicerError
from splicer.metrics.catalogue import BY_NAME, METRICS, Metric, Reading, Samples
from splicer.metrics.histogram import BOUNDS, Distribution


def require() -> None:
    """Raises SplicerError where prometheus-client is not installed."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise SplicerError(
            "metrics need the python module prometheus_client, which is not installed",
            hint="apt-get install python3-prometheus-client, or: pip install 'splicer[metrics]'",
        ) from error


class _Collector:
    """What prometheus-client asks for."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read

    def collect(self) -> Iterator[Any]:
        reading = self._read()
        if unknown := reading.keys() - BY_NAME.keys():
            raise KeyError(f"not in the catalogue: {', '.join(sorted(unknown))}")
        for metric in METRICS:
            if metric.name in reading:
                yield _make_family(metric, reading[metric.name])


def _make_family(metric: Metric, samples: Samples) -> Any:
    from prometheus_client import core

    kinds = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }
    family = kinds[metric.kind](metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        if isinstance(value, Distribution):
            names = (*map(str, BOUNDS), "+Inf")
            family.add_metric(
                labels, buckets=list(zip(names, value.counts, strict=True)), sum_value=value.seconds
            )
        else:
            family.add_metric(labels, value)
    return family


class Page:
    """Any thread may render it; one at a time does."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        """Raises SplicerError where prometheus-client is not installed."""
        require()
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._registry = CollectorRegistry()
        self._registry.register(_Collector(read))
        ProcessCollector(registry=self._registry)
        self._turn = threading.Lock()

    def render(self, accept: str) -> tuple[str, bytes]:
        """Content type and text, of the kind that the header `accept` asks for."""
        from prometheus_client.exposition import choose_encoder

        encode, kind = choose_encoder(accept)
        with self._turn:
            return kind, encode(self._registry)
