"""edge/sinks.py: what is shown and written of results."""

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.cameras import Camera, Frame
from edge.sinks import JsonLines, SinkError, Terminal, Video, annotated
from edge.stats import Result
from tests.support.frames import CLIP, frames_of, jpeg
from tests.support.results import CAT, FILE, LIVE, result
from tests.support.scripts import outputs


def dropped(number: int, camera: Camera = FILE, at: float = 0.0) -> Result:
    return Result(Frame(camera, number, at, b""), "dropped", error="buffer full")


STEADY = [100 + 0.1 * number for number in range(1, 21)]  # the first frame is captured at 100.0 s
SLOWER = [100 + 0.1 * number for number in range(1, 101)] + [110.0 + number for number in range(1, 21)]


@pytest.mark.parametrize(
    ("answered_at", "failed", "expected"),
    [
        (STEADY, set(), [10.0, 10.0]),
        (STEADY, set(range(2, 21, 2)), [5.0, 5.0]),  # Failed frames take their time, and do not count.
        (SLOWER, set(), [10.0] * 10 + [1.0, 1.0]),  # Only the last 10 s count.
    ],
    ids=["steady", "half of them failed", "slower"],
)
def test_fps_is_answered_frames_over_time(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answered_at: list[float],
    failed: set[int],
    expected: list[float],
) -> None:
    terminal = Terminal(batch_size=4, as_json=False, log_every=10, show_names=False)
    for number, now in enumerate(answered_at, start=1):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        frame = Frame(FILE, number, now - 0.1, b"")
        terminal.show(Result(frame, "failed", error="x") if number in failed else Result(frame, "answered", CAT))
    terminal.close()
    assert [output.fps for output in outputs(capsys.readouterr().out)] == pytest.approx(expected, abs=0.051)


def test_terminal_shows_the_last_answers_once(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(batch_size=3, as_json=True, log_every=1, show_names=False)
    for number in range(1, 6):
        terminal.show(
            dropped(number) if number == 2 else Result(Frame(FILE, number, 0, b""), "answered", {"x": number})
        )
    terminal.show(dropped(6))
    terminal.close()
    terminal.close()
    shown = outputs(capsys.readouterr().out)
    assert [(output.number, output.answers) for output in shown] == [
        (3, [[{"x": 1}, {"x": 3}]]),
        (6, [[{"x": 4}, {"x": 5}]]),
    ]


def test_terminal_says_whose_answers_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(batch_size=1, as_json=False, log_every=2, show_names=True)
    for number in (1, 2):
        terminal.show(result(number, FILE))
        terminal.show(result(number, LIVE))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{CLIP}\nWith Batch Size 1, FPS at frame number 2 is ")
    assert "\nrtsp://cam/live?channel=1\nWith Batch Size 1, " in printed
    assert "hunter2" not in printed


def test_json_lines(tmp_path: Path) -> None:
    sink = JsonLines(str(tmp_path / "out.jsonl"))
    now = datetime.now(timezone.utc)
    sink.show(result(1, LIVE, at=time.monotonic() - 100))
    sink.show(dropped(2, LIVE, at=time.monotonic()))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    sink.close()
    assert (now - datetime.fromisoformat(lines[0].pop("captured_at"))).total_seconds() == pytest.approx(100, abs=5)
    assert abs((now - datetime.fromisoformat(lines[1].pop("captured_at"))).total_seconds()) < 5
    assert lines == [
        {
            "camera": "rtsp://cam/live?channel=1",
            "frame": 1,
            "latency_ms": 100.0,
            "outcome": "answered",
            "predictions": CAT,
            "error": None,
        },
        {
            "camera": "rtsp://cam/live?channel=1",
            "frame": 2,
            "latency_ms": None,
            "outcome": "dropped",
            "predictions": None,
            "error": "buffer full",
        },
    ]


def shades(path: Path) -> list[int]:
    """Return the shade of each frame of a video, read where nothing is drawn, to the nearest multiple of 50."""
    return [50 * round(float(frame[-8:, -8:].mean()) / 50) for frame in frames_of(path)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".MP4"])
