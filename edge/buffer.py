"""The bounded buffers of the pipeline: frames that wait to be sent, results that wait for an earlier one."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from edge.cameras import Camera
from edge.frames import Frame, Result
from edge.timing import Timing


class FrameBuffer:
    """A queue of at most `max_frames` frames for each camera; the cameras take turns (round robin).

    A full queue drops its oldest frame or the new one; with the policy "none" its camera waits. When `stop` is set,
    put() accepts nothing more, and get_batch() returns what is left without waiting.

    reorder_window: how many frames of a camera may be taken before their results are released in frame order. While
        one result is late, the results after it wait in the ReorderBuffer: this limits their number.
    """

    def __init__(
        self,
        max_frames: int,
        cameras: Sequence[Camera],
        reorder_window: int,
        stop: threading.Event,
        timing: Timing,
    ) -> None:
        self._max_frames, self._reorder_window = max_frames, reorder_window
        self._stop, self._timing = stop, timing
        self._queues: dict[Camera, deque[Frame]] = {camera: deque() for camera in cameras}
        self._unreleased = dict.fromkeys(cameras, 0)
        self._round_robin = deque(cameras)
        self._open = set(cameras)
        self._changed = threading.Condition()

    def put(self, frame: Frame) -> Frame | None:
        """Add a frame; return the frame that was dropped for it, which may be the frame itself."""
        frames, policy = self._queues[frame.camera], frame.camera.drop_policy
        with self._changed:
            self._wait_until(lambda: policy != "none" or len(frames) < self._max_frames)
            is_full = len(frames) >= self._max_frames
            if self._stop.is_set() or (is_full and policy == "newest"):
                return frame
            dropped = frames.popleft() if is_full else None
            frames.append(frame)
            self._changed.notify_all()
            return dropped

    def close(self, camera: Camera) -> None:
        """Mark the end of a camera's frames."""
        with self._changed:
            self._open.discard(camera)
            self._changed.notify_all()

    def get_batch(self, max_frames: int) -> list[Frame]:
        """Wait for up to `max_frames` frames, and take them.

        Returns fewer if the first one has waited for batch_wait_s or no others will come, and [] at the end.
        """
        with self._changed:
            self._wait_until(lambda: self._available() > 0 or not self._may_grow())
            self._wait_until(lambda: self._available() >= max_frames or not self._may_grow(), self._timing.batch_wait_s)
            frames: list[Frame] = []
            while len(frames) < max_frames and self._available():
                camera = self._round_robin[0]
                self._round_robin.rotate(-1)
                if self._available_of(camera):
                    frames.append(self._queues[camera].popleft())
                    self._unreleased[camera] += 1
            self._changed.notify_all()
            return frames

    def release(self, camera: Camera) -> None:
        """Record that the result of a frame that was taken left the ReorderBuffer."""
        with self._changed:
            self._unreleased[camera] -= 1
            self._changed.notify_all()

    def _available_of(self, camera: Camera) -> int:
        """Return how many frames of a camera may be taken now."""
        waiting = len(self._queues[camera])
        return waiting if self._stop.is_set() else min(waiting, self._reorder_window - self._unreleased[camera])

    def _available(self) -> int:
        return sum(map(self._available_of, self._queues))

    def _may_grow(self) -> bool:
        """Whether more frames may become available: a camera is open, or frames wait for the reorder window."""
        return bool(self._open) or self._available() < sum(map(len, self._queues.values()))

    def _wait_until(self, is_true: Callable[[], bool], timeout_s: float = math.inf) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true() and not self._stop.is_set() and (left_s := deadline - time.monotonic()) > 0:
            self._changed.wait(min(left_s, self._timing.poll_s))


class ReorderBuffer:
    """Puts the results of one camera into frame order."""

    def __init__(self) -> None:
        self._next = 1
        self._early: dict[int, Result] = {}

    def add(self, result: Result) -> Iterator[Result]:
        """Add a result; yield the results that are next in frame order."""
        self._early[result.frame.number] = result
        while (ready := self._early.pop(self._next, None)) is not None:
            self._next += 1
            yield ready
