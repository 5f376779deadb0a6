"""request.py's sender: which frames are sent, and what becomes of the others."""

import threading
from typing import cast

import pytest

import request
from edge.buffer import Buffer
from edge.cameras import Camera, Frame
from edge.client import TorchServe
from edge.stats import Result

CAMERA = Camera("0")
NOW, MAX_AGE_S = 100.0, 0.3


class Server:
    """Takes frames, and remembers their numbers."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def wait_for_room(self) -> None:
        pass

    def ask(self, frames: list[Frame], _: object) -> None:
        self.asked += [frame.number for frame in frames]

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("per_request", [1, 3])
def test_a_frame_is_sent_unless_it_is_older_than_the_age_limit(
    monkeypatch: pytest.MonkeyPatch, stop: threading.Event, per_request: int
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: NOW)
    ages_s = [0.5, 0.31, 0.29, 0.0, 0.31]
    buffer = Buffer(len(ages_s), {CAMERA: "none"}, stop)
    for number, age_s in enumerate(ages_s, start=1):
        buffer.put(Frame(CAMERA, number, NOW - age_s, b""))
    buffer.close(CAMERA)
    server, results = Server(), list[Result]()
    request.send(buffer, cast(TorchServe, server), per_request, MAX_AGE_S, results.append, stop)
    assert server.asked == [3, 4]
    assert [(result.frame.number, result.outcome, result.error) for result in results] == [
        (number, "expired", "older than 300 ms") for number in (1, 2, 5)
    ]
