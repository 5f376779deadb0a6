"""Pose estimation and activity recognition inside a real TorchServe: right answers, whatever else is in the batch."""

import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from demo.node import PROJECT, Node, torchserve
from tests.support.archives import TINY, Archives, rewrite
from tests.support.frames import Pixels, as_json, encoded, jpeg, small
from tests.support.hostile import NO_BATCH
from tests.support.networks import (
    ACTIVITIES,
    assert_equals_reference,
    assert_same_persons,
    random_keypoint_rcnn,
    random_r3d18,
    reference_activity,
    reference_persons,
)
from tests.support.nodes import BATCH_HEADER, Post, post, post_concurrently

POSE, ACTIVITY = "keypointrcnn-resnet50-fpn", "r3d-18"
CLIP_FRAMES = 16
SIZES = {"resize_size": TINY[ACTIVITY]["resize"], "crop_size": TINY[ACTIVITY]["crop"]}

Check = Callable[[str, list[bytes], list[Any]], None]  # of the answers of a model to images


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    """Asserts that answers are those of torchvision, which sees each image once, outside of the node."""
    pose, activity = random_keypoint_rcnn(**TINY[POSE]), random_r3d18()
    persons = cache(lambda image: reference_persons(pose, opened(image)))
    probabilities = cache(lambda *images: reference_activity(activity, list(map(opened, images)), **SIZES))

    def check(model: str, images: list[bytes], answers: list[Any]) -> None:
        assert len(answers) == len(images)
        if model == POSE:
            for image, answer in zip(images, answers, strict=True):
                assert_same_persons(answer, persons(image))
            return
        for start in range(0, len(images), CLIP_FRAMES):
            clip = images[start : start + CLIP_FRAMES]
            expected = probabilities(*clip, *clip[-1:] * (CLIP_FRAMES - len(clip)))
            assert expected.max() > 0.2, "too undecided to show a difference"
            for answer in answers[start : start + CLIP_FRAMES]:
                assert_equals_reference(answer, expected, ACTIVITIES)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # More wait for each other where other tests have the cores.
    yield check
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def frames(clip: list[Pixels]) -> list[bytes]:
    """20 frames as JPEG. Torchvision finds persons in 16 of them; the last four are another clip than the others."""
    return [jpeg(frame) for frame in [*clip[:144:9], *clip[350:374:6]]]


def opened(image: bytes) -> Image.Image:
    """Return the image in a file, upright."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(image)))


@pytest.mark.parametrize("count", [1, 4, 16])
def test_persons_are_those_that_torchvision_finds(
    tasks_node: Node, check: Check, frames: list[bytes], count: int
) -> None:
    images = frames[-count:]
    answers = post(tasks_node, POSE, as_json(*images)).json()
    assert max(map(len, answers)) > 1, "no order of persons to compare"
    check(POSE, images, answers)
    single = post(tasks_node, POSE, images[-1])
    check(POSE, images[-1:], [single.json()])
    assert (single.headers["content-type"], single.headers[BATCH_HEADER]) == ("application/json", "1")


@pytest.mark.parametrize("count", [1, 4, 16, 20, 32])
def test_each_frame_gets_what_torchvision_says_of_its_clip(
    tasks_node: Node, check: Check, frames: list[bytes], count: int
) -> None:
    """A shorter clip is padded with its last frame; more than 16 frames are several clips."""
    images = [*frames, *frames][:count]
    response = post(tasks_node, ACTIVITY, as_json(*images))
    assert response.headers[BATCH_HEADER] == str(count)
    check(ACTIVITY, images, response.json())
    if count > CLIP_FRAMES:
        assert response.json()[0] != pytest.approx(response.json()[-1], abs=0.02), "too similar to distinguish clips"


def test_single_frame_is_a_clip_of_its_own(tasks_node: Node, check: Check, frames: list[bytes]) -> None:
    first, last = (post(tasks_node, ACTIVITY, image).json() for image in (frames[0], frames[-1]))
    check(ACTIVITY, frames[:1], [first])
    check(ACTIVITY, frames[-1:], [last])
    assert first != pytest.approx(last, abs=0.02), "too similar to distinguish clips"


@pytest.mark.parametrize("model", [POSE, ACTIVITY])
def test_frames_of_different_sizes_and_orientations_share_a_batch(
    tasks_node: Node, check: Check, clip: list[Pixels], model: str
) -> None:
    upright = Image.open(io.BytesIO(jpeg(clip[175])))
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was held upright, the file is the image turned by 90 degrees.
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    blank = encoded(Image.new("RGB", (640, 480), "grey"), "JPEG")
    images = [jpeg(clip[0]), jpeg(small(clip[200])), jpeg(clip[100][:, :300]), turned, blank, jpeg(clip[0])]
    answers = post(tasks_node, model, as_json(*images)).json()
    check(model, images, answers)
    if model == POSE:
        assert list(map(len, answers)) == [2, 5, 2, 6, 0, 2]
        assert_same_persons(answers[3], post(tasks_node, POSE, jpeg(clip[175])).json())


@pytest.mark.parametrize("model", [POSE, ACTIVITY])
def test_requests_of_one_batch_do_not_change_each_other(
    tasks_node: Node, check: Check, frames: list[bytes], model: str
) -> None:
    """The longest has a clip that can't be read, and behind it one that can."""
    count, short = (1, frames[-1:]) if model == POSE else (CLIP_FRAMES, frames[-8:])
    long = [b"no image", *frames[1:count], *frames[:count]]
    posts = [Post(frames[-2]), Post(as_json(*long)), Post(as_json(*short)), Post({})]
    responses = post_concurrently(tasks_node, f"gathering-{model}", posts)
    assert [response.status_code for response in responses] == [200, 200, 200, 400]
    in_the_pass = str(1 + count + len(short))
    assert [response.headers[BATCH_HEADER] for response in responses] == [in_the_pass] * 3 + ["0"]
    one, many, few, none = (response.json() for response in responses)
    check(model, frames[-2:-1], [one])
    assert ["not an image" in answer["error"] for answer in many[:count]] == [True] * count
    check(model, long[count:], many[count:])
    check(model, short, few)
    assert NO_BATCH in none["error"]


