"""The network of the original example's archive, for TorchServe's built-in handler."""

from torchvision.models.resnet import BasicBlock, ResNet


class ImageClassifier(ResNet):  # type: ignore[misc]  # torchvision has no type information
    """ResNet-18."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
