"""edge/web.py, its WSGI application called directly: addresses, methods, paths and headers."""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from edge.cameras import Camera
from edge.frames import Frame, Stream
from edge.metrics import StatsCollector
from edge.session import ServerHealth
from edge.stats import CameraStats
from edge.timing import Timing
from edge.view import LiveView
from edge.web import CONNECTION, MAX_VIEWERS, PAGE, Application
from tests.support.frames import jpeg
from tests.support.results import MODEL


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """Calls the application, as wsgiref's server does."""

    def __init__(self, view: LiveView, *hosts: str) -> None:
        registry = CollectorRegistry()
        registry.register(StatsCollector(view._stats))
        self.application = Application(view, registry, set(hosts or ("127.0.0.1",)))

    def request(
        self,
        path: str,
        method: str = "GET",
        host: str = "127.0.0.1:9108",
        sent: Callable[[bytes], Any] | None = None,
        **more: str,
    ) -> Response:
        """Return the response; `sent` is called with each part of it, and may raise OSError."""
        response = Response(0, {}, b"")

        def write(data: bytes) -> None:
            response.body += data
            if sent:
                sent(data)

        def start_response(status: str, headers: list[tuple[str, str]]) -> Callable[[bytes], None]:
            response.status, response.headers = int(status.split()[0]), dict(headers)
            assert len(response.headers) == len(headers)
            return write

        environ = {
            "PATH_INFO": path,
            "REQUEST_METHOD": method,
            "HTTP_HOST": host,
            "QUERY_STRING": "",
            CONNECTION: object(),
            **more,
        }
        assert self.application(environ, start_response) == []
        return response


@pytest.fixture
def view() -> Iterator[LiveView]:
    """Two cameras, of which the first one has a frame."""
    camera = Camera("rtsp://admin:hunter2@cam/live")
    camera.last_frame = Frame(camera, 1, 0.0, jpeg(np.zeros((48, 64, 3), np.uint8)))
    client: Any = SimpleNamespace(model=MODEL, health=ServerHealth("http://a:8080", Timing()))
    page = LiveView({Stream(each, MODEL): CameraStats() for each in (camera, Camera("0"))}, [client])
    yield page
    page.executor.shutdown()


@pytest.fixture
def client(view: LiveView) -> Client:
    return Client(view)


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/stats.json", "application/json"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/cameras/1.jpg", "image/jpeg"),
    ],
)
def test_get_and_head(client: Client, path: str, content_type: str) -> None:
    found, head = client.request(path), client.request(path, "HEAD")
    assert (found.status, found.headers["Content-Type"]) == (200, content_type)
    assert int(found.headers["Content-Length"]) == len(found.body) > 0
    assert (head.status, head.body) == (200, b"")
    assert head.headers.keys() == found.headers.keys()
    assert b"hunter2" not in found.body


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "text/html", "*/*", "\x00"])
def test_metrics_are_text_whatever_a_client_accepts(client: Client, accept: str) -> None:
    found = client.request("/metrics", HTTP_ACCEPT=accept)
    assert found.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"camera_frames_captured_total{" in found.body


def test_head_of_a_stream_ends(client: Client) -> None:
    head = client.request("/cameras/1.mjpg", "HEAD")
    assert head.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
    assert "Content-Length" not in head.headers
    assert head.body == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "ANY"])
@pytest.mark.parametrize("path", ["/", "/stats.json", "/metrics", "/cameras/1.jpg", "/cameras/1.mjpg", "/none"])
def test_nothing_but_get_and_head(client: Client, path: str, method: str) -> None:
    found = client.request(path, method)
    assert (found.status, found.headers["Allow"]) == (405, "GET, HEAD")
    assert found.body == b"405 Method Not Allowed: expected GET or HEAD\n"
    assert found.headers["Content-Length"] == str(len(found.body))


@pytest.mark.parametrize(
    "path",
    [
        *("", "/index.html", "//", "/page.html", "/favicon.ico", "/stats.json/", "/metrics/x", "/cameras", "/cameras/"),
        *("/cameras/0.jpg", "/cameras/3.jpg", "/cameras/01.jpg", "/cameras/-1.jpg", "/cameras/1.png", "/cameras/1"),
        *("/cameras/1.jpg/", "/cameras/9999999999999.jpg", "/cameras/\u0661.jpg", "/cameras/1.jpg\n"),
        *("/../request.py", "/cameras/../../etc/passwd", "/cameras/../1.jpg", "http://127.0.0.1:9108/", "/\x00"),
    ],
)
def test_other_paths_are_not_found(client: Client, path: str) -> None:
    assert client.request(path).status == 404


OWN_NAME = socket.gethostname()


