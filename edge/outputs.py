"""Where results go: terminal, JSON lines, progress bar; edge/video.py writes annotated videos.

To add an output, write a subclass of Output, a flag in edge/options.py, and a line in open_outputs() in request.py.
"""

import errno
import json
import logging
import os
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from edge.cameras import Camera
from edge.errors import OutputError
from edge.frames import Prediction, Result, Stream
from edge.options import Options
from edge.stats import Rate

if sys.platform != "win32":
    import fcntl

tqdm.set_lock(threading.RLock())  # tqdm's own lock is for several processes, and prints a warning on some systems.
log = logging.getLogger(__name__)


class Output:
    """Gets every result, those of one stream in frame order, on the main thread. Messages call it `name`."""

    name = ""

    def write(self, result: Result) -> None:
        """Write a result. Raises OSError if that fails."""

    def needs_images(self, camera: Camera) -> bool:  # noqa: ARG002
        """Return whether the results of a camera must have the images of their frames, which take memory."""
        return False

    def poll(self) -> None:
        """Called several times a second while there are no results."""

    def close(self) -> None:
        """Complete what was written: at the end, or after a failure."""


class Outputs:
    """All outputs. One that fails is reported and removed, and has_failed is set; the others continue.

    `stop` is set if the reader of an output has left, as with `| head`.
    """

    def __init__(self, outputs: Sequence[Output], stop: threading.Event) -> None:
        self.has_failed = False
        self._outputs, self._stop = list(outputs), stop

    def write(self, result: Result) -> None:
        self._call_each(lambda output: output.write(result))

    def trim(self, result: Result) -> Result:
        """Return a result, without the image of its frame if no output needs it."""
        needs_image = any(output.needs_images(result.frame.camera) for output in self._outputs)
        return result if needs_image else result.without_image()

    def poll(self) -> None:
        self._call_each(lambda output: output.poll())

    def close(self) -> None:
        self._call_each(lambda output: output.close())

    def _call_each(self, method: Callable[[Output], None]) -> None:
        for output in list(self._outputs):
            try:
                method(output)
            except Exception as error:  # noqa: BLE001 - One output must not end the others.
                self._outputs.remove(output)
                self.has_failed = True
                if isinstance(error, BrokenPipeError):
                    self._stop.set()
                else:
                    name, cause = type(error).__name__, " ".join(str(error).split())
                    log.error("%s fails, going on without it: %s: %s", output.name, name, cause)
                with suppress(Exception):  # What is written stays readable; the failure was reported.
                    output.close()


class Terminal(Output):
    """Prints, every --log-every frames of a stream, its rate and its last predictions, as many as --batch-size.

    With --client-batching they are one list, as the server responds to a JSON batch. Several streams have their names
    above them.
    """

    name = "standard output"

    def __init__(self, options: Options) -> None:
        self._batch_size, self._as_json = options.batch_size, options.client_batching
        self._show_camera, self._show_model = len(options.input) > 1, len(options.model) > 1
        self._log_every = max(options.log_every, options.batch_size)  # so that no prediction is printed twice
        self._rates: dict[Stream, Rate] = defaultdict(Rate)
        self._unprinted: dict[Stream, deque[Prediction]] = defaultdict(lambda: deque(maxlen=options.batch_size))
        self._numbers: dict[Stream, int] = {}

    def write(self, result: Result) -> None:
        stream = result.frame.stream
        self._rates[stream].add(result, time.monotonic())
        self._numbers[stream] = result.frame.number
        if result.predictions is not None:
            self._unprinted[stream].append(result.predictions)
        if result.frame.order % self._log_every == 0:
            self._print(stream)

    def close(self) -> None:
        for stream in self._numbers:
            self._print(stream)

    def _print(self, stream: Stream) -> None:
        predictions = list(self._unprinted[stream])
        if not predictions:
            return
        self._unprinted[stream].clear()
        fps = self._rates[stream].fps(time.monotonic())
        names = [stream.camera.name] * self._show_camera + [stream.model] * self._show_model
        lines = [", ".join(names)] if names else []
        lines += [f"With Batch Size {self._batch_size}, FPS at frame number {self._numbers[stream]} is {fps:.1f}"]
        lines += [as_text(block) for block in ([predictions] if self._as_json else predictions)]
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()


def as_text(value: Any, margin: str = "") -> str:
    """Return predictions as JSON with a line for each value. A person, who has many, has one line."""
    if isinstance(value, list) and value:
        items = [f"\n{margin}  {as_text(item, margin + '  ')}" for item in value]
        return f"[{','.join(items)}\n{margin}]"
    return json.dumps(value, indent=None if "keypoints" in value else 2).replace("\n", f"\n{margin}")


def open_output(path: Path) -> FileIO:
    """Open a file to append to it. Raises OutputError if that fails, or if another run is writing it."""
    try:
        file = FileIO(path, "ab")
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}") from error
    if sys.platform != "win32" and path.is_file():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"can't write {path}: another run is writing it, expected a file of its own") from error
        except OSError:
            log.warning("%s is on a file system without locks: no other run must write it", path)
    return file


class JsonLines(Output):
    """Appends a JSON object for each frame, on a line of its own. Raises OutputError if the file can't be opened."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._file = None if path == "-" else open_output(Path(path))
        if self._file is not None and Path(path).is_file() and Path(path).stat().st_size:
            with Path(path).open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    self._append("\n")  # Another program wrote half a line.

    def write(self, result: Result) -> None:
        frame, latency_s = result.frame, result.latency_s
        # The wall clock may be set at any time: read it now, and subtract the frame's age.
        captured_at = datetime.now(timezone.utc) - timedelta(seconds=time.monotonic() - frame.captured_at)
        fields = {
            "camera": frame.camera.name,
            "model": frame.model,
            "frame": frame.number,
            "captured_at": captured_at.isoformat(timespec="milliseconds"),
            "position_s": None if frame.position_s is None else round(frame.position_s, 3),
            "latency_ms": None if latency_s is None else round(1000 * latency_s, 1),
            "outcome": result.outcome,
            "predictions": result.predictions,
            "error": result.error,
        }
        if self._file is None:
            tqdm.write(json.dumps(fields), file=sys.stdout)
            sys.stdout.flush()
        else:
            self._append(json.dumps(fields) + "\n")

    def _append(self, line: str) -> None:
        """Write a whole line at once, or nothing: whatever ends the run, the file has whole lines."""
        assert self._file is not None
        data = line.encode()
        written = self._file.write(data)
        if written < len(data):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Progress(Output):
    """A progress bar on standard error, for files, whose end is known."""

    name = "the progress bar"

    def __init__(self, cameras: list[Camera], models: int = 1) -> None:
        counts = [camera.frame_count for camera in cameras] * models
        self._bar = tqdm(total=sum(counts) if all(counts) else None, unit="frame", dynamic_ncols=True)
        self._rate = Rate()
        self._latency_s = 0.0
        self._numbers = Counter[Stream]()  # of the last frames; a model may get fewer frames than are read

    def write(self, result: Result) -> None:
        frame = result.frame
        self._rate.add(result, time.monotonic())
        self._latency_s = result.latency_s or self._latency_s
        self._bar.set_postfix_str(self._speed(), refresh=False)
        self._bar.update(frame.number - self._numbers[frame.stream])
        self._numbers[frame.stream] = frame.number

    def poll(self) -> None:
        self._bar.set_postfix_str(self._speed())  # The rate falls while the server is down.

    def close(self) -> None:
        self._bar.close()

    def _speed(self) -> str:
        return f"{self._rate.fps(time.monotonic()):.1f} FPS, {1000 * self._latency_s:.0f} ms"
