"""Where frames come from: a file, a device or a network stream, read with OpenCV."""

import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import cv2

DEFAULT_FPS = 25.0  # For the rare file that does not tell its frame rate.


class SourceError(Exception):
    """A source that can't be opened or read, with its name and what to do."""


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    number: from 1, in the order read.
    captured_at: when it was read, time.monotonic() seconds.
    jpeg: the picture, JPEG-encoded.
    """

    number: int
    captured_at: float
    jpeg: bytes


class Camera:
    """An open source of frames.

    name: a video file, a URL, or a device: its number such as "0", or its path such as /dev/video0.

    Raises SourceError if it can't be opened.
    """

    def __init__(self, name: str) -> None:
        self.label = redact(name)
        path = Path(name)
        self._is_device = name.isdecimal() or path.is_char_device()
        self._is_file = not self._is_device and "://" not in name
        if self._is_file and not path.exists():
            raise SourceError(f"no such file: {name}")
        if self._is_file and path.is_dir():
            raise SourceError(f"{name} is a folder, expected a video file")
        # What goes wrong is said by SourceError, in one line, and not by OpenCV and FFmpeg as well.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        self._capture = cv2.VideoCapture(int(name) if name.isdecimal() else name)
        if not self._capture.isOpened():
            if self._is_device:
                raise SourceError(f"no camera {name}: check that it is plugged in and that no other program uses it")
            if self._is_file:
                raise SourceError(f"{name} is no video that OpenCV can read")
            raise SourceError(f"can't open {self.label}: check the address and that the stream is running")

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames until the source ends or `stop` is set, then release the source.

        A file plays at its own frame rate, as a camera would deliver it. When the consumer is slower than that, the
        file waits, and no frame is lost; afterwards it goes on at its own rate, without hurrying to catch up.

        Raises SourceError if the source has no frame at all, or if a device stops delivering.
        """
        interval = 1 / self._frames_per_second() if self._is_file else 0.0
        due = time.monotonic()
        number = 0
        try:
            while not stop.wait(max(0.0, due - time.monotonic())):
                ok, image = self._capture.read()
                if not ok:
                    break
                captured_at = time.monotonic()
                number += 1
                ok, jpeg = cv2.imencode(".jpg", image)
                if not ok:
                    raise SourceError(f"{self.label}: OpenCV can't encode frame {number}, {image.shape}, as JPEG")
                yield Frame(number, captured_at, jpeg.tobytes())
                due = max(due + interval, time.monotonic())
            if not stop.is_set() and (number == 0 or self._is_device):
                raise SourceError(f"{self.label} delivers no frames" + (" any more" if number else ""))
        finally:
            self.release()

    def release(self) -> None:
        """Give the device or file back. Harmless when done twice."""
        self._capture.release()

    def _frames_per_second(self) -> float:
        fps: float = self._capture.get(cv2.CAP_PROP_FPS)
        return fps if math.isfinite(fps) and fps > 0 else DEFAULT_FPS


def redact(name: str) -> str:
    """Return a source's name as it may be shown: without user and password."""
    if "://" not in name:
        return name
    url = urlsplit(name)
    return urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))
