"""What a response of the server means: the result of each frame, or a reason to retry."""

import re
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from edge.errors import ServerError
from edge.frames import Frame, Result

BATCH_HEADER = "X-Forward-Batch-Size"  # the number of frames in the forward pass; set by handler.py
MAX_REQUEST_FRAMES = 256  # of a server that states no number, and of a clip
MAX_REQUEST_PIXELS = 4 * 7680 * 4320  # of a server that states no number
MIN_REQUEST_PIXELS = 3840 * 2160  # of any server: create_mar_file.py sets no lower limit
POSE_ESTIMATION = "pose-estimation"
# The server is busy (503: its queue is full), lost a worker (500, 507), or a proxy can't reach it.
TRANSIENT = frozenset({429, 500, 502, 503, 504, 507})
TOO_LARGE = "413 the request is larger than the server accepts: use a smaller --batch_size or --resize"
MAX_ERROR_CHARACTERS = 300
WORKERS = "if the workers of the model can't start, TorchServe's logs/model_log.log has the cause"


@dataclass(frozen=True)
class ModelInfo:
    """What the server states of a model in the headers of its responses. The defaults are for one that states nothing.

    runtime: what runs the network, and its precision.
    batch_size: of TorchServe, in requests.
    max_frames, max_pixels: of a request.
    clip_frames, frame_rate: of a clip, frames a second; a clip of one frame is a single image.
    """

    task: str = "image-classification"
    runtime: str = ""
    batch_size: int = MAX_REQUEST_FRAMES
    max_frames: int = MAX_REQUEST_FRAMES
    max_pixels: int = MAX_REQUEST_PIXELS
    clip_frames: int = 1
    frame_rate: float = 0.0

    @property
    def interval_s(self) -> float:
        """Return the seconds between two frames of a clip, 0.0 if the model gets all frames."""
        return 1 / self.frame_rate if self.frame_rate else 0.0

    @classmethod
    def of(cls, response: requests.Response) -> "ModelInfo":
        """Return what a response states. Values that no model can need are replaced by the defaults."""

        def number(name: str, default: float, digits: int = 4) -> float:
            text = response.headers.get(f"X-Model-{name}", "")
            return float(text) if re.fullmatch(rf"[0-9]{{1,{digits}}}(\.[0-9]{{1,3}})?", text) else default

        limits = [int(number(name, MAX_REQUEST_FRAMES)) for name in ("Batch-Size", "Max-Frames")]
        batch_size, max_frames = [min(max(limit, 1), MAX_REQUEST_FRAMES) for limit in limits]
        max_pixels = int(number("Max-Pixels", MAX_REQUEST_PIXELS, digits=9))
        max_pixels = min(max(max_pixels, MIN_REQUEST_PIXELS), MAX_REQUEST_PIXELS)
        clip_frames, frame_rate = min(int(number("Clip-Frames", 1)), max_frames), number("Frame-Rate", 0)
        clip = (clip_frames, frame_rate) if clip_frames > 1 and frame_rate > 0 else (1, 0.0)
        task = response.headers.get("X-Model-Task", "")
        named = task if re.fullmatch("[a-z-]{1,40}", task) else cls.task
        runtime = response.headers.get("X-Model-Runtime", "")
        shown = runtime if re.fullmatch("[a-z0-9 ]{1,40}", runtime) else ""
        return cls(named, shown, batch_size, max_frames, max_pixels, *clip)


def parse_response(
    response: requests.Response, frames: Sequence[Frame], is_batch: bool, task: str = ModelInfo.task
) -> list[Result]:
    """Return one result for each frame, in the order sent, whatever the response is."""
    received_at = time.monotonic()
    body = json_body(response)
    predictions = body if is_batch else [body]
    error = None
    if response.status_code == requests.codes.request_entity_too_large:
        error = TOO_LARGE
    elif response.status_code != requests.codes.ok:
        error = reason(response)
    elif body is None:
        error = "unexpected response: expected predictions as JSON"
    elif not isinstance(predictions, list) or len(predictions) != len(frames):
        error = f"unexpected response: expected {len(frames)} predictions"
    if error:
        return [Result.failed(frame, error) for frame in frames]
    header = response.headers.get(BATCH_HEADER, "")
    batch_size = int(header) if re.fullmatch(r"[1-9][0-9]{0,8}", header) else None
    return [
        Result(frame, "answered", prediction, None, received_at - frame.captured_at, batch_size)
        if is_prediction(prediction, task)
        else Result.failed(frame, frame_error(prediction, task))
        for frame, prediction in zip(frames, predictions, strict=True)
    ]


