"""request.py --show: a window on a virtual screen, and none where there is no screen."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.node import PROJECT
from tests.support.fake_server import FakeServer
from tests.support.frames import CLIP
from tests.support.programs import needs
from tests.support.scripts import books, run, started, wait_until

WINDOWS = PROJECT / ".venv" / "window"  # OpenCV with windows, put there by the Makefile
no_windows = pytest.mark.skipif(not WINDOWS.is_dir(), reason="OpenCV with windows is missing: make .venv/dev")


@pytest.fixture
def display() -> Iterator[str]:
    """A virtual screen, as the variable DISPLAY names it."""
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "800x600x24", "-nolisten", "tcp", "-noreset"]
    with subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL) as process:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            number = pipe.readline().strip()
        yield f":{number}"
        process.terminate()


@needs("Xvfb", "xdotool")
@no_windows
@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_window_shows_the_frames_until_q_is_pressed(display: str, fake: FakeServer, tmp_path: Path) -> None:
    environment = os.environ | {"DISPLAY": display, "PYTHONPATH": str(WINDOWS)}
    command = [sys.executable, str(PROJECT / "request.py"), "--url", fake.url, "--show", "--loop", "--quiet"]
    find = ["xdotool", "search", "--name", CLIP.name]
    with (
        (tmp_path / "errors").open("w") as errors,
        started(command, cwd=tmp_path, env=environment, stderr=errors) as process,
    ):
        wait_until(lambda: subprocess.run(find, env=environment, capture_output=True).returncode == 0)
        time.sleep(1)
        assert process.poll() is None
        subprocess.run([*find, "windowfocus", "key", "q"], env=environment, check=True)
        assert process.wait(timeout=120) == 0
    (book,) = books((tmp_path / "errors").read_text()).values()
    assert int(book["answered"]) > 0


@pytest.mark.parametrize("path", ["", pytest.param(str(WINDOWS), marks=no_windows)], ids=["headless", "no display"])
@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_window_that_cannot_be_opened_is_a_clear_error(path: str, fake: FakeServer, tmp_path: Path) -> None:
    environment = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "PYTHONPATH": path}
    done = run("request.py", "--url", fake.url, "--show", cwd=tmp_path, environment=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("request.py: --show can't open a window (")
    assert ("could not connect to display" if path else "The function is not implemented") in done.stderr
    assert len(done.stderr.splitlines()) == 1
