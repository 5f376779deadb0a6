"""Results of frames, as the unit tests of what counts and shows them need them."""

import numpy as np

from edge.cameras import Camera, Frame
from edge.stats import Result
from tests.support.frames import CLIP, jpeg

FILE = Camera(str(CLIP))
LIVE = Camera("rtsp://admin:hunter2@cam/live?channel=1")
CAT = {"cat": 0.75, "dog": 0.25}


def result(number: int, camera: Camera = FILE, at: float = 0.0, shade: int = 128) -> Result:
    """Return an answered frame, of an even shade of grey."""
    image = jpeg(np.full((48, 64, 3), shade, np.uint8))
    return Result(Frame(camera, number, at, image), "answered", CAT, latency_s=0.1, shared_by=4)
