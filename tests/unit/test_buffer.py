"""edge/buffer.py: in any order of events, every frame leaves the buffers once, and in frame order."""

import threading
import time
from collections import defaultdict
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.buffer import FrameBuffer, ReorderBuffer
from edge.cameras import Camera
from edge.frames import DropPolicy, Frame, Result
from edge.timing import Timing

A, B, C = Camera("0"), Camera("1"), Camera("2")
NO_LIMIT = 1_000_000

PUT = st.tuples(st.just("put"), st.sampled_from([A, B, C]))
# What happens to a buffer, one event after the other. Most of them are frames, so that the queues become full.
EVENTS = st.lists(
    st.one_of(
        PUT,
        PUT,
        PUT,
        PUT,
        st.tuples(st.just("get_batch"), st.integers(1, 6)),
        st.tuples(st.just("release"), st.sampled_from([A, B, C])),
        st.tuples(st.just("close"), st.sampled_from([A, B, C])),
    ),
    max_size=80,
)


def frame(camera: Camera, number: int) -> Frame:
    return Frame(camera, number, 0.0, b"jpeg", order=number)


def make_buffer(
    max_frames: int,
    policies: Mapping[Camera, DropPolicy],
    stop: threading.Event | None = None,
    reorder_window: int = NO_LIMIT,
    batch_wait_s: float = 1.0,
) -> FrameBuffer:
    timing = Timing(batch_wait_s=batch_wait_s)
    for camera, policy in policies.items():
        camera.drop = policy
    return FrameBuffer(max_frames, list(policies), reorder_window, stop or threading.Event(), timing)


def fill(buffer: FrameBuffer, camera: Camera, count: int) -> None:
    for number in range(1, count + 1):
        assert buffer.put(frame(camera, number)) is None


@given(EVENTS, st.integers(0, 80), st.integers(1, 3), st.integers(1, 6), st.sampled_from(["oldest", "newest"]))
def test_every_frame_leaves_the_buffer_once_in_any_order_of_events(
    events: list[tuple[str, Camera | int]], stop_at: int, max_frames: int, window: int, policy: DropPolicy
) -> None:
    stop = threading.Event()
    buffer = make_buffer(max_frames, dict.fromkeys([A, B, C], policy), stop, window)
    put: dict[Camera, int] = defaultdict(int)
    taken: dict[Camera, list[int]] = defaultdict(list)
    dropped: dict[Camera, list[int]] = defaultdict(list)
    released: dict[Camera, int] = defaultdict(int)
    open_cameras = {A, B, C}

    def waiting(camera: Camera) -> list[int]:
        return sorted(set(range(1, put[camera] + 1)) - set(taken[camera]) - set(dropped[camera]))

    def available() -> int:
        unreleased = {camera: len(taken[camera]) - released[camera] for camera in (A, B, C)}
        limits = {camera: NO_LIMIT if stop.is_set() else window - unreleased[camera] for camera in (A, B, C)}
        return sum(min(len(waiting(camera)), limits[camera]) for camera in (A, B, C))

    def may_grow() -> bool:
        return bool(open_cameras) or available() < sum(len(waiting(camera)) for camera in (A, B, C))

    for number, (event, value) in enumerate(events):
        if number == stop_at:
            stop.set()
        match event, value:
            case "put", Camera() as camera if camera in open_cameras:
                put[camera] += 1
                queue = waiting(camera)[:-1]
                lost = buffer.put(frame(camera, put[camera]))
                assert (lost is not None) == (len(queue) >= max_frames or stop.is_set())
                if lost is not None:
                    is_newest = policy == "newest" or stop.is_set()
                    assert lost.frame.number == (put[camera] if is_newest else queue[0])
                    dropped[camera].append(lost.frame.number)
            case "get_batch", int(count) if available() >= count or stop.is_set() or not may_grow():
                expected = min(count, available())
                frames = buffer.get_batch(count)
                assert len(frames) == expected
                for each in frames:
                    taken[each.camera].append(each.number)
            case "release", Camera() as camera if released[camera] < len(taken[camera]):
                buffer.release(camera)
                released[camera] += 1
            case "close", Camera() as camera:
                buffer.close(camera)
                open_cameras.discard(camera)
    stop.set()
    while frames := buffer.get_batch(4):
        for each in frames:
            taken[each.camera].append(each.number)
    for camera in (A, B, C):
        assert taken[camera] == sorted(taken[camera])
        assert sorted(taken[camera] + dropped[camera]) == list(range(1, put[camera] + 1))


@pytest.mark.parametrize(("policy", "kept"), [("oldest", [3, 4]), ("newest", [1, 2])])
def test_a_full_queue_drops_frames_by_its_policy(policy: DropPolicy, kept: list[int]) -> None:
    buffer = make_buffer(2, {A: policy})
    lost = [buffer.put(frame(A, number)) for number in range(1, 5)]
    assert [each.number for each in buffer.get_batch(2)] == kept
    assert [each.frame.number for each in lost if each is not None] == [n for n in range(1, 5) if n not in kept]


