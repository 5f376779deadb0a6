"""Annotated videos: the frames of a camera with their predictions drawn on them."""

import errno
import math
import os
import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from edge.cameras import Camera
from edge.drawing import annotate
from edge.errors import OutputError
from edge.frames import Frame, Result
from edge.options import VIDEO_CODECS
from edge.outputs import Output, open_output

MAX_HELD_FRAMES = 250  # until all models have responded to them
MAX_STILL_S = 10.0  # One frame is repeated no longer than this, however long the camera was lost.
DISK_RESERVE = 10_000_000  # bytes that a video leaves free
DISK_CHECK_FRAMES = 25
MAX_TIMEBASE = 65_535  # of MPEG-4
PROBE_SIZE = (64, 48)  # of a video that is only opened, to know whether it can be


def live_repeats(written: int, elapsed_s: float, fps: float) -> tuple[int, float]:
    """Return how many frames of a live video are due, and the seconds that it leaves out.

    The video plays as long as the camera ran: a frame captured `elapsed_s` seconds after the first one ends a video of
    1 + elapsed_s * fps frames, of which `written` are there. It is left out if there are as many already. Gaps longer
    than MAX_STILL_S are cut to that.
    """
    due = 1 + round(elapsed_s * fps) - written
    most = 1 + round(MAX_STILL_S * fps)
    return max(0, min(due, most)), max(0, due - most) / fps


def new_writer(path: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    """Return OpenCV's writer of a video, `size` is (width, height). It may not be open.

    FFmpeg takes a relative path with a colon for a URL. OpenCV states the rate as a fraction of a power of ten, and
    MPEG-4 holds no more than 65,535 in it: the rate is rounded until it fits, by less than 0.01 %.
    """
    digits = next(digits for digits in (3, 2, 1, 0) if fps * 10**digits <= MAX_TIMEBASE or not digits)
    for codec in VIDEO_CODECS[path.suffix.lower()]:
        fourcc = cv2.VideoWriter.fourcc(*codec)
        writer = cv2.VideoWriter(str(path.absolute()), cv2.CAP_FFMPEG, fourcc, round(fps, digits), size)
        if writer.isOpened():
            break
    return writer


class Video(Output):
    """Writes the annotated video of one camera, in the size of its first frame. Raises OutputError if it can't.

    A frame is shown when the first model has responded to it, with the latest results of the others, or, if the camera
    drops nothing, when all have. Frames that were sent to no model are replaced by the frame before them. A frame of a
    file gets the time that it has in the file: the frame before it is repeated until then. A live source is written at
    the rate that it states, see live_repeats().
    """

    def __init__(self, path: Path, camera: Camera, models: Sequence[str]) -> None:
        self.name = str(path)
        self._lock = open_output(path)  # held until close()
        self._lock.truncate(0)
        if not new_writer(path, camera.fps, PROBE_SIZE).isOpened():
            self._lock.close()
            path.unlink()
            raise OutputError(f"OpenCV can't write {path} at {camera.fps:g} frames a second: try another name, or .avi")
        self._path, self._camera = path, camera
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._last_image: Any = None
        self._written = 0
        self._fps = 0.0
        self._start = 0.0  # of a live source: when its first frame was captured, plus the seconds left out
        self._position_s = 0.0  # of a file: that of the last frame
        self._passes_s = 0.0  # of a file that is repeated: the seconds before its last begin
        self._numbers = dict.fromkeys(models, 0)  # of the last frame of each model
        self._results: dict[str, deque[Result]] = {model: deque() for model in models}  # of frames not shown yet
        self._latest: dict[str, Result] = {}  # of each model, up to the frame that is shown
        self._frames: dict[int, Frame] = {}  # that are not shown yet; without an image if no model got it so far
        self._number = 0  # of the last frame that was shown

    def needs_images(self, camera: Camera) -> bool:
        return camera is self._camera

    def write(self, result: Result) -> None:
        frame = result.frame
        if frame.camera is not self._camera:
            return
        self._numbers[frame.model] = frame.number
        if frame.jpeg:
            self._results[frame.model].append(result)
        if frame.number > self._number and (frame.jpeg or frame.number not in self._frames):
            self._frames[frame.number] = frame
        # A camera that drops nothing waits for its slowest model, so the video can wait too.
        is_due = frame.jpeg and frame.camera.drop_policy != "none"
        self._show_until(frame.number if is_due else max(min(self._numbers.values()), frame.number - MAX_HELD_FRAMES))

    def _show_until(self, last: float) -> None:
        """Show the frames up to number `last`, each with the latest result of each model for it or a frame before."""
        for number in sorted(each for each in self._frames if each <= last):
            frame = self._frames.pop(number)
            for model, results in self._results.items():
                while results and results[0].frame.number <= number:
                    self._latest[model] = results.popleft()
            latest = {model: self._latest[model] for model in self._numbers if model in self._latest}
            self._show(frame, annotate(frame, latest) if frame.jpeg else self._last_image)

    def _show(self, frame: Frame, image: Any) -> None:
        """Write an image at the time of a frame."""
        self._number = frame.number
        if image is None:
            return  # There was no image yet.
        if self._writer is None:
            self._start, self._fps = frame.captured_at, frame.camera.video_fps()
            self._open(image.shape[1], image.shape[0])
        if image.shape[1::-1] != self._size:
            image = cv2.resize(image, self._size)
        if frame.position_s is None:
            repeats, left_out_s = live_repeats(self._written, frame.captured_at - self._start, self._fps)
            self._start += left_out_s
        else:
            if frame.position_s < self._position_s:
                self._passes_s += self._position_s + 1 / frame.camera.fps
            self._position_s = frame.position_s
            due = 1 + round((self._passes_s + frame.position_s) * self._fps)
            repeats = max(1, due - self._written)
        still = image if self._last_image is None else self._last_image
        for each in [still] * (repeats - 1) + [image] * min(repeats, 1):
            self._write_image(each)
        self._last_image = image

    def _open(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._writer = new_writer(self._path, self._fps, self._size)
        if not self._writer.isOpened():
            raise OSError(f"OpenCV can't write {self._path}, {width} x {height} at {self._fps:g} frames a second")

    def _write_image(self, image: Any) -> None:
        # OpenCV does not report that it can't write: check before, while the end of the file still fits.
        if self._written % DISK_CHECK_FRAMES == 0 and shutil.disk_usage(self._path.parent).free < DISK_RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        assert self._writer is not None
        self._writer.write(image)
        self._written += 1

    def close(self) -> None:
        """Complete the file. Raises OSError if it does not have all its frames."""
        try:
            self._show_until(math.inf)
        finally:
            self._complete()

    def _complete(self) -> None:
        self._lock.close()
        if self._writer is None:
            self._path.unlink()  # Without a frame it would be no video.
            return
        self._writer.release()
        found = cv2.VideoCapture(str(self._path.absolute())).get(cv2.CAP_PROP_FRAME_COUNT)
        if found < 0.99 * self._written - 1:
            raise OSError(f"{self._path} has not all of its {self._written} frames: is the disk full?")
