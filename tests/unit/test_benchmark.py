"""benchmarks/: the arithmetic of the figures, and what an interrupted run leaves."""

import json
from pathlib import Path

import pytest

from benchmarks.figures import (
    Record,
    Request,
    count_latencies,
    highest,
    latency_fields,
    percentile,
    percentiles,
    pool,
    rate,
    ratios,
    requests_of,
)
from benchmarks.live import parse_summary
from benchmarks.machine import instruction_sets
from benchmarks.plan import FP32, FULL, LIVE, MOVING_SHARE, ORIGINAL, STATIC, expected_s
from benchmarks.results import Results
from benchmarks.static import FRAMES, MOVING_FRAMES, count_movement, first_of
from benchmarks.tables import full_load_targets, saturation_table, static_table

# Four requests in flight, each of 0.9 s: bursts of four responses.
BURSTS = [Request(0.9 * burst, 0.9 * (burst + 1)) for burst in range(50) for _ in range(4)]
X86 = "processor : 0\nflags\t\t: fpu sse2 avx2 avx512f avx512bw avx512_bf16 amx_bf16\n\nprocessor : 1\n"


@pytest.mark.parametrize("begin", [1.0, 1.4, 1.79, 1.81, 2.5])
def test_the_rate_does_not_depend_on_where_the_window_cuts_a_burst(begin: float) -> None:
    assert rate(BURSTS, begin, begin + 30) == pytest.approx(4 / 0.9)


def test_a_request_outside_the_window_does_not_count() -> None:
    assert rate([Request(0, 1), Request(5, 6)], 2, 4) == 0


def test_a_request_counts_with_its_share_in_the_window() -> None:
    assert rate([Request(0, 4)], 1, 3) == pytest.approx(0.5 / 2)


def test_windows_in_a_row_count_each_request_once() -> None:
    total = sum(rate(BURSTS, begin, begin + 7) * 7 for begin in range(0, 49, 7))
    assert total == pytest.approx(len(BURSTS))


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (500, ["p99_ms", "p95_ms", "p50_ms"]),
        (499, ["p95_ms", "p50_ms"]),
        (100, ["p95_ms", "p50_ms"]),
        (99, ["p50_ms"]),
        (9, []),
        (0, []),
    ],
)
def test_a_percentile_needs_five_requests_beyond_it(count: int, names: list[str]) -> None:
    latencies = count_latencies(range(count))
    assert list(percentiles(latencies)) == names
    fields = latency_fields(range(count))
    assert fields["requests"] == count
    assert [name for name in fields if name.endswith("_ms") and name.startswith("p")] == names
    assert (percentile(latencies, 99) == "-") == ("p99_ms" not in names)
    assert highest(latencies).split(" ")[0] == (names[0][:-3] if names else "-")


def test_percentiles_are_those_of_the_latencies() -> None:
    latencies = count_latencies([10.2] * 600 + [99.6] * 400)
    assert percentiles(latencies) == {"p99_ms": 100.0, "p95_ms": 100.0, "p50_ms": 10.0}


def test_rounds_are_pooled_and_their_requests_counted() -> None:
    rounds = [latency_fields([10.0] * 300), latency_fields([10.0] * 100 + [20.0] * 100)]
    assert pool(rounds) == {"10": 400, "20": 100}
    assert requests_of(rounds) == 500
    assert "p99_ms" not in rounds[0]
    assert highest(pool(rounds)) == "p99 20 ms"


def records(server: str, fps: list[float], requests: int) -> list[Record]:
    head: Record = {"server": server, "kind": "single", "instruction_sets": "avx2"}
    return [
        head | {"round": number, "fps": each} | latency_fields([20.0] * requests)
        for number, each in enumerate(fps, start=1)
    ]


def test_tables_name_the_instruction_sets_and_have_the_number_of_requests() -> None:
    table = saturation_table(records(FP32, [40.0, 50.0, 45.0], 200) + records(ORIGINAL, [20.0], 100))
    header, _, ours, theirs = table.splitlines()
    assert header.startswith("| avx2: frames/s")
    assert ours == f"| {FP32} | 45.0 (40.0–50.0), p99 20 ms, n = 600 | - | - |"
    assert theirs == f"| {ORIGINAL} | 20.0, p95 20 ms, n = 100 | - | - |"


