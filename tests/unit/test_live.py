"""edge/live.py: when frames arrived, a decoder that is too slow, and how often a lost camera is reported."""

import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.cameras import Camera
from edge.clock import StreamClock
from edge.frames import Frame
from edge.losses import LossReport
from edge.timing import Timing
from tests.support.clock import Clock


def test_frames_that_wait_to_be_read_have_the_time_at_which_they_arrived() -> None:
    """25 frames a second; nothing is read for 2 s, then everything at once."""
    clock = StreamClock(held_frames=0)
    for number in range(100):
        arrived_at = 50 + number / 25
        read_at = max(arrived_at, 53.0) if arrived_at > 51 else arrived_at
        assert clock.arrived_at(read_at, 7 + number / 25, True) == pytest.approx(arrived_at, abs=0.01)
        assert clock.lag_s == pytest.approx(read_at - arrived_at, abs=0.01)


@pytest.mark.parametrize("held_frames", [0, 1, 2, 16])
def test_frames_that_ffmpeg_held_back_have_the_time_at_which_they_arrived(held_frames: int) -> None:
    """At first 30 frames come at once, that FFmpeg read while it opened the stream."""
    clock, current = StreamClock(held_frames), []
    for number in range(100):
        arrived_at = 50 + number / 25
        read_at = max(arrived_at + held_frames / 25, 50 + 30 / 25)
        captured_at = clock.arrived_at(read_at, number / 25, True)
        if clock.is_current:
            current.append(number)
            assert captured_at == pytest.approx(arrived_at, abs=0.041)
            if number > 60:
                assert captured_at == pytest.approx(arrived_at, abs=0.005)
    assert current == list(range(current[0], 100))
    assert current[0] <= 32 + held_frames


@given(st.lists(st.floats(0, 0.2), min_size=50, max_size=100))
def test_jitter_of_the_network_is_no_time_of_capture(delays_s: list[float]) -> None:
    """Times never exceed the time of reading, and increase by the intervals of the camera or by less."""
    clock, before = StreamClock(held_frames=0), -1.0
    for number, delay_s in enumerate(delays_s):
        captured_at = clock.arrived_at(50 + number / 5 + delay_s, number / 5, True)
        assert 50 + number / 5 - 0.001 <= captured_at <= 50 + number / 5 + delay_s + 1e-6
        assert captured_at >= before - 1e-6
        before = captured_at


def test_time_stamps_that_begin_anew_or_are_missing_do_not_age_frames() -> None:
    anew, jump = [0.0, 0.04, 0.08, 0.12, 0.0, 0.04, 0.08, 0.12], [9.0, 9.04, 9.08, 900.0, 900.04, 900.08]
    for stamps in ([0.0] * 20, anew, jump):
        clock = StreamClock(held_frames=0)
        for number, stamp_s in enumerate(stamps):
            now = 50 + number / 25
            assert clock.arrived_at(now, stamp_s, True) == pytest.approx(now, abs=0.001)
        assert clock.is_current


def test_clocks_that_differ_do_not_age_frames() -> None:
    """A camera's clock that is slow by 200 millionths, for an hour."""
    clock = StreamClock(held_frames=0)
    for second in range(3600):
        captured_at = clock.arrived_at(50 + second * 1.0002, float(second), True)
        assert captured_at == pytest.approx(50 + second * 1.0002, abs=0.001)


class SlowDecoder:
    """Stands in for cv2.VideoCapture: a stream of 25 frames a second, each of which takes 0.1 s to decode."""

    time: Clock
    threads: list[int] = []  # noqa: RUF012

    def __init__(self, *arguments: Any) -> None:
        options = arguments[2]
        self.threads.append(options[options.index(cv2.CAP_PROP_N_THREADS) + 1])
        self.opened_at, self.number = self.time.now, 0

    def isOpened(self) -> bool:
        return True

    def get(self, what: int) -> float:
        jpeg = cv2.VideoWriter.fourcc(*"MJPG")
        values = {cv2.CAP_PROP_FPS: 25.0, cv2.CAP_PROP_POS_MSEC: 40.0 * self.number, cv2.CAP_PROP_FOURCC: jpeg}
        return values.get(what, 0.0)

    def grab(self) -> bool:
        self.number += 1
        decoded_at = self.time.now + 0.1 / self.threads[-1]
        self.time.now = max(decoded_at, self.opened_at + self.number / 25)
        return True

    def retrieve(self) -> tuple[bool, Any]:
        return True, np.zeros((4, 6, 3), np.uint8)

    def release(self) -> None:
        pass


