"""edge/files.py and edge/sources.py: damaged files, odd but intact ones, recordings behind URLs, and pipes."""

import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from demo.node import PROJECT, free_ports
from edge.cameras import Camera
from edge.errors import SourceError
from edge.frames import Frame, Result
from edge.timing import Timing
from edge.video import Video
from tests.support.fake_server import FakeServer
from tests.support.frames import frames_of
from tests.support.media import X264, ffmpeg, file_server, pattern, tone
from tests.support.scripts import json_lines, run, summary, wait_until

FAST = math.inf
VFR = ["-vf", "select='lt(n,50)+not(mod(n,30))'", "-fps_mode", "vfr"]  # 30 frames a second, then one


def read(source: str | Path, fps: float | None = FAST) -> tuple[list[Frame], str | None]:
    """Return the frames of a source, and the error at its end."""
    frames: list[Frame] = []
    try:
        frames.extend(Camera(str(source), fps).frames(threading.Event()))
    except SourceError as error:
        return frames, str(error)
    return frames, None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 100 frames, and one of 400 for damage in the middle."""
    folder = tmp_path_factory.mktemp("media")
    for suffix in ("mkv", "flv", "ts"):
        ffmpeg(*pattern(), *X264, folder / f"clip.{suffix}")
    ffmpeg(*pattern(), *X264, "-movflags", "faststart", folder / "clip.mp4")
    ffmpeg(*pattern(), *X264, "-movflags", "frag_keyframe+empty_moov", folder / "fragments.mp4")
    ffmpeg(*pattern(), "-c:v", "libvpx", "-deadline", "realtime", folder / "clip.webm")
    ffmpeg(*pattern(), "-c:v", "mpeg4", "-g", "12", folder / "clip.avi")
    x265 = "keyint=12:log-level=none"
    ffmpeg(*pattern(), "-c:v", "libx265", "-x265-params", x265, "-pix_fmt", "yuv420p", folder / "h265.mp4")
    ffmpeg(*pattern(30, 8), *VFR, *X264, folder / "vfr.mp4")
    ffmpeg(*pattern(), *X264, "-f", "hls", "-hls_time", "1", "-hls_list_size", "0", folder / "recording.m3u8")
    return folder


def changed(path: Path, target: Path, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    """Write a file with changed bytes."""
    target.write_bytes(change(bytearray(path.read_bytes())))
    return target


def zeros(data: bytearray) -> bytearray:
    first, last = int(0.4 * len(data)), int(0.6 * len(data))
    data[first:last] = bytes(last - first)
    return data


def noise(data: bytearray) -> bytearray:
    first, last = int(0.4 * len(data)), int(0.6 * len(data))
    data[first:last] = random.Random(1).randbytes(last - first)
    return data


@pytest.mark.parametrize("name", ["clip.mp4", "fragments.mp4", "clip.mkv", "clip.webm", "clip.avi", "clip.flv"])
def test_truncated_file_is_an_error_after_its_frames(folder: Path, tmp_path: Path, name: str) -> None:
    path = changed(folder / name, tmp_path / name, lambda data: data[: int(0.6 * len(data))])
    frames, error = read(path)
    assert 30 < len(frames) < 80
    assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
    assert error
    match = re.search(rf"{name}: (\d+) of (\d+) frames could be read, the file is", error)
    assert match, error
    assert int(match[1]) == len(frames) < int(match[2])


@pytest.mark.parametrize("damage", [zeros, noise])
@pytest.mark.parametrize("name", ["clip.mp4", "h265.mp4", "clip.mkv"])
def test_frames_after_the_damage_are_read(
    folder: Path, tmp_path: Path, name: str, damage: Callable[[bytearray], bytes | bytearray]
) -> None:
    frames, error = read(changed(folder / name, tmp_path / name, damage))
    assert error
    assert f"{len(frames)} of 100 frames could be read, the file is" in error
    assert 60 < len(frames) < 95
    positions = [frame.position_s or 0.0 for frame in frames]
    assert positions == sorted(positions)
    assert positions[-1] > 3.5, "almost at the end"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm", "clip.avi", "clip.flv", "clip.ts", "h265.mp4"])
def test_intact_file_is_no_error(folder: Path, name: str) -> None:
    frames, error = read(folder / name)
    assert (len(frames), error) == (100, None)


def test_intact_files_that_state_too_many_frames_are_no_error(folder: Path, tmp_path: Path) -> None:
    """An edit list hides most frames; sound that goes on; and a rate that holds for a part of the file."""
    ffmpeg("-ss", "3.5", "-i", folder / "h265.mp4", "-t", "0.4", "-c", "copy", tmp_path / "cut.mp4")
    ffmpeg(*pattern(25, 2), *tone(10), *X264, tmp_path / "sound.mkv")
    ffmpeg(*pattern(30, 8), *VFR, *X264, tmp_path / "vfr.mkv")
    for name in ("cut.mp4", "sound.mkv", "vfr.mkv"):
        path = tmp_path / name
        frames, error = read(path)
        stated = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)
        assert (len(frames) < stated, error) == (True, None), name
        assert len(frames) == len(frames_of(path))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_minutes_of_sound_between_two_frames(tmp_path: Path, suffix: str) -> None:
    """OpenCV gives up after 4,096 packets of sound, unless it is told otherwise."""
    gap = ["-vf", "setpts='PTS+if(gte(N,30),200/TB,0)'", "-fps_mode", "vfr"]
    ffmpeg(*pattern(25, 2.4), *tone(205), *gap, *X264, "-c:a", "aac", tmp_path / f"gap.{suffix}")
    frames, error = read(tmp_path / f"gap.{suffix}")
    assert error is None
    assert len(frames) >= 59
    assert frames[29].position_s == pytest.approx(1.16, abs=0.01)
    assert frames[30].position_s == pytest.approx(201.2, abs=0.01)


def test_why_a_file_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    problems = {
        "empty.mp4": "it is empty",
        "index.mp4": "it has no index (moov), since its recording was not completed or a part of it is missing",
        "sound.mp4": "it has no video track",
        "notes.txt": "its format is unknown",
    }
    (tmp_path / "empty.mp4").touch()
    ffmpeg("-i", folder / "clip.mp4", "-c", "copy", tmp_path / "whole.mp4")  # the index at its end
    changed(tmp_path / "whole.mp4", tmp_path / "index.mp4", lambda data: data[: len(data) // 2])
    ffmpeg(*tone(1), tmp_path / "sound.mp4")
    (tmp_path / "notes.txt").write_text("notes")
    for name, problem in problems.items():
        path = tmp_path / name
        assert read(path) == ([], f"{path} is no video that OpenCV can read: {problem}")


def test_codec_that_opencv_lacks_is_named(tmp_path: Path) -> None:
    ffmpeg(*pattern(25, 0.2), "-c:v", "libaom-av1", "-cpu-used", "8", tmp_path / "clip.mp4")
    if frames_of(tmp_path / "clip.mp4"):
        pytest.skip("this OpenCV decodes AV1")
    _, error = read(tmp_path / "clip.mp4")
    assert error
    assert "delivers no frames: OpenCV can't decode them (codec AV1)" in error


def test_time_stamps_of_a_variable_rate(folder: Path) -> None:
    """At its average rate of 11 frames a second, the 50th would come after 4.5 s."""
    frames, error = read(folder / "vfr.mp4", fps=None)
    positions = [*(number / 30 for number in range(50)), 2, 3, 4, 5, 6, 7]
    assert error is None
    assert [frame.position_s for frame in frames] == pytest.approx(positions, abs=0.001)
    took_s = frames[49].captured_at - frames[0].captured_at
    assert 1.6 < took_s < 4
    assert frames[-1].captured_at - frames[0].captured_at > 6.9


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_annotated_video_has_the_times_of_the_file(folder: Path, tmp_path: Path, suffix: str) -> None:
    ffmpeg(*pattern(480, 0.25), *X264, tmp_path / "fast.mp4")
    for path, fps in ((folder / "vfr.mp4", 30), (tmp_path / "fast.mp4", 480)):
        camera = Camera(str(path), fps=FAST)
        camera.check()
        output = tmp_path / f"{path.stem}-out{suffix}"
        video = Video(output, camera)
        frames = list(camera.frames(threading.Event()))
        for frame in frames:
            shade = np.full((48, 64, 3), 60 * (frame.number % 4), np.uint8)
            image = cv2.imencode(".jpg", shade)[1].tobytes()
            video.write(Result(Frame(camera, frame.number, 0.0, image, frame.position_s), "answered", {}))
        video.close()
        assert cv2.VideoCapture(str(output)).get(cv2.CAP_PROP_FPS) == pytest.approx(fps, rel=0.001)
        shown = [round(float(image[-8:, -8:].mean()) / 60) for image in frames_of(output)]
        due = [round((frame.position_s or 0.0) * fps) for frame in frames]
        expected = [sum(slot <= at for slot in due) % 4 for at in range(due[-1] + 1)]
        assert shown == expected


def test_pipe_is_a_file_that_is_opened_once(folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    camera = Camera(str(pipe), fps=FAST)
    assert (camera.is_live, camera.check()) == (False, None)
    arrived: list[Frame] = []
    thread = threading.Thread(target=lambda: arrived.extend(camera.frames(threading.Event())))
    thread.start()
    time.sleep(0.3)  # so that the reader is there before the writer
    pipe.write_bytes((folder / "clip.mkv").read_bytes())
    thread.join(60)
    assert not thread.is_alive()
    assert len(arrived) == 100


def test_pipe_that_ends_early_is_reported(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is no error: what an intact pipe states may be wrong too, and it can't be read once more."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = (folder / "clip.mkv").read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=[data[: int(0.6 * len(data))]])
    writer.start()
    frames, error = read(pipe)
    writer.join()
    assert error is None
    (message,) = caplog.messages
    assert message == f"{pipe} ends after {len(frames)} frames, and states 100: was it cut?"


def test_pipe_without_a_writer_ends_with_the_run(tmp_path: Path, stop: threading.Event) -> None:
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=lambda: list(Camera(str(tmp_path / "pipe")).frames(stop)))
    thread.start()
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "sound.mkv", "image.png"])
def test_file_that_is_repeated_begins_anew(folder: Path, tmp_path: Path, stop: threading.Event, name: str) -> None:
    """All its frames again, at the same positions; also if it can't seek, or has one frame."""
    ffmpeg(*pattern(25, 1), *tone(2), *X264, tmp_path / "sound.mkv")
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((48, 64, 3), np.uint8))
    path = (tmp_path if name in ("sound.mkv", "image.png") else folder) / name
    once = list(Camera(str(path), fps=FAST).frames(stop))
    frames = Camera(str(path), fps=FAST, loop=True).frames(stop)
    thrice = [next(frames) for _ in range(3 * len(once))]
    assert [frame.position_s for frame in thrice] == 3 * [frame.position_s for frame in once]
    assert [frame.jpeg for frame in thrice] == 3 * [frame.jpeg for frame in once]
    stop.set()
    assert list(frames) == []


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_standard_input_is_a_file(fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "request.py"), "--url", fake.url, "--input", "/dev/stdin", "--quiet"]
    with (folder / "clip.ts").open("rb") as clip, subprocess.Popen(["cat"], stdin=clip, stdout=subprocess.PIPE) as cat:
        done = subprocess.run(
            [*command, "--fps", "max"], stdin=cat.stdout, capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert summary(done.stderr)["/dev/stdin"]["answered"] == "100"


@pytest.mark.parametrize("with_ranges", [True, False])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "recording.m3u8"])
def test_recording_behind_a_url_is_a_file(folder: Path, name: str, with_ranges: bool) -> None:
    with file_server(folder, with_ranges) as address:
        camera = Camera(f"{address}/{name}", fps=FAST)
        frames = list(camera.frames(threading.Event()))
    assert not camera.is_live
    assert len(frames) == 100
    assert frames[-1].position_s == pytest.approx(3.96, abs=0.01)


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_run_with_a_recording_behind_a_url_and_a_truncated_file(fake: FakeServer, folder: Path, tmp_path: Path) -> None:
    changed(folder / "clip.mkv", tmp_path / "cut.mkv", lambda data: data[: int(0.6 * len(data))])
    with file_server(folder) as address:
        url = f"{address}/clip.mp4"
        inputs = ["--input", url, "--input", str(tmp_path / "cut.mkv")]
        flags = ["--url", fake.url, "--jsonl", str(tmp_path / "out.jsonl"), "--save-video", str(tmp_path / "out.mp4")]
        done = run("request.py", *inputs, *flags, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    counts = summary(done.stderr)
    assert counts[url]["answered"] == "100"
    assert counts[url]["dropped"] == "0"
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("request.py:")]
    match = re.search(r"cut.mkv: (\d+) of 100 frames could be read", error)
    assert match
    assert sum(line["camera"].endswith("cut.mkv") for line in lines) == int(match[1])
    assert len(frames_of(tmp_path / "out-1.mp4")) == 100
    assert len(frames_of(tmp_path / "out-2.mp4")) == int(match[1])


