"""edge/files.py: damaged files, odd but intact ones, and the times of their frames."""

import math
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge.cameras import Camera
from edge.frames import Frame, Result
from edge.video import Video
from tests.support.frames import frames_of
from tests.support.media import VFR, X264, changed, ffmpeg, pattern, read, tone, zeros

FAST = math.inf


def noise(data: bytearray) -> bytearray:
    first, last = int(0.4 * len(data)), int(0.6 * len(data))
    data[first:last] = random.Random(1).randbytes(last - first)
    return data


@pytest.mark.parametrize("name", ["clip.mp4", "fragments.mp4", "clip.mkv", "clip.webm", "clip.avi", "clip.flv"])
def test_truncated_file_is_an_error_after_its_frames(media: Path, tmp_path: Path, name: str) -> None:
    path = changed(media / name, tmp_path / name, lambda data: data[: int(0.6 * len(data))])
    frames, error = read(path)
    assert 30 < len(frames) < 80
    assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
    assert error
    match = re.search(rf"{name}: (\d+) of (\d+) frames could be read, the file is", error)
    assert match, error
    assert int(match[1]) == len(frames) < int(match[2])


@pytest.mark.parametrize("damage", [zeros, noise])
@pytest.mark.parametrize("name", ["clip.mp4", "h265.mp4", "clip.mkv"])
def test_frames_after_the_damage_are_read(
    media: Path, tmp_path: Path, name: str, damage: Callable[[bytearray], bytes | bytearray]
) -> None:
    frames, error = read(changed(media / name, tmp_path / name, damage))
    assert error
    assert f"{len(frames)} of 100 frames could be read, the file is" in error
    assert 60 < len(frames) < 95
    positions = [frame.position_s or 0.0 for frame in frames]
    assert positions == sorted(positions)
    assert positions[-1] > 3.5, "almost at the end"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm", "clip.avi", "clip.flv", "clip.ts", "h265.mp4"])
def test_intact_file_is_no_error(media: Path, name: str) -> None:
    frames, error = read(media / name)
    assert (len(frames), error) == (100, None)


def test_intact_files_that_state_too_many_frames_are_no_error(media: Path, tmp_path: Path) -> None:
    """An edit list hides most frames; sound that goes on; and a rate that holds for a part of the file."""
    ffmpeg("-ss", "3.5", "-i", media / "h265.mp4", "-t", "0.4", "-c", "copy", tmp_path / "cut.mp4")
    ffmpeg(*pattern(25, 2), *tone(10), *X264, tmp_path / "sound.mkv")
    ffmpeg(*pattern(30, 8), *VFR, *X264, tmp_path / "vfr.mkv")
    for name in ("cut.mp4", "sound.mkv", "vfr.mkv"):
        path = tmp_path / name
        frames, error = read(path)
        stated = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)
        assert (len(frames) < stated, error) == (True, None), name
        assert len(frames) == len(frames_of(path))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_minutes_of_sound_between_two_frames(tmp_path: Path, suffix: str) -> None:
    """By default OpenCV gives up after 4,096 packets of sound."""
    gap = ["-vf", "setpts='PTS+if(gte(N,30),200/TB,0)'", "-fps_mode", "vfr"]
    ffmpeg(*pattern(25, 2.4), *tone(205), *gap, *X264, "-c:a", "aac", tmp_path / f"gap.{suffix}")
    frames, error = read(tmp_path / f"gap.{suffix}")
    assert error is None
    assert len(frames) >= 59
    assert frames[29].position_s == pytest.approx(1.16, abs=0.01)
    assert frames[30].position_s == pytest.approx(201.2, abs=0.01)


