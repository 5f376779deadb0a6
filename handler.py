"""The handler that TorchServe runs for each batch of requests: frames in, predictions out.

It ships in the archive of create_mar_file.py with server/, the weights, the labels (index_to_name.json) and the
settings (model-config.yaml). The body of a request is either

- one frame: JPEG, PNG, WebP, BMP or GIF. The response is its prediction, see server/tasks.py;
- a JSON object of n frames, `{"0": base64, "1": base64, ...}`. The response is a list of n predictions in the order
  sent, with `{"error": "..."}` in the place of a frame that can't be read. For activity recognition it is a clip.

A request without a frame that can be read gets status 400, one that is too much work 413, and `{"error": "..."}` on one
line of ASCII. TorchServe batches requests without looking at them: a bad one must not affect the others. Written for
Python 3.9, which TorchServe's own image has.
"""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

# TorchServe's BaseHandler imports it if it is there, and with it PyTorch's compilers: 5 seconds of each worker's start.
sys.modules["openvino.torch"] = None  # type: ignore[assignment]
import torch
from PIL import Image
from ts.context import Context
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import load_label_mapping

# TorchServe looks on its PYTHONPATH first, where there may be another `server` than the archive's.
sys.path.insert(0, str(Path(__file__).parent))
from server.images import open_image, to_rgb
from server.models import MODELS
from server.requests import Clip, Frame, Request, parse_request
from server.runtime import device_of, load_model
from server.tasks import TASKS

# The metrics besides those of TorchServe: kind, unit, and labels besides ModelName.
METRICS = {
    "handler_frames_decoded_total": (MetricTypes.COUNTER, "frames", []),
    "handler_refused_total": (MetricTypes.COUNTER, "frames", ["reason"]),  # A whole request counts as one.
    "handler_frames_per_pass": (MetricTypes.HISTOGRAM, "frames", []),
    "handler_decode_seconds": (MetricTypes.HISTOGRAM, "seconds", []),  # of preprocess()
    "handler_inference_seconds": (MetricTypes.HISTOGRAM, "seconds", []),  # of inference() and postprocess()
}
# Header of each response: how many frames shared the batch of the request's first frame.
BATCH_HEADER = "X-Forward-Batch-Size"


