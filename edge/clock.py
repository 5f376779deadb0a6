"""When the frames of a stream arrived."""

import math
from collections import deque

MAX_BUFFERED_S = 10.0  # of video, that FFmpeg reads while it opens a stream
CLOCK_DRIFT = 0.001  # A camera's clock is more exact, about 0.0001.


class StreamClock:
    """Tells when the frames of a stream arrived, also if they waited before they were read.

    The time from a frame's time stamp to its arrival is the same for all frames, but for the unknown start of the time
    stamps. Whatever a frame takes longer than the fastest one, it waited.

    held_frames: FFmpeg delivers a frame when so many more have arrived. So the frame that is read now was there when
        the frame that many before it was read.
    """

    def __init__(self, held_frames: int) -> None:
        self.is_current = False  # Frames that FFmpeg buffered while it opened the stream come at once.
        self.lag_s = 0.0  # how long the last frame waited before it was read
        self._held_frames = held_frames
        self._reads: deque[float] = deque(maxlen=held_frames + 1)
        self._first_read = self._stamp_s = self._offset_s = math.inf
        self._unbuffered = self._unstamped = 0  # frames

    def arrived_at(self, now: float, stamp_s: float) -> float:
        """Return when a frame arrived that was read now."""
        elapsed_s = now - self._reads[-1] if self._reads else 0.0
        step_s = stamp_s - self._stamp_s
        self._reads.append(now)
        self._first_read = min(self._first_read, now)
        self._stamp_s = stamp_s
        if step_s <= 0:  # The time stamps begin anew, or there are none.
            self._offset_s = math.inf
            self._unstamped += step_s == 0
        # Frames that were not buffered come at the intervals of their time stamps.
        self._unbuffered += elapsed_s > 0.75 * step_s > 0
        is_long_open = now - self._first_read > MAX_BUFFERED_S  # The time stamps are of another speed.
        self.is_current = self._unbuffered >= max(1, self._held_frames) or self._unstamped > 2 or is_long_open
        self._offset_s = min(self._offset_s + CLOCK_DRIFT * elapsed_s, self._reads[0] - stamp_s)
        self.lag_s = self._reads[0] - stamp_s - self._offset_s
        return stamp_s + self._offset_s
