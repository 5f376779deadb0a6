"""Counts, latencies and rates of each stream, and the summary at the end."""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from edge.frames import Outcome, Result, Stream

OUTCOMES = get_args(Outcome)
RATE_WINDOW_S = 10.0
MAX_CAUSES = 20
BUCKET_RATIO = 1.01  # of the bounds of a bucket


class Latencies:
    """Counts latencies in logarithmic buckets: exact to 1 %, and months of them need no more memory than a minute."""

    def __init__(self) -> None:
        self.max_s = self.total_s = 0.0
        self._buckets = Counter[int]()

    def add(self, seconds: float) -> None:
        self.max_s = max(self.max_s, seconds)
        self.total_s += seconds
        self._buckets[math.floor(math.log(max(seconds, 1e-6), BUCKET_RATIO))] += 1

    def counts(self, bounds_s: Sequence[float]) -> list[int]:
        """Return how many latencies are at most as long as each bound. Any thread may call it."""
        buckets = dict(self._buckets)
        return [sum(count for number, count in buckets.items() if BUCKET_RATIO**number <= bound) for bound in bounds_s]

    def percentile(self, percent: float) -> float:
        """Return the seconds that `percent` % of the latencies do not exceed, 0.0 if there are none."""
        left = self._buckets.total() * percent / 100
        for number, count in sorted(self._buckets.items()):
            left -= count
            if left <= 0:
                return min(BUCKET_RATIO ** (number + 1), self.max_s)
        return 0.0


class Rate:
    """Answered frames a second in the last RATE_WINDOW_S seconds, or since the first frame's capture if later."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._answered_at = deque[float]()

    def add(self, result: Result, now: float) -> None:
        """Count a result that arrived at `now`, time.monotonic() seconds."""
        if self._start is None:
            self._start = result.frame.captured_at
        if result.outcome == "answered":
            self._answered_at.append(now)
        self.fps(now)  # forgets the oldest ones

    def fps(self, now: float) -> float:
        while self._answered_at and self._answered_at[0] <= now - RATE_WINDOW_S:
            self._answered_at.popleft()
        seconds = min(RATE_WINDOW_S, now - self._start) if self._start is not None else 0.0
        return len(self._answered_at) / seconds if seconds > 0 else 0.0


@dataclass
class CameraStats:
    """The counts of one stream. At the end captured = answered + failed + dropped + expired.

    captured: counted by the reader thread; all else by the main thread, when it writes a result.
    causes: the frames that were not answered, by (outcome, error).
    batch_sizes: answered frames by the number of frames in their forward pass.
    """

    captured: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    causes: Counter[tuple[Outcome, str]] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)
    batch_sizes: Counter[int] = field(default_factory=Counter)
    first_captured_at: float | None = None
    last_answered_at: float = 0.0

    def record(self, result: Result) -> bool:
        """Count a result; return whether its error is the first of its kind."""
        self.outcomes[result.outcome] += 1
        if self.first_captured_at is None:
            self.first_captured_at = result.frame.captured_at
        if result.latency_s is not None:
            self.latencies.add(result.latency_s)
            self.last_answered_at = max(self.last_answered_at, result.frame.captured_at + result.latency_s)
        if result.batch_size is not None:
            self.batch_sizes[result.batch_size] += 1
        if result.error is None:
            return False
        cause = (result.outcome, result.error)
        if cause not in self.causes and len(self.causes) >= MAX_CAUSES:
            cause = (result.outcome, "other reasons")  # A server may send a different text for every frame.
        self.causes[cause] += 1
        return self.causes[cause] == 1

    def fps(self) -> float:
        """Return answered frames over the time from the first capture to the last response."""
        seconds = self.last_answered_at - (self.first_captured_at or 0.0)
        return self.outcomes["answered"] / seconds if seconds > 0 else 0.0

    def mean_batch(self) -> float:
        """Return the mean number of frames in a forward pass; each pass is counted once by each of its frames."""
        passes = sum(count / size for size, count in self.batch_sizes.items())
        return self.batch_sizes.total() / passes if passes else 0.0


def summary(stats: Mapping[Stream, CameraStats]) -> str:
    """Return a table with a line for each stream, and below it the causes of the frames that were not answered."""
    rows = [["camera", "model", "captured", *OUTCOMES, "FPS", "p50 ms", "p95 ms", "p99 ms", "max ms", "batch"]]
    causes, models = [], {stream.model for stream in stats}
    for stream, counts in stats.items():
        outcomes = [str(counts.outcomes[outcome]) for outcome in OUTCOMES]
        seconds = [*map(counts.latencies.percentile, (50, 95, 99)), counts.latencies.max_s]
        latencies = [f"{1000 * each:.0f}" if counts.outcomes["answered"] else "-" for each in seconds]
        batch = f"{counts.mean_batch():.1f}" if counts.batch_sizes else "-"
        cells = [stream.camera.name, stream.model, str(counts.captured), *outcomes]
        rows.append([*cells, f"{counts.fps():.1f}", *latencies, batch])
        name = stream.name(models)
        causes += [f"{name}: {n} {outcome}: {cause}" for (outcome, cause), n in counts.causes.most_common()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])] for row in rows]
    return "\n".join(["  ".join(cells) for cells in aligned] + causes)
