"""Generated scenes of a camera that does not move: what should count as a change, and what should not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edge.cameras import Camera
from edge.changes import MIN_UNSENT_S, ChangeFilter, small_image
from edge.frames import Frame
from edge.responses import ModelInfo

Scene = npt.NDArray[np.float32]  # (height, width, 3), without noise
Pixels = npt.NDArray[np.uint8]

SIZE = (480, 640)


def background(seed: int = 0, size: tuple[int, int] = SIZE) -> Scene:
    """Return a room or a yard: surfaces with edges, and textures from coarse to fine."""
    random = np.random.default_rng(seed)
    height, width = size
    scene: Any = np.full((height, width, 3), 110, np.float32)
    for cells, contrast in ((4, 35), (12, 15), (60, 10), (height // 3, 8)):
        texture = random.normal(0, contrast, (cells, cells * width // height, 3)).astype(np.float32)
        scene += cv2.resize(texture, (width, height), interpolation=cv2.INTER_LINEAR)
    for _ in range(12):
        left, top = int(random.integers(width)), int(random.integers(height))
        right, bottom = left + int(random.integers(20, width // 3)), top + int(random.integers(20, height // 3))
        scene[top:bottom, left:right] += random.normal(0, 30)
    return np.asarray(np.clip(scene, 5, 250), np.float32)


def with_person(scene: Scene, left: float, share: float, contrast: float) -> Scene:
    """Return a scene with a person, three times as high as wide, who fills a share of the image.

    left: a share of the width. contrast: grey levels to what is behind the person, on the average.
    """
    height, width = scene.shape[:2]
    wide = max(2, round(float(np.sqrt(share * height * width / 3))))
    high = min(height - 2, 3 * wide)
    x, y = round(left * width), (height - high) // 2
    part = scene[y : y + high, max(0, x) : max(0, x + wide)]
    changed: Scene = scene.copy()
    if part.size:
        behind = float(part.mean())
        level = behind + (contrast if behind + contrast < 250 else -contrast)
        changed[y : y + high, max(0, x) : max(0, x + wide)] = level + 0.3 * (part - behind)
    return changed


def with_light(scene: Scene, gain: Any, offset: float = 0.0) -> Scene:
    """Return a scene in another light. gain: a number, or (height, width, 1)."""
    return np.asarray(np.clip(scene * gain + offset, 0, 255), np.float32)


def shadow(position: float, depth: float, size: tuple[int, int] = SIZE) -> Any:
    """Return the gain of a cloud's soft shadow, whose edge is as wide as half of the image."""
    columns = np.arange(size[1], dtype=np.float32) / size[1]
    return (1 - depth / (1 + np.exp(8 * (position - columns))))[None, :, None]


def flicker(phase: float, depth: float, bands: float, size: tuple[int, int] = SIZE) -> Any:
    """Return the gain of a lamp that flickers with the mains, seen line by line."""
    rows = np.arange(size[0], dtype=np.float32) / size[0]
    return (1 + depth * np.sin(2 * np.pi * (bands * rows + phase)))[:, None, None]


def walk(scene: Scene, share: float, contrast: float, step: float) -> list[Scene]:
    """Return the scenes of 13 s: nobody, a person who walks by, nobody, something that is left behind."""
    crossing = [with_person(scene, left, share, contrast) for left in np.arange(-0.1, 1.0, step)]
    left_behind = with_person(scene, 0.7, 0.012, contrast)
    return [scene] * 15 + crossing[:30] + [scene] * 10 + [left_behind] * 10


class Sensor:
    """Makes photos of scenes, with new noise in each. noise: its standard deviation in each pixel, in grey levels."""

    def __init__(self, noise: float, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
        self._random = np.random.default_rng(seed)
        self._noise = self._random.normal(0, noise, (*size, 3)).astype(np.float32)

    def photo(self, scene: Scene) -> Pixels:
        height, width = scene.shape[:2]
        # The same noise at another place is as good as new noise, and takes a tenth of the time.
        shift = (int(self._random.integers(height)), int(self._random.integers(width)))
        return np.asarray(np.clip(scene + np.roll(self._noise, shift, (0, 1)), 0, 255), np.uint8)


def as_jpeg(pixels: Pixels, quality: int) -> Pixels:
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


@dataclass
class Judgement:
    """How a filter decided about the frames of a camera.

    A frame had to be sent if its scene, without noise and light, differs from that of the last frame that was sent in
    more than twice the percentage asked for, and must not be sent if it does not differ at all. Whatever is in between
    counts for neither, nor do frames that are sent because 10 s have gone by.
    """

    wanted: int = 0
    found: int = 0  # of those that were wanted
    static: int = 0
    wrong: int = 0  # that were sent, though static

    @property
    def recall(self) -> float:
        return self.found / self.wanted if self.wanted else 1.0

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.wrong) if self.found + self.wrong else 1.0

    def __add__(self, other: Judgement) -> Judgement:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Judgement(*(one + another for one, another in pairs))


def judge(scenes: Sequence[Scene], photos: Iterable[Pixels], levels: float = 1, percent: float = 0.5) -> Judgement:
    """Return how edge/changes.py decides about photos of scenes, 5 a second.

    levels: pixels of scenes that differ by no more count as equal, where a scene is a photo with noise of its own.
    """
    camera, decided, judged = Camera("0"), ChangeFilter(percent, ModelInfo()), Judgement()
    sent, sent_at = None, 0.0
    for number, (scene, pixels) in enumerate(zip(scenes, photos, strict=True), start=1):
        now = number / 5
        is_sent = not decided.is_unchanged(Frame(camera, number, now, b"jpeg", small=small_image(pixels)))
        if sent is not None and now - sent_at < MIN_UNSENT_S:
            differs = 100 * float(np.mean(np.abs(scene - sent).max(axis=2) > levels))
            judged.wanted += differs > 2 * percent
            judged.found += differs > 2 * percent and is_sent
            judged.static += np.array_equal(scene, sent)
            judged.wrong += is_sent and np.array_equal(scene, sent)
        if is_sent:
            sent, sent_at = scene, now
    return judged
