"""A small HTTP server that misbehaves as TorchServe can't be made to, at least not on demand."""

import base64
import hashlib
import http.server
import json
import threading
import time

from deploy.node import free_ports


class FakeServer(http.server.ThreadingHTTPServer):
    """Stands in for a TorchServe that answers out of order, or in a way that TorchServe never would.

    The prediction of a frame is its hash. `behaviour` makes the answer from a request's frames and their number.
    """

    def __init__(self, behaviour: str) -> None:
        super().__init__(("127.0.0.1", free_ports(1)[0]), FakeHandler)
        self.behaviour = behaviour
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.bodies: list[bytes] = []
        self.asked_before_first_answer = 0
        self.tokens: set[str | None] = set()


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_OPTIONS(self) -> None:
        self.reply(200, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.tokens.add(self.headers["Authorization"])
            number = len(self.server.bodies)
        as_json = self.headers["Content-Type"] == "application/json"
        frames = [base64.b64decode(frame) for frame in json.loads(body).values()] if as_json else [body]
        answers = [{hashlib.sha256(frame).hexdigest(): 1.0} for frame in frames]
        match self.server.behaviour:
            case "out of order":
                time.sleep(0.3 if number % 3 == 1 else 0.0)
                if number == 1:
                    self.server.asked_before_first_answer = len(self.server.bodies)
                self.reply(200, json.dumps(answers if as_json else answers[0]).encode())
            case "some fail" if number % 3 == 0:
                self.reply(503, json.dumps({"code": 503, "type": "X", "message": "has no worker"}).encode())
            case "some fail":
                self.reply(200, json.dumps(answers if as_json else answers[0]).encode())
            case "html":
                self.reply(200, b"<html>maintenance</html>")
            case "too few":
                self.reply(200, json.dumps(answers[1:]).encode())
            case "not predictions":
                self.reply(200, json.dumps([7] * len(answers) if as_json else 7).encode())
            case "backpressure":
                self.reply(503, json.dumps({"code": 503, "type": "X", "message": "has no worker"}).encode())
            case "redirect":
                self.send_response(302)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case "silent":
                self.server.closing.wait(30)
                self.close_connection = True
            case "reset":
                self.close_connection = True

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
