"""edge/cameras.py: pace, cameras that are lost and come back, and names without passwords."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from deploy.node import free_ports
from edge.cameras import Camera, Frame, SourceError, redact
from tests.conftest import CLIP, frames_of, jpeg
from tests.mjpeg_camera import mjpeg_camera


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """Set when the test ends, so that no camera goes on."""
    event = threading.Event()
    yield event
    event.set()


def pictures(count: int, size: tuple[int, int] = (48, 64)) -> list[bytes]:
    """Return pictures, height x width, each brighter than the one before."""
    return [jpeg(np.full((*size, 3), 10 * number, np.uint8)) for number in range(count)]


def size(frame: Frame) -> tuple[int, int]:
    """Return a frame's height and width."""
    image = cv2.imdecode(np.frombuffer(frame.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image.shape[0], image.shape[1]


class Capture:
    """Stands in for cv2.VideoCapture: a device that delivers some frames and then no more."""

    frames = 3
    fps = 30.0
    opened = 0

    def __init__(self, *_: object) -> None:
        self.left = self.frames
        type(self).opened += 1
        self.is_released = False

    def isOpened(self) -> bool:
        return True

    def get(self, _: int) -> float:
        return self.fps

    def grab(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def retrieve(self) -> tuple[bool, Any]:
        return True, np.zeros((4, 6, 3), np.uint8)

    def read(self) -> tuple[bool, Any]:
        return self.grab(), np.zeros((4, 6, 3), np.uint8)

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True
        type(self).opened -= 1


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> type[Capture]:
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    monkeypatch.setattr("edge.cameras.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(Capture, "opened", 0)
    return Capture


def test_device_that_stops_is_opened_again(
    capture: type[Capture], stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        frames = Camera("7").frames(stop)
        assert [next(frames).number for _ in range(7)] == list(range(1, 8))
    assert capture.opened == 1
    stop.set()
    assert list(frames) == []
    assert capture.opened == 0
    assert [message.split(": ")[1][:18] for message in caplog.messages] == [
        "the camera is lost",
        "the camera is back",
    ] * 2


def test_device_without_frames_is_told_once_and_tried_again(
    capture: type[Capture], monkeypatch: pytest.MonkeyPatch, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = threading.Semaphore(0)
    monkeypatch.setattr(capture, "frames", 0)
    monkeypatch.setattr(capture, "grab", lambda _: attempts.release() is not None)  # type: ignore[func-returns-value]
    thread = threading.Thread(target=lambda: list(Camera("7").frames(stop)))
    thread.start()
    assert all(attempts.acquire(timeout=20) for _ in range(4))
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert caplog.messages == ["7: the camera is not there, no more frames come; trying until it is back"]
    assert capture.opened == 0


def test_file_without_frames_is_an_error(capture: type[Capture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "frames", 0)
    for loop in (False, True):
        with pytest.raises(SourceError, match="can be opened, but delivers no frames"):
            list(Camera(str(CLIP), loop=loop).frames(threading.Event()))


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_file_that_does_not_tell_its_rate_plays_at_25(
    capture: type[Capture], monkeypatch: pytest.MonkeyPatch, fps: float
) -> None:
    monkeypatch.setattr(capture, "fps", fps)
    monkeypatch.setattr(capture, "get", lambda _, what: fps if what == cv2.CAP_PROP_FPS else 3.0)
    frames = list(Camera(str(CLIP)).frames(threading.Event()))
    assert len(frames) == 3
    assert frames[-1].captured_at - frames[0].captured_at > 1.5 / 25


def test_file_that_had_to_wait_does_not_hurry_afterwards() -> None:
    """Only lower bounds of time, an interval below the exact ones: a slow machine cannot break them."""
    frames = Camera(str(CLIP)).frames(threading.Event())
    first = [next(frames).captured_at for _ in range(6)]
    assert first[-1] - first[0] >= 4 / 25
    time.sleep(0.5)
    afterwards = [next(frames).captured_at for _ in range(6)]
    assert afterwards[-1] - afterwards[0] >= 4 / 25


def test_file_plays_at_the_rate_asked_for() -> None:
    slow = Camera(str(CLIP), fps=5).frames(threading.Event())
    captured_at = [next(slow).captured_at for _ in range(4)]
    assert captured_at[-1] - captured_at[0] >= 2 / 5
    begin = time.monotonic()
    assert [frame.number for frame in Camera(str(CLIP), fps=float("inf")).frames(threading.Event())][-1] == 375
    assert time.monotonic() - begin < 375 / 25 - 1, "the clip's own rate was kept"


def test_file_is_repeated_without_a_pause_or_a_hurry(short_clip: Path, stop: threading.Event) -> None:
    frames = Camera(str(short_clip), loop=True).frames(stop)
    repeated = [next(frames) for _ in range(50)]
    assert [frame.number for frame in repeated] == list(range(1, 51))
    assert repeated[0].jpeg == repeated[22].jpeg == repeated[44].jpeg != repeated[1].jpeg
    assert repeated[-1].captured_at - repeated[0].captured_at >= 48 / 100


def test_file_is_repeated_without_opening_it_again(short_clip: Path, stop: threading.Event) -> None:
    """OpenCV opens one source at a time: a camera that never answers would hold up a file at each of its ends."""
    with mjpeg_camera(pictures(1)) as mute:
        mute.mode = "mute"
        frames = Camera(str(short_clip), loop=True).frames(stop)
        first = next(frames)
        thread = threading.Thread(target=lambda: list(Camera(mute.url).frames(stop)))
        thread.start()
        repeated = [next(frames) for _ in range(100)]
        assert repeated[-1].captured_at - first.captured_at < 4
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def test_stop_ends_the_wait_for_the_next_frame(capture: type[Capture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "fps", 0.01)
    stop = threading.Event()
    frames = Camera(str(CLIP)).frames(stop)
    next(frames)
    threading.Timer(0.1, stop.set).start()
    before = time.monotonic()
    assert list(frames) == []
    assert time.monotonic() - before < 50


def test_still_image_is_one_frame(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "still.png"), np.zeros((48, 64, 3), np.uint8))
    assert len(list(Camera(str(tmp_path / "still.png")).frames(threading.Event()))) == 1


def test_stream_that_is_cut_goes_on_when_it_is_back(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with mjpeg_camera(pictures(20)) as server:
        camera = Camera(server.url.replace("http://", "http://admin:hunter2@") + "?user=admin&pwd=hunter2&channel=1")
        assert camera.is_live
        frames = camera.frames(stop)
        before = [next(frames) for _ in range(5)]
        server.mode = "cut"
        threading.Timer(1.0, lambda: setattr(server, "mode", "streaming")).start()
        after = [next(frames) for _ in range(60)]  # more than what was on its way when the stream was cut
        assert [frame.number for frame in before + after] == list(range(1, 66))
        assert server.streams == 2
        name = f"http://127.0.0.1:{server.server_port}/live?user=***&pwd=***&channel=1"
        assert camera.name == name
    lost, back = caplog.messages
    assert lost == f"{name}: the camera is lost, no more frames come; trying until it is back"
    assert back.startswith(f"{name}: the camera is back after ")
    assert "hunter2" not in caplog.text


def test_stream_that_stalls_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.cameras.READ_TIMEOUT_MS", 500)
    with mjpeg_camera(pictures(20)) as server:
        frames = Camera(server.url).frames(stop)
        next(frames)
        server.mode = "stalled"
        threading.Timer(1.5, lambda: setattr(server, "mode", "streaming")).start()
        seen = 0
        while server.streams < 2 or len(caplog.messages) < 2:
            next(frames)
            seen += 1
            assert seen < 1000
    assert "is back" in caplog.messages[1]


def test_stream_that_never_answers_is_given_up_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.cameras.OPEN_TIMEOUT_MS", 500)
    with mjpeg_camera(pictures(20)) as server:
        server.mode = "mute"
        threading.Timer(2.0, lambda: setattr(server, "mode", "streaming")).start()
        assert next(Camera(server.url).frames(stop)).number == 1
        assert "can't open" in caplog.messages[0]
        server.mode = "mute"
        with pytest.raises(SourceError, match="can't open"):
            Camera(server.url).check()


def test_stream_may_be_absent_at_the_start(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    frames = Camera(f"http://127.0.0.1:{port}/live").frames(stop)
    arrived: list[Frame] = []
    thread = threading.Thread(target=lambda: arrived.append(next(frames)))
    thread.start()
    thread.join(1.0)
    assert not arrived
    with mjpeg_camera(pictures(20), port=port):
        thread.join(20)
        assert [frame.number for frame in arrived] == [1]
    assert ["is not there" in caplog.messages[0], "is back" in caplog.messages[1]] == [True, True]


def test_stream_may_change_its_resolution(stop: threading.Event) -> None:
    with mjpeg_camera(pictures(5, (48, 64)) + pictures(5, (96, 128))) as server:
        frames = Camera(server.url).frames(stop)
        assert [next(frames).number for _ in range(30)] == list(range(1, 31))
        server.pictures = pictures(10, (96, 128))
        server.mode = "cut"
        threading.Timer(0.5, lambda: setattr(server, "mode", "streaming")).start()
        for frame in frames:
            if size(frame) == (96, 128):
                break
            assert frame.number < 200


def test_stream_that_slows_down_is_not_lost(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with mjpeg_camera(pictures(20)) as server:
        frames = Camera(server.url).frames(stop)
        next(frames)
        server.fps = 1
        slow = [next(frames), next(frames)]
        while slow[1].captured_at - slow[0].captured_at < 0.8:
            slow = [slow[1], next(frames)]
        assert server.streams == 1
        assert caplog.messages == []


def test_live_source_is_sampled_down(stop: threading.Event) -> None:
    with mjpeg_camera(pictures(20), fps=40) as server:
        frames = Camera(server.url, fps=10).frames(stop)
        captured_at = [next(frames).captured_at for _ in range(21)]
        assert captured_at[-1] - captured_at[0] >= 19 / 10
        frames.close()  # type: ignore[attr-defined]  # a generator
        faster = Camera(server.url, fps=1e6).frames(stop)
        shades = [cv2.imdecode(np.frombuffer(next(faster).jpeg, np.uint8), 0).mean() for _ in range(10)]  # type: ignore[union-attr]
        assert shades == pytest.approx(range(0, 100, 10), abs=2), "no frame is left out"


@pytest.mark.parametrize(
    ("resize", "expected"), [(None, (480, 640)), (256, (256, 341)), (480, (480, 640)), (900, (480, 640))]
)
def test_frames_are_shrunk_and_never_enlarged(resize: int | None, expected: tuple[int, int]) -> None:
    frame = next(Camera(str(CLIP), resize=resize).frames(threading.Event()))
    assert size(frame) == expected


def test_jpeg_quality(clip: list[npt.NDArray[np.uint8]]) -> None:
    coarse, usual, fine = (len(Camera("0", jpeg_quality=quality).encode(clip[0])) for quality in (50, 95, 100))
    assert 2 * coarse < usual < fine
    assert usual == len(jpeg(clip[0]))


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://admin:hunter2@10.0.0.1:554/live?channel=1", "rtsp://10.0.0.1:554/live?channel=1"),
        ("rtsp://admin:hun@ter/2@10.0.0.1/live", "rtsp://10.0.0.1/live"),
        ("http://cam/video?usr=admin&pwd=hunter2&channel=2", "http://cam/video?usr=***&pwd=***&channel=2"),
        ("http://cam/video?channel=2&authToken=hunter2#x", "http://cam/video?channel=2&authToken=***#x"),
        ("rtsp://cam/user=admin_password=hunter2_channel=1.sdp", "rtsp://cam/user=***"),
        ("http://[bad:hunter2@cam", "http://cam"),
        ("clips/a@b=c.mp4", "clips/a@b=c.mp4"),
        ("/dev/video0", "/dev/video0"),
        ("0", "0"),
    ],
)
def test_names_without_passwords(source: str, shown: str) -> None:
    assert redact(source) == shown


def test_frames_of_a_file_are_those_that_opencv_reads(short_clip: Path) -> None:
    frames = list(Camera(str(short_clip)).frames(threading.Event()))
    assert [frame.jpeg for frame in frames] == [jpeg(frame) for frame in frames_of(short_clip)]
