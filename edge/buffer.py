"""What stands between the pipeline's threads: frames that wait to be sent, results that wait for their turn."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Literal

from edge.cameras import Camera, Frame
from edge.stats import Result

DropPolicy = Literal["oldest", "newest", "none"]

WAKE_UP_S = 0.5  # How long a thread waits before it looks again; a notification ends the wait sooner.
BATCH_WAIT_S = 1.0  # How long the first frame of an incomplete batch waits for the others.


class Buffer:
    """The frames that wait to be sent: at most `size` of each camera, taken in turns.

    A full lane drops its oldest waiting frame or the new one, or, with "none", has the camera wait. When `stop` is set
    nothing goes in any more, and what is left can still be taken out.

    lead: how many frames of a camera may be taken before their results are delivered, in frame order. When one result
        is late those after it wait, and they must not become too many.
    batch_wait_s: how long the first frame of an incomplete batch waits for the others.
    """

    def __init__(
        self,
        size: int,
        policies: Mapping[Camera, DropPolicy],
        stop: threading.Event,
        lead: int = 1_000_000,
        batch_wait_s: float = BATCH_WAIT_S,
    ) -> None:
        self._size = size
        self._policies = policies
        self._stop = stop
        self._lead = lead
        self._batch_wait_s = batch_wait_s
        self._lanes: dict[Camera, deque[Frame]] = {camera: deque() for camera in policies}
        self._undelivered = dict.fromkeys(policies, 0)
        self._turns = deque(policies)
        self._open = set(policies)
        self._changed = threading.Condition()

    def put(self, frame: Frame) -> Frame | None:
        """Add a frame to its camera's lane; return the frame that had to go for it, which may be the frame itself."""
        lane, policy = self._lanes[frame.camera], self._policies[frame.camera]
        with self._changed:
            while len(lane) >= self._size and policy == "none" and not self._stop.is_set():
                self._changed.wait(WAKE_UP_S)
            is_full = len(lane) >= self._size
            if self._stop.is_set() or (is_full and policy == "newest"):
                return frame
            dropped = lane.popleft() if is_full else None
            lane.append(frame)
            self._changed.notify_all()
            return dropped

    def close(self, camera: Camera) -> None:
        """Say that no more frames of a camera will come."""
        with self._changed:
            self._open.discard(camera)
            self._changed.notify_all()

    def delivered(self, camera: Camera) -> None:
        """Say that the result of a frame that was taken is delivered."""
        with self._changed:
            self._undelivered[camera] -= 1
            self._changed.notify_all()

    def take(self, count: int) -> list[Frame]:
        """Take up to `count` frames, one of each camera in turn, waiting for them.

        Fewer come if the first has waited long enough for the others or if no others will come; none if that was all.
        """
        deadline: float | None = None
        with self._changed:
            while not self._stop.is_set() and self._takable() < count and self._are_more_to_come():
                now = time.monotonic()
                if deadline is None and self._takable():
                    deadline = now + self._batch_wait_s
                if deadline is not None and now >= deadline:
                    break
                self._changed.wait(WAKE_UP_S if deadline is None else min(WAKE_UP_S, deadline - now))
            frames: list[Frame] = []
            while len(frames) < count and self._takable():
                camera = self._turns[0]
                self._turns.rotate(-1)
                if self._lanes[camera] and self._may_take(camera):
                    frames.append(self._lanes[camera].popleft())
                    self._undelivered[camera] += 1
            self._changed.notify_all()
            return frames

    def _may_take(self, camera: Camera) -> bool:
        return self._undelivered[camera] < self._lead or self._stop.is_set()

    def _takable(self) -> int:
        """Return how many frames could be taken now."""
        if self._stop.is_set():
            return sum(map(len, self._lanes.values()))
        return sum(min(len(lane), self._lead - self._undelivered[camera]) for camera, lane in self._lanes.items())

    def _are_more_to_come(self) -> bool:
        """Whether waiting may bring more than can be taken now."""
        return bool(self._open) or self._takable() < sum(map(len, self._lanes.values()))


class InOrder:
    """The results of one camera that came before those of earlier frames."""

    def __init__(self) -> None:
        self._next = 1
        self._early: dict[int, Result] = {}

    def add(self, result: Result) -> Iterator[Result]:
        """Add a result; yield all whose turn it is, in frame order."""
        self._early[result.frame.number] = result
        while (ready := self._early.pop(self._next, None)) is not None:
            self._next += 1
            yield ready
