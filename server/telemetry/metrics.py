"""Figures of the running server for Prometheus."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.serving.engine import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a cached refusal to the longest request, in seconds.
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """What is counted; one for each application, so that two in one process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("lowssl_requests", "Requests answered.", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "lowssl_request_seconds",
            "From a request's headers to its answer.",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._images = Counter("lowssl_images", "Images, by what became of them.", ["outcome"], registry=self._registry)
        ProcessCollector(registry=self._registry)

    def watch(self, status: Callable[[], Status]) -> None:
        """Report the engine's state, too, from now on."""
        self._registry.register(_EngineCollector(status))

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_images(self, outcome: str, number: int) -> None:
        """So many images were "embedded", or refused for the reason that `outcome` names."""
        self._images.labels(outcome).inc(number)

    def render(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's state at the moment it is asked for."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        status = self._status()
        yield GaugeMetricFamily("lowssl_in_flight", "Requests that have a place.", value=status.in_flight)
        yield GaugeMetricFamily("lowssl_waiting_images", "Images that no worker has taken yet.", value=status.waiting)
        yield GaugeMetricFamily("lowssl_ready", "Whether a version serves.", value=status.version is not None)
        versions = GaugeMetricFamily(
            "lowssl_version_loaded", "1 for the version that serves, 0 for others in memory.", labels=["version"]
        )
        for version in status.loaded:
            versions.add_metric([version], version == status.version)
        yield versions