def is_prediction(value: Any, task: str) -> bool:
    """Whether a value is a prediction of a task: a dict label -> probability, or a list of persons."""
    if task == POSE_ESTIMATION:
        return isinstance(value, list) and all(map(is_person, value))
    return isinstance(value, dict) and bool(value) and are_numbers(list(value.values()))


def is_person(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("keypoints"), dict):
        return False
    keypoints = list(value["keypoints"].values())
    return (
        are_numbers([value.get("score")], 1)
        and are_numbers(value.get("box"), 4)
        and all(are_numbers(point, 3) for point in keypoints)
    )


def are_numbers(values: Any, count: int | None = None) -> bool:
    """Whether a value is a list of numbers that a float can hold (1e999 is valid JSON)."""
    return (
        isinstance(values, list)
        and len(values) == (len(values) if count is None else count)
        and all(isinstance(n, float | int) and abs(n) <= sys.float_info.max for n in values)
    )


def frame_error(value: Any, task: str) -> str:
    """Return why a frame of a JSON batch has no prediction: the server writes {"error": text} in its place."""
    text = value.get("error") if isinstance(value, dict) else None
    expected = "a list of persons" if task == POSE_ESTIMATION else "label -> probability"
    return one_line(text) if isinstance(text, str) else f"unexpected response: expected {expected}"


def json_body(response: requests.Response) -> Any:
    """Return the parsed body, None if it is not JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def error_fields(response: requests.Response) -> dict[str, Any]:
    """Return the JSON object of an error response, {} if there is none. TorchServe's has code, type and message."""
    body = None if response.ok else json_body(response)
    return body if isinstance(body, dict) else {}


def reason(response: requests.Response) -> str:
    """Return in one line what an error response says."""
    fields = error_fields(response)
    text = fields.get("error") or fields.get("message") or response.reason or ""
    return f"{response.status_code} {one_line(str(text))}".rstrip()


def one_line(text: str) -> str:
    """Return text of a server so that it can be shown on a terminal."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())[:MAX_ERROR_CHARACTERS]


def is_auth_error(response: requests.Response) -> bool:
    """Whether TorchServe, or a proxy in front of it, rejects the token."""
    return (
        response.status_code == requests.codes.unauthorized
        or error_fields(response).get("type") == "InvalidKeyException"
    )


def is_transient(response: requests.Response | None, error: BaseException | None) -> bool:
    """Whether the same request may succeed later. RetrySession decides about rejected tokens."""
    if response is not None:
        return response.status_code in TRANSIENT
    transient = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, transient) and not is_permanent(error)


def is_permanent(error: BaseException) -> bool:
    """Whether a connection fails for good: a certificate that is not trusted, or no TLS at all."""
    closed = ssl.SSLEOFError | ssl.SSLZeroReturnError
    return any(isinstance(cause, ssl.SSLError) and not isinstance(cause, closed) for cause in causes(error))


def connection_error(url: str, error: OSError) -> ServerError:
    """Return the error that explains why there is no response at all."""
    cause = root_cause(error)
    if is_permanent(error):
        return ServerError(f"no trusted TLS connection to {url}: {cause} (REQUESTS_CA_BUNDLE names what to trust)")
    if isinstance(error, requests.ReadTimeout):
        return ServerError(f"the server at {url} does not respond ({cause}): {WORKERS}")
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return ServerError(f"no server at {url} ({cause}): start TorchServe, or pass its address as --url")
    return ServerError(f"can't use {url}: {cause}")


def root_cause(error: BaseException) -> str:
    """Return the message of the innermost error."""
    *_, cause = causes(error)
    return one_line(str(cause)) or type(cause).__name__


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: requests wraps urllib3, which wraps the operating system."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        inner = [getattr(cause, "reason", None), cause.__cause__, cause.__context__, *cause.args]
        cause = next((each for each in inner if isinstance(each, BaseException)), None)
