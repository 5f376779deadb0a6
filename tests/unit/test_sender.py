"""request.py: which frames are sent, which results the others get, and the order in which results are written."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import pytest

from edge.cameras import Camera
from edge.client import TorchServeClient
from edge.errors import SourceError
from edge.frames import Frame, Result, Stream
from edge.options import Options, parse_args
from edge.outputs import Output, Outputs
from edge.responses import ModelInfo
from edge.session import ServerHealth
from edge.stats import CameraStats
from edge.timing import Timing
from request import Pipeline
from tests.support.results import MODEL

NOW = 100.0
AGES_S = (0.5, 0.31, 0.3, 0.29, 0.0, 0.31)


class AgedFrames(Camera):
    """A camera whose frames have been read some time ago."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:  # noqa: ARG002
        for number, age_s in enumerate(AGES_S, start=1):
            yield Frame(self, number, NOW - age_s, b"jpeg")


class Client:
    """Stands in for TorchServeClient: remembers the numbers of the frames of each request."""

    def __init__(self, frames_per_request: int = 1, max_in_flight: int = 16, info: ModelInfo | None = None) -> None:
        self.model, self.info = MODEL, info or ModelInfo()
        self.frames_per_request, self.max_in_flight = frames_per_request, max_in_flight
        self.requests: list[list[int]] = []
        self.is_drained = False
        self.error: Exception | None = None

    def wait_for_slot(self) -> None:
        if self.error:
            raise self.error

    def submit(self, frames: list[Frame], _: Callable[[Result], None]) -> None:
        assert all(frame.jpeg for frame in frames)
        self.requests.append([frame.number for frame in frames])

    def drain(self) -> None:
        self.is_drained = True


def new_pipeline(
    cameras: Sequence[Camera], client: Client, options: Options, stop: threading.Event, timing: Timing
) -> Pipeline:
    stats = {Stream(camera, MODEL): CameraStats() for camera in cameras}
    return Pipeline(stats, [cast(TorchServeClient, client)], options, stop, timing)


def send(client: Client, stop: threading.Event, *flags: str) -> list[tuple[int, str, str | None]]:
    """Read and send the frames of AGES_S; return the number, outcome and error of those that were not sent."""
    camera = AgedFrames("0", drop="none")
    options = parse_args(list(flags))
    pipeline = new_pipeline([camera], client, options, stop, Timing())
    reader = threading.Thread(target=pipeline.read_frames, args=[camera])
    reader.start()
    try:
        pipeline.send_frames(pipeline.clients[MODEL])
    finally:
        stop.set()
        reader.join(60)
        assert not reader.is_alive()
        results = [pipeline.results.get() for _ in range(pipeline.results.qsize())]
    assert pipeline.stats[Stream(camera, MODEL)].captured == len(AGES_S)
    assert all(isinstance(result, Result) and result.frame.jpeg == b"" for result in results)
    return [(each.frame.number, each.outcome, each.error) for each in cast(list[Result], results)]


@pytest.mark.parametrize(
    ("frames_per_request", "requests"),
    [(1, [[3], [4], [5]]), (3, [[3], [4, 5]]), (6, [[3, 4, 5]])],
)
def test_a_frame_is_sent_unless_it_is_older_than_the_age_limit(
    monkeypatch: pytest.MonkeyPatch, stop: threading.Event, frames_per_request: int, requests: list[list[int]]
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: NOW)
    client = Client(frames_per_request)
    not_sent = send(client, stop, "--max-age", "300.1")
    assert client.requests == requests
    assert not_sent == [(number, "expired", "older than 300.1 ms") for number in (1, 2, 6)]
    assert client.is_drained


def test_without_an_age_limit_every_frame_is_sent(monkeypatch: pytest.MonkeyPatch, stop: threading.Event) -> None:
    monkeypatch.setattr("time.monotonic", lambda: NOW)
    client = Client()
    assert send(client, stop) == []
    assert client.requests == [[1], [2], [3], [4], [5], [6]]


