"""handler.py against broken and hostile requests: each costs only its sender, and hears what is wrong with it."""

import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import requests
import skimage.data
from PIL import Image

from deploy.node import Node
from handler import MAX_REQUEST_FRAMES, MOST_PARTS
from tests.conftest import as_json, encoded, jpeg, post
from tests.fuzz_handler import assert_harmless, seeds

HEADER = "X-Forward-Batch-Size"
CAT = Image.fromarray(skimage.data.chelsea())


def many_scans(size: int, scans: int) -> bytes:
    """Return a progressive JPEG that goes over its picture so many times more; 60 bytes each."""
    image = encoded(Image.new("L", (size, size)), "JPEG", progressive=True)
    last = image[image.rindex(b"\xff\xda") : -2]
    return image[:-2] + scans * last + image[-2:]


def many_chunks(kind: bytes, count: int) -> bytes:
    """Return a PNG with so many chunks of a kind, each of which unpacks to a megabyte; about a kilobyte each."""
    content = {b"iTXt": b"\0\1\0\0\0", b"zTXt": b"\0\0", b"iCCP": b"\0\0"}[kind]
    image = encoded(CAT, "PNG")
    chunks = b""
    for number in range(count):
        data = kind + b"%d" % number + content + zlib.compress("\U0001f600".encode() + bytes(2**20 - 16), 9)
        chunks += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return image[:33] + chunks + image[33:]


