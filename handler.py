"""What TorchServe runs for every batch of requests: frames in, labels with their probabilities out.

Ships in the archive that create_mar_file.py builds, together with the weights, the labels (index_to_name.json) and
the settings (model-config.yaml) it reads here. A request's body is either

- one frame: JPEG, PNG, WebP, BMP or GIF. Its answer is a dict label -> probability, the most probable first;
- a JSON object of n frames, `{"0": base64, "1": base64, ...}`. Its answer is a list of n such dicts, in the order
  sent, with `{"error": "..."}` in the place of a frame that can't be read.

A request without a frame that can be read gets status 400, one that is too much work 413, and `{"error": "..."}` on one
line of ASCII. TorchServe batches requests without looking at them: one call may bring all kinds, and what is wrong with
one of them must not cost the others anything, their time neither. So what a request may ask for is bounded.

Written for Python 3.9, which TorchServe's own image has; nothing else of the project is.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.fx.experimental.optimization import fuse
from torchvision import models
from torchvision.transforms import v2
from ts.context import Context
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import load_label_mapping, map_class_to_label

# What is decoded. Pillow knows more formats, one of which starts a program (EPS), and no camera sends them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# What a picture may claim to hold, that of 8K video; a small file can claim a lot.
MAX_PIXELS = 7680 * 4320
# The most that a picture's long edge may be of its short one. A picture of 1 x 65,000 is small until it is resized.
MAX_ASPECT_RATIO = 32
# Of what a file may have only so many, by how it begins. Each scan of a JPEG goes over the whole picture (a progressive
# one has about 10), its EXIF blocks are joined one by one, and a PNG's texts and profiles can swell a thousandfold.
MOST_PARTS = {
    b"\xff\xd8": {"scans": (b"\xff\xda", 32), "EXIF blocks": (b"Exif\0\0", 32)},
    b"\x89PNG": {"texts": (b"iTXt", 4), "compressed texts": (b"zTXt", 4), "colour profiles": (b"iCCP", 4)},
}
# What the frames of one request may be together: some 10 seconds' work of a core. TorchServe's limit of 6.5 MB allows
# 57 frames of 640 x 480.
MAX_REQUEST_FRAMES = 256
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS

# Says in every answer how many frames went through the network together with this request's, or its first ones.
BATCH_HEADER = "X-Forward-Batch-Size"

# The metrics besides those of TorchServe: kind, unit, and labels besides ModelName.
METRICS = {
    "handler_frames_decoded_total": (MetricTypes.COUNTER, "frames", []),
    "handler_refused_total": (MetricTypes.COUNTER, "frames", ["reason"]),  # or whole requests, as one each
    "handler_frames_per_pass": (MetricTypes.HISTOGRAM, "frames", []),
    "handler_decode_seconds": (MetricTypes.HISTOGRAM, "seconds", []),  # for all frames of a pass, cropping included
    "handler_inference_seconds": (MetricTypes.HISTOGRAM, "seconds", []),  # for a pass
}

# So many frames are decoded and go through the network at once, at most: more gain nothing on a CPU, and take memory.
LARGEST_PASS = 32
# The same for a compiled network, which is compiled for each number of frames up to this one, or up to TorchServe's
# batch size if that is more. It takes seconds for each.
LARGEST_COMPILED_PASS = 4

# Of the memory that Pillow takes for a picture. Blocks of its default size, 16 MB, are kept by the C library when a
# giant is done with: a worker then grows by half a gigabyte. Larger ones go back to the system.
PILLOW_BLOCK_BYTES = 64 * 2**20

# The status of a request that gets no predictions, and the reason. What stands before a reason's colon is one of few
# texts, which the metrics count by.
Refusal = tuple[int, str]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

log = logging.getLogger(__name__)


def build_network(name: str, classes: int) -> torch.nn.Module:
    """Return the network that the archive calls `name`, untrained, with a head of `classes` outputs."""
    if name == "resnet-18":
        network: torch.nn.Module = models.resnet18(num_classes=classes)
    elif name == "efficientnet-lite0":
        # Imported where it is needed: a server of resnet-18 does not need this package.
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    else:
        raise ValueError(f"unknown network {name!r}, expected resnet-18 or efficientnet-lite0")
    return network


def file_in(frame: Any) -> bytes | bytearray:
    """Return the file of a frame, which came as it is or as base64 text. Raises ValueError if it is neither."""
    if isinstance(frame, (bytes, bytearray)):
        return frame
    try:
        return base64.b64decode(frame, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a base64 string: {error}") from error


def open_picture(file: bytes | bytearray) -> Image.Image:
    """Return the picture in a file, of which only what stands before the pixels has been read.

    Raises ValueError for what is none, for a giant, a sliver, and one that would take too long.
    """
    for start, parts in MOST_PARTS.items():
        for name, (part, most) in parts.items():
            if file.startswith(start) and (count := file.count(part)) > most:
                raise ValueError(f"too many {name}: {count}, expected at most {most}")
    try:
        picture = Image.open(io.BytesIO(file), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image: none of {', '.join(FORMATS)} in these {len(file)} bytes") from error
    except Exception as error:  # Pillow's many decoders raise what they like on broken data.
        raise ValueError(f"broken image: {error}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}, expected at most {MAX_PIXELS:,} in all")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"too narrow: {width} x {height} pixels, expected at most {MAX_ASPECT_RATIO} to 1")
    if picture.format == "BMP" and picture.info["compression"]:
        raise ValueError("compressed BMP: expected a plain one")  # Pillow takes seconds for it.
    return picture


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode, decoded, as RGB and the way up that its EXIF says.

    Raises what Pillow raises for broken data.
    """
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion cuts 16 bits off at 255 where it should scale them.
        picture = picture.point(lambda value: value / 256).convert("L")
    return ImageOps.exif_transpose(picture).convert("RGB")


