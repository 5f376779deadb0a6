"""As many processes as there are workers, without a server: our handler, the ceiling of all servers; and OpenVINO."""

import multiprocessing
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from server.images import open_image, to_rgb
from tests.support.in_process import Model


def _classify(archive: Path, images: Sequence[bytes], is_alone: bool, commands: "Connection[Any, Any]") -> None:
    """Run in each process: for each command (batch size, seconds) classify batches; report frames/s and batches."""
    predict = network_alone(archive, images) if is_alone else Model(archive).answers
    commands.send(None)
    while (command := commands.recv()) is not None:
        size, seconds = command
        count, start = 0, time.monotonic()
        while time.monotonic() < start + seconds:
            predict([images[(count + index) % len(images)] for index in range(size)])
            count += size
        commands.send((count / (time.monotonic() - start), count // size))


def network_alone(archive: Path, images: Sequence[bytes]) -> Callable[[list[bytes]], Any]:
    """Return a function that runs an archive's network by OpenVINO's own means, on images that are decoded already."""
    import openvino

    handler = Model(archive).handler
    ready = {image: handler.task.preprocess(to_rgb(open_image(image), 0)).movedim(0, -1).numpy() for image in images}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as file:
        file.extractall(folder)
        precision = yaml.safe_load((Path(folder) / "model-config.yaml").read_text())["handler"]["precision"]
        hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "INFERENCE_NUM_THREADS": 1}
        [path] = Path(folder).glob("*.xml")
        compiled = openvino.compile_model(path, "CPU", hint | {"NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False})
    return lambda batch: compiled(np.stack([ready[image] for image in batch]))


class Ceiling:
    """As many processes as there are workers, each with its own handler and frames in memory."""

    def __init__(self, pipes: "Sequence[Connection[Any, Any]]") -> None:
        self._pipes = pipes

    def measure(self, batch_size: int, seconds: float) -> tuple[float, int]:
        """Return the frames a second that all processes classify together, and the number of their batches."""
        for pipe in self._pipes:
            pipe.send((batch_size, seconds))
        measured = [pipe.recv() for pipe in self._pipes]
        return sum(fps for fps, _ in measured), sum(batches for _, batches in measured)


@contextmanager
def ceiling(archive: Path, images: Sequence[bytes], processes: int, is_alone: bool = False) -> Iterator[Ceiling]:
    """Start the processes; they end with the block. is_alone: OpenVINO's network without our handler."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as cleanup:
        pipes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_classify, args=(archive, images, is_alone, theirs), daemon=True)
            process.start()
            cleanup.callback(process.join)
            cleanup.callback(ours.send, None)
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        yield Ceiling(pipes)
