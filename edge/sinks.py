"""Where results go: the terminal, a file of JSON lines, an annotated video, a window, a progress bar.

Every sink takes every result, those of one camera in frame order, on the main thread.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from edge.cameras import Camera
from edge.stats import Prediction, Rate, Result

# What OpenCV can write without a system codec, by the file's suffix.
CODECS = {".mp4": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
# A camera that was away for longer is not shown as a still picture for all that time.
LONGEST_STILL_S = 10.0
LABELS_SHOWN = 3
WINDOW_TIMEOUT_S = 30
DISK_RESERVE = 10_000_000  # bytes that a video leaves free
DISK_CHECK_FRAMES = 25
# tqdm's own lock is for several processes, and leaves a warning behind on some systems.
tqdm.set_lock(threading.RLock())


class SinkError(Exception):
    """A sink that can't be used, with what to do."""


class Sink:
    """Takes results; by itself it leaves them alone. `name` is what messages call it."""

    name = ""

    def show(self, result: Result) -> None:
        """Take the next result of its camera. Raises OSError if it can't be written."""

    def idle(self) -> None:
        """Called several times a second, whether there are results or not."""

    def close(self) -> None:
        """Finish what was begun; called once."""


class Terminal(Sink):
    """Prints, every `log_every` frames of a camera, its rate and its last `batch_size` answers.

    log_every: at least batch_size, so that no answer is printed twice.
    as_json: print them as one list, as the server answers a JSON batch.
    show_names: say whose answers they are.
    """

    name = "standard output"

    def __init__(self, batch_size: int, as_json: bool, log_every: int, show_names: bool) -> None:
        self._batch_size = batch_size
        self._as_json = as_json
        self._log_every = max(log_every, batch_size)
        self._show_names = show_names
        self._rates: dict[Camera, Rate] = defaultdict(Rate)
        self._news: dict[Camera, deque[Prediction]] = defaultdict(lambda: deque(maxlen=batch_size))
        self._numbers: dict[Camera, int] = {}

    def show(self, result: Result) -> None:
        camera = result.frame.camera
        self._rates[camera].add(result, time.monotonic())
        self._numbers[camera] = result.frame.number
        if result.predictions is not None:
            self._news[camera].append(result.predictions)
        if result.frame.number % self._log_every == 0:
            self._print(camera)

    def close(self) -> None:
        for camera in self._numbers:
            self._print(camera)

    def _print(self, camera: Camera) -> None:
        answers = list(self._news[camera])
        if not answers:
            return
        self._news[camera].clear()
        fps = self._rates[camera].fps(time.monotonic())
        lines = [camera.name] if self._show_names else []
        lines += [f"With Batch Size {self._batch_size}, FPS at frame number {self._numbers[camera]} is {fps:.1f}"]
        lines += [json.dumps(block, indent=2) for block in ([answers] if self._as_json else answers)]
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()


