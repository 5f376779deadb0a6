"""edge/client.py against servers that fail: what is tried again, what is not, and that every frame gets its result."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from deploy.node import Node, free_ports
from edge.cameras import Camera, Frame
from edge.client import TorchServe
from edge.retries import ServerError
from edge.stats import Result
from tests.conftest import jpeg, wait_until
from tests.fake_server import FakeServer

CAMERA = Camera("0")
MODEL = "efficientnet-lite0"


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


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


PASSING_TROUBLE = ["429", "500", "502", "503", "504", "507", "half an answer", "stalls", "closes", "resets"]
PICTURES = [b"one", b"two", b"three", b"four", b"five"]


@pytest.mark.parametrize("fake", ["out of order"], indirect=True)
@pytest.mark.parametrize("as_json", [False, True])
def test_as_many_connections_as_requests_in_flight_and_no_more(
    fake: FakeServer, stop: threading.Event, as_json: bool
) -> None:
    with session(fake.url, stop, as_json=as_json) as server:
        results = ask(server, *([frame] for frame in frames([bytes([number]) for number in range(40)])))
    assert [result.outcome for result in results] == ["answered"] * 40
    assert 1 < len(fake.connections) <= 4


def assert_all_answered(results: list[Result]) -> None:
    """Every frame has the answer that is its own."""
    assert [result.frame.number for result in results] == list(range(1, len(results) + 1))
    for result in results:
        assert result.outcome == "answered", result.error
        assert result.predictions == {hashlib.sha256(result.frame.jpeg).hexdigest(): 1.0}
        assert result.latency_s is not None
        assert 0 < result.latency_s < 60


@pytest.mark.parametrize(
    "fake",
    [f"first {what}" for what in PASSING_TROUBLE],
    indirect=True,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_passing_trouble_costs_nothing(
    fake: FakeServer, as_json: bool, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
    with session(fake.url, stop, as_json=as_json) as server:
        server.wait_until_ready(5.0)
        sent = frames(PICTURES)
        requests = [sent[:3], sent[3:]] if as_json else [[frame] for frame in sent]
        assert_all_answered(ask(server, *requests))
        assert not server.health.is_away(0.0)
    assert fake.frames_asked == 2 * len(requests)


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


@pytest.mark.parametrize("fake", ["503", "closes"], indirect=True)
def test_lasting_trouble_ends_with_the_patience(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.retries.NOTICE_AFTER_S", 0.5)
    with session(fake.url, stop) as server:
        server.wait_until_ready(1.5)
        begin = time.monotonic()
        results = ask(server, *[[frame] for frame in frames(PICTURES[:4])])
        assert 1.5 <= time.monotonic() - begin < 20
        assert server.health.is_away(1.5)
        reason = "503 try later" if fake.behaviour == "503" else "no answer: Remote end closed connection"
        assert [(result.outcome, result.error is not None and reason in result.error) for result in results] == [
            ("failed", True)
        ] * 4
        assert 4 * 3 <= fake.frames_asked <= 4 * 20, "back-off"
        fake.behaviour = "good"
        assert_all_answered(ask(server, frames([b"six"])))
        assert not server.health.is_away(0.0)
    lost, back = [record.message for record in caplog.records if record.name.startswith("edge")]
    assert lost.startswith(f"{fake.url} gives no answers (")
    assert back.startswith(f"{fake.url} answers again after ")


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_patience_outlasts_the_attempts_of_urllib3(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.MOST_ATTEMPTS", 2)
    with session(fake.url, stop) as server:
        server.wait_until_ready(60.0)
        threading.Timer(3.0, setattr, [fake, "behaviour", "good"]).start()
        assert_all_answered(ask(server, frames(PICTURES[:1])))
    assert fake.frames_asked > 3


def test_patience_for_a_server_that_is_not_there_yet(stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.client.MOST_ATTEMPTS", 2)
    with session(f"http://127.0.0.1:{free_ports(1)[0]}", stop, patience_s=3.0) as server:
        begin = time.monotonic()
        with pytest.raises(ServerError, match=r"no server at .* \(.*Connection refused"):
            server.connect()
        assert 3.0 <= time.monotonic() - begin < 30


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_while_the_server_is_away_a_single_request_asks(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.retries.NOTICE_AFTER_S", 0.2)
    with session(fake.url, stop, max_in_flight=8) as server:
        server.wait_until_ready(0.5)
        ask(server, *[[frame] for frame in frames(PICTURES)])
        begin = time.monotonic()
        ask(server, *[[frame] for frame in frames(PICTURES)])
        assert time.monotonic() - begin >= 5 * 0.5
        fake.behaviour = "good"
        assert_all_answered(ask(server, *[[frame] for frame in frames(PICTURES)]))


@pytest.mark.parametrize("fake", ["half an answer"], indirect=True)
def test_half_answers_are_not_asked_for_again_after_stop(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop) as server:
        server.wait_until_ready(60.0)
        threading.Timer(1.2, stop.set).start()
        (result,) = ask(server, frames(PICTURES[:1]))
    assert result.outcome == "failed"
    assert 2 <= fake.frames_asked <= 5


def test_nobody_leaves_before_the_last_result_is_delivered(stop: threading.Event) -> None:
    """An answer that came in the last moment is still being delivered when the grace is over."""
    server = FakeServer("good")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    delivered: list[Result] = []

    def deliver_slowly(result: Result) -> None:
        time.sleep(1.0)
        delivered.append(result)

    with pytest.MonkeyPatch.context() as patch, session(server.url, stop) as client:
        patch.setattr("edge.client.GRACE_S", 0.1)
        client.wait_until_ready(5.0)
        client.ask(frames(PICTURES[:1]), deliver_slowly)
        wait_until(lambda: server.frames_asked == 1)
        time.sleep(0.3)
        stop.set()
        client.finish()
        assert [result.outcome for result in delivered] == ["answered"]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_stop_ends_the_retries(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop) as server:
        server.wait_until_ready(300.0)
        threading.Timer(0.5, stop.set).start()
        begin = time.monotonic()
        (result,) = ask(server, frames(PICTURES[:1]))
        assert result.outcome == "failed"
        assert time.monotonic() - begin < 20


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_silence_is_tried_again_and_given_up(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
    with session(fake.url, stop) as server:
        server.wait_until_ready(1.0)
        (result,) = ask(server, frames(PICTURES[:1]))
    assert result.outcome == "failed"
    assert "timed out" in str(result.error)
    assert fake.frames_asked >= 2


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_silence_is_told_before_a_timeout_ends_it(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 8.0)
    monkeypatch.setattr("edge.retries.NOTICE_AFTER_S", 0.5)
    with session(fake.url, stop) as server:
        server.wait_until_ready(60.0)
        time.sleep(4.5)  # in which nothing is asked, so that nothing is missing
        server.ask(frames(PICTURES[:1]), print)
        threading.Timer(6.0, stop.set).start()
        server.finish()
    assert fake.frames_asked == 1
    [lost] = [record.message for record in caplog.records if record.name.startswith("edge")]
    assert re.search(r"gives no answers \(none for [4-6] s\)", lost)


@pytest.mark.parametrize("fake", ["trickle"], indirect=True)
def test_answer_that_trickles_is_given_up(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
    results: list[Result] = []
    with session(fake.url, stop) as server:
        server.wait_until_ready(0.5)
        for frame in frames(PICTURES[:4]):
            server.ask([frame], results.append)
        server.finish()
        assert [result.error for result in results] == ["no whole answer in time"] * 4
        fake.behaviour = "good"  # Nobody gives the lost threads back, and yet it goes on.
        assert_all_answered(ask(server, *[[frame] for frame in frames(PICTURES)]))


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_what_is_on_its_way_gets_a_few_seconds(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.GRACE_S", 0.5)
    with session(fake.url, stop) as server:
        server.wait_until_ready(5.0)
        threading.Timer(0.2, stop.set).start()
        begin = time.monotonic()
        results = ask(server, *[[frame] for frame in frames(PICTURES[:4])])
        assert time.monotonic() - begin < 10
    assert {result.error for result in results} == {"the run ended, and 0.5 s later there was no answer"}
    assert len(results) == 4


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
def test_no_more_requests_in_flight_than_asked_for(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop, max_in_flight=2) as server:
        server.wait_until_ready(5.0)
        begin = time.monotonic()
        assert_all_answered(ask(server, *[[frame] for frame in frames(PICTURES)]))
        assert time.monotonic() - begin >= 3 * 0.5


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


def test_limit_of_torchserve_is_foreseen(node: Node, stop: threading.Event, clip: list[npt.NDArray[np.uint8]]) -> None:
    """80 frames of 85 KB are 9 MB of JSON: two requests, none of them refused."""
    picture = jpeg(clip[0])
    too_large = jpeg(np.random.default_rng(3).integers(0, 255, (3000, 4000, 3), np.uint8))
    assert len(too_large) > 6_553_500
    asked = node.log().count('"POST /predictions/')
    with session(
        node.url, stop, model=MODEL, as_json=True, token_file=node.folder / "key_file.json", patience_s=60.0
    ) as server:
        server.wait_until_ready(60.0)
        results = ask(server, frames([picture] * 80), [Frame(CAMERA, 81, time.monotonic(), too_large)])
    assert [result.outcome for result in results] == ["answered"] * 80 + ["failed"]
    assert str(results[-1].error).startswith("413 one frame is over the server's limit")
    wait_until(lambda: node.log().count('"POST /predictions/') - asked == 1 + 2)


def test_bad_frames_of_a_batch_do_not_hide_the_good_ones(
    node: Node, stop: threading.Event, clip: list[npt.NDArray[np.uint8]]
) -> None:
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
