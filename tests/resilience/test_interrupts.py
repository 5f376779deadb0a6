"""request.py that is interrupted: it waits for the requests in flight, and its counts add up."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo.node import PROJECT, free_ports
from tests.support.fake_server import FakeServer
from tests.support.frames import Pixels, jpeg, small
from tests.support.mjpeg_camera import mjpeg_camera
from tests.support.scripts import outputs, running, started, summary, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_interrupted_at_any_moment_the_counts_add_up(
    fake: FakeServer, clip: list[Pixels], long_clip: Path, tmp_path: Path
) -> None:
    chance = random.Random(3)
    with mjpeg_camera([jpeg(small(frame)) for frame in clip[:50]], fps=50) as camera:
        for attempt in range(12):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            flags = [[], ["--client-batching"], ["--drop", "none"], ["--fps", "max"]][attempt % 4]
            inputs = ["--loop", "--input", camera.url, "--input", str(long_clip)]
            with running(fake, folder, *inputs, *flags) as request:
                moment = chance.choice([0, 0, 1, 10, 50, 100])
                wait_until(lambda run=request, moment=moment: run.output.exists() and run.lines() >= moment)  # type: ignore[misc]
                found = request.end(chance.choice([signal.SIGINT, signal.SIGTERM]))
            assert list(found) == [camera.url, str(long_clip)]
            assert all(row["failed"] == "0" for row in found.values()), request.stderr()
            assert "Traceback" not in request.stderr()


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_completes_the_requests_in_flight(
    fake: FakeServer, long_clip: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A frame that was sent is answered 0.5 s later; one that was read but not sent is dropped."""
    command = [sys.executable, str(PROJECT / "request.py"), "--url", fake.url, "--input", str(long_clip)]
    printed = tmp_path / "stdout"
    with (
        printed.open("w") as stdout,
        started([*command, "--log-every", "10"], stdout=stdout, stderr=subprocess.PIPE) as process,
    ):
        wait_until(lambda: "frame number 10 " in printed.read_text())
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    row = summary(errors)[str(long_clip)]
    assert row["failed"] == "0"
    assert int(row["captured"]) < 100
    # The last output has the last predictions; frames that were dropped after them have none.
    assert 10 <= outputs(printed.read_text())[-1].number <= int(row["captured"])
    assert fake.frames_asked == int(row["answered"])


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_second_interrupt_does_not_wait_for_responses(fake: FakeServer, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "request.py"), "--url", f"http://127.0.0.1:{fake.server_port}"]
    with started(command, cwd=tmp_path) as process:
        wait_until(lambda: fake.frames_asked > 0)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)  # It waits for the response to the request in flight.
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT


def test_interrupted_while_waiting_for_a_server(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, str(PROJECT / "request.py"), "--url", address]
    with started(command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert "is not responding (Connection refused)" in process.stderr.readline().replace("[Errno 111] ", "")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
