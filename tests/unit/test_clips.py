"""Clips: which frames of a camera a model of activity recognition gets, and in which requests."""

import itertools
import math
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import cast
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.buffer import ClipBuffer, new_buffer
from edge.cameras import Camera
from edge.client import TorchServeClient
from edge.clock import Sampler
from edge.frames import DropPolicy, Frame
from edge.responses import ModelInfo
from edge.timing import Timing
from tests.support.clock import Clock

A, B, C = Camera("0"), Camera("1"), Camera("2")
CAMERAS = (A, B, C)
INTERVAL_S = 1 / 15
PAUSE_S = 1.0


@dataclass
class Cameras:
    """Cameras that put frames into a clip buffer. Each has a clock of its own, in seconds."""

    clip_frames: int = 4
    policy: DropPolicy = "oldest"
    window: int = 1_000_000
    now: float = 0.0
    order: dict[Camera, int] = field(default_factory=lambda: defaultdict(int))
    time_s: dict[Camera, float] = field(default_factory=lambda: defaultdict(float))
    lost: set[tuple[Camera, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for camera in CAMERAS:
            camera.drop = self.policy
        self.stop = threading.Event()
        timing = Timing(batch_wait_s=PAUSE_S)
        self.buffer = ClipBuffer(self.clip_frames, CAMERAS, self.window, self.stop, timing)

    def put(self, camera: Camera, step_s: float = INTERVAL_S, is_late: bool = False) -> None:
        self.order[camera] += 1
        self.time_s[camera] += step_s
        jpeg = b"" if is_late else b"jpeg"
        frame = Frame(camera, 0, self.time_s[camera], jpeg, order=self.order[camera])
        if dropped := self.buffer.put(frame):
            self.lost.add((camera, dropped.frame.order))

    def rest(self) -> list[list[Frame]]:
        """Return the clips that are left when all cameras have ended."""
        for camera in CAMERAS:
            self.buffer.close(camera)
        clips = []
        while clip := self.buffer.get_batch(self.clip_frames):
            clips.append(clip)
        return clips


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(CAMERAS),
        st.sampled_from([INTERVAL_S] * 8 + [0.3, PAUSE_S, 1.1, 60.0, -5.0]),
        st.sampled_from(["put"] * 12 + ["late", "get", "release"]),
    ),
    max_size=120,
)


@given(EVENTS, st.integers(2, 5), st.integers(5, 40), st.sampled_from(["oldest", "newest"]))
def test_clips_never_mix_cameras_and_never_span_a_dropped_frame_or_a_pause(
    events: list[tuple[Camera, float, str]], clip_frames: int, window: int, policy: DropPolicy
) -> None:
    cameras = Cameras(clip_frames, policy, window)
    clips: list[list[Frame]] = []
    unreleased: dict[Camera, int] = defaultdict(int)
    for camera, step_s, event in events:
        if event in ("put", "late"):
            cameras.put(camera, step_s, event == "late")
        elif event == "get" and any(cameras.buffer._clip(each, clip_frames) for each in CAMERAS):
            clips.append(cameras.buffer.get_batch(clip_frames))
            assert clips[-1]
            unreleased[clips[-1][0].camera] += len(clips[-1])
        elif event == "release" and unreleased[camera]:
            cameras.buffer.release(camera)
            unreleased[camera] -= 1
        assert all(count <= window for count in unreleased.values())
    for camera, count in unreleased.items():
        for _ in range(count):
            cameras.buffer.release(camera)
    cameras.buffer._reorder_window = 1_000_000
    clips += cameras.rest()

    taken: dict[Camera, list[int]] = defaultdict(list)
    for clip in clips:
        assert 1 <= len(clip) <= clip_frames
        assert len({frame.camera for frame in clip}) == 1
        orders = [frame.order for frame in clip]
        assert orders == list(range(orders[0], orders[0] + len(orders))), "a frame between them was dropped"
        steps = [after.time_s - before.time_s for before, after in itertools.pairwise(clip)]
        assert all(0 <= step <= PAUSE_S for step in steps)
        taken[clip[0].camera] += orders
    for camera in CAMERAS:
        assert taken[camera] == sorted(taken[camera])
        dropped = [order for other, order in cameras.lost if other is camera]
        assert sorted(taken[camera] + dropped) == list(range(1, cameras.order[camera] + 1))


def test_a_whole_clip_is_taken_at_once_and_cameras_take_turns() -> None:
    cameras = Cameras(clip_frames=3, policy="none")
    for _ in range(3):
        cameras.put(A)
        cameras.put(B)
    clips = [cameras.buffer.get_batch(3) for _ in range(2)]
    assert [[(frame.camera, frame.order) for frame in clip] for clip in clips] == [
        [(A, 1), (A, 2), (A, 3)],
        [(B, 1), (B, 2), (B, 3)],
    ]


def test_after_a_dropped_frame_a_new_clip_begins() -> None:
    cameras = Cameras(clip_frames=4)
    cameras.put(A)
    cameras.put(A)
    cameras.put(A, is_late=True)
    cameras.put(A)
    assert [frame.order for frame in cameras.buffer.get_batch(4)] == [1, 2]
    assert [[frame.order for frame in clip] for clip in cameras.rest()] == [[4]]


def test_while_the_server_is_slow_the_clip_that_waits_is_the_newest() -> None:
    cameras = Cameras(clip_frames=4)
    for _ in range(11):
        cameras.put(A)
    assert [frame.order for frame in cameras.buffer.get_batch(4)] == [8, 9, 10, 11]


