"""The networks that the tests serve, outside of TorchServe, and what they predict for an image."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.models import ResNet18_Weights, detection, video
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights
from torchvision.models.video import R3D_18_Weights
from torchvision.transforms.functional import pil_to_tensor

TRANSFORMS = ResNet18_Weights.IMAGENET1K_V1.transforms()
LABELS = [label.replace(" ", "_") for label in ResNet18_Weights.IMAGENET1K_V1.meta["categories"]]
ACTIVITIES = [label.replace(" ", "_") for label in R3D_18_Weights.KINETICS400_V1.meta["categories"]]
KEYPOINTS = KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"]


def random_resnet18(classes: int) -> torch.nn.Module:
    """Return a ResNet-18 with weights from a fixed seed, whose predictions are as decided as a trained network's.

    Without the factor 20 all classes would be about equally probable, and no comparison could fail.
    """
    torch.manual_seed(18)
    network: torch.nn.Module = models.resnet18(num_classes=classes)
    network.get_parameter("fc.weight").data *= 20
    return network.eval()


def random_r3d18(classes: int = 400) -> torch.nn.Module:
    """Return an R3D-18, likewise."""
    torch.manual_seed(18)
    network: torch.nn.Module = video.r3d_18(num_classes=classes)
    network.get_parameter("fc.weight").data *= 80
    return network.eval()


def random_keypoint_rcnn(**sizes: int) -> torch.nn.Module:
    """Return a Keypoint R-CNN with weights from a fixed seed, which finds a few persons in a frame of the clip.

    As it begins, it is about as certain of each of a hundred persons, and more of them the higher the contrast is. So
    contrast is made to count against a person, all else to count more, and a blank frame to have nobody. Its batch
    normalization has other values than those it begins with, as a trained one has.
    """
    torch.manual_seed(18)
    network: torch.nn.Module = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **sizes)
    for name, values in network.state_dict().items():
        if name.endswith("running_var"):
            values.uniform_(0.9, 1.1)
    weight = network.get_parameter("roi_heads.box_predictor.cls_score.weight")
    weight.data[1] -= 0.003
    weight.data *= 40
    network.get_parameter("roi_heads.box_predictor.cls_score.bias").data += torch.tensor([3.2, 0])
    return network.eval()


RANDOM: dict[str, Callable[[], torch.nn.Module]] = {
    "resnet-18": lambda: random_resnet18(1000),
    "keypointrcnn-resnet50-fpn": random_keypoint_rcnn,
    "r3d-18": random_r3d18,
}


def reference(network: torch.nn.Module, image: Image.Image) -> torch.Tensor:
    """Return the (1000,) probabilities that torchvision's own preprocessing and the network give an image."""
    with torch.inference_mode():
        probabilities: torch.Tensor = network(TRANSFORMS(image)[None]).softmax(1)[0]
    return probabilities


def assert_equals_reference(
    predictions: dict[str, float], expected: torch.Tensor, labels: Sequence[str] = LABELS
) -> None:
    """The same top five, in descending order, each within 1e-3."""
    values = list(predictions.values())
    assert values == sorted(values, reverse=True)
    top = expected.topk(5)
    assert next(iter(predictions)) == labels[int(top.indices[0])]
    assert values == pytest.approx(top.values.tolist(), abs=1e-3)
    for label, value in predictions.items():
        assert value == pytest.approx(expected[labels.index(label)].item(), abs=1e-3)


def reference_activity(network: torch.nn.Module, images: Sequence[Image.Image], **sizes: Any) -> torch.Tensor:
    """Return the (400,) probabilities that torchvision's own preprocessing and the network give a clip of 16 images."""
    transforms = R3D_18_Weights.KINETICS400_V1.transforms(**sizes)
    frames = [transforms(pil_to_tensor(image.convert("RGB"))[None]) for image in images]  # each (3, 1, crop, crop)
    with torch.inference_mode():
        probabilities: torch.Tensor = network(torch.cat(frames, dim=1)[None]).softmax(1)[0]
    return probabilities


def reference_persons(network: torch.nn.Module, image: Image.Image, min_score: float = 0.7) -> list[dict[str, Any]]:
    """Return the persons that torchvision's own preprocessing and the network find, as an answer has them."""
    with torch.inference_mode():
        [found] = network([KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.transforms()(image.convert("RGB"))])
    keypoints = torch.cat([found["keypoints"][:, :, :2], found["keypoints_scores"][:, :, None]], dim=2)
    persons = zip(found["scores"].tolist(), found["boxes"].tolist(), keypoints.tolist(), strict=True)
    return [
        {"score": score, "box": box, "keypoints": dict(zip(KEYPOINTS, points, strict=True))}
        for score, box, points in persons
        if score >= min_score
    ]


def assert_same_persons(answer: Any, expected: list[dict[str, Any]]) -> None:
    """The same persons in the same order: their scores within 1e-3, boxes and keypoints within 0.05 pixels."""
    assert [person["score"] for person in answer] == pytest.approx([each["score"] for each in expected], abs=1e-3)
    for person, each in zip(answer, expected, strict=True):
        assert person.keys() == each.keys()
        assert person["box"] == pytest.approx(each["box"], abs=0.05)
        assert list(person["keypoints"]) == list(each["keypoints"])
        for name, values in each["keypoints"].items():
            assert person["keypoints"][name] == pytest.approx(values, abs=0.05)