class JsonLines(Sink):
    """Writes a JSON object for each frame, on a line of its own. Raises SinkError if the file can't be written."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._is_stdout = path == "-"
        try:
            # Line by line, so that whatever ends the run leaves whole lines.
            self._file = sys.stdout if self._is_stdout else open(path, "w", encoding="utf-8", buffering=1)  # noqa: PTH123, SIM115
        except OSError as error:
            raise SinkError(f"can't write {path}: {error.strerror}") from error

    def show(self, result: Result) -> None:
        frame = result.frame
        # The wall clock may be set meanwhile: ask it now, and count back.
        captured_at = datetime.now(timezone.utc) - timedelta(seconds=time.monotonic() - frame.captured_at)
        line = json.dumps(
            {
                "camera": frame.camera.name,
                "frame": frame.number,
                "captured_at": captured_at.isoformat(timespec="milliseconds"),
                "latency_ms": None if result.latency_s is None else round(1000 * result.latency_s, 1),
                "outcome": result.outcome,
                "predictions": result.predictions,
                "error": result.error,
            }
        )
        if self._is_stdout:
            tqdm.write(line, file=self._file)
            self._file.flush()
        else:
            self._file.write(line + "\n")

    def close(self) -> None:
        if not self._is_stdout:
            self._file.close()


class Video(Sink):
    """Writes each camera's frames as a video, with what was answered drawn on them.

    A file keeps its own timing. A live source has the rate that it states, its frames are repeated or left out so that
    it plays as long as it took. In place of a frame that was not sent the picture before it stands still. With several
    cameras each has a file of its own, numbered in the order of the cameras: FILE-1.mp4, FILE-2.mp4, ...

    Raises SinkError if they can't be written.
    """

    def __init__(self, path: Path, cameras: list[Camera]) -> None:
        self.name = str(path)
        files = [VideoFile(each) for each in video_paths(path, len(cameras))]
        self._files = dict(zip(cameras, files, strict=True))

    def show(self, result: Result) -> None:
        self._files[result.frame.camera].show(result)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def video_paths(path: Path, cameras: int) -> list[Path]:
    """Return the file of each camera. Raises SinkError for a name that tells no kind of video."""
    if path.suffix.lower() not in CODECS:
        raise SinkError(f"can't write {path}: expected a name that ends in {', '.join(CODECS)}")
    if cameras == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, cameras + 1)]


class VideoFile:
    """The annotated video of one camera; it keeps the size of the first picture."""

    def __init__(self, path: Path) -> None:
        try:
            path.open("wb").close()
        except OSError as error:
            raise SinkError(f"can't write {path}: {error.strerror}") from error
        self._path = path
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._picture: Any = None  # the last one written
        self._written = 0
        self._fps = 0.0
        self._start = 0.0  # of a live source: the capture of its first frame, and later if stills were cut short

    def show(self, result: Result) -> None:
        camera, picture = result.frame.camera, self._picture
        if result.frame.jpeg:
            picture = annotated(result)
            if self._writer is None:
                self._start, self._fps = result.frame.captured_at, camera.fps
                self._open(picture.shape[1], picture.shape[0])
            if picture.shape[1::-1] != self._size:
                picture = cv2.resize(picture, self._size)
        if self._writer is None:
            return
        # How many frames the video has when this one is in it.
        length = result.frame.number
        if camera.is_live:
            longest = self._written + 1 + round(LONGEST_STILL_S * self._fps)
            length = 1 + round((result.frame.captured_at - self._start) * self._fps)
            self._start += max(0, length - longest) / self._fps
            length = min(length, longest)
        still = picture if self._picture is None else self._picture
        for number in range(self._written + 1, length + 1):
            self._write(picture if number == length else still)
        self._picture = picture

    def _open(self, width: int, height: int) -> None:
        codec = cv2.VideoWriter.fourcc(*CODECS[self._path.suffix.lower()])
        self._size = (width, height)
        self._writer = cv2.VideoWriter(str(self._path), cv2.CAP_FFMPEG, codec, self._fps, self._size)
        if not self._writer.isOpened():
            raise OSError(f"OpenCV can't write {self._path}, {width} x {height} at {self._fps:g} frames a second")

    def _write(self, picture: Any) -> None:
        # OpenCV does not tell when it can't write: look before, while the end of the file still fits.
        if self._written % DISK_CHECK_FRAMES == 0 and shutil.disk_usage(self._path.parent).free < DISK_RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        assert self._writer is not None
        self._writer.write(picture)
        self._written += 1

    def close(self) -> None:
        """Finish the file. Raises OSError if it has not all its frames."""
        if self._writer is None:
            self._path.unlink()  # Without a frame it would be no video.
            return
        self._writer.release()
        found = cv2.VideoCapture(str(self._path)).get(cv2.CAP_PROP_FRAME_COUNT)
        if found < 0.99 * self._written - 1:
            raise OSError(f"{self._path} has not all of its {self._written} frames: is the disk full?")


class Window(Sink):
    """Shows each camera in a window; the key q sets `stop`. Raises SinkError where no window can be opened."""

    name = "the window"

    def __init__(self, stop: threading.Event) -> None:
        # In a process of its own: without a display OpenCV's window toolkit ends the process it is in.
        code = "import cv2; cv2.namedWindow('test'); cv2.destroyAllWindows()"
        try:
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=WINDOW_TIMEOUT_S)
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
            reason = re.search("could not connect to display|The function is not implemented", said)
            raise SinkError(
                f"--show can't open a window ({reason[0] if reason else type(error).__name__}): it needs a display and "
                "OpenCV with windows, pip uninstall opencv-python-headless, pip install opencv-python"
            ) from error
        self._stop = stop

    def show(self, result: Result) -> None:
        if result.frame.jpeg:
            cv2.imshow(result.frame.camera.name, annotated(result))
            self.idle()

    def idle(self) -> None:
        if cv2.waitKey(1) & 0xFF == ord("q"):
            self._stop.set()

    def close(self) -> None:
        cv2.destroyAllWindows()


class Progress(Sink):
    """A progress bar on standard error, for files, whose end is known."""

    name = "the progress bar"

    def __init__(self, cameras: list[Camera]) -> None:
        frames = [camera.frame_count for camera in cameras]
        self._bar = tqdm(total=sum(frames) if all(frames) else None, unit="frame", dynamic_ncols=True)
        self._rate = Rate()

    def show(self, result: Result) -> None:
        now = time.monotonic()
        self._rate.add(result, now)
        if result.latency_s is not None:
            self._bar.set_postfix_str(f"{self._rate.fps(now):.1f} FPS, {1000 * result.latency_s:.0f} ms", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def annotated(result: Result) -> Any:
    """Return a frame's picture, (height, width, 3) uint8 BGR, with its most probable labels, or that there are none."""
    picture: Any = cv2.imdecode(np.frombuffer(result.frame.jpeg, np.uint8), cv2.IMREAD_COLOR)
    if result.predictions is None:
        lines = [f"no answer: {result.error}"]
    else:
        best = sorted(result.predictions.items(), key=lambda item: item[1], reverse=True)[:LABELS_SHOWN]
        lines = [f"{label} {probability:.2f}" for label, probability in best]
    scale = min(picture.shape[:2]) / 480
    for number, line in enumerate(lines):
        (width, height), below = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 0.8 * scale, 1)
        left, top, gap = round(8 * scale), round((8 + 32 * number) * scale), round(4 * scale)
        corner = (left + width + 2 * gap, top + height + below + 2 * gap)
        cv2.rectangle(picture, (left, top), corner, color=(0, 0, 0), thickness=cv2.FILLED)
        place = (left + gap, top + gap + height)
        cv2.putText(picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.8 * scale, (255, 255, 255), 1, cv2.LINE_AA)
    return picture
