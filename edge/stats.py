"""Counts, latencies and rates of each stream, its last minute, and the summary at the end."""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from edge.frames import Outcome, Result, Stream

OUTCOMES = get_args(Outcome)
RATE_WINDOW_S = 10.0
MINUTE_S = 60
MAX_RESULTS = 10_000  # of a minute: enough for 166 frames a second, and some 1 MB
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
        """Return the seconds that `percent` % of the latencies do not exceed, 0.0 if there are none.

        Any thread may call it.
        """
        buckets = dict(self._buckets)
        left = sum(buckets.values()) * percent / 100
        for number, count in sorted(buckets.items()):
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


class LastMinute:
    """The results of a stream in the last 60 seconds, at most MAX_RESULTS of them. Any thread may read the figures."""

    def __init__(self) -> None:
        self._results = deque[tuple[float, Outcome, float]](maxlen=MAX_RESULTS)  # arrival, outcome, latency in ms
        self._begin = math.inf

    def add(self, result: Result, now: float) -> None:
        """Add a result that arrived at `now`, time.monotonic() seconds."""
        self._begin = min(self._begin, now)
        self._results.append((now, result.outcome, 1000 * (result.latency_s or 0.0)))

    def figures(self, now: float) -> dict[str, Any]:
        """Return answered frames a second and the share of lost ones in the last 10 s, and latencies in milliseconds.

        Unchanged frames are left out of the share of lost ones.
        "seconds" has the p50 and p99 of each of the last 60 seconds, the latest last; None without a response.
        """
        results = self._results.copy()
        recent = [outcome for at, outcome, _ in results if at > now - RATE_WINDOW_S and outcome != "unchanged"]
        lost = recent.count("dropped") + recent.count("expired")
        fps = recent.count("answered") / min(RATE_WINDOW_S, max(1.0, now - self._begin))
        seconds: list[list[float]] = [[] for _ in range(MINUTE_S)]
        for at, outcome, ms in results:
            if outcome == "answered" and now - at < MINUTE_S:
                seconds[-1 - int(max(0.0, now - at))].append(ms)
        minute = [ms for second in seconds for ms in second]
        return {
            "last_10_s": {"fps": round(fps, 1), "lost_share": round(lost / max(1, len(recent)), 3)},
            "last_minute": {
                "p50_ms": percentile(minute, 50),
                "p99_ms": percentile(minute, 99),
                "seconds": [[percentile(second, 50), percentile(second, 99)] for second in seconds],
            },
        }


def percentile(values: list[float], percent: float) -> float | None:
    """Return the value that `percent` % of the values do not exceed, None if there are none."""
    return round(sorted(values)[math.ceil(len(values) * percent / 100) - 1], 1) if values else None


@dataclass
class CameraStats:
    """The counts of one stream. At the end captured = answered + failed + dropped + expired + unchanged.

    captured: counted by the reader thread; all else by the main thread, when it writes a result.
    causes: the frames that were not answered though they changed, by (outcome, error).
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

    def mean_batch(self) -> float | None:
        """Return the mean number of frames in a forward pass; each pass is counted once by each of its frames."""
        sizes = dict(self.batch_sizes)
        passes = sum(count / size for size, count in sizes.items())
        return sum(sizes.values()) / passes if passes else None

    def figures(self) -> dict[str, float | None]:
        """Return the columns of the summary; None for latencies and batch if no frame was answered."""
        names = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99, "max_ms": 100}
        has_latency = self.outcomes["answered"] > 0
        return {
            "captured": self.captured,
            **{outcome: self.outcomes[outcome] for outcome in OUTCOMES},
            "fps": self.fps(),
            **{name: 1000 * self.latencies.percentile(each) if has_latency else None for name, each in names.items()},
            "batch": self.mean_batch(),
        }


def summary(stats: Mapping[Stream, CameraStats]) -> str:
    """Return a table with a line for each stream, and below it the causes of the frames that were not answered."""
    rows = [["camera", "model", "captured", *OUTCOMES, "FPS", "p50 ms", "p95 ms", "p99 ms", "max ms", "batch"]]
    formats = ["d"] * (1 + len(OUTCOMES)) + [".1f"] + [".0f"] * 4 + [".1f"]
    causes, models = [], {stream.model for stream in stats}
    for stream, counts in stats.items():
        figures = zip(counts.figures().values(), formats, strict=True)
        cells = ["-" if value is None else format(value, spec) for value, spec in figures]
        rows.append([stream.camera.name, stream.model, *cells])
        name = stream.name(models)
        causes += [f"{name}: {n} {outcome}: {cause}" for (outcome, cause), n in counts.causes.most_common()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])] for row in rows]
    return "\n".join(["  ".join(cells) for cells in aligned] + causes)
