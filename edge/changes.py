"""Which frames of a camera changed: --skip-static sends only these."""

import math
import random
import threading
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edge.frames import Frame, Result
from edge.responses import ModelInfo

SmallImage = npt.NDArray[np.float32]  # (height, width), grey levels of 0 to 255

SMALL_PIXELS = 128 * 72
# Light may change by so much since the last frame that was sent, in a region and once more in a band of rows. Lamps
# that flicker with the mains make such bands.
MAX_LIGHT = 1.2
BAND, REGION = (1.0, 0.07), (0.2, 0.33)  # shares of the width and the height
MIN_DIFFERENCE = 6.0  # grey levels, of the mean of 3x3 pixels: compression changes less
NOISE_FACTOR = 4.0  # times the standard deviation of the noise
MAX_NOISE = 4.0  # grey levels: a scene that changes everywhere is no noise
# One frame in 10 s is sent, whatever it shows: after a random time, so that cameras that were started together do not
# send theirs together; and before, if the next frame would come after more than 10 s.
MIN_UNSENT_S, MAX_UNSENT_S, LIMIT_S = 7.0, 9.5, 10.0


def small_image(pixels: Any) -> SmallImage:
    """Return an image in grey, shrunk to about SMALL_PIXELS. pixels: (height, width, 3) uint8 BGR, or grey.

    Each pixel is the mean of a cell of the image; cells that the right or lower edge cuts are left out. Two rows of a
    cell are read: all rows would take four times as long, and so would cells that are no whole number of pixels.
    """
    height, width = pixels.shape[:2]
    cell = 2 * round(math.sqrt(height * width / SMALL_PIXELS) / 2)
    if 0 < cell <= min(height, width):
        size = (width // cell, height // cell)
        pixels = cv2.resize(pixels[: size[1] * cell : cell // 2, : size[0] * cell], size, interpolation=cv2.INTER_AREA)
    grey = pixels if pixels.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(pixels[..., :3]), cv2.COLOR_BGR2GRAY)
    return np.asarray(grey, np.float32)


def changed_percent(before: SmallImage, now: SmallImage) -> float:
    """Return how many percent of an image changed. Noise, compression and slow changes of light do not count."""
    if before.shape != now.shape:
        return 100.0
    for share in (BAND, REGION):
        before = before * np.clip(blur(now, share) / blur(before, share), 1 / MAX_LIGHT, MAX_LIGHT)
    difference = np.abs(cv2.blur(now - before, (3, 3)))
    noise = float(np.median(difference[::2, ::2])) / 0.6745  # the standard deviation of a normal distribution
    threshold = max(MIN_DIFFERENCE, NOISE_FACTOR * min(noise, MAX_NOISE))
    return 100 * int(np.count_nonzero(difference > threshold)) / difference.size


def blur(image: SmallImage, share: tuple[float, float]) -> Any:
    """Return the mean brightness around each pixel, in a box of this share of the width and the height."""
    width, height = (2 * round(part * size / 2) + 1 for part, size in zip(share, image.shape[::-1], strict=True))
    return cv2.blur(image, (width, height)) + 1  # Black has a ratio too.


class ChangeFilter:
    """Decides which frames of a stream are sent: those that differ from the last one that was sent.

    The reader thread asks is_unchanged() for each frame; the main thread reports each result with record().

    percent: a frame of which less has changed is not sent. 0: all are sent.
    info: of the model. If it gets clips, a whole clip is sent from a changed frame on.
    """

    def __init__(self, percent: float, info: ModelInfo) -> None:
        self._percent, self._clip_frames = percent, info.clip_frames
        self._reference: Frame | None = None  # the last one that was sent
        self._unsent_s = 0.0  # after which the next one is sent, whatever it shows
        self._sent = set[int]()  # the numbers of the reference, and of the other frames of its clip
        self._time_s = self._captured_at = -math.inf  # of the frame before
        self._lock = threading.Lock()

    def is_unchanged(self, frame: Frame) -> bool:
        """Return whether a frame need not be sent."""
        if not self._percent or not frame.jpeg:
            return False
        with self._lock:
            reference, before_s, self._time_s = self._reference, self._time_s, frame.time_s
            interval_s = max(frame.time_s - before_s, frame.captured_at - self._captured_at)
            self._captured_at = frame.captured_at
            is_repeated = frame.position_s is not None and frame.time_s < before_s
            if reference is None or frame.is_first or is_repeated:
                self._sent = set()
            elif len(self._sent) >= self._clip_frames:
                if not self._is_new(reference, frame, interval_s):
                    return True
                self._sent = set()
            self._sent.add(frame.number)
            self._reference, self._unsent_s = frame, random.uniform(MIN_UNSENT_S, MAX_UNSENT_S)
            return False

    def record(self, result: Result) -> None:
        """Forget the reference if the server did not answer it, or another frame of its clip."""
        if self._percent and result.outcome in ("failed", "dropped", "expired"):
            with self._lock:
                if result.frame.number in self._sent:
                    self._reference = None

    def _is_new(self, reference: Frame, frame: Frame, interval_s: float) -> bool:
        # The time in a file is that of the scene; of an image that is repeated only the time of reading goes on.
        elapsed_s = max(frame.time_s - reference.time_s, frame.captured_at - reference.captured_at)
        before, now = reference.small, frame.small
        if elapsed_s >= self._unsent_s or elapsed_s + interval_s > LIMIT_S or before is None or now is None:
            return True
        return changed_percent(before, now) >= self._percent