def test_after_stop_no_frame_is_sent_and_each_is_counted(stop: threading.Event) -> None:
    stop.set()
    client = Client()
    assert sorted(send(client, stop)) == [(number, "dropped", "the run ended") for number in range(1, 7)]
    assert client.requests == []
    assert client.is_drained


def test_frame_that_was_read_too_late_is_dropped(stop: threading.Event) -> None:
    class LateFrames(Camera):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:  # noqa: ARG002
            yield from (Frame(self, number, NOW, b"jpeg" if number == 2 else b"") for number in (1, 2, 3))

    camera = LateFrames("0")
    pipeline = new_pipeline([camera], Client(), parse_args([]), stop, Timing())
    pipeline.read_frames(camera)
    results = [pipeline.results.get() for _ in range(pipeline.results.qsize())]
    frames = [Frame(camera, number, NOW, b"", None, MODEL, number) for number in (1, 3)]
    expected = [Result.not_sent(frame, "dropped", "read too late") for frame in frames]
    assert results == expected
    assert pipeline.stats[Stream(camera, MODEL)].captured == 3


def test_frames_that_wait_when_the_run_is_stopped_are_not_sent(stop: threading.Event) -> None:
    camera, client = AgedFrames("0"), Client()
    pipeline = new_pipeline([camera], client, parse_args([]), stop, Timing())
    for number in range(1, 5):
        assert pipeline.buffers[MODEL].put(Frame(camera, number, 0.0, b"jpeg")) is None
    stop.set()
    pipeline.send_frames(pipeline.clients[MODEL])
    results = [pipeline.results.get() for _ in range(pipeline.results.qsize())]
    expected = [Result.not_sent(Frame(camera, number, 0.0, b""), "dropped", "the run ended") for number in range(1, 5)]
    assert results == expected
    assert client.requests == []


def test_incomplete_batch_waits_for_half_of_the_age_limit_at_most(stop: threading.Event) -> None:
    """Its first frame would expire. With the batch_wait_s of this test it would wait for longer than the test may."""
    camera = Camera("0")
    options = parse_args(["--client-batching", "--max-age", "200"])
    pipeline = new_pipeline([camera], Client(4), options, stop, Timing(batch_wait_s=3600.0))
    frame = Frame(camera, 1, NOW, b"jpeg")
    pipeline.buffers[MODEL].put(frame)
    assert pipeline.buffers[MODEL].get_batch(4) == [frame]


def test_requests_in_flight_are_drained_when_the_sender_fails(stop: threading.Event) -> None:
    client = Client()
    client.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        send(client, stop)
    assert client.is_drained


class UnorderedClient(Client):
    """Responds to three requests at a time, the latest first, and to every tenth frame with an error."""

    def __init__(self, max_in_flight: int = 16) -> None:
        super().__init__(max_in_flight=max_in_flight)
        self.health = ServerHealth("http://server", Timing())
        self.in_flight: list[tuple[Frame, Callable[[Result], None]]] = []

    def submit(self, frames: list[Frame], on_result: Callable[[Result], None]) -> None:
        self.in_flight += [(frame, on_result) for frame in frames]
        if len(self.in_flight) >= 3:
            self.drain()

    def drain(self) -> None:
        while self.in_flight:
            frame, on_result = self.in_flight.pop()
            is_error = frame.number % 10 == 0
            on_result(Result.failed(frame, "503") if is_error else Result(frame, "answered", {"cat": 1.0}, None, 0.1))


class ManyFrames(Camera):
    """A camera of 200 frames."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:  # noqa: ARG002
        for number in range(1, 201):
            yield Frame(self, number, NOW, b"jpeg")


class Missing(Camera):
    """A file that can't be read."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:  # noqa: ARG002
        raise SourceError("no such file")


