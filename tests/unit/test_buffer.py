"""edge/buffer.py: whatever the order of events, every frame comes out once, and in order."""

import threading
import time
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.buffer import Buffer, DropPolicy, InOrder
from edge.cameras import Camera, Frame
from edge.stats import Result

A, B, C = Camera("0"), Camera("1"), Camera("2")

PUT = st.tuples(st.just("put"), st.sampled_from([A, B, C]))
# What happens to a buffer, one after the other: a camera delivers, the sender takes, results come, a camera ends, all
# ends. Frames are the most of it, so that lanes do fill.
EVENTS = st.lists(
    st.one_of(
        PUT,
        PUT,
        PUT,
        PUT,
        st.tuples(st.just("take"), st.integers(1, 6)),
        st.tuples(st.just("delivered"), st.sampled_from([A, B, C])),
        st.tuples(st.just("close"), st.sampled_from([A, B, C])),
    ),
    max_size=80,
)


@given(EVENTS, st.integers(0, 80), st.integers(1, 3), st.integers(1, 6), st.sampled_from(["oldest", "newest"]))
def test_every_frame_comes_out_once_whatever_happens(
    events: list[tuple[str, Camera | int]], stop_at: int, size: int, lead: int, policy: DropPolicy
) -> None:
    stop = threading.Event()
    buffer = Buffer(size, dict.fromkeys([A, B, C], policy), stop, lead)
    put: dict[Camera, int] = defaultdict(int)
    taken: dict[Camera, list[int]] = defaultdict(list)
    gone: dict[Camera, list[int]] = defaultdict(list)
    delivered: dict[Camera, int] = defaultdict(int)
    open_cameras = {A, B, C}

    def waiting(camera: Camera) -> int:
        return put[camera] - len(taken[camera]) - len(gone[camera])

    def takable() -> int:
        ahead = {camera: len(taken[camera]) - delivered[camera] for camera in (A, B, C)}
        return sum(min(waiting(camera), 99 if stop.is_set() else lead - ahead[camera]) for camera in (A, B, C))

    for number, (event, value) in enumerate(events):
        if number == stop_at:
            stop.set()
        match event, value:
            case "put", Camera() as camera if camera in open_cameras:
                put[camera] += 1
                in_lane = waiting(camera) - 1
                dropped = buffer.put(Frame(camera, put[camera], 0.0, b""))
                assert (dropped is not None) == (in_lane >= size or stop.is_set())
                if dropped is not None:
                    is_newest = policy == "newest" or stop.is_set()
                    assert dropped.number == (put[camera] if is_newest else min(left(put, taken, gone, camera)))
                    gone[camera].append(dropped.number)
            case "take", int(count) if takable() >= count or stop.is_set():
                expected = min(count, takable())
                frames = buffer.take(count)
                assert len(frames) == expected
                for frame in frames:
                    taken[frame.camera].append(frame.number)
            case "delivered", Camera() as camera if delivered[camera] < len(taken[camera]):
                buffer.delivered(camera)
                delivered[camera] += 1
            case "close", Camera() as camera:
                buffer.close(camera)
                open_cameras.discard(camera)
    stop.set()
    while frames := buffer.take(4):
        for frame in frames:
            taken[frame.camera].append(frame.number)
    for camera in (A, B, C):
        assert taken[camera] == sorted(taken[camera])
        assert sorted(taken[camera] + gone[camera]) == list(range(1, put[camera] + 1))


@pytest.mark.parametrize(("policy", "kept"), [("oldest", [3, 4]), ("newest", [1, 2])])
def test_a_full_lane_drops_what_it_was_told_to(policy: DropPolicy, kept: list[int]) -> None:
    buffer = Buffer(2, {A: policy}, threading.Event())
    for number in range(1, 5):
        buffer.put(Frame(A, number, 0.0, b""))
    assert [frame.number for frame in buffer.take(2)] == kept


