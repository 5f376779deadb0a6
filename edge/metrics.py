"""The stats for Prometheus, at /metrics of the web page."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from edge.cameras import Camera, State
from edge.frames import Stream
from edge.stats import OUTCOMES, CameraStats

# Seconds from capture to response: from an idle server to one that is far behind.
BUCKETS_S = (0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, math.inf)


class StatsCollector(Collector):
    """Reads the stats whenever Prometheus asks, so that nothing is counted twice."""

    def __init__(self, stats: Mapping[Stream, CameraStats]) -> None:
        cameras = list(dict.fromkeys(stream.camera for stream in stats))
        names = Counter(camera.name for camera in cameras)
        self._stats: dict[tuple[str, str], CameraStats] = {}
        self._cameras: dict[str, Camera] = {}
        for stream, counts in stats.items():
            # Prometheus rejects a page that holds the same labels twice.
            name = stream.camera.name
            name += f" (input {1 + cameras.index(stream.camera)})" if names[name] > 1 else ""
            self._stats[name, stream.model] = counts
            self._cameras[name] = stream.camera

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
        state = GaugeMetricFamily("camera_state", "1 for the state of the camera.", labels=["camera", "state"])
        for name, camera in self._cameras.items():
            for each in get_args(State):
                state.add_metric([name, each], camera.state == each)
        yield from (captured, frames, latency, state)
