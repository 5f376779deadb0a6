"""What moves through the pipeline: a frame of a camera, and the result for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from edge.cameras import Camera

DropPolicy = Literal["oldest", "newest", "none"]
Outcome = Literal["answered", "failed", "dropped", "expired"]
Prediction = dict[str, float]  # label -> probability


@dataclass(frozen=True)
class Image:
    """An image as it was read; the times are those of a Frame.

    pixels: (height, width, 3) uint8 BGR. None if it was read so late that it is not worth decoding.
    """

    captured_at: float
    position_s: float | None
    pixels: Any


@dataclass(frozen=True)
class Frame:
    """One frame of a camera: its number from 1 in the order read, and its JPEG.

    captured_at: when it was read from a file, or arrived from a live source, time.monotonic() seconds.
    position_s: where it is in its file, in seconds; None for a live source.
    jpeg: empty if it is not to be sent.
    """

    camera: Camera
    number: int
    captured_at: float
    jpeg: bytes
    position_s: float | None = None


@dataclass(frozen=True)
class Result:
    """The outcome of a frame. Every captured frame gets one.

    predictions, latency_s: of an answered frame; latency_s is the time from capture to response.
    error: of any other frame, the reason, with the HTTP status if there was one.
    batch_size: the number of frames in the forward pass, if the server states it.
    """

    frame: Frame
    outcome: Outcome
    predictions: Prediction | None = None
    error: str | None = None
    latency_s: float | None = None
    batch_size: int | None = None

    @classmethod
    def failed(cls, frame: Frame, error: str) -> Result:
        return cls(frame, "failed", error=error)

    @classmethod
    def not_sent(cls, frame: Frame, outcome: Outcome, error: str) -> Result:
        return cls(frame, outcome, error=error).without_image()

    def without_image(self) -> Result:
        """Return the result without the frame's JPEG, which takes memory while the result waits."""
        return replace(self, frame=replace(self.frame, jpeg=b""))