def test_a_camera_whose_results_do_not_come_waits_for_them() -> None:
    """Nor does it end before: what waits then is not all."""
    buffer = Buffer(9, {A: "none", B: "none"}, threading.Event(), lead=2, batch_wait_s=0.1)
    fill(buffer, A, 4)
    fill(buffer, B, 1)
    buffer.close(A)
    buffer.close(B)
    assert [(frame.camera.name, frame.number) for frame in buffer.take(5)] == [("0", 1), ("1", 1), ("0", 2)]
    threading.Timer(0.2, buffer.delivered, [A]).start()
    assert [frame.number for frame in buffer.take(5)] == [3]
    buffer.delivered(A)
    assert [frame.number for frame in buffer.take(5)] == [4]
    assert buffer.take(5) == []


def left(
    put: dict[Camera, int], taken: dict[Camera, list[int]], gone: dict[Camera, list[int]], camera: Camera
) -> set[int]:
    return set(range(1, put[camera] + 1)) - set(taken[camera]) - set(gone[camera])


@given(st.permutations(range(1, 12)))
def test_results_come_out_in_frame_order(numbers: list[int]) -> None:
    in_order = InOrder()
    out: list[int] = []
    for number in numbers:
        out += [result.frame.number for result in in_order.add(Result(Frame(A, number, 0.0, b""), "dropped"))]
        assert out == list(range(1, len(out) + 1))
    assert out == list(range(1, 12))


def fill(buffer: Buffer, camera: Camera, count: int) -> None:
    for number in range(1, count + 1):
        assert buffer.put(Frame(camera, number, 0.0, b"")) is None


def test_cameras_take_turns() -> None:
    buffer = Buffer(9, {A: "oldest", B: "oldest", C: "oldest"}, threading.Event())
    fill(buffer, A, 9)
    fill(buffer, B, 2)
    fill(buffer, C, 1)
    order = [frame.camera.name for _ in range(4) for frame in buffer.take(2)]
    assert order == ["0", "1", "2", "0", "1", "0", "0", "0"]


def test_a_file_waits_for_room() -> None:
    stop = threading.Event()
    buffer = Buffer(2, {A: "none"}, stop)
    fill(buffer, A, 2)
    outcome: list[Frame | None] = []
    thread = threading.Thread(target=lambda: outcome.append(buffer.put(Frame(A, 3, 0.0, b""))))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert [frame.number for frame in buffer.take(1)] == [1]
    thread.join(60)
    assert outcome == [None]
    assert [frame.number for frame in buffer.take(2)] == [2, 3]


@pytest.mark.parametrize("policy", ["none", "oldest"])
def test_stop_ends_every_wait(policy: DropPolicy) -> None:
    stop = threading.Event()
    buffer = Buffer(1, {A: policy, B: "none"}, stop)
    fill(buffer, B, 1)
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(buffer.put(Frame(B, 2, 0.0, b"")))),
        threading.Thread(target=lambda: results.append(len(buffer.take(5)))),
    ]
    for thread in threads:
        thread.start()
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(results) == 2


def test_an_incomplete_batch_does_not_wait_for_ever() -> None:
    buffer = Buffer(4, {A: "oldest", B: "oldest"}, threading.Event(), batch_wait_s=0.2)
    fill(buffer, A, 2)
    begin = time.monotonic()
    assert len(buffer.take(4)) == 2
    assert time.monotonic() - begin >= 0.2
    buffer.close(A)
    buffer.close(B)
    assert buffer.take(4) == []


def test_threads_that_put_and_take_at_once_lose_nothing() -> None:
    stop = threading.Event()
    buffer = Buffer(4, {A: "oldest", B: "newest", C: "none"}, stop)
    gone: list[tuple[str, int]] = []
    taken: list[tuple[str, int]] = []

    def produce(camera: Camera) -> None:
        dropped = [buffer.put(Frame(camera, number, 0.0, b"")) for number in range(1, 501)]
        gone.extend((camera.name, frame.number) for frame in dropped if frame is not None)
        buffer.close(camera)

    def consume() -> None:
        while frames := buffer.take(4):
            taken.extend((frame.camera.name, frame.number) for frame in frames)

    threads = [threading.Thread(target=produce, args=[camera]) for camera in (A, B, C)]
    threads.append(threading.Thread(target=consume))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(gone + taken) == sorted((name, number) for name in "012" for number in range(1, 501))
    assert not [name for name, _ in gone if name == "2"]
    for name in "012":
        numbers = [number for camera, number in taken if camera == name]
        assert numbers == sorted(numbers)
