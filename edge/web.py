"""The web page of a run, `request.py --http`: images, figures and metrics by HTTP. Nothing can be changed by it."""

import base64
import hashlib
import io
import ipaddress
import json
import logging
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from edge.client import TorchServeClient
from edge.deadline import DeadlineReader
from edge.errors import OutputError
from edge.frames import Stream
from edge.metrics import StatsCollector
from edge.options import LOOPBACK
from edge.stats import CameraStats
from edge.view import IMAGE_INTERVAL_S, CameraView, LiveView

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
MAX_VIEWERS = 8
MAX_CONNECTIONS = 64  # of viewers and all others; a page opens up to 6
TIMEOUT_S = 5.0  # of a request, and of each image that a viewer receives
REPEAT_S = 1.0  # An image is sent again after so long: this finds out that a viewer has left.
MAX_REQUEST_BYTES = 1 << 16
SEND_BUFFER = 1 << 18  # bytes: with more of them a slow viewer gets old images
BOUNDARY = b"--frame\r\n"
CONNECTION = "edge.connection"  # in the WSGI environment: the viewer's socket

Write = Callable[[bytes], Any]
Send = Callable[[str, Any, bytes | None], Write]  # status, headers, body

log = logging.getLogger(__name__)


def source_hash(tag: str) -> str:
    """Return the hash of the page's script or style, as a Content-Security-Policy has it."""
    text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# The page loads its own images and figures, and nothing else; no other site can embed it.
POLICY = f"default-src 'none'; script-src {source_hash('script')}; style-src {source_hash('style')}; connect-src 'self'"
POLICY += "; img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
]


class Application:
    """The WSGI application. `hosts`: the addresses and the name that it listens on."""

    def __init__(self, view: LiveView, registry: CollectorRegistry, hosts: set[str]) -> None:
        self._cameras, self._figures, self._metrics = list(view.cameras.values()), view.figures, make_wsgi_app(registry)
        self._hosts, self._viewers = hosts, threading.BoundedSemaphore(MAX_VIEWERS)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        has_body = environ["REQUEST_METHOD"] != "HEAD"

        def send(status: str, headers: Any, body: bytes | None) -> Write:
            length = [] if body is None else [("Content-Length", str(len(body)))]
            write: Write = start_response(status, [*headers, *length, *HEADERS])
            write(body or b"" if has_body else b"")
            return write

        with suppress(OSError):  # The client has left, or received nothing for TIMEOUT_S.
            self._respond(environ, send)
        return []

    def _respond(self, environ: dict[str, Any], send: Send) -> None:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        image = re.fullmatch(r"/cameras/([1-9][0-9]{0,5})\.(jpg|mjpg)", path)
        if not self._is_own_address(environ.get("HTTP_HOST", "")):
            send_error(send, "403 Forbidden", "expected an address of this device as the host, or that of --http")
        elif method not in ("GET", "HEAD"):
            send_error(send, "405 Method Not Allowed", "expected GET or HEAD", ("Allow", "GET, HEAD"))
        elif path == "/":
            send("200 OK", [("Content-Type", "text/html; charset=utf-8")], PAGE.encode())
        elif path == "/stats.json":
            send("200 OK", [("Content-Type", "application/json")], json.dumps(self._figures()).encode())
        elif path == "/metrics":
            response: list[Any] = []
            # prometheus-client rejects HEAD, and fails for some types.
            as_get = {**environ, "REQUEST_METHOD": "GET", "HTTP_ACCEPT": ""}
            body = b"".join(self._metrics(as_get, lambda *arguments: response.extend(arguments)))
            send(response[0], response[1], body)
        elif image and int(image[1]) <= len(self._cameras):
            viewer = environ[CONNECTION] if method == "GET" and image[2] == "mjpg" else None
            self._send_images(self._cameras[int(image[1]) - 1], image[2], viewer, send)
        else:
            expected = "expected /, /stats.json, /metrics, /cameras/1.jpg or /cameras/1.mjpg"
            send_error(send, "404 Not Found", f"{expected}, of {len(self._cameras)} cameras")

    def _is_own_address(self, host: str) -> bool:
        """Return whether a Host header is an address of this device, whatever its port.

        This prevents DNS rebinding: another site whose name resolves to this device could read the page.
        """
        name = re.sub(r":[0-9]*$", "", host.lower()).strip("[]")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            own = socket.gethostname().lower()
            return name in {"localhost", own, f"{own}.local", *self._hosts}
        return address.is_loopback or str(address) in self._hosts or not self._hosts.isdisjoint({"0.0.0.0", "::"})

    def _send_images(self, camera: CameraView, kind: str, viewer: socket.socket | None, send: Send) -> None:
        """Send an image of a camera; with the kind "mjpg" a stream of its new images, until the viewer leaves."""
        if not self._viewers.acquire(blocking=False):
            send_error(send, "503 Service Unavailable", f"{MAX_VIEWERS} others are watching", ("Retry-After", "1"))
            return
        try:
            image, sent, sent_at = camera.image(), b"", 0.0
            if not image:
                send_error(send, "503 Service Unavailable", "the camera has no frame yet", ("Retry-After", "1"))
            elif kind == "jpg":
                send("200 OK", [("Content-Type", "image/jpeg")], image)
            else:
                write = send("200 OK", [("Content-Type", "multipart/x-mixed-replace; boundary=frame")], None)
                write(BOUNDARY if viewer else b"")
                while viewer:
                    image = camera.image()
                    if image is not sent or time.monotonic() - sent_at >= REPEAT_S:
                        head = b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(image)
                        # A browser shows a part when the boundary after it has arrived.
                        write(head + image + b"\r\n" + BOUNDARY)
                        sent, sent_at = image, time.monotonic()
                    if select.select([viewer], [], [], IMAGE_INTERVAL_S)[0]:
                        return  # The viewer has left.
        finally:
            self._viewers.release()


