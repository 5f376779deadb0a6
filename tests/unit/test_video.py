"""edge/video.py: annotated videos, and how long they play."""

import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import options
from edge.cameras import Camera
from edge.drawing import annotate
from edge.errors import OutputError
from edge.frames import Frame, Result
from edge.outputs import Outputs
from edge.video import MAX_STILL_S, Video, live_repeats
from tests.support.frames import CLIP, frames_of, jpeg
from tests.support.results import FILE, MODEL, dropped, result

NTSC = 30000 / 1001  # frames a second


@pytest.mark.parametrize(
    ("written", "elapsed_s", "fps", "expected"),
    [
        pytest.param(0, 0.0, 10.0, (1, 0.0), id="first frame"),
        pytest.param(1, 0.1, 10.0, (1, 0.0), id="on time"),
        pytest.param(5, 0.46, 10.0, (1, 0.0), id="early by less than half an interval"),
        pytest.param(5, 0.54, 10.0, (1, 0.0), id="late by less than half an interval"),
        pytest.param(3, 0.6, 10.0, (4, 0.0), id="late by three frames"),
        pytest.param(2, 0.11, 10.0, (0, 0.0), id="faster than stated"),
        pytest.param(9, 0.11, 10.0, (0, 0.0), id="much faster than stated"),
        pytest.param(1, 10.0, 10.0, (100, 0.0), id="just below the limit"),
        pytest.param(1, 10.1, 10.0, (101, 0.0), id="at the limit"),
        pytest.param(1, 10.2, 10.0, (101, 0.1), id="just above the limit"),
        pytest.param(7, 40.6, 10.0, (101, 29.9), id="a gap of 40 s"),
        pytest.param(1, 1 / NTSC, NTSC, (1, 0.0), id="NTSC"),
        pytest.param(100_000, 100_000 / NTSC, NTSC, (1, 0.0), id="NTSC after an hour"),
        pytest.param(1, 60.0, 0.5, (6, 48.0), id="a frame every 2 s"),
        pytest.param(1, 5000.0, 0.001, (1, 4000.0), id="an interval above the limit"),
        pytest.param(1, 3600.0, 240.0, (2401, 3590 - 1 / 240), id="240 frames a second, an hour"),
    ],
)
def test_frames_that_are_due_in_a_live_video(
    written: int, elapsed_s: float, fps: float, expected: tuple[int, float]
) -> None:
    assert live_repeats(written, elapsed_s, fps) == pytest.approx(expected)


@given(st.lists(st.floats(0.0, 30.0), max_size=30), st.floats(0.1, 240.0))
def test_a_live_video_plays_as_long_as_the_camera_ran_without_the_seconds_left_out(
    gaps_s: list[float], fps: float
) -> None:
    written, now, start = live_repeats(0, 0.0, fps)[0], 0.0, 0.0
    assert written == 1
    for gap_s in gaps_s:
        now += gap_s
        repeats, left_out_s = live_repeats(written, now - start, fps)
        written, start = written + repeats, start + left_out_s
        assert 0 <= repeats <= 1 + MAX_STILL_S * fps + 0.5
        assert left_out_s == 0 or gap_s > MAX_STILL_S - 1 / fps
        # Half a frame of rounding, and one frame that came too early.
        assert abs(written - 1 - (now - start) * fps) <= 1.5001


def shades(path: Path) -> list[int]:
    """Return the shade of each frame of a video, read where nothing is drawn, to the nearest multiple of 50."""
    return [50 * round(float(frame[-8:, -8:].mean()) / 50) for frame in frames_of(path)]


def live_camera(fps: float) -> Camera:
    camera = Camera("0")
    camera.fps = fps
    return camera


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".MP4"])
def test_video_of_a_file_keeps_its_timing(tmp_path: Path, suffix: str) -> None:
    FILE.check()
    video = Video(tmp_path / f"out{suffix}", FILE, [MODEL])
    for each in [dropped(1), result(2, shade=50), result(3, shade=100), dropped(4), dropped(5), result(6, shade=200)]:
        video.write(each)
    video.close()
    capture = cv2.VideoCapture(str(tmp_path / f"out{suffix}"))
    assert capture.get(cv2.CAP_PROP_FPS) == 25
    assert shades(tmp_path / f"out{suffix}") == [50, 50, 100, 100, 100, 200]


def test_video_of_a_live_source_plays_as_long_as_the_camera_ran(tmp_path: Path) -> None:
    camera = live_camera(fps=10.0)
    video = Video(tmp_path / "out.mkv", camera, [MODEL])
    for number, at, shade in ((1, 50.0, 0), (2, 50.1, 50), (3, 50.11, 100), (4, 50.6, 150), (5, 90.6, 200)):
        video.write(result(number, camera, at, shade))
    video.close()
    # 0.5 s of the third frame; 10 s, not 40 s, of the fourth.
    assert shades(tmp_path / "out.mkv") == [0, 50, 100, 100, 100, 100, 150] + [150] * 100 + [200]


