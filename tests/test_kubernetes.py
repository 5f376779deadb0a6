"""The manifests are valid, agree with each other, and their container does what they say; there is no cluster here."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import yaml

from deploy.node import PROJECT, java_environment
from tests.conftest import jpeg, wait_until
from tests.scripts import archive, is_isolation_possible

FOLDER = PROJECT / "deploy" / "kubernetes"
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all((FOLDER / "torchserve.yaml").read_text())}
SERVICE = yaml.safe_load((FOLDER / "kserve.yaml").read_text())
POD = DOCUMENTS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
# An address that is not loopback, in a network of the pod's own.
POD_ADDRESS = "10.77.0.1"


def settings(properties: str) -> dict[str, str]:
    """Parse a configuration of TorchServe."""
    lines = properties.replace("\\\n", "").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("version", ["1.25", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_manifests_are_valid(kind: str, version: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


def test_everything_finds_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    spec = {kind: document.get("spec", {}) for kind, document in DOCUMENTS.items()}
    assert spec["Deployment"]["selector"]["matchLabels"] == labels
    assert spec["Service"]["selector"] == labels
    assert spec["NetworkPolicy"]["podSelector"]["matchLabels"] == labels
    assert spec["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["predictor"]["labels"] == labels
    target = spec["HorizontalPodAutoscaler"]["scaleTargetRef"]
    assert target == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": DOCUMENTS["Deployment"]["metadata"]["name"],
    }
    # What the autoscaler takes per cent of.
    assert CONTAINER["resources"]["requests"]["cpu"] == CONTAINER["resources"]["limits"]["cpu"]


def test_names_and_ports_exist() -> None:
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == set(volumes)
    assert volumes["config"]["configMap"]["name"] == DOCUMENTS["ConfigMap"]["metadata"]["name"]
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]

    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert {port["targetPort"]: port["port"] for port in DOCUMENTS["Service"]["spec"]["ports"]} == ports
    policy = DOCUMENTS["NetworkPolicy"]["spec"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"protocol": "TCP", "port": port}] for port in ports]
    assert all(rule["from"] for rule in policy["ingress"])  # An empty list would be everybody.
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []

    configured = settings(DOCUMENTS["ConfigMap"]["data"]["config.properties"])
    assert configured["inference_address"] == f"http://0.0.0.0:{ports['http']}"
    assert configured["metrics_address"] == f"http://0.0.0.0:{ports['metrics']}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f"{configured['management_address']}/models/resnet-18" in CONTAINER[probe]["exec"]["command"][-1]


def test_pods_are_configured_as_other_nodes_but_for_addresses_and_tokens() -> None:
    pods = settings(DOCUMENTS["ConfigMap"]["data"]["config.properties"])
    others = settings((PROJECT / "config.properties").read_text())
    models = json.loads(others.pop("models"))
    assert json.loads(pods.pop("models")) == {"resnet-18": models["resnet-18"]}
    behind_nginx = settings((PROJECT / "deploy" / "nginx" / "node.properties").read_text())
    for setting in ("disable_token_authorization", "job_queue_size"):
        assert pods.pop(setting) == behind_nginx[setting]
    for address in ("inference_address", "metrics_address"):
        assert pods.pop(address) == others.pop(address).replace("127.0.0.1", "0.0.0.0")
    assert pods == others


# Run with .venv/kserve in its path. The packages' own __init__ would import KServe's model server, and much else that
# is not installed. The classes drop what they don't know, so that only what they know comes back.
ROUND_TRIP = """
import importlib, json, sys, types
for name in "kserve", "kubernetes", "kubernetes.client":
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
kserve = importlib.import_module("kserve.models")
kserve.__dict__.update(vars(importlib.import_module("kubernetes.client.models")) | vars(kserve))
client = importlib.import_module("kserve.api_client").ApiClient()
given = types.SimpleNamespace(data=sys.stdin.read())
json.dump(client.sanitize_for_serialization(client.deserialize(given, "V1beta1InferenceService")), sys.stdout)
"""


def known_to_kserve(document: dict[str, Any]) -> Any:
    """Return what KServe's own classes make of an InferenceService."""
    site = PROJECT / ".venv" / "kserve"
    assert site.is_dir(), "make .venv/dev"
    done = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP, str(site)],
        env=os.environ | {"PYTHONPATH": str(site)},
        input=json.dumps(document),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kserve_knows_all_that_its_manifest_says() -> None:
    assert known_to_kserve(SERVICE) == SERVICE
    misspelt = copy.deepcopy(SERVICE)
    misspelt["spec"]["predictor"]["containers"][0]["readinesProbe"] = {}
    misspelt["spec"]["predictor"]["scaleTargets"] = 70
    assert known_to_kserve(misspelt) == SERVICE