# Why something is refused is kept as text: an exception would hold on to the frames of code it came through, and with
# them to all that the request held, until the garbage collector comes by.
def admit(body: Any, headers: dict[str, Any]) -> list[bytes | bytearray | str] | Refusal:
    """Return the files of a request's frames, in the place of each that is no picture the reason why.

    Or why it is refused: it asks for something else, has a body that can't hold frames, or more than one may.
    """
    if "True" in (headers.get("explain"), headers.get("describe")):
        return 400, "not explained: there are predictions only"
    if isinstance(body, dict) and body:
        frames = list(body.values())
    elif isinstance(body, (bytes, bytearray)):
        frames = [body]
    else:
        return 400, 'no frames: expected an image, or a JSON object of base64-encoded images: {"0": "...", "1": "..."}'
    if len(frames) > MAX_REQUEST_FRAMES:
        return 413, f"too many frames: {len(frames)}, expected at most {MAX_REQUEST_FRAMES} in a request"
    files: list[bytes | bytearray | str] = []
    pixels = 0
    for frame in frames:
        try:
            file = file_in(frame)
            with open_picture(file) as picture:
                pixels += picture.width * picture.height
            files.append(file)  # It is opened again when its turn comes: what Pillow keeps of it can be large.
        except ValueError as error:
            files.append(str(error))
        if pixels > MAX_REQUEST_PIXELS:
            return 413, f"too many pixels in a request: over {MAX_REQUEST_PIXELS:,}, send fewer or smaller frames"
    return files


def answer_to(body: Any, results: list[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]] | Refusal:
    """Return what a request with this body gets for the results of its frames."""
    errors = [result["error"] for result in results if isinstance(result.get("error"), str)]
    if isinstance(body, dict):
        if len(errors) == len(results):
            return 400, f"none of {len(results)} frames can be read; the first: {errors[0]}"
        return results
    return (400, errors[0]) if errors else results[0]