def test_video_of_a_live_source_goes_on_at_its_rate_after_a_gap_that_was_cut(tmp_path: Path) -> None:
    camera = live_camera(fps=2.0)
    video = Video(tmp_path / "out.mkv", camera, [MODEL])
    for number, at in enumerate((50.0, 950.0, 950.5, 951.0), start=1):
        video.write(result(number, camera, at, shade=50 * number))
    video.close()
    assert shades(tmp_path / "out.mkv") == [50] * 21 + [100, 150, 200]


def test_frames_of_a_live_source_that_were_not_sent_are_replaced_by_the_frame_before(tmp_path: Path) -> None:
    camera = live_camera(fps=10.0)
    video = Video(tmp_path / "out.mkv", camera, [MODEL])
    for each in (
        dropped(1, camera, 49.9),
        result(2, camera, 50.0, shade=50),
        dropped(3, camera, 50.1),
        dropped(4, camera, 50.2),
        result(5, camera, 50.3, shade=200),
    ):
        video.write(each)
    video.close()
    assert shades(tmp_path / "out.mkv") == [50, 50, 50, 200]


def test_video_of_a_live_source_that_is_faster_than_it_states(tmp_path: Path) -> None:
    camera = live_camera(fps=10.0)
    video = Video(tmp_path / "out.mkv", camera, [MODEL])
    for number in range(1, 62):
        video.write(result(number, camera, 50 + number / 30))
    video.close()
    assert len(frames_of(tmp_path / "out.mkv")) == 21


