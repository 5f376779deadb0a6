"""Our handler without TorchServe, in as many processes as there are workers: the ceiling of all servers here."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.in_process import Model


def _classify(archive: Path, images: Sequence[bytes], commands: "Connection[Any, Any]") -> None:
    """Run in each process: for each command (batch size, seconds) classify batches; report frames/s and batches."""
    model = Model(archive)
    commands.send(None)
    while (command := commands.recv()) is not None:
        size, seconds = command
        count, start = 0, time.monotonic()
        while time.monotonic() < start + seconds:
            model.answers([images[(count + index) % len(images)] for index in range(size)])
            count += size
        commands.send((count / (time.monotonic() - start), count // size))


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
