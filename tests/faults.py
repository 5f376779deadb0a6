"""What machines and networks do to a running system: faults that begin, last and end, for the tests and the soak."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import requests

from deploy.node import NODE_PORTS, PROJECT, Node, free_ports, torchserve, wait_until_ready
from edge.client import TEST_PICTURE
from tests.mjpeg_camera import MjpegCamera
from tests.mjpeg_camera import Mode as CameraMode
from tests.scripts import Run, archive, json_lines
from tests.tcp_proxy import Mode as NetworkMode
from tests.tcp_proxy import TcpProxy, tcp_proxy

# Both recipes: TorchServe batches the single frames that the first model gets, the second one gets JSON batches.
SINGLE, BATCHED = "resnet-18", "efficientnet-lite0"
FLAGS = {SINGLE: [], BATCHED: ["--client-batching"]}
# Enough for what request.py has in flight, 16 single frames, and too little for a flood beside it.
QUEUE, FLOOD = 20, 80
KILL_PAUSE_S = 2.0


class Site:
    """A TorchServe behind a network, and cameras. It can be killed, and started again in the same place."""

    def __init__(self, folder: Path, weights: Path, cameras: Sequence[MjpegCamera], cleanup: ExitStack) -> None:
        self.folder = folder
        self.cameras = cameras
        archive("--weights", weights, cwd=folder)
        archive("--model", BATCHED, "--client-batching", cwd=folder)
        self._ports = free_ports(NODE_PORTS)
        self._running = cleanup.enter_context(ExitStack())
        self.start()
        self.proxy: TcpProxy = cleanup.enter_context(tcp_proxy(self._ports[0]))

    def start(self) -> None:
        config = (PROJECT / "config.properties").read_text() + f"\njob_queue_size={QUEUE}\n"
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

    def renew_token(self) -> None:
        """Have TorchServe write a new inference token into its key file."""
        headers = {"Authorization": f"Bearer {self.node.token('API')}"}
        url = f"{self.node.management_url}/token?type=inference"
        requests.get(url, headers=headers, timeout=10).raise_for_status()


def answered(request: Run, camera: str, since: float = 0.0) -> list[float]:
    """Return when the answers of a camera's frames came that were captured since then, seconds since the epoch."""
    found = []
    for line in json_lines(request.output) if request.output.exists() else []:
        captured = datetime.fromisoformat(line["captured_at"]).timestamp()
        if line["camera"] == camera and line["outcome"] == "answered" and captured >= since:
            found.append(captured + line["latency_ms"] / 1000)
    return found


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

    That takes TorchServe some seconds, and more when the machine is busy.
    """
    is_over = threading.Event()

    def kill() -> None:
        for model in itertools.cycle((SINGLE, BATCHED)):
            if is_over.wait(KILL_PAUSE_S):
                return
            for worker in site.workers(model)[:1]:
                worker.kill()

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
    yield
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
    """Somebody else asks as much as the network carries, without waiting after a refusal."""
    is_over = threading.Event()
    headers = {"Authorization": f"Bearer {site.node.token()}", "Content-Type": "application/json"}
    batch = json.dumps({}).encode()

    def flood(model: str) -> None:
        with requests.Session() as session:
            while not is_over.is_set():
                with suppress(requests.RequestException):
                    url = f"{site.node.url}/predictions/{model}"
                    if model == SINGLE:
                        session.post(url, TEST_PICTURE, headers=headers | {"Content-Type": "image/jpeg"}, timeout=60)
                    else:
                        session.post(url, batch, headers=headers, timeout=60)

    with ThreadPoolExecutor(FLOOD) as threads:
        for number in range(FLOOD):
            threads.submit(flood, SINGLE if number % 2 else BATCHED)
        try:
            yield
        finally:
            is_over.set()


@contextmanager
def token_renewed(site: Site) -> Iterator[None]:
    """By somebody else, twice."""
    site.renew_token()
    yield
    site.renew_token()


def network(mode: NetworkMode) -> Callable[[Site], AbstractContextManager[None]]:
    @contextmanager
    def fault(site: Site) -> Iterator[None]:
        site.proxy.mode = mode
        yield
        site.proxy.mode = "well"

    return fault


def camera(mode: CameraMode) -> Callable[[Site], AbstractContextManager[None]]:
    @contextmanager
    def fault(site: Site) -> Iterator[None]:
        for each in site.cameras:
            each.mode = mode
        yield
        for each in site.cameras:
            each.mode = "streaming"

    return fault


@dataclass(frozen=True)
class Fault:
    """A fault.

    begin: has it last for as long as a `with` block.
    seconds: how long that is.
    told: what request.py says of it, a regular expression; None: it may say nothing.
    is_harmless: hardly any frames of a live camera are dropped.
    """

    begin: Callable[[Site], AbstractContextManager[None]]
    seconds: float
    told: str | None = None
    is_harmless: bool = False


LOST, BACK = r"gives no answers \(", r"answers again after \d+\.\d s"
FAULTS = {
    "workers killed": Fault(workers_killed, 7),
    "server killed": Fault(server_killed, 3, rf"(?s){LOST}.*(refused|reset|closed).*{BACK}"),
    "server frozen": Fault(server_frozen, 10, rf"(?s){LOST}none for \d+ s.*{BACK}"),
    "queue full": Fault(queue_full, 5),
    "token renewed": Fault(token_renewed, 2, is_harmless=True),
    "network latency": Fault(network("latency"), 5, is_harmless=True),
    "answers trickle": Fault(network("trickle"), 8, rf"(?s){LOST}none for \d+ s.*{BACK}"),
    "answers cut off": Fault(network("reset"), 5, rf"(?s){LOST}.*reset.*{BACK}"),
    "network black hole": Fault(network("blackhole"), 9, rf"(?s){LOST}none for \d+ s.*{BACK}"),
    "camera sends garbage": Fault(camera("garbage"), 5, r"(?s)the camera is lost.*the camera is back after"),
    "camera cut": Fault(camera("cut"), 3, r"(?s)the camera is lost.*the camera is back after"),
    "camera stalled": Fault(camera("stalled"), 7, r"(?s)the camera is lost.*the camera is back after"),
}