def send_error(send: Send, status: str, expected: str, *headers: tuple[str, str]) -> None:
    send(status, [("Content-Type", "text/plain"), *headers], f"{status}: {expected}\n".encode())


class Handler(WSGIRequestHandler):
    timeout = TIMEOUT_S

    def handle(self) -> None:
        self.rfile.close()
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, MAX_REQUEST_BYTES))
        super().handle()

    def get_environ(self) -> dict[str, Any]:
        self.connection.settimeout(TIMEOUT_S)  # DeadlineReader has shortened it.
        return {**super().get_environ(), CONNECTION: self.connection}

    def finish(self) -> None:
        """Read the body of a rejected request: otherwise its sender gets a reset connection instead of the response."""
        super().finish()
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            body = DeadlineReader(self.connection)
            while body.read(MAX_REQUEST_BYTES):
                pass

    def log_message(self, *_: object) -> None:
        """Write no line for each request."""


class Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, up to MAX_CONNECTIONS; the next ones are closed."""

    request_queue_size = MAX_CONNECTIONS
    allow_reuse_address = sys.platform != "win32"  # There two servers could have the same port.

    def __init__(self, address: tuple[str, int]) -> None:
        self._connections: set[socket.socket] = set()
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would look up the name of the address, which may take long.
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux then also notices a viewer whose images still fit into it.
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * TIMEOUT_S))
        if len(self._connections) > MAX_CONNECTIONS:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # The client has left, or did not complete its request.
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):  # It has ended.
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()  # waits for the threads


@contextmanager
def serve_page(
    address: tuple[str, int] | None, stats: dict[Stream, CameraStats], clients: Sequence[TorchServeClient]
) -> Iterator[LiveView | None]:
    """Serve the page at http://address/ until the block ends; yield what it shows. Raises OutputError if that fails."""
    if address is None:
        yield None
        return
    view, registry = LiveView(stats, clients), CollectorRegistry()
    registry.register(StatsCollector(stats))
    netloc = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
    try:
        server = Server(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that can't be one
        raise OutputError(f"can't serve the web page on {netloc}: {getattr(error, 'strerror', '') or error}") from error
    application = Application(view, registry, {address[0].lower(), str(server.server_address[0])})
    server.set_app(application)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    log.info("the web page is at http://%s/", netloc)
    if address[0] not in LOOPBACK:
        log.warning("everybody who can reach http://%s/ sees the cameras: it has no password", netloc)
    try:
        yield view
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        view.executor.shutdown()
