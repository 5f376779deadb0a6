"""A request.py with its web page, for the tests of the page by HTTP and in a browser."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import requests

from demo.node import free_ports
from tests.support.fake_server import FakeServer
from tests.support.frames import Pixels, decoded, jpeg
from tests.support.scripts import Run, running

BLUE, ORANGE = (200, 60, 20), (20, 120, 230)


def shades(color: tuple[int, int, int], count: int = 20) -> list[bytes]:
    """Return frames of a color that get brighter, so that the order of pictures can be seen."""
    return [jpeg(np.full((240, 320, 3), np.array(color) * (0.5 + 0.5 * i / count), np.uint8)) for i in range(count)]


def is_of(picture: Pixels, frames: list[bytes]) -> bool:
    """Whether a picture of 240 x 320 shows one of the frames, below its label."""
    found = picture[120:].astype(int)
    return min(float(np.abs(found - decoded(frame)[120:]).mean()) for frame in frames) < 4


class Page:
    """The page of a request.py that runs."""

    def __init__(self, edge: Run, port: int) -> None:
        self.edge, self.port, self.url = edge, port, f"http://127.0.0.1:{port}"

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=20)

    def is_up(self) -> bool:
        try:
            return self.get("/").ok
        except requests.ConnectionError:
            return False

    def figures(self) -> Any:
        return self.get("/stats.json").json()

    def connections(self) -> int:
        """Return the number of connections that the page has open."""
        found = self.edge.process.net_connections("tcp")
        return sum(each.laddr.port == self.port and each.status != "LISTEN" for each in found)


class Viewer:
    """A viewer of a camera's stream. The kernel keeps little of what it has not read."""

    def __init__(self, page: Page, camera: int = 1) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(30)
        self._socket.connect(("127.0.0.1", page.port))
        self._socket.sendall(b"GET /cameras/%d.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n" % camera)
        self.file = self._socket.makefile("rb")

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._socket.close()

    def status(self) -> int:
        status = int(self.file.readline().split()[1])
        while self.file.readline().strip():
            pass
        return status

    def picture(self) -> bytes:
        """Return the next picture."""
        line = b""
        while not (found := re.match(rb"Content-Length: (\d+)", line)):
            line = self.file.readline()
            assert line, "the stream has ended"
        assert self.file.readline() == b"\r\n"
        return self.file.read(int(found[1]))


@contextmanager
def serving(
    fake: FakeServer,
    folder: Path,
    *inputs: str,
    port: int | None = None,
    is_waiting: bool = True,
    server_wait_s: float = 30,
) -> Iterator[Page]:
    """Run request.py with its page until the block ends; is_waiting: first wait for a result of each camera."""
    port = port or free_ports(1)[0]
    arguments = [argument for each in inputs for argument in ("--input", each)]
    with running(fake, folder, *arguments, "--http", str(port), "--server-wait", str(server_wait_s)) as edge:
        page = Page(edge, port)
        if is_waiting:
            edge.wait_until(lambda: len({line["camera"] for line in edge.results()}) == len(inputs))
        else:
            edge.wait_until(page.is_up)
        yield page
