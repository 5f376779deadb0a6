"""The size of requests: what a server accepts, and how a clip is made to fit."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

MAX_BODY_BYTES = 6_553_500  # max_request_size of TorchServe, unless its configuration says otherwise
MAX_REQUEST_PIXELS = 4 * 7680 * 4320  # of server/requests.py


def json_size(jpegs: Sequence[bytes]) -> int:
    """Return the bytes that a JSON batch of JPEGs has at most."""
    return sum(4 * (len(jpeg) // 3 + 1) + len('"9999": "", ') for jpeg in jpegs) + len("{}")


def fitting(jpegs: Sequence[bytes]) -> Sequence[bytes]:
    """Return the JPEGs of a clip, with half the width and height as often as needed for one request.

    A clip can't be divided, and its network sees small frames. All frames have the size of the first.
    """
    while json_size(jpegs) > MAX_BODY_BYTES or len(jpegs) * pixels(jpegs[0]) > MAX_REQUEST_PIXELS:
        jpegs = [half_size(jpeg) for jpeg in jpegs]
    return jpegs


def pixels(jpeg: bytes) -> int:
    """Return the number of pixels of a JPEG, to a multiple of 8 of each edge."""
    eighth: Any = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    return 64 * int(eighth.size)


def half_size(jpeg: bytes) -> bytes:
    """Return a JPEG with half the width and height, in OpenCV's quality of 95."""
    image: Any = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
    return cv2.imencode(".jpg", image)[1].tobytes()
