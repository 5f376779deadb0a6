"""The bounded buffers of the pipeline: frames that wait to be sent, results that wait for an earlier one."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from edge.cameras import Camera
from edge.frames import Frame, Result
from edge.timing import Timing

if TYPE_CHECKING:
    from edge.client import TorchServeClient

MAX_WAITING_FRAMES = 4  # of each camera, at least a request: enough for a short delay, and they are still fresh
REORDER_WINDOW = 4  # A camera may be ahead of its oldest missing result by so many times the frames in flight.


class FrameBuffer:
    """A queue of at most `max_frames` frames for each camera of a model; the cameras take turns (round robin).

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

    def put(self, frame: Frame) -> Result | None:
        """Add a frame; return the result of the frame that was dropped for it, which may be the frame itself."""
        if not frame.jpeg:
            return Result.not_sent(frame, "dropped", "read too late")
        frames, policy = self._queues[frame.camera], frame.camera.drop_policy
        with self._changed:
            self._wait_until(lambda: policy != "none" or len(frames) < self._max_frames)
            is_full = len(frames) >= self._max_frames
            if self._stop.is_set():
                return Result.not_sent(frame, "dropped", "the run ended")
            if is_full and policy == "newest":
                return Result.not_sent(frame, "dropped", "buffer full")
            dropped = frames.popleft() if is_full else None
            frames.append(frame)
            self._changed.notify_all()
            return Result.not_sent(dropped, "dropped", "buffer full") if dropped else None

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
            self._wait_until(lambda: self._available() > 0 or self._is_over())
            self._wait_until(lambda: self._available() >= max_frames or self._is_over(), self._timing.batch_wait_s)
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

    def _is_over(self) -> bool:
        """Whether no more frames become available: all cameras are closed, and none waits for the reorder window."""
        return not self._open and self._available() == sum(map(len, self._queues.values()))

    def _wait_until(self, is_true: Callable[[], bool], timeout_s: float = math.inf) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true() and not self._stop.is_set() and (left_s := deadline - time.monotonic()) > 0:
            self._changed.wait(min(left_s, self._timing.poll_s))


class ClipBuffer(FrameBuffer):
    """A frame buffer that returns clips: up to `max_frames` frames of one camera that follow each other.

    After a dropped frame, or a pause of the camera, a new clip begins.
    """

    max_wait_s = math.inf  # for the next frame of a clip

    def get_batch(self, max_frames: int) -> list[Frame]:
        """Wait for a clip of up to `max_frames` frames, and take it. Returns [] at the end."""
        with self._changed:
            self._wait_until(lambda: any(self._clip(camera, max_frames) for camera in self._queues) or self._is_over())
            for camera in list(self._round_robin):
                self._round_robin.rotate(-1)
                if clip := self._clip(camera, max_frames):
                    for _ in clip:
                        self._queues[camera].popleft()
                    self._unreleased[camera] += len(clip)
                    self._changed.notify_all()
                    return clip
            return []

    def _clip(self, camera: Camera, max_frames: int) -> list[Frame]:
        """Return the clip that can be taken now, [] if there is none: frames are missing, or the window is full."""
        pause_s = max(self._timing.batch_wait_s, 2 * (camera.interval_s or 0.0))
        clip: list[Frame] = []
        for frame in islice(self._queues[camera], max_frames):
            if clip and (frame.order != clip[-1].order + 1 or not 0 <= frame.time_s - clip[-1].time_s <= pause_s):
                break
            clip.append(frame)
        is_whole = len(clip) == max_frames or len(clip) < len(self._queues[camera])
        may_grow = bool(clip) and not is_whole and camera in self._open and not self._stop.is_set()
        wait_s = min(pause_s, self.max_wait_s)
        # A file does not pause: it waits for the slowest of its models.
        if may_grow and (clip[-1].position_s is not None or time.monotonic() - clip[-1].captured_at <= wait_s):
            return []
        return clip if len(clip) <= self._available_of(camera) else []


class ReorderBuffer:
    """Puts the results of one stream into frame order."""

    def __init__(self) -> None:
        self._next = 1
        self._early: dict[int, Result] = {}

    def add(self, result: Result) -> Iterator[Result]:
        """Add a result; yield the results that are next in frame order."""
        self._early[result.frame.order] = result
        while (ready := self._early.pop(self._next, None)) is not None:
            self._next += 1
            yield ready


def new_buffer(
    cameras: Sequence[Camera], client: TorchServeClient, max_age_s: float, stop: threading.Event, timing: Timing
) -> FrameBuffer:
    """Return the buffer of a client's model."""
    frames = client.frames_per_request
    max_frames, window = max(MAX_WAITING_FRAMES, frames), REORDER_WINDOW * client.max_in_flight * frames
    if client.info.clip_frames > 1:  # A clip is as old as its last frame.
        clips = ClipBuffer(max_frames, cameras, window, stop, timing)
        clips.max_wait_s = max(2 * client.info.interval_s, max_age_s / 2)
        return clips
    timing = replace(timing, batch_wait_s=min(timing.batch_wait_s, max_age_s / 2))
    return FrameBuffer(max_frames, cameras, window, stop, timing)
