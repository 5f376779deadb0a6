"""The stats for Prometheus: `request.py --metrics-port`."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from edge.errors import OutputError
from edge.frames import Stream
from edge.stats import OUTCOMES, CameraStats

# Seconds from capture to response: from an idle server to one that is far behind.
BUCKETS_S = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, math.inf)
SCRAPE_TIMEOUT_S = 5.0  # A client that does not complete its request holds a thread no longer than this.


class StatsCollector(Collector):
    """Reads the stats whenever Prometheus asks, so that nothing is counted twice."""

    def __init__(self, stats: Mapping[Stream, CameraStats]) -> None:
        cameras = list(dict.fromkeys(stream.camera for stream in stats))
        names = Counter(camera.name for camera in cameras)
        self._stats: dict[tuple[str, str], CameraStats] = {}
        for stream, counts in stats.items():
            # Prometheus rejects a page that holds the same labels twice.
            name = stream.camera.name
            name += f" (input {1 + cameras.index(stream.camera)})" if names[name] > 1 else ""
            self._stats[name, stream.model] = counts

    def collect(self) -> Iterator[Metric]:
        labels = ["camera", "model"]
        captured = CounterMetricFamily("camera_frames_captured", "Frames read for the model.", labels=labels)
        frames = CounterMetricFamily("camera_frames", "Frames by outcome.", labels=[*labels, "outcome"])
        latency = HistogramMetricFamily("camera_latency_seconds", "From capture to response.", labels=labels)
        for stream, counts in self._stats.items():
            captured.add_metric(stream, counts.captured)
            for outcome in OUTCOMES:
                frames.add_metric([*stream, outcome], counts.outcomes[outcome])
            buckets = zip(map(floatToGoString, BUCKETS_S), counts.latencies.counts(BUCKETS_S), strict=True)
            latency.add_metric(stream, list(buckets), counts.latencies.total_s)
        yield from (captured, frames, latency)


@contextmanager
def serve_metrics(address: tuple[str, int] | None, stats: Mapping[Stream, CameraStats]) -> Iterator[None]:
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
