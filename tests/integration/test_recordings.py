"""edge/sources.py: pipes, recordings and snapshots behind URLs, playlists, and why a stream can't be opened."""

import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from demo.node import PROJECT, free_ports
from edge.cameras import Camera
from edge.errors import SourceError
from edge.frames import Frame
from edge.timing import Timing
from tests.support.fake_server import FakeServer
from tests.support.frames import frames_of
from tests.support.media import changed, file_server, read
from tests.support.scripts import json_lines, run, summary, wait_until

FAST = math.inf


def test_pipe_is_a_file_that_is_opened_once(media: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    camera = Camera(str(pipe), fps=FAST)
    assert (camera.is_live, camera.check()) == (False, None)
    arrived: list[Frame] = []
    thread = threading.Thread(target=lambda: arrived.extend(camera.frames(threading.Event())))
    thread.start()
    time.sleep(0.3)  # so that the reader is there before the writer
    pipe.write_bytes((media / "clip.mkv").read_bytes())
    thread.join(60)
    assert not thread.is_alive()
    assert len(arrived) == 100


def test_pipe_that_ends_early_is_reported(media: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is no error: what an intact pipe states may be wrong too, and it can't be read once more."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = (media / "clip.mkv").read_bytes()
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


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_standard_input_is_a_file(fake: FakeServer, media: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "request.py"), "--url", fake.url, "--input", "/dev/stdin", "--quiet"]
    with (media / "clip.ts").open("rb") as clip, subprocess.Popen(["cat"], stdin=clip, stdout=subprocess.PIPE) as cat:
        done = subprocess.run(
            [*command, "--fps", "max"], stdin=cat.stdout, capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert summary(done.stderr)["/dev/stdin"]["answered"] == "100"


@pytest.mark.parametrize("with_ranges", [True, False])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "recording.m3u8"])
def test_recording_behind_a_url_is_a_file(media: Path, name: str, with_ranges: bool) -> None:
    with file_server(media, with_ranges) as address:
        camera = Camera(f"{address}/{name}", fps=FAST)
        frames = list(camera.frames(threading.Event()))
    assert not camera.is_live
    assert len(frames) == 100
    assert frames[-1].position_s == pytest.approx(3.96, abs=0.01)


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_run_with_a_recording_behind_a_url_and_a_truncated_file(fake: FakeServer, media: Path, tmp_path: Path) -> None:
    changed(media / "clip.mkv", tmp_path / "cut.mkv", lambda data: data[: int(0.6 * len(data))])
    with file_server(media) as address:
        url = f"{address}/clip.mp4"
        inputs = ["--input", url, "--input", str(tmp_path / "cut.mkv")]
        flags = ["--url", fake.url, "--jsonl", str(tmp_path / "out.jsonl"), "--save-video", str(tmp_path / "out.mp4")]
        done = run("request.py", *inputs, *flags, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    counts = summary(done.stderr)
    assert counts[url]["answered"] == "100"
    assert counts[url]["dropped"] == "0"
    (error,) = [line for line in done.stderr.splitlines() if "frames could be read" in line]
    match = re.search(r"cut.mkv: (\d+) of 100 frames could be read, the file is truncated or damaged$", error)
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
    media: Path, tmp_path: Path, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """A second of video arrives at once."""
    playlist = LivePlaylist(media, tmp_path)
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
def test_server_that_sends_half_of_a_recording(media: Path, stop: threading.Event, then_hang: bool) -> None:
    """The length that it states is that of the whole file."""
    data = (media / "clip.mp4").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=half_server, args=[data, listener, stop, then_hang], daemon=True)
        thread.start()
        timing = Timing(stall_s=1.0, probe_s=2.0)
        camera = Camera(f"http://127.0.0.1:{listener.getsockname()[1]}/clip.mp4", FAST, timing=timing)
        frames: list[Frame] = []
        problem = "the server sent nothing for 1 s" if then_hang else "the file is"
        with pytest.raises(SourceError, match=rf"\d+ of 100 frames could be read, {problem}"):
            frames.extend(camera.frames(stop))
