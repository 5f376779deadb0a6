"""edge/client.py: connections, limits, and responses that hold no predictions."""

import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from demo.node import Node
from edge.errors import ServerError
from edge.frames import Frame, Result
from edge.payload import MAX_BODY_BYTES
from edge.responses import TOO_LARGE
from edge.timing import Timing
from tests.support.client import CAMERA, IMAGES, assert_all_answered, frames, new_client, one_by_one, predict
from tests.support.fake_server import FakeServer
from tests.support.frames import Pixels, jpeg
from tests.support.nodes import predictions_asked
from tests.support.scripts import MODEL, wait_until

both_ways = pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])


@pytest.mark.parametrize("fake", ["out of order"], indirect=True)
@both_ways
def test_as_many_connections_as_requests_in_flight_and_no_more(
    fake: FakeServer, stop: threading.Event, as_json: bool
) -> None:
    with new_client(fake.url, stop, client_batching=as_json) as client:
        results = predict(client, *one_by_one([bytes([number]) for number in range(40)]))
    assert [result.outcome for result in results] == ["answered"] * 40
    assert 1 < len(fake.connections) <= 4


@pytest.mark.parametrize("fake", ["good", "chunked"], indirect=True)
@both_ways
def test_good_responses_are_answered(fake: FakeServer, as_json: bool, stop: threading.Event) -> None:
    with new_client(fake.url, stop, client_batching=as_json) as client:
        client.wait_until_ready()
        assert_all_answered(predict(client, *([frames(IMAGES)] if as_json else one_by_one(IMAGES))))
    assert fake.frames_asked == (1 if as_json else len(IMAGES))
    assert len(fake.connections) <= 4, "they are kept open"


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("html", "unexpected response: expected predictions as JSON"),
        ("garbage", "unexpected response: expected predictions as JSON"),
        ("deep", "unexpected response: expected predictions as JSON"),
        ("too few", "unexpected response: expected "),
        ("not predictions", "unexpected response: expected label -> probability"),
        ("not a number", "unexpected response: expected label -> probability"),
        ("huge number", "unexpected response: expected label -> probability"),
        ("endless number", "unexpected response: expected predictions as JSON"),
        ("odd charset", "unexpected response: expected predictions as JSON"),
        ("redirect", "302 Found"),
    ],
    indirect=["fake"],
)
@both_ways
def test_wrong_responses_fail_at_once(fake: FakeServer, reason: str, as_json: bool, stop: threading.Event) -> None:
    with new_client(fake.url, stop, client_batching=as_json) as client:
        client.wait_until_ready()
        results = predict(client, frames(IMAGES[:3] if as_json else IMAGES[:1]))
    assert {result.outcome for result in results} == {"failed"}
    assert all(result.error is not None and reason in result.error for result in results)
    assert fake.frames_asked == 1, "retried in vain"


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_drain_waits_until_the_last_result_is_delivered(fake: FakeServer, stop: threading.Event) -> None:
    """The result of a response that arrived in time is still being delivered when drain_s is over."""
    delivered: list[Result] = []
    has_arrived = threading.Event()

    def deliver_slowly(result: Result) -> None:
        has_arrived.set()
        time.sleep(1.0)
        delivered.append(result)

    with new_client(fake.url, stop, Timing(drain_s=0.1)) as client:
        client.wait_until_ready()
        client.submit(frames(IMAGES[:1]), deliver_slowly)
        assert has_arrived.wait(60)
        stop.set()
        client.drain()
        assert [result.outcome for result in delivered] == ["answered"]


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
def test_no_more_requests_in_flight_than_allowed(fake: FakeServer, stop: threading.Event) -> None:
    with new_client(fake.url, stop, max_in_flight=2) as client:
        client.wait_until_ready()
        results: list[Result] = []
        for sent, frame in enumerate(frames(IMAGES)):
            client.wait_for_slot()
            assert sent - len(results) < 2
            client.submit([frame], results.append)
        client.drain()
    assert_all_answered(sorted(results, key=lambda result: result.frame.number))


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_json_batch_over_the_limit_is_split_before_it_is_sent(fake: FakeServer, stop: threading.Event) -> None:
    images = [bytes([number]) * 1_200_000 for number in range(7)]  # 1.6 MB each in base64, so that 4 fit
    with new_client(fake.url, stop, client_batching=True) as client:
        client.wait_until_ready()
        assert_all_answered(predict(client, frames(images)))
    assert sorted(len(json.loads(body)) for body in fake.bodies[1:]) == [3, 4]
    assert max(map(len, fake.bodies)) <= MAX_BODY_BYTES


