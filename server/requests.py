"""What clients send: requests of frames, and what may be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.images import decode_body, open_image

NO_FRAMES = 'no frames: expected an image, a form with one file, or application/json: {"0": "<base64 of an image>"}'


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
        others = f"a frame of its clip can't be read: {self.error}"
        return [{"error": frame.error or others} if self.error else self.prediction for frame in self.frames]


@dataclass
class Request:
    """The clips of a request, or its HTTP status and why it is rejected. is_batch: the response is a list."""

    clips: list[Clip] = field(default_factory=list)
    is_batch: bool = False
    status: int = 200
    error: str = ""

    def response(self) -> Any:
        """Return the predictions of the frames in the order sent. Without any the request is rejected."""
        results = [result for clip in self.clips for result in clip.results()]
        errors = [frame.error for clip in self.clips for frame in clip.frames if frame.error]
        if results and len(errors) == len(results):
            which = f"none of {len(results)} frames can be read; the first: " if self.is_batch else ""
            self.status, self.error = 400, which + errors[0]
        if self.error:
            return json.dumps({"error": self.error})  # TorchServe would spread a dict over many lines.
        return results if self.is_batch else results[0]


def parse_request(row: dict[str, Any], headers: dict[str, Any], limits: tuple[int, int, int]) -> Request:
    """Return the request of which TorchServe has the body under "body", or the parts of a form under their names.

    limits: the frames of a clip, of a request at most, and the pixels of a request at most.
    """
    clip_frames, max_frames, max_pixels = limits
    types = {name: value["content-type"] for name, value in headers.items() if isinstance(value, dict)}
    files = [name for name, kind in types.items() if kind and name in row]
    name = next((name for name in ("data", "body") if name in row), files[0] if len(files) == 1 else "")
    # TorchServe takes JSON of curl, which has the type of a form, for the name of a part.
    body, reason = row[name] if name else next(iter(row), ""), ""
    if "json" in (types.get(name) or "").lower() and isinstance(body, (bytes, bytearray)):
        try:  # TorchServe's own parser accepts no line breaks in a string, such as base64 has.
            body = json.loads(body.decode("utf-8-sig"), strict=False)
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}"
    elif isinstance(body, (str, bytes, bytearray)) and body.lstrip()[:1] in ("{", "[", b"{", b"["):
        reason = "JSON without its content type: expected the header Content-Type: application/json"
    if "True" in (headers.get("explain"), headers.get("describe")):
        return Request(status=400, error="not explained: there are predictions only")
    images = list(body.values()) if isinstance(body, dict) else [body]
    if not images or not isinstance(body, (dict, bytes, bytearray)):
        return Request(status=400, error=reason or NO_FRAMES)
    if len(images) > max_frames:
        return Request(status=413, error=f"too many frames: {len(images)}, expected at most {max_frames} in a request")
    frames, pixels = [Frame(b"") for _ in images], 0
    for frame, image in zip(frames, images):
        try:
            frame.file = decode_body(image)
            with open_image(frame.file) as opened:
                pixels += opened.width * opened.height  # Closed again: what Pillow keeps of it can be large.
        except ValueError as error:
            frame.file, frame.error = b"", str(error)
        if pixels > max_pixels:
            return Request(status=413, error=f"too many pixels in a request: expected at most {max_pixels:,}")
    if reason and frames[0].error.startswith("not an image"):
        frames[0].error = reason
    clips = [Clip(frames[start : start + clip_frames]) for start in range(0, len(frames), clip_frames)]
    return Request(clips, isinstance(body, dict))