class VideoFrameHandler(BaseHandler):  # type: ignore[misc]  # TorchServe has no type information
    """Classifies the frames of all requests of a batch in one forward pass."""

    def initialize(self, context: Context) -> None:
        """Load network, labels and preprocessing from the archive, once per worker, and warm up."""
        Image.core.set_block_size(PILLOW_BLOCK_BYTES)  # type: ignore[attr-defined]
        settings = context.model_yaml_config["handler"]
        torch.set_num_threads(settings["threads"])
        gpu = context.system_properties.get("gpu_id")
        self.device = torch.device(f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")
        self.dtype = PRECISIONS[settings["precision"]]

        archive = Path(context.system_properties["model_dir"])
        self.mapping = load_label_mapping(str(archive / "index_to_name.json"))
        weights = torch.load(
            archive / context.manifest["model"]["serializedFile"], map_location=self.device, weights_only=True
        )
        network = build_network(settings["network"], len(self.mapping))
        network.load_state_dict(weights)
        # fuse() makes one of each convolution and the batch normalization behind it. (Not so in EfficientNet-Lite0:
        # its convolutions are of a kind of their own.)
        self.model: Callable[[torch.Tensor], torch.Tensor]
        self.model = fuse(network.eval()).to(self.device, self.dtype).to(memory_format=torch.channels_last)

        preprocessing = settings["preprocessing"]
        interpolation = v2.InterpolationMode(preprocessing["interpolation"])
        self.crop = v2.Compose(
            [v2.Resize(preprocessing["resize"], interpolation), v2.CenterCrop(preprocessing["crop"]), v2.PILToTensor()]
        )
        self.normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing["mean"], preprocessing["std"])]
        )
        self.model_name = context.model_name
        self.metrics = {
            name: context.metrics.add_metric_to_cache(name, unit, ["ModelName", *labels], kind)
            for name, (kind, unit, labels) in METRICS.items()
        }
        self.top_k = min(settings["top_k"], len(self.mapping))
        # TorchServe starts a worker for each GPU, or for each core if there is none, and they share the cores. A second
        # thread is of use where the other workers idle, and costs nothing where they don't.
        cores = os.cpu_count() or 1
        workers = torch.cuda.device_count() or cores
        self.decoders = ThreadPoolExecutor(max(2, cores // workers), "decoder")

        self.largest_pass = LARGEST_PASS
        batch_size = context.system_properties["batch_size"]
        if settings["compile"]:
            self.compile(batch_size)
        self.warm_up({1, LARGEST_COMPILED_PASS, min(batch_size, self.largest_pass)})
        self.initialized = True

    def compile(self, batch_size: int) -> None:
        """Compile the network for every number of frames it will meet; go on without if that fails.

        TorchServe's own `pt2` setting is no help: it only takes effect in the method that initialize() replaces, it
        compiles when the first requests come, and what fails then fails them.
        """
        eager, start = self.model, time.monotonic()
        self.largest_pass = max(batch_size, LARGEST_COMPILED_PASS)
        try:
            torch._dynamo.config.recompile_limit = self.largest_pass
            # TorchServe starts a worker for each core: none of them needs compilers of its own.
            torch._inductor.config.compile_threads = 1
            self.model = torch.compile(eager, dynamic=False, options={"freezing": True})
            self.warm_up(range(1, self.largest_pass + 1))
        except Exception as error:  # noqa: BLE001 - A compiler can fail in any way.
            log.warning("can't compile the network, going on without: %s", str(error).partition("\n")[0])
            self.model, self.largest_pass = eager, LARGEST_PASS
        else:
            log.info("compiled for 1 to %d frames in %.0f s", self.largest_pass, time.monotonic() - start)

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Classify blank frames, so that what takes time only once has happened before the first request comes."""
        with io.BytesIO() as file:
            Image.new("RGB", (640, 480)).save(file, "JPEG")
            blank = self.crop(upright_rgb(open_picture(file.getvalue())))
        for size in sizes:
            self.inference([blank] * size)

    # BaseHandler.handle() is overridden whole, because with it a `describe` or `explain` header of one client spoils
    # the answers of all others in the batch.
    def handle(self, data: list[dict[str, Any]], context: Context) -> list[Any]:
        """Answer a batch of requests.

        Args:
            data: one dict for each request, its body under "body", or under "data" if it came as a form.
            context: has the headers of each request, and takes status and headers of each answer.

        Returns:
            One answer for each request, in the same order, whatever the request held.
        """
        bodies = [row.get("data", row.get("body")) for row in data]
        requests = [admit(body, context.get_all_request_header(index)) for index, body in enumerate(bodies)]
        frames = list(chain.from_iterable(request for request in requests if isinstance(request, list)))
        parts = (frames[start : start + self.largest_pass] for start in range(0, len(frames), self.largest_pass))
        results = chain.from_iterable(map(self.classify, parts))

        answers: list[Any] = []
        for index, (body, request) in enumerate(zip(bodies, requests)):
            answer: Any = request
            shared_by = 0
            if isinstance(request, list):
                found = list(islice(results, len(request)))
                shared_by = found[0][1]
                answer = answer_to(body, [result for result, _ in found])
            else:
                self.count_refused([request[1]])
            if isinstance(answer, tuple):
                status, reason = answer
                context.set_response_status(status, HTTPStatus(status).phrase, index)
                answer = json.dumps({"error": reason})  # A string, since TorchServe spreads a dict over many lines.
            answers.append(answer)
            context.set_response_header(index, BATCH_HEADER, str(shared_by))
            context.set_response_content_type(index, "application/json")
            headers = context.get_all_request_header(index)
            if not any(name.lower() == "host" and isinstance(value, str) for name, value in headers.items()):
                # It came by gRPC, perhaps as a stream; TorchServe drops the worker if such an answer lacks this. (What
                # came as a part of a form stands among the headers too, but as a dict.)
                context.set_response_header(index, "ts_stream_next", "false")
        return answers

    def classify(self, frames: Sequence[bytes | bytearray | str]) -> list[tuple[dict[str, Any], int]]:
        """Return each frame's result, label -> probability or "error" -> reason, and how many shared its pass."""
        start = time.monotonic()
        tensors = list(self.decoders.map(self.preprocess, frames))
        self.note("handler_decode_seconds", time.monotonic() - start)
        good = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        self.note("handler_frames_decoded_total", len(good))
        self.count_refused([reason for reason in tensors if isinstance(reason, str)])
        predictions: Iterator[dict[str, float]] = iter([])
        if good:
            start = time.monotonic()
            predictions = iter(self.inference(good))
            self.note("handler_inference_seconds", time.monotonic() - start)
            self.note("handler_frames_per_pass", len(good))
        results = [next(predictions) if isinstance(each, torch.Tensor) else {"error": each} for each in tensors]
        return [(result, len(good)) for result in results]

    def note(self, metric: str, value: float, *labels: str) -> None:
        """Add a value to a counter, or to what a histogram has seen. TorchServe reads it from the worker's output."""
        self.metrics[metric].add_or_update(value, [self.model_name, *labels])

    def count_refused(self, reasons: Iterable[str]) -> None:
        for reason, count in Counter(reason.partition(":")[0] for reason in reasons).items():
            self.note("handler_refused_total", count, reason)

    def preprocess(self, file: bytes | bytearray | str) -> torch.Tensor | str:
        """Return a picture as (3, crop, crop) uint8, or the reason why there is none: a bad frame costs only itself."""
        if isinstance(file, str):
            return file
        try:
            # By Pillow, in several threads. torchvision resizes tensors in a fifth of the time, but rounds otherwise,
            # and other pixels make other answers: EfficientNet-Lite0's probabilities changed by more than 0.001.
            with open_picture(file) as picture:
                cropped: torch.Tensor = self.crop(upright_rgb(picture))
            return cropped
        except Exception as error:  # noqa: BLE001 - Pillow's many decoders raise what they like on broken data.
            return f"broken image: {error}"

    def inference(self, frames: Sequence[torch.Tensor]) -> list[dict[str, float]]:
        """Return label -> probability of the top k classes for each (3, crop, crop) uint8 frame, from one pass."""
        batch = torch.stack(list(frames)).to(self.device)
        with torch.inference_mode():
            pixels = self.normalize(batch).to(self.dtype, memory_format=torch.channels_last)
            probabilities, classes = self.model(pixels).float().softmax(dim=1).topk(self.top_k)
        predictions: list[dict[str, float]] = map_class_to_label(probabilities.tolist(), self.mapping, classes.tolist())
        return predictions
