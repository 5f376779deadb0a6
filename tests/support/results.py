"""Results of frames, for the unit tests of what counts, prints and writes them."""

import numpy as np

from edge.cameras import Camera
from edge.frames import Frame, Result
from tests.support.frames import CLIP, jpeg

FILE = Camera(str(CLIP))
LIVE = Camera("rtsp://admin:hunter2@cam/live?channel=1")
MODEL = "resnet-18"
CAT = {"cat": 0.75, "dog": 0.25}


def position_s(camera: Camera, number: int) -> float | None:
    """Return where a frame is in a file of constant rate."""
    return None if camera.is_live else (number - 1) / camera.fps


def result(number: int, camera: Camera = FILE, at: float = 0.0, shade: int = 128, model: str = MODEL) -> Result:
    """Return the result of an answered frame, whose image is an even shade of grey."""
    image = jpeg(np.full((48, 64, 3), shade, np.uint8))
    frame = Frame(camera, number, at, image, position_s(camera, number), model, number)
    return Result(frame, "answered", CAT, latency_s=0.1, batch_size=4)


def dropped(number: int, camera: Camera = FILE, at: float = 0.0, model: str = MODEL) -> Result:
    """Return the result of a frame that was dropped, which has no image."""
    frame = Frame(camera, number, at, b"jpeg", position_s(camera, number), model, number)
    return Result.not_sent(frame, "dropped", "buffer full")
