"""A small HTTP server that misbehaves on demand, as TorchServe does not."""

import base64
import hashlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from demo.node import free_ports


class FakeServer(http.server.ThreadingHTTPServer):
    """Replaces a TorchServe that responds out of order, or in a way that TorchServe never would.

    The prediction of a frame is its hash. `behaviour` says how a request is answered, "first ..." only the first one
    with the same body. Request number 0, the test image, always gets a good response.
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, behaviour: str) -> None:
        super().__init__(("127.0.0.1", free_ports(1)[0]), FakeHandler)
        self.behaviour = behaviour
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.bodies: list[bytes] = []  # of the test image and of all requests after it
        self.tokens: set[str | None] = set()
        self.connections: set[tuple[str, int]] = set()  # that carried a request
        self.test_image_s = 0.0  # that the test image takes
        self.model_headers: dict[str, str] = {}  # of all responses: what the model needs

    @property
    def frames_asked(self) -> int:
        return len(self.bodies) - 1

    def handle_error(self, *_: Any) -> None:
        pass  # A client that is gone.


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Nagle's algorithm would delay each response by 40 ms.

    def do_OPTIONS(self) -> None:
        self.reply(200, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.tokens.add(self.headers["Authorization"])
            self.server.connections.add(self.client_address)
            is_first_time = body not in self.server.bodies[:-1]
        as_json = self.headers["Content-Type"] == "application/json"
        frames = [base64.b64decode(frame) for frame in json.loads(body).values()] if as_json else [body]
        predictions = [{hashlib.sha256(frame).hexdigest(): 1.0} for frame in frames]
        good = json.dumps(predictions if as_json else predictions[0]).encode()
        behaviour = self.server.behaviour if number else "good"
        time.sleep(0.0 if number else self.server.test_image_s)
        if behaviour.startswith("first ") and not is_first_time:
            behaviour = "good"
        match behaviour.removeprefix("first "):
            case "good":
                self.reply(200, good)
            case "out of order":
                time.sleep(0.3 if number % 3 == 1 else 0.0)
                self.reply(200, good)
            case "some fail" if number % 3 == 0:
                self.reply(400, json.dumps({"error": "not an image"}).encode())
            case "some fail":
                self.reply(200, good)
            case "html":
                self.reply(200, b"<html>maintenance</html>")
            case "garbage":
                self.reply(200, b"\xff\x00" * 50)
            case "deep":
                self.reply(200, b"[" * 100_000)
            case "not a number":
                self.reply(200, good.replace(b"1.0", b"NaN"))
            case "too few":
                self.reply(200, json.dumps(predictions[1:]).encode())
            case "not predictions":
                self.reply(200, json.dumps([7] * len(predictions) if as_json else 7).encode())
            case "401":
                self.reply(401, json.dumps({"error": "who are you?"}).encode())
            case "429" | "500" | "502" | "503" | "504" | "507" as status:
                self.reply(int(status), json.dumps({"code": int(status), "type": "X", "message": "try later"}).encode())
            case "redirect":
                self.send_response(302)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case "slow":
                self.server.closing.wait(0.5)
                self.reply(200, good)
            case "silent":
                self.server.closing.wait(60)
                self.close_connection = True
            case "trickle":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                while not self.server.closing.wait(0.2):
                    self.wfile.write(b" ")
                self.close_connection = True
            case "headers trickle":
                while not self.server.closing.wait(0.2):
                    self.wfile.write(b"H")
                self.close_connection = True
            case "chunked":
                self.reply_in_chunks(good)
            case "chunks cut off":
                self.reply_in_chunks(good, is_complete=False)
            case "half a response" | "stalls" as end:
                self.send_response(200)
                self.send_header("Content-Length", str(len(good)))
                self.end_headers()
                self.wfile.write(good[: len(good) // 2])
                self.server.closing.wait(3 if end == "stalls" else 0)
                self.close_connection = True
            case "huge number":
                self.reply(200, good.replace(b"1.0", b"1" * 400))
            case "endless number":
                self.reply(200, good.replace(b"1.0", b"1" * 5000))
            case "odd charset":
                self.reply(200, good.replace(b"1.0", b"\xff"), "application/json; charset=idna")
            case "closes":
                self.close_connection = True
            case "resets":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
            case only if only.startswith("only ") and self.headers["Authorization"] != f"Bearer {only.split()[-1]}":
                error = {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed"}
                self.reply(400, json.dumps(error).encode())
            case only if only.startswith("only "):
                self.reply(200, good)
            case small if small.startswith("at most ") and len(body) > int(small.split()[-1]):
                self.reply(413, b"")
                self.close_connection = True
            case small if small.startswith("at most "):
                self.reply(200, good)
            case _:
                raise ValueError(self.server.behaviour)

    def reply(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.server.model_headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply_in_chunks(self, body: bytes, is_complete: bool = True) -> None:
        """Send a response whose length is not stated beforehand. It is complete with the empty chunk at its end."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        middle = len(body) // 2
        for chunk in (body[:middle], body[middle:], b"") if is_complete else (body[:middle],):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.close_connection = not is_complete

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fake_server(behaviour: str) -> Iterator[FakeServer]:
    """Run a fake server until the block ends."""
    server = FakeServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
