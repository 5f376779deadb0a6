"""deploy/kubernetes/: the container does what the manifest says; there is no cluster here."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from demo.node import PROJECT, java_environment
from tests.support.archives import Archives
from tests.support.frames import Pixels, jpeg
from tests.support.manifests import CONTAINER, DOCUMENTS, POD
from tests.support.programs import needs
from tests.support.scripts import wait_until

# An address that is not loopback, in a network of the pod's own.
POD_ADDRESS = "10.77.0.1"


# What a container runtime does, as far as it matters: file systems, no rights, and no variables but those of the image
# and the manifest. /tmp may hide the project, which has to be where it is.
AS_A_POD = """
set -e
ip link set lo up
ip address add "$1" dev lo
mount -t tmpfs none /mnt
mkdir /mnt/project /mnt/config /mnt/models
mount --bind "$2" /mnt/project
mount --bind -o ro "$3/config" /mnt/config
mount --bind -o ro "$3/model_store" /mnt/models
mount -t tmpfs none /tmp
mkdir -p "$2"
mount --bind /mnt/project "$2"
mount -o remount,bind,ro /
cd "$4"
shift 4
exec setpriv --inh-caps=-all --bounding-set=-all --no-new-privs "$@"
"""


class Pod:
    """A running container. process: the first one in it."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process

    def execute(self, *command: str, body: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command in it, as probes and hooks are."""
        inside = ["nsenter", "--target", str(self.process.pid), "--user", "--net", "--pid", "--mount"]
        inside += ["--preserve-credentials", f"--wd=/proc/{self.process.pid}/cwd", *environment()]
        return subprocess.run([*inside, *command], input=body, capture_output=True, timeout=60)

    def probe(self, name: str) -> int:
        return self.execute(*CONTAINER[name]["exec"]["command"]).returncode

    def get(self, port: int, path: str, body: bytes | None = None) -> bytes:
        """Return what another pod gets from a port; nothing for an error."""
        command = ["curl", "--silent", "--fail", "--max-time", "30", f"http://{POD_ADDRESS}:{port}{path}"]
        return self.execute(
            *command,
            *([] if body is None else ["-H", "Content-Type: image/jpeg", "--data-binary", "@-"]),
            body=body or b"",
        ).stdout


def environment() -> list[str]:
    """Return the command that sets the variables of the container, and no others."""
    image = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TEMP": "/home/model-server/tmp"}
    variables = image | java_environment() | {each["name"]: each["value"] for each in CONTAINER["env"]}
    return ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]


@contextmanager
def pod(folder: Path) -> Iterator[tuple[Pod, psutil.Popen]]:
    """Run the Deployment's container with the archive of a folder: the container, and the process that waits for it."""
    (folder / "config").mkdir()
    for name, text in DOCUMENTS["ConfigMap"]["data"].items():
        (folder / "config" / name).write_text(text)
    user, group = (POD["spec"]["securityContext"][key] for key in ("runAsUser", "runAsGroup"))
    command = ["unshare", f"--map-user={user}", f"--map-group={group}", "--keep-caps", "--net", "--pid", "--mount"]
    command += ["--fork", "--mount-proc", "--kill-child"]
    command += ["sh", "-c", AS_A_POD, "sh", POD_ADDRESS, str(PROJECT), str(folder), CONTAINER["workingDir"]]
    command += [*environment(), *CONTAINER["command"]]
    with (folder / "log").open("w") as log:
        outer = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            # Of its many mounts and changes of program the last one, by which it is TorchServe.
            wait_until(lambda: [child.name() for child in outer.children()] == ["torchserve"])
            yield Pod(outer.children()[0]), outer
        finally:
            if outer.poll() is None:
                outer.kill()
            outer.wait()


@pytest.mark.slow
@needs("unshare", "ip", "curl")
def test_container_starts_serves_and_ends_as_the_manifest_says(
    tmp_path: Path, archives: Archives, clip: list[Pixels]
) -> None:
    archives.store(tmp_path, archives.build("resnet-18"))
    with pod(tmp_path) as (running, outer):
        assert running.probe("startupProbe") != 0  # Nothing listens yet.
        wait_until(lambda: running.probe("startupProbe") == 0)
        assert running.probe("readinessProbe") == running.probe("livenessProbe") == 0

        assert len(json.loads(running.get(8080, "/predictions/resnet-18", jpeg(clip[0])))) == 5  # without a token
        assert b"ts_inference_requests_total" in running.get(8082, "/metrics")
        for port in (8081, 7070, 7071):
            assert running.execute("curl", "--max-time", "5", f"http://{POD_ADDRESS}:{port}").returncode == 7  # refused

        # /ping would say Healthy all the time.
        for process in running.process.children(recursive=True):
            if "model_service_worker" in " ".join(process.cmdline()):
                process.kill()
        wait_until(lambda: running.probe("readinessProbe") != 0)
        wait_until(lambda: running.probe("readinessProbe") == 0)

        asked = time.monotonic()
        hook = running.execute(*CONTAINER["lifecycle"]["preStop"]["exec"]["command"])
        assert hook.returncode == 0, hook.stderr
        assert outer.wait(timeout=60) == 0
        # Kubernetes kills it after 30 seconds.
        assert time.monotonic() - asked < 30
