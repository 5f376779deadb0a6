"""request.py with cameras as they are: several of them, faster than the server, lost and back, ended at any moment."""

import fcntl
import hashlib
import os
import pty
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from deploy.node import PROJECT, Node, free_ports
from tests.conftest import CLIP, frames_of, jpeg, wait_until
from tests.fake_server import FakeServer
from tests.mjpeg_camera import mjpeg_camera
from tests.scripts import books, json_lines, longest_gap, outputs, run, running

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@pytest.fixture(scope="module")
def pictures(clip: list[npt.NDArray[np.uint8]]) -> list[bytes]:
    """The clip in small, as a camera would send it."""
    return [jpeg(np.asarray(cv2.resize(frame, (320, 240)), np.uint8)) for frame in clip]


def test_a_dead_camera_leaves_the_others_alone(node: Node, pictures: list[bytes], tmp_path: Path) -> None:
    """One camera is cut and comes back, one never answers, one stalls; the one that is well never misses a beat."""
    with (
        mjpeg_camera(pictures, fps=10) as first,
        mjpeg_camera(pictures, fps=10) as second,
        mjpeg_camera(pictures, fps=10) as dying,
        mjpeg_camera(pictures, fps=10) as mute,
    ):
        mute.mode = "mute"
        cameras = [first, second, dying, mute]
        with_passwords = [camera.url.replace("://", "://admin:hunter2@") for camera in cameras]
        inputs = [argument for url in with_passwords for argument in ("--input", url)]
        with running(node, tmp_path, *inputs) as request:
            wait_until(
                lambda: (
                    request.lines() > 0
                    and {line["camera"] for line in json_lines(request.output)} == {c.url for c in cameras[:3]}
                )
            )
            wait_until(lambda: request.lines() > 60)
            dying.mode = "cut"
            wait_until(lambda: f"{dying.url}: the camera is lost" in request.stderr())
            before = request.lines()
            wait_until(lambda: request.lines() > before + 100)
            dying.mode = "streaming"
            wait_until(lambda: f"{dying.url}: the camera is back" in request.stderr())
            second.mode = "stalled"
            wait_until(lambda: f"{second.url}: the camera is lost" in request.stderr())
            found = request.end()
        assert list(found) == [camera.url for camera in cameras]
        assert found[mute.url]["captured"] == "0"
        assert all(found[url]["failed"] == "0" for url in found)
        lines = json_lines(request.output)
        assert longest_gap(lines, first.url) < 2
        assert longest_gap(lines, dying.url) > 2
        assert "hunter2" not in request.stderr()
        assert "hunter2" not in request.output.read_text()


