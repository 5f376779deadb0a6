"""edge/client.py called directly: its frames, its requests, and their results."""

import hashlib
import threading
import time
from dataclasses import replace
from typing import Any

from edge.auth import BearerToken
from edge.cameras import Camera
from edge.client import TorchServeClient
from edge.frames import Frame, Result
from edge.options import parse_args
from edge.timing import Timing

CAMERA = Camera("0")
IMAGES = [b"one", b"two", b"three", b"four", b"five"]


def new_client(url: str, stop: threading.Event, timing: Timing | None = None, **options: Any) -> TorchServeClient:
    """Return a client with at most 4 requests in flight, which are retried for 5 s, unless `options` say otherwise."""
    defaults: dict[str, Any] = {"management_url": None, "max_in_flight": 4, "server_wait_s": 5.0}
    flags = replace(parse_args(["--url", url]), **defaults | options)
    timing = timing or Timing()
    token = BearerToken(flags.token_file, flags.management_url, timing)
    return TorchServeClient(flags.model[0], token, flags, stop, timing)


def frames(images: list[bytes]) -> list[Frame]:
    return [Frame(CAMERA, number, time.monotonic(), image) for number, image in enumerate(images, start=1)]


def one_by_one(images: list[bytes]) -> list[list[Frame]]:
    """Return requests of one frame each."""
    return [[frame] for frame in frames(images)]


def predict(client: TorchServeClient, *requests: list[Frame]) -> list[Result]:
    """Send requests; return the results of all their frames, by frame number."""
    results: list[Result] = []
    for request in requests:
        client.wait_for_slot()
        client.submit(request, results.append)
    client.drain()
    return sorted(results, key=lambda result: result.frame.number)


def assert_all_answered(results: list[Result]) -> None:
    """Every frame has its own prediction."""
    assert [result.frame.number for result in results] == list(range(1, len(results) + 1))
    for result in results:
        assert result.outcome == "answered", result.error
        assert result.predictions == {hashlib.sha256(result.frame.jpeg).hexdigest(): 1.0}
        assert result.latency_s is not None
        assert 0 < result.latency_s < 60
