"""edge/view.py: which frame an image shows, what an image costs, and the figures."""

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge import view
from edge.cameras import Camera, State
from edge.content import PROBLEMS
from edge.drawing import MAX_AGE_S
from edge.frames import Frame, Result, Stream
from edge.session import ServerHealth
from edge.stats import CameraStats
from edge.timing import Timing
from edge.view import IMAGE_INTERVAL_S, MAX_LAG_S, WATCHED_S, CameraView, LiveView
from tests.support.clock import Clock
from tests.support.frames import jpeg
from tests.support.results import MODEL, dropped, result

POSE = "keypointrcnn-resnet50-fpn"
STEP_S = 1.25 * IMAGE_INTERVAL_S
Drawn = list[tuple[int, dict[str, int]]]  # the number of the frame, and those of the predictions


@pytest.fixture
def camera() -> Camera:
    return Camera("rtsp://cam/live")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What was drawn; the image is a different object each time."""
    calls: Drawn = []

    def draw(frame: Frame, latest: Mapping[str, Result]) -> bytes:
        calls.append((frame.number, {model: each.frame.number for model, each in latest.items()}))
        return b"image %d" % len(calls)

    monkeypatch.setattr(view, "draw_jpeg", draw)
    return calls


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def images(camera: Camera, executor: ThreadPoolExecutor) -> CameraView:
    return CameraView(camera, [MODEL, POSE], executor)


def capture(camera: Camera, number: int, at: float) -> None:
    """Have the camera read a frame, as Camera.frames() does."""
    camera.last_frame = Frame(camera, number, at, jpeg(np.full((48, 64, 3), 50, np.uint8)))


def test_of_the_images_only_the_latest_is_kept(camera: Camera, images: CameraView) -> None:
    for number in range(1, 4):
        for model in (MODEL, POSE):
            images.write(result(number, camera, model=model))
    assert all(each and not each.frame.jpeg for each in images.results.values())
    assert images._frame
    assert images._frame.number == 3


def test_nothing_is_drawn_without_viewers(camera: Camera, images: CameraView, drawn: Drawn, clock: Clock) -> None:
    assert not images.is_watched()
    for number in range(1, 100):
        capture(camera, number, clock.now)
        images.write(result(number, camera, at=clock.now).without_image())
        clock.now += 0.04
    assert drawn == []
    assert images.image() == b"image 1"
    assert images.is_watched()
    clock.now += WATCHED_S
    assert not images.is_watched()


def test_the_latest_frame_is_drawn_at_most_10_times_a_second_for_all_viewers_together(
    camera: Camera, images: CameraView, drawn: Drawn, clock: Clock
) -> None:
    begin = clock.now
    for number in range(1, 101):  # 4 s of a camera of 25 frames/s, and of three viewers
        capture(camera, number, clock.now)
        images.write(result(number, camera, at=clock.now))
        assert len({images.image() for _ in range(3)}) == 1
        clock.now += 0.04
    assert 0.9 * 10 * (clock.now - begin) - 10 < len(drawn) <= 10 * (clock.now - begin) + 1
    assert len(drawn) > 30
    numbers = [number for number, _ in drawn]
    assert numbers == sorted(set(numbers))
    assert [latest[MODEL] for _, latest in drawn] == numbers


def test_unchanged_frame_is_not_drawn_again(camera: Camera, images: CameraView, drawn: Drawn, clock: Clock) -> None:
    capture(camera, 1, clock.now)
    images.write(result(1, camera, at=clock.now))
    first = images.image()
    clock.now += STEP_S
    assert images.image() is first
    # The second model responds to the same frame.
    images.write(result(1, camera, at=clock.now, model=POSE))
    assert images.image() is not first
    assert drawn == [(1, {MODEL: 1}), (1, {MODEL: 1, POSE: 1})]


def test_frame_is_shown_when_the_first_model_has_responded(
    camera: Camera, images: CameraView, drawn: Drawn, clock: Clock
) -> None:
    for number, model in ((1, POSE), (1, MODEL), (2, MODEL), (3, MODEL), (2, POSE)):
        capture(camera, 4, clock.now)
        images.write(result(number, camera, at=clock.now, model=model))
        images.image()
        clock.now += STEP_S
    assert drawn == [
        (1, {POSE: 1}),
        (1, {MODEL: 1, POSE: 1}),
        (2, {MODEL: 2, POSE: 1}),
        (3, {MODEL: 3, POSE: 1}),
        (3, {MODEL: 3, POSE: 2}),
    ]


def test_late_responses_don_t_stop_the_image_and_it_never_goes_back(
    camera: Camera, images: CameraView, drawn: Drawn, clock: Clock
) -> None:
    """The server stops responding after frame 10, and is back, later, with frames that were captured before."""
    for number in range(1, 41):
        capture(camera, number, clock.now)
        if number <= 10:
            images.write(result(number, camera, at=clock.now))
        images.image()
        clock.now += STEP_S
    assert drawn[9] == (10, {MODEL: 10})
    # First MAX_AGE_S without a new image, then the frames that were read, with the last prediction.
    assert [number for number, _ in drawn[10:]] == list(range(11 + round(MAX_AGE_S / STEP_S), 41))
    assert {latest[MODEL] for _, latest in drawn[10:]} == {10}
    assert camera.last_frame
    for number in (39, 40, 41):
        images.write(result(number, camera, at=camera.last_frame.captured_at))
        images.image()
        clock.now += STEP_S
    assert [number for number, _ in drawn][-3:] == [40, 40, 41]


def test_failed_frame_is_shown_with_its_error(camera: Camera, images: CameraView, drawn: Drawn, live: LiveView) -> None:
    failed = Result.failed(result(1, camera).frame, "500 no worker")
    capture(camera, 1, 0.0)
    for each in (images, live):
        each.write(failed)
    assert images.image() == b"image 1"
    assert drawn == [(1, {MODEL: 1})]
    assert live.figures()["cameras"][0]["models"][0]["labels"] == ["failed: 500 no worker"]


def test_dropped_frames_change_nothing(camera: Camera, images: CameraView, drawn: Drawn, clock: Clock) -> None:
    assert images.image() == b""
    capture(camera, 2, clock.now)
    images.write(result(1, camera, at=clock.now))
    images.write(dropped(2, camera, at=clock.now))
    assert images.image() == b"image 1"
    assert drawn == [(1, {MODEL: 1})]


def test_slow_drawing_delays_only_those_who_watch(
    camera: Camera, images: CameraView, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def draw(*_: object) -> bytes:
        begun.set()
        assert may_end.wait(20)
        return b"image"

    monkeypatch.setattr(view, "draw_jpeg", draw)
    capture(camera, 1, 0.0)
    images.write(result(1, camera))
    viewer = threading.Thread(target=images.image)
    viewer.start()
    assert begun.wait(20)
    images.write(result(2, camera))  # The main thread does not wait.
    assert images.is_watched()
    may_end.set()
    viewer.join()


@pytest.fixture
def live(camera: Camera) -> Iterator[LiveView]:
    """Two cameras, and two models whose servers are in different states."""
    healths = {MODEL: ServerHealth("http://a:8080", Timing()), POSE: ServerHealth("http://b:8080", Timing())}
    clients: Any = [SimpleNamespace(model=model, health=health) for model, health in healths.items()]
    stats = {Stream(each, model): CameraStats() for each in (camera, Camera("0")) for model in healths}
    page = LiveView(stats, clients)
    yield page
    page.executor.shutdown()


def test_images_are_needed_only_of_the_camera_that_is_watched(camera: Camera, live: LiveView) -> None:
    other = next(each for each in live.cameras if each is not camera)
    live.cameras[camera].image()
    assert live.needs_images(camera)
    assert not live.needs_images(other)


def test_figures_are_json_with_the_summary_of_each_model(camera: Camera, live: LiveView, clock: Clock) -> None:
    counts = live._stats[Stream(camera, MODEL)]
    for number in range(1, 5):
        counts.captured += 1
        each = result(number, camera, at=clock.now) if number < 4 else dropped(number, camera, at=clock.now)
        counts.record(each)
        live.write(each)
    figures = json.loads(json.dumps(live.figures(), allow_nan=False))
    first, second = figures["cameras"]
    assert (first["name"], first["state"], second["name"]) == ("rtsp://cam/live", "waiting", "0")
    model, pose = first["models"]
    assert [model[name] for name in ("model", "captured", "answered", "dropped", "failed", "expired")] == [
        *(MODEL, 4, 3, 1, 0, 0)
    ]
    assert model["labels"] == ["cat 0.75", "dog 0.25"]
    assert model["causes"] == [["dropped", "buffer full", 1]]
    assert model["p50_ms"] == pytest.approx(100)
    assert model["last_minute"]["seconds"][-1] == [100, 100]
    assert (pose["answered"], pose["p50_ms"], pose["batch"], pose["last_minute"]["p50_ms"]) == (0, None, None, None)


def test_camera_is_slow_while_the_server_is_silent(camera: Camera, live: LiveView, clock: Clock) -> None:
    """Its frames are in flight and in buffers: they are counted as dropped only later."""
    counts = live._stats[Stream(camera, MODEL)]
    camera.state = "live"
    for number in range(1, 101):  # 10 s of 10 frames a second
        counts.captured += 1
        capture(camera, number, clock.now)
        if number <= 20:
            each = result(number, camera, at=clock.now)
            counts.record(each)
            live.write(each)
        figures = live.figures()["cameras"][0]
        lag_s = max(0.0, (number - 20) / 10)
        assert figures["state"] == ("slow" if lag_s > MAX_LAG_S + 0.01 else "live")
        assert figures["models"][0]["waiting"] == max(0, number - 20)
        clock.now += 0.1


def test_predictions_hold_while_the_frames_are_unchanged(
    camera: Camera, live: LiveView, drawn: Drawn, clock: Clock
) -> None:
    """The image is that of the camera, and the predictions do not age."""
    counts = live._stats[Stream(camera, MODEL)]
    camera.state = "live"
    for number in range(1, 101):  # 12 s of 8 frames a second
        counts.captured += 1
        capture(camera, number, clock.now)
        answered = result(number, camera, at=clock.now)
        each = answered if number == 1 else Result.not_sent(answered.frame, "unchanged")
        counts.record(each)
        live.write(each)
        live.cameras[camera].image()
        clock.now += STEP_S
    figures = live.figures()["cameras"][0]
    assert (figures["state"], figures["models"][0]["labels"]) == ("live", ["cat 0.75", "dog 0.25"])
    assert figures["models"][0]["lag_s"] == 0.0
    assert figures["models"][0]["unchanged"] == 99
    assert drawn[-1] == (100, {MODEL: 100})


@pytest.mark.parametrize("state", ["frozen", "black"])
def test_camera_that_shows_nothing_says_so(camera: Camera, live: LiveView, state: State) -> None:
    camera.state, camera.problem = state, "the reason of an earlier loss"
    figures = live.figures()["cameras"][0]
    assert (figures["state"], figures["problem"]) == (state, PROBLEMS[state])


def test_camera_of_few_frames_is_not_slow(camera: Camera, live: LiveView, clock: Clock) -> None:
    counts = live._stats[Stream(camera, MODEL)]
    camera.state = "live"
    for number in range(1, 5):
        counts.captured += 1
        capture(camera, number, clock.now)
        assert live.figures()["cameras"][0]["state"] == "live"
        each = result(number, camera, at=clock.now)
        counts.record(each)
        live.write(each)
        clock.now += 4.5


@pytest.mark.parametrize(("fps", "age_s", "expected"), [(None, 4, "live"), (None, 6, "stalled"), (0.1, 29, "live")])
def test_source_without_frames_is_stalled(clock: Clock, fps: float | None, age_s: float, expected: str) -> None:
    camera = Camera("0", fps)
    client: Any = SimpleNamespace(model=MODEL, health=ServerHealth("http://a:8080", Timing()))
    view = LiveView({Stream(camera, MODEL): CameraStats()}, [client])
    camera.state = "live"
    capture(camera, 1, clock.now)
    clock.now += age_s
    found = view.figures()["cameras"][0]
    assert (found["state"], found["frame_age_s"]) == (expected, age_s)


def test_lost_camera_has_its_cause(camera: Camera, live: LiveView) -> None:
    camera.problem = "connection refused"
    assert live.figures()["cameras"][0]["problem"] == ""
    camera.state = "lost"
    assert live.figures()["cameras"][0]["problem"] == "connection refused"


@pytest.mark.parametrize(
    ("state", "dropped_frames", "expected"),
    [("live", 0, "live"), ("live", 2, "live"), ("live", 3, "slow"), ("lost", 3, "lost"), ("ended", 3, "ended")],
)
def test_camera_is_slow_if_a_tenth_of_its_frames_is_lost(
    camera: Camera, live: LiveView, clock: Clock, state: Any, dropped_frames: int, expected: str
) -> None:
    camera.state = state
    for number in range(1, 26):
        live.write(dropped(number, camera) if number <= dropped_frames else result(number, camera))
    assert live.figures()["cameras"][0]["state"] == expected
    clock.now += 11
    live.write(result(26, camera))
    assert live.figures()["cameras"][0]["state"] == ("live" if state == "live" else expected)


def test_age_of_the_last_frame_tells_since_when_a_camera_is_lost(camera: Camera, live: LiveView, clock: Clock) -> None:
    camera.state = "lost"
    assert live.figures()["cameras"][0]["frame_age_s"] is None
    capture(camera, 1, clock.now)
    clock.now += 12.5
    assert live.figures()["cameras"][0]["frame_age_s"] == 12.5


def test_server_of_each_model_has_its_own_state(live: LiveView, clock: Clock) -> None:
    good, bad = (client.health for client in live._clients)
    assert [each["state"] for each in live.figures()["servers"]] == ["waiting", "waiting"]
    good.record_success()
    bad.record_failure("connection refused")
    clock.now += 5
    bad.record_failure("connection refused")
    assert live.figures()["servers"] == [
        {"model": MODEL, "url": "http://a:8080", "state": "responding"},
        {
            "model": POSE,
            "url": "http://b:8080",
            "state": "not responding",
            "down_for_s": 5.0,
            "error": "connection refused",
        },
    ]
    bad.record_success()
    assert [each["state"] for each in live.figures()["servers"]] == ["responding", "responding"]
