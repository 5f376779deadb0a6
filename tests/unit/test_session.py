"""edge/session.py: which attempts a request makes, and what ServerHealth reports about the server."""

import logging
import threading
from typing import Any

import pytest
import requests
from requests.adapters import BaseAdapter

from edge.auth import BearerToken
from edge.session import MAX_TOKENS, RetrySession, ServerHealth
from edge.timing import Timing
from tests.support.clock import Clock

URL = "http://server:8080"
DOWN = f"{URL} is not responding (503 busy); retrying until it does"


@pytest.fixture
def health(caplog: pytest.LogCaptureFixture) -> ServerHealth:
    caplog.set_level(logging.INFO)
    return ServerHealth(URL, Timing(report_after_s=2.0))


def fail(health: ServerHealth, clock: Clock, *seconds: float, reason: str = "503 busy") -> None:
    """Record failures at some seconds after the test's begin."""
    for second in seconds:
        clock.now = 100.0 + second
        health.record_failure(reason)


def test_short_failures_are_not_reported(health: ServerHealth, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fail(health, clock, 0.0, 1.0, 1.9)
    assert not health.is_down
    clock.now += 10
    health.record_success()
    assert not health.is_down
    assert caplog.messages == []


def test_a_server_that_is_down_is_reported_once_and_its_return_once(
    health: ServerHealth, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fail(health, clock, 0.0, 2.0)
    assert health.is_down
    assert caplog.messages == [DOWN]
    fail(health, clock, 2.1, 3.0, 60.0, reason="connection refused")
    assert caplog.messages == [DOWN]
    assert health.last_error == "connection refused"
    clock.now = 163.2
    health.record_success()
    health.record_success()
    assert not health.is_down
    assert caplog.messages == [DOWN, f"{URL} is responding again after 63.2 s"]


def test_every_success_starts_the_time_anew(
    health: ServerHealth, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fail(health, clock, 0.0, 1.5)
    health.record_success()
    fail(health, clock, 1.6, 3.5)
    assert caplog.messages == []
    fail(health, clock, 3.7)
    assert caplog.messages == [DOWN]
    health.record_success()
    fail(health, clock, 4.0, 6.0)
    assert caplog.messages.count(DOWN) == 2


def test_down_for_s_counts_from_the_first_failure_after_the_last_success(health: ServerHealth, clock: Clock) -> None:
    assert health.down_for_s() == 0.0
    clock.now = 110.0
    assert health.down_for_s() == 0.0
    fail(health, clock, 10.0, 11.0)
    assert health.down_for_s() == pytest.approx(1.0)
    clock.now = 115.0
    assert health.down_for_s() == pytest.approx(5.0)
    health.record_success()
    assert health.down_for_s() == 0.0


def test_many_threads_report_once(health: ServerHealth, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fail(health, clock, 0.0)
    clock.now += 5

    def together(action: str) -> None:
        barrier = threading.Barrier(16)

        def run() -> None:
            barrier.wait(60)
            health.record_failure("503 busy") if action == "fail" else health.record_success()

        threads = [threading.Thread(target=run) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    together("fail")
    assert caplog.messages == [DOWN]
    together("succeed")
    assert caplog.messages == [DOWN, f"{URL} is responding again after 5.0 s"]


class Server(BaseAdapter):
    """Responds with the next of its responses, the last one again and again; each takes `seconds`."""

    def __init__(self, clock: Clock, *responses: int | Exception, seconds: float = 0.0) -> None:
        super().__init__()
        self.clock, self.responses, self.seconds, self.attempts = clock, list(responses), seconds, 0

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        self.attempts += 1
        self.clock.now += self.seconds
        outcome = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        if isinstance(outcome, Exception):
            raise outcome
        response = requests.Response()
        response.status_code, response.request = outcome, request
        response._content = b""
        return response

    def close(self) -> None:
        pass


class Stop(threading.Event):
    """A stop event whose wait() takes its time on the clock only."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        self.clock.now += timeout
        return self.is_set()


class Token(BearerToken):
    """A token that is replaced `refreshes` times."""

    refreshes = 0

    def refresh(self, response: requests.Response) -> bool:  # noqa: ARG002
        self.refreshes -= 1
        return self.refreshes >= 0


def new_session(health: ServerHealth, server: Server, stop: Stop, refreshes: int = 0) -> RetrySession:
    token = Token(None, None, Timing())
    token.refreshes = refreshes
    session = RetrySession(token, health, 1, stop, Timing())
    session.mount("http://", server)
    session.retry_timeout_s = 3.0
    return session


@pytest.fixture
def stop(clock: Clock) -> Stop:
    return Stop(clock)


def test_attempts_end_at_the_deadline_with_growing_pauses(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    server = Server(clock, 503)
    assert new_session(health, server, stop).get(URL).status_code == 503
    assert clock.now == pytest.approx(103.0), "the last pause ends at the deadline"
    assert server.attempts == len(stop.pauses) + 1
    assert stop.pauses[0] < 0.11
    assert 0.5 <= max(stop.pauses) <= 1.0
    assert health.last_error == "503"


def test_the_deadline_counts_from_the_first_failure(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    server = Server(clock, requests.ReadTimeout("timed out"), 200, seconds=10.0)
    assert new_session(health, server, stop).get(URL).status_code == 200
    assert server.attempts == 2


def test_the_error_of_the_last_attempt_is_raised(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    server = Server(clock, 503, requests.ConnectionError("refused"))
    with pytest.raises(requests.ConnectionError, match="refused"):
        new_session(health, server, stop).get(URL)
    assert clock.now == pytest.approx(103.0)


@pytest.mark.parametrize("first", [503, requests.ConnectTimeout("timed out")])
@pytest.mark.parametrize("final", [200, 400, 413])
def test_a_final_response_ends_the_attempts_and_the_server_is_back(
    health: ServerHealth, clock: Clock, stop: Stop, first: int | Exception, final: int
) -> None:
    server = Server(clock, first, final)
    assert new_session(health, server, stop).get(URL).status_code == final
    assert server.attempts == 2
    assert health.down_for_s() == 0.0


def test_an_error_that_lasts_is_not_retried(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    server = Server(clock, requests.exceptions.InvalidSchema("no http"), 200)
    with pytest.raises(requests.exceptions.InvalidSchema):
        new_session(health, server, stop).get(URL)
    assert (server.attempts, stop.pauses) == (1, [])


def test_stop_ends_the_attempts(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    stop.set()
    server = Server(clock, 503)
    assert new_session(health, server, stop).get(URL).status_code == 503
    assert server.attempts == 1


def test_a_new_token_is_tried_at_once_but_only_so_often(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    server = Server(clock, 401)
    assert new_session(health, server, stop, refreshes=100).get(URL).status_code == 401
    assert (server.attempts, stop.pauses) == (1 + MAX_TOKENS, [])
    accepted = Server(clock, 401, 200)
    assert new_session(health, accepted, stop, refreshes=1).get(URL).status_code == 200
    assert (accepted.attempts, stop.pauses) == (2, [])


def test_a_rejected_token_is_retried_only_after_the_start(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    server = Server(clock, 401)
    session = new_session(health, server, stop)
    assert session.get(URL).status_code == 401
    assert (server.attempts, health.last_error) == (1, "")
    session.is_streaming = True
    assert session.get(URL).status_code == 401
    assert clock.now == pytest.approx(103.0)
    assert server.attempts > 4
    assert health.last_error == "401"


def test_a_start_waits_while_torchserve_writes_its_keys(health: ServerHealth, clock: Clock, stop: Stop) -> None:
    server = Server(clock, 401, 401, 401, 200)
    session = new_session(health, server, stop)
    session._token.is_awaited = True
    assert session.get(URL).status_code == 200
    assert server.attempts == 4
