"""Frames, images and videos for the tests: read, encoded and written."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.node import PROJECT

Pixels = npt.NDArray[np.uint8]  # (height, width, 3), BGR

CLIP = PROJECT / "data" / "sample_video.mp4"
CATS = {"tabby", "tiger_cat", "Egyptian_cat"}  # what the sample clip shows


def frames_of(video: Path) -> list[Pixels]:
    """Return a video's frames."""
    capture = cv2.VideoCapture(str(video))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1].astype(np.uint8, copy=False))
    capture.release()
    return frames


def small(frame: Pixels) -> Pixels:
    """Return a frame as 320 x 240 pixels: a quarter of the work of the sample clip's."""
    return np.asarray(cv2.resize(frame, (320, 240)), np.uint8)


def write_video(path: Path, frames: Iterable[Pixels], fps: float) -> Path:
    """Write frames of one size as a video; return its path."""
    writer: cv2.VideoWriter | None = None
    for frame in frames:
        if writer is None:
            size = (frame.shape[1], frame.shape[0])
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
        writer.write(frame)
    assert writer is not None
    writer.release()
    return path


def jpeg(frame: Pixels) -> bytes:
    """Encode a frame as request.py does."""
    return cv2.imencode(".jpg", frame)[1].tobytes()


def decoded(image: bytes) -> Pixels:
    """Return the pixels of a JPEG or PNG."""
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    return np.asarray(pixels, np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as a file of some format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_json(*images: bytes) -> dict[str, Any]:
    """Return a JSON batch of encoded images."""
    return {str(index): base64.b64encode(image).decode() for index, image in enumerate(images)}
