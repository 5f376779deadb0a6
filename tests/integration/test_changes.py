"""--skip-static: video that a camera compressed, and a whole run. tests/unit/test_changes.py has all else."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.support.fake_server import FakeServer
from tests.support.frames import CLIP, Pixels, frames_of, jpeg, write_video
from tests.support.media import ffmpeg
from tests.support.mjpeg_camera import mjpeg_camera
from tests.support.scenes import Judgement, Scene, Sensor, background, judge, walk
from tests.support.scripts import json_lines, run, running, summary

CODECS = {
    "H.264, good": ["-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "10"],
    "H.264, poor": ["-c:v", "libx264", "-preset", "veryfast", "-crf", "34", "-g", "25"],
    "H.265, poor": [
        "-c:v",
        "libx265",
        "-preset",
        "veryfast",
        "-crf",
        "34",
        "-g",
        "25",
        "-x265-params",
        "log-level=error",
    ],
    "MPEG-4": ["-c:v", "mpeg4", "-q:v", "8", "-g", "12"],
    "MJPEG": ["-c:v", "mjpeg", "-q:v", "8"],
}


def compressed(photos: Sequence[Pixels], codec: str, folder: Path) -> list[Pixels]:
    """Return what is left of photos after a camera's encoder."""
    height, width = photos[0].shape[:2]
    (folder / "raw").write_bytes(b"".join(photo.tobytes() for photo in photos))
    raw: list[str | Path] = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "bgr24",
        "-s",
        f"{width}x{height}",
        "-r",
        "5",
        "-i",
        folder / "raw",
    ]
    ffmpeg(*raw, *CODECS[codec], "-pix_fmt", "yuvj420p" if codec == "MJPEG" else "yuv420p", folder / "video.mkv")
    found = frames_of(folder / "video.mkv")
    assert len(found) == len(photos)
    return found


def check(found: Judgement, name: str) -> None:
    """Check precision and recall; docs/cameras-and-outputs.md states them."""
    print(f"{name}: precision {found.precision:.3f}, recall {found.recall:.3f}, {found}")
    assert min(found.wanted, found.static) > 50
    assert found.precision >= 0.98
    assert found.recall >= 0.95


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_scenes(codec: str, tmp_path: Path) -> None:
    """Persons who walk by, 640 x 480; keyframes look different from the frames before them."""
    total = Judgement()
    for seed, (share, contrast) in enumerate([(0.015, 40), (0.015, -60), (0.06, 30)]):
        scenes = walk(background(seed), share, contrast, 0.03)
        sensor = Sensor(12.0, seed)
        total += judge(scenes, compressed([sensor.photo(scene) for scene in scenes], codec, tmp_path))
    check(total, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_still_scene_that_is_compressed(codec: str, tmp_path: Path) -> None:
    """A minute: only the frame of each 10 s is sent."""
    scenes = [background(7)] * 300
    sensor = Sensor(8.0)
    found = judge(scenes, compressed([sensor.photo(scene) for scene in scenes], codec, tmp_path))
    assert found.static > 200
    assert found.wrong == 0


@pytest.mark.parametrize("codec", ["H.264, good", "H.264, poor", "MJPEG"])
def test_sample_clip_with_still_periods(codec: str, tmp_path: Path) -> None:
    """The cat moves for 2 s, then nothing does for 4 s, and so on."""
    moving = frames_of(CLIP)[::5]
    scenes: list[Scene] = []
    for first, after in pairwise(range(0, len(moving), 10)):
        period = [frame.astype(np.float32) for frame in moving[first:after]]
        scenes += period + period[-1:] * 20
    sensor = Sensor(8.0)
    photos = compressed([sensor.photo(scene) for scene in scenes], codec, tmp_path)
    check(judge(scenes, photos, levels=25), f"the sample clip, {codec}")


@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize("flags", [[], ["--client-batching", "--batch-size", "4"]], ids=["frames", "batches"])
def test_run_with_skip_static(fake: FakeServer, flags: list[str], tmp_path: Path) -> None:
    """The counts add up, the requests are those of the changed frames, and the video keeps its time."""
    sensor, scenes = Sensor(3.0), [background(1)] * 20 + [background(2)] * 20 + [background(1)] * 20
    clip = write_video(tmp_path / "clip.mp4", map(sensor.photo, scenes), fps=20)
    outputs = ["--jsonl", "out.jsonl", "--save-video", "out.avi", *flags]
    done = run("request.py", "--url", fake.url, "--input", clip, "--skip-static", *outputs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = summary(done.stderr)[str(clip)]
    assert [row[name] for name in ("captured", "answered", "unchanged", "failed")] == ["60", "3", "57", "0"]
    lines = json_lines(tmp_path / "out.jsonl")
    assert [line["frame"] for line in lines if line["outcome"] == "answered"] == [1, 21, 41]
    video = frames_of(tmp_path / "out.avi")
    assert len(video) == 60
    # A frame that is not sent is replaced by the one before it.
    steps = [float(np.abs(now.astype(int) - before).mean()) for before, now in pairwise(video)]
    assert [number for number, step in enumerate(steps, start=2) if step > 10] == [21, 41]


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_live_camera_that_freezes_is_reported(fake: FakeServer, tmp_path: Path) -> None:
    """And not sent, but for one frame in 10 s."""
    sensor = Sensor(3.0)
    images = [jpeg(sensor.photo(background()))] * 110 + [jpeg(sensor.photo(background(2)))] * 20
    with mjpeg_camera(images, fps=10) as camera:
        with running(fake, tmp_path, "--input", camera.url, "--skip-static") as request:
            request.wait_until(lambda: "the camera is live again" in request.stderr())
            row = request.end()[camera.url]
        assert f"{camera.url}: the camera is frozen, all its frames are the same for 10 s" in request.stderr()
        assert 2 <= int(row["answered"]) <= 6
        assert int(row["unchanged"]) > 90
