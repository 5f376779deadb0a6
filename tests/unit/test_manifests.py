"""deploy/kubernetes/: the manifests are valid, and agree with each other and with config.properties."""

import json
import re

import kubernetes_validate
import pytest

from demo.node import PROJECT
from tests.support.manifests import CONTAINER, DOCUMENTS, POD


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
    # The pod gets the file with --log-config instead.
    others["vmargs"] = re.sub(" -Dlog4j.configurationFile=.*log4j2.xml$", "", others["vmargs"])
    assert pods == others
    assert DOCUMENTS["ConfigMap"]["data"]["log4j2.xml"] == (PROJECT / "log4j2.xml").read_text()
    assert "--log-config=/mnt/config/log4j2.xml" in CONTAINER["command"]
