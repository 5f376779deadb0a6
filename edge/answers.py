"""What a server's answer says: of every frame, whatever the answer is."""

import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import requests

from edge.cameras import Frame
from edge.stats import Result

BATCH_HEADER = "X-Forward-Batch-Size"  # how many frames shared the forward pass; set by handler.py


def read_results(response: requests.Response, frames: Sequence[Frame], as_json: bool) -> list[Result]:
    """Return what an answer says of each of its frames, in the order sent, whatever the answer is."""
    now = time.monotonic()
    if response.status_code != requests.codes.ok:
        return failed(frames, f"{response.status_code} {error_text(response)}")
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return failed(frames, "the answer is not JSON")
    answers = body if as_json else [body]
    if not isinstance(answers, list) or len(answers) != len(frames):
        return failed(frames, f"the answer does not fit: expected {len(frames)} predictions")
    shared = response.headers.get(BATCH_HEADER, "")
    shared_by = int(shared) if re.fullmatch(r"[1-9][0-9]{0,8}", shared) else None
    results = []
    for frame, answer in zip(frames, answers, strict=True):
        if is_prediction(answer):
            results.append(Result(frame, "answered", answer, None, now - frame.captured_at, shared_by))
        elif isinstance(answer, dict) and isinstance(answer.get("error"), str):
            results.append(Result(frame, "failed", error=one_line(answer["error"])))
        else:
            results.append(Result(frame, "failed", error="the answer does not fit: expected label -> probability"))
    return results


def failed(frames: Sequence[Frame], error: str) -> list[Result]:
    """Return the results of frames that failed for one reason."""
    return [Result(frame, "failed", error=error) for frame in frames]


def is_prediction(answer: Any) -> bool:
    """Whether an answer is a dict label -> probability, of numbers that a float can hold."""
    return (
        isinstance(answer, dict)
        and bool(answer)
        and all(isinstance(value, float | int) and abs(value) <= sys.float_info.max for value in answer.values())
    )


def error_body(response: requests.Response) -> dict[str, Any]:
    """Return the JSON object of an error answer, {} if there is none."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def error_type(response: requests.Response) -> str:
    """Return TorchServe's own name of an error, such as InvalidKeyException, "" if the answer is none."""
    return "" if response.ok else str(error_body(response).get("type", ""))


def refuses_token(response: requests.Response) -> bool:
    """Whether an answer says that our token, or that we have none, is wrong: TorchServe's own, or a proxy's."""
    return response.status_code == requests.codes.unauthorized or error_type(response) == "InvalidKeyException"


def error_text(response: requests.Response) -> str:
    """Return what an error answer says."""
    body = error_body(response)
    return one_line(str(body.get("error") or body.get("message") or response.reason))


def one_line(text: str) -> str:
    """Return a server's text as a terminal can show it."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())[:300]
