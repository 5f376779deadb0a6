"""Sources of frames: files, devices and network streams, read with OpenCV."""

import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from edge.errors import SourceError
from edge.frames import Frame
from edge.timing import Timing, backoff_s

DEFAULT_FPS = 25.0  # of a source that states no frame rate, or an implausible one
MAX_FPS = 240.0
# Passwords in the query or path of a URL, where many cameras take them: ?user=admin&pwd=... A value is masked if its
# whole key, or a part of it between - or _, is such a word, or ends in one that is unmistakable. ?side=left is shown.
SECRET = re.compile(
    r"(?<=[?&;/#])((?:[^=/?&;]*(?:[-_]|(?=passwd|password|pwd|secret|token)))?(?:(?:access|api|auth|login|session|user)*"
    r"(?:auth|cred|key|login|pas|pass|psw|pw|pwd|secret|session|sid|sig|token|use|user|usr)"
    r"(?:code|entials?|id|name|nature|orization|phrase|s|wd|word)?)(?:[-_][^=/?&;]*)?=)[^&;#]*",
    re.IGNORECASE,
)
HOST = re.compile(r"(?:(?:[\w-]+\.)+[\w-]+|localhost|\[[0-9a-f:.]+\])(?::\d{1,5})?(?=[/?#]|$)", re.IGNORECASE)
# OpenCV opens one network stream at a time in a process, and its timeout runs while it waits for its turn. A camera
# that waits here instead has the whole timeout.
OPENING = threading.Lock()

Image = tuple[float, bytes]  # when it was read, time.monotonic() seconds; JPEG

log = logging.getLogger(__name__)


