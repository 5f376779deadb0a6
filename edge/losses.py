"""Reports of lost cameras, few even if a camera is lost again and again."""

import logging
import math
import time
from collections import deque

MAX_REPORTS = 2  # of losses in a minute

log = logging.getLogger(__name__)


class LossReport:
    """Reports that a camera is lost, and that it is back.

    More than two losses in `interval_s` seconds are counted, and reported by one line in this time.
    """

    def __init__(self, name: str, interval_s: float) -> None:
        self._name, self._interval_s = name, interval_s
        self._seen_at, self._written_at = time.monotonic(), -math.inf
        self._was_seen = self._is_lost = False
        self._losses = 0  # since the last line
        self._says_lost = self._says_often = False  # the last line
        self._reports = deque([-math.inf] * MAX_REPORTS, MAX_REPORTS)  # when the last losses were reported

    def record_loss(self) -> bool:
        """Record that the camera is lost; return whether report() is due."""
        self._losses += not self._is_lost
        self._is_lost = True
        is_due = self._losses == 1 and time.monotonic() - self._reports[0] >= self._interval_s
        return not self._says_lost and (is_due or self._is_due())

    def report(self, problem: str) -> None:
        """Report that the camera is lost, and why."""
        self._says_often = self._losses > 1
        state = "lost" if self._was_seen else "not there"
        text = f"was lost {self._often()}, the last time: {problem}" if self._says_often else f"is {state}, {problem}"
        self._write(f"the camera {text}; trying until it is back", says_lost=True)

    def record_frame(self, captured_at: float) -> None:
        """Record a frame; report that the camera is back, if it was lost."""
        if self._says_lost and not self._losses and not self._says_often:
            self._write(f"the camera is back after {captured_at - self._seen_at:.1f} s", says_lost=False)
        elif (self._says_lost or self._losses) and self._is_due():
            text = f"was lost {self._often()}, and is back" if self._losses else "is back"
            self._write(f"the camera {text}", says_lost=False)
        self._was_seen, self._is_lost, self._seen_at = True, False, captured_at

    def _is_due(self) -> bool:
        return time.monotonic() - self._written_at >= self._interval_s

    def _often(self) -> str:
        times = "once" if self._losses == 1 else f"{self._losses} times"
        return f"{times} in {time.monotonic() - self._written_at:.0f} s"

    def _write(self, text: str, says_lost: bool) -> None:
        log.warning("%s: %s", self._name, text)
        self._written_at = time.monotonic()
        # A line with a number counts for all of them: the next one follows after `interval_s`.
        self._reports.extend([self._written_at] * (MAX_REPORTS if self._losses > 1 else says_lost))
        self._losses, self._says_lost = 0, says_lost
