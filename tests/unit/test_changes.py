"""edge/changes.py: what counts as a change, on generated scenes, and which frames of a stream are sent."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any

import cv2
import numpy as np
import pytest

from edge.cameras import Camera
from edge.changes import SMALL_PIXELS, ChangeFilter, changed_percent, small_image
from edge.frames import Frame, Outcome, Result
from edge.responses import ModelInfo
from tests.support.frames import Pixels
from tests.support.scenes import (
    Judgement,
    Scene,
    Sensor,
    as_jpeg,
    background,
    flicker,
    judge,
    shadow,
    walk,
    with_light,
    with_person,
)

DAY, DUSK, NIGHT = 3.0, 8.0, 15.0  # the noise of a pixel, in grey levels
SEEDS = range(4)
PERCENT = 0.5
SMALL_SIZE = (240, 320)  # of long sequences: a quarter of the work, and noise counts for more
CAMERA = Camera("rtsp://cam/live")


def percent(before: Pixels, now: Pixels) -> float:
    return changed_percent(small_image(before), small_image(now))


def changes(change: Callable[[Scene], Scene], noise: float = DAY) -> list[float]:
    """Return how much a change of a scene changes, of several scenes."""
    sensors = [Sensor(noise, seed) for seed in SEEDS]
    scenes = [background(seed) for seed in SEEDS]
    return [
        percent(sensor.photo(scene), sensor.photo(change(scene))) for sensor, scene in zip(sensors, scenes, strict=True)
    ]


@pytest.mark.parametrize("noise", [0.0, DAY, DUSK, NIGHT, 25.0])
@pytest.mark.parametrize("light", [1.0, 0.15])
def test_noise_is_no_change(noise: float, light: float) -> None:
    for seed in SEEDS:
        sensor, scene = Sensor(noise, seed), with_light(background(seed), light)
        assert percent(sensor.photo(scene), sensor.photo(scene)) < 0.05


@pytest.mark.parametrize("quality", [20, 50, 80, 95])
def test_compression_is_no_change(quality: int) -> None:
    for seed in SEEDS:
        sensor, scene = Sensor(DAY, seed), background(seed)
        clear, compressed = sensor.photo(scene), as_jpeg(sensor.photo(scene), quality)
        assert percent(clear, compressed) < PERCENT / 2
        assert percent(as_jpeg(sensor.photo(scene), quality), compressed) < 0.05


@pytest.mark.parametrize("gain", [0.85, 0.93, 1.07, 1.17])
@pytest.mark.parametrize("offset", [-8, 0, 8])
def test_slow_light_is_no_change(gain: float, offset: float) -> None:
    assert max(changes(lambda scene: with_light(scene, gain, offset))) < PERCENT


@pytest.mark.parametrize(("position", "depth"), list(product([0.2, 0.5, 0.8], [0.1, 0.2, 0.3])))
def test_shadow_of_a_cloud_is_no_change(position: float, depth: float) -> None:
    assert max(changes(lambda scene: with_light(scene, shadow(position, depth)))) < PERCENT


@pytest.mark.parametrize(("bands", "phase"), list(product([0.5, 1.0, 2.0, 3.0], [0.25, 0.5])))
def test_flicker_of_lamps_is_no_change(bands: float, phase: float) -> None:
    for seed in SEEDS:
        sensor, scene = Sensor(DAY, seed), background(seed)
        before, now = (with_light(scene, flicker(each, 0.1, bands)) for each in (0.0, phase))
        assert percent(sensor.photo(before), sensor.photo(now)) < PERCENT


def test_clock_on_the_image_is_no_change() -> None:
    """Two digits of a date and time that fills a third of the width."""
    photos = []
    for text in ("2026-11-26 14:31:59", "2026-11-26 14:32:00"):
        photo = Sensor(DAY).photo(background())
        cv2.putText(photo, text, (10, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 2)
        photos.append(photo)
    assert np.abs(photos[0].astype(int) - photos[1]).max() > 100
    assert percent(*photos) < PERCENT


@pytest.mark.parametrize(("share", "contrast"), list(product([0.0075, 0.01, 0.02, 0.05, 0.2], [25, 40, -40, 80])))
@pytest.mark.parametrize("noise", [DAY, DUSK, NIGHT])
def test_person_is_a_change(share: float, contrast: float, noise: float) -> None:
    least = PERCENT if share >= 0.01 or abs(contrast) > 25 else 0.3
    assert min(changes(lambda scene: with_person(scene, 0.4, share, contrast), noise)) > least


@pytest.mark.parametrize("gain", [0.8, 1.2])
def test_person_is_a_change_in_other_light(gain: float) -> None:
    assert min(changes(lambda scene: with_light(with_person(scene, 0.4, 0.01, 60), gain))) > PERCENT


@pytest.mark.parametrize("contrast", [-60, -30, 30, 60])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_object_that_fills_the_image_is_a_change(contrast: float, share: float) -> None:
    """An even surface, in front of an even wall as well: its edges are seen."""
    assert min(changes(lambda scene: with_person(scene, 0.02, share, contrast))) > PERCENT


def test_lamp_that_is_switched_on_and_another_scene_are_changes() -> None:
    lit = changes(lambda scene: with_light(with_light(scene, 0.5), 1.8))
    assert max(lit) < PERCENT  # the same light: 0.9
    assert (
        min(
            percent(Sensor(DAY).photo(with_light(background(seed), 0.5)), Sensor(DAY, 1).photo(background(seed)))
            for seed in SEEDS
        )
        > 10
    )
    assert min(changes(lambda _: background(99))) > 10


def judged(noise: float, contrasts: tuple[int, ...], change: Callable[[Pixels, int], Pixels]) -> Judgement:
    """Return what is decided about persons of several sizes, contrasts and speeds."""
    total = Judgement()
    for seed, (share, contrast, step) in enumerate(product([0.015, 0.06], contrasts, [0.01, 0.04])):
        scenes = walk(background(seed, SMALL_SIZE), share, contrast, step)
        sensor = Sensor(noise, seed, SMALL_SIZE)
        total += judge(scenes, [change(sensor.photo(each), number) for number, each in enumerate(scenes)])
    return total


@pytest.mark.parametrize(
    ("noise", "contrasts"), [(DAY, (30, -60)), (DUSK, (30, -60)), (NIGHT, (40, -60))], ids=["day", "dusk", "night"]
)
def test_precision_and_recall(noise: float, contrasts: tuple[int, ...]) -> None:
    """docs/cameras-and-outputs.md states them."""
    found = judged(noise, contrasts, lambda pixels, _: pixels)
    print(f"noise {noise:g}: precision {found.precision:.3f}, recall {found.recall:.3f}, {found}")
    assert found.wanted > 100
    assert found.static > 150
    assert found.precision >= 0.99
    assert found.recall >= 0.95


def test_precision_and_recall_in_changing_light_and_with_compression() -> None:
    def change(pixels: Pixels, number: int) -> Pixels:
        gain = (1 + 0.002 * number) * shadow(1.2 - number / 70, 0.2, SMALL_SIZE)
        gain = gain * flicker(0.37 * number, 0.04, 1.5, SMALL_SIZE)
        return as_jpeg(np.asarray(np.clip(pixels * gain, 0, 255), np.uint8), 70)

    found = judged(DAY, (30, -60), change)
    print(f"light: precision {found.precision:.3f}, recall {found.recall:.3f}, {found}")
    assert found.precision >= 0.99
    assert found.recall >= 0.95


@pytest.mark.parametrize(
    "shape", [(1, 1, 3), (2, 2, 3), (3, 200, 3), (64, 2, 3), (480, 640), (480, 640, 4), (721, 1283, 3), (1080, 1920, 3)]
)
def test_images_of_any_shape(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, shape).astype(np.uint8)
    small = small_image(pixels)
    assert small.dtype == np.float32
    assert small.size <= 1.5 * SMALL_PIXELS
    assert changed_percent(small, small) == 0
    dark, light = (small_image(np.full(shape, level, np.uint8)) for level in (20, 230))
    assert changed_percent(dark, light) == 100


def test_person_in_front_of_black_is_a_change() -> None:
    black = np.zeros((240, 320, 3), np.uint8)
    person = black.copy()
    person[100:160, 150:170] = 60
    assert percent(black, black) == 0
    assert percent(black, person) > PERCENT


def test_image_of_another_size_is_a_change() -> None:
    scene = background()
    assert changed_percent(small_image(scene.astype(np.uint8)), small_image(scene.astype(np.uint8)[:, :320])) == 100


def frame(number: int, level: int = 100, at: float | None = None, **fields: Any) -> Frame:
    """Return a frame of 5 a second of an even grey."""
    small = np.full((72, 128), level, np.float32)
    return Frame(CAMERA, number, number / 5 if at is None else at, b"jpeg", small=small, **fields)


def sent(filtered: ChangeFilter, frames: list[Frame]) -> list[int]:
    return [each.number for each in frames if not filtered.is_unchanged(each)]


def test_without_the_flag_every_frame_is_sent() -> None:
    assert sent(ChangeFilter(0.0, ModelInfo()), [frame(number) for number in range(1, 6)]) == [1, 2, 3, 4, 5]


def test_frame_is_compared_with_the_last_one_that_was_sent() -> None:
    """Not with the frame before it: many small steps are a large one."""
    levels = [100, 100, 100, 200, 200, 100, 100]
    assert sent(ChangeFilter(0.5, ModelInfo()), [frame(n, level) for n, level in enumerate(levels, start=1)]) == [
        1,
        4,
        6,
    ]
    slow = [frame(number, 50 + 5 * number) for number in range(1, 31)]
    assert 3 <= len(sent(ChangeFilter(0.5, ModelInfo()), slow)) <= 10


def test_one_frame_in_10_s_is_sent() -> None:
    """At times that differ from camera to camera."""
    found = [sent(ChangeFilter(0.5, ModelInfo()), [frame(number) for number in range(1, 501)]) for _ in range(20)]
    pauses_s = [pause / 5 for numbers in found for pause in np.diff(numbers)]
    assert 7 <= min(pauses_s) < 8 < 9 < max(pauses_s) <= 10
    assert len({numbers[1] for numbers in found}) > 5


def test_file_that_begins_anew_and_camera_that_is_back_are_sent() -> None:
    repeated = [frame(n, position_s=(n - 1) % 4 / 5) for n in range(1, 10)]
    assert sent(ChangeFilter(0.5, ModelInfo()), repeated) == [1, 5, 9]
    still = [frame(n, position_s=0.0) for n in range(1, 61)]
    assert len(sent(ChangeFilter(0.5, ModelInfo()), still)) == 2
    back = [frame(n, is_first=n in (1, 4)) for n in range(1, 7)]
    assert sent(ChangeFilter(0.5, ModelInfo()), back) == [1, 4]


def test_frame_that_was_read_too_late_is_not_compared() -> None:
    filtered = ChangeFilter(0.5, ModelInfo())
    late = Frame(CAMERA, 2, 0.4, b"")
    assert [filtered.is_unchanged(each) for each in (frame(1), late, frame(3))] == [False, False, True]
    filtered.record(Result.not_sent(late, "dropped", "read too late"))
    assert filtered.is_unchanged(frame(4))


@pytest.mark.parametrize("outcome", ["failed", "dropped", "expired"])
def test_frame_after_one_that_was_not_answered_is_sent(outcome: Outcome) -> None:
    filtered = ChangeFilter(0.5, ModelInfo())
    assert sent(filtered, [frame(1), frame(2)]) == [1]
    filtered.record(Result(frame(1), outcome, error="why"))
    assert sent(filtered, [frame(3), frame(4)]) == [3]
    # That of an earlier frame says nothing about the last one: else an overload would make every frame a change.
    filtered.record(Result(frame(1), outcome, error="why"))
    filtered.record(Result(frame(3), "answered", {}))
    filtered.record(Result(frame(4), "unchanged"))
    assert sent(filtered, [frame(5), frame(6)]) == []


def test_clips_are_whole() -> None:
    clips = ChangeFilter(0.5, ModelInfo(clip_frames=4))
    levels = [100] * 6 + [200, 100, 200, 100, 200] + [200] * 3
    frames = [frame(number, level) for number, level in enumerate(levels, start=1)]
    assert sent(clips, frames) == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14]
    assert sent(clips, [frame(number, 200) for number in range(15, 21)]) == []
    clips.record(Result(frame(13), "expired", error="why"))  # The clip is not whole.
    assert sent(clips, [frame(number, 200) for number in range(21, 27)]) == [21, 22, 23, 24]


@pytest.mark.parametrize("interval_s", [0.2, 1.0, 2.9, 3.4, 4.9, 6.0, 30.0])
def test_one_frame_in_10_s_is_sent_if_there_is_one(interval_s: float) -> None:
    still = [frame(number, at=interval_s * number) for number in range(200)]
    numbers = sent(ChangeFilter(0.5, ModelInfo()), still)
    gaps_s = [interval_s * (after - before) for before, after in pairwise(numbers)]
    assert max(gaps_s) <= max(10.0, interval_s) + 1e-6
    assert min(gaps_s) >= min(10.0 - interval_s, 7.0) or interval_s > 5


def test_file_that_is_played_slowly_sends_one_frame_in_10_s_too() -> None:
    still = [frame(number, at=6.67 * number, position_s=number / 25) for number in range(50)]
    numbers = sent(ChangeFilter(0.5, ModelInfo()), still)
    assert numbers == list(range(50))


def test_slow_camera_sends_whole_clips_too() -> None:
    """A clip takes longer than a still scene may be without a frame that is sent."""
    clips = ChangeFilter(0.5, ModelInfo(clip_frames=16))
    numbers = sent(clips, [frame(number, at=float(number)) for number in range(1, 61)])
    assert numbers[:16] == list(range(1, 17))
    assert 7 <= numbers[16] - 16 <= 10
    assert len(numbers) < 60


def test_results_are_recorded_while_frames_are_compared() -> None:
    filtered = ChangeFilter(0.5, ModelInfo())
    frames = [frame(number, at=0.0) for number in range(1, 3000)]

    def record_all() -> None:
        for each in frames:
            filtered.record(Result.failed(each, "why"))

    with ThreadPoolExecutor(1) as main:
        recorded = main.submit(record_all)
        numbers = sent(filtered, frames)
        recorded.result(timeout=60)
    filtered.record(Result.failed(frames[numbers[-1] - 1], "why"))
    assert sent(filtered, [frame(3000, at=0.0), frame(3001, at=0.0)]) == [3000]
