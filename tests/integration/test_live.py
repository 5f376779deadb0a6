"""request.py with several cameras: lost, faster than the server, absent, and together with files."""

import hashlib
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from demo.node import PROJECT, free_ports
from edge.timing import Timing
from tests.support.fake_server import FakeServer
from tests.support.frames import CLIP, Pixels, frames_of, jpeg, small, write_video
from tests.support.mjpeg_camera import MjpegCamera, mjpeg_camera
from tests.support.scripts import json_lines, longest_gap, outputs, run, running, summary, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a single process")


@pytest.fixture(scope="module")
def jpegs(clip: list[Pixels]) -> list[bytes]:
    """The frames of the clip, smaller, as a camera would send them."""
    return [jpeg(small(frame)) for frame in clip]


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_a_dead_camera_leaves_the_others_alone(fake: FakeServer, jpegs: list[bytes], tmp_path: Path) -> None:
    """One camera is cut and comes back, one stalls, one never responds; the fourth one streams all the time."""
    with (
        mjpeg_camera(jpegs, fps=5) as well,
        mjpeg_camera(jpegs, fps=5) as stalling,
        mjpeg_camera(jpegs, fps=5) as dying,
        mjpeg_camera(jpegs, fps=5) as mute,
    ):
        mute.mode = "mute"
        cameras = [well, stalling, dying, mute]
        with_passwords = [camera.url.replace("://", "://admin:hunter2@") for camera in cameras]
        inputs = [argument for url in with_passwords for argument in ("--input", url)]
        with running(fake, tmp_path, *inputs) as request:

            def answered(camera: MjpegCamera) -> int:
                return len(request.answered(camera.url))

            def goes_on() -> None:
                before = answered(well)
                wait_until(lambda: answered(well) > before + 10)

            wait_until(lambda: all(answered(camera) > 0 for camera in (well, stalling, dying)))
            dying.mode = "cut"
            stalling.mode = "stalled"
            for camera in (dying, stalling):
                wait_until(lambda camera=camera: f"{camera.url}: the camera is lost" in request.stderr())  # type: ignore[misc]
            goes_on()
            dying.mode = "streaming"
            wait_until(lambda: f"{dying.url}: the camera is back" in request.stderr())
            goes_on()
            before = answered(dying)
            wait_until(lambda: answered(dying) > before)
            found = request.end()
        assert list(found) == [camera.url for camera in cameras]
        assert found[mute.url]["captured"] == "0"
        assert all(found[url]["failed"] == "0" for url in found)
        # The mute one is opened again and again, each time for 5 s; the others are opened again after 0.5 s or more.
        lines = json_lines(request.output)
        assert longest_gap(lines, well.url) < min(longest_gap(lines, dying.url), Timing().camera_open_s)
        assert "hunter2" not in request.stderr()
        assert "hunter2" not in request.output.read_text()


