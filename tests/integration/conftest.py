"""The TorchServe nodes that several modules ask. Each is started once, see SERVERS in tests/conftest.py."""

from collections.abc import Iterator

import pytest
import torch

from demo.node import PROJECT, Node, torchserve
from tests.support.archives import Archives
from tests.support.networks import random_resnet18


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[Node]:
    """A TorchServe with both models, as config.properties serves them, but on two workers each on any machine."""
    folder = tmp_path_factory.mktemp("node")
    archives.store(folder, archives.build("efficientnet-lite0"), archives.build("resnet-18"))
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=2\n"
    with torchserve(folder, ["efficientnet-lite0", "resnet-18"], config) as running:
        yield running


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
