"""What the tests share: real archives, real TorchServe nodes, and the project's scripts run as a user runs them."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import requests
import torch
from torchvision import models

from deploy.node import PROJECT, Node, torchserve
from tests.fake_server import FakeServer

CLIP = PROJECT / "data" / "sample_video.mp4"
CATS = {"tabby", "tiger_cat", "Egyptian_cat"}


def run(
    script: str, *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts in a directory, as a user would, whatever it returns."""
    return subprocess.run(
        [sys.executable, str(PROJECT / script), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def archive(*arguments: str | Path, cwd: Path) -> None:
    """Build an archive, which must succeed."""
    done = run("create_mar_file.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Output:
    """One output of request.py: the line with the rate, and the answers under it."""

    batch_size: int
    number: int
    fps: float
    answers: list[Any]


def outputs(stdout: str) -> list[Output]:
    """Parse all that request.py printed on standard output; anything that isn't as in the README fails."""
    found = []
    decoder = json.JSONDecoder()
    while stdout:
        line = re.match(r"With Batch Size (\d+), FPS at frame number (\d+) is (\d+\.\d)\n", stdout)
        assert line, f"not an output of request.py: {stdout[:200]!r}"
        stdout = stdout[line.end() :]
        answers = []
        while stdout and not stdout.startswith("With"):
            answer, end = decoder.raw_decode(stdout)
            assert stdout[:end] == json.dumps(answer, indent=2)
            answers.append(answer)
            stdout = stdout[end:].removeprefix("\n")
        found.append(Output(int(line[1]), int(line[2]), float(line[3]), answers))
    return found


def books(stderr: str) -> dict[str, dict[str, str]]:
    """Return the table that request.py printed at its end: camera -> column -> cell, and check that it adds up."""
    lines = stderr.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("camera "))
    columns = re.split(r" {2,}", lines[start])
    found = {}
    for line in lines[start + 1 :]:
        cells = re.split(r" {2,}", line)
        if len(cells) != len(columns):
            break
        row = dict(zip(columns, cells, strict=True))
        assert int(row["captured"]) == sum(int(row[name]) for name in ("answered", "failed", "dropped", "expired"))
        found[row["camera"]] = row
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return what --jsonl wrote, and check that every camera's frames are there once and in order."""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]
    numbers: dict[str, list[int]] = {}
    for line in lines:
        assert list(line) == ["camera", "frame", "captured_at", "latency_ms", "outcome", "predictions", "error"]
        assert (line["outcome"] == "answered") == (line["predictions"] is not None) == (line["error"] is None)
        assert (line["outcome"] == "answered") == (line["latency_ms"] is not None)
        assert datetime.fromisoformat(line["captured_at"]).utcoffset() == timedelta(0)
        numbers.setdefault(line["camera"], []).append(line["frame"])
    for found in numbers.values():
        assert found == list(range(1, len(found) + 1))
    return lines


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


def post(node: Node, model: str, body: bytes | dict[str, str], **headers: str) -> requests.Response:
    """Ask a node for predictions, with its token."""
    return requests.post(
        f"{node.url}/predictions/{model}",
        data=body if isinstance(body, bytes) else None,
        json=body if isinstance(body, dict) else None,
        headers={"Authorization": f"Bearer {node.token()}"} | headers,
        timeout=60,
    )


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


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    server = FakeServer(request.param)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


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
