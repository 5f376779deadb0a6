"""Requests to a TorchServe node, as any client sends them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil
import requests

from demo.node import Node

BATCH_HEADER = "X-Forward-Batch-Size"  # of every response: the number of frames in the forward pass
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Post:
    """A request. body: bytes as they are sent, or a dict that is sent as JSON. path: the API, before the model."""

    body: bytes | dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    path: str = "predictions"


def post(node: Node, model: str, body: bytes | dict[str, Any], **headers: str) -> requests.Response:
    """Send a frame or a JSON batch to a node, with its token."""
    return send(node, model, Post(body, headers))


def send(node: Node, model: str, request: Post) -> requests.Response:
    """Send a request to a node, with its token."""
    return requests.post(
        f"{node.url}/{request.path}/{model}",
        data=request.body if isinstance(request.body, bytes) else None,
        json=request.body if isinstance(request.body, dict) else None,
        headers={"Authorization": f"Bearer {node.token()}"} | request.headers,
        timeout=TIMEOUT_S,
    )


def post_concurrently(node: Node, model: str, posts: Sequence[Post]) -> list[requests.Response]:
    """Send requests all at once; return the responses in the same order."""
    with ThreadPoolExecutor(len(posts)) as threads:
        return list(threads.map(lambda request: send(node, model, request), posts))


def requests_answered(node: Node, start: str) -> int:
    """Return how many requests a node has answered whose method and path begin so."""
    return (node.folder / "logs" / "access_log.log").read_text().count(f'"{start}')


def predictions_asked(node: Node) -> int:
    """Return how many requests for predictions a node has answered."""
    return requests_answered(node, "POST /predictions/")


def workers(node: Node, model: str) -> dict[int, psutil.Process]:
    """Return a model's workers by their process ids."""
    return {worker["pid"]: psutil.Process(worker["pid"]) for worker in node.describe(model)["workers"]}


def rotate_token(node: Node) -> None:
    """Have TorchServe write a new inference token into its key file; the old one is rejected from then on."""
    headers = {"Authorization": f"Bearer {node.token('API')}"}
    requests.get(f"{node.management_url}/token?type=inference", headers=headers, timeout=TIMEOUT_S).raise_for_status()
