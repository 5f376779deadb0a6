"""Files, pipes and recordings: played at the pace of their time stamps, and read to their end."""

from __future__ import annotations

import logging
import math
import statistics
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
from edge.probe import no_frames_problem, reports_damage

if TYPE_CHECKING:
    from edge.cameras import Camera

# In a row. Each is a frame that can't be decoded; at the end of a file all reads fail.
MAX_FAILED_READS = 1000
SCANNED_PACKETS = 1000
ROUNDING_S = 0.0015  # between two intervals that are equal
MAX_SHOWN_FPS = 120.0  # of a file of variable rate: each repeated frame takes time to encode

log = logging.getLogger(__name__)


class Recording:
    """A source that was opened and has an end."""

    def __init__(self, camera: Camera, capture: cv2.VideoCapture) -> None:
        self._camera, self._capture = camera, capture
        camera.learn_rate(capture)
        self._codec = sources.fourcc(capture)
        self.count = 0  # frames that were read
        self._undecodable = 0  # frames between others that were read
        self._has_stalled = False
        self._position_s = 0.0

    def images(self, stop: threading.Event, due: float) -> Iterator[Image]:
        """Yield the images at the pace asked for, the first one at `due`, time.monotonic(). Close the source then.

        While the consumer is slower, the file waits; afterwards it continues at its pace and does not catch up.
        """
        asked_s, before_s = self._camera.interval_s, math.inf
        try:
            for position_s in self._positions(stop):
                self._position_s = position_s
                step_s = position_s - before_s if asked_s is None else asked_s
                before_s = position_s
                due = max(due + step_s if self.count > 1 else due, time.monotonic())
                if stop.wait(max(0.0, due - time.monotonic())):
                    return
                captured_at = time.monotonic()
                ok, pixels = self._capture.retrieve()
                if ok:
                    yield Image(captured_at, position_s, pixels)
        finally:
            self._capture.release()

    def _positions(self, stop: threading.Event) -> Iterator[float]:
        """Grab frame after frame; yield where each is in the file, in seconds, which increases."""
        interval_s = 1 / self._camera.fps
        failures, position_s = 0, -interval_s
        while failures < MAX_FAILED_READS and not stop.is_set():
            begin = time.monotonic()
            if not self._capture.grab():
                failures += 1
                if self._camera.kind == "stream" and time.monotonic() - begin >= self._camera.timing.stall_s:
                    self._has_stalled = True  # Each further read would take as long.
                    return
                continue
            if self.count:  # A file may begin with frames that refer to one before it.
                self._undecodable += failures
            self.count += 1
            failures = 0
            stamp_s = max(0.0, self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            # Where there are no time stamps, or they go back, the stated rate counts.
            position_s = stamp_s if stamp_s > position_s else position_s + interval_s
            yield position_s

    def problem(self, stop: threading.Event) -> str | None:
        """Return what is wrong if frames of the file are missing; it was read to its end."""
        camera, count, stated = self._camera, self.count, self._camera.frame_count
        ends_early = self._position_s * camera.fps + 1 < 0.9 * stated
        if not count and not self._has_stalled:
            return f"{camera.name} {no_frames_problem(self._codec, camera.kind)}"
        if count >= stated > 0:
            return None
        if self._has_stalled:
            problem = f"the server sent nothing for {camera.timing.stall_s:g} s"
        elif self._undecodable:
            problem = "the file is damaged"
        elif camera.kind != "pipe" and reports_damage(camera.source, stop, camera.timing.probe_s, ends_early):
            problem = "the file is truncated or damaged"
        else:
            # The stated number is often wrong: sound goes on, or the rate varies. A pipe can't be read once more, and
            # FFmpeg does not notice that FLV was cut between two frames.
            if ends_early and (camera.kind == "pipe" or camera.source.lower().endswith(".flv")):
                log.warning("%s ends after %d frames, and states %d: was it cut?", camera.name, count, stated)
            return None
        number = f"{count} of {stated}" if stated else f"only {count}"
        return f"{camera.name}: {number} frames could be read, {problem}"


def play(camera: Camera, opened: cv2.VideoCapture | None, stop: threading.Event) -> Iterator[Image]:
    """Yield the images of a source that has an end; of a camera that loops, again and again.

    opened: the source, or None to open it here. Raises SourceError if it can't be opened, or read to its end.
    """
    due, is_first_pass = -math.inf, True
    while not stop.is_set():
        recording = Recording(camera, opened or sources.open_once(camera.source, camera.kind, camera.timing, stop))
        try:
            for image in recording.images(stop, due):
                due = image.captured_at + (1 / camera.fps if camera.interval_s is None else camera.interval_s)
                yield image
        except cv2.error as error:
            raise SourceError(f"{camera.name}: OpenCV can't read it: {' '.join(str(error).split())}") from error
        does_repeat = camera.loop and camera.kind != "pipe" and recording.count > 0
        problem = recording.problem(stop) if not stop.is_set() and (is_first_pass or not does_repeat) else None
        if problem and not does_repeat:
            raise SourceError(problem)
        if problem:
            log.error("%s", problem)
        if not does_repeat:
            return
        opened, is_first_pass = None, False


def still_images(camera: Camera, pixels: Any, stop: threading.Event) -> Iterator[Image]:
    """Yield an image file as a video of one frame, or with loop again and again."""
    interval_s = 1 / sources.DEFAULT_FPS if camera.interval_s is None else camera.interval_s
    yield Image(time.monotonic(), 0.0, pixels)
    while camera.loop and not stop.wait(interval_s):
        yield Image(time.monotonic(), 0.0, pixels)


def shown_fps(path: str, stated_fps: float) -> float:
    """Return the frames a second that a constant rate needs to show each frame of a file at its own time.

    The stated rate is an average, also of a rate that varies. The intervals of the first packets are measured, which
    are not decoded; the shortest of them are ignored, since some cameras are irregular.
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
    short_s = intervals_s[len(intervals_s) // 10]
    # Some containers round times to milliseconds: the mean of equal intervals is more exact.
    fps = 1 / statistics.mean(each for each in intervals_s if abs(each - short_s) < ROUNDING_S)
    return stated_fps if abs(fps / stated_fps - 1) < 0.001 else min(fps, max(stated_fps, MAX_SHOWN_FPS))