def test_why_a_file_cannot_be_read(media: Path, tmp_path: Path) -> None:
    problems = {
        "empty.mp4": "it is empty",
        "index.mp4": "it has no index (moov), since its recording was not completed or a part of it is missing",
        "sound.mp4": "it has no video track",
        "notes.txt": "its format is unknown",
    }
    (tmp_path / "empty.mp4").touch()
    ffmpeg("-i", media / "clip.mp4", "-c", "copy", tmp_path / "whole.mp4")  # the index at its end
    changed(tmp_path / "whole.mp4", tmp_path / "index.mp4", lambda data: data[: len(data) // 2])
    ffmpeg(*tone(1), tmp_path / "sound.mp4")
    (tmp_path / "notes.txt").write_text("notes")
    for name, problem in problems.items():
        path = tmp_path / name
        assert read(path) == ([], f"{path} is no video that OpenCV can read: {problem}")


def test_codec_that_opencv_lacks_is_named(tmp_path: Path) -> None:
    ffmpeg(*pattern(25, 0.2), "-c:v", "libaom-av1", "-cpu-used", "8", tmp_path / "clip.mp4")
    if frames_of(tmp_path / "clip.mp4"):
        pytest.skip("this OpenCV decodes AV1")
    _, error = read(tmp_path / "clip.mp4")
    assert error
    assert "delivers no frames: OpenCV can't decode them (codec AV1)" in error


def test_time_stamps_of_a_variable_rate(media: Path) -> None:
    """At its average rate of 11 frames a second, the 50th would come after 4.5 s."""
    frames, error = read(media / "vfr.mp4", fps=None)
    positions = [*(number / 30 for number in range(50)), 2, 3, 4, 5, 6, 7]
    assert error is None
    assert [frame.position_s for frame in frames] == pytest.approx(positions, abs=0.001)
    took_s = frames[49].captured_at - frames[0].captured_at
    assert 1.6 < took_s < 4
    assert frames[-1].captured_at - frames[0].captured_at > 6.9


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_annotated_video_has_the_times_of_the_file(media: Path, tmp_path: Path, suffix: str) -> None:
    ffmpeg(*pattern(480, 0.25), *X264, tmp_path / "fast.mp4")
    for path, fps in ((media / "vfr.mp4", 30), (tmp_path / "fast.mp4", 480)):
        camera = Camera(str(path), fps=FAST)
        camera.check()
        output = tmp_path / f"{path.stem}-out{suffix}"
        video = Video(output, camera, ["resnet-18"])
        frames = list(camera.frames(threading.Event()))
        for frame in frames:
            shade = np.full((48, 64, 3), 60 * (frame.number % 4), np.uint8)
            image = cv2.imencode(".jpg", shade)[1].tobytes()
            video.write(Result(Frame(camera, frame.number, 0.0, image, frame.position_s, "resnet-18"), "answered", {}))
        video.close()
        assert cv2.VideoCapture(str(output)).get(cv2.CAP_PROP_FPS) == pytest.approx(fps, rel=0.001)
        shown = [round(float(image[-8:, -8:].mean()) / 60) for image in frames_of(output)]
        due = [round((frame.position_s or 0.0) * fps) for frame in frames]
        expected = [sum(slot <= at for slot in due) % 4 for at in range(due[-1] + 1)]
        assert shown == expected


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "sound.mkv", "image.png"])
def test_file_that_is_repeated_begins_anew(media: Path, tmp_path: Path, stop: threading.Event, name: str) -> None:
    """All its frames again, at the same positions; also if it can't seek, or has one frame."""
    ffmpeg(*pattern(25, 1), *tone(2), *X264, tmp_path / "sound.mkv")
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((48, 64, 3), np.uint8))
    path = (tmp_path if name in ("sound.mkv", "image.png") else media) / name
    once = list(Camera(str(path), fps=FAST).frames(stop))
    frames = Camera(str(path), fps=FAST, loop=True).frames(stop)
    thrice = [next(frames) for _ in range(3 * len(once))]
    assert [frame.position_s for frame in thrice] == 3 * [frame.position_s for frame in once]
    assert [frame.jpeg for frame in thrice] == 3 * [frame.jpeg for frame in once]
    stop.set()
    assert list(frames) == []


def test_the_end_of_a_run_ends_the_second_reading_of_a_file(
    media: Path, tmp_path: Path, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(media / "clip.mkv", tmp_path / "clip.mkv", zeros)
    started = threading.Event()
    popen = subprocess.Popen

    def start(_: list[str], **options: Any) -> Any:
        started.set()
        return popen([sys.executable, "-c", "import time; time.sleep(600)"], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    thread = threading.Thread(target=lambda: list(Camera(str(path), FAST).frames(stop)))
    thread.start()
    assert started.wait(60)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
