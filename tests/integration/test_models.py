"""request.py with several models, and with a model that gets clips."""

import base64
import json
import re
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.node import Node
from edge.frames import Frame, Result
from edge.payload import MAX_BODY_BYTES
from tests.support.client import frames, new_client
from tests.support.fake_server import FakeServer
from tests.support.frames import Pixels, frames_of, jpeg, small, write_video
from tests.support.scripts import OUTCOMES, json_lines, run, summary

MODELS = ["efficientnet-lite0", "keypointrcnn-resnet50-fpn", "r3d-18"]
THREE = [flag for model in MODELS for flag in ("--model", model)]
CLIPS = {"X-Model-Clip-Frames": "16", "X-Model-Frame-Rate": "15.0", "X-Model-Task": "activity-recognition"}


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory: pytest.TempPathFactory, clip: list[Pixels]) -> list[Path]:
    """100 and 60 small frames at 25 fps."""
    folder = tmp_path_factory.mktemp("two clips")
    images = [small(frame) for frame in clip[:300:3]]
    return [write_video(folder / "gate.mp4", images, 25), write_video(folder / "roof.mp4", images[::-1][:60], 25)]


@pytest.mark.slow
def test_three_models_on_two_cameras_count_every_frame(tasks_node: Node, two_clips: list[Path], tmp_path: Path) -> None:
    inputs = [flag for path in two_clips for flag in ("--input", str(path))]
    flags = ["--url", tasks_node.url, *THREE, *inputs, "--drop", "oldest", "--jsonl", str(tmp_path / "out.jsonl")]
    done = run("request.py", *flags, "--save-video", tmp_path / "out.mkv", cwd=tasks_node.folder)
    assert done.returncode == 0, done.stderr
    rows, lines = summary(done.stderr), json_lines(tmp_path / "out.jsonl")
    assert list(rows) == [f"{path}, {model}" for path in two_clips for model in MODELS]
    for path, frame_count in zip(two_clips, (100, 60), strict=True):
        captured = {model: int(rows[f"{path}, {model}"]["captured"]) for model in MODELS}
        assert captured == dict(zip(MODELS, (frame_count, frame_count, captured["r3d-18"]), strict=True))
        assert captured["r3d-18"] == pytest.approx(frame_count * 15 / 25, abs=2)
        answered = {model: int(rows[f"{path}, {model}"]["answered"]) for model in MODELS}
        assert 0 < answered["keypointrcnn-resnet50-fpn"] < answered["efficientnet-lite0"]
        assert answered["r3d-18"] > 0
    for row in rows.values():
        stream = [line for line in lines if (line["camera"], line["model"]) == (row["camera"], row["model"])]
        outcomes = [line["outcome"] for line in stream]
        for outcome in OUTCOMES:
            assert outcomes.count(outcome) == int(row[outcome])
        predictions = [line["predictions"] for line in stream if line["outcome"] == "answered"]
        assert all(isinstance(each, list if "keypoint" in row["model"] else dict) for each in predictions)
    assert [len(frames_of(tmp_path / f"out-{number}.mkv")) for number in (1, 2)] == [100, 60]


def test_check_tests_each_model(tasks_node: Node, two_clips: list[Path]) -> None:
    flags = ["--url", tasks_node.url, *THREE, "--input", str(two_clips[0]), "--max-in-flight", "1", "--check"]
    done = run("request.py", *flags, cwd=tasks_node.folder)
    assert done.returncode == 0, done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * (1 + 5 * 3)
    for model, text in zip(
        MODELS,
        (
            r"image-classification, pytorch fp32: \S+ 0\.\d\d",
            r"pose-estimation, pytorch fp32: \d+ persons?",
            r"activity-recognition, pytorch fp32, clips of 16 frames at 15 frames/s: \S+ \d\.\d\d",
        ),
        strict=True,
    ):
        assert re.search(rf"(?m)^ok    server .* has the model {model}$", done.stdout)
        assert re.search(rf"(?m)^ok    model {model}: {text}$", done.stdout)
    assert "ms for a clip of 16 frames (median of 5)" in done.stdout


def clips_of(fake: FakeServer) -> list[list[bytes]]:
    """Return the frames of each request after the test image."""
    return [[base64.b64decode(frame) for frame in json.loads(body).values()] for body in fake.bodies[1:]]