class VideoFrameHandler(BaseHandler):  # type: ignore[misc]  # TorchServe has no type information
    """Runs the network once on the frames of all requests of a batch."""

    def initialize(self, context: Context) -> None:
        """Load the network and the task from the archive, once in each worker, and warm up."""
        warnings.filterwarnings("ignore", module="PIL")  # An image can make Pillow write megabytes of them.
        # The C library keeps blocks of Pillow's default size, 16 MB: after large images a worker is 0.5 GB larger.
        Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]
        settings = context.model_yaml_config["handler"]
        torch.set_num_threads(settings["threads"])
        self.device = device_of(context.system_properties.get("gpu_id"), settings["runtime"])
        archive = Path(context.system_properties["model_dir"])
        labels = list(load_label_mapping(str(archive / "index_to_name.json")).values())
        self.task = TASKS[MODELS[settings["network"]].task](settings, labels)
        path = archive / context.manifest["model"]["serializedFile"]
        self.model, self.dtype, precision = load_model(path, settings, len(labels), self.task, self.device)

        self.model_name = context.model_name
        self.metrics = {
            name: context.metrics.add_metric_to_cache(name, unit, ["ModelName", *more], kind)
            for name, (kind, unit, more) in METRICS.items()
        }
        batch_size = context.system_properties["batch_size"]
        self.limits = self.task.clip_frames, settings["max_frames"], settings["max_pixels"]
        self.min_edge = settings["min_edge"]
        self.headers = {  # of each response: what a client has to know of the model
            "X-Model-Task": self.task.name,
            "X-Model-Runtime": f"{settings['runtime']} {precision}",
            "X-Model-Clip-Frames": str(self.task.clip_frames),
            "X-Model-Frame-Rate": str(self.task.frame_rate),
            "X-Model-Max-Frames": str(settings["max_frames"]),
            "X-Model-Max-Pixels": str(settings["max_pixels"]),
            "X-Model-Batch-Size": str(batch_size),
        }
        # TorchServe starts a worker for each GPU, or for each core if there is none, and they share the cores. A second
        # thread is of use where the other workers idle, and costs nothing where they don't.
        cores = os.cpu_count() or 1
        self.decoders = ThreadPoolExecutor(max(2, cores // (torch.cuda.device_count() or cores)), "decoder")
        self.warm_up({1, min(batch_size, self.task.max_batch)})
        self.initialized = True

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Predict blank frames, so that what takes time only once has happened before the first request."""
        Image.new("RGB", (640, 480)).save(blank := io.BytesIO(), "JPEG")
        for size in batch_sizes:
            self.predict([Clip([Frame(blank.getvalue())]) for _ in range(size)])

    # BaseHandler.handle() is replaced, because there a `describe` or `explain` header of one client costs the others of
    # the batch their predictions.
    def handle(self, data: list[dict[str, Any]], context: Context) -> list[Any]:
        """Respond to a batch of requests.

        Args:
            data: a dict for each request, with its body under "body", or under "data" if it came as a form.
            context: has the headers of each request, and takes status and headers of each response.

        Returns:
            One response for each request, in the same order, whatever the requests hold.
        """
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        requests = [parse_request(*each, self.limits) for each in zip(data, headers)]
        clips = [clip for request in requests for clip in request.clips]
        for start in range(0, len(clips), size := self.task.max_batch):
            self.predict(clips[start : start + size])
        return [self.build_response(request, index, context) for index, request in enumerate(requests)]

    def predict(self, clips: Sequence[Clip]) -> None:
        """Run the three stages: each clip gets its prediction, or its frames the reason why there is none."""
        start = time.monotonic()
        batch = self.preprocess(clips)
        self.record("handler_decode_seconds", time.monotonic() - start)
        good = [clip for clip in clips if not clip.error]
        batch_size = sum(len(clip.frames) for clip in good)
        for clip in clips:
            clip.batch_size = batch_size
        if good:
            start = time.monotonic()
            predictions = self.postprocess(self.inference(batch))
            self.record("handler_inference_seconds", time.monotonic() - start)
            self.record("handler_frames_per_pass", batch_size)
            for clip, prediction in zip(good, predictions):
                clip.prediction = prediction

    def preprocess(self, data: Sequence[Clip]) -> Any:
        """Decode the frames of clips; return a batch of the clips whose frames can all be read."""
        frames = [frame for clip in data for frame in clip.frames]
        tensors = iter(list(self.decoders.map(self.decode, frames)))
        clips = [[next(tensors) for _ in clip.frames] for clip in data]
        self.record("handler_frames_decoded_total", sum(not frame.error for frame in frames))
        self.record_rejections(frame.error for frame in frames)
        good = [tensors for clip, tensors in zip(data, clips) if not clip.error]
        return self.task.collate(good, self.device, self.dtype) if good else None

    def decode(self, frame: Frame) -> Any:
        """Return the tensor of a frame. A frame that can't be read gets the reason, and costs only itself."""
        if frame.error:
            return None
        try:
            with open_image(frame.file) as image:
                return self.task.preprocess(to_rgb(image, self.min_edge))
        except Exception as error:  # noqa: BLE001 - Pillow's decoders raise any exception on broken data.
            frame.error = f"broken image: {error}"
            return None

    def inference(self, data: Any) -> Any:
        """Return the network's output for a batch."""
        with torch.inference_mode():
            return self.model(data)

    def postprocess(self, data: Any) -> list[Any]:
        """Return the prediction of each clip from the network's output."""
        return list(self.task.postprocess(data))

    def build_response(self, request: Request, index: int, context: Context) -> Any:
        """Return the response to the request number `index`, and set its status and headers."""
        response = request.response()
        if request.error:
            context.set_response_status(request.status, HTTPStatus(request.status).phrase, index)
        if not request.clips:
            self.record_rejections([request.error])
        context.set_response_content_type(index, "application/json")
        batch_size = request.clips[0].batch_size if request.clips else 0
        for name, value in {**self.headers, BATCH_HEADER: str(batch_size)}.items():
            context.set_response_header(index, name, value)
        headers = context.get_all_request_header(index)
        if not any(name.lower() == "content-length" and isinstance(value, str) for name, value in headers.items()):
            # It came by gRPC: TorchServe gives each request over HTTP its length. If it is a stream, TorchServe drops
            # the worker if this is missing. (The parts of a form, and gRPC's inputs, are among the headers as dicts.)
            context.set_response_header(index, "ts_stream_next", "false")
        return response

    def record(self, metric: str, value: float, *labels: str) -> None:
        """Add a value to a counter, or to a histogram. TorchServe reads it from the worker's output."""
        self.metrics[metric].add_or_update(value, [self.model_name, *labels])

    def record_rejections(self, reasons: Iterable[str]) -> None:
        for reason, count in Counter(reason.partition(":")[0] for reason in reasons if reason).items():
            self.record("handler_refused_total", count, reason)
