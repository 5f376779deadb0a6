"""The manifests of deploy/kubernetes/."""

import yaml

from demo.node import PROJECT

FOLDER = PROJECT / "deploy" / "kubernetes"
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all((FOLDER / "torchserve.yaml").read_text())}
POD = DOCUMENTS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
