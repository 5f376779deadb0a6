"""Two TorchServe nodes behind nginx: which requests reach them, and that one of them may fail."""

import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

from demo.node import NODE_PORTS, Node, free_ports, torchserve
from demo.proxy import Proxy, nginx, node_config
from edge.client import TEST_IMAGE
from edge.payload import MAX_BODY_BYTES
from tests.support.archives import Archives
from tests.support.endpoints import INFERENCE, MANAGEMENT, METRICS
from tests.support.fake_server import FakeServer, fake_server
from tests.support.frames import Pixels, as_json, jpeg, small, write_video
from tests.support.hostile import blank_png
from tests.support.mjpeg_camera import mjpeg_camera
from tests.support.programs import needs
from tests.support.scripts import MODEL, Run, run, running, wait_until

pytestmark = needs("nginx", "openssl")

FRAMES = 60
MAX_FRAMES = 8  # of a request, as deploy/README.md recommends
MAX_GAP_S = 3.0  # between two responses for a live camera, while another device sends as much as it can
LONG_ENOUGH = 40  # frames of that camera, at 3 a second
TAKEN_BACK_S = 5.0  # fail_timeout of deploy/nginx/nodes.conf
PREDICTIONS = f"/predictions/{MODEL}"


class Member:
    """A node of the cluster. It can be killed, and started again in the same place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = free_ports(NODE_PORTS)
        self._running = ExitStack()
        self.address = f"127.0.0.1:{self._ports[0]}"

    def start(self) -> None:
        served = torchserve(self._folder, [MODEL], node_config(workers=1), ports=self._ports)
        self.node: Node = self._running.enter_context(served)

    def family(self) -> list[psutil.Process]:
        """Return its processes: the launcher, Java, and the worker."""
        return [self.node.process, *self.node.process.children(recursive=True)]

    def kill(self) -> None:
        family = self.family()
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)
        self.end()

    def freeze(self) -> None:
        for process in self.family():
            process.suspend()

    def thaw(self) -> None:
        for process in self.family():
            process.resume()

    def end(self) -> None:
        self._running.close()


@dataclass(frozen=True)
class Cluster:
    members: Sequence[Member]
    proxy: Proxy

    def send(self, method: str, path: str, body: bytes = b"", token: str | None = None) -> requests.Response:
        """Send a request to nginx, with its token unless another is given; "" is none. The path is sent as it is."""
        with requests.Session() as session:
            session.verify = str(self.proxy.certificate)
            request = session.prepare_request(requests.Request(method, self.proxy.url, data=body))
            request.url = self.proxy.url + path
            if token != "":
                request.headers["Authorization"] = f"Bearer {token or self.proxy.token}"
            return session.send(request, timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[Cluster]:
    """Two nodes behind nginx. Their networks see tiny frames: any machine can answer all frames of the cameras."""
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as cleanup, ThreadPoolExecutor(2) as threads:
        folders = [folder / f"node-{number}" for number in (1, 2)]
        for each in folders:
            archives.store(each, archives.build(MODEL, "--max-frames", str(MAX_FRAMES), is_tiny=True))
        members = [Member(each) for each in folders]
        for member in members:
            cleanup.callback(member.end)
        list(threads.map(Member.start, members))
        yield Cluster(members, cleanup.enter_context(nginx(folder / "nginx", [each.address for each in members])))


Fault = tuple[Callable[[Member], None], Callable[[Member], None]]


@pytest.mark.parametrize("fault", [(Member.kill, Member.start), (Member.freeze, Member.thaw)], ids=["killed", "frozen"])
def test_a_node_may_fail(cluster: Cluster, clip: list[Pixels], tmp_path: Path, fault: Fault) -> None:
    """Four cameras, two of them files, two of them in JSON batches: no frame is lost, and the node is used again."""
    begin, end = fault
    frames = [small(frame) for frame in clip]
    video = str(write_video(tmp_path / "clip.mp4", frames[:FRAMES], 3))
    failing = cluster.members[1]
    with ExitStack() as cleanup:
        camera = cleanup.enter_context(mjpeg_camera([jpeg(frame) for frame in frames], fps=3)).url
        runs = []
        for name, flags in (("single", []), ("json", ["--client-batching"])):
            (tmp_path / name).mkdir()
            command = ["--model", MODEL, "--input", camera, "--input", video, *flags]
            environment = cluster.proxy.environment()
            started = running(cluster.proxy, tmp_path / name, *command, environment=environment)
            runs.append(cleanup.enter_context(started))
        wait_until(lambda: all(len(each.answered(camera)) > 10 and each.answered(video) for each in runs))
        begin(failing)
        wait_for_answered(runs, camera, 1)  # By then nginx has logged all earlier responses of the node.
        before = cluster.proxy.nodes_that_answered().count(failing.address)
        wait_for_answered(runs, camera, 15)
        assert cluster.proxy.nodes_that_answered().count(failing.address) == before
        end(failing)
        wait_until(lambda: cluster.proxy.nodes_that_answered().count(failing.address) > before + 10)
        wait_until(lambda: all(len(each.answered(video)) == FRAMES for each in runs))
        for each in runs:
            found = each.end()
            assert all(row["failed"] == "0" for row in found.values()), each.stderr()
            assert "buffer full" not in each.stderr()
            assert "is not responding" not in each.stderr()


def wait_for_answered(runs: Sequence[Run], camera: str, count: int) -> None:
    """Wait until each run has so many more answered frames of the camera."""
    targets = [len(each.answered(camera)) + count for each in runs]
    wait_until(lambda: all(len(each.answered(camera)) >= target for each, target in zip(runs, targets, strict=True)))


@pytest.mark.alone
def test_largest_batches_of_a_device_do_not_stop_another_one(
    cluster: Cluster, clip: list[Pixels], tmp_path: Path
) -> None:
    """It has a token of its own, and sends the largest requests that nginx and the nodes accept, all the time."""
    token, over = secrets.token_hex(32), threading.Event()
    with (cluster.proxy.certificate.parent / "tokens.conf").open("a") as file:
        file.write(f'"Bearer {token}" another;\n')
    nginx_id = int((cluster.proxy.log.parent / "nginx.pid").read_text())
    psutil.Process(nginx_id).send_signal(signal.SIGHUP)
    wait_until(lambda: cluster.send("GET", PREDICTIONS, token=token).status_code == 405)
    large = [jpeg(np.tile(frame, (2, 2, 1))) for frame in clip[:MAX_FRAMES]]
    bodies = [json.dumps(as_json(*large)).encode(), json.dumps(as_json(blank_png(7680, 2160))).encode()]
    statuses = Counter[int]()

    def send_the_largest() -> None:
        types = itertools.cycle(["application/json", "image/json", "application/json"])
        with requests.Session() as session:
            while not over.is_set():
                for body, content_type in zip(bodies, types, strict=False):
                    headers = {"Authorization": f"Bearer {token}", "Content-Type": content_type}
                    url, trusted = cluster.proxy.url + PREDICTIONS, str(cluster.proxy.certificate)
                    response = session.post(url, body, headers=headers, verify=trusted, timeout=60)
                    statuses[response.status_code] += 1
                    over.wait(0.0 if response.ok else 0.1)

    frames = [small(frame) for frame in clip]
    video = str(write_video(tmp_path / "clip.mp4", frames[:FRAMES], 3))
    with ExitStack() as cleanup, ThreadPoolExecutor(24) as threads:
        camera = cleanup.enter_context(mjpeg_camera([jpeg(frame) for frame in frames], fps=3)).url
        command = ["--model", MODEL, "--input", camera, "--input", video]
        device = cleanup.enter_context(
            running(cluster.proxy, tmp_path, *command, environment=cluster.proxy.environment())
        )
        wait_for_answered([device], camera, 10)
        senders = [threads.submit(send_the_largest) for _ in range(24)]
        try:
            before = device.answered(camera)
            wait_for_answered([device], camera, LONG_ENOUGH)
        finally:
            over.set()
        for sender in senders:
            sender.result(timeout=120)
        wait_until(lambda: len(device.answered(video)) == FRAMES)
        answered = sorted(device.answered(camera)[len(before) - 1 :])
        found = device.end()
    assert statuses[200] > 10
    assert set(statuses) <= {200, 429, 502, 504}, statuses
    assert statuses[429] > 0, "it sent as much as it could"
    assert max(late - early for early, late in itertools.pairwise(answered)) < MAX_GAP_S
    assert found[video]["answered"] == str(FRAMES)
    assert [row["failed"] for row in found.values()] == ["0", "0"]


@pytest.mark.parametrize("token", ["", "wrong", "0" * 64, "' OR 1"], ids=["none", "short", "long", "odd"])
def test_wrong_token(cluster: Cluster, tmp_path: Path, token: str) -> None:
    for method, path in (("POST", PREDICTIONS), ("OPTIONS", PREDICTIONS), ("GET", "/"), ("GET", "/models")):
        response = cluster.send(method, path, TEST_IMAGE, token)
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "token" in response.json()["error"]
    environment = cluster.proxy.environment() | {"TORCHSERVE_TOKEN": token.replace(" ", "_")}
    done = run("request.py", "--url", cluster.proxy.url, "--model", MODEL, cwd=tmp_path, environment=environment)
    assert done.returncode == 4
    problem = "rejects the token from TORCHSERVE_TOKEN" if token else "requires a token"
    assert re.fullmatch(rf"request\.py: {cluster.proxy.url} {problem}.*\n", done.stderr)


def test_only_tls(cluster: Cluster, tmp_path: Path) -> None:
    plain = cluster.proxy.url.replace("https", "http")
    response = requests.post(plain + PREDICTIONS, TEST_IMAGE, timeout=30)
    assert (response.status_code, response.json()["error"]) == (400, "plain HTTP where TLS is expected: use https://")
    done = run("request.py", "--url", plain, "--model", MODEL, cwd=tmp_path)
    assert done.returncode == 4
    assert "400 plain HTTP where TLS is expected: use https://" in done.stderr
    done = run("request.py", "--url", cluster.proxy.url, "--model", MODEL, cwd=tmp_path)
    assert done.returncode == 4
    assert f"request.py: no trusted TLS connection to {cluster.proxy.url}" in done.stderr


def test_nothing_but_predictions(cluster: Cluster) -> None:
    paths = {path for _, path in INFERENCE + MANAGEMENT + METRICS} - {PREDICTIONS}
    paths -= {f"{PREDICTIONS}/1.0"}
    ways_around = [f"{PREDICTIONS}/../../models", f"{PREDICTIONS}/%2e%2e/%2e%2e/models", "//models", "/%6dodels"]
    ways_around += [
        f"{PREDICTIONS}/1.0/../../../models",
        "/predictions/..%2fmodels",
        "/predictions/a%3fb",
        "/predictions/",
    ]
    for path in [*sorted(paths), *ways_around]:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            assert cluster.send(method, path).status_code in (400, 404), (method, path)
    for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD"):
        response = cluster.send(method, PREDICTIONS, TEST_IMAGE)
        assert (response.status_code, response.headers["Allow"]) == (405, "POST, OPTIONS")
        assert method == "HEAD" or response.json()["error"].startswith("expected POST, such as curl --data-binary")
        assert len(response.text.splitlines()) == (method != "HEAD")
    for path in (PREDICTIONS, f"{PREDICTIONS}/1.0", f"{PREDICTIONS}?a=b", f"/x/../{PREDICTIONS}"):
        assert cluster.send("POST", path, TEST_IMAGE).status_code == 200


def test_same_limit_as_torchserve(cluster: Cluster) -> None:
    assert cluster.send("POST", PREDICTIONS, bytes(MAX_BODY_BYTES)).json()["error"].startswith("not an image")
    assert cluster.send("POST", PREDICTIONS, bytes(MAX_BODY_BYTES + 1)).status_code == 413
    wait_until(
        lambda: re.search(r'(?m)" 413 .* nodes="-" statuses="-"$', cluster.proxy.log.read_text()) is not None
    )  # No node got the request.
    node = cluster.members[0].node.url
    assert requests.post(node + PREDICTIONS, bytes(MAX_BODY_BYTES + 1), timeout=30).status_code == 413


def test_a_device_gets_its_share(tmp_path: Path) -> None:
    """16 requests at once, and 429 for more. Each node takes 0.5 s for a request."""
    statuses = Counter[int]()
    with fake_server("slow") as one, fake_server("slow") as other:
        nodes = [f"127.0.0.1:{server.server_port}" for server in (one, other)]
        with nginx(tmp_path / "nginx", nodes) as proxy, ThreadPoolExecutor(40) as threads:

            def send_until_rejected() -> None:
                with requests.Session() as session:
                    session.headers["Authorization"] = f"Bearer {proxy.token}"
                    trusted = str(proxy.certificate)
                    while not (statuses[429] and statuses[200] >= 16) and statuses.total() < 2000:
                        response = session.post(proxy.url + PREDICTIONS, TEST_IMAGE, verify=trusted, timeout=60)
                        statuses[response.status_code] += 1

            for each in [threads.submit(send_until_rejected) for _ in range(40)]:
                each.result()
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 16


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_nodes_get_no_token_and_keep_their_connections(fake: FakeServer, short_clip: Path, tmp_path: Path) -> None:
    arguments = ["--quiet", "--input", str(short_clip), "--max-in-flight", "1"]
    done = through_nginx([f"127.0.0.1:{fake.server_port}"], *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fake.frames_asked == 22
    assert fake.tokens == {None}
    assert len(fake.connections) <= (os.cpu_count() or 1) + 1  # one for each worker of nginx


def test_there_may_be_many_nodes(tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", [f"127.0.0.1:{port}" for port in range(20_000, 20_200)]) as proxy:
        assert Cluster([], proxy).send("GET", "/").status_code == 404


def test_a_slow_node_gets_fewer_frames(short_clip: Path, tmp_path: Path) -> None:
    with fake_server("slow") as slow, fake_server("good") as fast:
        nodes = [f"127.0.0.1:{server.server_port}" for server in (slow, fast)]
        arguments = ["--quiet", "--input", str(short_clip), "--max-in-flight", "2"]
        done = through_nginx(nodes, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(slow.bodies) < len(fast.bodies) / 2


def test_nodes_are_used_even_if_all_seem_to_have_failed(tmp_path: Path) -> None:
    """Two requests took too long on both nodes. The next one must not wait until nginx uses the nodes again."""
    with fake_server("first silent") as one, fake_server("first silent") as other:
        nodes = [f"127.0.0.1:{server.server_port}" for server in (one, other)]
        with nginx(tmp_path / "nginx", nodes) as proxy, ThreadPoolExecutor(2) as threads:
            cluster = Cluster([], proxy)
            assert all(cluster.send("POST", PREDICTIONS, TEST_IMAGE).ok for _ in nodes)
            sent = [threads.submit(cluster.send, "POST", PREDICTIONS, body) for body in (b"1", b"2")]
            assert [each.result().status_code for each in sent] == [504, 504]
            wait_until(lambda: cluster.send("POST", PREDICTIONS, b"1").ok, timeout_s=0.8 * TAKEN_BACK_S)


def test_tokens_are_in_no_log(cluster: Cluster) -> None:
    assert cluster.send("POST", PREDICTIONS, TEST_IMAGE).ok
    assert cluster.send("POST", PREDICTIONS, token="wrong-token").status_code == 401
    answered = rf'(?m) device="demo" client=127\.0\.0\.1 "POST {PREDICTIONS} HTTP/1\.1" 200 .* statuses="(\d+, )?200"$'
    rejected = rf'(?m) client=127\.0\.0\.1 "POST {PREDICTIONS} HTTP/1\.1" 401 '
    for line in (answered, rejected):
        wait_until(lambda line=line: re.search(line, cluster.proxy.log.read_text()) is not None)  # type: ignore[misc]
    files = [path for path in cluster.proxy.log.parent.rglob("*") if path.is_file() and path.name != "tokens.conf"]
    assert {path.name for path in files} >= {"torchserve.log", "error.log", "nginx.conf"}
    for path in files:
        assert cluster.proxy.token.encode() not in path.read_bytes()
        assert b"wrong-token" not in path.read_bytes()


def through_nginx(nodes: Sequence[str], *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run request.py with an nginx of its own in front of nodes."""
    with nginx(Path(tempfile.mkdtemp(dir=folder)) / "nginx", nodes) as proxy:
        return run("request.py", "--url", proxy.url, *arguments, cwd=folder, environment=proxy.environment())