def test_video_of_a_file_keeps_its_timing(tmp_path: Path, suffix: str) -> None:
    FILE.check()
    video = Video(tmp_path / f"out{suffix}", [FILE])
    for each in [dropped(1), result(2, shade=50), result(3, shade=100), dropped(4), dropped(5), result(6, shade=200)]:
        video.show(each)
    video.close()
    capture = cv2.VideoCapture(str(tmp_path / f"out{suffix}"))
    assert capture.get(cv2.CAP_PROP_FPS) == 25
    assert shades(tmp_path / f"out{suffix}") == [50, 50, 100, 100, 100, 200]


def test_video_of_a_live_source_takes_as_long_as_it_took(tmp_path: Path) -> None:
    camera = Camera("0")
    camera.fps = 10.0
    video = Video(tmp_path / "out.mkv", [camera])
    for number, at, shade in ((1, 50.0, 0), (2, 50.1, 50), (3, 50.11, 100), (4, 50.6, 150), (5, 90.6, 200)):
        video.show(result(number, camera, at, shade))
    video.close()
    # 0.5 s of the third picture; 10 s, not 40 s, of the fourth.
    assert shades(tmp_path / "out.mkv") == [0, 50, 100, 100, 100, 100, 150] + [150] * 100 + [200]


def test_video_of_a_live_source_that_is_faster_than_it_states(tmp_path: Path) -> None:
    camera = Camera("0")
    camera.fps = 10.0
    video = Video(tmp_path / "out.mkv", [camera])
    for number in range(1, 62):
        video.show(result(number, camera, 50 + number / 30))
    video.close()
    assert len(frames_of(tmp_path / "out.mkv")) == 21


def test_video_stops_before_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = Video(tmp_path / "out.mp4", [FILE])
    for number in range(1, 26):
        video.show(result(number))
    monkeypatch.setattr("edge.sinks.DISK_RESERVE", 10**18)
    with pytest.raises(OSError, match="No space left on device"):
        video.show(result(26))
    video.close()
    assert len(frames_of(tmp_path / "out.mp4")) == 25


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_video_that_was_cut_off_is_an_error(tmp_path: Path, suffix: str) -> None:
    """OpenCV does not report that it could not write: here because of a limit of 100 KB a file."""
    import resource

    path = tmp_path / f"out{suffix}"
    video = Video(path, [FILE])
    noise = np.random.default_rng(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for number in range(1, 60):
            image = jpeg(noise.integers(0, 255, (480, 640, 3), np.uint8))
            video.show(Result(Frame(FILE, number, 0.0, image), "failed", error="x"))
        with pytest.raises(OSError, match=f"{path} has not all of its 59 frames"):
            video.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_video_accepts_another_resolution(tmp_path: Path) -> None:
    video = Video(tmp_path / "out.mp4", [FILE])
    video.show(result(1))
    larger = jpeg(np.full((480, 640, 3), 200, np.uint8))
    video.show(Result(Frame(FILE, 2, 0.0, larger), "failed", error="503 has no worker"))
    video.close()
    assert [frame.shape for frame in frames_of(tmp_path / "out.mp4")] == [(48, 64, 3)] * 2


def test_videos_of_several_cameras(tmp_path: Path) -> None:
    cameras = [Camera(str(CLIP)), Camera("1"), Camera("2")]
    video = Video(tmp_path / "out.mp4", cameras)
    video.show(result(1, cameras[0], shade=50))
    video.show(result(1, cameras[1], shade=150))
    video.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.mp4", "out-2.mp4"]  # and none without frames
    assert shades(tmp_path / "out-1.mp4") == [50]
    assert shades(tmp_path / "out-2.mp4") == [150]


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match=r"expected a name that ends in .mp4, .mkv, .avi"):
        Video(tmp_path / "out.gif", [FILE])
    with pytest.raises(SinkError, match="No such file or directory"):
        Video(tmp_path / "no" / "out.mp4", [FILE])
    with pytest.raises(SinkError, match="No such file or directory"):
        JsonLines(str(tmp_path / "no" / "out.jsonl"))


def test_labels_are_drawn_where_they_can_be_read() -> None:
    cats = {"lynx": 0.1, "cat": 0.6, "dog": 0.2, "x": 0.05}
    for shade in (0, 128, 255):
        big = jpeg(np.full((480, 640, 3), shade, np.uint8))
        drawn = annotated(Result(Frame(FILE, 1, 0.0, big), "answered", cats))
        assert drawn[110:, :].min() == drawn[110:, :].max() == shade, "three labels at most, at the top"
        assert drawn[8:40, 8:100].max() > 200, "white letters"
        assert drawn[8:40, 8:100].min() < 50, "on black"
