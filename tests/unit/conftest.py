"""Unit tests run in their own process alone: whichever of them starts a process or opens a connection, fails."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.archives import unpacked_archive
from tests.support.clock import Clock
from tests.support.fuzz_handler import Subject
from tests.support.in_process import Model
from tests.support.networks import RANDOM


@pytest.fixture(scope="package", autouse=True)
def no_server_and_no_process() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test starts no server and no process: it belongs in tests/integration")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        for method in ("bind", "connect", "connect_ex"):
            patch.setattr(socket.socket, method, refuse)
        yield


@pytest.fixture(scope="session", autouse=True)
def torch_threads() -> Iterator[None]:
    """The handler sets the number of threads of its process, which is this one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of an archive."""
    return unpacked_archive(tmp_path_factory.mktemp("resnet18"))


@pytest.fixture(scope="session")
def model(resnet18: Path) -> Model:
    """The handler, with ResNet-18 on one thread."""
    return Model(resnet18)


@pytest.fixture(scope="session", params=["resnet-18", "keypointrcnn-resnet50-fpn", "r3d-18"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The handler with a model of each task, for hostile requests."""
    model, folder = request.param, tmp_path_factory.mktemp("subject")
    return Subject(unpacked_archive(folder, "--model", model, network=RANDOM[model](), is_tiny=True))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock
