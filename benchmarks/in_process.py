"""Our handler without TorchServe: for the ceiling, for other servers with the same model code, and for the tests."""

import json
import multiprocessing
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ts
import yaml
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import VideoFrameHandler

HTTP = {"host": "127.0.0.1"}  # a header that every request over HTTP has


class Model:
    """An archive of create_mar_file.py, unpacked, its handler loaded in this process.

    Args:
        archive: the .mar file.
        batch_size: what TorchServe's batch size would be.
    """

    def __init__(self, archive: Path, batch_size: int = 4) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
            manifest = json.loads(Path(folder, "MAR-INF", "MANIFEST.json").read_text())
            config = yaml.safe_load(Path(folder, "model-config.yaml").read_text())
            metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
            self.context = Context(
                "resnet-18", folder, manifest, batch_size, None, "0.12.0", metrics=metrics, model_yaml_config=config
            )
            self.handler = VideoFrameHandler()
            self.handler.initialize(self.context)

    def answers(self, bodies: Sequence[Any], headers: Mapping[str, str] = HTTP) -> list[Any]:
        """Return the answer to each request's body, as TorchServe would get it; statuses are in the context."""
        self.context.request_processor = [RequestProcessor(dict(headers)) for _ in bodies]
        return self.handler.handle([{"body": body} for body in bodies], self.context)


def _classify(archive: Path, images: Sequence[bytes], commands: "Connection[Any, Any]") -> None:
    """What each process does: classify batches of the size and for the time that it is told, and tell how many."""
    model = Model(archive)
    commands.send(None)
    while (command := commands.recv()) is not None:
        size, seconds = command
        count, start = 0, time.monotonic()
        while time.monotonic() < start + seconds:
            model.answers([images[(count + index) % len(images)] for index in range(size)])
            count += size
        commands.send(count / (time.monotonic() - start))


class Ceiling:
    """As many processes as there are workers, each with a handler of its own and frames at hand."""

    def __init__(self, pipes: "Sequence[Connection[Any, Any]]") -> None:
        self._pipes = pipes

    def fps(self, batch_size: int, seconds: float) -> float:
        """Return the frames a second that all processes classify together, in batches."""
        for pipe in self._pipes:
            pipe.send((batch_size, seconds))
        return float(sum(pipe.recv() for pipe in self._pipes))


@contextmanager
def ceiling(archive: Path, images: Sequence[bytes], processes: int) -> Iterator[Ceiling]:
    """Start the processes; they end with the block."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as cleanup:
        pipes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_classify, args=(archive, images, theirs), daemon=True)
            process.start()
            cleanup.callback(process.join)
            cleanup.callback(ours.send, None)
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        yield Ceiling(pipes)
