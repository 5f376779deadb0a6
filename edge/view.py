"""What the web page shows of a run: the latest frames with their predictions drawn on them, and the figures."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from edge.cameras import Camera
from edge.client import TorchServeClient
from edge.content import PROBLEMS
from edge.drawing import MAX_AGE_S, draw_jpeg, labels_of
from edge.frames import Frame, Result, Stream
from edge.outputs import Output
from edge.stats import OUTCOMES, CameraStats, LastMinute

IMAGE_INTERVAL_S = 0.1
WATCHED_S = 5.0  # A camera is watched for so long after a request for its image: a page requests one after the other.
MAX_LOST_SHARE = 0.1  # of the frames of the last 10 s, which were dropped or expired
MAX_LAG_S = 3.0  # of the responses behind the camera


class CameraView:
    """The annotated images of one camera, drawn on request.

    An image shows the last frame that a model has responded to, with the latest predictions of all models; if the
    responses are more than MAX_AGE_S behind the camera, the last frame that was read. Of an unchanged frame the
    prediction is that of the frame before it.
    """

    def __init__(self, camera: Camera, models: Sequence[str], executor: ThreadPoolExecutor) -> None:
        self.camera, self._executor = camera, executor
        self.results: dict[str, Result | None] = dict.fromkeys(models)  # the latest, without images
        self._frame: Frame | None = None  # the last one with a result and an image
        self._numbers = [0]  # of the frame that is drawn, and of the frames of its predictions
        self._jpeg = b""
        self._drawn_at = self._asked_at = -WATCHED_S
        self._lock = threading.Lock()

    def is_watched(self) -> bool:
        return time.monotonic() - self._asked_at < WATCHED_S

    def write(self, result: Result) -> None:
        if result.outcome in ("answered", "failed"):
            self.results[result.frame.model] = result.without_image()
            if result.frame.jpeg and (self._frame is None or result.frame.number > self._frame.number):
                self._frame = result.frame
        elif result.outcome == "unchanged" and (before := self.results[result.frame.model]):
            self.results[result.frame.model] = replace(before, frame=result.frame)

    def image(self) -> bytes:
        """Return the latest image as JPEG, b"" if there was no frame yet. Any thread may call it.

        It draws at most one in IMAGE_INTERVAL_S, and never an earlier frame than before.
        """
        with self._lock:
            self._asked_at = now = time.monotonic()
            frame, last = self._frame, self.camera.last_frame
            if frame is None or (last and last.captured_at - frame.captured_at > MAX_AGE_S):
                frame = last
            if frame and now - self._drawn_at >= IMAGE_INTERVAL_S:
                results = {model: result for model, result in self.results.items() if result}
                numbers = [frame.number, *(result.frame.number for result in results.values())]
                if numbers != self._numbers and frame.number >= self._numbers[0]:
                    self._jpeg = self._executor.submit(draw_jpeg, frame, results).result()
                    self._numbers, self._drawn_at = numbers, now
            return self._jpeg


class LiveView(Output):
    """The images and figures of all cameras. It gets the results as other outputs do, and other threads read it."""

    name = "the web page"

    def __init__(self, stats: Mapping[Stream, CameraStats], clients: Sequence[TorchServeClient]) -> None:
        self._stats, self._clients, models = stats, clients, [client.model for client in clients]
        self._started_at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.executor = ThreadPoolExecutor(1)  # OpenCV 5 loads its font in each new thread: 20 ms for an image
        self.cameras = {stream.camera: CameraView(stream.camera, models, self.executor) for stream in stats}
        self._last_minutes = {stream: LastMinute() for stream in stats}

    def write(self, result: Result) -> None:
        self.cameras[result.frame.camera].write(result)
        self._last_minutes[result.frame.stream].add(result, time.monotonic())

    def needs_images(self, camera: Camera) -> bool:
        return self.cameras[camera].is_watched()

    def figures(self) -> dict[str, Any]:
        """Return what /stats.json has: the state of each model's server and of each camera, and the summary."""
        return {
            "started_at": self._started_at,
            "servers": [{"model": each.model, "url": each.health.url, **each.health.state()} for each in self._clients],
            "cameras": [self._camera(view) for view in self.cameras.values()],
        }

    def _camera(self, view: CameraView) -> dict[str, Any]:
        camera, last, now = view.camera, view.camera.last_frame, time.monotonic()
        models = [self._model(stream, view, now) for stream in self._stats if stream.camera is camera]
        age_s = now - last.captured_at if last else None
        state: str = camera.state
        if state == "live" and age_s and age_s > max(camera.timing.stall_s, 3 * (camera.interval_s or 0.0)):
            state = "stalled"
        elif state == "live" and any(map(is_slow, models)):
            state = "slow"
        problem = camera.problem if state in ("lost", "failed") else PROBLEMS.get(state, "")
        return {"name": camera.name, "state": state, "problem": problem, "frame_age_s": age_s, "models": models}

    def _model(self, stream: Stream, view: CameraView, now: float) -> dict[str, Any]:
        counts, result, last = self._stats[stream], view.results[stream.model], view.camera.last_frame
        waiting = counts.captured - sum(counts.outcomes[outcome] for outcome in OUTCOMES)
        return {
            "model": stream.model,
            "labels": labels_of(result) if result else [],
            "waiting": max(0, waiting),  # Another thread counts: it may be ahead.
            "lag_s": last.captured_at - result.frame.captured_at if last and result else 0.0,
            **counts.figures(),
            "causes": [[outcome, text, n] for (outcome, text), n in counts.causes.copy().most_common()],
            **self._last_minutes[stream].figures(now),
        }


def is_slow(model: Mapping[str, Any]) -> bool:
    """Return whether frames are lost, or wait for a server that does not respond: then they are dropped later."""
    is_waiting = model["waiting"] > 1 and model["lag_s"] > MAX_LAG_S
    return bool(is_waiting or model["last_10_s"]["lost_share"] >= MAX_LOST_SHARE)
