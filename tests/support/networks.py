"""The networks that the tests serve, outside of TorchServe, and what they predict for an image."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.models import ResNet18_Weights, detection, video

TRANSFORMS = ResNet18_Weights.IMAGENET1K_V1.transforms()
BACKGROUND = 4.4  # how much more certain a random Keypoint R-CNN is made of seeing no person
LABELS = [label.replace(" ", "_") for label in ResNet18_Weights.IMAGENET1K_V1.meta["categories"]]


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
    network.get_parameter("fc.weight").data *= 20
    return network.eval()


def random_keypoint_rcnn(**sizes: int) -> torch.nn.Module:
    """Return a Keypoint R-CNN with weights from a fixed seed, which finds a few persons in a frame of the clip.

    Without the two changes it would be almost as certain of each of a hundred persons. Its batch normalization has
    other values than those it begins with, as a trained one has.
    """
    torch.manual_seed(18)
    network: torch.nn.Module = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **sizes)
    for name, values in network.state_dict().items():
        if name.endswith("running_var"):
            values.uniform_(0.9, 1.1)
    network.get_parameter("roi_heads.box_predictor.cls_score.weight").data *= 4
    network.get_parameter("roi_heads.box_predictor.cls_score.bias").data += torch.tensor([4 * BACKGROUND, 0])
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


def assert_equals_reference(predictions: dict[str, float], expected: torch.Tensor) -> None:
    """The same top five, in descending order, each within 1e-3."""
    values = list(predictions.values())
    assert values == sorted(values, reverse=True)
    top = expected.topk(5)
    assert next(iter(predictions)) == LABELS[int(top.indices[0])]
    assert values == pytest.approx(top.values.tolist(), abs=1e-3)
    for label, value in predictions.items():
        assert value == pytest.approx(expected[LABELS.index(label)].item(), abs=1e-3)
