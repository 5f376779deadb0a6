"""Access with config.properties: no request works without the right key, and TorchServe fetches no file."""

import re
import socket
import sys
import threading
from collections.abc import Iterator

import grpc
import pytest
import requests

from demo.node import PROJECT, Node
from tests.support.endpoints import DESCRIPTIONS, INFERENCE, MANAGEMENT, METRICS, address
from tests.support.nodes import requests_answered
from tests.support.scripts import MODEL, wait_until

NO_IMAGE = b"no image"
SERVICE = "org.pytorch.serve.grpc"
GRPC_INFERENCE = ["Ping", "Predictions", "StreamPredictions", "StreamPredictions2"]
GRPC_MANAGEMENT = ["ListModels", "DescribeModel", "RegisterModel", "UnregisterModel", "ScaleWorker", "SetDefault"]


def send(url: str, method: str, path: str, key: str | None = None) -> requests.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return requests.request(method, url + path, headers=headers, data=b"", timeout=30)


def is_refused(response: requests.Response) -> bool:
    return response.status_code == 400 and response.json()["type"] == "InvalidKeyException"


def test_nothing_answers_without_its_key(node: Node) -> None:
    keys = {kind: node.token(kind) for kind in ("inference", "management", "API")}
    for url, ways, right in ((node.url, INFERENCE, "inference"), (node.management_url, MANAGEMENT, "management")):
        for method, path in ways:
            right_key = keys["API" if path.startswith("/token") else right]
            wrong = [key for key in keys.values() if key != right_key]
            for key in (None, "", "wrong", right_key[:-1], *wrong):
                response = send(url, method, path, key)
                assert is_refused(response), (method, path, response.text)
                assert not any(key in response.text for key in keys.values())
            headers = {"Authorization": right_key}  # not as a bearer's
            assert is_refused(requests.request(method, url + path, headers=headers, timeout=30))
    assert {kind: node.token(kind) for kind in keys} == keys
    assert requests.get(f"{node.url}/ping", headers={"Authorization": f"Bearer {keys['inference']}"}, timeout=30).ok


def test_what_torchserve_leaves_open(node: Node) -> None:
    metrics = "http://" + address(node, "metrics_address")
    for url, ways in ((node.url, DESCRIPTIONS), (node.management_url, DESCRIPTIONS), (metrics, METRICS)):
        for method, path in ways:
            assert send(url, method, path).status_code == 200
    for method, path in INFERENCE + MANAGEMENT:
        assert send(metrics, method, path).status_code in (404, 405)


def field(number: int, content: bytes) -> bytes:
    """Return a field of a protocol buffer."""
    return bytes([number << 3 | 2, len(content)]) + content


def call(node: Node, kind: str, service: str, method: str, key: str | None, *others: bytes) -> bytes:
    """Call a gRPC method of a node, with the model's name, bytes that are no image, and other inputs.

    Raises grpc.RpcError.
    """
    message = field(1, MODEL.encode())
    for name in (b"data", *others):
        message += field(3, field(1, name) + field(2, NO_IMAGE))
    metadata = (("protocol", "gRPC"), ("authorization", f"Bearer {key}")) if key is not None else ()
    with grpc.insecure_channel("127.0.0.1:" + address(node, f"grpc_{kind}_port")) as channel:
        stream = channel.unary_stream(f"/{SERVICE}.{kind}.{service}/{method}")(message, timeout=30, metadata=metadata)
        return b"".join(stream)


def test_grpc_requires_the_same_keys(node: Node) -> None:
    inference, management = node.token("inference"), node.token("management")
    for kind, service, methods, wrong in (
        ("inference", "InferenceAPIsService", GRPC_INFERENCE, management),
        ("management", "ManagementAPIsService", GRPC_MANAGEMENT, inference),
    ):
        for method in methods:
            for key in (None, "wrong", wrong):
                with pytest.raises(grpc.RpcError) as error:
                    call(node, kind, service, method, key)
                assert error.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)
    assert b"Healthy" in call(node, "inference", "InferenceAPIsService", "Ping", inference)


def test_grpc_stream_does_not_cost_a_worker(node: Node) -> None:
    """A response that does not say that it is the stream's last one ends TorchServe's thread for the worker."""
    workers = {worker["pid"] for worker in node.describe(MODEL)["workers"]}
    for method in ("Predictions", "StreamPredictions"):
        for others in ((), (b"host",), (b"Host", b"ts_stream_next")):
            response = call(node, "inference", "InferenceAPIsService", method, node.token(), *others)
            assert b'{"error": "not an image' in response
    assert {worker["pid"] for worker in node.describe(MODEL)["workers"]} == workers
    assert "Backend worker thread exception" not in node.log()


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[bytes]]]:
    """A server that should get no requests: its address, and the requests that it got."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        is_over = threading.Event()

        def listen() -> None:
            while not is_over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    asked.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        is_over.set()
        thread.join()


def test_nothing_is_registered_from_anywhere(node: Node, stranger: tuple[str, list[bytes]]) -> None:
    """Not even with the management key: no models, which TorchServe forbids, and no workflows, which it allows."""
    url, asked = stranger
    key = node.token("management")
    local = (PROJECT / "README.md").as_uri()
    for source in (f"{url}/any.mar", local, "s3://bucket/any.mar", "../../any.mar"):
        assert send(node.management_url, "POST", f"/models?url={source}", key).status_code == 405
        response = send(node.management_url, "POST", f"/workflows?url={source.replace('.mar', '.war')}", key)
        assert response.status_code == 404
        assert re.search(
            "does not match any allowed URL|Relative path is not allowed|not found in workflow store",
            response.json()["message"],
        )
    assert asked == []
    assert send(node.management_url, "DELETE", f"/models/{MODEL}", key).status_code == 405


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_keys_are_private_and_nowhere_else(node: Node) -> None:
    key_file = node.folder / "key_file.json"
    keys = [node.token(kind).encode() for kind in ("inference", "management", "API")]
    assert key_file.stat().st_mode & 0o077 == 0
    renewals = requests_answered(node, "GET /token")
    assert send(node.management_url, "GET", "/token?type=inference", keys[2].decode()).ok
    assert send(node.url, "GET", "/ping", keys[0].decode()).status_code == 400  # replaced
    keys.append(node.token("inference").encode())
    assert keys[3] not in keys[:3]
    assert key_file.stat().st_mode & 0o077 == 0
    wait_until(lambda: requests_answered(node, "GET /token") > renewals)
    others = [path for path in node.folder.rglob("*") if path.is_file() and path != key_file]
    assert {path.suffix for path in others} >= {".mar", ".log", ".properties"}
    assert [path for path in others if any(key in path.read_bytes() for key in keys)] == []
