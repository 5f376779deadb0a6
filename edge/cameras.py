"""Where frames come from: files, devices and network streams, read with OpenCV."""

import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

DEFAULT_FPS = 25.0  # For a source that does not tell its frame rate, or one that can't be.
HIGHEST_FPS = 240.0
# OpenCV's own timeouts for network streams; a device has 10 s in OpenCV's driver.
OPEN_TIMEOUT_MS = 5_000
READ_TIMEOUT_MS = 5_000
# From one attempt to open a lost source to the next; doubles each time.
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 3.0
# Passwords in the query or path of a URL, where many cameras take them: ?user=admin&pwd=...
SECRET = re.compile(
    r"((?:user|usr|login|pass|pwd|psw|pw|token|key|auth|secret|sig|cred|sid|session)[^=/?&;]*=)[^&;#]*", re.IGNORECASE
)

# OpenCV opens one network stream at a time, in the whole process, and its timeout runs while it waits for its turn: who
# waits here instead has the whole time.
OPENING = threading.Lock()

Picture = tuple[float, Any]  # When it was read, time.monotonic() seconds; (height, width, 3) uint8, BGR.

log = logging.getLogger(__name__)


class SourceError(Exception):
    """A source that can't be opened or read, with its name and what to do."""


@dataclass(frozen=True)
class Frame:
    """One frame of a camera.

    number: from 1, in the order read, going on across repeats and reconnects.
    captured_at: when it was read, time.monotonic() seconds.
    jpeg: the picture, JPEG-encoded.
    """

    camera: "Camera"
    number: int
    captured_at: float
    jpeg: bytes