def test_snapshot_is_polled_without_a_message(
    tmp_path: Path, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    cv2.imwrite(str(tmp_path / "snapshot.jpg"), np.zeros((48, 64, 3), np.uint8))
    (tmp_path / "snapshot.cgi").write_bytes((tmp_path / "snapshot.jpg").read_bytes())
    with file_server(tmp_path) as address:
        for name, fps, interval_s in (("snapshot.jpg?user=a", None, 1.0), ("snapshot.cgi", 5.0, 0.2)):
            camera = Camera(f"{address}/{name}", fps=fps)
            frames = camera.frames(stop)
            captured_at = [next(frames).captured_at for _ in range(4)]
            assert camera.is_live
            assert captured_at[-1] - captured_at[0] > 2.9 * interval_s
        assert caplog.messages == []


class LivePlaylist:
    """Live HLS: of the segments of a recording, those of the last three seconds, as time goes on."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.target, self.begin = target, time.monotonic()
        for segment in folder.glob("recording*.ts"):
            (target / segment.name).write_bytes(segment.read_bytes())
        self.segments = re.findall(r"#EXTINF:.*\n.*\n", (folder / "recording.m3u8").read_text())

    def write(self) -> None:
        first = int(time.monotonic() - self.begin)
        shown = [self.segments[number % len(self.segments)] for number in range(first, first + 3)]
        head = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:{first}\n"
        part = self.target / "part"
        part.write_text(head + "#EXT-X-DISCONTINUITY\n".join(shown))
        part.replace(self.target / "live.m3u8")


def test_live_playlist_is_paced(
    folder: Path, tmp_path: Path, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """A second of video arrives at once."""
    playlist = LivePlaylist(folder, tmp_path)
    playlist.write()
    with file_server(tmp_path) as address:

        def go_on() -> None:
            while not stop.wait(0.1):
                playlist.write()

        threading.Thread(target=go_on, daemon=True).start()
        camera = Camera(f"{address}/live.m3u8")
        frames = camera.frames(stop)
        captured_at = [next(frames).captured_at for _ in range(60)]
    assert camera.is_live
    assert captured_at[-1] - captured_at[0] > 1.5
    assert max(np.diff(captured_at[:20])) < 0.5
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("401", "401 Unauthorized: check user and password; in a password write @ as %40, # as %23"),
        ("403", "403 Forbidden: check what this user may see"),
        ("404", "404 Not Found: check the path of the address"),
        ("503", "503 Service Unavailable"),
    ],
)
def test_status_of_a_stream(tmp_path: Path, path: str, problem: str) -> None:
    with file_server(tmp_path) as address, pytest.raises(SourceError, match=f"can't open {address}/{path}: {problem}"):
        Camera(f"{address}/{path}").check()


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("rtsp://127.0.0.1:{port}/live", "connection refused: check the port, and that the camera is on"),
        ("http://127.0.0.1:{port}/live", "connection refused: check the port, and that the camera is on"),
        ("rtsp://camera.invalid/live", "unknown host: check the name in the address"),
        ("rtsp://admin:hunter2/x@127.0.0.1:{port}/live", "in a password write @ as %40"),
        ("rtsp://admin:hunter2#x@127.0.0.1:{port}/live", "in a password write @ as %40"),
        ("rtsp://admin:hunter2%@127.0.0.1:{port}/live", "in a password write @ as %40"),
        ("http://admin:hunter2/x@127.0.0.1:{port}/live", "in a password write @ as %40"),
    ],
)
def test_address_of_a_stream(
    address: str, problem: str, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    url = address.format(port=free_ports(1)[0])
    with pytest.raises(SourceError, match=problem) as error:
        Camera(url).check()
    threading.Thread(target=lambda: list(Camera(url).frames(stop)), daemon=True).start()
    wait_until(lambda: caplog.messages != [])
    assert problem in caplog.messages[0]
    assert "is not there, can't open" in caplog.messages[0]
    for text in (str(error.value), caplog.text):
        assert "hunter2" not in text
        assert "admin" not in text


def half_server(data: bytes, listener: socket.socket, stop: threading.Event, then_hang: bool) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        connection.sendall(head + data[: len(data) // 2])
        if then_hang:
            stop.wait(60)


@pytest.mark.parametrize("then_hang", [False, True])
def test_server_that_sends_half_of_a_recording(folder: Path, stop: threading.Event, then_hang: bool) -> None:
    """The length that it states is that of the whole file."""
    data = (folder / "clip.mp4").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=half_server, args=[data, listener, stop, then_hang], daemon=True)
        thread.start()
        timing = Timing(stall_s=1.0, probe_s=2.0)
        camera = Camera(f"http://127.0.0.1:{listener.getsockname()[1]}/clip.mp4", FAST, timing=timing)
        frames: list[Frame] = []
        problem = "the server sent nothing for 1 s" if then_hang else "the file is"
        with pytest.raises(SourceError, match=rf"\d+ of 100 frames could be read, {problem}"):
            frames.extend(camera.frames(stop))


def test_the_end_of_a_run_ends_the_second_reading_of_a_file(
    folder: Path, tmp_path: Path, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(folder / "clip.mkv", tmp_path / "clip.mkv", zeros)
    started = threading.Event()
    popen = subprocess.Popen

    def start(_: list[str], **options: Any) -> Any:
        started.set()
        return popen([sys.executable, "-c", "import time; time.sleep(600)"], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    thread = threading.Thread(target=lambda: list(Camera(str(path), FAST).frames(stop)))
    thread.start()
    assert started.wait(60)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
