"""What TorchServe runs for every batch of requests: frames in, labels with their probabilities out.

Ships in the archive that create_mar_file.py builds, together with the weights, the labels (index_to_name.json) and
the settings (model-config.yaml) it reads here. A request's body is either

- one frame: JPEG, PNG or any other image that Pillow reads. Its answer is a dict label -> probability, the most
  probable first; for a body that is no image, status 400 and `{"error": "..."}` on one line;
- a JSON object of n frames, `{"0": base64, "1": base64, ...}`. Its answer is a list of n such dicts, in the order
  sent, with `{"error": "..."}` in the place of a frame that is no image.

TorchServe batches requests without looking at them: one call may bring both kinds.
"""

import base64
import binascii
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision import models
from torchvision.transforms import v2
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import load_label_mapping, map_class_to_label

# The most that a picture's long edge may be of its short one. A picture of 1 x 65,000 is small until it is resized.
MAX_ASPECT_RATIO = 32

# Says in every answer how many frames went through the network together with this request's.
BATCH_HEADER = "X-Forward-Batch-Size"


def build_network(name: str, classes: int) -> torch.nn.Module:
    """Return the network that the archive calls `name`, untrained, with a head of `classes` outputs."""
    if name == "resnet-18":
        network: torch.nn.Module = models.resnet18(num_classes=classes)
    elif name == "efficientnet-lite0":
        # Imported where it is needed: whoever serves resnet-18 does not need this package.
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    else:
        raise ValueError(f"unknown network {name!r}, expected resnet-18 or efficientnet-lite0")
    return network


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB, the way up that its EXIF says. Raises ValueError for a sliver."""
    if max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
        raise ValueError("{} x {} pixels, expected a shape of at most {} to 1".format(*picture.size, MAX_ASPECT_RATIO))
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion cuts 16 bits off at 255 where it should scale them.
        picture = picture.point(lambda value: value / 256).convert("L")
    return ImageOps.exif_transpose(picture).convert("RGB")


class VideoFrameHandler(BaseHandler):  # type: ignore[misc]  # TorchServe has no type information
    """Classifies the frames of all requests of a batch in one forward pass."""

    def initialize(self, context: Context) -> None:
        """Load network, labels and preprocessing from the archive, once per worker."""
        settings = context.model_yaml_config["handler"]
        torch.set_num_threads(settings["threads"])
        gpu = context.system_properties.get("gpu_id")
        self.device = torch.device(f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")

        archive = Path(context.system_properties["model_dir"])
        self.mapping = load_label_mapping(str(archive / "index_to_name.json"))
        weights = torch.load(
            archive / context.manifest["model"]["serializedFile"], map_location=self.device, weights_only=True
        )
        self.model = build_network(settings["network"], len(self.mapping))
        self.model.load_state_dict(weights)
        self.model.to(self.device).eval()

        preprocessing = settings["preprocessing"]
        self.transform = v2.Compose(
            [
                v2.Resize(preprocessing["resize"], v2.InterpolationMode(preprocessing["interpolation"])),
                v2.CenterCrop(preprocessing["crop"]),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(preprocessing["mean"], preprocessing["std"]),
            ]
        )
        self.top_k = min(settings["top_k"], len(self.mapping))
        # A small file can claim a giant picture. Pillow sees it in the header; make it refuse instead of warn.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        self.initialized = True

    # BaseHandler.handle() is overridden whole, because with it a `describe` or `explain` header of one client spoils
    # the answers of all others in the batch.
    def handle(self, data: list[dict[str, Any]], context: Context) -> list[Any]:
        """Answer a batch of requests.

        Args:
            data: one dict for each request, its body under "body", or under "data" if it came as a form.
            context: takes status and headers of each answer.

        Returns:
            One answer for each request, in the same order, whatever the request held.
        """
        bodies = [row.get("data", row.get("body")) for row in data]
        requests = [self.preprocess(body) for body in bodies]
        tensors = [frame for frames in requests for frame in frames if isinstance(frame, torch.Tensor)]
        predictions = iter(self.inference(tensors))

        answers: list[Any] = []
        for index, (body, frames) in enumerate(zip(bodies, requests, strict=True)):
            context.set_response_header(index, BATCH_HEADER, str(len(tensors)))
            context.set_response_content_type(index, "application/json")
            results = [
                next(predictions) if isinstance(frame, torch.Tensor) else {"error": str(frame)} for frame in frames
            ]
            if isinstance(body, dict) and body:
                answers.append(results)
            elif isinstance(frames[0], torch.Tensor):
                answers.append(results[0])
            else:
                context.set_response_status(400, "Bad Request", index)
                answers.append(json.dumps(results[0]))  # A string, since TorchServe spreads a dict over many lines.
        return answers

    def preprocess(self, body: Any) -> list[torch.Tensor | ValueError]:
        """Return a request's frames, each a (3, crop, crop) float32 tensor or the reason why it is none."""
        if isinstance(body, dict) and body:
            return [self.preprocess_frame(value, encoded=True) for value in body.values()]
        if isinstance(body, bytes | bytearray):
            return [self.preprocess_frame(body)]
        return [ValueError('expected an image, or a JSON object of base64-encoded images: {"0": "...", "1": "..."}')]

    def preprocess_frame(self, frame: Any, encoded: bool = False) -> torch.Tensor | ValueError:
        """Return one frame, ready for the network, or the reason why it is none: a bad frame costs only itself."""
        try:
            image = base64.b64decode(frame, validate=True) if encoded else frame
        except (TypeError, binascii.Error, ValueError) as error:
            return ValueError(f"not a base64 string: {error}")
        try:
            with Image.open(io.BytesIO(image)) as picture:
                tensor: torch.Tensor = self.transform(to_rgb(picture))
                return tensor
        except UnidentifiedImageError:
            return ValueError(f"not an image: no known format in these {len(image)} bytes")
        except Exception as error:  # noqa: BLE001 - Pillow's many decoders raise what they like on broken data.
            return ValueError(f"broken image: {error}")

    def inference(self, tensors: list[torch.Tensor]) -> list[dict[str, float]]:
        """Return label -> probability of the top k classes for each (3, crop, crop) tensor, from one forward pass."""
        if not tensors:
            return []
        with torch.inference_mode():
            logits = self.model(torch.stack(tensors).to(self.device))
            probabilities, classes = logits.softmax(dim=1).topk(self.top_k)
        predictions: list[dict[str, float]] = map_class_to_label(probabilities.tolist(), self.mapping, classes.tolist())
        return predictions
