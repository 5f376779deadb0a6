"""Reports a live camera that sends the same image all the time, or black ones."""

import logging
import math
import zlib
from typing import Any, Literal

import cv2

from edge.frames import Frame
from edge.timing import Timing

Content = Literal["live", "frozen", "black"]
PROBLEMS: dict[str, str] = {"frozen": "all its frames are the same", "black": "its frames are black"}

MIN_SAME_FRAMES = 5  # also of a camera of few frames a second
SAMPLED = 4  # Every fourth pixel of every fourth row is compared, in 0.2 ms for 1080p.
TEST_INTERVAL_S = 1.0  # of black: averaging all pixels takes 1 to 2 ms
CELLS = (64, 36)  # The mean of a cell has no noise, and a single lamp at night fills one.
BLACK_LEVEL = 24  # of 255: a video's black may be 16, and the noise of a covered lens some levels more

log = logging.getLogger(__name__)


class ContentCheck:
    """Notices that a camera has been frozen or black for `timing.frozen_s` seconds.

    It reports one of them in `timing.report_s` seconds at most, and the end of what was reported.
    """

    def __init__(self, name: str, timing: Timing) -> None:
        self._name, self._timing = name, timing
        self._last: tuple[bytes, int] | None = None  # JPEG and checksum of the last frame
        self._same_frames = 0
        self._same_since = self._black_since = self._problem_since = math.inf
        self._tested_at = self._reported_at = -math.inf
        self._is_reported = False
        self._state: Content = "live"

    def check(self, frame: Frame, pixels: Any) -> Content:
        """Return what the camera shows. pixels: (height, width, 3) uint8 BGR, those of the frame; None: not decoded."""
        if pixels is None:
            return self._state
        now = frame.captured_at
        # A small JPEG of low quality has no noise, a sample of the pixels may miss the change of a few.
        last = frame.jpeg, zlib.crc32(pixels[::SAMPLED, ::SAMPLED].tobytes())
        is_other = last != self._last
        if is_other or frame.is_first:
            self._same_since, self._same_frames = now, 0
        self._last, self._same_frames = last, self._same_frames + 1
        if now - self._tested_at >= TEST_INTERVAL_S or frame.is_first:
            self._tested_at = now
            black_since = now if frame.is_first else min(self._black_since, now)
            self._black_since = black_since if is_black(pixels) else math.inf
        same_since = self._same_since if self._same_frames >= MIN_SAME_FRAMES else math.inf
        since = min(same_since, self._black_since)
        if now - since < self._timing.frozen_s:
            self._state = "live"
        else:
            self._problem_since = since
            self._state = "frozen" if self._black_since == math.inf else "black"
        self._report(now, is_other and self._black_since == math.inf)
        return self._state

    def _report(self, now: float, is_good: bool) -> None:
        """Report a problem or its end. is_good: of the frame; a camera that was lost may return with the same image."""
        if self._state == "live" and self._is_reported and is_good:
            self._is_reported = False
            log.warning("%s: the camera is live again after %.1f s", self._name, now - self._problem_since)
        elif self._state != "live" and not self._is_reported and now - self._reported_at >= self._timing.report_s:
            self._is_reported, self._reported_at = True, now
            text = f"{PROBLEMS[self._state]} for {now - self._problem_since:.0f} s"
            log.warning("%s: the camera is %s, %s", self._name, self._state, text)


def is_black(pixels: Any) -> bool:
    """Return whether an image, (height, width, 3) uint8 BGR, shows nothing at all."""
    return bool(cv2.resize(pixels, CELLS, interpolation=cv2.INTER_AREA).max() < BLACK_LEVEL)