@pytest.mark.parametrize(
    ("listens", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1", 200),
        ("127.0.0.1", "127.0.0.1:9000", 200),  # another port of a tunnel
        ("127.0.0.1", "localhost:9108", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "[::1]:9108", 200),
        ("127.0.0.1", OWN_NAME, 200),
        ("127.0.0.1", f"{OWN_NAME}.local:9108", 200),
        ("127.0.0.1", "evil.example:9108", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
        ("127.0.0.1", "localhost.evil.example", 403),
        ("127.0.0.1", f"{OWN_NAME}.evil.example", 403),
        ("127.0.0.1", "10.0.0.1:9108", 403),
        ("127.0.0.1", "", 403),
        ("127.0.0.1", "[", 403),
        ("127.0.0.1", "127.0.0.1,evil.example", 403),  # two headers
        ("127.0.0.1", "evil.example:80@127.0.0.1", 403),
        ("127.0.0.1", "127.0.0.1@evil.example", 403),
        ("127.0.0.1", "evil.example/127.0.0.1", 403),
        ("10.0.1.21", "10.0.1.21:9108", 200),
        ("10.0.1.21", "127.0.0.1", 200),
        ("10.0.1.21", "10.0.1.22", 403),
        ("edge-1.example", "Edge-1.example:9108", 200),
        ("edge-1.example", "evil.example", 403),
        ("::", "[2001:db8::1]:9108", 200),
        ("0.0.0.0", "192.168.1.20:9108", 200),  # any of its addresses, but no name
        ("0.0.0.0", "evil.example", 403),
        ("0", "192.168.1.20:9108", 403),
    ],
)
def test_host_must_be_an_own_address(view: LiveView, listens: str, host: str, status: int) -> None:
    assert Client(view, listens).request("/", host=host).status == status
    assert Client(view, listens).request("/stats.json", host=host).status == status
    assert Client(view, listens).request("/cameras/1.jpg", host=host).status == status


def test_every_response_has_the_headers_that_protect_it(client: Client) -> None:
    for path, method in (("/", "GET"), ("/stats.json", "GET"), ("/cameras/1.jpg", "GET"), ("/", "POST"), ("/x", "GET")):
        headers = client.request(path, method).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")


class Tags(HTMLParser):
    """The tags of a page, and the text in its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in self.texts and data.strip():
            self.texts[self.tags[-1][0]].append(data)


def test_policy_admits_the_page_s_own_script_and_style_and_nothing_from_elsewhere(client: Client) -> None:
    policy = client.request("/").headers["Content-Security-Policy"]
    page = Tags(PAGE)
    for tag, texts in page.texts.items():
        assert len(texts) == 1
        digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert re.sub(r"'sha256-\S+'", "HASH", policy).split("; ") == [
        "default-src 'none'",
        "script-src HASH",
        "style-src HASH",
        "connect-src 'self'",
        "img-src blob: data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    assert client.request("/").body.decode() == PAGE
    # What the policy would block anyway.
    assert not [attributes for _, attributes in page.tags if {"style", "onclick", "onload"} & attributes.keys()]
    links = {value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")}
    assert links == {"data:,", "cameras/1.mjpg"}
    assert len(PAGE.splitlines()) <= 250


def test_ninth_viewer_gets_503_until_one_leaves(client: Client) -> None:
    """The first viewer's image is being sent while the others ask."""
    statuses: list[int] = []

    def ask_too(data: bytes) -> None:
        if data.startswith(b"\xff\xd8"):  # While a viewer receives its image, the next one asks.
            statuses.append(client.request("/cameras/1.jpg", sent=ask_too).status)

    assert client.request("/cameras/1.jpg", sent=ask_too).status == 200
    assert statuses[0] == 503  # of the innermost request, which ended first
    assert statuses.count(200) == MAX_VIEWERS - 1
    for _ in range(3 * MAX_VIEWERS):
        assert client.request("/cameras/1.jpg").status == 200


def test_viewer_that_leaves_makes_room(client: Client) -> None:
    def leave(data: bytes) -> None:
        if b"image/jpeg" in data:
            raise TimeoutError

    for _ in range(3 * MAX_VIEWERS):
        found = client.request("/cameras/1.mjpg", sent=leave)
        assert found.status == 200
        assert found.body.startswith(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: ")
        assert found.body.endswith(b"\xff\xd9\r\n--frame\r\n")


def test_camera_without_a_frame(client: Client) -> None:
    for _ in range(2 * MAX_VIEWERS):
        found = client.request("/cameras/2.jpg")
        assert (found.status, found.headers["Retry-After"]) == (503, "1")
    assert json.loads(client.request("/stats.json").body)["cameras"][1]["state"] == "waiting"
