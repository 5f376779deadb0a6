"""edge/cameras.py where neither a file nor a camera of a test machine can show it: pace, and devices that fail."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.cameras import Camera, Frame, SourceError
from tests.conftest import CLIP


class Capture:
    """Stands in for cv2.VideoCapture: a device that delivers some frames and then no more."""

    frames = 3
    fps = 30.0

    def __init__(self, _: int | str) -> None:
        self.left = self.frames
        self.is_released = False

    def isOpened(self) -> bool:
        return True

    def get(self, _: int) -> float:
        return self.fps

    def read(self) -> tuple[bool, Any]:
        self.left -= 1
        return self.left >= 0, np.zeros((4, 6, 3), np.uint8)

    def release(self) -> None:
        self.is_released = True


@pytest.mark.parametrize(("frames", "message"), [(3, "7 delivers no frames any more"), (0, "7 delivers no frames$")])
def test_device_that_stops_is_an_error(monkeypatch: pytest.MonkeyPatch, frames: int, message: str) -> None:
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    monkeypatch.setattr(Capture, "frames", frames)
    camera = Camera("7")
    delivered: list[Frame] = []
    with pytest.raises(SourceError, match=message):
        delivered.extend(camera.frames(threading.Event()))
    assert [frame.number for frame in delivered] == list(range(1, frames + 1))
    assert camera._capture.is_released  # type: ignore[attr-defined]  # a Capture


def test_file_without_frames_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    monkeypatch.setattr(Capture, "frames", 0)
    with pytest.raises(SourceError, match="delivers no frames"):
        list(Camera(str(CLIP)).frames(threading.Event()))


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_file_that_does_not_tell_its_rate_plays_at_25(monkeypatch: pytest.MonkeyPatch, fps: float) -> None:
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    monkeypatch.setattr(Capture, "fps", fps)
    frames = list(Camera(str(CLIP)).frames(threading.Event()))
    assert len(frames) == 3
    assert frames[-1].captured_at - frames[0].captured_at >= 2 / 25


def test_file_that_had_to_wait_does_not_hurry_afterwards() -> None:
    """Only lower bounds of time, an interval below the exact ones: a slow machine cannot break them."""
    frames = Camera(str(CLIP)).frames(threading.Event())
    first = [next(frames).captured_at for _ in range(6)]
    assert first[-1] - first[0] >= 4 / 25
    time.sleep(0.5)
    afterwards = [next(frames).captured_at for _ in range(6)]
    frames.close()  # type: ignore[attr-defined]  # a generator
    assert afterwards[-1] - afterwards[0] >= 4 / 25


def test_stop_ends_the_wait_for_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    monkeypatch.setattr(Capture, "fps", 0.01)
    stop = threading.Event()
    frames = Camera(str(CLIP)).frames(stop)
    next(frames)
    threading.Timer(0.1, stop.set).start()
    before = time.monotonic()
    assert list(frames) == []
    assert time.monotonic() - before < 50


def test_still_image_is_one_frame(tmp_path: Path) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "still.png"), np.zeros((48, 64, 3), np.uint8))
    assert len(list(Camera(str(tmp_path / "still.png")).frames(threading.Event()))) == 1
