"""TorchServe's endpoints: method and path, as its documentation and its own description have them."""

import re

from demo.node import Node
from tests.support.scripts import MODEL

INFERENCE = [
    ("GET", "/ping"),
    ("POST", f"/predictions/{MODEL}"),
    ("POST", f"/predictions/{MODEL}/1.0"),
    ("OPTIONS", f"/predictions/{MODEL}"),
    ("POST", f"/explanations/{MODEL}"),
    ("POST", "/invocations"),
    ("POST", f"/models/{MODEL}/invoke"),
    ("POST", "/wfpredict/any"),
    ("POST", f"/v1/models/{MODEL}:predict"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", f"/v2/models/{MODEL}/infer"),
    ("GET", "/v2/health/live"),
]
MANAGEMENT = [
    ("GET", "/models"),
    ("POST", "/models?url=any.mar"),
    ("GET", f"/models/{MODEL}"),
    ("GET", f"/models/{MODEL}?customized=true"),
    ("PUT", f"/models/{MODEL}?min_worker=0"),
    ("PUT", f"/models/{MODEL}/1.0/set-default"),
    ("DELETE", f"/models/{MODEL}"),
    ("GET", "/workflows"),
    ("POST", "/workflows?url=any.war"),
    ("DELETE", "/workflows/any"),
    ("GET", "/token?type=inference"),
    ("GET", "/token?type=management"),
]
# TorchServe responds to these without a key whatever its configuration: its API's description, and its metrics.
DESCRIPTIONS = [("OPTIONS", "/"), ("GET", "/api-description")]
METRICS = [*DESCRIPTIONS, ("GET", "/metrics")]


def address(node: Node, name: str) -> str:
    """Return an address of the configuration that a node was started with."""
    config = (node.folder / "node.properties").read_text()
    return str(re.findall(rf"(?m)^{name}=(?:http://)?(.*)$", config)[-1])
