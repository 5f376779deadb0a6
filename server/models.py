"""The models that can be served: for each name its task, its network, and torchvision's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchvision.models import ResNet18_Weights, resnet18, video
from torchvision.models.detection import KeypointRCNN, KeypointRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d


@dataclass(frozen=True)
class Model:
    """A network and its task.

    build: returns the untrained network for a number of labels, which is passed as num_classes.
    weights: torchvision's trained weights, with their labels and their preprocessing.
    has_own_weights: the weights come from elsewhere; labels and preprocessing are those of `weights`.
    """

    task: str
    build: Callable[..., torch.nn.Module]
    weights: Any
    has_own_weights: bool = False


def efficientnet_lite0(num_classes: int) -> torch.nn.Module:
    # Imported here, because a server of the other models does not need this package.
    from efficientnet_lite_pytorch import EfficientNet

    network: torch.nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    return network


def keypoint_rcnn(num_classes: int) -> torch.nn.Module:
    """Return torchvision's keypointrcnn_resnet50_fpn as torchvision builds it for its trained weights."""
    frozen = partial(FrozenBatchNorm2d, eps=0.0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=frozen)
    network: torch.nn.Module = KeypointRCNN(backbone, num_classes=2, num_keypoints=num_classes)
    return network


IMAGENET = ResNet18_Weights.IMAGENET1K_V1
MODELS = {
    "resnet-18": Model("image-classification", resnet18, IMAGENET),
    "efficientnet-lite0": Model("image-classification", efficientnet_lite0, IMAGENET, has_own_weights=True),
    "keypointrcnn-resnet50-fpn": Model("pose-estimation", keypoint_rcnn, KeypointRCNN_ResNet50_FPN_Weights.COCO_V1),
    "r3d-18": Model("activity-recognition", video.r3d_18, video.R3D_18_Weights.KINETICS400_V1),
}


def load_network(name: str, state: Mapping[str, torch.Tensor], labels: int) -> torch.nn.Module:
    """Return a network for so many labels, with a state dict in it. Raises RuntimeError if the two don't fit."""
    network = MODELS[name].build(num_classes=labels)
    # A trained batch normalization counts its batches, and adds eps to the variance. A frozen one does neither.
    counters = {key for key in state.keys() - network.state_dict().keys() if key.endswith("num_batches_tracked")}
    variances = {key.replace("num_batches_tracked", "running_var") for key in counters}
    network.load_state_dict({key: value + 1e-5 if key in variances else value for key, value in state.items()})
    return network.eval()