def run_length_bmp(size: int) -> bytes:
    """Return a compressed BMP of so many pixels a side, four bytes a row, which Pillow decodes byte by byte."""
    rows = b"\1\0\0\0" * size + b"\0\1"
    palette = bytes(1024)
    header = struct.pack("<IiiHHIIiiII", 40, size, size, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


# Bodies, and what is said of them. The half of a JPEG that its sender did not finish, a picture of 900 megapixels in
# 110 KB, one of 36 megapixels that takes Pillow minutes, and so on.
BAD_FRAMES = {
    "empty": (b"", "not an image: none of JPEG, PNG, WEBP, BMP, GIF in these 0 bytes"),
    "text": (b"this is no image", "not an image"),
    "zeros": (bytes(100_000), "not an image"),
    "truncated": (encoded(CAT, "JPEG")[:9000], "broken image: image file is truncated"),
    "header only": (encoded(CAT, "PNG")[:40], "not an image"),
    "sliver": (encoded(Image.new("L", (1, 65_000)), "PNG"), "too narrow: 1 x 65000 pixels, expected at most 32 to 1"),
    "giant": (
        encoded(Image.new("1", (10_000, 10_000)), "PNG"),
        "too many pixels: 10000 x 10000, expected",
    ),
    "bomb": (encoded(Image.new("1", (30_000, 30_000)), "PNG"), "900000000 pixels"),
    "scans": (many_scans(5_700, 20_000), "too many scans: "),
    "EXIF blocks": (
        encoded(CAT, "JPEG")[:2] + b"\xff\xe1\0\x08Exif\0\0" * 50_000 + encoded(CAT, "JPEG")[2:],
        "too many EXIF blocks: 50000, expected at most 32",
    ),
    "texts": (many_chunks(b"iTXt", 60), "too many texts: 60, expected at most 4"),
    "compressed texts": (many_chunks(b"zTXt", 60), "too many compressed texts: 60, expected at most 4"),
    "profiles": (many_chunks(b"iCCP", 300), "too many colour profiles: 300, expected at most 4"),
    "slow bitmap": (run_length_bmp(5740), "compressed BMP: expected a plain one"),
    "program": (encoded(CAT.resize((40, 30)), "EPS"), "not an image"),
    "unusual": (encoded(CAT, "TIFF"), "not an image"),
}
NO_BATCH = "expected an image, or a JSON object of base64-encoded images"
BAD_JSON = {
    "list": ("[1, 2]", NO_BATCH),
    "number": ("17", NO_BATCH),
    "null": ("null", NO_BATCH),
    "string": ('"text"', NO_BATCH),
    "no frames": ("{}", NO_BATCH),
    "long list": (json.dumps([1] * 1_000_000), NO_BATCH),
    "broken": ('{"0": ', "not an image"),
    "nothing": ("", "not an image"),
    "deep": ("[" * 1_000_000, "not an image"),
    "deep object": ('{"0":' * 100_000 + "1" + "}" * 100_000, "not an image"),
    "long number": ('{"0": ' + "1" * 1_000_000 + "}", "not an image"),
    "numbers": ('{"0": 5, "1": NaN}', "none of 2 frames can be read; the first: not a base64 string"),
    "nested": ('{"0": {"1": "QQ=="}}', "not a base64 string"),
    "no base64": ('{"0": "%%%"}', "not a base64 string"),
    "no ASCII": ('{"0": "\\u00df\\ud800"}', "not a base64 string"),
    "huge string": (json.dumps({"0": "A" * 6_000_000}), "not an image"),
    "no image": ('{"0": "QQ=="}', "not an image: none of JPEG, PNG, WEBP, BMP, GIF in these 1 bytes"),
}
EXCESSES = {
    "thousands of frames": (
        json.dumps(as_json(*[encoded(CAT.resize((8, 8)), "JPEG")] * 5000)),
        "too many frames: 5000",
    ),
    "thousands of nothings": (
        json.dumps({str(i): 0 for i in range(500_000)}),
        "too many frames: 500000, expected",
    ),
    "giants": (
        json.dumps(as_json(*[encoded(Image.new("1", (5_700, 5_700)), "PNG")] * 5)),
        "too many pixels in a request: over 132,710,400",
    ),
}
JSON = {"Content-Type": "application/json"}
IMAGE = {"Content-Type": "image/jpeg"}


def hostile() -> Iterator[Any]:
    """Yield requests: path, body, headers, and the status and reason that they must get."""
    for name, (frame, reason) in BAD_FRAMES.items():
        yield pytest.param("predictions", frame, IMAGE, 400, reason, id=name)
        yield pytest.param("predictions", frame, {}, 400, reason, id=f"{name}, of no type")
    for name, (text, reason) in BAD_JSON.items():
        yield pytest.param("predictions", text.encode(), JSON, 400, reason, id=f"JSON: {name}")
    for name, (text, reason) in EXCESSES.items():
        yield pytest.param("predictions", text.encode(), JSON, 413, reason, id=f"JSON: {name}")
    good, only = encoded(CAT, "JPEG"), "not explained: there are predictions only"
    yield pytest.param("predictions", good, {"describe": "True"}, 400, only, id="describe")
    yield pytest.param("predictions", good, {"explain": "True"}, 200, "", id="explain")
    yield pytest.param("explanations", good, IMAGE, 400, only, id="explanations")
    yield pytest.param("predictions", good, JSON, 200, "", id="image that calls itself JSON")
    yield pytest.param("predictions", good, {"Content-Type": "text/plain; charset=x"}, 200, "", id="calls itself text")
    yield pytest.param("predictions", b"words", {"Content-Type": "text/plain"}, 400, NO_BATCH, id="text")
    yield pytest.param("predictions", b"\xff\xfe{}", JSON | {"X": "\xe4 " * 900}, 400, "not an image", id="odd headers")
    yield pytest.param("predictions", good, {"Content-Type": ";;;=", "X-Empty": ""}, 200, "", id="odd content type")
    yield pytest.param("predictions", good, {"ts_stream_next": "true", "data": "x"}, 200, "", id="TorchServe's headers")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    yield pytest.param("predictions", b"a=1&body=2", form, 400, "not an image", id="form")
    yield pytest.param("predictions", b"a=1&b=2", form, 400, NO_BATCH, id="form without a frame")
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    parts = b'--x\r\nContent-Disposition: form-data; name="%b"; filename="f"\r\nContent-Type: image/jpeg\r\n\r\n%b\r\n'
    yield pytest.param(
        "predictions", parts % (b"data", b"none") + b"--x--\r\n", boundary, 400, "not an image", id="part"
    )
    other = parts % (b"other", good) + b"--x--\r\n"
    yield pytest.param("predictions", other, boundary, 400, NO_BATCH, id="part of another name")


def send(node: Node, path: str, body: bytes, headers: dict[str, str]) -> requests.Response:
    """Ask a node for something, with its token."""
    headers = {"Authorization": f"Bearer {node.token()}"} | headers
    return requests.post(f"{node.url}/{path}/resnet-18", data=body, headers=headers, timeout=60)


def workers(node: Node) -> dict[int, psutil.Process]:
    return {worker["pid"]: psutil.Process(worker["pid"]) for worker in node.describe("resnet-18")["workers"]}


@pytest.mark.parametrize(("path", "body", "headers", "status", "reason"), list(hostile()))
def test_hostile_request_costs_only_itself(
    gathering_node: Node,
    clip: list[npt.NDArray[np.uint8]],
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    reason: str,
) -> None:
    """It is in one batch with three good requests, which get their answers."""
    before = workers(gathering_node).keys()
    images = [jpeg(clip[0]), jpeg(clip[100])]
    both = json.dumps(as_json(*images)).encode()
    requests_ = [(path, body, headers), ("predictions", images[0], {}), ("predictions", both, JSON)]
    requests_.append(("predictions", images[1], {}))
    with ThreadPoolExecutor(4) as threads:
        response, first, batch, second = threads.map(lambda request: send(gathering_node, *request), requests_)
    assert [first.status_code, batch.status_code, second.status_code] == [200] * 3
    assert batch.json() == [pytest.approx(first.json()), pytest.approx(second.json())]
    assert first.json() != pytest.approx(second.json(), abs=1e-3)
    assert int(first.headers[HEADER]) in (4, 5), "they were not in one batch"

    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    if status == 200:
        assert len(response.json()) == 3
    else:
        assert response.text.isascii()
        assert len(response.text.splitlines()) == 1
        assert response.json().keys() == {"error"}
        assert reason in response.json()["error"]
        assert_harmless(response.json()["error"])
    assert workers(gathering_node).keys() == before


def test_bad_frames_of_a_json_batch_cost_only_themselves(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    good = [jpeg(clip[0]), jpeg(clip[100])]
    batch = as_json(good[0], *(frame for frame, _ in BAD_FRAMES.values()), good[1])
    batch |= {"not base64": "%%%", "number": 5, "null": None, "list": ["QQ=="], "non-ascii": "ß"}
    response = post(node, "resnet-18", batch)
    assert response.status_code == 200
    answers = response.json()
    assert len(answers) == len(batch)
    alone = post(node, "resnet-18", as_json(*good)).json()
    position_of_last_good = 1 + len(BAD_FRAMES)
    assert [answers[0], answers[position_of_last_good]] == [pytest.approx(answer, abs=1e-5) for answer in alone]
    for answer, (_, reason) in zip(answers[1:], BAD_FRAMES.values(), strict=False):
        assert reason in answer["error"]
    assert all(answer["error"].startswith("not a base64 string") for answer in answers[-5:])
    assert response.headers[HEADER] == "2"


def test_as_many_frames_as_a_request_may_hold(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    images = [encoded(Image.fromarray(frame).resize((64, 48)), "JPEG") for frame in clip[:MAX_REQUEST_FRAMES]]
    answers = post(node, "resnet-18", as_json(*images))
    assert answers.status_code == 200
    assert len(answers.json()) == MAX_REQUEST_FRAMES
    for number in (0, 100, MAX_REQUEST_FRAMES - 1):
        assert answers.json()[number] == pytest.approx(post(node, "resnet-18", images[number]).json(), abs=1e-4)
    assert post(node, "resnet-18", as_json(*images, images[0])).status_code == 413


def test_jpeg_of_as_many_scans_as_it_may_have_is_a_frame(node: Node) -> None:
    _, most = MOST_PARTS[b"\xff\xd8"]["scans"]
    image = many_scans(500, 0)
    scans = image.count(b"\xff\xda")
    assert 3 < scans < most / 2
    assert post(node, "resnet-18", many_scans(500, most - scans)).status_code == 200
    assert post(node, "resnet-18", many_scans(500, most - scans + 1)).status_code == 400


def test_requests_that_are_too_large_or_end_early(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    """TorchServe itself refuses the ones, and forgets the others; neither reaches a worker."""
    before = workers(node).keys()
    too_large = b"x" * 6_600_000
    with suppress(requests.ConnectionError):  # It may be refused before all of it was sent.
        assert send(node, "predictions", too_large, IMAGE).status_code == 413
    head = f"POST /predictions/resnet-18 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {node.token()}\r\n"
    host, port = node.url.removeprefix("http://").split(":")
    with ExitStack() as sockets:
        for number in range(100):
            connection = sockets.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall((head + "Content-Length: 1000\r\n\r\nhalf"[: 8 * (number % 4) + 2]).encode())
        assert post(node, "resnet-18", jpeg(clip[0])).status_code == 200
    assert post(node, "resnet-18", jpeg(clip[0])).status_code == 200
    assert workers(node).keys() == before


def test_memory_stays_flat(node: Node) -> None:
    """The largest that is taken or refused, over and over: the worker gives back what it took."""
    large = [encoded(Image.new("RGB", (7680, 4320), "red"), kind) for kind in ("PNG", "WEBP")]
    texts = as_json(*[many_chunks(b"iTXt", 4)] * 60)
    bodies = [(image, IMAGE) for image in [*large, many_chunks(b"iTXt", 4)]] + [(json.dumps(texts).encode(), JSON)]
    bodies += [(text.encode(), JSON) for text, _ in [*BAD_JSON.values(), *EXCESSES.values()]]
    members = workers(node)

    def memory() -> list[float]:
        with ThreadPoolExecutor(4) as threads:
            statuses = threads.map(lambda body: send(node, "predictions", *body).status_code, bodies * 2)
        assert set(statuses) == {200, 400, 413}
        return [member.memory_info().rss / 1e6 for member in members.values()]

    before = memory()
    after = [memory() for _ in range(3)][-1]
    assert workers(node).keys() == members.keys()
    assert max(now - then for then, now in zip(before, after, strict=True)) < 150


def test_random_bodies_through_the_server(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    """Three clients send random bodies as anything; a fourth sends frames and gets all its answers."""
    before = workers(node)
    images = [jpeg(frame) for frame in clip[::50]]
    expected = [post(node, "resnet-18", image).json() for image in images]
    chance = np.random.default_rng(5)
    files = seeds()
    bodies = []
    for number in range(300):
        file = bytearray(files[number % len(files)])
        for place in chance.integers(0, len(file), 6):
            file[place] = chance.integers(256)
        kinds = [bytes(file[: chance.integers(1, len(file))]), json.dumps(as_json(bytes(file))).encode(), bytes(file)]
        types = ["image/jpeg", "application/json", "text/plain", "multipart/form-data; boundary=a", "*"]
        bodies.append((kinds[number % 3], {"Content-Type": types[number % 5]}))
    is_over = threading.Event()
    wrong: list[Any] = []

    def good_client() -> int:
        count = 0
        while not is_over.is_set():
            answer = send(node, "predictions", images[count % len(images)], IMAGE)
            if answer.status_code != 200 or answer.json() != pytest.approx(expected[count % len(images)], abs=1e-4):
                wrong.append((answer.status_code, answer.text))
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        good = threads.submit(good_client)
        try:
            responses = list(threads.map(lambda body: send(node, "predictions", *body), bodies))
        finally:
            is_over.set()
        assert good.result(timeout=60) > 20
    assert wrong == []
    assert {response.status_code for response in responses} == {200, 400}
    assert workers(node).keys() == before.keys()
