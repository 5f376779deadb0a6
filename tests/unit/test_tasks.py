"""Pose estimation and activity recognition in this process, with frames of full size and the smallest ones."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import WeightsEnum, detection
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights

import create_mar_file
from archive.weights import trained_network
from handler import VideoFrameHandler
from server.images import MAX_PIXELS
from server.tasks import ActivityRecognition, BySize, PoseEstimation
from tests.support.archives import TINY, unpacked_archive
from tests.support.frames import Pixels, as_json, encoded, jpeg
from tests.support.in_process import Model
from tests.support.networks import (
    ACTIVITIES,
    assert_equals_reference,
    assert_same_persons,
    random_keypoint_rcnn,
    random_r3d18,
    reference_activity,
    reference_persons,
)

POSE, ACTIVITY = "keypointrcnn-resnet50-fpn", "r3d-18"
FRAMES = ActivityRecognition.clip_frames


@pytest.fixture
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take longer than the test."""
    monkeypatch.setattr(VideoFrameHandler, "warm_up", lambda *_: None)


@pytest.mark.usefixtures("no_warm_up")
def test_persons_in_a_frame_of_full_size_are_those_of_torchvision(tmp_path: Path, clip: list[Pixels]) -> None:
    network = random_keypoint_rcnn()
    model = Model(unpacked_archive(tmp_path, "--model", POSE, network=network))
    image = jpeg(clip[100][::-1, ::-1])  # A frame in which the random network finds several persons.
    [persons] = model.answers([image])
    assert len(persons) > 2
    assert_same_persons(persons, reference_persons(network, Image.open(io.BytesIO(image))))


@pytest.mark.usefixtures("no_warm_up")
def test_activity_in_a_clip_of_full_size_is_that_of_torchvision(tmp_path: Path, clip: list[Pixels]) -> None:
    network = random_r3d18()
    model = Model(unpacked_archive(tmp_path, "--model", ACTIVITY, network=network))
    images = [jpeg(frame) for frame in clip[: FRAMES * 9 : 9]]
    [answers] = model.answers([as_json(*images)])
    expected = reference_activity(network, [Image.open(io.BytesIO(image)) for image in images])
    assert expected.max() > 0.2, "too undecided to show a difference"
    assert len(answers) == FRAMES
    for answer in answers:
        assert_equals_reference(answer, expected, ACTIVITIES)


@pytest.mark.usefixtures("no_warm_up")
def test_images_of_a_pixel_and_the_narrowest_are_frames(tmp_path: Path, clip: list[Pixels]) -> None:
    images = [
        Image.fromarray(clip[0]).resize(size) for size in ((1, 1), (2, 1), (320, 10), (10, 320), (32, 1), (1, 32))
    ]
    files = [encoded(image, "PNG") for image in images]
    for model, network in ((POSE, random_keypoint_rcnn(**TINY[POSE])), (ACTIVITY, random_r3d18())):
        (tmp_path / model).mkdir()
        served = Model(unpacked_archive(tmp_path / model, "--model", model, network=network, is_tiny=True))
        for image, answer in zip(images, served.answers(files), strict=True):
            if model == POSE:
                assert_same_persons(answer, reference_persons(network, image))
            else:
                sizes = {"resize_size": TINY[model]["resize"], "crop_size": TINY[model]["crop"]}
                assert_equals_reference(answer, reference_activity(network, [image] * FRAMES, **sizes), ACTIVITIES)
        assert served.statuses() == [200] * len(images)


@pytest.mark.parametrize(
    ("flags", "scores"),
    [
        ([], [0.95, 0.71]),
        (["--min-score", "0.5"], [0.95, 0.71, 0.69]),
        (["--min-score", "0"], [0.95, 0.71, 0.69, 0.05]),
        (["--min-score", "1"], []),
    ],
)
def test_persons_below_min_score_are_left_out(flags: list[str], scores: list[float]) -> None:
    config: dict[str, Any] = create_mar_file.model_config(create_mar_file.parse_args(["--model", POSE, *flags]))
    found = {
        "scores": torch.tensor([0.95, 0.71, 0.69, 0.05]),
        "boxes": torch.arange(16.0).reshape(4, 4),
        "keypoints": torch.arange(24.0).reshape(4, 2, 3),
        "keypoints_scores": -torch.arange(8.0).reshape(4, 2),
    }
    nobody = {name: values[:0] for name, values in found.items()}
    persons, none = PoseEstimation(config["handler"], ["nose", "left_eye"]).postprocess([found, nobody])
    assert none == []
    assert [person["score"] for person in persons] == pytest.approx(scores)
    for number, person in enumerate(persons):
        assert person["box"] == [4 * number, 4 * number + 1, 4 * number + 2, 4 * number + 3]
        x, y, score = 6 * number, 6 * number + 1, -2 * number
        assert person["keypoints"] == {"nose": [x, y, score], "left_eye": [x + 3, y + 3, score - 1]}


def test_batch_normalization_is_that_which_the_weights_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights trained from scratch torchvision adds 1e-5 to the variances, and of its own ones nothing."""
    scratch = random_keypoint_rcnn()
    scratch.get_buffer("backbone.body.bn1.running_var").fill_(1e-5)  # Small, so that it makes a difference.
    state = {name: value for name, value in scratch.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(state) < len(scratch.state_dict())
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)  # No download.
    frozen = detection.keypointrcnn_resnet50_fpn(weights=KeypointRCNN_ResNet50_FPN_Weights.COCO_V1).eval()
    assert frozen.state_dict().keys() == state.keys()

    pixels = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        features = []
        for network in (scratch, frozen):
            expected = network.get_submodule("backbone")(pixels)["0"]
            served = trained_network(POSE, network.state_dict(), 17).get_submodule("backbone")(pixels)["0"]
            torch.testing.assert_close(served, expected, rtol=1e-3, atol=1e-5)
            features.append(expected)
    assert not torch.allclose(features[0], features[1], rtol=0.01), "eps makes no difference"


def test_large_frames_take_several_passes_and_each_size_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As float32 they would fill the memory."""
    passes: list[list[tuple[int, ...]]] = []

    def network(frames: list[torch.Tensor]) -> list[float]:
        assert {frame.dtype for frame in frames} == {torch.float32}
        passes.append([tuple(frame.shape) for frame in frames])
        return [frame[0, 0, 0].item() for frame in frames]

    by_size = BySize(torch.nn.Identity())
    monkeypatch.setattr(by_size[0], "forward", network)
    shapes = [(3, 2000, 4000), (3, 20, 30), (3, 2000, 4000), (3, 4320, 7680), (3, 20, 30), *[(3, 2000, 4000)] * 4]
    frames = [torch.full(shape, number, dtype=torch.uint8) for number, shape in enumerate(shapes)]
    assert by_size(frames) == pytest.approx([number / 255 for number in range(len(shapes))])
    assert all(len(set(each)) == 1 for each in passes)
    assert max(sum(shape[1] * shape[2] for shape in each) for each in passes) <= MAX_PIXELS
    assert sorted(map(len, passes)) == [1, 2, 2, 4]
