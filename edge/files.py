"""Files, pipes and recordings: played at the pace of their time stamps, and read to their end."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2

from edge import sources
from edge.errors import SourceError
from edge.frames import Image
from edge.probe import ERROR, messages, no_frames_problem

if TYPE_CHECKING:
    from edge.cameras import Camera

# In a row. Each is a frame that can't be decoded; at the end of a file all reads fail.
MAX_FAILED_READS = 1000
SCANNED_PACKETS = 1000
MAX_SHOWN_FPS = 120.0  # of a file of variable rate: each repeated frame takes time to encode

log = logging.getLogger(__name__)


class Recording:
    """A source that was opened and has an end. It is closed when its images end."""

    def __init__(self, camera: Camera, capture: cv2.VideoCapture) -> None:
        self._camera, self._capture = camera, capture
        fps = sources.frame_rate(capture)
        if fps is None:
            stated = capture.get(cv2.CAP_PROP_FPS)
            log.warning("%s states %g frames a second: %g are used", camera.name, stated, sources.DEFAULT_FPS)
        camera.fps = fps or sources.DEFAULT_FPS
        camera.frame_count = sources.frame_count(capture)
        self._read = self._undecodable = 0  # frames of this pass
        self._position_s = 0.0

    def images(self, stop: threading.Event) -> Iterator[Image]:
        """Yield the images at the pace asked for. Raises SourceError if not all of them can be read.

        While the consumer is slower, the file waits; afterwards it continues at its pace and does not catch up.
        """
        try:
            due = -math.inf  # The first frame is due at once.
            for step_s in self._steps():
                due = max(due + step_s, time.monotonic())
                if stop.wait(max(0.0, due - time.monotonic())):
                    return
                captured_at = time.monotonic()
                ok, pixels = self._capture.retrieve()
                if ok:
                    yield Image(captured_at, self._position_s, pixels)
        finally:
            self._capture.release()

    def _steps(self) -> Iterator[float]:
        """Grab frame after frame; yield the seconds from the one before to it, at the pace asked for."""
        asked_s, is_first_pass = self._camera.interval_s, True
        while True:
            before_s = None
            for position_s in self._positions():
                step_s = 1 / self._camera.fps if before_s is None else position_s - before_s
                before_s = self._position_s = position_s
                yield step_s if asked_s is None else asked_s
            problem = self._problem() if is_first_pass else None
            if problem and (not self._read or not self._camera.loop):
                raise SourceError(problem)
            if problem:
                log.error("%s", problem)
            if not self._camera.loop or not self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0):
                return
            is_first_pass = False

    def _positions(self) -> Iterator[float]:
        """Grab the frames of one pass; yield where each is in the file, in seconds, which increases."""
        self._read = self._undecodable = 0
        interval_s = 1 / self._camera.fps
        failures, position_s = 0, -interval_s
        while failures < MAX_FAILED_READS:
            begin = time.monotonic()
            if not self._capture.grab():
                failures += 1
                if self._camera.kind == "stream" and time.monotonic() - begin >= self._camera.timing.stall_s:
                    return  # Each further read would take as long.
                continue
            if self._read:  # A file may begin with frames that refer to one before it.
                self._undecodable += failures
            self._read += 1
            failures = 0
            stamp_s = max(0.0, self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            # Where there are no time stamps, or they go back, the stated rate counts.
            position_s = stamp_s if stamp_s > position_s else position_s + interval_s
            yield position_s

    def _problem(self) -> str | None:
        """Return what is wrong if frames of the file are missing."""
        camera, read, stated = self._camera, self._read, self._camera.frame_count
        if not read:
            return f"{camera.name} {no_frames_problem(sources.fourcc(self._capture))}"
        if read >= stated > 0 or (camera.kind == "pipe" and not stated and not self._undecodable):
            return None
        if self._undecodable:
            problem = "the file is damaged"
        elif camera.kind == "pipe":
            problem = "the pipe was closed early"
        else:
            # The stated number may be wrong: FFmpeg knows whether the file ends early.
            reports = messages(camera.source, "read", ERROR, camera.timing.probe_s)
            reaches_end = self._position_s * camera.fps + 1 > 0.98 * stated
            if reports == [] or (reports is None and reaches_end):
                return None
            problem = "the file is truncated or damaged"
        number = f"{read} of {stated}" if stated else f"only {read}"
        return f"{camera.name}: {number} frames could be read, {problem}"


def still_images(camera: Camera, pixels: Any, stop: threading.Event) -> Iterator[Image]:
    """Yield an image file as a video of one frame, or with loop again and again."""
    interval_s = 1 / sources.DEFAULT_FPS if camera.interval_s is None else camera.interval_s
    yield Image(time.monotonic(), 0.0, pixels)
    while camera.loop and not stop.wait(interval_s):
        yield Image(time.monotonic(), 0.0, pixels)


def shown_fps(path: str, stated_fps: float) -> float:
    """Return the frames a second that a constant rate needs to show each frame of a file at its own time.

    The stated rate of a file of variable rate is its average. It counts the intervals of the first packets, which are
    not decoded, and ignores the shortest of them: some cameras' are irregular.
    """
    capture = cv2.VideoCapture(str(Path(path).absolute()), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])
    stamps_s: list[float] = []
    while len(stamps_s) < SCANNED_PACKETS and capture.grab():
        stamps_s.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    capture.release()
    stamps_s.sort()
    intervals_s = sorted(after - before for before, after in pairwise(stamps_s) if after > before)
    if not intervals_s:
        return stated_fps
    interval_s = intervals_s[len(intervals_s) // 10]
    # Some containers round times to milliseconds.
    return stated_fps if abs(interval_s - 1 / stated_fps) < 0.002 else min(1 / interval_s, MAX_SHOWN_FPS)
