"""Converts a network for OpenVINO, and quantizes it to int8 with frames of the user's own videos."""

import io
import logging
import os
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image
from torchvision.transforms import v2

from archive.errors import ArchiveError
from edge.errors import SourceError
from edge.sources import open_file
from server.images import to_rgb
from server.runtime import OpenVinoNetwork

JPEG_QUALITY = 95  # request.py's default
PARTS = 10  # of a video, calibration and comparison in turn: frames beside each other look alike
MAX_CLIPS = 100  # for calibration, and as many for the comparison
MIN_CLIPS = 10
MAX_SKIPPED = 250  # frames of a video: so many are read faster than sought
VARIANTS = 4  # of each clip: a network that has seen a single scene is wrong in others
MIN_AGREEMENT = 0.95


@dataclass(frozen=True)
class Agreement:
    """How the predictions of an int8 network compare with those of the fp32 network.

    changes: of the probability of fp32's first label, for each clip. agreed: clips with the same first label.
    unit: what a clip is called, "frames" or "clips".
    """

    changes: Sequence[float]
    agreed: int
    unit: str

    @property
    def is_good(self) -> bool:
        return self.agreed >= MIN_AGREEMENT * len(self.changes)

    def __str__(self) -> str:
        share = f"{100 * self.agreed / len(self.changes):.1f} % of {len(self.changes)} other {self.unit}"
        median, largest = statistics.median(self.changes), max(self.changes)
        change = f"its probability changes by {median:.3f} (median), at most {largest:.3f}"
        return f"int8 has the same first label as fp32 for {share}; {change}"


def convert(network: torch.nn.Module, task: Any, preprocessing: dict[str, Any]) -> Any:
    """Return a network in OpenVINO's format, which takes uint8 (clips, ..., 3) and normalizes it itself."""
    import openvino

    blank = task.preprocess(Image.new("RGB", (640, 480)))
    batch = task.collate([[blank] * task.clip_frames], torch.device("cpu"), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # It traces the network, which PyTorch means to drop.
        model = openvino.convert_model(network, example_input=batch, input=[-1, *batch.shape[1:]])
    steps = openvino.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("N...C"))
    steps.input().model().set_layout(openvino.Layout("NC..."))
    mean, std = ([255 * value for value in preprocessing[name]] for name in ("mean", "std"))
    steps.input().preprocess().convert_element_type(openvino.Type.f32).mean(mean).scale(std)
    return steps.build()


def quantize(model: Any, task: Any, videos: Sequence[Path], min_edge: int) -> tuple[Any, Agreement]:
    """Return a network quantized to int8 with clips of some videos, and its agreement on other clips of them.

    min_edge: the reduced size at which frames are decoded for int8, see to_rgb(). The comparison includes its effect.

    Raises ArchiveError if a video can't be read, or is too short.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # It warns of a missing GPU.
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    unit = "clips" if task.clip_frames > 1 else "frames"
    calibration: list[torch.Tensor] = []
    others: list[tuple[torch.Tensor, torch.Tensor]] = []  # decoded as for fp32 and for int8
    for index, video in enumerate(videos):
        for part, clip in clips_of(video, task, max(2, 2 * MAX_CLIPS // len(videos))):
            reduced = decoded(clip, task, min_edge)
            if (index + part) % 2:
                others.append((decoded(clip, task, 0), reduced))
            else:
                calibration.append(reduced)
    if min(len(calibration), len(others)) < MIN_CLIPS:
        names = " ".join(map(str, videos))
        raise ArchiveError(f"{names}: too short to calibrate with, expected at least {2 * MIN_CLIPS} {unit} in all")
    dataset = nncf.Dataset(list(variants(calibration)))
    quantized = nncf.quantize(
        model,
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=VARIANTS * len(calibration),
        ignored_scope=nncf.IgnoredScope(names=sensitive_layers(model)),
    )
    networks = [OpenVinoNetwork(each, torch.float32, os.cpu_count() or 1) for each in (model, quantized)]
    changes, agreed = [], 0
    for batches in others:
        before, after = (network(batch).softmax(dim=1)[0] for network, batch in zip(networks, batches, strict=True))
        changes.append(abs(float(after[before.argmax()] - before.max())))
        agreed += int(before.argmax() == after.argmax())
    return quantized, Agreement(changes, agreed, unit)


def sensitive_layers(model: Any) -> list[str]:
    """Return the layers that stay in fp32, since they lose most by rounding.

    The first and the last layer; of a network with depthwise convolutions these, too, and the first third of the
    layers, whose few channels have different ranges.
    """
    layers = [each for each in model.get_ordered_ops() if each.get_type_name() in ("Convolution", "MatMul")]
    depthwise = [each for each in model.get_ordered_ops() if each.get_type_name() == "GroupConvolution"]
    first = layers[: len(layers) // 3] if depthwise else layers[:1]
    return [each.get_friendly_name() for each in (*first, layers[-1], *depthwise)]


def parts_of(count: int) -> list[int]:
    """Return the part of a video in which each of its clips is, numbered from 0."""
    parts = max(1, min(PARTS, count // 2 * 2))
    return [number * parts // count for number in range(count)]


def clips_of(video: Path, task: Any, count: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield up to `count` clips of a video, evenly spaced: the part they are in, and the JPEG of their frames.

    Raises ArchiveError if it can't be read.
    """
    try:
        capture = open_file(str(video))
    except SourceError as error:
        raise ArchiveError(f"can't calibrate: {error}") from error
    try:
        stated, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
        if stated < 1:
            raise ArchiveError(f"{video} states no number of frames: have ffmpeg -c copy write it as .mp4")
        step = max(1, round(fps / task.frame_rate)) if task.frame_rate else 1
        count = min(count, max(1, stated // (task.clip_frames * step)))
        place = clips = 0  # place: in the video, frames
        for number, part in enumerate(parts_of(count)):
            start = number * stated // count
            if start - place > MAX_SKIPPED:
                capture.set(cv2.CAP_PROP_POS_FRAMES, start)
            else:
                _ = [capture.grab() for _ in range(start - place)]
            place, clip = start + task.clip_frames * step, list[bytes]()
            for index in range(task.clip_frames * step):
                is_due = index % step == 0
                ok, pixels = capture.read() if is_due else (capture.grab(), None)
                if ok and pixels is not None:
                    clip.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes())
            if len(clip) == task.clip_frames:
                clips += 1
                yield part, clip
        if not clips:  # Many files state more frames than they have.
            raise ArchiveError(f"{video}: none of its {stated} frames can be decoded")
    finally:
        capture.release()


def decoded(clip: Sequence[bytes], task: Any, min_edge: int) -> torch.Tensor:
    """Return a batch of one clip, as handler.py makes it."""
    images = [to_rgb(Image.open(io.BytesIO(file)), min_edge) for file in clip]
    batch: torch.Tensor = task.collate([list(map(task.preprocess, images))], torch.device("cpu"), torch.uint8)
    return batch


def variants(clips: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Yield each clip as it is, and variants of it with other colours, contrasts and parts of the image.

    Their values cover the range of scenes that the videos don't have.
    """
    torch.manual_seed(0)
    size = clips[0].shape[-2:]
    change = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.5, 0.5, 0.8, 0.5),
            v2.RandomInvert(0.1),
            v2.RandomGrayscale(0.1),
        ]
    )
    for clip in clips:
        for number in range(VARIANTS):
            # These transforms want the colours as the third dimension from the end, OpenVINO as the last one.
            changed = change(clip.movedim(1, -3)).movedim(-3, 1) if number else clip
            yield changed.movedim(1, -1).contiguous().numpy()
