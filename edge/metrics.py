"""The stats for Prometheus: `request.py --metrics-port`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from edge.cameras import Camera
from edge.errors import OutputError
from edge.stats import OUTCOMES, CameraStats

# Seconds from capture to response: from an idle server to one that is far behind.
BUCKETS_S = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, math.inf)
SCRAPE_TIMEOUT_S = 5.0  # A client that does not complete its request holds a thread no longer than this.


class StatsCollector(Collector):
    """Reads the stats whenever Prometheus asks, so that nothing is counted twice."""

    def __init__(self, stats: Mapping[Camera, CameraStats]) -> None:
        self._stats: dict[str, CameraStats] = {}
        for number, (camera, counts) in enumerate(stats.items(), start=1):
            # Prometheus rejects a page that holds a label twice.
            is_unique = sum(other.name == camera.name for other in stats) == 1
            self._stats[camera.name if is_unique else f"{camera.name} (input {number})"] = counts

    def collect(self) -> Iterator[Metric]:
        captured = CounterMetricFamily("camera_frames_captured", "Frames read from the camera.", labels=["camera"])
        frames = CounterMetricFamily("camera_frames", "Frames by outcome.", labels=["camera", "outcome"])
        latency = HistogramMetricFamily("camera_latency_seconds", "From capture to response.", labels=["camera"])
        for name, counts in self._stats.items():
            captured.add_metric([name], counts.captured)
            for outcome in OUTCOMES:
                frames.add_metric([name, outcome], counts.outcomes[outcome])
            buckets = zip(map(floatToGoString, BUCKETS_S), counts.latencies.counts(BUCKETS_S), strict=True)
            latency.add_metric([name], list(buckets), counts.latencies.total_s)
        yield from (captured, frames, latency)


@contextmanager
def serve_metrics(address: tuple[str, int] | None, stats: Mapping[Camera, CameraStats]) -> Iterator[None]:
    """Serve the stats at http://address/metrics until the block ends. Raises OutputError if that fails."""
    if address is None:
        yield
        return
    host, port = address
    registry = CollectorRegistry()
    registry.register(StatsCollector(stats))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise OutputError(f"can't serve metrics on {host}:{port}: {error.strerror or error}") from error
    handler: Any = server.RequestHandlerClass
    server.RequestHandlerClass = type("Handler", (handler,), {"timeout": SCRAPE_TIMEOUT_S})
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that has left
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