class Camera:
    """A source of frames: a file, which ends, or a live source, which is opened again whenever it is lost.

    Args:
        source: a video file, a URL, or a device: its number such as "0", or its path such as /dev/video0.
        fps: frames a second. A file plays at this rate, with math.inf as fast as its frames are taken; a live source
            is sampled down to it. None: the file's own rate, or all frames of a live source.
        loop: repeat a file forever.
        resize: pixels that the short edge is shrunk to; a smaller image is not enlarged.
        jpeg_quality: 1 to 100.
    """

    def __init__(
        self,
        source: str,
        fps: float | None = None,
        loop: bool = False,
        resize: int | None = None,
        jpeg_quality: int = 95,
        timing: Timing | None = None,
    ) -> None:
        self.name = redact(source)  # as it may be shown
        self.is_live = source.isdecimal() or "://" in source or source.startswith("/dev/")
        self.fps = DEFAULT_FPS  # the source's own rate, or the rate it is sampled at; known once it was opened
        self.frame_count = 0  # of a file that states it, likewise
        self._source = source
        self._interval_s = 1 / fps if fps else None
        self._loop = loop
        self._resize = resize
        self._jpeg_quality = jpeg_quality
        self._timing = timing or Timing()

    def check(self) -> bytes:
        """Open the source for a moment; return one image as JPEG. Raises SourceError if that fails."""
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

        Raises SourceError if a file can't be opened or holds no frames. A live source never raises it.
        """
        images = self._read_live(stop) if self.is_live else self._read_file(stop)
        for number, (captured_at, jpeg) in enumerate(images, start=1):
            yield Frame(self, number, captured_at, jpeg)

    def _read_file(self, stop: threading.Event) -> Iterator[Image]:
        """Yield the images of a file at its rate.

        While the consumer is slower, the file waits; afterwards it continues at its rate and does not catch up.
        """
        due = time.monotonic()
        while not stop.is_set():
            capture = self._open()
            is_empty = True
            interval_s = 1 / self.fps if self._interval_s is None else self._interval_s
            try:
                while not stop.wait(max(0.0, due - time.monotonic())):
                    ok, image = capture.read()
                    if not ok and self._loop and not is_empty:
                        # From the beginning without opening it again, which might have to wait, see OPENING.
                        capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
                        ok, image = capture.read()
                    if not ok:
                        break
                    is_empty = False
                    yield time.monotonic(), self.encode(image)
                    due = max(due + interval_s, time.monotonic())
            finally:
                capture.release()
            if is_empty and not stop.is_set():
                raise SourceError(f"{self.name} can be opened, but delivers no frames")
            if not self._loop:
                return

    def _read_live(self, stop: threading.Event) -> Iterator[Image]:
        """Yield the images of a live source; while it is lost, connect again with growing delays."""
        state, seen_at, is_reported, attempt = "not there", time.monotonic(), False, 0
        while not stop.is_set():
            problem = "no more frames come"
            try:
                for captured_at, jpeg in self._sample(stop):
                    if is_reported:
                        log.warning("%s: the camera is back after %.1f s", self.name, captured_at - seen_at)
                    state, seen_at, is_reported, attempt = "lost", captured_at, False, 0
                    yield captured_at, jpeg
            except (SourceError, cv2.error) as error:
                problem = " ".join(str(error).replace(self._source, self.name).split())
            if stop.is_set():
                return
            if not is_reported:
                is_reported = True
                log.warning("%s: the camera is %s, %s; trying until it is back", self.name, state, problem)
            stop.wait(backoff_s(self._timing.first_reconnect_s, self._timing.max_reconnect_s, attempt))
            attempt += 1

    def _sample(self, stop: threading.Event) -> Iterator[Image]:
        """Open a live source, and yield its images at the rate asked for until no more come."""
        with OPENING:
            if stop.is_set():
                return
            capture = self._open()
        interval_s, due = self._interval_s or 0.0, -math.inf
        try:
            while capture.grab() and not stop.is_set():
                captured_at = time.monotonic()
                # Half an interval of tolerance: frames of a camera never arrive at regular times.
                if captured_at < due - interval_s / 2:
                    continue
                ok, image = capture.retrieve()
                if not ok:
                    return
                due = (due if captured_at < due + interval_s else captured_at) + interval_s
                yield captured_at, self.encode(image)
        finally:
            capture.release()

    def _open(self) -> cv2.VideoCapture:
        """Open the source and read its frame rate. Raises SourceError if that fails."""
        # Errors are reported as SourceError in one line, and not by OpenCV and FFmpeg as well.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        if "://" in self._source:
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, round(1000 * self._timing.camera_open_s)]
            timeouts += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, round(1000 * self._timing.camera_read_s)]
            capture = cv2.VideoCapture(self._source, cv2.CAP_FFMPEG, timeouts)
            problem = f"can't open {self.name}: check address and password, and that the stream is running"
        elif self.is_live:
            capture = cv2.VideoCapture(int(self._source) if self._source.isdecimal() else self._source)
            problem = f"no camera {self.name}: check that it is plugged in and that no other program uses it"
        else:
            self._check_path()
            # FFmpeg takes a relative path with a colon for a URL.
            capture = cv2.VideoCapture(str(Path(self._source).absolute()))
            problem = f"{self.name} is no video that OpenCV can read"
        if not capture.isOpened():
            raise SourceError(problem)
        fps = capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= MAX_FPS else DEFAULT_FPS
        if self.is_live and self._interval_s:
            self.fps = min(self.fps, 1 / self._interval_s)
        self.frame_count = 0 if self.is_live else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        return capture

    def _check_path(self) -> None:
        path = Path(self._source)
        try:
            self._source.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"{self.name} is a name that is not UTF-8: rename the file") from error
        if not path.exists():
            # The part before an @ may be a password, in an address without its scheme.
            raise SourceError(
                f"no such file: {self.name.rpartition('@')[2]} (an address begins with rtsp://, http:// or https://)"
            )
        if path.is_dir():
            raise SourceError(f"{self.name} is a folder, expected a video file")

    def encode(self, image: Any) -> bytes:
        """Return a (height, width, 3) BGR image as JPEG, shrunk as asked for. Raises SourceError if OpenCV can't."""
        height, width = image.shape[:2]
        try:
            if self._resize and self._resize < min(height, width):
                scale = self._resize / min(height, width)
                image = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
            ok, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self._jpeg_quality])
        except cv2.error:
            ok = False
        if not ok:
            raise SourceError(f"{self.name}: OpenCV can't encode an image of shape {image.shape} as JPEG")
        return jpeg.tobytes()


def redact(source: str) -> str:
    """Return the name of a source as it may be shown: without user and password."""
    if "://" not in source:
        return source
    scheme, rest = source.split("://", 1)
    if not HOST.match(rest):
        # A password may hold another @, or a slash, and the path an @: the host is after the first @ where it may be.
        rests = [rest[at.end() :] for at in re.finditer("@", rest)] or [rest]
        rest = next((each for each in rests if HOST.match(each)), rests[-1])
    return scheme + "://" + SECRET.sub(r"\1***", rest)
