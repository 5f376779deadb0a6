"""A network between edge device and server that has faults: a TCP proxy on 127.0.0.1."""

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from demo.node import free_ports

Mode = Literal["well", "latency", "trickle", "reset", "blackhole"]

LATENCY_S = 0.5
TRICKLE_BYTES, TRICKLE_S = 5, 0.2
POLL_S = 0.1


class TcpProxy:
    """Passes connections on to a port of 127.0.0.1.

    mode: "latency": responses are delayed; "trickle": responses arrive a few bytes at a time; "reset": responses are
        cut off in the middle by a reset; "blackhole": connections are accepted, and all bytes that are sent over them,
        or over older ones, are lost without an error. Such a connection stays lost after that.
    """

    def __init__(self, target: int) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.mode: Mode = "well"
        self._target = target
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
        self._listener.settimeout(POLL_S)

    def serve(self) -> None:
        """Accept connections until close(), each in threads of its own, which end with the connection."""
        with self._listener:
            while not self._closing.is_set():
                with suppress(TimeoutError):
                    client, _ = self._listener.accept()
                    threading.Thread(target=self._connect, args=[client], daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def _connect(self, client: socket.socket) -> None:
        is_lost = threading.Event()
        if self.mode == "blackhole":
            is_lost.set()
        try:
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        responses = threading.Thread(target=self._pass, args=[server, client, True, is_lost], daemon=True)
        responses.start()
        self._pass(client, server, False, is_lost)
        responses.join()
        for end in (client, server):
            end.close()

    def _pass(self, source: socket.socket, sink: socket.socket, is_response: bool, is_lost: threading.Event) -> None:
        """Pass on bytes, with the current fault, until one side closes."""
        with suppress(OSError, ValueError):  # ValueError: the other thread has closed it.
            while not self._closing.is_set():
                if not select.select([source], [], [], POLL_S)[0]:
                    continue
                data = source.recv(65536)
                if not data:
                    break
                if self.mode == "blackhole":
                    is_lost.set()
                if is_lost.is_set():
                    continue
                if is_response and self.mode == "latency":
                    self._closing.wait(LATENCY_S)
                while is_response and self.mode == "trickle" and data and not self._closing.wait(TRICKLE_S):
                    sink.sendall(data[:TRICKLE_BYTES])
                    data = data[TRICKLE_BYTES:]
                if is_response and self.mode == "reset":
                    sink.sendall(data[: len(data) // 2])
                    sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sink.close()
                    break
                sink.sendall(data)
        if not is_lost.is_set():
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@contextmanager
def tcp_proxy(target: int) -> Iterator[TcpProxy]:
    """Run a proxy until the block ends."""
    proxy = TcpProxy(target)
    thread = threading.Thread(target=proxy.serve)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
