"""edge/session.py: ServerHealth, which reports once that the server is down and once that it responds again."""

import logging
import threading

import pytest

from edge.session import ServerHealth
from edge.timing import Timing

URL = "http://server:8080"
DOWN = f"{URL} is not responding (503 busy); retrying until it does"


class Clock:
    """Stands in for time.monotonic()."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


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