def test_an_incomplete_clip_is_sent_when_the_camera_pauses(clock: Clock) -> None:
    cameras = Cameras(clip_frames=4)
    cameras.put(A)
    cameras.put(A)
    clock.now = cameras.time_s[A] + PAUSE_S - 0.01
    assert cameras.buffer._clip(A, 4) == []
    clock.now = cameras.time_s[A] + PAUSE_S + 0.01
    assert [frame.order for frame in cameras.buffer.get_batch(4)] == [1, 2]


def test_a_file_that_waits_for_another_model_has_no_pause(clock: Clock) -> None:
    cameras = Cameras(clip_frames=4, policy="none")
    for number in range(1, 5):
        assert cameras.buffer._clip(A, 4) == []
        clock.now += 10.0
        frame = Frame(A, number, clock.now, b"jpeg", position_s=number * INTERVAL_S, order=number)
        assert cameras.buffer.put(frame) is None
    assert [frame.order for frame in cameras.buffer.get_batch(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("max_age_s", [0.1, 0.5, math.inf])
def test_an_age_limit_does_not_cut_clips(max_age_s: float) -> None:
    client = cast(
        TorchServeClient, Mock(frames_per_request=4, max_in_flight=4, info=ModelInfo(clip_frames=4, frame_rate=15.0))
    )
    A.drop = "none"
    buffer = new_buffer([A], client, max_age_s, threading.Event(), Timing())
    for number in range(1, 5):
        assert buffer.put(Frame(A, number, 0.2 * number, b"jpeg", order=number)) is None
    assert len(buffer.get_batch(4)) == 4


def test_a_clip_waits_for_room_in_the_reorder_window() -> None:
    cameras = Cameras(clip_frames=2, policy="none", window=2)
    cameras.put(A)
    cameras.put(A)
    assert len(cameras.buffer.get_batch(2)) == 2
    cameras.put(A)
    cameras.put(A)
    assert cameras.buffer._clip(A, 2) == []
    cameras.buffer.release(A)
    assert cameras.buffer._clip(A, 2) == []
    cameras.buffer.release(A)
    assert [frame.order for frame in cameras.buffer.get_batch(2)] == [3, 4]


def test_after_stop_the_rest_is_taken_without_waiting() -> None:
    cameras = Cameras(clip_frames=4, window=1)
    for camera in (A, A, B):
        cameras.put(camera)
    cameras.stop.set()
    clips = [cameras.buffer.get_batch(4) for _ in range(3)]
    assert [[frame.order for frame in clip] for clip in clips] == [[1, 2], [1], []]


@pytest.mark.parametrize("jitter_s", [0.0, 0.0005, 0.003])
@pytest.mark.parametrize(("fps", "steps"), [(60, {3, 4, 5}), (30, {2}), (25, {1, 2}), (20, {1, 2}), (15, {1})])
def test_frames_are_chosen_at_the_rate_of_the_clip(fps: float, steps: set[int], jitter_s: float) -> None:
    """Of a camera of a multiple of the rate always at the same interval, also if its frames are a little irregular."""
    sampler, chance = Sampler(INTERVAL_S), np.random.default_rng(5)
    times = [number / fps + jitter_s * chance.uniform(-1, 1) for number in range(round(60 * fps))]
    kept = [number for number, time_s in enumerate(times) if sampler.is_due(time_s)]
    assert len(kept) == pytest.approx(60 * min(fps, 15), abs=2)
    assert {after - before for before, after in itertools.pairwise(kept)} <= steps


def test_the_frames_of_25_a_second_that_are_chosen() -> None:
    sampler = Sampler(INTERVAL_S)
    assert [number for number in range(1, 12) if sampler.is_due((number - 1) / 25)] == [1, 3, 4, 6, 8, 9, 11]


def test_an_image_that_is_repeated_is_chosen_each_time() -> None:
    sampler = Sampler(INTERVAL_S)
    assert all(sampler.is_due(0.0) for _ in range(10))


def test_frames_are_chosen_again_when_a_file_is_repeated() -> None:
    sampler = Sampler(INTERVAL_S)
    times = [number / 30 for number in range(60)]
    assert [[sampler.is_due(time_s) for time_s in times].count(True) for _ in range(3)] == [30, 30, 30]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_very_short_file_that_is_repeated_is_chosen_in_each_pass(count: int) -> None:
    sampler = Sampler(INTERVAL_S)
    passes = [[sampler.is_due(number / 25) for number in range(count)] for _ in range(20)]
    assert all(any(chosen) for chosen in passes)


def test_an_age_limit_ends_the_wait_for_the_next_frame_of_a_clip(clock: Clock) -> None:
    info = ModelInfo(clip_frames=4, frame_rate=15.0)
    client = cast(TorchServeClient, Mock(frames_per_request=4, max_in_flight=4, info=info))
    A.drop = "oldest"
    buffer = new_buffer([A], client, 0.5, threading.Event(), Timing())
    assert buffer.put(Frame(A, 1, clock.now, b"jpeg", order=1)) is None
    clock.now += 0.26
    assert [frame.order for frame in buffer.get_batch(4)] == [1], "it has half of its time left"


def test_without_a_rate_all_frames_are_chosen() -> None:
    sampler = Sampler(0.0)
    assert all(sampler.is_due(time_s) for time_s in (5.0, 5.0, 5.1, 5.05, 0.0, 70.0))