class Recorder(Output):
    """Remembers the results."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def write(self, result: Result) -> None:
        self.results.append(result)


@pytest.mark.timeout(120)
def test_results_are_written_once_and_in_frame_order_in_whatever_order_responses_arrive(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, stop: threading.Event
) -> None:
    """With 200 frames in a reorder window of 4, this also proves that results make room for other frames."""
    cameras = [ManyFrames("a.mp4"), ManyFrames("b.mp4")]
    pipeline = new_pipeline(
        [*cameras], UnorderedClient(max_in_flight=1), parse_args([]), stop, Timing(batch_wait_s=0.01)
    )
    recorder = Recorder()
    assert pipeline.run(Outputs([recorder], stop)) == 1  # Frames have failed.
    for camera in cameras:
        results = [result for result in recorder.results if result.frame.camera is camera]
        assert [result.frame.number for result in results] == list(range(1, 201))
        stats = pipeline.stats[Stream(camera, MODEL)]
        assert (stats.captured, stats.outcomes) == (200, {"answered": 180, "failed": 20})
    assert sorted(caplog.messages) == ["a.mp4: frame 10 failed: 503", "b.mp4: frame 10 failed: 503"]
    assert capsys.readouterr().err.startswith("camera  model      captured  answered  failed")


@pytest.mark.timeout(120)
def test_a_source_that_cannot_be_read_is_reported_once_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, stop: threading.Event
) -> None:
    cameras = [Missing("x.mp4"), ManyFrames("a.mp4")]
    pipeline = new_pipeline(cameras, UnorderedClient(), parse_args([]), stop, Timing())
    recorder = Recorder()
    assert pipeline.run(Outputs([recorder], stop)) == SourceError.exit_code == 3
    assert caplog.messages.count("no such file") == 1
    assert [result.frame.number for result in recorder.results] == list(range(1, 201))
    assert "a.mp4" in capsys.readouterr().err


class Responding(Client):
    """A client whose server answers at once."""

    def submit(self, frames: list[Frame], on_result: Callable[[Result], None]) -> None:
        super().submit(frames, on_result)
        for frame in frames:
            on_result(Result(frame, "answered", {}, latency_s=0.0))


class Scenes(Camera):
    """A camera of 5 frames a second whose even grey changes with every tenth frame."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:  # noqa: ARG002
        for number in range(1, 101):
            small = np.full((72, 128), 100 + 100 * (number // 10 % 2), np.float32)
            yield Frame(self, number, 0.0, b"jpeg", position_s=number / 5, small=small)


@pytest.mark.parametrize(("clip_frames", "sent_frames"), [(1, 11), (4, 41)])
def test_unchanged_frames_take_no_place_and_have_their_outcome(
    monkeypatch: pytest.MonkeyPatch, stop: threading.Event, clip_frames: int, sent_frames: int
) -> None:
    """Also with a reorder window that is smaller than the number of unchanged frames."""
    camera = Scenes("0", drop="none")
    client = Responding(clip_frames, max_in_flight=1, info=ModelInfo(clip_frames=clip_frames))
    pipeline = new_pipeline([camera], client, parse_args(["--skip-static"]), stop, Timing())
    written: list[Result] = []
    output = Output()
    monkeypatch.setattr(output, "write", written.append)
    assert pipeline.run(Outputs([output], stop)) == 0
    assert [each.frame.number for each in written] == list(range(1, 101))
    numbers = [each.frame.number for each in written if each.outcome == "answered"]
    assert len(numbers) == sent_frames
    assert {1, *range(10, 101, 10)} <= set(numbers)
    assert [number for request in client.requests for number in request] == numbers
    if clip_frames > 1:
        assert all(request == list(range(request[0], request[0] + clip_frames)) for request in client.requests[:-1])
    counts = pipeline.stats[Stream(camera, MODEL)]
    assert counts.captured == counts.outcomes["answered"] + counts.outcomes["unchanged"] == 100
    assert not counts.causes
    assert all(each.frame.small is None for each in written)
