"""The models that can be served: for each name its task and its network; and what runs a network on a processor."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchvision.models import resnet18, video
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

# Otherwise OpenVINO and NNCF report their use to Intel, at each import.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


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


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}  # int8: of what is not int8


def has_bf16() -> bool:
    """Return whether the processor computes in bf16; PyTorch emulates it on others, eight times slower than fp32."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # For oneDNN any AVX-512 is enough. PyTorch before 2.5 can't tell more.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)())


def usable_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return what a network computes with on a device: fp32 instead of bf16 on a processor that has no bf16."""
    if precision == "bf16" and device.type == "cpu" and not has_bf16():
        logging.getLogger(__name__).warning("this processor has no bf16: the network runs in fp32, which is faster")
        return torch.float32
    return PRECISIONS[precision]


class OpenVinoNetwork:
    """A network in OpenVINO's format, compiled for this processor. It takes batches of uint8, and normalizes them.

    model: its file, or an openvino.Model.
    """

    def __init__(self, model: Any, dtype: torch.dtype, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32", "NUM_STREAMS": 1}
        # Pinned threads of all workers would share the first core.
        settings |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        self._request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        pixels = batch.movedim(1, -1).contiguous().numpy()
        return torch.from_numpy(self._request.infer([pixels], share_inputs=True)[0])
