"""The three tasks: a decoded frame becomes a tensor, tensors become a batch, the network's output becomes predictions.

A task works on clips: frames that get one prediction together. A frame of an image task is a clip of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch.fx.experimental.optimization import fuse
from torchvision import transforms
from torchvision.transforms import v2

from server.images import MAX_PIXELS


class ImageClassification:
    """Predicts label -> probability of the most probable classes, the most probable first."""

    name = "image-classification"
    clip_frames = 1
    frame_rate = 0.0  # frames a second, of clips only
    max_batch = 32  # clips in a forward pass: more gain nothing on a CPU, and take memory
    max_frames = 256  # of a request: some 10 seconds' work of a core; TorchServe's 6.5 MB allow 57 of 640 x 480
    memory_format = torch.channels_last

    def __init__(self, settings: dict[str, Any], labels: Sequence[str]) -> None:
        """Take the settings of the archive, and the labels by class index."""
        self.labels = labels
        self.top_k = min(settings["top_k"], len(labels))
        preprocessing = settings["preprocessing"]
        self.interpolation = v2.InterpolationMode(preprocessing["interpolation"])
        self.center = v2.CenterCrop(preprocessing["crop"])
        self.crop = v2.Compose([v2.Resize(preprocessing["resize"], self.interpolation), self.center, v2.PILToTensor()])
        normalize = v2.Normalize(preprocessing["mean"], preprocessing["std"])
        self.normalize: Any = v2.Compose([v2.ToDtype(torch.float32, scale=True), normalize])
        if settings["runtime"] == "openvino":
            self.normalize = torch.nn.Identity()  # The network does it: it takes uint8.

    def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
        """Fuse each convolution with the batch normalization behind it (not EfficientNet-Lite0's, of its own kind)."""
        return fuse(network).to(memory_format=self.memory_format)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Return an RGB image as (3, crop, crop) uint8, resized by Pillow.

        Tensors are resized in a fifth of the time, but EfficientNet-Lite0's probabilities change by more than 0.001.
        """
        return self.crop(image)  # type: ignore[no-any-return]

    def collate(self, clips: Sequence[list[torch.Tensor]], device: torch.device, dtype: torch.dtype) -> Any:
        """Return the batch of some clips, on the device and as the network takes it."""
        batch = torch.stack([frame for clip in clips for frame in clip]).to(device)
        return self.normalize(batch).to(dtype, memory_format=self.memory_format)

    def postprocess(self, outputs: Any) -> list[Any]:
        """Return the prediction of each clip of a batch."""
        probabilities, classes = outputs.float().softmax(dim=1).topk(self.top_k)
        pairs = zip(classes.tolist(), probabilities.tolist())
        return [{self.labels[index]: value for index, value in zip(*pair)} for pair in pairs]


class ActivityRecognition(ImageClassification):
    """Predicts label -> probability of a clip: frames that follow each other at `frame_rate`."""

    name = "activity-recognition"
    clip_frames = 16  # of R3D-18's training, as is the rate
    frame_rate = 15.0
    max_batch = 4
    memory_format = torch.channels_last_3d

    def __init__(self, settings: dict[str, Any], labels: Sequence[str]) -> None:
        super().__init__(settings, labels)
        # As torchvision's transforms of video do it: resized as a tensor, and not smoothed.
        resize = transforms.Resize(settings["preprocessing"]["resize"], self.interpolation, antialias=False)
        self.crop = v2.Compose([v2.PILToTensor(), resize, self.center])

    def collate(self, clips: Sequence[list[torch.Tensor]], device: torch.device, dtype: torch.dtype) -> Any:
        """Return (clips, 3, clip_frames, crop, crop); a shorter clip is padded with its last frame."""
        padded = [clip + clip[-1:] * (self.clip_frames - len(clip)) for clip in clips]
        batch = torch.stack([torch.stack(clip) for clip in padded]).to(device)
        return self.normalize(batch).transpose(1, 2).to(dtype, memory_format=self.memory_format)


class BySize(torch.nn.Sequential):
    """Runs its network once for each size of frames: padded to one size, they would change each other's predictions."""

    def forward(self, frames: Sequence[torch.Tensor]) -> list[Any]:
        outputs: dict[int, Any] = {}
        for shape in {frame.shape for frame in frames}:
            indices = [index for index, frame in enumerate(frames) if frame.shape == shape]
            count = max(1, MAX_PIXELS // (shape[1] * shape[2]))  # So many pixels take 400 MB, and again 400 in between.
            for part in (indices[start : start + count] for start in range(0, len(indices), count)):
                batch = [v2.functional.to_dtype(frames[index], torch.float32, scale=True) for index in part]
                outputs.update(zip(part, self[0](batch)))
        return [outputs[index] for index in range(len(frames))]


class PoseEstimation:
    """Predicts a list of persons, the best first: score, box and keypoints [x, y, score], in pixels of the frame."""

    name = "pose-estimation"
    clip_frames = 1
    frame_rate = 0.0
    max_batch = 4  # as many frames take 2 GB, and more gain nothing on a CPU
    max_frames = 16  # of a request: minutes of a core

    def __init__(self, settings: dict[str, Any], labels: Sequence[str]) -> None:
        self.keypoints = labels
        self.min_score = settings["min_score"]
        self.preprocessing = settings["preprocessing"]

    def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
        """Have the network resize frames as the archive says. It can't be fused: its normalization is frozen."""
        transform: Any = network.transform
        transform.min_size, transform.max_size = (self.preprocessing["min_size"],), self.preprocessing["max_size"]
        return BySize(network)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Return an RGB image as (3, height, width) uint8. The network itself resizes it, and its predictions back."""
        return v2.functional.pil_to_tensor(image)  # type: ignore[no-any-return]

    def collate(self, clips: Sequence[list[torch.Tensor]], device: torch.device, _: torch.dtype) -> Any:
        """Return the list of frames, which may have different sizes. The network is one of float32."""
        return [frame.to(device) for clip in clips for frame in clip]

    def postprocess(self, outputs: Any) -> list[Any]:
        """Return the persons of each frame."""
        return [list(self.persons(found)) for found in outputs]

    def persons(self, found: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        """Yield the persons that are certain enough. The network sorts them by score."""
        names = ("scores", "boxes", "keypoints", "keypoints_scores")
        for score, box, points, point_scores in zip(*(found[name].tolist() for name in names)):
            if score >= self.min_score:
                keypoints = zip(self.keypoints, points, point_scores)
                yield {"score": score, "box": box, "keypoints": {name: [x, y, s] for name, (x, y, _), s in keypoints}}


TASKS: dict[str, Any] = {task.name: task for task in (ImageClassification, PoseEstimation, ActivityRecognition)}
