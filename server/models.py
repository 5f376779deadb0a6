"""The models that can be served: for each name its task and its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torchvision.models import resnet18, video
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d


@dataclass(frozen=True)
class Model:
    """A network and its task. build: returns the untrained network for a number of labels, num_classes."""

    task: str
    build: Callable[..., torch.nn.Module]


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


MODELS = {
    "resnet-18": Model("image-classification", resnet18),
    "efficientnet-lite0": Model("image-classification", efficientnet_lite0),
    "keypointrcnn-resnet50-fpn": Model("pose-estimation", keypoint_rcnn),
    "r3d-18": Model("activity-recognition", video.r3d_18),
}


def load_network(name: str, state: Mapping[str, torch.Tensor], labels: int) -> torch.nn.Module:
    """Return a network for so many labels, with a state dict in it. Raises RuntimeError if the two don't fit."""
    network = MODELS[name].build(num_classes=labels)
    network.load_state_dict(state)
    return network.eval()