@pytest.fixture
def slow_decoder(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> type[SlowDecoder]:
    monkeypatch.setattr(SlowDecoder, "time", clock, raising=False)
    monkeypatch.setattr(SlowDecoder, "threads", [])
    monkeypatch.setattr("cv2.VideoCapture", SlowDecoder)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("time.thread_time", clock)  # Decoding is all that takes time.
    return SlowDecoder


def read(camera: Camera, count: int) -> Iterator[Frame]:
    return islice(camera.frames(threading.Event()), count)


def test_decoder_that_is_too_slow_gets_more_threads(
    slow_decoder: type[SlowDecoder], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    camera = Camera("rtsp://camera/live", timing=Timing(first_reconnect_s=0.0))
    for frame in read(camera, 400):
        age_s = clock.now - frame.captured_at
        assert age_s < 1 or not frame.jpeg, "a frame that waited is not worth its encoding"
    assert slow_decoder.threads == [1, 2, 4]
    assert caplog.messages[0] == (
        "rtsp://camera/live: the camera is lost, it sends more than 1 thread can decode, 2 next; "
        "trying until it is back"
    )


def test_decoder_that_is_too_slow_on_all_cores_is_reported(
    slow_decoder: type[SlowDecoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    camera = Camera("rtsp://camera/live", timing=Timing(first_reconnect_s=0.0, report_s=0.0))
    frames = list(read(camera, 1000))
    assert set(slow_decoder.threads[1:]) == {2}
    assert "it sends more than 2 threads can decode: choose a smaller stream" in caplog.messages[-2]
    assert 0.1 < sum(bool(frame.jpeg) for frame in frames) / len(frames) < 0.9


def test_frame_that_the_network_delayed_is_no_late_frame(
    slow_decoder: type[SlowDecoder], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tenth comes 0.4 s later than the others: nothing newer is there yet."""
    monkeypatch.setattr("time.thread_time", lambda: 0.0)

    def grab(capture: SlowDecoder) -> bool:
        capture.number += 25
        arrives_at = capture.opened_at + capture.number / 25 + (0.4 if capture.number % 250 == 0 else 0.0)
        clock.now = max(clock.now + 0.001, arrives_at)
        return True

    monkeypatch.setattr(slow_decoder, "grab", grab)
    assert all(frame.jpeg for frame in read(Camera("rtsp://camera/live"), 100))


def test_low_rate_delays_no_frame(
    slow_decoder: type[SlowDecoder], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg reads 10 frames while it opens the stream; the newest of them is the first frame."""
    monkeypatch.setattr("time.thread_time", lambda: 0.0)

    def grab(capture: SlowDecoder) -> bool:
        capture.number += 1
        clock.now = max(clock.now + 0.001, capture.opened_at + (capture.number - 10) / 25)
        return True

    monkeypatch.setattr(slow_decoder, "grab", grab)
    frames, captured_at = Camera("rtsp://camera/live", fps=0.2).frames(threading.Event()), []
    for _ in range(3):
        captured_at.append(next(frames).captured_at)
        assert clock.now - captured_at[-1] < 0.1
    assert [after - before for before, after in pairwise(captured_at)] == pytest.approx([5, 5], abs=1.6)


def test_slow_time_stamps_are_no_slow_decoder(
    slow_decoder: type[SlowDecoder], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of 25 frames a second, of which 10 come: reading waits for them."""
    monkeypatch.setattr("time.thread_time", lambda: 0.0)
    camera = Camera("rtsp://camera/live")
    frames = list(read(camera, 400))
    assert slow_decoder.threads == [1]
    assert all(clock.now - frame.captured_at < 42 for frame in frames)
    assert sum(bool(frame.jpeg) for frame in frames) > 10


def test_images_that_never_wait_are_delivered(clock: Clock, slow_decoder: type[SlowDecoder]) -> None:
    """JPEG over HTTP of a camera that is faster than its decoder: nothing says which frames were buffered."""
    frame = next(read(Camera("http://camera/live"), 1))
    assert frame.jpeg
    assert clock.now - 100 < 6
    assert slow_decoder.threads == [1]


def test_camera_that_waits_loses_no_frame(slow_decoder: type[SlowDecoder]) -> None:
    camera = Camera("rtsp://camera/live", drop="none")
    assert all(frame.jpeg for frame in read(camera, 400))
    assert slow_decoder.threads == [1]


@pytest.fixture
def report(clock: Clock) -> LossReport:  # noqa: ARG001
    return LossReport("camera", 60.0)


def lose(report: LossReport, problem: str = "cut") -> None:
    if report.record_loss():
        report.report(problem)


def test_loss_and_return_are_reported_at_once(
    report: LossReport, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    lose(report)
    for _ in range(3):
        clock.now += 100
        report.record_frame(clock.now)
        clock.now += 70
        report.record_frame(clock.now)
        lose(report)
        lose(report)
    texts = ["is not there, cut; trying until it is back", "is back after 100.0 s"]
    texts += ["is lost, cut; trying until it is back", "is back after 100.0 s"] * 3
    assert caplog.messages == [f"camera: the camera {text}" for text in texts[:-1]]


def test_camera_that_is_lost_again_and_again_is_reported_once_a_minute(
    report: LossReport, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    report.record_frame(clock.now)
    for _ in range(1000):  # 250 s
        lose(report)
        clock.now += 0.25
        report.record_frame(clock.now)
    assert len(caplog.messages) == 4 + 250 // 60
    assert caplog.messages[4] == "camera: the camera was lost 240 times in 60 s, and is back"
    caplog.clear()
    for _ in range(250):
        clock.now += 0.25
        report.record_frame(clock.now)
    (message,) = caplog.messages
    assert message.startswith("camera: the camera was lost ")
    assert message.endswith(", and is back")


def test_camera_that_stays_lost_after_it_came_back_shortly_is_reported(
    report: LossReport, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    lose(report)
    report.record_frame(clock.now)
    for _ in range(100):
        clock.now += 1
        lose(report)
    texts = ["is not there, cut; trying until it is back", "is back after 0.0 s"]
    assert caplog.messages[:2] == [f"camera: the camera {text}" for text in texts]
    assert caplog.messages[2:] == ["camera: the camera is lost, cut; trying until it is back"]