def test_ratios_are_those_of_each_round() -> None:
    ours, theirs = records(FP32, [40.0, 50.0, 45.0], 10), records(ORIGINAL, [20.0, 20.0, 15.0], 20)
    assert ratios(ours, theirs) == [2.0, 2.5, 3.0]
    text, _, measured, requests = full_load_targets(ours + theirs)[0]
    assert (text, measured) == ("fp32, single frames: of the original example", "2.50 (2.00–3.00)")
    assert requests == "30 : 60"


def test_frames_with_movement_are_those_of_each_cameras_own_tenth() -> None:
    """Of whole clips; the first camera answers all frames, the others none."""
    most = max(cameras for cameras, _ in STATIC)
    lines = [
        {"camera": f"/clips/{camera}.avi", "frame": frame, "outcome": "answered" if camera == 0 else "unchanged"}
        for camera in range(most)
        for frame in range(1, FRAMES + 1)
    ]
    found = count_movement(lines)
    assert found == {"sent": FRAMES, "moving": MOVING_FRAMES * most, "moving_answered": MOVING_FRAMES}
    assert found["moving"] == pytest.approx(MOVING_SHARE * len(lines))
    assert len({first_of(camera / most) for camera in range(most)}) == most


def test_share_of_movement_is_that_of_each_round() -> None:
    head = {"instruction_sets": "avx2", "cameras": 30, "skips": True, "captured": 100, "sent": 12, "moving": 10}
    rounds = [head | {"moving_answered": each, "client_ms": 1.0, "compare_ms": 0.4} for each in (9, 10)]
    row = static_table([each | latency_fields([20.0] * 12) for each in rounds]).splitlines()[-1]
    assert (
        row
        == "| 30, --skip-static | 200 | 24 | 20 | 95.0 (90.0–100.0) | 20 (20–20) | 1.0 (1.0–1.0) | 0.40 (0.40–0.40) |"
    )


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path: Path) -> None:
    results = Results(tmp_path, {"rounds": 3}, "avx2")
    results.add("live", {"fps": 25.0})
    part = tmp_path / "results.part.json"
    assert json.loads(part.read_text()) == {"rounds": 3, "live": [{"fps": 25.0, "instruction_sets": "avx2"}]}
    results.finish(1.5)
    assert not part.exists()
    assert json.loads((tmp_path / "results.json").read_text())["minutes"] == 1.5


@pytest.mark.parametrize(
    ("cpuinfo", "sets"),
    [
        (X86, "avx2, avx512f, avx512_bf16, amx_bf16"),
        ("processor : 0\nFeatures\t: fp asimd sve bf16\n", "asimd, sve, bf16"),
        ("flags : fpu sse2\n", "instruction sets unknown"),
        ("", "instruction sets unknown"),
    ],
)
def test_instruction_sets_of_the_processor(cpuinfo: str, sets: str) -> None:
    assert instruction_sets(cpuinfo) == sets


def test_the_benchmark_takes_less_than_45_minutes_and_has_a_p99_of_one_camera() -> None:
    assert sum(expected_s(FULL).values()) < 45 * 60
    assert FULL.saturation_s >= 30
    assert FULL.rounds >= 3
    assert all(1 in LIVE[server] for server in (FP32,))
    assert FULL.rounds * FULL.live_s * 25 >= 500


def test_summary_of_request_py_is_read() -> None:
    rows = "camera  captured  answered\na.mp4        10         9\na.mp4        12        11\n"
    text = f"a warning\n{rows}a.mp4: 1 failed: x\n"
    assert parse_summary(text) == [
        {"camera": "a.mp4", "captured": "10", "answered": "9"},
        {"camera": "a.mp4", "captured": "12", "answered": "11"},
    ]
    with pytest.raises(RuntimeError, match="no summary"):
        parse_summary("Traceback")
