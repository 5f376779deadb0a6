"""A small HTTP server that misbehaves as TorchServe can't be made to, at least not on demand."""

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
    """Stands in for a TorchServe that answers out of order, or in a way that TorchServe never would.

    The prediction of a frame is its hash. `behaviour` makes the answer from a request's frames and their number; the
    test picture, number 0, is always answered well.
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, behaviour: str) -> None:
        super().__init__(("127.0.0.1", free_ports(1)[0]), FakeHandler)
        self.behaviour = behaviour
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.bodies: list[bytes] = []  # of the test picture, and of all that came after it
        self.tokens: set[str | None] = set()
        self.connections: set[tuple[str, int]] = set()  # over which anything was asked

    @property
    def frames_asked(self) -> int:
        return len(self.bodies) - 1

    def handle_error(self, *_: Any) -> None:
        pass  # A client that is gone.


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

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
        answers = [{hashlib.sha256(frame).hexdigest(): 1.0} for frame in frames]
        good = json.dumps(answers if as_json else answers[0]).encode()
        behaviour = self.server.behaviour if number else "good"
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
                self.reply(200, json.dumps(answers[1:]).encode())
            case "not predictions":
                self.reply(200, json.dumps([7] * len(answers) if as_json else 7).encode())
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
            case "half an answer" | "stalls" as end:
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
        self.end_headers()
        self.wfile.write(body)

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
