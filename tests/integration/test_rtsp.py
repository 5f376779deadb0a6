"""edge/live.py with a real RTSP server, whose frames show when they were made."""

import statistics
import threading
import time
from collections.abc import Iterator
from itertools import islice

import pytest

from edge.cameras import Camera
from edge.errors import SourceError
from edge.frames import Frame
from edge.timing import Timing
from tests.support.programs import needs
from tests.support.rtsp_camera import RtspCamera, delay_s, rtsp_camera
from tests.support.scripts import wait_until

pytestmark = needs("gst-rtsp-server")

# Most frames are exact to some milliseconds. A busy machine delays the camera itself now and then.
USUAL_S, MAX_S = 0.03, 0.5


@pytest.fixture(scope="module")
def camera() -> Iterator[RtspCamera]:
    with rtsp_camera() as camera:
        yield camera


def assert_true_times(frames: list[Frame], usual_s: float = USUAL_S) -> None:
    delays_s = [delay_s(frame) for frame in frames]
    assert statistics.median(delays_s) == pytest.approx(0, abs=usual_s), delays_s
    assert min(delays_s) > -MAX_S, delays_s
    assert max(delays_s) < MAX_S, delays_s


@pytest.mark.parametrize("transport", ["tcp", "udp"])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_frames_have_the_time_at_which_they_were_made(
    camera: RtspCamera, monkeypatch: pytest.MonkeyPatch, stop: threading.Event, threads: int, transport: str
) -> None:
    """The first of them too: FFmpeg reads a second of video while it opens the stream."""
    monkeypatch.setattr("edge.live.THREADS", threads)
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", f"rtsp_transport;{transport}")
    frames = list(islice(Camera(camera.url).frames(stop), 40))
    assert [frame.number for frame in frames] == list(range(1, 41))
    assert all(frame.position_s is None for frame in frames)
    assert_true_times(frames)


@pytest.mark.parametrize("threads", [1, 2])
def test_camera_of_one_frame_a_second(monkeypatch: pytest.MonkeyPatch, stop: threading.Event, threads: int) -> None:
    """FFmpeg delivers each frame a second after it arrived, or two: that counts as latency."""
    monkeypatch.setattr("edge.live.THREADS", threads)
    with rtsp_camera("--fps", "1") as camera:
        frames, read_at = [], []
        for frame in islice(Camera(camera.url).frames(stop), 5):
            frames.append(frame)
            read_at.append(time.monotonic())
        assert_true_times(frames)
        waited_s = read_at[-1] - frames[-1].captured_at
        assert waited_s == pytest.approx(threads, abs=0.5)


@pytest.mark.parametrize("encoder", ["b-frames", "mjpeg"])
def test_other_streams(stop: threading.Event, encoder: str) -> None:
    """The encoder itself delays frames that refer to later ones, by some frames."""
    with rtsp_camera("--encoder", encoder) as camera:
        frames = list(islice(Camera(camera.url).frames(stop), 40))
        assert_true_times(frames, usual_s=0.3 if encoder == "b-frames" else USUAL_S)
        made_at = [frame.captured_at - delay_s(frame) for frame in frames]
        assert made_at == sorted(made_at)


def test_stall_is_reported_in_time_and_no_old_frame_has_a_new_time(
    stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with rtsp_camera() as camera:
        frames = Camera(camera.url, timing=Timing(stall_s=2.0)).frames(stop)
        before = list(islice(frames, 20))
        camera.stall()
        stalled_at = time.time()

        def go_on_when_it_is_reported() -> None:
            wait_until(lambda: bool(caplog.records))
            camera.go_on()

        threading.Thread(target=go_on_when_it_is_reported, daemon=True).start()
        after = list(islice(frames, 60))
        assert_true_times(before + after)
        lost, back = caplog.records
        assert lost.message == (
            f"{camera.url}: the camera is lost, no frame came for 2 s (--stall-timeout); trying until it is back"
        )
        assert lost.created - stalled_at < 3.5
        assert "the camera is back after" in back.message


def test_camera_that_is_killed_and_started_again(stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    with rtsp_camera() as camera:
        frames = Camera(camera.url).frames(stop)
        next(frames)
        camera.process.kill()
        arrived: list[Frame] = []
        thread = threading.Thread(target=lambda: arrived.extend(islice(frames, 60)))
        thread.start()
        wait_until(lambda: bool(caplog.messages))
        with rtsp_camera("--port", str(camera.port)):
            thread.join(120)
            assert not thread.is_alive()
    assert_true_times(arrived[5:])
    assert "the camera is lost" in caplog.messages[0]
    assert "the camera is back after" in caplog.messages[1]


def test_digest_login(stop: threading.Event) -> None:
    with rtsp_camera("--login", "admin:p@ss/#1") as camera:
        url = camera.url.replace("rtsp://", "rtsp://admin:{}@")
        right = Camera(url.format("p%40ss%2F%231"))
        assert next(right.frames(stop)).number == 1
        assert right.name == camera.url
        problem = "401 Unauthorized: check user and password; in a password write @ as %40"
        with pytest.raises(SourceError, match=problem) as error:
            Camera(url.format("hunter2")).check()
        assert "hunter2" not in str(error.value)
        with pytest.raises(SourceError, match="404 Not Found: check the path of the address"):
            Camera(url.format("p%40ss%2F%231").replace("/live", "/nothing")).check()
