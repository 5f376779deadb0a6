"""Cameras: the sources of frames. edge/files.py plays files, edge/live.py reads live sources."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import cv2

from edge import sources
from edge.changes import small_image
from edge.content import ContentCheck
from edge.errors import SourceError
from edge.files import MAX_FAILED_READS, play, shown_fps, still_images
from edge.frames import DropPolicy, Frame, Image
from edge.live import LiveSource
from edge.probe import no_frames_problem
from edge.timing import Timing

# Of a camera: no frame yet; frames come; all are the same; all are black; lost, until it is back; no more frames will
# come; it can't be read.
State = Literal["waiting", "live", "frozen", "black", "lost", "ended", "failed"]

log = logging.getLogger(__name__)


class Camera:
    """A source of frames: a file, which ends, or a live source, which is opened again whenever it is lost.

    Args:
        source: a video file, a URL, or a device: its number such as "0", or its path such as /dev/video0.
        fps: frames a second. A file plays at this rate, with math.inf as fast as its frames are taken; a live source
            is sampled down to it. None: the time stamps of a file, or all frames of a live source.
        loop: repeat a file forever.
        resize: pixels that the short edge is shrunk to; a smaller image is not enlarged.
        jpeg_quality: 1 to 100.
        drop: which frame is dropped if more wait than may; "none": the camera waits. None: "oldest" of a live source,
            "none" of a file.
        compare: whether its frames have a small image, to compare them.
    """

    def __init__(
        self,
        source: str,
        fps: float | None = None,
        loop: bool = False,
        resize: int | None = None,
        jpeg_quality: int = 95,
        drop: DropPolicy | None = None,
        timing: Timing | None = None,
        compare: bool = False,
    ) -> None:
        self.source = source
        self.name = sources.redact(source)  # as it may be shown
        self.kind = sources.kind_of(source)
        self.is_live = self.kind in ("device", "stream")  # A stream may be a recording: known once it was opened.
        self.fps = sources.DEFAULT_FPS  # the source's own rate, or the rate it is sampled at, likewise
        self.frame_count = 0  # of a file that states it, likewise
        self.interval_s = 1 / fps if fps else None
        self.loop = loop
        self.timing = timing or Timing()
        self._resize = resize
        self._jpeg_quality = jpeg_quality
        self._compare = compare
        self._content = ContentCheck(self.name, self.timing)
        self.drop = drop
        self.state: State = "waiting"
        self.problem = ""  # why it was lost, or can't be read
        self.last_frame: Frame | None = None  # that has an image
        self._is_rate_reported = False

    @property
    def drop_policy(self) -> DropPolicy:
        return self.drop or ("oldest" if self.is_live else "none")

    def check(self) -> bytes | None:
        """Open the source for a moment; return one image as JPEG. Raises SourceError if that fails.

        A pipe can be read only once: it is not opened, and the result is None.
        """
        if self.kind == "pipe":
            sources.check_path(self.source)
            return None
        if self.kind == "file" and (still := sources.read_still_image(self.source)) is not None:
            return self.encode(still)
        capture = sources.open_once(self.source, self.kind, self.timing)
        try:
            self.learn_rate(capture)
            return self.encode(self._first_pixels(capture))
        finally:
            capture.release()

    def _first_pixels(self, capture: cv2.VideoCapture) -> Any:
        """Return the first image that can be decoded. Raises SourceError if there is none."""
        begin = time.monotonic()
        for _ in range(MAX_FAILED_READS):
            ok, pixels = capture.read()
            if ok:
                return pixels
            if time.monotonic() - begin >= self.timing.stall_s:
                raise SourceError(f"{self.name} can be opened, but no frame came for {self.timing.stall_s:g} s")
        raise SourceError(f"{self.name} {no_frames_problem(sources.fourcc(capture), self.kind)}")

    def learn_rate(self, capture: cv2.VideoCapture) -> None:
        """Keep the rate that the open source states, and its number of frames; report an implausible rate."""
        fps = sources.frame_rate(capture)
        if fps is None and not self._is_rate_reported:
            self._is_rate_reported = True
            stated = capture.get(cv2.CAP_PROP_FPS)
            log.warning("%s states %g frames a second: %g are used", self.name, stated, sources.DEFAULT_FPS)
        self.fps, self.frame_count = fps or sources.DEFAULT_FPS, sources.frame_count(capture)

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames until a file ends or `stop` is set.

        Raises SourceError if a file can't be opened, or can't be read to its end. A live source raises it only
        for an image that JPEG can't hold.
        """
        try:
            for number, image in enumerate(self._images(stop), start=1):
                frame = self._frame(number, image)
                if frame.jpeg:
                    self.last_frame = frame
                self.state = self._content.check(frame, image.pixels) if self.is_live else "live"
                yield frame
            self.state = "ended"
        except SourceError as error:
            self.state, self.problem = "failed", str(error)
            raise

    def _frame(self, number: int, image: Image) -> Frame:
        is_first = self.state in ("waiting", "lost")
        if image.pixels is None:
            return Frame(self, number, image.captured_at, b"", image.position_s, is_first=is_first)
        small = small_image(image.pixels) if self._compare else None
        jpeg = self.encode(image.pixels)
        return Frame(self, number, image.captured_at, jpeg, image.position_s, is_first=is_first, small=small)

    def video_fps(self) -> float:
        """Return the rate of an annotated video: the stated one, unless the frames of a file come at other times."""
        return shown_fps(self.source, self.fps) if self.kind == "file" else self.fps

    def _images(self, stop: threading.Event) -> Iterator[Image]:
        if self.kind == "file" and (still := sources.read_still_image(self.source)) is not None:
            yield from still_images(self, still, stop)
        elif self.kind == "file":
            yield from play(self, None, stop)
        elif self.kind == "pipe":
            with sources.opened_pipe(self.source, stop, self.timing.poll_s) as pipe:
                yield from play(self, pipe, stop)
        else:
            recording = yield from LiveSource(self).images(stop)
            if recording is not None:
                self.is_live = False
                yield from play(self, recording, stop)

    def encode(self, pixels: Any) -> bytes:
        """Return a (height, width, 3) BGR image as JPEG, shrunk as asked for. Raises SourceError if OpenCV can't."""
        height, width = pixels.shape[:2]
        try:
            if self._resize and self._resize < min(height, width):
                scale = self._resize / min(height, width)
                size = (round(width * scale), round(height * scale))
                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            ok, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self._jpeg_quality])
        except cv2.error:
            ok = False
        if not ok:
            raise SourceError(f"{self.name}: OpenCV can't encode an image of shape {pixels.shape} as JPEG")
        return jpeg.tobytes()
