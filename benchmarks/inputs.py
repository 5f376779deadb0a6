"""What the servers get: frames of the sample clip, JSON batches, larger clips, and the weights of the network."""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import torch
from torchvision import models

from benchmarks.plan import CLIP
from demo.node import PROJECT


@dataclass(frozen=True)
class Inputs:
    """The folder of a part of the benchmark, the weights of its networks, and the project's config.properties."""

    folder: Path
    weights: Path
    config: str

    @cached_property
    def frames(self) -> list[bytes]:
        """60 frames from the whole sample clip, as request.py encodes them."""
        capture = cv2.VideoCapture(str(CLIP))
        images = [capture.read()[1] for _ in range(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))]
        return [cv2.imencode(".jpg", image)[1].tobytes() for image in images[:: len(images) // 60][:60]]

    def bodies(self, size: int) -> list[bytes]:
        """Return the bodies of requests of `size` frames: the frames themselves, or JSON batches."""
        return list(self.frames) if size == 1 else json_batches(self.frames, size)

    def setting(self, name: str) -> int:
        """Return a number in config.properties."""
        return int(re.findall(rf'"{name}": (\d+)', self.config)[0])


def prepare(folder: Path) -> Inputs:
    """Write the weights into a folder."""
    torch.manual_seed(18)
    # An untrained network takes the same time. Its predictions must be as confident as those of a trained one: else no
    # prediction would be wrong.
    network = models.resnet18()
    network.get_parameter("fc.weight").data *= 20
    torch.save(network.state_dict(), folder / "weights.pth")
    return Inputs(folder, folder / "weights.pth", (PROJECT / "config.properties").read_text())


def json_batches(images: Sequence[bytes], size: int) -> list[bytes]:
    """Return JSON batches of `size` frames."""
    encoded = [base64.b64encode(image).decode() for image in images]
    starts = range(0, len(encoded) - size + 1, size)
    return [json.dumps({str(i): encoded[start + i] for i in range(size)}).encode() for start in starts]


def larger_clip(folder: Path, height: int) -> Path:
    """Return four seconds of the sample clip, enlarged to a height of 16:9."""
    path = folder / f"{height}.mp4"
    size = (height * 16 // 9, height)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, size)
    capture = cv2.VideoCapture(str(CLIP))
    for _ in range(100):
        writer.write(cv2.resize(capture.read()[1], size, interpolation=cv2.INTER_CUBIC))
    writer.release()
    return path
