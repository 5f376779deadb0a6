"""Faults of machines, networks and cameras, which begin, last and end: for the tests and the soak."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from demo.node import NODE_PORTS, PROJECT, Node, free_ports, torchserve, wait_until_ready
from edge.client import TEST_IMAGE
from tests.support.archives import Archives
from tests.support.mjpeg_camera import MjpegCamera
from tests.support.mjpeg_camera import Mode as CameraMode
from tests.support.nodes import rotate_token
from tests.support.tcp_proxy import Mode as NetworkMode
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

# Both recipes: TorchServe batches the single frames that the first model gets, the second one gets JSON batches.
SINGLE, BATCHED = "resnet-18", "efficientnet-lite0"
FLAGS = {SINGLE: [], BATCHED: ["--client-batching"]}
# Enough for what request.py has in flight, 16 single frames, and too little for a flood beside it.
QUEUE, FLOOD = 20, 80
WORKERS = 2  # of each model, on any machine
REFUSALS, REFUSAL_TIMEOUT_S = 500, 60.0
KILL_PAUSE_S = 2.0


class Site:
    """A TorchServe behind a network, and cameras. It can be killed, and started again in the same place.

    is_tiny: its networks see small frames, see Archives.build().
    """

    def __init__(
        self,
        folder: Path,
        archives: Archives,
        cameras: Sequence[MjpegCamera],
        cleanup: ExitStack,
        is_tiny: bool = False,
    ) -> None:
        self.folder = folder
        self.cameras = cameras
        single, batched = (
            archives.build(SINGLE, is_tiny=is_tiny),
            archives.build(BATCHED, "--client-batching", is_tiny=is_tiny),
        )
        archives.store(folder, single, batched)
        self._ports = free_ports(NODE_PORTS)
        self._running = cleanup.enter_context(ExitStack())
        self.start()
        self.proxy: TcpProxy = cleanup.enter_context(tcp_proxy(self._ports[0]))

    def start(self) -> None:
        config = (PROJECT / "config.properties").read_text()
        config += f"\njob_queue_size={QUEUE}\ndefault_workers_per_model={WORKERS}\n"
        node = torchserve(self.folder, [SINGLE, BATCHED], config, ports=self._ports)
        self.node: Node = self._running.enter_context(node)

    def kill(self) -> None:
        family = self.family()
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=30)
        self._running.close()

    def family(self) -> list[psutil.Process]:
        """Return TorchServe's processes: the launcher, Java, and the workers."""
        return [self.node.process, *self.node.process.children(recursive=True)]

    def workers(self, model: str) -> list[psutil.Process]:
        """Return a model's workers that run, the oldest first."""
        pids = {worker["pid"] for worker in self.node.describe(model)["workers"]}
        running = [member for member in self.family() if member.pid in pids]
        return sorted(running, key=psutil.Process.create_time)


def resources(process: psutil.Process) -> dict[str, int]:
    """Return what a process holds that must not grow."""
    return {
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
        "sockets": len(process.net_connections()),
        "processes": len(process.children(recursive=True)),
        "megabytes": process.memory_info().rss // 1_000_000,
    }


@contextmanager
def workers_killed(site: Site) -> Iterator[None]:
    """One after the other, of the models in turns, sooner than TorchServe starts new ones; at the end it has them back.

    At least as many as there are. Until they are back it takes some seconds, and more when the machine is busy.
    """
    is_over = threading.Event()
    count = sum(len(site.workers(model)) for model in (SINGLE, BATCHED))
    killed: set[int] = set()

    def kill() -> None:
        for model in itertools.cycle((SINGLE, BATCHED)):
            if is_over.is_set() and len(killed) >= count:
                return
            for worker in site.workers(model)[:1]:
                worker.kill()
                killed.add(worker.pid)
            time.sleep(KILL_PAUSE_S)

    with ThreadPoolExecutor(1) as thread:
        killer = thread.submit(kill)
        try:
            yield
        finally:
            is_over.set()
            killer.result()
            for model in (SINGLE, BATCHED):
                wait_until_ready(site.node, model)


