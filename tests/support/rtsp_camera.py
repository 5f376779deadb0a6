"""RTSP cameras for the tests, see rtsp_server.py, and the time that their frames show."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from edge.frames import Frame
from tests.support.programs import SYSTEM_PYTHON
from tests.support.scripts import started

CELL = 16  # pixels, see rtsp_server.py


class RtspCamera:
    """A running camera."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout
        self.process = process
        self.port = int(process.stdout.readline())
        self.url = f"rtsp://127.0.0.1:{self.port}/live"

    def stall(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def rtsp_camera(*flags: str) -> Iterator[RtspCamera]:
    """Run a camera until the block ends."""
    command = [SYSTEM_PYTHON, str(Path(__file__).with_name("rtsp_server.py")), *flags]
    with started(command, stdout=subprocess.PIPE) as process:
        yield RtspCamera(process)


def delay_s(frame: Frame) -> float:
    """Return how much later than it was made a frame was captured, by its time."""
    image = cv2.imdecode(np.frombuffer(frame.jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert image is not None
    half = CELL // 2
    cells = image[half : 2 * CELL : CELL, half : 16 * CELL : CELL].flatten() > 128
    made_ms = sum(1 << bit for bit, is_white in enumerate(cells) if is_white)
    return ((round(1000 * frame.captured_at) - made_ms + (1 << 31)) % (1 << 32) - (1 << 31)) / 1000
