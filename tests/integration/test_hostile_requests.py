"""A real TorchServe gets broken and hostile requests: each affects only its sender, and gets a reason in one line."""

import base64
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest
import requests

from demo.node import Node
from tests.support.frames import Pixels, as_json, encoded, jpeg
from tests.support.fuzz_handler import assert_harmless, seeds
from tests.support.hostile import BAD_JSON, CAT, NO_BATCH, NO_TYPE, bad_frames, excesses
from tests.support.nodes import BATCH_HEADER, Post, post, post_concurrently, send, workers

MODEL = "resnet-18"
JSON = {"Content-Type": "application/json"}
IMAGE = {"Content-Type": "image/jpeg"}


def assert_is_refused(response: requests.Response, status: int, reason: str) -> None:
    """A response says in one line of JSON why there are no predictions, and nothing of the server."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.text.isascii()
    assert len(response.text.splitlines()) == 1
    assert response.json().keys() == {"error"}
    assert reason in response.json()["error"]
    assert_harmless(response.json()["error"])


def odd_requests() -> Iterator[Any]:
    """Yield requests whose headers, path or form are odd: the status and reason that they must get."""
    good, only = encoded(CAT, "JPEG"), "not explained: there are predictions only"
    yield pytest.param(Post(good, {"describe": "True"}), 400, only, id="describe")
    yield pytest.param(Post(good, {"explain": "True"}), 200, "", id="explain")
    yield pytest.param(Post(good, IMAGE, "explanations"), 400, only, id="explanations")
    yield pytest.param(Post(good, JSON), 200, "", id="image that calls itself JSON")
    yield pytest.param(Post(good, {"Content-Type": "text/plain; charset=x"}), 200, "", id="calls itself text")
    yield pytest.param(Post(b"words", {"Content-Type": "text/plain"}), 400, NO_BATCH, id="text")
    yield pytest.param(Post(b"\xff\xfe{}", JSON | {"X": "\xe4 " * 900}), 400, "not JSON: ", id="odd headers")
    yield pytest.param(Post(good, {"Content-Type": ";;;=", "X-Empty": ""}), 200, "", id="odd content type")
    yield pytest.param(Post(good, {"ts_stream_next": "true", "data": "x"}), 200, "", id="TorchServe's headers")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    yield pytest.param(Post(b"a=1&body=2", form), 400, "not an image", id="form")
    yield pytest.param(Post(b"a=1&b=2", form), 400, NO_BATCH, id="form without a frame")
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="%b"; filename="f"\r\nContent-Type: image/jpeg\r\n\r\n%b\r\n'
    yield pytest.param(Post(part % (b"data", b"none") + b"--x--\r\n", boundary), 400, "not an image", id="part")
    end, note = b"--x--\r\n", b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\nfront door\r\n'
    yield pytest.param(Post(part % (b"file", good) + end, boundary), 200, "", id="part of another name")
    yield pytest.param(Post(note + part % (b"image", good) + end, boundary), 200, "", id="the only file of a form")
    two = part % (b"one", good) + part % (b"two", good) + end
    yield pytest.param(Post(two, boundary), 400, NO_BATCH, id="two files")
    yield pytest.param(Post(b'{"0": "QUJD"}', form), 400, NO_BATCH, id="JSON as a form without a value")
    lines = {"0": base64.encodebytes(good).decode()}
    texts = {"escaped": json.dumps(lines), "raw": json.dumps(lines).replace("\\n", "\n")}
    for kind, text in (texts | {"byte order mark": "\ufeff" + texts["raw"]}).items():
        content_type = {"Content-Type": "application/JSON; charset=utf-8"}
        yield pytest.param(Post(text.encode(), content_type), 200, "", id=f"lines of base64, {kind}")
    batch = json.dumps(as_json(good + bytes(3 - len(good) % 3 + 1))).encode()  # with padding
    for kind in ("", "text/plain", "application/octet-stream", form["Content-Type"]):
        yield pytest.param(Post(batch, {"Content-Type": kind}), 400, NO_TYPE, id=f"JSON as {kind or 'nothing'}")


@pytest.mark.parametrize(("request_", "status", "reason"), list(odd_requests()))
def test_odd_request_costs_only_itself(
    gathering_node: Node, clip: list[Pixels], request_: Post, status: int, reason: str
) -> None:
    """It is in one batch with three good requests, which get their predictions."""
    before = workers(gathering_node, MODEL).keys()
    images = [jpeg(clip[0]), jpeg(clip[100])]
    posts = [request_, Post(images[0]), Post(as_json(*images)), Post(images[1])]
    response, first, batch, second = post_concurrently(gathering_node, MODEL, posts)
    assert [first.status_code, batch.status_code, second.status_code] == [200] * 3
    assert batch.json() == [pytest.approx(first.json()), pytest.approx(second.json())]
    assert first.json() != pytest.approx(second.json(), abs=1e-3)
    assert int(first.headers[BATCH_HEADER]) in (4, 5), "they were not in one batch"
    if status == 200:
        assert response.status_code == 200
        answer = response.json()
        assert len(answer[0] if isinstance(answer, list) else answer) == 3
    else:
        assert_is_refused(response, status, reason)
    assert workers(gathering_node, MODEL).keys() == before


def assert_every_hostile_body_is_refused(node: Node, model: str) -> None:
    before = workers(node, model).keys()
    expected = [(Post(file, IMAGE), 400, reason) for file, reason in bad_frames().values()]
    expected += [(Post(file), 400, reason) for file, reason in bad_frames().values()]  # of no type
    expected += [(Post(text.encode(), JSON), 400, reason) for text, reason in BAD_JSON.values()]
    expected += [(Post(text.encode(), JSON), 413, reason) for text, reason in excesses().values()]
    with ThreadPoolExecutor(4) as threads:
        responses = list(threads.map(lambda each: send(node, model, each[0]), expected))
    for response, (_, status, reason) in zip(responses, expected, strict=True):
        assert_is_refused(response, status, reason)
    assert workers(node, model).keys() == before


def test_every_hostile_body_is_refused_with_its_reason(node: Node) -> None:
    """One by one through TorchServe; tests/unit/test_hostile_input.py has what they do to the others of a batch."""
    assert_every_hostile_body_is_refused(node, MODEL)


@pytest.mark.parametrize("model", ["keypointrcnn-resnet50-fpn", "r3d-18"])
def test_other_tasks_refuse_every_hostile_body_too(tasks_node: Node, model: str) -> None:
    assert_every_hostile_body_is_refused(tasks_node, model)


def test_requests_that_are_too_large_or_end_early(node: Node, clip: list[Pixels]) -> None:
    """TorchServe itself rejects the former, and drops the latter; neither reaches a worker."""
    before = workers(node, MODEL).keys()
    too_large = b"x" * 6_600_000
    with suppress(requests.ConnectionError):  # It may be refused before all of it was sent.
        assert send(node, MODEL, Post(too_large, IMAGE)).status_code == 413
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {node.token()}\r\n"
    host, port = node.url.removeprefix("http://").split(":")
    with ExitStack() as sockets:
        for number in range(100):
            connection = sockets.enter_context(socket.create_connection((host, int(port)), timeout=60))
            connection.sendall((head + "Content-Length: 1000\r\n\r\nhalf"[: 8 * (number % 4) + 2]).encode())
        assert post(node, MODEL, jpeg(clip[0])).status_code == 200
    assert post(node, MODEL, jpeg(clip[0])).status_code == 200
    assert workers(node, MODEL).keys() == before


RAW = {
    "HTTP/1.0": ("POST /predictions/{model} HTTP/1.0\r\n", False),
    "no host": ("POST /predictions/{model} HTTP/1.1\r\n", False),
    "PUT": ("PUT /predictions/{model} HTTP/1.0\r\n", False),
    "chunks": ("POST /predictions/{model} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", True),
    "another path": ("POST /models/{model}/invoke HTTP/1.0\r\n", False),
    "KServe's path": ("POST /v2/models/{model}/infer HTTP/1.0\r\n", False),
}


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("is_good", [True, False], ids=["image", "nothing"])
def test_request_without_a_host_gets_an_answer(node: Node, clip: list[Pixels], kind: str, is_good: bool) -> None:
    """Without a Host header it might be taken for gRPC, whose responses TorchServe sends in another way."""
    start, is_chunked = RAW[kind]
    body = jpeg(clip[0]) if is_good else b""
    head = start.format(model=MODEL) + f"Authorization: Bearer {node.token()}\r\nContent-Type: image/jpeg\r\n"
    head += "" if is_chunked or not body else f"Content-Length: {len(body)}\r\n"
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    sent = head.encode() + b"\r\n" + (chunk + b"0\r\n\r\n" if is_chunked else body)
    host, port = node.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        answer = json.loads(response.read())
    assert response.status == (200 if is_good else 400)
    assert len(answer) == (5 if is_good else 1)


def test_random_bodies_through_the_server(node: Node, clip: list[Pixels]) -> None:
    """Three clients send random bodies as anything; a fourth sends frames and gets all its predictions."""
    before = workers(node, MODEL)
    images = [jpeg(frame) for frame in clip[::50]]
    expected = [post(node, MODEL, image).json() for image in images]
    chance = np.random.default_rng(5)
    files = seeds()
    bodies = []
    for number in range(90):
        file = bytearray(files[number % len(files)])
        for place in chance.integers(0, len(file), 6):
            file[place] = chance.integers(256)
        kinds = [bytes(file[: chance.integers(1, len(file))]), json.dumps(as_json(bytes(file))).encode(), bytes(file)]
        types = ["image/jpeg", "application/json", "text/plain", "multipart/form-data; boundary=a", "*"]
        bodies.append(Post(kinds[number % 3], {"Content-Type": types[number % 5]}))
    is_over = threading.Event()
    wrong: list[Any] = []

    def good_client() -> int:
        count = 0
        while not is_over.is_set():
            response = send(node, MODEL, Post(images[count % len(images)], IMAGE))
            if response.status_code != 200 or response.json() != pytest.approx(expected[count % len(images)], abs=1e-4):
                wrong.append((response.status_code, response.text))
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        good = threads.submit(good_client)
        try:
            responses = list(threads.map(lambda body: send(node, MODEL, body), bodies))
        finally:
            is_over.set()
        assert good.result(timeout=120) > 0
    assert wrong == []
    assert {response.status_code for response in responses} == {200, 400}
    assert workers(node, MODEL).keys() == before.keys()