@pytest.mark.parametrize("fake", ["out of order"], indirect=True)
@pytest.mark.parametrize("flags", [[], ["--client-batching", "--batch-size", "3"]], ids=["single", "json"])
def test_every_prediction_belongs_to_its_frame(
    fake: FakeServer, flags: list[str], clip: list[Pixels], tmp_path: Path
) -> None:
    """Three files of different lengths, whose frames are mixed in the batches, and whose responses overtake others."""
    expected = {}
    for number, length in enumerate((10, 25, 40)):
        images = [small(image) for image in clip[100 * number : 100 * number + length]]
        path = write_video(tmp_path / f"{number}.mp4", images, 50)
        expected[str(path)] = [hashlib.sha256(jpeg(frame)).hexdigest() for frame in frames_of(path)]
    inputs = [argument for path in expected for argument in ("--input", path)]
    done = run(
        "request.py", "--url", fake.url, *inputs, *flags, "--quiet", "--jsonl", tmp_path / "out.jsonl", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    for camera, hashes in expected.items():
        assert [next(iter(line["predictions"])) for line in lines if line["camera"] == camera] == hashes
    assert all(row["captured"] == row["answered"] for row in summary(done.stderr).values())
    if flags:
        assert fake.frames_asked < 75 / 2, "a batch holds frames of several cameras"


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
def test_server_that_is_slower_than_the_cameras(fake: FakeServer, tmp_path: Path) -> None:
    """It answers 2 of about 20 frames in 0.5 s: the others are dropped at once, and memory stays flat.

    The frames are noise, 250 KB each: without a limit they would take 50 MB at the end.
    """
    noise = np.random.default_rng(1)
    jpegs = [jpeg(noise.integers(0, 255, (480, 640, 3), np.uint8)) for _ in range(4)]
    with mjpeg_camera(jpegs, fps=20) as first, mjpeg_camera(jpegs, fps=20) as second:
        inputs = ["--input", first.url, "--input", second.url, "--max-in-flight", "2"]
        with running(fake, tmp_path, *inputs) as request:
            wait_until(lambda: request.lines() > 50)
            before = request.process.memory_info().rss
            wait_until(lambda: request.lines() > 250)
            after = request.process.memory_info().rss
            found = request.end()
    assert after - before < 25e6
    for row in found.values():
        assert int(row["answered"]) > 0
        assert int(row["dropped"]) > 0
        assert (row["failed"], row["expired"]) == ("0", "0")
    causes = {line["error"] for line in json_lines(request.output) if line["outcome"] == "dropped"}
    assert causes <= {"buffer full", "the run ended"}
    assert "buffer full" in causes


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_a_file_drops_what_its_policy_says(fake: FakeServer, drop: str, tmp_path: Path, short_clip: Path) -> None:
    """The clip ends after 0.2 s, in which 1 frame is sent, or a few if the reader is slow; 4 wait."""
    flags = ["--max-in-flight", "1", "--quiet", "--jsonl", str(tmp_path / "out.jsonl"), "--input", str(short_clip)]
    done = run("request.py", "--url", fake.url, *flags, "--drop", drop, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    answered = [line["frame"] for line in lines if line["outcome"] == "answered"]
    assert {line["error"] for line in lines if line["outcome"] == "dropped"} == {"buffer full"}
    assert len(lines) == 22
    assert 5 <= len(answered) < 22
    assert (answered[-4:] == [19, 20, 21, 22]) == (drop == "oldest")
    assert (answered[:5] == [1, 2, 3, 4, 5]) == (drop == "newest")


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
def test_frames_that_became_too_old_are_not_sent(fake: FakeServer, tmp_path: Path, short_clip: Path) -> None:
    """The server takes 0.5 s for each frame; frames that waited for more than 0.3 s meanwhile are not sent."""
    flags = ["--max-in-flight", "1", "--quiet", "--jsonl", str(tmp_path / "out.jsonl"), "--input", str(short_clip)]
    done = run("request.py", "--url", fake.url, *flags, "--max-age", "300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    answered = [line for line in lines if line["outcome"] == "answered"]
    assert len(lines) == 22
    assert fake.frames_asked == len(answered) >= 2
    assert {line["error"] for line in lines if line["outcome"] == "expired"} == {"older than 300 ms"}
    assert {line["outcome"] for line in lines} == {"answered", "expired"}


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_a_file_as_fast_as_the_server_answers(fake: FakeServer, clip: list[Pixels], tmp_path: Path) -> None:
    """A clip of one frame in 50 s: at its own rate, the run would exceed its timeout."""
    video = write_video(tmp_path / "slow.mp4", [small(frame) for frame in clip[:30]], 0.02)
    done = run("request.py", "--url", fake.url, "--input", video, "--fps", "max", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = summary(done.stderr).values()
    assert (row["answered"], row["dropped"]) == ("30", "0")
    assert float(row["FPS"]) > 0.2


@pytest.mark.parametrize("fake", ["some fail"], indirect=True)
@pytest.mark.parametrize(
    ("flags", "failed"),
    [([], 7), (["--client-batching", "--batch-size", "2"], 6), (["--server-wait", "0"], 7)],
    ids=str,
)
def test_one_failed_frame_is_enough_for_exit_code_1(
    fake: FakeServer, flags: list[str], failed: int, short_clip: Path, tmp_path: Path
) -> None:
    done = run("request.py", "--url", fake.url, "--input", short_clip, *flags, cwd=tmp_path)
    assert done.returncode == 1
    (row,) = summary(done.stderr).values()
    assert (row["answered"], row["failed"]) == (str(22 - failed), str(failed))
    assert f"{short_clip}: {failed} failed: 400 not an image" in done.stderr


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_json_lines_on_standard_output_are_alone_there(fake: FakeServer, short_clip: Path, tmp_path: Path) -> None:
    done = run("request.py", "--url", fake.url, "--input", short_clip, "--jsonl", "-", cwd=tmp_path)
    (tmp_path / "out.jsonl").write_text(done.stdout)
    assert len(json_lines(tmp_path / "out.jsonl")) == 22


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_output_on_a_full_disk_is_reported_and_the_others_go_on(
    fake: FakeServer, short_clip: Path, tmp_path: Path
) -> None:
    done = run("request.py", "--url", fake.url, "--input", short_clip, "--jsonl", "/dev/full", cwd=tmp_path)
    assert done.returncode == 1
    assert "/dev/full fails, going on without it: OSError: [Errno 28] No space left on device" in done.stderr
    assert outputs(done.stdout)[-1].number == 22
    (row,) = summary(done.stderr).values()
    assert row["answered"] == "22"


def typed(command: list[str | Path], folder: Path) -> str:
    """Run request.py with standard error on a terminal; return what appears there."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    process = subprocess.Popen(
        [sys.executable, PROJECT / "request.py", *command], cwd=folder, stderr=theirs, stdout=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = bytearray()
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # The other side is closed.
            break
    os.close(ours)
    assert process.wait(timeout=120) == 0
    return shown.decode()


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_progress_bar_of_a_file_on_a_terminal(fake: FakeServer, short_clip: Path, tmp_path: Path) -> None:
    shown = typed(["--url", fake.url, "--input", short_clip], tmp_path)
    assert re.search(r"22/22 .*frame/s, \d+\.\d FPS, \d+ ms\]", shown)
    done = run("request.py", "--url", fake.url, "--input", short_clip, cwd=tmp_path)
    assert "22/22" not in done.stderr


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_absent_camera_is_waited_for_unless_it_is_required(
    fake: FakeServer, jpegs: list[bytes], tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    url = f"http://admin:hunter2@127.0.0.1:{port}/live"
    done = run("request.py", "--url", fake.url, "--input", CLIP, "--input", url, "--require-cameras", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"request.py: can't open http://127.0.0.1:{port}/live")
    assert fake.frames_asked == -1
    with running(fake, tmp_path, "--input", url) as request:
        wait_until(lambda: "the camera is not there" in request.stderr())
        with mjpeg_camera(jpegs, port=port):
            wait_until(lambda: request.lines() > 10)
            (row,) = request.end().values()
    assert int(row["answered"]) > 0
    assert "hunter2" not in request.stderr() + done.stderr


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_live_camera_never_stops_retrying(fake: FakeServer, jpegs: list[bytes], tmp_path: Path) -> None:
    """The run of a file ends after --server-wait, see tests/resilience/test_restarts.py."""
    with (
        mjpeg_camera(jpegs, fps=5) as camera,
        running(fake, tmp_path, "--input", camera.url, "--server-wait", "1") as request,
    ):
        request.wait_until(lambda: [line["outcome"] for line in request.results()].count("failed") > 3)
        fake.behaviour = "good"
        request.wait_until(lambda: request.answered(camera.url) != [])
        request.end()


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_no_thread_is_left(fake: FakeServer, short_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import request as request_py

    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own Ctrl-C
    before = set(threading.enumerate())
    assert request_py.main(["--url", fake.url, "--input", str(short_clip), "--quiet"]) == 0
    wait_until(lambda: not [t for t in set(threading.enumerate()) - before if "process_request" not in t.name])