@contextmanager
def server_killed(site: Site) -> Iterator[None]:
    """Whole, and started again at the end, when it is ready."""
    site.kill()
    try:
        yield
    finally:
        site.start()


@contextmanager
def server_frozen(site: Site) -> Iterator[None]:
    members = site.family()
    for member in members:
        member.suspend()
    try:
        yield
    finally:
        for member in members:
            member.resume()


@contextmanager
def queue_full(site: Site) -> Iterator[None]:
    """Another client sends requests as fast as it can, without a pause after a 503, and gets many of them."""
    is_over = threading.Event()
    refused = threading.Semaphore(0)
    headers = {"Authorization": f"Bearer {site.node.token()}"}
    batch = json.dumps({}).encode()

    def flood(model: str) -> None:
        with requests.Session() as session:
            while not is_over.is_set():
                with suppress(requests.RequestException):
                    url = f"{site.node.url}/predictions/{model}"
                    body, kind = (TEST_IMAGE, "image/jpeg") if model == SINGLE else (batch, "application/json")
                    response = session.post(url, body, headers=headers | {"Content-Type": kind}, timeout=60)
                    if response.status_code == requests.codes.service_unavailable:
                        refused.release()

    with ThreadPoolExecutor(FLOOD) as threads:
        for number in range(FLOOD):
            threads.submit(flood, SINGLE if number % 2 else BATCHED)
        try:
            yield
            for _ in range(REFUSALS):
                assert refused.acquire(timeout=REFUSAL_TIMEOUT_S)
        finally:
            is_over.set()


@contextmanager
def token_renewed(site: Site) -> Iterator[None]:
    """By another client, twice."""
    rotate_token(site.node)
    yield
    rotate_token(site.node)


def network(mode: NetworkMode) -> Callable[[Site], AbstractContextManager[None]]:
    @contextmanager
    def fault(site: Site) -> Iterator[None]:
        site.proxy.mode = mode
        try:
            yield
        finally:
            site.proxy.mode = "well"

    return fault


def camera(mode: CameraMode) -> Callable[[Site], AbstractContextManager[None]]:
    @contextmanager
    def fault(site: Site) -> Iterator[None]:
        for each in site.cameras:
            each.mode = mode
        try:
            yield
        finally:
            for each in site.cameras:
                each.mode = "streaming"

    return fault


@dataclass(frozen=True)
class Fault:
    """A fault.

    begin: has it last for as long as a `with` block.
    seconds: how long that is in the soak.
    reported, back: regular expressions of the messages of request.py while it lasts, and when it is over. "": there
        may be no message, and frames are answered while the fault lasts.
    """

    begin: Callable[[Site], AbstractContextManager[None]]
    seconds: float
    reported: str = ""
    back: str = ""


LOST, BACK = r"is not responding \(", r"is responding again after \d+\.\d s"
SILENCE = LOST + r"no response for \d+ s"
CAMERA_LOST, CAMERA_BACK = "the camera is lost", "the camera is back after"
FAULTS = {
    "workers killed": Fault(workers_killed, 7),
    "server killed": Fault(server_killed, 3, rf"{LOST}.*(refused|reset|closed)", BACK),
    "camera cut": Fault(camera("cut"), 3, CAMERA_LOST, CAMERA_BACK),
    "server frozen": Fault(server_frozen, 10, SILENCE, BACK),
    "queue full": Fault(queue_full, 5),
    "token renewed": Fault(token_renewed, 2),
    "network latency": Fault(network("latency"), 5),
    "camera sends garbage": Fault(camera("garbage"), 5, CAMERA_LOST, CAMERA_BACK),
    "answers trickle": Fault(network("trickle"), 8, SILENCE, BACK),
    "answers cut off": Fault(network("reset"), 5, rf"{LOST}.*reset", BACK),
    "network black hole": Fault(network("blackhole"), 9, SILENCE, BACK),
    "camera stalled": Fault(camera("stalled"), 7, CAMERA_LOST, CAMERA_BACK),
}
