"""What the tests share: real archives, real TorchServe nodes, and the project's scripts run as a user runs them."""

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import requests
import torch
from PIL import Image
from torchvision import models
from torchvision.models import ResNet18_Weights

from deploy.node import PROJECT, Node, torchserve
from tests.fake_server import FakeServer
from tests.scripts import archive

CLIP = PROJECT / "data" / "sample_video.mp4"
TRANSFORMS = ResNet18_Weights.IMAGENET1K_V1.transforms()
LABELS = [label.replace(" ", "_") for label in ResNet18_Weights.IMAGENET1K_V1.meta["categories"]]
CATS = {"tabby", "tiger_cat", "Egyptian_cat"}


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for a condition, which must come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def frames_of(video: Path) -> list[npt.NDArray[np.uint8]]:
    """Return a video's frames, (height, width, 3) BGR."""
    capture = cv2.VideoCapture(str(video))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1].astype(np.uint8, copy=False))
    capture.release()
    return frames


def jpeg(frame: npt.NDArray[np.uint8]) -> bytes:
    """Encode a frame as request.py does."""
    return cv2.imencode(".jpg", frame)[1].tobytes()


def post(node: Node, model: str, body: bytes | dict[str, Any], **headers: str) -> requests.Response:
    """Ask a node for predictions, with its token."""
    return requests.post(
        f"{node.url}/predictions/{model}",
        data=body if isinstance(body, bytes) else None,
        json=body if isinstance(body, dict) else None,
        headers={"Authorization": f"Bearer {node.token()}"} | headers,
        timeout=60,
    )


def together(node: Node, requests_: Sequence[tuple[bytes | dict[str, Any], dict[str, str]]]) -> list[requests.Response]:
    """Send four requests at once to a node that waits until it has all of them; each is a body and headers."""
    assert len(requests_) == 4
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda request: post(node, "resnet-18", request[0], **request[1]), requests_))


def as_json(*images: bytes) -> dict[str, Any]:
    """Return a JSON batch."""
    return {str(index): base64.b64encode(image).decode() for index, image in enumerate(images)}


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Return a picture as a file of some format."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(network: torch.nn.Module, picture: Image.Image) -> torch.Tensor:
    """Return what torchvision's own preprocessing and the network make of a picture: (1000,) probabilities."""
    with torch.inference_mode():
        probabilities: torch.Tensor = network(TRANSFORMS(picture)[None]).softmax(1)[0]
    return probabilities


def assert_equals_reference(answer: dict[str, float], expected: torch.Tensor) -> None:
    """The same top five, in descending order, each within 1e-3."""
    values = list(answer.values())
    assert values == sorted(values, reverse=True)
    top = expected.topk(5)
    assert next(iter(answer)) == LABELS[int(top.indices[0])]
    assert values == pytest.approx(top.values.tolist(), abs=1e-3)
    for label, value in answer.items():
        assert value == pytest.approx(expected[LABELS.index(label)].item(), abs=1e-3)


def random_resnet18(classes: int) -> torch.nn.Module:
    """Return a ResNet-18 with weights from a fixed seed, whose answers are as decided as a trained network's.

    Without the last line all classes would be about equally probable, and no comparison could fail.
    """
    torch.manual_seed(18)
    network: torch.nn.Module = models.resnet18(num_classes=classes)
    network.get_parameter("fc.weight").data *= 20
    return network.eval()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of random_resnet18(1000), in a file."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(random_resnet18(1000).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Node]:
    """A TorchServe with both models, as config.properties serves them."""
    folder = tmp_path_factory.mktemp("node")
    archive("--model", "efficientnet-lite0", cwd=folder)
    archive("--weights", weights, cwd=folder)
    with torchserve(folder, ["efficientnet-lite0", "resnet-18"]) as running:
        yield running


@pytest.fixture(scope="session")
def batch_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A TorchServe with an archive for client batching."""
    folder = tmp_path_factory.mktemp("batch_node")
    archive("--model", "efficientnet-lite0", "--client-batching", cwd=folder)
    with torchserve(folder, ["efficientnet-lite0"]) as running:
        yield running


@pytest.fixture(scope="session")
def gathering_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One worker that waits a minute for four requests, and a head of three classes of the user's own."""
    folder = tmp_path_factory.mktemp("gathering")
    torch.save(random_resnet18(3).state_dict(), folder / "weights.pth")
    # As some editors write it: with a byte order mark, Windows' line ends, and space where nobody sees it.
    (folder / "labels.txt").write_bytes("\ufeffKäse\r\nham and eggs \r\nbread\r\n\r\n".encode())
    archive("--weights", "weights.pth", "--labels", "labels.txt", cwd=folder)
    config = (PROJECT / "config.properties").read_text()
    one_patient_worker = '"minWorkers": 1, "maxWorkers": 1, "maxBatchDelay": 60000'
    assert '"maxBatchDelay": 5' in config
    with torchserve(folder, ["resnet-18"], config.replace('"maxBatchDelay": 5', one_patient_worker)) as running:
        yield running


@contextmanager
def fake_server(behaviour: str) -> Iterator[FakeServer]:
    server = FakeServer(behaviour)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    with fake_server(request.param) as server:
        yield server


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """An event that is set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def old_archive(tmp_path: Path) -> Iterator[Path]:
    """An archive that is there already; it must be left as it was."""
    path = tmp_path / "model_store" / "resnet-18.mar"
    path.parent.mkdir()
    path.write_bytes(b"the archive of yesterday")
    yield path
    assert path.stat().st_size == len(b"the archive of yesterday")
    assert path.read_bytes() == b"the archive of yesterday"
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory: pytest.TempPathFactory, clip: list[npt.NDArray[np.uint8]]) -> Path:
    """22 frames at 100 fps: not a multiple of the batch size, and over soon."""
    path = tmp_path_factory.mktemp("clip") / "short clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 100, (640, 480))
    for frame in clip[: 22 * 15 : 15]:
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture(scope="session")
def clip() -> list[npt.NDArray[np.uint8]]:
    """The frames of the sample clip, (480, 640, 3) BGR."""
    return frames_of(CLIP)
