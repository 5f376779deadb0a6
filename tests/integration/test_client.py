"""edge/client.py: connections, limits, and what is made of answers that are none."""

import json
import threading
import time

import numpy as np
import pytest

from demo.node import Node
from edge.cameras import Frame
from edge.retries import ServerError
from edge.stats import Result
from tests.support.client import CAMERA, PICTURES, ask, assert_all_answered, frames, session
from tests.support.fake_server import FakeServer
from tests.support.frames import Pixels, jpeg
from tests.support.nodes import predictions_asked
from tests.support.scripts import MODEL, wait_until


@pytest.mark.parametrize("fake", ["out of order"], indirect=True)
@pytest.mark.parametrize("as_json", [False, True])
def test_as_many_connections_as_requests_in_flight_and_no_more(
    fake: FakeServer, stop: threading.Event, as_json: bool
) -> None:
    with session(fake.url, stop, as_json=as_json) as server:
        results = ask(server, *([frame] for frame in frames([bytes([number]) for number in range(40)])))
    assert [result.outcome for result in results] == ["answered"] * 40
    assert 1 < len(fake.connections) <= 4


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("html", "the answer is not JSON"),
        ("garbage", "the answer is not JSON"),
        ("deep", "the answer is not JSON"),
        ("too few", "the answer does not fit"),
        ("not predictions", "the answer does not fit"),
        ("not a number", "the answer does not fit"),
        ("huge number", "the answer does not fit"),
        ("endless number", "the answer is not JSON"),
        ("odd charset", "the answer is not JSON"),
        ("redirect", "302 Found"),
    ],
    indirect=["fake"],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_wrong_answers_fail_at_once(fake: FakeServer, reason: str, as_json: bool, stop: threading.Event) -> None:
    with session(fake.url, stop, as_json=as_json) as server:
        server.wait_until_ready(5.0)
        results = ask(server, frames(PICTURES[:3]) if as_json else frames(PICTURES[:1]))
    assert {result.outcome for result in results} == {"failed"}
    assert all(result.error is not None and reason in result.error for result in results)
    assert fake.frames_asked == 1, "tried again in vain"


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_nobody_leaves_before_the_last_result_is_delivered(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that came in the last moment is still being delivered when the grace is over."""
    delivered: list[Result] = []
    has_come = threading.Event()

    def deliver_slowly(result: Result) -> None:
        has_come.set()
        time.sleep(1.0)
        delivered.append(result)

    monkeypatch.setattr("edge.client.GRACE_S", 0.1)
    with session(fake.url, stop) as server:
        server.wait_until_ready(5.0)
        server.ask(frames(PICTURES[:1]), deliver_slowly)
        assert has_come.wait(60)
        stop.set()
        server.finish()
        assert [result.outcome for result in delivered] == ["answered"]


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
def test_no_more_requests_in_flight_than_asked_for(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop, max_in_flight=2) as server:
        server.wait_until_ready(5.0)
        results: list[Result] = []
        for asked, frame in enumerate(frames(PICTURES)):
            server.wait_for_room()
            assert asked - len(results) < 2
            server.ask([frame], results.append)
        server.finish()
    assert_all_answered(sorted(results, key=lambda result: result.frame.number))


@pytest.mark.parametrize("fake", ["at most 20000"], indirect=True)
def test_batch_over_the_limit_is_split(fake: FakeServer, stop: threading.Event) -> None:
    """The limit is not known before: the first refusal teaches it."""
    pictures = [bytes([number]) * 4000 for number in range(7)]  # 5,336 bytes in base64
    with session(fake.url, stop, as_json=True) as server:
        server._body_limit = 10**9
        server.wait_until_ready(5.0)
        assert_all_answered(ask(server, frames(pictures)))
    assert sorted(len(json.loads(body)) for body in fake.bodies[1:]) == [2, 2, 3, 4, 7]


@pytest.mark.parametrize("fake", ["at most 20000"], indirect=True)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_single_frame_over_the_limit_fails_with_the_reason(
    fake: FakeServer, as_json: bool, stop: threading.Event
) -> None:
    with session(fake.url, stop, as_json=as_json) as server:
        server.wait_until_ready(5.0)
        good, bad = b"small", b"x" * 30_000
        requests = [frames([good, bad])] if as_json else [[frame] for frame in frames([good, bad])]
        results = ask(server, *requests)
    assert [result.outcome for result in results] == ["answered", "failed"]
    assert str(results[1].error).startswith("413 ")
    assert "--resize" in str(results[1].error)


def test_limit_of_torchserve_is_foreseen(node: Node, stop: threading.Event, clip: list[Pixels]) -> None:
    """80 frames of 85 KB are 9 MB of JSON: two requests, none of them refused."""
    picture = jpeg(clip[0])
    too_large = jpeg(np.random.default_rng(3).integers(0, 255, (3000, 4000, 3), np.uint8))
    assert len(too_large) > 6_553_500
    asked = predictions_asked(node)
    with session(
        node.url, stop, model=MODEL, as_json=True, token_file=node.folder / "key_file.json", patience_s=60.0
    ) as server:
        server.wait_until_ready(60.0)
        results = ask(server, frames([picture] * 80), [Frame(CAMERA, 81, time.monotonic(), too_large)])
    assert [result.outcome for result in results] == ["answered"] * 80 + ["failed"]
    assert str(results[-1].error).startswith("413 one frame is over the server's limit")
    wait_until(lambda: predictions_asked(node) - asked == 1 + 2)


def test_bad_frames_of_a_batch_do_not_hide_the_good_ones(node: Node, stop: threading.Event, clip: list[Pixels]) -> None:
    """A frame that TorchServe cannot read fails alone. OpenCV sends none such, so the client is asked directly."""
    sent = frames([jpeg(clip[0]), b"no image", jpeg(clip[2])])
    key_file = node.folder / "key_file.json"
    with session(node.url, stop, model=MODEL, as_json=True, token_file=key_file, patience_s=60.0) as server:
        server.wait_until_ready(60.0)
        good, bad, other = ask(server, sent)
        assert [good.outcome, bad.outcome, other.outcome] == ["answered", "failed", "answered"]
        assert str(bad.error).startswith("not an image")
        assert good.shared_by == other.shared_by == 2
    with session(node.url, stop, model=MODEL, token_file=key_file, patience_s=60.0) as server:
        server.wait_until_ready(60.0)
        (alone,) = ask(server, [sent[1]])
        assert str(alone.error).startswith("400 not an image")


@pytest.mark.parametrize(
    ("fake", "reason"),
    [("html", "answer is not JSON"), ("503", "503 try later")],
    indirect=["fake"],
)
def test_server_that_is_no_torchserve_is_told_before_the_first_frame(
    fake: FakeServer, reason: str, stop: threading.Event
) -> None:
    fake.bodies.append(b"")  # The test picture is number 1, and not spared.
    with session(fake.url, stop, patience_s=0.5) as server, pytest.raises(ServerError, match=reason):
        server.wait_until_ready(0.5)