def test_kserve_runs_the_same_container() -> None:
    predictor = SERVICE["spec"]["predictor"]
    (container,) = predictor["containers"]
    # KServe brings the archive, by a variable, and names the container.
    kserves_own = {"name": "STORAGE_URI", "value": "pvc://" + DOCUMENTS["PersistentVolumeClaim"]["metadata"]["name"]}
    expected = CONTAINER | {
        "name": "kserve-container",
        "env": [*CONTAINER["env"], kserves_own],
        "ports": [port | {"protocol": "TCP"} for port in CONTAINER["ports"]],
        "volumeMounts": [mount for mount in CONTAINER["volumeMounts"] if mount["name"] != "models"],
    }
    assert container == expected
    for key in ("securityContext", "automountServiceAccountToken"):
        assert predictor[key] == POD["spec"][key]
    assert predictor["volumes"] == [volume for volume in POD["spec"]["volumes"] if volume["name"] != "models"]
    scaling = DOCUMENTS["HorizontalPodAutoscaler"]["spec"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (scaling["minReplicas"], scaling["maxReplicas"])
    assert predictor["scaleTarget"] == scaling["metrics"][0]["resource"]["target"]["averageUtilization"]
    # What is applied besides, by `-l app.kubernetes.io/component!=server`.
    component = {kind: each["metadata"]["labels"]["app.kubernetes.io/component"] for kind, each in DOCUMENTS.items()}
    besides = {kind for kind, name in component.items() if name != "server"}
    assert besides == {"ConfigMap", "PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget"}


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
            wait_until(lambda: [child.name() for child in outer.children()] == ["torchserve"], 10)
            yield Pod(outer.children()[0]), outer
        finally:
            if outer.poll() is None:
                outer.kill()
            outer.wait()


@pytest.mark.skipif(not is_isolation_possible(), reason="needs Linux and namespaces")
def test_container_starts_serves_and_ends_as_the_manifest_says(
    tmp_path: Path, weights: Path, clip: list[npt.NDArray[np.uint8]]
) -> None:
    archive("--weights", weights, cwd=tmp_path)
    with pod(tmp_path) as (running, outer):
        assert running.probe("startupProbe") != 0  # Nothing listens yet.
        wait_until(lambda: running.probe("startupProbe") == 0, timeout_s=120)
        assert running.probe("readinessProbe") == running.probe("livenessProbe") == 0

        assert len(json.loads(running.get(8080, "/predictions/resnet-18", jpeg(clip[0])))) == 5  # without a token
        assert b"ts_inference_requests_total" in running.get(8082, "/metrics")
        for port in (8081, 7070, 7071):
            assert running.execute("curl", "--max-time", "5", f"http://{POD_ADDRESS}:{port}").returncode == 7  # refused

        # /ping would say Healthy all the time.
        for process in running.process.children(recursive=True):
            if "model_service_worker" in " ".join(process.cmdline()):
                process.kill()
        wait_until(lambda: running.probe("readinessProbe") != 0, timeout_s=5)
        wait_until(lambda: running.probe("readinessProbe") == 0, timeout_s=120)

        asked = time.monotonic()
        hook = running.execute(*CONTAINER["lifecycle"]["preStop"]["exec"]["command"])
        assert hook.returncode == 0, hook.stderr
        assert outer.wait(timeout=60) == 0
        # Kubernetes kills it after 30 seconds.
        assert time.monotonic() - asked < 30
