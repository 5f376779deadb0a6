"""edge/client.py with servers that fail: which requests are retried, for how long, and what is logged."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from demo.node import free_ports
from edge.errors import ServerError
from edge.frames import Result
from edge.timing import Timing
from tests.support.client import IMAGES, assert_all_answered, frames, new_client, one_by_one, predict
from tests.support.fake_server import FakeServer
from tests.support.scripts import wait_until

TRANSIENT = ["429", "500", "502", "503", "504", "507"]
TRANSIENT += ["half a response", "chunks cut off", "stalls", "closes", "resets"]
# A server that does not respond is noticed within a second. Each attempt may take `connect_s` more than that.
FAST = Timing(poll_s=0.05, connect_s=0.5, min_response_s=0.5, response_s=0.5, response_per_frame_s=0.0)


@pytest.mark.parametrize("fake", [f"first {failure}" for failure in TRANSIENT], indirect=True)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_transient_failures_lose_no_frame(fake: FakeServer, as_json: bool, stop: threading.Event) -> None:
    with new_client(fake.url, stop, FAST, client_batching=as_json) as client:
        client.wait_until_ready()
        sent = frames(IMAGES)
        requests = [sent[:3], sent[3:]] if as_json else [[frame] for frame in sent]
        assert_all_answered(predict(client, *requests))
        assert client.health.down_for_s() == 0
    assert fake.frames_asked == 2 * len(requests)


@pytest.mark.parametrize("fake", ["503", "closes"], indirect=True)
def test_lasting_failures_are_retried_until_the_deadline(
    fake: FakeServer, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with new_client(fake.url, stop, replace(FAST, report_after_s=0.5), server_wait_s=1.5) as client:
        client.wait_until_ready()
        begin = time.monotonic()
        results = predict(client, *one_by_one(IMAGES[:4]))
        assert time.monotonic() - begin >= 1.5
        assert client.health.down_for_s() >= 1.5
        assert client.health.is_down
        reason = "503 try later" if fake.behaviour == "503" else "no response: Remote end closed connection"
        assert [(result.outcome, result.error is not None and reason in result.error) for result in results] == [
            ("failed", True)
        ] * 4
        assert 4 * 2 <= fake.frames_asked <= 4 * 20, "back-off"
        fake.behaviour = "good"
        assert_all_answered(predict(client, frames([b"six"])))
        assert client.health.down_for_s() == 0
        assert not client.health.is_down
    lost, back = [record.message for record in caplog.records if record.name.startswith("edge")]
    assert lost.startswith(f"{fake.url} is not responding (")
    assert lost.endswith("; retrying until it does")
    assert re.fullmatch(rf"{fake.url} is responding again after \d+\.\d s", back)


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_time_is_the_only_limit_of_the_attempts(fake: FakeServer, stop: threading.Event) -> None:
    many = 100
    timing = replace(FAST, first_backoff_s=0.0, max_backoff_s=0.0)
    with new_client(fake.url, stop, timing, server_wait_s=300.0) as client:
        client.wait_until_ready()

        def recover_after_many() -> None:
            wait_until(lambda: fake.frames_asked >= many)
            fake.behaviour = "good"

        thread = threading.Thread(target=recover_after_many)
        thread.start()
        assert_all_answered(predict(client, frames(IMAGES[:1])))
        thread.join()


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_frames_are_not_retried_for_longer_than_their_maximum_age(fake: FakeServer, stop: threading.Event) -> None:
    with new_client(fake.url, stop, FAST, server_wait_s=300.0, max_age_s=0.5) as client:
        client.wait_until_ready()
        begin = time.monotonic()
        (result,) = predict(client, frames(IMAGES[:1]))
        assert time.monotonic() - begin < 100, "of 300 s"
    assert result.error == "503 try later"
    assert fake.frames_asked >= 2


def test_waits_for_a_server_that_is_not_there_yet(stop: threading.Event) -> None:
    with new_client(f"http://127.0.0.1:{free_ports(1)[0]}", stop, FAST, server_wait_s=1.5) as client:
        begin = time.monotonic()
        with pytest.raises(ServerError, match=r"no server at .* \(.*Connection refused"):
            client.connect()
        assert time.monotonic() - begin >= 1.5


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_while_the_server_is_down_a_single_request_probes_it(fake: FakeServer, stop: threading.Event) -> None:
    with new_client(fake.url, stop, replace(FAST, report_after_s=0.2), server_wait_s=0.5, max_in_flight=8) as client:
        client.wait_until_ready()
        predict(client, *one_by_one(IMAGES))
        assert client.health.is_down
        begin = time.monotonic()
        predict(client, *one_by_one(IMAGES))
        assert time.monotonic() - begin >= 5 * 0.5, "one after the other"
        fake.behaviour = "good"
        assert_all_answered(predict(client, *one_by_one(IMAGES)))


@pytest.mark.parametrize("fake", ["half a response", "chunks cut off"], indirect=True)
def test_incomplete_response_is_not_retried_after_stop(fake: FakeServer, stop: threading.Event) -> None:
    with new_client(fake.url, stop, FAST, server_wait_s=60.0) as client:
        client.wait_until_ready()
        asked_at_stop: list[int] = []

        def stop_after_two() -> None:
            wait_until(lambda: fake.frames_asked >= 2)
            stop.set()
            asked_at_stop.append(fake.frames_asked)

        thread = threading.Thread(target=stop_after_two)
        thread.start()
        (result,) = predict(client, frames(IMAGES[:1]))
        thread.join()
    assert result.outcome == "failed"
    assert fake.frames_asked <= asked_at_stop[0] + 1, "at most the one that was in flight"


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_token_that_changes_while_the_server_is_down_is_read_again(
    fake: FakeServer, stop: threading.Event, tmp_path: Path
) -> None:
    """As when TorchServe restarts, after many attempts of the request."""
    key_file = tmp_path / "key_file.json"
    key_file.write_text('{"inference": {"key": "old"}}')
    timing = replace(FAST, max_backoff_s=0.1)
    with new_client(fake.url, stop, timing, server_wait_s=20.0, token_file=key_file) as client:
        client.wait_until_ready()

        def restart() -> None:
            wait_until(lambda: fake.frames_asked >= 10)
            key_file.write_text('{"inference": {"key": "new"}}')
            fake.behaviour = "only new"

        thread = threading.Thread(target=restart)
        thread.start()
        assert_all_answered(predict(client, frames(IMAGES[:1])))
        thread.join()
    assert fake.tokens == {"Bearer old", "Bearer new"}


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_stop_ends_the_retries(fake: FakeServer, stop: threading.Event) -> None:
    with new_client(fake.url, stop, FAST, server_wait_s=300.0) as client:
        client.wait_until_ready()
        threading.Timer(0.5, stop.set).start()
        begin = time.monotonic()
        (result,) = predict(client, frames(IMAGES[:1]))
        assert result.outcome == "failed"
        assert time.monotonic() - begin < 100, "of 300 s"


@pytest.mark.parametrize("fake", ["silent", "trickle", "headers trickle"], indirect=True)
def test_response_that_never_completes_is_retried_until_the_deadline(fake: FakeServer, stop: threading.Event) -> None:
    """A trickle sends a byte every 0.2 s, so that the read timeout alone would never end it."""
    with new_client(fake.url, stop, FAST, server_wait_s=1.0) as client:
        client.wait_until_ready()
        (result,) = predict(client, frames(IMAGES[:1]))
        assert result.outcome == "failed"
        assert "timed out" in str(result.error)
        assert fake.frames_asked >= 2
        fake.behaviour = "good"
        assert_all_answered(predict(client, *one_by_one(IMAGES)))


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_a_start_does_not_wait_for_a_second_attempt(fake: FakeServer, stop: threading.Event) -> None:
    """The workers of a model can't start: TorchServe has the model, and nobody answers."""
    fake.bodies.append(b"")  # The test image is number 1, and gets no good response.
    begin = time.monotonic()
    with new_client(fake.url, stop, replace(FAST, first_response_s=3.0), server_wait_s=0.5) as client:
        with pytest.raises(ServerError, match=r"does not respond \(.*timed out\).*logs/model_log.log has the cause"):
            client.wait_until_ready()
        assert 3.0 < time.monotonic() - begin < 5.5, "a second attempt would take 3 s more"


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_one_slow_response_allows_no_long_silence(fake: FakeServer, stop: threading.Event) -> None:
    """The test image may take seconds, because the server is cold. Later responses show how fast it is."""
    timing = replace(FAST, slow_s=0.2, report_after_s=0.0)
    with new_client(fake.url, stop, timing, max_in_flight=4) as client:
        fake.test_image_s = 1.0
        client.wait_until_ready()
        assert_all_answered(predict(client, frames(IMAGES[:1])))
        fake.behaviour = "silent"
        results: list[Result] = []
        begin = time.monotonic()
        client.submit(frames(IMAGES[1:2]), results.append)
        wait_until(lambda: not client._wait_below(1) and client.health.is_down)
        assert time.monotonic() - begin < 10.0, "the test image took 1 s: a response may take 40 s"


