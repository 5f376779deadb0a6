"""What clients send: requests of frames, and what may be wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.images import MAX_PIXELS, decode_body, open_image

MAX_REQUEST_PIXELS = 4 * MAX_PIXELS  # of all frames of a request
NO_FRAMES = 'no frames: expected an image, or a JSON object of base64-encoded images: {"0": "...", "1": "..."}'


# An error is kept as text: an exception would keep the code it came through, and with it all of the request, until the
# garbage collector runs. The text before its colon is one of few, which the metrics count.
@dataclass
class Frame:
    """The file of an image, or the reason why it can't be read."""

    file: bytes | bytearray
    error: str = ""


@dataclass
class Clip:
    """Frames that get one prediction together. batch_size: the number of all frames that shared their batch."""

    frames: Sequence[Frame]
    prediction: Any = None
    batch_size: int = 0

    @property
    def error(self) -> str:
        """The reason why a frame of the clip can't be read, if there is one."""
        return next((frame.error for frame in self.frames if frame.error), "")

    def results(self) -> list[Any]:
        """Return the prediction, or the error, of each frame."""
        if not self.error:
            return [self.prediction] * len(self.frames)
        return [{"error": frame.error or f"a frame of its clip can't be read: {self.error}"} for frame in self.frames]


@dataclass
class Rejection:
    """Why a request gets no predictions: an HTTP status, and the reason in one line."""

    status: int
    reason: str


@dataclass
class Request:
    """The clips of a request, or why it is rejected. is_batch: the response is a list."""

    clips: list[Clip] = field(default_factory=list)
    is_batch: bool = False
    rejection: Rejection | None = None

    def response(self) -> Any:
        """Return the predictions of the frames as they are sent, or a Rejection."""
        if self.rejection:
            return self.rejection
        results = [result for clip in self.clips for result in clip.results()]
        errors = [frame.error for clip in self.clips for frame in clip.frames if frame.error]
        if len(errors) < len(results):
            return results if self.is_batch else results[0]
        which = f"none of {len(results)} frames can be read; the first: " if self.is_batch else ""
        return Rejection(400, which + errors[0])


def parse_request(row: dict[str, Any], headers: dict[str, Any], clip_frames: int, max_frames: int) -> Request:
    """Return a request of at most `max_frames` frames, in clips of `clip_frames`.

    row: what TorchServe has of the request, with its body under "body", or under "data" if it came as a form.
    """
    body = row.get("data", row.get("body"))
    if "True" in (headers.get("explain"), headers.get("describe")):
        return Request(rejection=Rejection(400, "not explained: there are predictions only"))
    files = list(body.values()) if isinstance(body, dict) else [body]
    if not files or not isinstance(body, (dict, bytes, bytearray)):
        return Request(rejection=Rejection(400, NO_FRAMES))
    if len(files) > max_frames:
        reason = f"too many frames: {len(files)}, expected at most {max_frames} in a request"
        return Request(rejection=Rejection(413, reason))
    frames, pixels = [Frame(b"") for _ in files], 0
    for frame, file in zip(frames, files):
        try:
            frame.file = decode_body(file)
            with open_image(frame.file) as image:
                pixels += image.width * image.height  # Closed again: what Pillow keeps of it can be large.
        except ValueError as error:
            frame.file, frame.error = b"", str(error)
        if pixels > MAX_REQUEST_PIXELS:
            reason = f"too many pixels in a request: over {MAX_REQUEST_PIXELS:,}, send fewer or smaller frames"
            return Request(rejection=Rejection(413, reason))
    clips = [Clip(frames[start : start + clip_frames]) for start in range(0, len(frames), clip_frames)]
    return Request(clips, isinstance(body, dict))
