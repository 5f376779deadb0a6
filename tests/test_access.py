"""Who gets in: with config.properties nobody without the right key, and nothing is fetched from anywhere."""

import re
import socket
import sys
import threading
from collections.abc import Iterator

import grpc
import pytest
import requests

from deploy.node import PROJECT, Node
from tests.conftest import wait_until
from tests.scripts import MODEL

# TorchServe's ways in, as its documentation and its own description have them.
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
# What TorchServe answers to everybody, and nothing turns off: what its API looks like, and its own counts.
DESCRIPTIONS = [("OPTIONS", "/"), ("GET", "/api-description")]
METRICS = [*DESCRIPTIONS, ("GET", "/metrics")]
NO_IMAGE = b"no image"
SERVICE = "org.pytorch.serve.grpc"
GRPC_INFERENCE = ["Ping", "Predictions", "StreamPredictions", "StreamPredictions2"]
GRPC_MANAGEMENT = ["ListModels", "DescribeModel", "RegisterModel", "UnregisterModel", "ScaleWorker", "SetDefault"]


@pytest.fixture(params=["node", "batch_node"])
def served(request: pytest.FixtureRequest) -> Node:
    """A node of each recipe."""
    node: Node = request.getfixturevalue(request.param)
    return node


def address(node: Node, name: str) -> str:
    """Return an address of the configuration that a node was started with."""
    config = (node.folder / "node.properties").read_text()
    return str(re.findall(rf"(?m)^{name}=(?:http://)?(.*)$", config)[-1])


def ask(url: str, method: str, path: str, key: str | None = None) -> requests.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return requests.request(method, url + path, headers=headers, data=b"", timeout=30)


def is_refused(response: requests.Response) -> bool:
    return response.status_code == 400 and response.json()["type"] == "InvalidKeyException"


def test_nothing_answers_without_its_key(served: Node) -> None:
    keys = {kind: served.token(kind) for kind in ("inference", "management", "API")}
    for url, ways, right in ((served.url, INFERENCE, "inference"), (served.management_url, MANAGEMENT, "management")):
        for method, path in ways:
            right_key = keys["API" if path.startswith("/token") else right]
            wrong = [key for key in keys.values() if key != right_key]
            for key in (None, "", "wrong", right_key[:-1], *wrong):
                response = ask(url, method, path, key)
                assert is_refused(response), (method, path, response.text)
                assert not any(key in response.text for key in keys.values())
            headers = {"Authorization": right_key}  # not as a bearer's
            assert is_refused(requests.request(method, url + path, headers=headers, timeout=30))
    assert {kind: served.token(kind) for kind in keys} == keys
    assert requests.get(f"{served.url}/ping", headers={"Authorization": f"Bearer {keys['inference']}"}, timeout=30).ok


def test_what_torchserve_leaves_open(served: Node) -> None:
    metrics = "http://" + address(served, "metrics_address")
    for url, ways in ((served.url, DESCRIPTIONS), (served.management_url, DESCRIPTIONS), (metrics, METRICS)):
        for method, path in ways:
            assert ask(url, method, path).status_code == 200
    for method, path in INFERENCE + MANAGEMENT:
        assert ask(metrics, method, path).status_code in (404, 405)


def field(number: int, content: bytes) -> bytes:
    """Return a field of a protocol buffer."""
    return bytes([number << 3 | 2, len(content)]) + content


def call(node: Node, kind: str, service: str, method: str, key: str | None, *others: bytes) -> bytes:
    """Call a gRPC method of a node, with the model's name, what is no picture, and other inputs.

    Raises grpc.RpcError.
    """
    message = field(1, MODEL.encode())
    for name in (b"data", *others):
        message += field(3, field(1, name) + field(2, NO_IMAGE))
    metadata = (("protocol", "gRPC"), ("authorization", f"Bearer {key}")) if key is not None else ()
    with grpc.insecure_channel("127.0.0.1:" + address(node, f"grpc_{kind}_port")) as channel:
        stream = channel.unary_stream(f"/{SERVICE}.{kind}.{service}/{method}")(message, timeout=30, metadata=metadata)
        return b"".join(stream)


def test_grpc_wants_the_same_keys(served: Node) -> None:
    inference, management = served.token("inference"), served.token("management")
    for kind, service, methods, wrong in (
        ("inference", "InferenceAPIsService", GRPC_INFERENCE, management),
        ("management", "ManagementAPIsService", GRPC_MANAGEMENT, inference),
    ):
        for method in methods:
            for key in (None, "wrong", wrong):
                with pytest.raises(grpc.RpcError) as error:
                    call(served, kind, service, method, key)
                assert error.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)
    assert b"Healthy" in call(served, "inference", "InferenceAPIsService", "Ping", inference)


def test_grpc_stream_does_not_cost_a_worker(served: Node) -> None:
    """An answer that does not say that it is the stream's last one ends TorchServe's thread for the worker."""
    workers = {worker["pid"] for worker in served.describe(MODEL)["workers"]}
    for method in ("Predictions", "StreamPredictions"):
        for others in ((), (b"host",), (b"Host", b"ts_stream_next")):
            answer = call(served, "inference", "InferenceAPIsService", method, served.token(), *others)
            assert b'{"error": "not an image' in answer
    assert {worker["pid"] for worker in served.describe(MODEL)["workers"]} == workers
    assert "Backend worker thread exception" not in served.log()


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[bytes]]]:
    """A server from which nothing should be fetched: its address, and what it was asked for."""
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


def test_nothing_is_registered_from_anywhere(served: Node, stranger: tuple[str, list[bytes]]) -> None:
    """Not even with the management key: no models, which TorchServe forbids, no workflows, which it would take."""
    url, asked = stranger
    key = served.token("management")
    local = (PROJECT / "README.md").as_uri()
    for source in (f"{url}/any.mar", local, "s3://bucket/any.mar", "../../any.mar"):
        assert ask(served.management_url, "POST", f"/models?url={source}", key).status_code == 405
        response = ask(served.management_url, "POST", f"/workflows?url={source.replace('.mar', '.war')}", key)
        assert response.status_code == 404
        assert re.search(
            "does not match any allowed URL|Relative path is not allowed|not found in workflow store",
            response.json()["message"],
        )
    assert asked == []
    assert ask(served.management_url, "DELETE", f"/models/{MODEL}", key).status_code == 405


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_keys_are_private_and_nowhere_else(served: Node) -> None:
    key_file = served.folder / "key_file.json"
    keys = [served.token(kind).encode() for kind in ("inference", "management", "API")]
    assert key_file.stat().st_mode & 0o077 == 0
    assert ask(served.management_url, "GET", "/token?type=inference", keys[2].decode()).ok
    assert ask(served.url, "GET", "/ping", keys[0].decode()).status_code == 400  # replaced
    keys.append(served.token("inference").encode())
    assert keys[3] not in keys[:3]
    assert key_file.stat().st_mode & 0o077 == 0
    wait_until(lambda: "GET /token" in served.log())
    others = [path for path in served.folder.rglob("*") if path.is_file() and path != key_file]
    assert {path.suffix for path in others} >= {".mar", ".log", ".properties"}
    assert [path for path in others if any(key in path.read_bytes() for key in keys)] == []
