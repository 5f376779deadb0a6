"""What moves through the pipeline: a frame of a camera on its way to a model, and the result for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from edge.cameras import Camera

DropPolicy = Literal["oldest", "newest", "none"]
Outcome = Literal["answered", "failed", "dropped", "expired", "unchanged"]
# label -> probability; of pose estimation a list of persons: score, box and keypoints in pixels of the frame
Prediction = dict[str, float] | list[dict[str, Any]]


@dataclass(frozen=True)
class Stream:
    """The frames of one camera for one model. Each stream has its own queue, order and stats."""

    camera: Camera
    model: str

    def name(self, models: Collection[str]) -> str:
        """Return what to call the stream, in a run with these models."""
        return f"{self.camera.name}, {self.model}" if len(models) > 1 else self.camera.name


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
    is_first: of a camera that was not there, or was lost.
    small: a small grey image, to compare it with other frames; None if they are not compared.
    model, order: the model it is for, and its number from 1 in this stream. A model may get fewer frames than are read.
    """

    camera: Camera
    number: int
    captured_at: float
    jpeg: bytes
    position_s: float | None = None
    model: str = ""
    order: int = 0
    is_first: bool = False
    small: Any = None

    @property
    def stream(self) -> Stream:
        return Stream(self.camera, self.model)

    @property
    def time_s(self) -> float:
        """Return when the frame was taken, in seconds of its file or of time.monotonic()."""
        return self.captured_at if self.position_s is None else self.position_s


@dataclass(frozen=True)
class Result:
    """The outcome of a frame. It gets one of each model that it is for.

    predictions, latency_s: of an answered frame; latency_s is the time from capture to response.
    error: of any other frame, the reason, with the HTTP status if there was one; None if the frame is unchanged.
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
    def not_sent(cls, frame: Frame, outcome: Outcome, error: str | None = None) -> Result:
        return cls(frame, outcome, error=error).without_image()

    def without_image(self) -> Result:
        """Return the result without the frame's images, which take memory while the result waits."""
        return replace(self, frame=replace(self.frame, jpeg=b"", small=None))