@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize("more", [[], ["--client-batching", "--batch-size", "3"]])
def test_clips_have_frames_of_one_camera_in_order(
    fake: FakeServer, two_clips: list[Path], tmp_path: Path, more: list[str]
) -> None:
    """At the rate of the clip, with whatever flags."""
    fake.model_headers = CLIPS
    inputs = [flag for path in two_clips for flag in ("--input", str(path))]
    flags = ["--url", fake.url, *inputs, "--fps", "max", "--quiet", "--jsonl", str(tmp_path / "out.jsonl"), *more]
    done = run("request.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    numbers: dict[str, list[int]] = defaultdict(list)
    for line in json_lines(tmp_path / "out.jsonl", has_gaps=True):
        assert line["outcome"] == "answered"
        numbers[line["camera"]].append(line["frame"])
    sent = {path: [jpeg(frame) for frame in frames_of(path)] for path in two_clips}
    taken: dict[Path, list[int]] = defaultdict(list)
    for clip in clips_of(fake):
        (path,) = [path for path in two_clips if clip[0] in sent[path] and all(frame in sent[path] for frame in clip)]
        taken[path] += [1 + sent[path].index(frame) for frame in clip]
        assert len(clip) == 16 or len(taken[path]) == len(numbers[str(path)]), "only the last clip is shorter"
    for path in two_clips:
        assert taken[path] == numbers[str(path)] == sorted(set(taken[path]))
        assert len(taken[path]) == pytest.approx(len(sent[path]) * 15 / 25, abs=2)


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_a_clip_that_is_too_large_is_sent_smaller_and_whole(
    fake: FakeServer, stop: threading.Event, clip: list[Pixels]
) -> None:
    fake.model_headers = CLIPS
    noise = [jpeg((frame.repeat(3, 0).repeat(3, 1) + number) % 251) for number, frame in enumerate(clip[:16])]
    assert 16 * len(noise[0]) * 4 / 3 > MAX_BODY_BYTES
    results: list[Result] = []
    with new_client(fake.url, stop) as client:
        client.wait_until_ready()
        assert (client.frames_per_request, client.max_in_flight) == (16, 4)
        sent: list[Frame] = frames(noise)
        client.submit(sent, results.append)
        client.drain()
    assert [result.outcome for result in results] == ["answered"] * 16
    assert [result.frame.jpeg for result in results] == noise, "outputs have the whole frame"
    (body,) = fake.bodies[1:]
    assert len(body) <= MAX_BODY_BYTES
    assert len(json.loads(body)) == 16


@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize(
    ("batch_size", "is_json", "headers", "expected"),
    [
        (4, False, {}, 16),
        (10, False, {}, 40),
        (10, False, {"X-Model-Batch-Size": "4"}, 16),
        (4, False, {"X-Model-Batch-Size": "1"}, 4),
        (10, True, {"X-Model-Batch-Size": "1"}, 4),
    ],
)
def test_four_batches_are_in_flight(
    fake: FakeServer, stop: threading.Event, batch_size: int, is_json: bool, headers: dict[str, str], expected: int
) -> None:
    fake.model_headers = headers
    options: dict[str, Any] = {"max_in_flight": None, "batch_size": batch_size, "client_batching": is_json}
    with new_client(fake.url, stop, **options) as client:
        client.wait_until_ready()
        assert client.max_in_flight == expected
        assert client.frames_per_request == (batch_size if is_json else 1)


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_a_json_batch_is_split_at_the_limit_of_the_model(fake: FakeServer, stop: threading.Event) -> None:
    fake.model_headers = {"X-Model-Max-Frames": "2"}
    results: list[Result] = []
    with new_client(fake.url, stop, client_batching=True, batch_size=5) as client:
        client.wait_until_ready()
        client.submit(frames([b"1", b"2", b"3", b"4", b"5"]), results.append)
        client.drain()
    assert [result.outcome for result in results] == ["answered"] * 5
    assert sorted(map(len, clips_of(fake))) == [1, 2, 2]


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_a_json_batch_is_split_at_the_pixels_of_the_model(fake: FakeServer, stop: threading.Event) -> None:
    fake.model_headers = {"X-Model-Max-Pixels": str(3840 * 2160)}
    image = jpeg(np.zeros((1080, 1920, 3), np.uint8))
    results: list[Result] = []
    with new_client(fake.url, stop, client_batching=True, batch_size=5) as client:
        client.wait_until_ready()
        small = jpeg(np.zeros((48, 64, 3), np.uint8))  # Cameras of different sizes share a JSON batch.
        client.submit(frames([small] + [image + bytes([number]) for number in range(5)]), results.append)
        client.drain()
        too_large = jpeg(np.zeros((2160, 3841, 3), np.uint8))
        client.submit(frames([too_large, image]), results.append)
        client.drain()
    assert [result.outcome for result in results] == ["answered"] * 6 + ["failed", "answered"]
    assert (
        results[6].error == "413 the request is larger than the server accepts: use a smaller --batch_size or --resize"
    )
    assert sorted(map(len, clips_of(fake))) == [1, 3, 3]
