"""The networks that the tests serve, outside of TorchServe, and what they predict for an image."""

import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.models import ResNet18_Weights

TRANSFORMS = ResNet18_Weights.IMAGENET1K_V1.transforms()
LABELS = [label.replace(" ", "_") for label in ResNet18_Weights.IMAGENET1K_V1.meta["categories"]]


def random_resnet18(classes: int) -> torch.nn.Module:
    """Return a ResNet-18 with weights from a fixed seed, whose predictions are as decided as a trained network's.

    Without the factor 20 all classes would be about equally probable, and no comparison could fail.
    """
    torch.manual_seed(18)
    network: torch.nn.Module = models.resnet18(num_classes=classes)
    network.get_parameter("fc.weight").data *= 20
    return network.eval()


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
