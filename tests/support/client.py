"""edge/client.py, asked directly: the frames, the session, and what an answer must be."""

import hashlib
import threading
import time
from typing import Any

from edge.cameras import Camera, Frame
from edge.client import TorchServe
from edge.stats import Result

CAMERA = Camera("0")
PICTURES = [b"one", b"two", b"three", b"four", b"five"]


def session(url: str, stop: threading.Event, **options: Any) -> TorchServe:
    """Return a session with the defaults of the tests."""
    defaults: dict[str, Any] = {
        "model": "resnet-18",
        "token_file": None,
        "management_url": None,
        "as_json": False,
        "max_in_flight": 4,
        "patience_s": 5.0,
    }
    return TorchServe(url, stop=stop, **(defaults | options))


def frames(pictures: list[bytes]) -> list[Frame]:
    return [Frame(CAMERA, number, time.monotonic(), picture) for number, picture in enumerate(pictures, start=1)]


def ask(server: TorchServe, *requests: list[Frame]) -> list[Result]:
    """Send requests; return the results of all their frames, by frame number."""
    results: list[Result] = []
    for request in requests:
        server.wait_for_room()
        server.ask(request, results.append)
    server.finish()
    return sorted(results, key=lambda result: result.frame.number)


def assert_all_answered(results: list[Result]) -> None:
    """Every frame has the answer that is its own."""
    assert [result.frame.number for result in results] == list(range(1, len(results) + 1))
    for result in results:
        assert result.outcome == "answered", result.error
        assert result.predictions == {hashlib.sha256(result.frame.jpeg).hexdigest(): 1.0}
        assert result.latency_s is not None
        assert 0 < result.latency_s < 60