def test_unreadable_frame_costs_its_clip_and_no_other(tasks_node: Node, check: Check, frames: list[bytes]) -> None:
    images = [*frames[:16], *frames[1:17], *frames[4:10]]
    sent = [*images[:20], b"no image", *images[21:]]
    response = post(tasks_node, ACTIVITY, as_json(*sent))
    assert (response.status_code, response.headers[BATCH_HEADER]) == (200, str(16 + 6))
    answers = response.json()
    check(ACTIVITY, images[:16], answers[:16])
    check(ACTIVITY, images[32:], answers[32:])
    reason = "not an image: none of JPEG, PNG, WEBP, BMP, GIF in these 8 bytes"
    others = {"error": f"a frame of its clip can't be read: {reason}"}
    assert answers[16:32] == [others] * 4 + [{"error": reason}] + [others] * 11


@pytest.mark.parametrize(("model", "count"), [(POSE, 2), (ACTIVITY, 2), (ACTIVITY, 17)])
def test_request_without_a_readable_clip_is_refused(
    tasks_node: Node, frames: list[bytes], model: str, count: int
) -> None:
    response = post(tasks_node, model, as_json(*[b"no image"] * count))
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"none of {count} frames can be read; the first: not an image")
    if model == ACTIVITY:
        response = post(tasks_node, model, as_json(*frames[:15], b"no image"))
        assert response.status_code == 200, "15 frames can be read"
        assert all("not an image" in answer["error"] for answer in response.json())
        assert len(response.json()) == 16


@pytest.mark.parametrize(
    ("model", "task", "clip_frames", "frame_rate", "most"),
    [(POSE, "pose-estimation", "1", "0.0", 16), (ACTIVITY, "activity-recognition", "16", "15.0", 256)],
)
def test_every_response_says_what_a_client_has_to_know(
    tasks_node: Node, model: str, task: str, clip_frames: str, frame_rate: str, most: int
) -> None:
    """Also the one that refuses more frames than the header allows."""
    grey = encoded(Image.new("RGB", (8, 8), "grey"), "JPEG")
    accepted, bad = post(tasks_node, model, as_json(*[grey] * most)), post(tasks_node, model, b"no image")
    refused = post(tasks_node, model, as_json(*[grey] * (most + 1)))
    assert [response.status_code for response in (accepted, bad, refused)] == [200, 400, 413]
    assert len(accepted.json()) == most
    assert refused.json() == {"error": f"too many frames: {most + 1}, expected at most {most} in a request"}
    for response in (accepted, bad, refused):
        assert {name: value for name, value in response.headers.items() if name.startswith("X-Model-")} == {
            "X-Model-Task": task,
            "X-Model-Runtime": "pytorch fp32",
            "X-Model-Clip-Frames": clip_frames,
            "X-Model-Frame-Rate": frame_rate,
            "X-Model-Max-Frames": str(most),
            "X-Model-Max-Pixels": "132710400",
            "X-Model-Batch-Size": "1",
        }


def test_archive_uses_its_own_modules(tmp_path: Path, archives: Archives, clip: list[Pixels]) -> None:
    """Neither those of another archive on the node, nor a `server` in its directory or on its PYTHONPATH."""
    archives.store(tmp_path, archives.build("resnet-18", is_tiny=True))
    store, line = tmp_path / "model_store", b"outputs.float().softmax(dim=1)"
    assert line in (PROJECT / "server" / "tasks.py").read_bytes()
    rewrite(
        store / "resnet-18.mar",
        store / "changed.mar",
        "server/tasks.py",
        lambda code: code.replace(line, line + b".sqrt()"),
    )
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise ImportError('not of the archive')")
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=1\n"
    with torchserve(tmp_path, ["resnet-18", "changed"], config, {"PYTHONPATH": str(tmp_path)}) as node:
        original, changed = (post(node, model, jpeg(clip[0])).json() for model in ("resnet-18", "changed"))
    assert max(original.values()) < 0.9, "nearly the square root of itself"
    assert changed == pytest.approx({label: value**0.5 for label, value in original.items()}, abs=1e-4)
