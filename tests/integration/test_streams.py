"""edge/live.py with network streams that are cut, stall, never respond, or change."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import pytest

from demo.node import free_ports
from edge.cameras import Camera
from edge.errors import SourceError
from edge.frames import Frame
from edge.timing import Timing
from tests.support.frames import jpeg
from tests.support.mjpeg_camera import MjpegCamera, mjpeg_camera
from tests.support.scripts import wait_until


def jpegs(count: int, size: tuple[int, int] = (48, 64)) -> list[bytes]:
    """Return JPEG frames, height x width, each brighter than the one before."""
    return [jpeg(np.full((*size, 3), 10 * number, np.uint8)) for number in range(count)]


def size(frame: Frame) -> tuple[int, int]:
    """Return a frame's height and width."""
    image = cv2.imdecode(np.frombuffer(frame.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image.shape[0], image.shape[1]


def stream_again(server: MjpegCamera, caplog: pytest.LogCaptureFixture) -> None:
    """Have a camera stream again as soon as it was reported as lost, or as not there."""

    def wait_and_stream() -> None:
        wait_until(lambda: caplog.messages != [])
        server.mode = "streaming"

    threading.Thread(target=wait_and_stream, daemon=True).start()


def test_camera_that_never_responds_does_not_delay_a_file_that_is_repeated(
    short_clip: Path, stop: threading.Event
) -> None:
    """By default OpenCV opens one source at a time. 30 frames take 0.3 s, and OpenCV waits 10 s for the camera."""
    with mjpeg_camera(jpegs(1)) as mute:
        mute.mode = "mute"
        frames = Camera(str(short_clip), loop=True).frames(stop)
        next(frames)
        thread = threading.Thread(target=lambda: list(Camera(mute.url).frames(stop)))
        thread.start()
        wait_until(lambda: mute.asked > 0)
        begin = time.monotonic()
        repeated = [next(frames) for _ in range(30)]
        assert repeated[-1].captured_at - begin < 0.8 * Timing().camera_open_s
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def test_stream_that_is_cut_goes_on_when_it_is_back(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with mjpeg_camera(jpegs(20)) as server:
        camera = Camera(server.url.replace("http://", "http://admin:hunter2@") + "?user=admin&pwd=hunter2&channel=1")
        assert camera.is_live
        frames = camera.frames(stop)
        before = [next(frames) for _ in range(5)]
        server.mode = "cut"
        stream_again(server, caplog)
        after = [next(frames) for _ in range(60)]  # more than were in flight when the stream was cut
        assert [frame.number for frame in before + after] == list(range(1, 66))
        assert server.streams == 2
        name = f"http://127.0.0.1:{server.server_port}/live?user=***&pwd=***&channel=1"
        assert camera.name == name
    lost, back = caplog.messages
    assert lost == f"{name}: the camera is lost, no more frames come; trying until it is back"
    assert back.startswith(f"{name}: the camera is back after ")
    assert "hunter2" not in caplog.text


def test_stream_that_stalls_is_opened_again(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with mjpeg_camera(jpegs(20)) as server:
        frames = Camera(server.url, timing=Timing(stall_s=0.5)).frames(stop)
        next(frames)
        server.mode, stalled_at = "stalled", time.time()
        stream_again(server, caplog)
        seen = 0
        while server.streams < 2 or len(caplog.messages) < 2:
            next(frames)
            seen += 1
            assert seen < 1000
    assert "is back" in caplog.messages[1]
    assert caplog.records[0].created - stalled_at < 20, "40 times the timeout"


def test_stream_that_never_responds_times_out_and_is_opened_again(
    stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    timing = Timing(camera_open_s=0.5)
    with mjpeg_camera(jpegs(20)) as server:
        server.mode = "mute"
        stream_again(server, caplog)
        assert next(Camera(server.url, timing=timing).frames(stop)).number == 1
        assert "can't open" in caplog.messages[0]
        server.mode = "mute"
        with pytest.raises(SourceError, match="can't open"):
            Camera(server.url, timing=timing).check()


def test_cameras_that_never_respond_do_not_make_another_one_fail(
    stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """By default OpenCV opens one at a time while the timeout runs: one that waits for three others would exceed it."""
    timing = Timing(camera_open_s=1.5)
    with ExitStack() as cleanup:
        mute = [cleanup.enter_context(mjpeg_camera(jpegs(1))) for _ in range(3)]
        well = cleanup.enter_context(mjpeg_camera(jpegs(20), fps=100))
        threads = []
        for camera in mute:
            camera.mode = "mute"
            blocked = Camera(camera.url, timing=timing)
            threads.append(threading.Thread(target=lambda blocked=blocked: list(blocked.frames(stop))))
            threads[-1].start()
        wait_until(lambda: any(camera.asked for camera in mute))
        assert next(Camera(well.url, timing=timing).frames(stop)).number == 1
        stop.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert [message for message in caplog.messages if well.url in message] == []


def test_stream_may_be_absent_at_the_start(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    frames = Camera(f"http://127.0.0.1:{port}/live").frames(stop)
    arrived: list[Frame] = []
    thread = threading.Thread(target=lambda: arrived.append(next(frames)))
    thread.start()
    wait_until(lambda: caplog.messages != [])
    assert not arrived
    with mjpeg_camera(jpegs(20), port=port):
        thread.join(60)
        assert [frame.number for frame in arrived] == [1]
    assert ["is not there" in caplog.messages[0], "is back" in caplog.messages[1]] == [True, True]


def test_stream_may_change_its_resolution(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with mjpeg_camera(jpegs(5, (48, 64)) + jpegs(5, (96, 128))) as server:
        frames = Camera(server.url).frames(stop)
        assert [next(frames).number for _ in range(30)] == list(range(1, 31))
        server.frames = jpegs(10, (96, 128))
        server.mode = "cut"
        stream_again(server, caplog)
        for frame in frames:
            if size(frame) == (96, 128):
                break
            assert frame.number < 200


def test_stream_that_slows_down_is_not_lost(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with mjpeg_camera(jpegs(20)) as server:
        frames = Camera(server.url).frames(stop)
        next(frames)
        server.fps = 1
        slow = [next(frames), next(frames)]
        while slow[1].captured_at - slow[0].captured_at < 0.8:
            slow = [slow[1], next(frames)]
        assert server.streams == 1
        assert caplog.messages == []


def test_camera_of_few_frames_a_second_is_not_lost(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    """Its interval is longer than the timeout, which is learned from the first frames."""
    with mjpeg_camera(jpegs(20), fps=2) as server:
        frames = Camera(server.url, timing=Timing(stall_s=0.4, report_s=0)).frames(stop)
        first = [next(frames) for _ in range(2)]
        while server.streams == 1:
            first.append(next(frames))
            assert len(first) < 50, "the timeout is too short at first"
        streams, since = server.streams, 0
        while since < 8:
            assert next(frames).number < 50
            since = since + 1 if server.streams == streams else 0
            streams = server.streams
        assert "no frame came for 0.4 s (--stall-timeout)" in caplog.messages[0]


def test_live_source_never_raises(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    for source in ("rtsp://admin:hunter2[x@127.0.0.1:1/x", "http://admin:hunter2[x@127.0.0.1:1/x", "http://[bad/x"):
        thread = threading.Thread(target=lambda source=source: list(Camera(source).frames(stop)))
        caplog.clear()
        thread.start()
        wait_until(lambda: caplog.messages != [])
        assert "the camera is not there, can't open" in caplog.messages[0]
        assert "hunter2" not in caplog.text
    stop.set()


def test_live_source_is_sampled_down(stop: threading.Event) -> None:
    with mjpeg_camera(jpegs(20), fps=40) as server:
        frames = Camera(server.url, fps=10).frames(stop)
        captured_at = [next(frames).captured_at for _ in range(21)]
        assert captured_at[-1] - captured_at[0] >= 19 / 10
        frames.close()  # type: ignore[attr-defined]  # a generator
        faster = Camera(server.url, fps=1e6).frames(stop)
        shades = [cv2.imdecode(np.frombuffer(next(faster).jpeg, np.uint8), 0).mean() for _ in range(10)]  # type: ignore[union-attr]
        expected = [shades[0] + 10 * number for number in range(10)]
        assert shades == pytest.approx(expected, abs=2), "no frame is left out"
