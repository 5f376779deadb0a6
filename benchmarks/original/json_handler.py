"""JSON batches as in the original example: TorchServe's image classifier gets the frames of one request."""

import base64
import io
from typing import Any

import torch
from PIL import Image
from ts.torch_handler.image_classifier import ImageClassifier


class JsonImageClassifier(ImageClassifier):  # type: ignore[misc]  # TorchServe has no type information
    """Classifies the frames of the first request of a batch. With a batch size of 1 there is no other."""

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        images = [base64.b64decode(frame) for frame in data[0]["body"].values()]
        return torch.stack([self.image_processing(Image.open(io.BytesIO(image))) for image in images]).to(self.device)

    def postprocess(self, data: torch.Tensor) -> list[list[dict[str, float]]]:
        return [super().postprocess(data)]
