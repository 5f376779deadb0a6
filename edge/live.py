"""Live sources: devices and network streams, opened again whenever they are lost, with true capture times."""

from __future__ import annotations

import logging
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import cv2

from edge import sources
from edge.clock import Sampler, StreamClock
from edge.errors import SourceError
from edge.frames import Image
from edge.losses import LossReport
from edge.probe import stream_problem
from edge.timing import backoff_s

if TYPE_CHECKING:
    from edge.cameras import Camera

THREADS = 1  # of the decoder, at first: each of them holds back a frame
MAX_FAILED_READS = 20  # more than successful ones
END_S = 0.5  # of failed reads at the end of a stream
SNAPSHOT_FPS = 1.0  # of a URL that returns one image

MIN_WAIT_S = 0.002  # of a read that had to wait for its frame
# A frame is buffered if FFmpeg read it while it opened the stream, late if it waited too long to be read, and skipped
# if it is not due.
State = Literal["current", "buffered", "late", "skipped"]
Arrival = tuple[float, State]  # of a frame: when, time.monotonic() seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grab:
    """A frame that was read: when, its time stamp, and whether FFmpeg had to wait for it."""

    read_at: float  # time.monotonic() seconds
    stamp_s: float
    has_waited: bool


class LiveSource:
    """Opens a live source, and opens it again whenever it is lost."""

    def __init__(self, camera: Camera) -> None:
        self._camera, self._timing = camera, camera.timing
        self._losses = LossReport(camera.name, self._timing.report_s)
        self._threads = THREADS
        self._stall_s = self._timing.stall_s
        self._intervals: deque[float] = deque(maxlen=5)  # between the last frames
        self._arrived_at: float | None = None  # of the last frame; None after any loss but a stall: it is no interval
        self._is_snapshot = False
        self._held_frames: int | None = None  # of the decoder; None: the stream has no time stamps

    def images(self, stop: threading.Event) -> Generator[Image, None, cv2.VideoCapture | None]:
        """Yield images until `stop` is set, or return what was opened if it turns out to have an end."""
        attempt, may_have_end = 0, self._camera.kind == "stream"
        while not stop.is_set():
            error: Exception = SourceError("no more frames come")
            self._is_snapshot, opened_at = False, time.monotonic()
            try:
                capture = self._open()
                if may_have_end and sources.has_end(self._camera.source, capture, self._stall_s):
                    return capture
                for image in self._read(capture, stop):
                    self._losses.record_frame(image.captured_at)
                    attempt, may_have_end = 0, False
                    yield image
            except (SourceError, cv2.error) as caught:
                error = caught
            if self._is_snapshot:
                interval_s = self._camera.interval_s or 1 / SNAPSHOT_FPS
                stop.wait(max(0.0, opened_at + interval_s - time.monotonic()))
            elif not stop.is_set():
                self._camera.state = "lost"
                if self._losses.record_loss():
                    self._camera.problem = self._text(error, stop)
                    self._losses.report(self._camera.problem)
                stop.wait(backoff_s(self._timing.first_reconnect_s, self._timing.max_reconnect_s, attempt))
                attempt += 1
        return None

    def _open(self) -> cv2.VideoCapture:
        """Open the source and learn its rate. Raises SourceError if that fails."""
        camera, stall_s = self._camera, self._timing.stall_s
        if self._intervals:  # A camera of one frame in 5 s does not stall after 5 s.
            stall_s = max(stall_s, min(3 * statistics.median(self._intervals), self._timing.max_stall_s))
        if sources.is_playlist(camera.source):
            stall_s = max(stall_s, self._timing.playlist_stall_s)
        self._stall_s = stall_s
        capture = sources.open_source(camera.source, camera.kind, replace(self._timing, stall_s=stall_s), self._threads)
        self._held_frames = sources.held_frames(camera.source, capture, self._threads)
        camera.learn_rate(capture)
        if camera.interval_s:
            camera.fps = min(camera.fps, 1 / camera.interval_s)
        return capture

    def _text(self, error: Exception, stop: threading.Event) -> str:
        """Return why the source was lost, in one line and without its password."""
        text = str(error)
        if isinstance(error, sources.UnopenedStream):
            text += f": {stream_problem(self._camera.source, self._timing.camera_open_s, stop)}"
        return " ".join(text.replace(self._camera.source, self._camera.name).split())

    def _read(self, capture: cv2.VideoCapture, stop: threading.Event) -> Iterator[Image]:
        """Yield the images of an open source at the rate asked for, until no more come. Close it then."""
        grabs = self._grabs(capture, stop)
        arrivals = self._paced(grabs, stop) if sources.is_playlist(self._camera.source) else self._clocked(grabs)
        held: Image | None = None  # the newest of the buffered frames
        count = 0
        try:
            for captured_at, state in self._sampled(arrivals):
                if held and state != "buffered":
                    yield held
                    held = None
                if state == "skipped":
                    continue
                ok, pixels = (True, None) if state == "late" else capture.retrieve()
                count += ok
                if ok and state == "buffered":
                    held = Image(captured_at, None, pixels)
                elif ok:
                    yield Image(captured_at, None, pixels)
            if held:
                yield held
            self._arrived_at = None
            self._is_snapshot = count == 1 and sources.is_image(self._camera.source, capture)
        except SourceError:
            if held:
                self._learn_interval(held.captured_at)
                yield held
            raise
        finally:
            capture.release()

    def _sampled(self, arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
        """Yield the arrivals; those that are not due at the rate asked for are skipped."""
        sampler = Sampler(self._camera.interval_s or 0.0)
        for captured_at, state in arrivals:
            if state == "buffered":
                sampler.restart(captured_at)
                yield captured_at, state
                continue
            self._learn_interval(captured_at)
            yield captured_at, state if sampler.is_due(captured_at) else "skipped"

    def _grabs(self, capture: cv2.VideoCapture, stop: threading.Event) -> Iterator[Grab]:
        """Grab frame after frame. Raises SourceError if no frame comes."""
        failures, failing_since = 0, math.inf
        while not stop.is_set():
            begin, worked_s = time.monotonic(), -time.thread_time()
            ok = capture.grab()
            now = time.monotonic()
            worked_s += time.thread_time()
            # When FFmpeg stops waiting, OpenCV delivers the frames that the decoder still holds.
            if now - begin >= self._stall_s:
                hint = " (--stall-timeout)" if self._stall_s == self._timing.stall_s else ""
                raise SourceError(f"no frame came for {self._stall_s:g} s{hint}")
            failures = max(0, failures - 1) if ok else failures + 1
            failing_since = min(failing_since, begin) if failures else math.inf
            if failures >= MAX_FAILED_READS:
                if now - failing_since < END_S:
                    return  # At the end of a stream reading fails at once.
                raise SourceError("most of its frames can't be decoded")
            if ok:  # Of a device nothing is buffered.
                has_waited = self._camera.kind == "device" or now - begin > max(MIN_WAIT_S, 2 * worked_s)
                yield Grab(now, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, has_waited)

    def _learn_interval(self, arrived_at: float) -> None:
        if self._arrived_at is not None:
            self._intervals.append(arrived_at - self._arrived_at)
        self._arrived_at = arrived_at

    def _clocked(self, grabs: Iterator[Grab]) -> Iterator[Arrival]:
        """Yield when each frame arrived. Raises SourceError if the frames can't be decoded as fast as they come."""
        clock = StreamClock(self._held_frames)
        may_drop = self._camera.drop_policy != "none"
        lagging: list[Grab] = []  # since when all are
        for grab in grabs:
            captured_at = clock.arrived_at(grab.read_at, grab.stamp_s, grab.has_waited)
            lags = clock.lag_s > self._timing.max_lag_s / (5 if lagging else 1)
            lagging = [*lagging, grab] if lags else []
            if lags and grab.read_at - lagging[0].read_at > self._timing.max_lag_time_s:
                if may_drop and sum(each.has_waited for each in lagging) < len(lagging) / 2:
                    raise SourceError(self._more_threads())
                clock.restart()  # Reading is fast enough: the time stamps are slow.
                lagging = []
            # A frame that reading waited for is the newest, however late it comes.
            is_late = bool(lagging) and may_drop and not grab.has_waited
            yield captured_at, "late" if is_late else "current" if clock.is_current else "buffered"

    def _more_threads(self) -> str:
        """Decode with more threads when the stream is opened again; return why."""
        before, self._threads = self._threads, min(2 * self._threads, os.cpu_count() or 1)
        text = f"it sends more than {before} thread{'s' if before > 1 else ''} can decode"
        return f"{text}, {self._threads} next" if self._threads > before else f"{text}: choose a smaller stream"

    def _paced(self, grabs: Iterator[Grab], stop: threading.Event) -> Iterator[Arrival]:
        """Yield the frames of a playlist at the intervals of their time stamps: they arrive in bursts of a segment."""
        due, before_s = time.monotonic(), math.inf
        for grab in grabs:
            step_s, before_s = grab.stamp_s - before_s, grab.stamp_s
            if 0 < step_s < self._timing.playlist_stall_s:  # Otherwise the time stamps begin anew.
                due += step_s
            due = max(due, grab.read_at)
            if stop.wait(max(0.0, due - time.monotonic())):
                return
            yield time.monotonic(), "current"
