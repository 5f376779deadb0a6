"""edge/stats.py: counts, latencies and rates, and the summary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.frames import Frame, Result, Stream
from edge.stats import MAX_RESULTS, CameraStats, LastMinute, Latencies, Rate, summary
from tests.support.frames import CLIP
from tests.support.results import CAT, FILE, LIVE, dropped, result


def test_percentiles_are_right_to_one_percent() -> None:
    latencies = Latencies()
    assert latencies.percentile(50) == 0.0
    values = [0.001 * number for number in range(1, 1001)]
    for value in values:
        latencies.add(value)
    for percent in (1, 50, 95, 99, 100):
        assert latencies.percentile(percent) == pytest.approx(percent / 100, rel=0.011)
    assert latencies.max_s == 1.0


@given(st.lists(st.floats(1e-4, 1e4), min_size=1), st.floats(0.1, 100))
def test_percentiles_of_any_latencies(values: list[float], percent: float) -> None:
    latencies = Latencies()
    for value in values:
        latencies.add(value)
    found = latencies.percentile(percent)
    expected = sorted(values)[max(0, int(np.ceil(len(values) * percent / 100 - 1e-9)) - 1)]
    assert expected * 0.9999 <= found <= expected * 1.0101


def test_counts_add_up_and_need_no_more_memory_with_time() -> None:
    stats = CameraStats()
    for number in range(1, 1001):
        stats.captured += 1
        frame = Frame(FILE, number, 0.1 * number, b"")
        failed = Result.failed(frame, f"400 image {number}")
        stats.record(failed if number % 2 == 0 else result(number, at=frame.captured_at))
    assert (stats.outcomes["answered"], stats.outcomes["failed"]) == (500, 500)
    assert len(stats.causes) <= 21
    assert sum(stats.causes.values()) == 500
    assert stats.fps() == pytest.approx(500 / (99.9 - 0.1 + 0.1))
    streams = {Stream(FILE, "resnet-18"): stats, Stream(LIVE, "resnet-18"): CameraStats()}
    lines = summary(streams).splitlines()
    assert lines[1].split() == f"{CLIP} resnet-18 1000 500 500 0 0 0 5.0 100 100 100 100 4.0".split()
    assert lines[2].split() == ["rtsp://cam/live?channel=1", "resnet-18", *"000000", "0.0", *"-----"]
    assert f"{CLIP}: 480 failed: other reasons" in lines


def test_only_the_first_error_of_its_kind_is_new() -> None:
    stats = CameraStats()
    frame = Frame(FILE, 1, 0.0, b"")
    assert [stats.record(Result.failed(frame, error)) for error in ("a", "a", "b", "a")] == [True, False, True, False]
    assert not stats.record(result(2))
    assert stats.record(Result.not_sent(frame, "dropped", "a"))
    assert [stats.record(Result.failed(frame, f"400 image {n}")) for n in range(20)] == 18 * [True] + 2 * [False]


def test_summary_has_a_line_for_each_camera_and_the_most_frequent_causes_first() -> None:
    file, live = CameraStats(captured=7), CameraStats(captured=1)
    for number, error in enumerate(("503 busy", "500 no worker", "503 busy"), start=1):
        file.record(Result.failed(Frame(FILE, number, 0.0, b""), error))
    file.record(result(4, at=0.4))
    file.record(dropped(5))
    for number in (6, 7):
        file.record(Result.not_sent(Frame(FILE, number, 0.5, b""), "unchanged"))
    live.record(Result.not_sent(Frame(LIVE, 1, 0.0, b""), "expired", "older than 300 ms"))
    stats = {Stream(FILE, "resnet-18"): file, Stream(LIVE, "resnet-18"): live}
    width = max(len(stream.camera.name) for stream in stats)
    assert summary(stats).splitlines() == [
        "camera".ljust(width)
        + "  model      captured  answered  failed  dropped  expired  unchanged"
        + "  FPS  p50 ms  p95 ms  p99 ms  max ms  batch",
        FILE.name.ljust(width)
        + "  resnet-18         7         1       3        1        0          2"
        + "  2.0     100     100     100     100    4.0",
        LIVE.name.ljust(width)
        + "  resnet-18         1         0       0        0        1          0"
        + "  0.0       -       -       -       -      -",
        f"{FILE.name}: 2 failed: 503 busy",
        f"{FILE.name}: 1 failed: 500 no worker",
        f"{FILE.name}: 1 dropped: buffer full",
        f"{LIVE.name}: 1 expired: older than 300 ms",
    ]


def test_frames_of_a_forward_pass_count_as_one_pass() -> None:
    stats = CameraStats()
    for number, batch_size in enumerate((4, 4, 4, 4, 1, 1, 1, 1), start=1):
        frame = Frame(FILE, number, 0.0, b"")
        stats.record(Result(frame, "answered", CAT, latency_s=0.1, batch_size=batch_size))
    assert summary({Stream(FILE, "resnet-18"): stats}).splitlines()[1].split()[-1] == "1.6"  # 8 frames in 5 passes


def test_rate_counts_the_last_10_seconds() -> None:
    rate = Rate()
    assert rate.fps(0.0) == 0.0
    for number in range(100):
        rate.add(result(number, at=100.0 + number), now=100.5 + number)
    assert rate.fps(now=199.5) == 1.0
    assert rate.fps(now=300.0) == 0.0


def test_last_minute_has_the_latencies_of_each_second() -> None:
    minute = LastMinute()
    nothing = {"p50_ms": None, "p99_ms": None, "seconds": [[None, None]] * 60}
    assert minute.figures(100.0) == {"last_10_s": {"fps": 0.0, "lost_share": 0.0}, "last_minute": nothing}
    frame = Frame(FILE, 1, 0.0, b"")
    for number in range(1000):  # ten a second, for 100 s; each second has latencies of 10 to 100 ms
        answered = Result(frame, "answered", CAT, latency_s=0.01 * (1 + number % 10))
        lost = {4: dropped(number), 5: Result.not_sent(frame, "expired", "late"), 6: Result.failed(frame, "500")}
        minute.add(lost.get(number % 10, answered), now=100.05 + number / 10)
    figures = minute.figures(now=200.0)
    assert figures["last_10_s"] == {"fps": 7.0, "lost_share": 0.2}
    assert figures["last_minute"] == {"p50_ms": 40.0, "p99_ms": 100.0, "seconds": [[40.0, 100.0]] * 60}
    figures = minute.figures(now=230.0)
    assert figures["last_10_s"] == {"fps": 0.0, "lost_share": 0.0}
    assert figures["last_minute"]["seconds"] == [[40.0, 100.0]] * 30 + [[None, None]] * 30
    assert minute.figures(now=1000.0)["last_minute"] == nothing


def test_share_of_lost_frames_is_that_of_the_frames_that_changed() -> None:
    minute, frame = LastMinute(), Frame(FILE, 1, 0.0, b"")
    for number in range(90):
        minute.add(Result.not_sent(frame, "unchanged"), now=100.0 + number / 10)
    minute.add(dropped(91), now=109.0)
    minute.add(result(92), now=109.1)
    assert minute.figures(109.1)["last_10_s"]["lost_share"] == 0.5


def test_rate_of_the_first_seconds_is_not_that_of_ten_seconds() -> None:
    minute = LastMinute()
    for number in range(50):
        minute.add(result(number), now=100.0 + number / 25)
    assert minute.figures(now=102.0)["last_10_s"]["fps"] == 25.0


def test_last_minute_needs_no_more_memory_with_more_frames() -> None:
    minute = LastMinute()
    for number in range(MAX_RESULTS + 1000):
        minute.add(result(1), now=100 + number / 1000)
    assert len(minute._results) == MAX_RESULTS
