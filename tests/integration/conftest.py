"""The TorchServe nodes that several modules ask. Each is started once, see SERVERS in tests/conftest.py."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.node import PROJECT, Node, torchserve
from tests.support.archives import Archives
from tests.support.media import VFR, X264, ffmpeg, pattern
from tests.support.networks import random_resnet18


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[Node]:
    """A TorchServe with both models, as config.properties serves them, but on two workers each on any machine.

    They are there again as openvino-..., converted for OpenVINO, on one worker each.
    """
    folder = tmp_path_factory.mktemp("node")
    models, openvino = ["efficientnet-lite0", "resnet-18"], {}
    archives.store(folder, *map(archives.build, models))
    for model in models:
        name = f"openvino-{model}"
        shutil.copy(archives.build(model, "--runtime", "openvino"), folder / "model_store" / f"{name}.mar")
        workers = {"minWorkers": 1, "maxWorkers": 1}
        openvino[name] = {"1.0": {"marName": f"{name}.mar", "batchSize": 4, "maxBatchDelay": 5, **workers}}
    config = with_models(openvino) + "\ndefault_workers_per_model=2\n"
    with torchserve(folder, [*models, *openvino], config) as running:
        yield running


def with_models(models: dict[str, Any]) -> str:
    """Return config.properties with settings of more models."""
    config = (PROJECT / "config.properties").read_text()
    assert "\nmodels={\\\n" in config
    return config.replace("\nmodels={\\\n", "\nmodels=" + json.dumps(models)[:-1] + ",\\\n")


@pytest.fixture(scope="session")
def gathering_node(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[Node]:
    """One worker that waits a minute for four requests, and a head of three classes of the user's own."""
    folder = tmp_path_factory.mktemp("gathering")
    weights, labels = folder / "weights.pth", folder / "labels.txt"
    torch.save(random_resnet18(3).state_dict(), weights)
    # As some editors write it: with a byte order mark, Windows' line ends, and space where nobody sees it.
    labels.write_bytes("\ufeffKäse\r\nham and eggs \r\nbread\r\n\r\n".encode())
    archives.store(folder, archives.build("resnet-18", "--weights", weights, "--labels", labels))
    config = (PROJECT / "config.properties").read_text()
    one_slow_worker = '"minWorkers": 1, "maxWorkers": 1, "maxBatchDelay": 60000'
    assert '"maxBatchDelay": 5' in config
    with torchserve(folder, ["resnet-18"], config.replace('"maxBatchDelay": 5', one_slow_worker)) as running:
        yield running


@pytest.fixture(scope="session")
def tasks_node(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[Node]:
    """A model of each task as config.properties serves it, but on one worker, and with small frames (see TINY).

    Those of pose estimation and activity recognition are there again as gathering-..., which waits a minute for four
    requests.
    """
    folder = tmp_path_factory.mktemp("tasks")
    models, gathering = ["efficientnet-lite0", "keypointrcnn-resnet50-fpn", "r3d-18"], {}
    archives.store(folder, *(archives.build(model, is_tiny=True) for model in models))
    for model in models[1:]:
        name, archive = f"gathering-{model}", folder / "model_store" / f"{model}.mar"
        archive.with_name(f"{name}.mar").hardlink_to(archive)
        gathering[name] = {"1.0": {"marName": f"{name}.mar", "batchSize": 4, "maxBatchDelay": 60_000}}
    config = with_models(gathering) + "\ndefault_workers_per_model=1\n"
    with torchserve(folder, [*models, *gathering], config) as running:
        yield running


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with videos of 100 frames, vfr.mp4 of a variable rate, and a recording as HLS."""
    folder = tmp_path_factory.mktemp("media")
    for suffix in ("mkv", "flv", "ts"):
        ffmpeg(*pattern(), *X264, folder / f"clip.{suffix}")
    ffmpeg(*pattern(), *X264, "-movflags", "faststart", folder / "clip.mp4")
    ffmpeg(*pattern(), *X264, "-movflags", "frag_keyframe+empty_moov", folder / "fragments.mp4")
    ffmpeg(*pattern(), "-c:v", "libvpx", "-deadline", "realtime", folder / "clip.webm")
    ffmpeg(*pattern(), "-c:v", "mpeg4", "-g", "12", folder / "clip.avi")
    x265 = "keyint=12:log-level=none"
    ffmpeg(*pattern(), "-c:v", "libx265", "-x265-params", x265, "-pix_fmt", "yuv420p", folder / "h265.mp4")
    ffmpeg(*pattern(30, 8), *VFR, *X264, folder / "vfr.mp4")
    ffmpeg(*pattern(), *X264, "-f", "hls", "-hls_time", "1", "-hls_list_size", "0", folder / "recording.m3u8")
    return folder