@pytest.mark.parametrize("fake", ["good"], indirect=True)
@both_ways
def test_frame_over_the_limit_fails_alone_and_is_not_sent(
    fake: FakeServer, as_json: bool, stop: threading.Event
) -> None:
    good, bad = b"small", bytes(MAX_BODY_BYTES + 1)
    with new_client(fake.url, stop, client_batching=as_json) as client:
        client.wait_until_ready()
        results = predict(client, *([frames([good, bad])] if as_json else one_by_one([good, bad])))
    assert [result.outcome for result in results] == ["answered", "failed"]
    assert results[1].error == TOO_LARGE
    assert fake.frames_asked == 1


@pytest.mark.parametrize("fake", ["at most 20000"], indirect=True)
@both_ways
def test_request_over_a_lower_limit_of_the_server_fails_with_advice(
    fake: FakeServer, as_json: bool, stop: threading.Event
) -> None:
    """Of a proxy, for example. It is not retried, and other requests are answered."""
    with new_client(fake.url, stop, client_batching=as_json) as client:
        client.wait_until_ready()
        large = frames([b"x" * 12_000] * 2) if as_json else frames([b"x" * 30_000])
        results = predict(client, large)
        assert fake.frames_asked == 1, "retried in vain"
        assert {(result.outcome, result.error) for result in results} == {("failed", TOO_LARGE)}
        assert_all_answered(predict(client, frames([b"small"])))
    assert TOO_LARGE.startswith("413 ")
    assert "--batch_size" in TOO_LARGE
    assert "--resize" in TOO_LARGE
    assert len(TOO_LARGE.splitlines()) == 1


def test_limit_of_torchserve_is_kept(node: Node, stop: threading.Event, clip: list[Pixels]) -> None:
    """80 frames of 85 KB are 9 MB of JSON: two requests, and TorchServe accepts both."""
    image = jpeg(clip[0])
    too_large = jpeg(np.random.default_rng(3).integers(0, 255, (3000, 4000, 3), np.uint8))
    assert len(too_large) > 6_553_500
    asked = predictions_asked(node)
    options: dict[str, Any] = {"model": [MODEL], "token_file": node.folder / "key_file.json", "server_wait_s": 60.0}
    with new_client(node.url, stop, client_batching=True, **options) as client:
        client.wait_until_ready()
        results = predict(client, frames([image] * 80), [Frame(CAMERA, 81, time.monotonic(), too_large)])
    assert [result.outcome for result in results] == ["answered"] * 80 + ["failed"]
    assert results[-1].error == TOO_LARGE
    wait_until(lambda: predictions_asked(node) - asked == 1 + 2)


def test_bad_frames_of_a_batch_do_not_hide_the_good_ones(node: Node, stop: threading.Event, clip: list[Pixels]) -> None:
    """A frame that TorchServe can't decode fails alone. OpenCV never sends one, so the client is called directly."""
    sent = frames([jpeg(clip[0]), b"no image", jpeg(clip[2])])
    options: dict[str, Any] = {"model": [MODEL], "token_file": node.folder / "key_file.json", "server_wait_s": 60.0}
    with new_client(node.url, stop, client_batching=True, **options) as client:
        client.wait_until_ready()
        good, bad, other = predict(client, sent)
        assert [good.outcome, bad.outcome, other.outcome] == ["answered", "failed", "answered"]
        assert str(bad.error).startswith("not an image")
        assert good.batch_size == other.batch_size == 2
    with new_client(node.url, stop, **options) as client:
        client.wait_until_ready()
        (alone,) = predict(client, [sent[1]])
        assert str(alone.error).startswith("400 not an image")


@pytest.mark.parametrize(
    ("fake", "reason"),
    [("html", "expected predictions as JSON"), ("503", "503 try later")],
    indirect=["fake"],
)
def test_server_that_is_not_torchserve_is_reported_before_the_first_frame(
    fake: FakeServer, reason: str, stop: threading.Event
) -> None:
    fake.bodies.append(b"")  # The test image is number 1, and gets no good response.
    with (
        new_client(fake.url, stop, server_wait_s=0.5) as client,
        pytest.raises(ServerError, match=rf"/predictions/resnet-18 has no prediction for a test image: .*{reason}"),
    ):
        client.wait_until_ready()