@pytest.mark.parametrize("fake", ["trickle", "headers trickle"], indirect=True)
def test_responses_that_trickle_keep_no_thread(fake: FakeServer, stop: threading.Event) -> None:
    """In all threads of the pool at once: afterwards each of them works again."""
    with new_client(fake.url, stop, replace(FAST, min_response_s=1.5), server_wait_s=1.0) as client:
        client.wait_until_ready()
        results: list[Result] = []
        for request in one_by_one(IMAGES[:4]):
            client.submit(request, results.append)
        client.drain()
        assert [(result.outcome, "timed out" in str(result.error)) for result in results] == [("failed", True)] * 4
        assert fake.frames_asked >= 2 * 4
        fake.behaviour = "slow"  # so that each request needs a thread of its own
        assert_all_answered(predict(client, *one_by_one(IMAGES)))


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_silence_is_reported_before_a_timeout_ends_it(
    fake: FakeServer, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the timeout after the request was sent, and not after the server's last response."""
    results: list[Result] = []
    timing = replace(FAST, min_response_s=2.0, report_after_s=0.2)
    with new_client(fake.url, stop, timing, server_wait_s=60.0) as client:
        client.wait_until_ready()
        time.sleep(1.5)  # Nothing is sent meanwhile, so no response is missing.
        sent_at = time.time()
        client.submit(frames(IMAGES[:1]), results.append)
        thread = threading.Thread(target=client.drain)
        thread.start()
        wait_until(lambda: caplog.records != [])
        assert results == []
        stop.set()
        thread.join()
    assert fake.frames_asked == 1
    [lost] = [record for record in caplog.records if record.name.startswith("edge")]
    assert re.search(r"is not responding \(no response for \d+ s\)", lost.message)
    assert lost.created - sent_at > 1.0


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_requests_in_flight_get_a_few_seconds_after_stop(fake: FakeServer, stop: threading.Event) -> None:
    with new_client(fake.url, stop, Timing(drain_s=0.5)) as client:
        client.wait_until_ready()
        threading.Timer(0.2, stop.set).start()
        begin = time.monotonic()
        results = predict(client, *one_by_one(IMAGES[:4]))
        assert time.monotonic() - begin < 50, "of the 60 s that the server would take"
    assert {result.error for result in results} == {"no response within 0.5 s of the end of the run"}
    assert len(results) == 4
