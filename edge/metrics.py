"""The books for Prometheus: `request.py --metrics-port`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from edge.cameras import Camera
from edge.sinks import SinkError
from edge.stats import Books, Outcome

# Seconds from capture to answer: from a server that idles to one that is far behind.
BUCKETS_S = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, math.inf)

SCRAPE_TIMEOUT_S = 5.0


class BooksCollector(Collector):
    """Reads the books whenever Prometheus asks, so that nothing is counted twice."""

    def __init__(self, books: Mapping[Camera, Books]) -> None:
        self._books: dict[str, Books] = {}
        for camera, book in books.items():
            # Prometheus refuses a page where something stands twice.
            same = sum(other.name == camera.name for other in books)
            number = len(self._books) + 1
            self._books[camera.name if same == 1 else f"{camera.name} (input {number})"] = book

    def collect(self) -> Iterator[Metric]:
        captured = CounterMetricFamily("camera_frames_captured", "Frames read from the camera.", labels=["camera"])
        frames = CounterMetricFamily("camera_frames", "Frames by what became of them.", labels=["camera", "outcome"])
        latency = HistogramMetricFamily("camera_latency_seconds", "From capture to answer.", labels=["camera"])
        for name, book in self._books.items():
            captured.add_metric([name], book.captured)
            for outcome in get_args(Outcome):
                frames.add_metric([name, outcome], book.outcomes[outcome])
            counts = zip(map(floatToGoString, BUCKETS_S), book.latencies.counts(BUCKETS_S), strict=True)
            latency.add_metric([name], list(counts), book.latencies.total_s)
        yield from (captured, frames, latency)


@contextmanager
def metrics_page(address: tuple[str, int] | None, books: Mapping[Camera, Books]) -> Iterator[None]:
    """Serve the books at http://address/metrics until the block ends, or nothing without an address.

    Raises SinkError if the address can't be used.
    """
    if address is None:
        yield
        return
    host, port = address
    registry = CollectorRegistry()
    registry.register(BooksCollector(books))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise SinkError(f"can't serve metrics on {host}:{port}: {error.strerror or error}") from error
    # Who never finishes asking holds a thread and a descriptor no longer than this, and is no news of ours.
    handler: Any = server.RequestHandlerClass
    server.RequestHandlerClass = type("Handler", (handler,), {"timeout": SCRAPE_TIMEOUT_S})
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
