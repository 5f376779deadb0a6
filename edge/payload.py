"""The size of requests: what a server accepts, and how a clip is made to fit."""

import math
import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

MAX_BODY_BYTES = 6_553_500  # max_request_size of TorchServe, unless its configuration says otherwise
# The start of a frame in a JPEG: its precision of 8 bits, its height and its width.
SIZE = re.compile(rb"\xff[\xc0-\xc2]..\x08(..)(..)", re.DOTALL)


def json_size(jpegs: Sequence[bytes]) -> int:
    """Return the bytes that a JSON batch of JPEGs has at most."""
    return sum(4 * (len(jpeg) // 3 + 1) + len('"9999": "", ') for jpeg in jpegs) + len("{}")


def is_too_large(jpegs: Sequence[bytes], max_pixels: int) -> bool:
    """Whether a JSON batch of JPEGs has too many bytes or pixels."""
    return json_size(jpegs) > MAX_BODY_BYTES or sum(map(pixels, jpegs)) > max_pixels


def fitting(jpegs: Sequence[bytes], max_pixels: int) -> Sequence[bytes]:
    """Return the JPEGs of a clip, with half the width and height as often as needed for one request.

    A clip can't be divided, and its network sees small frames.
    """
    while is_too_large(jpegs, max_pixels):
        jpegs = [half_size(jpeg) for jpeg in jpegs]
    return jpegs


def pixels(jpeg: bytes) -> int:
    """Return the number of pixels of a JPEG of OpenCV, which states them in its first bytes; 0 if it is none."""
    size = SIZE.search(jpeg, 0, 1000)
    return math.prod(int.from_bytes(edge, "big") for edge in size.groups()) if size else 0


def half_size(jpeg: bytes) -> bytes:
    """Return a JPEG with half the width and height, in OpenCV's quality of 95."""
    image: Any = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
    return cv2.imencode(".jpg", image)[1].tobytes()