class Camera:
    """A source of frames: a file, which ends, or a live one, which is opened again and again when it is lost.

    Args:
        source: a video file, a URL, or a device: its number such as "0", or its path such as /dev/video0.
        fps: frames a second. A file plays at this rate, with math.inf as fast as the consumer takes its frames; a live
            source is sampled down to it. None: the file's own rate, or all frames of a live source.
        loop: repeat a file for ever.
        resize: pixels that the short edge is shrunk to; a smaller picture stays as it is.
        jpeg_quality: 1 to 100.
    """

    def __init__(
        self,
        source: str,
        fps: float | None = None,
        loop: bool = False,
        resize: int | None = None,
        jpeg_quality: int = 95,
    ) -> None:
        self.name = redact(source)  # as it may be shown
        self.is_live = source.isdecimal() or "://" in source or source.startswith("/dev/")
        self.fps = DEFAULT_FPS  # the source's own rate, or that which it is sampled at; known once it was opened
        self.frame_count = 0  # of a file that tells it, likewise
        self._source = source
        self._interval = 1 / fps if fps else None
        self._loop = loop
        self._resize = resize
        self._jpeg_quality = jpeg_quality

    def check(self) -> bytes:
        """Open the source for a moment; return a picture of it, JPEG-encoded. Raises SourceError if that fails."""
        capture = self._open()
        try:
            ok, image = capture.read()
        finally:
            capture.release()
        if not ok:
            raise SourceError(f"{self.name} can be opened, but delivers no frames")
        return self.encode(image)

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames until a file ends or `stop` is set.

        Raises SourceError if a file can't be opened or holds no frames; a live source never does.
        """
        for number, (captured_at, image) in enumerate(self._watch(stop) if self.is_live else self._play(stop), start=1):
            yield Frame(self, number, captured_at, self.encode(image))

    def _play(self, stop: threading.Event) -> Iterator[Picture]:
        """Yield a file's pictures at its pace.

        When the consumer is slower the file waits, and goes on at its rate afterwards, without hurrying to catch up.
        """
        due = time.monotonic()
        while not stop.is_set():
            capture = self._open()
            is_empty = True
            interval = 1 / self.fps if self._interval is None else self._interval
            try:
                while not stop.wait(max(0.0, due - time.monotonic())):
                    ok, image = capture.read()
                    if not ok and self._loop and not is_empty:
                        # From the beginning, without opening it anew: that could have to wait, see OPENING.
                        capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
                        ok, image = capture.read()
                    if not ok:
                        break
                    is_empty = False
                    yield time.monotonic(), image
                    due = max(due + interval, time.monotonic())
            finally:
                capture.release()
            if is_empty and not stop.is_set():
                raise SourceError(f"{self.name} can be opened, but delivers no frames")
            if not self._loop:
                return

    def _watch(self, stop: threading.Event) -> Iterator[Picture]:
        """Yield the pictures of a live source, opening it again and again while it is lost."""
        due, pause, state, is_told, seen_at = -math.inf, FIRST_PAUSE_S, "not there", False, time.monotonic()
        interval = self._interval or 0.0
        while not stop.is_set():
            problem = "no more frames come"
            try:
                with OPENING:
                    if stop.is_set():
                        return
                    capture = self._open()
                try:
                    while capture.grab() and not stop.is_set():
                        captured_at = time.monotonic()
                        # Half an interval of tolerance: a camera's frames never come as regularly as they should.
                        if captured_at < due - interval / 2:
                            continue
                        ok, image = capture.retrieve()
                        if not ok:
                            break
                        if is_told:
                            log.warning("%s: the camera is back after %.1f s", self.name, captured_at - seen_at)
                        pause, state, is_told, seen_at = FIRST_PAUSE_S, "lost", False, captured_at
                        due = (due if captured_at < due + interval else captured_at) + interval
                        yield captured_at, image
                finally:
                    capture.release()
            except (SourceError, cv2.error) as error:
                problem = " ".join(str(error).replace(self._source, self.name).split())
            if stop.is_set():
                return
            if not is_told:
                is_told = True
                log.warning("%s: the camera is %s, %s; trying until it is back", self.name, state, problem)
            stop.wait(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _open(self) -> cv2.VideoCapture:
        path = Path(self._source)
        if not self.is_live and not path.exists():
            # Whatever is before an @ may be a password, in an address without its beginning.
            raise SourceError(
                f"no such file: {self.name.rpartition('@')[2]} (an address begins with rtsp://, http:// or https://)"
            )
        if not self.is_live and path.is_dir():
            raise SourceError(f"{self.name} is a folder, expected a video file")
        # What goes wrong is said by SourceError, in one line, and not by OpenCV and FFmpeg as well.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        if "://" in self._source:
            timeouts = [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
                OPEN_TIMEOUT_MS,
                cv2.CAP_PROP_READ_TIMEOUT_MSEC,
                READ_TIMEOUT_MS,
            ]
            capture = cv2.VideoCapture(self._source, cv2.CAP_FFMPEG, timeouts)
            hint = f"can't open {self.name}: check address and password, and that the stream is running"
        elif self.is_live:
            capture = cv2.VideoCapture(int(self._source) if self._source.isdecimal() else self._source)
            hint = f"no camera {self.name}: check that it is plugged in and that no other program uses it"
        else:
            capture = cv2.VideoCapture(self._source)
            hint = f"{self.name} is no video that OpenCV can read"
        if not capture.isOpened():
            raise SourceError(hint)
        fps = capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= HIGHEST_FPS else DEFAULT_FPS
        if self.is_live and self._interval:
            self.fps = min(self.fps, 1 / self._interval)
        self.frame_count = 0 if self.is_live else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        return capture

    def encode(self, image: Any) -> bytes:
        """Return a (height, width, 3) BGR picture as JPEG, shrunk as asked for."""
        height, width = image.shape[:2]
        if self._resize and self._resize < min(height, width):
            scale = self._resize / min(height, width)
            image = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        ok, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self._jpeg_quality])
        if not ok:
            raise SourceError(f"{self.name}: OpenCV can't encode a picture of shape {image.shape} as JPEG")
        return jpeg.tobytes()


def redact(source: str) -> str:
    """Return a source's name as it may be shown: without user and password."""
    if "://" not in source:
        return source
    scheme, rest = source.split("://", 1)
    # To the last @: a password may hold another one, or a slash.
    return scheme + "://" + SECRET.sub(r"\1***", rest.rpartition("@")[2])