def test_a_camera_outside_its_reorder_window_waits_for_its_results() -> None:
    """Nor does it end before that: its queue still holds frames."""
    buffer = make_buffer(9, {A: "none", B: "none"}, reorder_window=2, batch_wait_s=0.1)
    fill(buffer, A, 4)
    fill(buffer, B, 1)
    buffer.close(A)
    buffer.close(B)
    assert [(each.camera.name, each.number) for each in buffer.get_batch(5)] == [("0", 1), ("1", 1), ("0", 2)]
    threading.Timer(0.2, buffer.release, [A]).start()
    assert [each.number for each in buffer.get_batch(5)] == [3]
    buffer.release(A)
    assert [each.number for each in buffer.get_batch(5)] == [4]
    assert buffer.get_batch(5) == []


def test_cameras_take_turns() -> None:
    buffer = make_buffer(9, {A: "oldest", B: "oldest", C: "oldest"})
    fill(buffer, A, 9)
    fill(buffer, B, 2)
    fill(buffer, C, 1)
    order = [each.camera.name for _ in range(4) for each in buffer.get_batch(2)]
    assert order == ["0", "1", "2", "0", "1", "0", "0", "0"]


def test_a_file_waits_while_its_queue_is_full() -> None:
    buffer = make_buffer(2, {A: "none"})
    fill(buffer, A, 2)
    dropped: list[Result | None] = []
    thread = threading.Thread(target=lambda: dropped.append(buffer.put(frame(A, 3))))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert [each.number for each in buffer.get_batch(1)] == [1]
    thread.join(60)
    assert dropped == [None]
    assert [each.number for each in buffer.get_batch(2)] == [2, 3]


@pytest.mark.parametrize("policy", ["none", "oldest"])
def test_stop_ends_every_wait(policy: DropPolicy) -> None:
    stop = threading.Event()
    buffer = make_buffer(1, {A: policy, B: "none"}, stop, batch_wait_s=600)
    fill(buffer, B, 1)
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(buffer.put(frame(B, 2)))),
        threading.Thread(target=lambda: results.append(len(buffer.get_batch(5)))),
    ]
    for thread in threads:
        thread.start()
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(results) == 2


@pytest.mark.parametrize("policy", ["none", "oldest", "newest"])
def test_after_stop_nothing_is_accepted_and_the_rest_is_taken_without_waiting(policy: DropPolicy) -> None:
    stop = threading.Event()
    buffer = make_buffer(3, {A: policy}, stop, reorder_window=1, batch_wait_s=600)
    fill(buffer, A, 3)
    stop.set()
    assert buffer.put(frame(A, 4)) == Result.not_sent(frame(A, 4), "dropped", "the run ended")
    assert [each.number for each in buffer.get_batch(2)] == [1, 2]
    assert [each.number for each in buffer.get_batch(2)] == [3]
    assert buffer.get_batch(2) == []


def test_an_incomplete_batch_waits_for_batch_wait_s() -> None:
    buffer = make_buffer(4, {A: "oldest", B: "oldest"}, batch_wait_s=0.2)
    fill(buffer, A, 2)
    begin = time.monotonic()
    assert len(buffer.get_batch(4)) == 2
    assert time.monotonic() - begin >= 0.2
    buffer.close(A)
    buffer.close(B)
    assert buffer.get_batch(4) == []


def test_an_incomplete_batch_does_not_wait_for_cameras_that_have_ended() -> None:
    buffer = make_buffer(4, {A: "oldest", B: "oldest"}, batch_wait_s=600)
    fill(buffer, A, 2)
    buffer.close(A)
    buffer.close(B)
    begin = time.monotonic()
    assert len(buffer.get_batch(4)) == 2
    assert time.monotonic() - begin < 300


def test_threads_that_put_and_get_at_once_lose_nothing() -> None:
    buffer = make_buffer(4, {A: "oldest", B: "newest", C: "none"}, reorder_window=5)
    dropped: list[tuple[str, int]] = []
    taken: list[tuple[str, int]] = []

    def produce(camera: Camera) -> None:
        lost = [buffer.put(frame(camera, number)) for number in range(1, 501)]
        dropped.extend((camera.name, each.frame.number) for each in lost if each is not None)
        buffer.close(camera)

    def consume() -> None:
        while frames := buffer.get_batch(4):
            taken.extend((each.camera.name, each.number) for each in frames)
            for each in frames:
                buffer.release(each.camera)

    threads = [threading.Thread(target=produce, args=[camera]) for camera in (A, B, C)]
    threads.append(threading.Thread(target=consume))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(dropped + taken) == sorted((name, number) for name in "012" for number in range(1, 501))
    assert not [name for name, _ in dropped if name == "2"]
    for name in "012":
        numbers = [number for camera, number in taken if camera == name]
        assert numbers == sorted(numbers)


@given(st.permutations(range(1, 12)))
def test_results_leave_the_reorder_buffer_in_frame_order(numbers: list[int]) -> None:
    """Each as soon as all before it are there."""
    reorder_buffer = ReorderBuffer()
    released: list[int] = []
    for count, number in enumerate(numbers, start=1):
        ready = reorder_buffer.add(Result(frame(A, number), "dropped"))
        released += [result.frame.number for result in ready]
        assert released == list(range(1, len(released) + 1))
        assert len(released) == next(n for n in range(12) if n + 1 not in numbers[:count])
    assert released == list(range(1, 12))
