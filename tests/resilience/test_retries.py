"""edge/client.py against servers that fail: what is tried again, how long, and what the user hears of it."""

import re
import threading
import time

import pytest

from demo.node import free_ports
from edge.retries import ServerError
from edge.stats import Result
from tests.support.client import PICTURES, ask, assert_all_answered, frames, session
from tests.support.fake_server import FakeServer
from tests.support.scripts import wait_until

PASSING_TROUBLE = ["429", "500", "502", "503", "504", "507", "half an answer", "stalls", "closes", "resets"]


@pytest.mark.parametrize(
    "fake",
    [f"first {what}" for what in PASSING_TROUBLE],
    indirect=True,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_passing_trouble_costs_nothing(
    fake: FakeServer, as_json: bool, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(fake.url, stop, as_json=as_json) as server:
        server.wait_until_ready(5.0)
        monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 2.0)
        monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
        sent = frames(PICTURES)
        requests = [sent[:3], sent[3:]] if as_json else [[frame] for frame in sent]
        assert_all_answered(ask(server, *requests))
        assert not server.health.is_away(0.0)
    assert fake.frames_asked == 2 * len(requests)


@pytest.mark.parametrize("fake", ["503", "closes"], indirect=True)
def test_lasting_trouble_ends_with_the_patience(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.retries.NOTICE_AFTER_S", 0.5)
    with session(fake.url, stop) as server:
        server.wait_until_ready(1.5)
        begin = time.monotonic()
        results = ask(server, *[[frame] for frame in frames(PICTURES[:4])])
        assert time.monotonic() - begin >= 1.5
        assert server.health.is_away(1.5)
        reason = "503 try later" if fake.behaviour == "503" else "no answer: Remote end closed connection"
        assert [(result.outcome, result.error is not None and reason in result.error) for result in results] == [
            ("failed", True)
        ] * 4
        assert 4 * 2 <= fake.frames_asked <= 4 * 20, "back-off"
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
        assert time.monotonic() - begin >= 3.0


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
        asked_at_stop: list[int] = []

        def stop_after_two() -> None:
            wait_until(lambda: fake.frames_asked >= 2)
            stop.set()
            asked_at_stop.append(fake.frames_asked)

        thread = threading.Thread(target=stop_after_two)
        thread.start()
        (result,) = ask(server, frames(PICTURES[:1]))
        thread.join()
    assert result.outcome == "failed"
    assert fake.frames_asked <= asked_at_stop[0] + 1, "at most the one that was on its way"


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_stop_ends_the_retries(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop) as server:
        server.wait_until_ready(300.0)
        threading.Timer(0.5, stop.set).start()
        begin = time.monotonic()
        (result,) = ask(server, frames(PICTURES[:1]))
        assert result.outcome == "failed"
        assert time.monotonic() - begin < 100, "of 300 s"


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_silence_is_tried_again_and_given_up(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(fake.url, stop) as server:
        server.wait_until_ready(1.0)
        monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 0.5)
        monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
        (result,) = ask(server, frames(PICTURES[:1]))
    assert result.outcome == "failed"
    assert "timed out" in str(result.error)
    assert fake.frames_asked >= 2


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_silence_is_told_before_a_timeout_ends_it(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the timeout after the request, and not after the server's last answer."""
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", 6.0)
    monkeypatch.setattr("edge.retries.NOTICE_AFTER_S", 0.2)
    results: list[Result] = []
    with session(fake.url, stop) as server:
        server.wait_until_ready(60.0)
        time.sleep(4)  # in which nothing is asked, so that nothing is missing
        asked_at = time.time()
        server.ask(frames(PICTURES[:1]), results.append)
        thread = threading.Thread(target=server.finish)
        thread.start()
        wait_until(lambda: caplog.records != [])
        assert results == []
        stop.set()
        thread.join()
    assert fake.frames_asked == 1
    [lost] = [record for record in caplog.records if record.name.startswith("edge")]
    assert re.search(r"gives no answers \(none for \d+ s\)", lost.message)
    assert lost.created - asked_at > 3.5


@pytest.mark.parametrize("fake", ["trickle"], indirect=True)
def test_answer_that_trickles_is_given_up(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something comes every 0.2 s, so that no timeout of the connection ends it."""
    results: list[Result] = []
    with session(fake.url, stop) as server:
        server.wait_until_ready(0.5)
        monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 1.5)
        monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
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
        assert time.monotonic() - begin < 50, "of the 60 s that the server would take"
    assert {result.error for result in results} == {"the run ended, and 0.5 s later there was no answer"}
    assert len(results) == 4
