"""When the frames of a stream arrived, and which of them are due at a lower rate."""

import math
from collections import deque

MAX_BUFFERED_S = 5.0  # of video, that FFmpeg reads while it opens a stream
# Of an interval: frames of a camera never arrive at regular times. With 0.3 no frame of a camera of 25 or 30 frames a
# second is just at the limit for 15 a second.
TOLERANCE = 0.3
CLOCK_DRIFT = 0.001  # A camera's clock is more exact, about 0.0001.


class StreamClock:
    """Computes when the frames of a stream arrived, also if they waited before they were read.

    The time from a frame's time stamp to its arrival is the same for all frames, but for the unknown start of the time
    stamps. Whatever a frame takes longer than the fastest one, it waited.

    held_frames: FFmpeg delivers a frame when so many more have arrived. So the frame that is read now was there when
        the frame that many before it was read. None: the stream has no time stamps, and frames have the time of
        reading.
    """

    def __init__(self, held_frames: int | None) -> None:
        self.is_current = False  # Frames that FFmpeg buffered while it opened the stream come at once.
        self.lag_s = 0.0  # how long the last frame waited before it was read
        self._held_frames = held_frames
        self._reads: deque[float] = deque(maxlen=(held_frames or 0) + 1)
        self._first_read = self._stamp_s = self._offset_s = math.inf
        self._unbuffered = self._unstamped = 0  # frames

    def restart(self) -> None:
        """The next frame did not wait."""
        self._offset_s = math.inf

    def arrived_at(self, now: float, stamp_s: float, has_waited: bool) -> float:
        """Return when a frame arrived that was read now; has_waited: FFmpeg waited for it, or for one after it."""
        self._first_read = min(self._first_read, now)
        is_long_open = now - self._first_read > MAX_BUFFERED_S  # or the time stamps are of another speed
        if self._held_frames is None:
            self.is_current = self.is_current or has_waited or is_long_open
            return now
        elapsed_s = now - self._reads[-1] if self._reads else 0.0
        step_s = stamp_s - self._stamp_s
        self._reads.append(now)
        self._stamp_s = stamp_s
        if step_s <= 0:  # The time stamps begin anew, or there are none.
            self.restart()
            self._unstamped += step_s == 0
        # Frames that were not buffered come at the intervals of their time stamps.
        self._unbuffered += elapsed_s > 0.75 * step_s > 0
        self.is_current = self._unbuffered >= max(1, self._held_frames) or self._unstamped > 2 or is_long_open
        self._offset_s = min(self._offset_s + CLOCK_DRIFT * elapsed_s, self._reads[0] - stamp_s)
        self.lag_s = self._reads[0] - stamp_s - self._offset_s
        return stamp_s + self._offset_s


class Sampler:
    """Chooses one frame in each `interval_s` seconds; with 0 all frames."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s, self._due = interval_s, -math.inf
        self._time_s = math.nan  # of the last frame

    def restart(self, time_s: float) -> None:
        """Count the intervals from a frame."""
        self._due = time_s + self._interval_s

    def is_due(self, time_s: float) -> bool:
        """Return whether to choose the frame of this time."""
        if time_s <= self._time_s or time_s < self._due - 2 * self._interval_s:  # A file is repeated.
            self._due = time_s
        self._time_s = time_s
        if time_s < self._due - TOLERANCE * self._interval_s:
            return False
        self._due = (self._due if time_s < self._due + self._interval_s else time_s) + self._interval_s
        return True