def test_video_stops_before_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = Video(tmp_path / "out.mp4", FILE, [MODEL])
    for number in range(1, 26):
        video.write(result(number))
    monkeypatch.setattr("edge.video.DISK_RESERVE", 10**18)
    with pytest.raises(OSError, match="No space left on device"):
        video.write(result(26))
    video.close()
    assert len(frames_of(tmp_path / "out.mp4")) == 25


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_video_that_was_cut_off_is_an_error(tmp_path: Path, suffix: str) -> None:
    """OpenCV does not report that it could not write: here because of a limit of 100 KB a file."""
    import resource

    path = tmp_path / f"out{suffix}"
    video = Video(path, FILE, [MODEL])
    noise = np.random.default_rng(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for number in range(1, 60):
            image = jpeg(noise.integers(0, 255, (480, 640, 3), np.uint8))
            video.write(Result.failed(Frame(FILE, number, 0.0, image, (number - 1) / 25, MODEL), "x"))
        with pytest.raises(OSError, match=f"{path} has not all of its 59 frames"):
            video.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_video_accepts_another_resolution(tmp_path: Path) -> None:
    video = Video(tmp_path / "out.mp4", FILE, [MODEL])
    video.write(result(1))
    larger = jpeg(np.full((480, 640, 3), 200, np.uint8))
    video.write(Result.failed(Frame(FILE, 2, 0.0, larger, 0.04, MODEL), "503 has no worker"))
    video.close()
    assert [frame.shape for frame in frames_of(tmp_path / "out.mp4")] == [(48, 64, 3)] * 2


def test_videos_of_several_cameras(tmp_path: Path) -> None:
    cameras = [Camera(str(CLIP)), Camera("1"), Camera("2")]
    inputs = ["--input", str(CLIP), "--input", "1", "--input", "2"]
    paths = options.parse_args([*inputs, "--save-video", str(tmp_path / "out.mp4")]).video_paths
    videos = [Video(path, camera, [MODEL]) for path, camera in zip(paths, cameras, strict=True)]
    outputs = Outputs(videos, threading.Event())
    outputs.write(result(1, cameras[0], shade=50))
    outputs.write(result(1, cameras[1], shade=150))
    outputs.close()
    assert not outputs.has_failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.mp4", "out-2.mp4"]  # and none without frames
    assert shades(tmp_path / "out-1.mp4") == [50]
    assert shades(tmp_path / "out-2.mp4") == [150]


def test_video_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        Video(tmp_path / "no" / "out.mp4", FILE, [MODEL])


@pytest.mark.parametrize("suffix", options.VIDEO_CODECS)
@pytest.mark.parametrize("fps", [0.5, 23.976, 29.97, 66.667, 119.963, 240.0, 480.0, 1000.0, NTSC])
def test_videos_of_all_rates_can_be_written(tmp_path: Path, suffix: str, fps: float) -> None:
    camera = live_camera(fps)
    output = Video(tmp_path / f"out{suffix}", camera, [MODEL])
    for number in range(1, 6):
        output.write(result(number, camera, 50 + number / fps))
    output.close()
    capture = cv2.VideoCapture(str(tmp_path / f"out{suffix}"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(fps, rel=2e-4)
    assert len(frames_of(tmp_path / f"out{suffix}")) == 5


def test_video_may_have_a_relative_name_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = Video(Path("12:00:00.mp4"), FILE, [MODEL])
    output.write(result(1))
    output.close()
    assert len(frames_of(tmp_path / "12:00:00.mp4")) == 1


def test_video_that_opencv_cannot_write_is_an_error_before_the_first_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(options.VIDEO_CODECS, ".mp4", ("xxxx",))
    with pytest.raises(OutputError, match=r"OpenCV can't write .*out.mp4 at 25 frames a second"):
        Video(tmp_path / "out.mp4", FILE, [MODEL])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="locks are of POSIX")
def test_video_that_another_run_is_writing_is_refused_and_keeps_its_frames(tmp_path: Path) -> None:
    path = tmp_path / "out.mkv"
    first = Video(path, FILE, [MODEL])
    first.write(result(1))
    with pytest.raises(OutputError, match=r"out.mkv: another run is writing it"):
        Video(path, FILE, [MODEL])
    first.close()
    assert len(frames_of(path)) == 1


def test_labels_are_drawn_where_they_can_be_read() -> None:
    cats = {"lynx": 0.1, "cat": 0.6, "dog": 0.2, "x": 0.05}
    for shade in (0, 128, 255):
        image = jpeg(np.full((480, 640, 3), shade, np.uint8))
        frame = Frame(FILE, 1, 0.0, image)
        drawn = annotate(frame, {"resnet-18": Result(frame, "answered", cats)})
        assert drawn[110:, :].min() == drawn[110:, :].max() == shade, "three labels at most, at the top"
        assert drawn[8:40, 8:100].max() > 200, "white letters"
        assert drawn[8:40, 8:100].min() < 50, "on black"


def letters(path: Path) -> list[int]:
    """Return how many rows of each frame of a video have something dark drawn on them: 32 for each line."""
    return [int((frame[:140, 9:11].max(axis=(1, 2)) < 60).sum()) for frame in frames_of(path)]


def big(number: int, model: str, camera: Camera = FILE, at: float = 0.0) -> Result:
    """Return the result of a frame of 480 x 640, in which a line of text can be recognized."""
    image = jpeg(np.full((480, 640, 3), 200, np.uint8))
    position = None if camera.is_live else (number - 1) / 25
    return Result(Frame(camera, number, at, image, position, model, number), "answered", {model * 20: 1.0})


def test_frames_of_a_file_are_shown_with_the_predictions_of_all_models_for_them(tmp_path: Path) -> None:
    """However late a model responds: the file waits for it."""
    video = Video(tmp_path / "out.mkv", FILE, ["a", "b"])
    for number in (1, 2, 3):
        video.write(big(number, "a"))
    assert video._written == 0
    for number in (1, 2, 3):
        video.write(big(number, "b"))
    video.close()
    one, *others = letters(tmp_path / "out.mkv")
    assert others == [one, one]
    assert one > 40, "two lines"


def test_a_live_video_does_not_wait_for_a_slow_model(tmp_path: Path) -> None:
    camera = live_camera(fps=10.0)
    video = Video(tmp_path / "out.mkv", camera, ["a", "b"])
    for number in range(1, 4):
        video.write(big(number, "a", camera, 0.1 * number))
    assert video._written == 3
    video.write(big(1, "b", camera, 0.1))
    assert video._written == 3, "the frame was shown already"
    video.write(big(4, "a", camera, 0.4))
    video.close()
    rows = letters(tmp_path / "out.mkv")
    assert rows[0] == rows[1] == rows[2] < rows[3], "then its prediction is on the next frame"


def test_a_frame_that_one_model_dropped_is_shown_with_the_image_that_another_brings(tmp_path: Path) -> None:
    camera = live_camera(fps=10.0)
    video = Video(tmp_path / "out.mkv", camera, ["a", "b"])
    video.write(result(1, camera, 0.1, 0, "a"))
    video.write(dropped(2, camera, 0.2, "b"))
    video.write(result(2, camera, 0.2, 100, "a"))
    video.write(dropped(3, camera, 0.3, "b"))
    video.write(dropped(3, camera, 0.3, "a"))
    video.write(dropped(4, camera, 0.4, "a"))
    video.close()
    assert shades(tmp_path / "out.mkv") == [0, 100, 100, 100]
