"""edge/timing.py: how long retries and responses may take."""

import math
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.timing import Timing, backoff_s


@given(st.floats(0.001, 10), st.floats(0.001, 100), st.integers(0, 20))
def test_back_off_has_jitter_between_half_of_its_bound_and_the_bound(first_s: float, max_s: float, n: int) -> None:
    bound = min(max_s, first_s * 2**n)
    assert 0.5 * bound <= backoff_s(first_s, max_s, n) <= bound


def test_back_off_doubles_until_its_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda _, high: high)
    assert [backoff_s(0.1, 1.0, attempt) for attempt in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("attempt", [0, 10])
def test_jitter_uses_its_whole_range(attempt: int) -> None:
    bound = min(1.0, 0.1 * 2**attempt)
    found = [backoff_s(0.1, 1.0, attempt) / bound for _ in range(1000)]
    assert min(found) < 0.55
    assert max(found) > 0.95
    assert len(set(found)) > 900


@pytest.mark.parametrize("attempt", [31, 1024, 10_000, 10**9])
def test_back_off_of_very_many_attempts_does_not_overflow(attempt: int) -> None:
    assert 0.5 <= backoff_s(0.1, 1.0, attempt) <= 1.0


def test_a_response_may_take_longer_while_more_frames_are_in_flight() -> None:
    timing = Timing(response_s=2.0, response_per_frame_s=0.5, min_response_s=5.0)
    assert [timing.response_timeout_s(frames) for frames in (1, 6, 7, 16)] == [5.0, 5.0, 5.5, 10.0]


def test_all_times_are_finite_positive_seconds_and_cannot_be_changed() -> None:
    timing = Timing()
    for field in fields(Timing):
        assert field.name.endswith("_s")
        assert 0 < getattr(timing, field.name) < math.inf
        with pytest.raises(FrozenInstanceError):
            setattr(timing, field.name, 1.0)
    assert timing.first_backoff_s < timing.max_backoff_s
    assert timing.first_reconnect_s < timing.max_reconnect_s
