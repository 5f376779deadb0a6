"""handler.py in this process: what goes through the network together, how exactly, and on how many threads."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from handler import VideoFrameHandler
from server.tasks import ImageClassification
from tests.support.archives import unpacked_archive
from tests.support.frames import Pixels, as_json, jpeg
from tests.support.in_process import Model
from tests.support.networks import LABELS, random_resnet18, reference
from tests.support.nodes import BATCH_HEADER

MAX_BATCH = ImageClassification.max_batch


def watch(handler: VideoFrameHandler, patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that gets all that goes through the network until the test ends."""
    seen: list[torch.Tensor] = []
    network = handler.model

    def watched(pixels: torch.Tensor) -> Any:
        seen.append(pixels)
        return network(pixels)

    patch.setattr(handler, "model", watched)
    return seen


def test_frames_of_all_requests_go_through_the_network_together(
    model: Model, clip: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header could say so without its being true. Here the network itself counts, outside of TorchServe."""
    seen = watch(model.handler, monkeypatch)
    images = [jpeg(frame) for frame in clip[:3]]
    answers = model.answers([images[0], as_json(*images[1:]), b"no image"])
    assert [pixels.shape for pixels in seen] == [(3, 3, 224, 224)]
    assert [len(answer) for answer in answers[:2]] == [5, 2]
    assert model.statuses() == [200, 200, 400]


def test_many_frames_go_through_the_network_in_parts(
    model: Model, clip: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(model.handler, monkeypatch)
    images = [jpeg(frame) for frame in clip[:: len(clip) // 35][:35]]
    [answers] = model.answers([as_json(*images)])
    assert [len(pixels) for pixels in seen] == [MAX_BATCH, 35 - MAX_BATCH]
    assert model.context.get_response_headers(0)[BATCH_HEADER] == str(MAX_BATCH)
    alone = [model.answers([image])[0] for image in (images[0], images[-1])]
    assert [answers[0], answers[-1]] == [pytest.approx(answer, abs=1e-4) for answer in alone]


def test_a_worker_has_one_thread_for_the_network(resnet18: Path) -> None:
    torch.set_num_threads(2)
    model = Model(resnet18)
    assert torch.get_num_threads() == 1
    # Threads that come later must not take all cores again.
    assert model.handler.decoders.submit(torch.get_num_threads).result(timeout=10) == 1


def test_handler_is_warm_before_the_first_request(resnet18: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    inference = VideoFrameHandler.inference

    def counted(self: VideoFrameHandler, batch: torch.Tensor) -> Any:
        sizes.append(len(batch))
        return inference(self, batch)

    monkeypatch.setattr(VideoFrameHandler, "inference", counted)
    Model(resnet18, batch_size=6)
    assert set(sizes) == {1, 6}


def test_bf16_is_nearly_as_exact(tmp_path: Path, clip: list[Pixels], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(unpacked_archive(tmp_path, "--precision", "bf16"))
    seen = watch(model.handler, monkeypatch)
    network = random_resnet18(1000)
    for frame in clip[::45]:
        [answer] = model.answers([image := jpeg(frame)])
        expected = reference(network, Image.open(io.BytesIO(image)))
        assert seen[-1].dtype == torch.bfloat16
        probabilities = torch.tensor(list(answer.values()))
        assert not torch.equal(probabilities, probabilities.bfloat16().float()), "probabilities are computed in fp32"
        for label, value in answer.items():
            assert value == pytest.approx(expected[LABELS.index(label)].item(), abs=0.05)
