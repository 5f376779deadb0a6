"""edge/cameras.py: the pace of files, devices that are lost and come back, and names without passwords."""

import logging
import math
import os
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from edge.cameras import Camera
from edge.errors import SourceError
from edge.frames import Frame
from edge.sources import redact
from edge.timing import Timing
from tests.support.frames import CLIP, Pixels, frames_of, jpeg

SHORT_PAUSES = Timing(first_reconnect_s=0.01, report_s=0)


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

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: self.fps, cv2.CAP_PROP_FRAME_COUNT: self.frames}.get(what, 0.0)

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
    monkeypatch.setattr(Capture, "opened", 0)
    return Capture


def test_device_that_stops_is_opened_again(
    capture: type[Capture], stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        frames = Camera("7", timing=SHORT_PAUSES).frames(stop)
        assert [next(frames).number for _ in range(7)] == list(range(1, 8))
    assert capture.opened == 1
    stop.set()
    assert list(frames) == []
    assert capture.opened == 0
    assert [message.split(": ")[1][:18] for message in caplog.messages] == [
        "the camera is lost",
        "the camera is back",
    ] * 2


def test_device_without_frames_is_reported_once_and_opened_again(
    capture: type[Capture], monkeypatch: pytest.MonkeyPatch, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = threading.Semaphore(0)
    monkeypatch.setattr(capture, "frames", 0)
    monkeypatch.setattr(capture, "grab", lambda _: attempts.release() is not None)  # type: ignore[func-returns-value]
    thread = threading.Thread(target=lambda: list(Camera("7", timing=SHORT_PAUSES).frames(stop)))
    thread.start()
    assert all(attempts.acquire(timeout=20) for _ in range(4))
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert caplog.messages == ["7: the camera is not there, no more frames come; trying until it is back"]
    assert capture.opened == 0


class Pauses(threading.Event):
    """Records the timeouts of wait() without waiting, and is set after 8 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        if len(self.seconds) == 8:
            self.set()
        return self.is_set()


def test_pauses_between_attempts_grow_up_to_a_limit(capture: type[Capture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "frames", 0)
    monkeypatch.setattr("random.uniform", lambda _, high: high)
    stop = Pauses()
    timing = Timing(first_reconnect_s=0.5, max_reconnect_s=3.0)
    assert list(Camera("7", timing=timing).frames(stop)) == []
    assert stop.seconds == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]


def test_file_without_frames_is_an_error(capture: type[Capture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "frames", 0)
    for loop in (False, True):
        with pytest.raises(SourceError, match="can be opened, but delivers no frames"):
            list(Camera(str(CLIP), loop=loop).frames(threading.Event()))


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_file_without_a_frame_rate_plays_at_25(
    capture: type[Capture], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fps: float
) -> None:
    monkeypatch.setattr(capture, "fps", fps)
    frames = list(Camera(str(CLIP)).frames(threading.Event()))
    assert len(frames) == 3
    assert frames[-1].captured_at - frames[0].captured_at > 1.5 / 25
    assert [frame.position_s for frame in frames] == pytest.approx([0, 0.04, 0.08])
    assert caplog.messages == [f"{CLIP} states {fps:g} frames a second: 25 are used"]


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


def test_file_as_fast_as_it_can_be_read_does_not_keep_its_own_rate(
    capture: type[Capture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its own rate the second frame would come after 100 s, far beyond the timeout of a test."""
    monkeypatch.setattr(capture, "fps", 0.01)
    frames = list(Camera(str(CLIP), fps=float("inf")).frames(threading.Event()))
    assert [frame.number for frame in frames] == [1, 2, 3]
    assert frames[-1].captured_at - frames[0].captured_at < 50


def test_file_is_repeated_without_a_pause_or_a_hurry(short_clip: Path, stop: threading.Event) -> None:
    frames = Camera(str(short_clip), loop=True).frames(stop)
    repeated = [next(frames) for _ in range(50)]
    assert [frame.number for frame in repeated] == list(range(1, 51))
    assert repeated[0].jpeg == repeated[22].jpeg == repeated[44].jpeg != repeated[1].jpeg
    assert repeated[-1].captured_at - repeated[0].captured_at >= 48 / 100


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_still_image_is_upright(tmp_path: Path, orientation: int) -> None:
    """As Pillow turns it, for each of the orientations that a phone or camera writes."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255  # one corner is white
    path, exif = tmp_path / "still.jpg", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("L"))
    (frame,) = Camera(str(path)).frames(threading.Event())
    for data in (frame.jpeg, Camera(str(path)).check()):
        found = cv2.imdecode(np.frombuffer(data or b"", np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        assert found is not None
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    ("resize", "expected"), [(None, (480, 640)), (256, (256, 341)), (480, (480, 640)), (900, (480, 640))]
)
def test_frames_are_shrunk_and_never_enlarged(resize: int | None, expected: tuple[int, int]) -> None:
    frame = next(Camera(str(CLIP), resize=resize).frames(threading.Event()))
    assert size(frame) == expected


def test_jpeg_quality(clip: list[Pixels]) -> None:
    coarse, usual, fine = (len(Camera("0", jpeg_quality=quality).encode(clip[0])) for quality in (50, 95, 100))
    assert 2 * coarse < usual < fine
    assert usual == len(jpeg(clip[0]))


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://admin:hunter2@10.0.0.1:554/live?channel=1", "rtsp://10.0.0.1:554/live?channel=1"),
        ("rtsp://admin:hun@ter/2@10.0.0.1/live", "rtsp://10.0.0.1/live"),
        ("http://cam/video?usr=admin&pwd=hunter2&channel=2", "http://cam/video?usr=***&pwd=***&channel=2"),
        ("http://cam/video?channel=2&authToken=hunter2#x", "http://cam/video?channel=2&authToken=***"),
        ("http://cam/v?token=hunter#2&channel=2", "http://cam/v?token=***&channel=2"),
        ("http://cam/v?pin=hunter2&jwt=hunter2&otp=hunter;2", "http://cam/v?pin=***&jwt=***&otp=***"),
        ("rtsp://john.doe:1234/hunter2@10.0.0.1/x", "rtsp://10.0.0.1/x"),
        ("rtsp://user:hunter@2.de/x@10.0.0.1:554/x", "rtsp://10.0.0.1:554/x"),
        ("rtsp://user:hunter@1.2.3.4/x@[fe80::1]/x", "rtsp://[fe80::1]/x"),
        ("rtsp://cam/user=admin_password=hunter2_channel=1.sdp", "rtsp://cam/user=***"),
        ("http://[bad:hunter2@cam", "http://cam"),
        ("http://cam/v?side=left&author=a&keyframe=1&signal=2", "http://cam/v?side=left&author=a&keyframe=1&signal=2"),
        (
            "http://cam/v?access_token=hunter2&X-Amz-Signature=hunter2",
            "http://cam/v?access_token=***&X-Amz-Signature=***",
        ),
        ("http://cam/v?loginuse=admin&loginpas=hunter2&sid=hunter2", "http://cam/v?loginuse=***&loginpas=***&sid=***"),
        (
            "http://cam/v?adminpassword=hunter2&camtoken=hunter2&MyPwd=hunter2",
            "http://cam/v?adminpassword=***&camtoken=***&MyPwd=***",
        ),
        ("http://cam/v#token=hunter2", "http://cam/v#token=***"),
        ("rtsp://10.0.0.7/live@main", "rtsp://10.0.0.7/live@main"),
        ("rtsp://10.0.0.7:554/live@main.sdp", "rtsp://10.0.0.7:554/live@main.sdp"),
        ("rtsp://[fe80::1]/live@main", "rtsp://[fe80::1]/live@main"),
        ("rtsp://admin:hunter2@10.0.0.7/live@main.sdp", "rtsp://10.0.0.7/live@main.sdp"),
        ("rtsp://me@example.com:hunter2@10.0.0.7/live", "rtsp://10.0.0.7/live"),
        ("rtsp://admin:12345/hunter2@10.0.0.7/live", "rtsp://10.0.0.7/live"),
        ("rtsp://admin:hun@ter/2@cam/live", "rtsp://cam/live"),
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


def test_image_that_jpeg_cannot_hold_is_an_error_of_the_source() -> None:
    with pytest.raises(SourceError, match=r"camera: OpenCV can't encode an image of shape \(1, 70000, 3\) as JPEG"):
        Camera("camera").encode(np.zeros((1, 70000, 3), np.uint8))


def test_file_may_have_a_relative_name_with_a_colon(
    short_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("12:00:00.mp4").write_bytes(short_clip.read_bytes())
    assert len(list(Camera("12:00:00.mp4", fps=math.inf).frames(threading.Event()))) == len(frames_of(short_clip))


def test_name_that_is_not_utf_8_is_an_error(tmp_path: Path, short_clip: Path) -> None:
    """OpenCV would end the process."""
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4")
    Path(path).write_bytes(short_clip.read_bytes())
    with pytest.raises(SourceError, match="is a name that is not UTF-8: rename the file"):
        Camera(path).check()


def test_state_of_a_file(short_clip: Path, tmp_path: Path) -> None:
    camera = Camera(str(short_clip), fps=math.inf)
    assert (camera.state, camera.last_frame) == ("waiting", None)
    for frame in camera.frames(threading.Event()):
        assert (camera.state, camera.last_frame) == ("live", frame)
    assert camera.state == "ended"
    missing = Camera(str(tmp_path / "none.mp4"))
    with pytest.raises(SourceError):
        next(missing.frames(threading.Event()))
    assert (missing.state, missing.problem[:14]) == ("failed", "no such file: ")


def test_first_frame_after_a_loss_is_marked(monkeypatch: pytest.MonkeyPatch, stop: threading.Event) -> None:
    """--skip-static sends it, whatever it shows."""
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    camera = Camera("0", timing=SHORT_PAUSES, compare=True)
    frames = list(islice(camera.frames(stop), 7))
    assert [frame.is_first for frame in frames] == [True, False, False, True, False, False, True]
    assert all(frame.small is not None and frame.small.shape == (4, 6) for frame in frames)
    assert next(Camera("0", timing=SHORT_PAUSES).frames(stop)).small is None
