"""handler.py in this process: what goes through the network together, how exactly, and on how many threads."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from benchmarks.in_process import Model
from deploy.node import PROJECT, torchserve
from handler import LARGEST_PASS, VideoFrameHandler
from tests.conftest import LABELS, as_json, assert_equals_reference, jpeg, post, random_resnet18, reference, wait_until
from tests.scripts import archive

HEADER = "X-Forward-Batch-Size"
Load = Callable[..., Model]


@pytest.fixture
def load(tmp_path: Path, weights: Path) -> Iterator[Load]:
    """Builds an archive and loads its handler into this process, outside of TorchServe."""
    threads = torch.get_num_threads()

    def load_archive(*flags: str, batch_size: int = 4) -> Model:
        archive("--weights", weights, *flags, cwd=tmp_path)
        return Model(tmp_path / "model_store" / "resnet-18.mar", batch_size)

    yield load_archive
    torch.set_num_threads(threads)


def watch(handler: VideoFrameHandler) -> list[torch.Tensor]:
    """Return a list that gets all that goes through the network from now on."""
    seen: list[torch.Tensor] = []
    network = handler.model

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return network(pixels)

    handler.model = watched
    return seen


def test_frames_of_all_requests_go_through_the_network_together(load: Load, clip: list[npt.NDArray[np.uint8]]) -> None:
    """The header could say so without its being true. Here the network itself counts, outside of TorchServe."""
    model = load()
    seen = watch(model.handler)
    images = [jpeg(frame) for frame in clip[:3]]
    answers = model.answers([images[0], as_json(*images[1:]), b"no image"])
    assert [pixels.shape for pixels in seen] == [(3, 3, 224, 224)]
    assert [len(answer) for answer in answers[:2]] == [5, 2]
    assert [model.context.get_response_status(index)[0] for index in range(3)] == [200, 200, 400]


def test_many_frames_go_through_the_network_in_parts(load: Load, clip: list[npt.NDArray[np.uint8]]) -> None:
    model = load()
    seen = watch(model.handler)
    images = [jpeg(frame) for frame in clip[:: len(clip) // 35][:35]]
    [answers] = model.answers([as_json(*images)])
    assert [len(pixels) for pixels in seen] == [LARGEST_PASS, 35 - LARGEST_PASS]
    assert model.context.get_response_headers(0)[HEADER] == str(LARGEST_PASS)
    alone = [model.answers([image])[0] for image in (images[0], images[-1])]
    assert [answers[0], answers[-1]] == [pytest.approx(answer, abs=1e-4) for answer in alone]


def test_a_worker_has_one_thread_for_the_network(load: Load) -> None:
    model = load()
    assert torch.get_num_threads() == 1
    # Threads that come later must not take all cores again.
    assert model.handler.decoders.submit(torch.get_num_threads).result(timeout=10) == 1


def test_handler_is_warm_before_the_first_request(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    inference = VideoFrameHandler.inference

    def counted(self: VideoFrameHandler, frames: list[torch.Tensor]) -> list[dict[str, float]]:
        sizes.append(len(frames))
        return inference(self, frames)

    monkeypatch.setattr(VideoFrameHandler, "inference", counted)
    load(batch_size=6)
    assert set(sizes) == {1, 4, 6}


def test_bf16_is_nearly_as_exact(load: Load, clip: list[npt.NDArray[np.uint8]]) -> None:
    model = load("--precision", "bf16")
    seen = watch(model.handler)
    network = random_resnet18(1000)
    for frame in clip[::45]:
        [answer] = model.answers([image := jpeg(frame)])
        expected = reference(network, Image.open(io.BytesIO(image)))
        assert seen[-1].dtype == torch.bfloat16
        probabilities = torch.tensor(list(answer.values()))
        assert not torch.equal(probabilities, probabilities.bfloat16().float()), "probabilities are computed in fp32"
        for label, value in answer.items():
            assert value == pytest.approx(expected[LABELS.index(label)].item(), abs=0.05)


def test_compiled_network_answers_the_same(tmp_path: Path, weights: Path, clip: list[npt.NDArray[np.uint8]]) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs g++")
    archive("--weights", weights, "--compile", cwd=tmp_path)
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=1\n"
    with torchserve(tmp_path, ["resnet-18"], config) as node:
        wait_until(lambda: "compiled for 1 to 4 frames" in node.log())
        images = [jpeg(frame) for frame in clip[:: len(clip) // 6]]
        response = post(node, "resnet-18", as_json(*images))
        assert response.headers[HEADER] == "4"
        for image, answer in zip(images, response.json(), strict=True):
            assert_equals_reference(answer, reference(random_resnet18(1000), Image.open(io.BytesIO(image))))


def test_server_that_cannot_compile_says_so_and_serves(
    tmp_path: Path, weights: Path, clip: list[npt.NDArray[np.uint8]]
) -> None:
    archive("--weights", weights, "--compile", cwd=tmp_path)
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=1\n"
    with torchserve(tmp_path, ["resnet-18"], config, {"CXX": "no-such-compiler"}) as node:
        wait_until(lambda: "can't compile the network, going on without: " in node.log())
        image = jpeg(clip[0])
        answer = post(node, "resnet-18", image).json()
        assert_equals_reference(answer, reference(random_resnet18(1000), Image.open(io.BytesIO(image))))
