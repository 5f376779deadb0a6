"""The books: what became of every frame, how fast, and how late."""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edge.cameras import Camera, Frame

Outcome = Literal["answered", "failed", "dropped", "expired"]
Prediction = dict[str, float]

RATE_WINDOW_S = 10.0
MOST_CAUSES = 20
STEP = 1.01  # from one class of latencies to the next: percentiles are exact to 1 %


@dataclass(frozen=True)
class Result:
    """What became of a frame.

    predictions: label -> probability, if it was answered.
    error: why it was not answered, with the status if there was one.
    latency_s: from capture to answer, if it was answered.
    shared_by: how many frames went through the network together with this one, if the server told.
    """

    frame: Frame
    outcome: Outcome
    predictions: Prediction | None = None
    error: str | None = None
    latency_s: float | None = None
    shared_by: int | None = None


class Latencies:
    """Counts latencies in logarithmic classes, so that months of them take no more memory than a minute's."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.total_s = 0.0
        self._classes = Counter[int]()

    def add(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)
        self.total_s += seconds
        self._classes[math.floor(math.log(max(seconds, 1e-6), STEP))] += 1

    def counts(self, bounds_s: Sequence[float]) -> list[int]:
        """Return how many latencies are at most as long as each bound, to 1 %. Any thread may ask."""
        classes = dict(self._classes)
        return [sum(count for number, count in classes.items() if STEP**number <= bound) for bound in bounds_s]

    def percentile(self, percent: float) -> float:
        """Return the seconds that `percent` % of the latencies do not exceed, to 1 %; 0.0 if there are none."""
        left = self._classes.total() * percent / 100
        for number, count in sorted(self._classes.items()):
            left -= count
            if left <= 0:
                return min(STEP ** (number + 1), self.longest_s)
        return 0.0


class Rate:
    """Answered frames a second over the last RATE_WINDOW_S seconds, or since the first frame's capture if later."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._answered_at = deque[float]()

    def add(self, result: Result, now: float) -> None:
        """Count a result that came at `now`, time.monotonic() seconds."""
        if self._start is None:
            self._start = result.frame.captured_at
        if result.outcome == "answered":
            self._answered_at.append(now)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._answered_at and self._answered_at[0] <= now - RATE_WINDOW_S:
            self._answered_at.popleft()

    def fps(self, now: float) -> float:
        self._forget(now)
        seconds = min(RATE_WINDOW_S, now - self._start) if self._start is not None else 0.0
        return len(self._answered_at) / seconds if seconds > 0 else 0.0


@dataclass
class Books:
    """One camera's books. They are closed when captured = answered + failed + dropped + expired.

    captured: counted by the reader, all else when a frame's result comes out at the other end.
    causes: the same frames as failed and dropped, by (outcome, error).
    """

    captured: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    causes: Counter[tuple[Outcome, str]] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)
    shared_by: Counter[int] = field(default_factory=Counter)
    first_capture: float | None = None
    last_answer: float = 0.0

    def add(self, result: Result) -> bool:
        """Enter a result; return whether it is the first with its cause."""
        self.outcomes[result.outcome] += 1
        is_new = False
        if result.error is not None:
            cause = (result.outcome, result.error)
            # A server may have a new text for every frame.
            if cause not in self.causes and len(self.causes) >= MOST_CAUSES:
                cause = (result.outcome, "other reasons")
            is_new = cause not in self.causes
            self.causes[cause] += 1
        if self.first_capture is None:
            self.first_capture = result.frame.captured_at
        if result.latency_s is not None:
            self.latencies.add(result.latency_s)
            self.last_answer = max(self.last_answer, result.frame.captured_at + result.latency_s)
        if result.shared_by is not None:
            self.shared_by[result.shared_by] += 1
        return is_new

    def fps(self) -> float:
        """Return answered frames over the time from the first capture to the last answer."""
        seconds = self.last_answer - (self.first_capture or 0.0)
        return self.outcomes["answered"] / seconds if seconds > 0 else 0.0


def table(books: Mapping[Camera, Books]) -> str:
    """Return the books as a table with a line for each camera, and below it the causes of what was not answered."""
    header = ["camera", "captured", "answered", "failed", "dropped", "expired", "FPS"]
    header += ["p50 ms", "p95 ms", "p99 ms", "max ms", "frames/pass"]
    rows = [header]
    for camera, book in books.items():
        numbers = [book.captured, *(book.outcomes[name] for name in ("answered", "failed", "dropped", "expired"))]
        latencies = [book.latencies.percentile(percent) for percent in (50, 95, 99)] + [book.latencies.longest_s]
        row = [camera.name, *map(str, numbers), f"{book.fps():.1f}"]
        if book.outcomes["answered"]:
            row += [f"{1000 * seconds:.0f}" for seconds in latencies]
        else:
            row += ["-"] * len(latencies)
        passes = sum(count / shared_by for shared_by, count in book.shared_by.items())
        rows.append([*row, f"{book.shared_by.total() / passes:.1f}" if passes else "-"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines += [
        f"{camera.name}: {count} {outcome}: {cause}"
        for camera, book in books.items()
        for (outcome, cause), count in book.causes.most_common()
    ]
    return "\n".join(lines)