@pytest.mark.parametrize("fake", ["out of order"], indirect=True)
@pytest.mark.parametrize("flags", [[], ["--client-batching", "--batch-size", "3"]], ids=["single", "json"])
def test_every_answer_finds_its_own_frame(
    fake: FakeServer, flags: list[str], clip: list[npt.NDArray[np.uint8]], tmp_path: Path
) -> None:
    """Three files of different lengths, whose frames are mixed in the batches and answered in any order."""
    expected = {}
    for number, length in enumerate((10, 25, 40)):
        path = tmp_path / f"{number}.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 50, (320, 240))
        for image in clip[100 * number : 100 * number + length]:
            writer.write(cv2.resize(image, (320, 240)))
        writer.release()
        expected[str(path)] = [hashlib.sha256(jpeg(frame)).hexdigest() for frame in frames_of(path)]
    inputs = [argument for path in expected for argument in ("--input", path)]
    done = run(
        "request.py", "--url", fake.url, *inputs, *flags, "--quiet", "--jsonl", tmp_path / "out.jsonl", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    for camera, hashes in expected.items():
        assert [next(iter(line["predictions"])) for line in lines if line["camera"] == camera] == hashes
    assert all(book["captured"] == book["answered"] for book in books(done.stderr).values())
    if flags:
        assert fake.frames_asked < 75 / 2, "a batch holds frames of several cameras"


def test_server_that_is_slower_than_the_cameras(node: Node, pictures: list[bytes], tmp_path: Path) -> None:
    """For half a minute: memory flat, and 99 of 100 answers younger than the age limit."""
    with mjpeg_camera(pictures, fps=60) as first, mjpeg_camera(pictures, fps=60) as second:
        inputs = ["--input", first.url, "--input", second.url, "--max-age", "2000", "--max-in-flight", "8"]
        with running(node, tmp_path, *inputs) as request:
            wait_until(lambda: request.lines() > 500)
            sizes, end = [], time.monotonic() + 30
            while time.monotonic() < end:
                sizes.append(request.process.memory_info().rss)
                time.sleep(1)
            found = request.end()
    assert max(sizes) - sizes[0] < 20e6
    lines = json_lines(request.output)
    latencies = [line["latency_ms"] for line in lines if line["outcome"] == "answered"]
    assert len(latencies) > 500
    assert statistics.quantiles(latencies, n=100)[98] < 2000
    for book in found.values():
        assert int(book["dropped"]) > int(book["captured"]) / 10, "the cameras are faster"
        assert book["failed"] == "0"


def test_interrupted_at_any_moment_the_books_are_closed(node: Node, pictures: list[bytes], tmp_path: Path) -> None:
    chance = random.Random(3)
    with mjpeg_camera(pictures, fps=50) as camera:
        for attempt in range(20):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            flags = [[], ["--client-batching"], ["--drop", "none"], ["--fps", "max"]][attempt % 4]
            inputs = ["--input", camera.url, "--input", str(CLIP)]
            with running(node, folder, *inputs, *flags) as request:
                wait_until(lambda request=request: request.output.exists())  # type: ignore[misc]
                time.sleep(chance.uniform(0, 1.5))
                found = request.end(chance.choice([signal.SIGINT, signal.SIGTERM]))
            assert list(found) == [camera.url, str(CLIP)]
            assert all(book["failed"] == "0" for book in found.values()), request.stderr()
            assert "Traceback" not in request.stderr()


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_a_file_drops_only_what_it_is_asked_to(fake: FakeServer, drop: str, tmp_path: Path, short_clip: Path) -> None:
    """The clip is over in 0.2 s, in which the server takes 1 frame; 4 wait."""
    flags = ["--max-in-flight", "1", "--quiet", "--jsonl", str(tmp_path / "out.jsonl"), "--input", str(short_clip)]
    done = run("request.py", "--url", fake.url, *flags, "--drop", drop, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    answered = [line["frame"] for line in lines if line["outcome"] == "answered"]
    assert {line["error"] for line in lines if line["outcome"] == "dropped"} == {"buffer full"}
    assert len(lines) == 22
    assert 5 <= len(answered) <= 8
    assert (answered[-4:] == [19, 20, 21, 22]) == (drop == "oldest")
    assert (answered[:5] == [1, 2, 3, 4, 5]) == (drop == "newest")


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
def test_frames_that_became_too_old_are_not_sent(fake: FakeServer, tmp_path: Path, short_clip: Path) -> None:
    flags = ["--max-in-flight", "1", "--quiet", "--jsonl", str(tmp_path / "out.jsonl"), "--input", str(short_clip)]
    done = run("request.py", "--url", fake.url, *flags, "--max-age", "300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = json_lines(tmp_path / "out.jsonl")
    answered = [line for line in lines if line["outcome"] == "answered"]
    assert len(lines) == 22
    assert fake.frames_asked == len(answered) >= 2
    assert all(line["latency_ms"] < 300 + 500 + 200 for line in answered)
    assert {line["error"] for line in lines if line["outcome"] == "expired"} == {"older than 300 ms"}
    assert {line["outcome"] for line in lines} == {"answered", "expired"}


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_a_file_as_fast_as_the_server_answers(fake: FakeServer, tmp_path: Path) -> None:
    done = run("request.py", "--url", fake.url, "--fps", "max", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (book,) = books(done.stderr).values()
    assert (book["answered"], book["dropped"]) == ("375", "0")
    assert float(book["FPS"]) > 50


@pytest.mark.parametrize("fake", ["some fail"], indirect=True)
@pytest.mark.parametrize(("flags", "failed"), [([], 7), (["--client-batching", "--batch-size", "2"], 6)], ids=str)
def test_one_failed_frame_is_enough_for_exit_code_1(
    fake: FakeServer, flags: list[str], failed: int, short_clip: Path, tmp_path: Path
) -> None:
    done = run("request.py", "--url", fake.url, "--input", short_clip, *flags, cwd=tmp_path)
    assert done.returncode == 1
    (book,) = books(done.stderr).values()
    assert (book["answered"], book["failed"]) == (str(22 - failed), str(failed))
    assert f"{short_clip}: {failed} failed: 400 not an image" in done.stderr


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_json_lines_on_standard_output_are_alone_there(fake: FakeServer, short_clip: Path, tmp_path: Path) -> None:
    done = run("request.py", "--url", fake.url, "--input", short_clip, "--jsonl", "-", cwd=tmp_path)
    (tmp_path / "out.jsonl").write_text(done.stdout)
    assert len(json_lines(tmp_path / "out.jsonl")) == 22


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_output_on_a_full_disk_is_told_and_the_rest_goes_on(fake: FakeServer, short_clip: Path, tmp_path: Path) -> None:
    done = run("request.py", "--url", fake.url, "--input", short_clip, "--jsonl", "/dev/full", cwd=tmp_path)
    assert done.returncode == 1
    assert "/dev/full fails, going on without it: OSError: [Errno 28] No space left on device" in done.stderr
    assert outputs(done.stdout)[-1].number == 22
    (book,) = books(done.stderr).values()
    assert book["answered"] == "22"


def typed(command: list[str | Path], folder: Path) -> str:
    """Run request.py with standard error on a terminal; return what appears there."""
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
    assert process.wait(timeout=60) == 0
    return shown.decode()


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_progress_bar_of_a_file_on_a_terminal(fake: FakeServer, short_clip: Path, tmp_path: Path) -> None:
    shown = typed(["--url", fake.url, "--input", short_clip], tmp_path)
    assert re.search(r"22/22 .*frame/s, \d+\.\d FPS, \d+ ms\]", shown)
    done = run("request.py", "--url", fake.url, "--input", short_clip, cwd=tmp_path)
    assert "22/22" not in done.stderr


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_absent_camera_is_waited_for_unless_it_is_required(
    fake: FakeServer, pictures: list[bytes], tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    url = f"http://admin:hunter2@127.0.0.1:{port}/live"
    done = run("request.py", "--url", fake.url, "--input", CLIP, "--input", url, "--require-cameras", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"request.py: can't open http://127.0.0.1:{port}/live")
    assert fake.frames_asked == -1
    with running(fake, tmp_path, "--input", url) as request:
        wait_until(lambda: "the camera is not there" in request.stderr())
        with mjpeg_camera(pictures, port=port):
            wait_until(lambda: request.lines() > 10)
            (book,) = request.end().values()
    assert int(book["answered"]) > 0
    assert "hunter2" not in request.stderr() + done.stderr


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_no_thread_is_left(fake: FakeServer, short_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import request as request_py

    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own Ctrl-C
    before = set(threading.enumerate())
    assert request_py.main(["--url", fake.url, "--input", str(short_clip), "--quiet"]) == 0
    wait_until(lambda: not [t for t in set(threading.enumerate()) - before if "process_request" not in t.name])
