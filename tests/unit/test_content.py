"""edge/content.py: a live camera that is frozen or black, and how often that is reported."""

import logging
import threading
from itertools import cycle, islice
from typing import Any

import cv2
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from edge.cameras import Camera
from edge.content import ContentCheck, is_black
from edge.frames import Frame, Stream
from edge.metrics import StatsCollector
from edge.stats import CameraStats
from edge.timing import Timing
from tests.support.frames import Pixels, jpeg
from tests.support.scenes import Sensor, background, with_light

CAMERA = Camera("rtsp://cam/live")
FPS = 5
SIZE = (120, 160)
SCENE = background(size=SIZE)
SENSOR = Sensor(2.0, size=SIZE)
STILL = SENSOR.photo(SCENE)
BLACK = np.full((*SIZE, 3), 16, np.uint8)


def changing() -> Pixels:
    return SENSOR.photo(SCENE)


class Watch:
    """Gives a check frames, 5 a second, and notes each change of the state with its time in seconds."""

    def __init__(self) -> None:
        self.check, self.number = ContentCheck("roof", Timing()), 0
        self.states: list[tuple[float, str]] = []

    def see(self, pixels: Pixels | None) -> None:
        self.number += 1
        now = self.number / FPS
        state = self.check.check(Frame(CAMERA, self.number, now, b"" if pixels is None else jpeg(pixels)), pixels)
        if not self.states or state != self.states[-1][1]:
            self.states.append((now, state))


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_camera_whose_frames_are_the_same_for_10_s_is_frozen(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        watch.see(changing())
    for _ in range(100):
        watch.see(STILL)
    for _ in range(20):
        watch.see(changing())
    assert watch.states == [(0.2, "live"), (14.2, "frozen"), (24.2, "live")]
    assert caplog.messages == [
        "roof: the camera is frozen, all its frames are the same for 10 s",
        "roof: the camera is live again after 20.0 s",
    ]


def test_still_scene_is_not_frozen(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    """A single grey level of one pixel is enough."""
    other = STILL.copy()
    other[60, 80] += 8
    for pixels in islice(cycle([STILL] * 45 + [other]), 500):
        watch.see(pixels)
    assert watch.states == [(0.2, "live")]
    assert caplog.messages == []


def test_small_frames_of_low_quality_are_not_frozen(watch: Watch) -> None:
    """Their JPEG has no noise: with --resize and --jpeg-quality a still scene has equal JPEGs."""
    for number in range(1, 100):
        assert watch.check.check(Frame(CAMERA, number, number / FPS, b"the same"), changing()) == "live"


def test_camera_of_few_frames_is_frozen_after_some_of_them(watch: Watch) -> None:
    """Two equal images of a snapshot that is requested every 10 seconds say little."""
    states = [watch.check.check(Frame(CAMERA, number, 10.0 * number, b"the same"), STILL) for number in range(8)]
    assert states == ["live"] * 4 + ["frozen"] * 4


def test_time_of_a_loss_does_not_count(watch: Watch) -> None:
    for number, pixels in enumerate([STILL, BLACK], start=1):
        first, back = (Frame(CAMERA, number, at, b"the same", is_first=at > 0) for at in (0.0, 60.0))
        for frame in [first] * 5 + [back] * 5:
            assert watch.check.check(frame, pixels) == "live"


@pytest.mark.parametrize("problem", ["frozen", "black"])
def test_camera_that_returns_as_it_was_lost_is_not_reported_as_live(
    problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    check, dark = ContentCheck("roof", Timing()), Sensor(6.0, size=SIZE)

    def state_at(second: int, is_good: bool = False) -> str:
        bad = dark.photo(np.full_like(SCENE, 8)) if problem == "black" else STILL
        pixels = changing() if is_good else bad
        return check.check(Frame(CAMERA, second, second, jpeg(pixels), is_first=second == 100), pixels)

    assert [state_at(second) for second in (*range(12), *range(100, 113))].count(problem) == 2 + 3
    assert len(caplog.messages) == 1
    assert state_at(114, is_good=True) == state_at(116, is_good=True) == "live"
    assert len(caplog.messages) == 2
    assert "live again" in caplog.messages[1]


def test_black_camera_is_reported_and_so_is_its_end(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    dark = Sensor(6.0, size=SIZE)
    for pixels in [changing() for _ in range(20)] + [dark.photo(np.full_like(SCENE, 8)) for _ in range(75)]:
        watch.see(pixels)
    watch.see(changing())
    assert [state for _, state in watch.states] == ["live", "black"]
    for _ in range(6):
        watch.see(changing())
    assert [state for _, state in watch.states] == ["live", "black", "live"]
    (first, second) = caplog.messages
    assert first == "roof: the camera is black, its frames are black for 10 s"
    assert second.startswith("roof: the camera is live again after 1")


def test_camera_without_a_signal_is_black_and_not_frozen(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    """Its frames are the same too: it is reported once."""
    for _ in range(13):
        watch.see(changing())
    for _ in range(300):
        watch.see(BLACK)
    assert [state for _, state in watch.states] == ["live", "black"]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("size", [(1080, 1920), (480, 640), (2, 2)])
def test_what_is_black(size: tuple[int, int]) -> None:
    covered = Sensor(8.0, size=size).photo(np.full((*size, 3), 4, np.float32))
    assert is_black(covered)
    assert is_black(np.full((*size, 3), 16, np.uint8))


@pytest.mark.parametrize("size", [(1080, 1920), (480, 640)])
def test_night_with_one_lamp_is_not_black(size: tuple[int, int]) -> None:
    night = Sensor(8.0, size=size).photo(np.full((*size, 3), 4, np.float32))
    cv2.circle(night, (size[1] // 3, size[0] // 3), size[0] // 60, (120, 200, 220), cv2.FILLED)
    assert not is_black(night)
    assert not is_black(Sensor(8.0).photo(with_light(background(), 0.2)))


def test_frames_that_are_read_too_late_say_nothing(watch: Watch) -> None:
    for number in range(120):
        watch.see(None if number % 2 else STILL)
    assert watch.states == [(0.2, "live"), (10.2, "frozen")]


def test_camera_that_freezes_again_and_again_does_not_fill_the_log(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    for pixels in islice(cycle([STILL] * 55 + [changing()]), 10 * 60 * FPS):  # 10 minutes
        watch.see(pixels)
    assert len(watch.states) > 90
    assert 10 <= len(caplog.messages) <= 20


class Device:
    """Stands in for cv2.VideoCapture: a device that always delivers the same image."""

    def __init__(self, *_: object) -> None:
        self.released = False

    def isOpened(self) -> bool:
        return True

    def get(self, what: int) -> float:
        return 30.0 if what == cv2.CAP_PROP_FPS else 0.0

    def grab(self) -> bool:
        return True

    def retrieve(self) -> tuple[bool, Any]:
        return True, STILL

    def read(self) -> tuple[bool, Any]:
        return True, STILL

    def release(self) -> None:
        self.released = True


def test_state_of_a_live_camera_is_in_the_metrics(monkeypatch: pytest.MonkeyPatch, stop: threading.Event) -> None:
    monkeypatch.setattr("cv2.VideoCapture", Device)
    camera = Camera("0", timing=Timing(frozen_s=0.05))
    registry = CollectorRegistry()
    registry.register(StatsCollector({Stream(camera, model): CameraStats() for model in ("a", "b")}))

    def states() -> dict[str, float]:
        return {
            sample.labels["state"]: sample.value
            for metric in registry.collect()
            if metric.name == "camera_state"
            for sample in metric.samples
        }

    others = dict.fromkeys(("live", "frozen", "black", "lost", "ended", "failed"), 0)
    assert states() == {"waiting": 1, **others}
    for _ in camera.frames(stop):
        if camera.state == "frozen":
            break
        assert states() == {"waiting": 0, **others, "live": 1}
    assert states() == {"waiting": 0, **others, "frozen": 1}
    assert generate_latest(registry)


def test_still_file_is_not_frozen(tmp_path: Any, stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    cv2.imwrite(str(tmp_path / "still.png"), BLACK)
    camera = Camera(str(tmp_path / "still.png"), fps=1000, loop=True, timing=Timing(frozen_s=0.01))
    with caplog.at_level(logging.WARNING):
        for frame in islice(camera.frames(stop), 100):
            assert camera.state == "live", frame
    assert caplog.messages == []
