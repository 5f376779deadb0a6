"""edge/stats.py: what is counted and measured of results."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.cameras import Frame
from edge.stats import Books, Latencies, Rate, Result, table
from tests.support.frames import CLIP
from tests.support.results import CAT, FILE, LIVE, result


def test_percentiles_are_right_to_one_percent() -> None:
    latencies = Latencies()
    assert latencies.percentile(50) == 0.0
    values = [0.001 * number for number in range(1, 1001)]
    for value in values:
        latencies.add(value)
    for percent in (1, 50, 95, 99, 100):
        assert latencies.percentile(percent) == pytest.approx(percent / 100, rel=0.011)
    assert latencies.longest_s == 1.0


@given(st.lists(st.floats(1e-4, 1e4), min_size=1), st.floats(0.1, 100))
def test_percentiles_of_anything(values: list[float], percent: float) -> None:
    latencies = Latencies()
    for value in values:
        latencies.add(value)
    found = latencies.percentile(percent)
    expected = sorted(values)[max(0, int(np.ceil(len(values) * percent / 100 - 1e-9)) - 1)]
    assert expected * 0.9999 <= found <= expected * 1.0101


def test_books_add_up_and_do_not_grow() -> None:
    book = Books()
    for number in range(1, 1001):
        book.captured += 1
        frame = Frame(FILE, number, 0.1 * number, b"")
        failed = Result(frame, "failed", error=f"400 picture {number}")
        book.add(failed if number % 2 == 0 else result(number, at=frame.captured_at))
    assert (book.outcomes["answered"], book.outcomes["failed"]) == (500, 500)
    assert len(book.causes) <= 21
    assert sum(book.causes.values()) == 500
    assert book.fps() == pytest.approx(500 / (99.9 - 0.1 + 0.1))
    shown = table({FILE: book, LIVE: Books()}).splitlines()
    assert shown[1].split() == [str(CLIP), "1000", "500", "500", "0", "0", "5.0", "100", "100", "100", "100", "4.0"]
    assert shown[2].split() == ["rtsp://cam/live?channel=1", "0", "0", "0", "0", "0", "0.0", "-", "-", "-", "-", "-"]
    assert f"{CLIP}: 480 failed: other reasons" in shown


def test_frames_of_a_pass_count_as_one_pass() -> None:
    book = Books()
    for number, shared_by in enumerate((4, 4, 4, 4, 1, 1, 1, 1), start=1):
        frame = Frame(FILE, number, 0.0, b"")
        book.add(Result(frame, "answered", CAT, latency_s=0.1, shared_by=shared_by))
    assert table({FILE: book}).splitlines()[1].split()[-1] == "1.6"  # 8 frames in 5 passes


def test_rate_forgets() -> None:
    rate = Rate()
    assert rate.fps(0.0) == 0.0
    for number in range(100):
        rate.add(result(number, at=100.0 + number), now=100.5 + number)
    assert rate.fps(now=199.5) == 1.0
    assert rate.fps(now=300.0) == 0.0
