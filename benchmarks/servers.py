"""The servers that are compared, each on free ports of 127.0.0.1, for as long as a `with` block lasts."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from archive.labels import trained_labels
from demo.node import PROJECT, NodeError, end, free_ports, torchserve

READY_TIMEOUT_S = 180.0
RAW = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Server:
    """A running server. `headers`: the headers that a request needs besides its content type."""

    url: str
    headers: dict[str, str]
    process: psutil.Popen
    folder: Path | None = None

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def pause(self) -> None:
        """Suspend all its processes, since some servers use CPU when idle, which the measured server needs."""
        for member in self.family():
            member.suspend()

    def resume(self) -> None:
        for member in self.family():
            member.resume()

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its processes so far."""
        return sum(sum(member.cpu_times()[:2]) for member in self.family())

    def memory_mb(self) -> float:
        """Return the memory of all its processes; shared memory is counted once."""
        return sum(member.memory_full_info().pss for member in self.family()) / 1e6


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def build_archive(folder: Path, weights: Path, *flags: str) -> Path:
    """Build ResNet-18's archive in a folder, as a user does."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PROJECT / "create_mar_file.py"), "--weights", str(weights), *flags]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "model_store" / "resnet-18.mar"


@contextmanager
def ours(folder: Path, config: str) -> Iterator[Server]:
    """TorchServe with an archive that is already in the folder."""
    # Every minute TorchServe starts a Python that measures the machine; after a pause it would start all missed ones.
    with torchserve(folder, ["resnet-18"], config + "\ndisable_system_metrics=true\n") as node:
        headers = {"Authorization": f"Bearer {node.token()}"}
        yield Server(f"{node.url}/predictions/resnet-18", headers, node.process, folder)


@contextmanager
def original(folder: Path, weights: Path, client_batching: bool) -> Iterator[Server]:
    """TorchServe as in the original example: its built-in handler, one worker, or defaults for JSON batches."""
    (folder / "model_store").mkdir(parents=True)
    here = Path(__file__).resolve().parent / "original"
    handler = str(here / "json_handler.py") if client_batching else "image_classifier"
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "resnet-18", "--version", "1.0"]
    command += ["--model-file", str(here / "model.py"), "--serialized-file", str(weights), "--handler", handler]
    command += ["--export-path", str(folder / "model_store")]
    labels = folder / "index_to_name.json"
    labels.write_text(json.dumps(dict(enumerate(trained_labels("resnet-18")))))
    command += ["--extra-files", str(labels)]
    environment = os.environ | {"TMPDIR": str(folder)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = '"minWorkers": 1, "maxWorkers": 1, "batchSize": 4, "maxBatchDelay": 5000, "responseTimeout": 120'
    model = f'models={{"resnet-18": {{"1.0": {{"defaultVersion": true, "marName": "resnet-18.mar", {settings}}}}}}}\n'
    with ours(folder, "" if client_batching else model) as server:
        yield server


@contextmanager
def other(name: str, folder: Path, archive: Path, workers: int, batch_size: int, delay_ms: int) -> Iterator[Server]:
    """LitServe or mosec ("lit", "mosec") with our handler; a batch size of 1 is for JSON batches."""
    folder.mkdir(parents=True)
    [port] = free_ports(1)
    scratch = tempfile.mkdtemp(prefix="bench-")  # The path of a socket may have no more than 107 characters.
    environment = os.environ | {
        "PYTHONPATH": str(PROJECT),
        "TMPDIR": scratch,
        "BENCH_ARCHIVE": str(archive),
        "BENCH_WORKERS": str(workers),
        "BENCH_BATCH_SIZE": str(batch_size),
        "BENCH_DELAY_MS": str(delay_ms),
    }
    address = [str(port)] if name == "lit" else ["--address", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", f"benchmarks.{name}_server", *address]
    with (folder / "log").open("w") as log:
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}/predictions/resnet-18"
            deadline = time.monotonic() + READY_TIMEOUT_S
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NodeError(f"{name} does not start; its log:\n{(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.5)
            yield Server(url, {}, process)
        finally:
            end(process)
            shutil.rmtree(scratch, ignore_errors=True)


def is_up(url: str) -> bool:
    try:
        return requests.post(url, data=b"{}", headers=RAW, timeout=10).ok
    except requests.RequestException:
        return False
